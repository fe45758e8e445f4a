"""Measures and tests fused_lars on a GPU: figures, digests, CUDA tests and sanitizers, in one folder.

    make gpu-report
    make gpu-report PYTHON=python3
    make gpu-report OPTIONS="--digest 0123..."

The second form uses that Python and its torch as they are, and installs nothing. OPTIONS are options of this
program. For each part the report says that it passed, that it failed, or why it was not run. A part that
fails does not stop the others. The exit status is 1 if a part failed, and 2 without a GPU. The report is
written after each part, so a run that is cut short leaves the parts before.

report.md    the tables
report.json  the same with all digits, and the machine
report.png   each step as a multiple of the memory floor, if matplotlib is installed
*.log        what the programs printed
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import torch
from machine import driver_and_clocks, machine
from report_files import write

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKLOADS = ("ResNet-50", "ViT-B/16", "400 small tensors")
TYPES = ("fp32", "bf16", "masters", "momentum", "stochastic")
OPTIMIZERS = ("fused_lars", "torch SGD fused", "torch SGD foreach", "timm", "timm foreach", "apex")
# Tests of the step itself come first, because the rest may be cut short.
TESTS = sorted(
    ROOT.glob("tests/**/test_*.py"),
    key=lambda path: (path.name != "test_cuda.py", path.parent.name != "ops", path),
)
DIGEST = [sys.executable, "tests/support/digest.py", "cuda", "1"]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND_ERRORS = 9  # exit status of a sanitizer that has found errors
ABSENT = re.compile(r"No module named '?([\w.]+)")


@contextlib.contextmanager
def default_interrupts():
    """Lets programs that are started meanwhile be interrupted.

    A shell ignores interrupts for what it starts in the background, and programs inherit that.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class Programs:
    """Runs programs for at most `seconds` in total. Their output goes to logs in a folder."""

    def __init__(self, folder: pathlib.Path, seconds: float) -> None:
        self.folder, self._end = folder, time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds that are left."""
        return max(0.0, self._end - time.monotonic())

    def run(self, name: str, command, seconds=math.inf, **environment) -> tuple[int | None, str]:
        """Returns the exit status and the output. The status is None if time was up."""
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            with default_interrupts():
                process = subprocess.Popen(
                    [*map(str, command)],
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                status = process.wait(min(seconds, self.left()))
            except subprocess.TimeoutExpired:
                status = None
                process.send_signal(signal.SIGINT)  # pytest then reports what has run
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return status, log.read_text(errors="replace")


def part(name: str, result: str, text: str) -> dict[str, str]:
    """A line of the report. The result is "passed", "failed" or "not run"."""
    print(f"{name}: {result}, {text}", flush=True)
    return {"part": name, "result": result, "text": text}


def outcome(status: int | None, output: str) -> tuple[str, str]:
    """Returns a program's result and a text about it: after an exception, the last line of output."""
    last = output.strip().rpartition("\n")[2]
    if status is None:
        return "failed", "it did not end in its time"
    if status and (module := ABSENT.search(last)):
        return "not run", f"{module[1]} is not installed"
    return "failed" if status else "passed", last


# ---------------------------------------------------------------- parts


def figures(programs, options, report):
    """Times each workload and type in its own process, so that a fault ends only that process."""
    seconds = 0.012 * options.seconds  # about two minutes in total, with program starts
    for workload in options.workloads:
        for types in options.types:
            name = re.sub(r"\W+", "-", f"figures {workload} {types}")
            plot = programs.folder / f"{name}.png"
            command = [sys.executable, "benchmarks/step.py", "--device", "cuda", "--output", plot]
            command += ["--workloads", workload, "--types", types, "--optimizers", *OPTIMIZERS]
            command += ["--quick"] if options.quick else ["--seconds", seconds]
            status, output = programs.run(name, command, programs.left() / 4)
            result, text = outcome(status, output)
            if result == "passed":
                measured = json.loads(plot.with_suffix(".json").read_text())
                report["results"] += measured["results"]
                text = "; ".join(["measured", *map("without {}".format, measured["left_out"])])
            yield part(f"figures of {workload}, {types}", result, text)
            for path in (plot, plot.with_suffix(".json")):
                path.unlink(missing_ok=True)  # it is in the report


