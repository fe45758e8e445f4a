"""benchmarks/gpu_report.py: all of it with a GPU, and its written files on any machine."""

import argparse
import importlib
import json
import os
import signal
import sys
from xml.etree import ElementTree

import pytest
import torch

from paths import ROOT
from python_program import run


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu_report")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
def test_report_of_a_gpu_cuda(tmp_path):
    """One part fails, because its digest is zeros. The report says so, and the parts after it run."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not on this machine')")
    (tmp_path / "timm.py").write_text("raise ImportError('not on this machine')")
    options = ["--quick", "--workloads", "161 tensors of one element", "--types", "bf16", "masters"]
    options += ["--tests", "tests/ops/test_cuda.py::test_a_step_captured_without_a_step_before_cuda"]
    options += ["--digest", 64 * "0", "--output", tmp_path / "out"]
    run("benchmarks/gpu_report.py", *options, path=[tmp_path], status=1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    parts = {line["part"]: line for line in report["parts"]}
    assert parts["figures of 161 tensors of one element, bf16"]["result"] == "passed"
    assert "timm: not on this machine" in parts["figures of 161 tensors of one element, bf16"]["text"]
    assert parts["digests"]["result"] == "failed"
    assert len(report["digests"]) == 4
    assert len(set(report["digests"])) == 1
    assert parts["tests"] == {"part": "tests", "result": "passed", "text": "1 passed, 0 failed, 0 skipped"}
    assert parts["plot"] == {"part": "plot", "result": "not run", "text": "not on this machine"}
    assert {"memcheck", "racecheck", "synccheck", "initcheck"} <= set(parts)
    assert [result["types"] for result in report["results"]] == ["bf16", "masters"]
    for result, step_bytes in zip(report["results"], (10, 20)):
        assert result["floor_ms"] == pytest.approx(step_bytes * 161 / result["add_gb_per_s"] / 1e6)
    names = [step["optimizer"] for step in report["results"][0]["steps"]]
    assert {"fused_lars", "torch SGD fused", "torch SGD foreach"} <= set(names)
    step = next(step for step in report["results"][0]["steps"] if step["optimizer"] == "fused_lars")
    assert all(step[kind] > 0 for kind in ("ms", "warm_ms", "graph_ms", "host_ms"))
    assert report["machine"]["GPU"] == torch.cuda.get_device_name()
    assert report["machine"]["torch"] == torch.__version__
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| tests | passed | 1 passed, 0 failed, 0 skipped |" in text
    assert "### 161 tensors of one element, masters" in text
    assert not (tmp_path / "out" / "report.png").exists()


def test_without_a_gpu_it_says_so(gpu_report, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu_report.main()
    assert f"a GPU is needed, and torch {torch.__version__} sees none" in capsys.readouterr().err


STEPS = [
    {"optimizer": "fused_lars", "ms": 0.2, "warm_ms": 0.1, "host_ms": 0.05, "graph_ms": 0.15, "launches": 1},
    {"optimizer": "torch SGD fused", "ms": 0.16, "warm_ms": 0.3, "host_ms": 1.25, "launches": None},
]
RESULT = {"workload": "ResNet-50", "types": "bf16", "tensors": 161, "parameters": 25_557_032, "rounds": 7}
RESULT |= {"copy_gb_per_s": 3012.3, "steps": STEPS}
STEPS[0] |= {"idle": 0.0, "gb_per_s": 1277.9, "per_cent_of_copy": 42.4, "times_floor": 2.4}
STEPS[1] |= {"idle": 1.0, "gb_per_s": 1597.3, "per_cent_of_copy": 53.0, "times_floor": 1.9}
REPORT = {
    "machine": {
        "GPU": "a GPU",
        "commit": None,
        "fused_lars": "one\ntwo",
        "nvidia-smi": {"power": "5 W", "sm": "6"},
    },
    "results": [RESULT],
    "parts": [{"part": "memcheck", "result": "not run", "text": "compute-sanitizer is not there"}],
}


def test_tables_hold_the_figures(gpu_report, tmp_path):
    gpu_report.write(REPORT, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "# fused_lars on a GPU" in lines
    assert "| memcheck | not run | compute-sanitizer is not there |" in lines
    assert "161 tensors, 25,557,032 parameters. A copy moved 3,012 GB/s; 7 rounds." in lines
    assert "| fused_lars | 1 | 200.0 | 100.0 | 150.0 | 50.0 | 1,278 | 42 % | 1.25 |" in lines
    assert "| torch SGD fused | - | 160.0* | 300.0 | - | 1,250.0 | 1,597 | 53 % | 1.00 |" in lines
    assert "| commit | not known |" in lines
    assert "| fused_lars | one; two |" in lines
    assert "| nvidia-smi | power 5 W, sm 6 |" in lines
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_tests_are_counted_and_files_that_lack_a_module_are_named(gpu_report):
    xml = """<testsuites><testsuite>
      <testcase name="a"/><testcase name="b"/><testcase name="c"><skipped/></testcase>
      <testcase name="d"><failure/></testcase>
      <testcase name="e"><error message="failed on setup">No module named 'jax'</error></testcase>
      <testcase name="f"><error message="collection failure">SyntaxError</error></testcase>
      <testcase name="tests.test_optimizer_info"><error message="collection failure">E
        ModuleNotFoundError: No module named 'expecttest'</error></testcase>
    </testsuite></testsuites>"""
    counts, absent = gpu_report.count_tests(ElementTree.ElementTree(ElementTree.fromstring(xml)))
    assert counts == {"passed": 2, "failed": 3, "skipped": 1}
    assert absent == [("tests.test_optimizer_info", "expecttest")]


@pytest.fixture
def interrupts_are_ignored():
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interrupts_are_ignored")
def test_a_program_is_stopped_when_its_time_is_over(gpu_report, tmp_path):
    """An interrupt stops it, so that it can still print its results. In the background of a shell too."""
    program = "trap 'echo results; exit 3' INT; while true; do sleep 0.1; done"
    programs = gpu_report.Programs(tmp_path, 600)
    # 15 s: on a busy machine too, the shell has set its trap by then.
    status, output = programs.run("sleeper", ["bash", "-c", program], seconds=15)
    assert status is None
    assert "results" in output
    assert output == (tmp_path / "sleeper.log").read_text()
    assert 0 < programs.left() < 585.5
    status, output = programs.run("echo", [sys.executable, "-c", "import os; print(os.environ['A'])"], A="b")
    assert (status, output) == (0, "b\n")


def test_why_a_program_failed(gpu_report):
    missing = "/usr/bin/python3: No module named pytest"
    assert gpu_report.outcome(1, missing) == ("not run", "pytest is not installed")
    assert gpu_report.outcome(0, missing) == ("passed", missing)
    assert gpu_report.outcome(1, f"{missing}\nRuntimeError: bad\n") == ("failed", "RuntimeError: bad")
    assert gpu_report.outcome(None, "") == ("failed", "it did not end in its time")


def test_sanitizers_find_errors_or_do_not_run(gpu_report, monkeypatch, tmp_path):
    """One finds nothing, one finds errors, one cannot run, and one takes too long."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        """#!/bin/sh
        echo "$*"
        case "$2" in memcheck) exit 0;; racecheck) exit 9;; synccheck) exit 1;; esac
        exec sleep 60
        """
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    lines = list(gpu_report.sanitizers(gpu_report.Programs(tmp_path, 3), None, {}))
    assert [(line["part"], line["result"]) for line in lines] == [
        ("memcheck", "passed"),
        ("racecheck", "failed"),
        ("synccheck", "not run"),
        ("initcheck", "not run"),
    ]
    assert "--error-exitcode 9 --kernel-regex kns=step_kernel" in lines[1]["text"]
    assert "step_kernel" not in (tmp_path / "initcheck.log").read_text()


def test_an_old_peer_is_left_out(gpu_report):
    step = importlib.import_module("step")
    options = argparse.Namespace(device="cpu", quick=True, seconds=0)

    def old_peer(params):
        raise TypeError("unexpected keyword argument 'foreach'")

    makers = {"torch SGD": lambda params: torch.optim.SGD(params, lr=0.1), "old": old_peer}
    medians, _, left_out = step.measure([(2, 3)], torch.float32, makers, options, probe_elements=16)
    assert set(medians) == {"torch SGD", step.ADD}
    assert left_out == ["old: unexpected keyword argument 'foreach'"]


def test_shapes_are_those_of_the_models(gpu_report):
    models, shapes = pytest.importorskip("torchvision").models, importlib.import_module("shapes")
    for name in ("resnet50", "vit_b_16"):
        with torch.device("meta"):
            model = getattr(models, name)()
        assert [tuple(p.shape) for p in model.parameters()] == getattr(shapes, name)()