def digests(programs, options, report):
    """Checks that digests repeat, and that they equal another GPU's if its digest is given."""
    found = []
    for run in range(2):
        status, output = programs.run(f"digest-{run}", [*DIGEST, "1"], programs.left() / 4)
        result, text = outcome(status, output)
        if result != "passed":
            yield part("digests", result, text)
            return
        found += output.split()[-2:]
    report["digests"] = found
    expected = options.digest or found[0]
    text = f"{len(found)} runs: {', '.join(sorted(set(found)))}"
    text += f"; expected: {options.digest}" if options.digest else ""
    yield part("digests", "passed" if set(found) == {expected} else "failed", text)


def tests(programs, options, report):
    """Runs the CUDA tests, in several processes if pytest-xdist is installed."""
    xml = programs.folder / "tests.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda and not examples and not gpu_report"]
    command += ["--continue-on-collection-errors", f"--junitxml={xml}", "-o", "junit_family=xunit2"]
    command += ["-n", min(8, os.cpu_count())] if importlib.util.find_spec("xdist") else []
    status, output = programs.run("tests", [*command, *options.tests], 0.6 * programs.left())
    if not xml.exists():
        yield part("tests", *outcome(status, output))
        return
    counts, absent = count_tests(ElementTree.parse(xml))
    report["tests"] = counts
    text = ", ".join(f"{count} {result}" for result, count in counts.items())
    text += "; stopped when its time was over" if status is None else ""
    text += "".join(f"; {file} not run: {module} is not installed" for file, module in absent)
    yield part("tests", "passed" if counts["passed"] and not counts["failed"] else "failed", text)


def count_tests(xml) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Counts tests by result in pytest's XML, and lists files that need a missing module, with its name."""
    counts, absent = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in xml.iter("testcase"):
        error = case.find("error")
        module = ABSENT.search(error.text or "") if error is not None else None
        if module and error.get("message") == "collection failure":
            absent.append((case.get("name"), module[1]))
        elif error is not None or case.find("failure") is not None:
            counts["failed"] += 1
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, absent


def sanitizers(programs, options, report):
    """Runs compute-sanitizer on the digest program, which uses every type and layout."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    program = shutil.which("compute-sanitizer", path=places)
    for index, tool in enumerate(SANITIZERS):
        if not program:
            yield part(tool, "not run", "compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin")
            continue
        command = [program, "--tool", tool, "--error-exitcode", FOUND_ERRORS]
        # initcheck must also see the writes of torch's kernels.
        command += [] if tool == "initcheck" else ["--kernel-regex", "kns=step_kernel"]
        seconds = programs.left() / (len(SANITIZERS) - index)
        status, output = programs.run(tool, [*command, *DIGEST], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        _, text = outcome(status, output)
        yield part(tool, {0: "passed", FOUND_ERRORS: "failed"}.get(status, "not run"), text)


# ---------------------------------------------------------------- all of it


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=480, help="that all parts may take (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "gpu-report", help="a folder")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="NAME", help="of step.py")
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="NAME", help="of step.py")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="all")
    parser.add_argument("--digest", help="that of another GPU's report, which this one must have too")
    parser.add_argument("--quick", action="store_true", help="three rounds each: only to try it out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"a GPU is needed, and torch {torch.__version__} sees none")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fused_lars::step_", "CUDA"):
        parser.error("fused_lars was built without its CUDA part: make build FUSED_LARS_CUDA=1")
    return options


def main() -> None:
    options = parse_options()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.png").unlink(missing_ok=True)  # of an earlier report
    programs = Programs(folder, options.seconds)
    report = {"machine": machine(), "results": [], "parts": []}
    report["machine"]["nvidia-smi before"] = driver_and_clocks()
    for parts in (figures, digests, tests, sanitizers):
        try:
            for line in parts(programs, options, report):
                report["parts"].append(line)
        except Exception as error:  # whatever it is, run the other parts
            report["parts"].append(part(parts.__name__, "failed", repr(error)))
        if parts is figures:
            report["machine"]["nvidia-smi after figures"] = driver_and_clocks()
        write(report, folder)
    print(f"report: {options.output}")
    sys.exit(any(line["result"] == "failed" for line in report["parts"]))


if __name__ == "__main__":
    main()
