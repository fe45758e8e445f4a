"""Runs the scripts of examples/ and benchmarks/ as a user does, and checks what they write."""

import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from paths import ROOT
from python_program import environment, run


def has_colour(image, colour, pixels=200, tolerance=0.01):
    """Whether a plot shows at least a short line of a colour, #rrggbb."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(image[..., :3] - wanted).max(axis=-1) < tolerance).sum() > pixels


def run_by_two(arguments, plot):
    """Runs an example in two processes. Returns its output and the numbers that it writes."""
    printed = run("-m", "torch.distributed.run", "--nproc-per-node", 2, *arguments, "--output", plot)
    return printed, json.loads(plot.with_suffix(".json").read_text())


def accuracies(printed):
    return [line for line in printed.splitlines() if "±" in line]


def without_labels(image):
    """The left part of a plot, because a line's label at its right end has the same colour."""
    return image[:, : image.shape[1] * 2 // 3]


def run_and_read(command, plot):
    """Returns what an example prints, its JSON and its picture."""
    printed = run(*command, "--output", plot)
    return printed, json.loads(plot.with_suffix(".json").read_text()), matplotlib.image.imread(plot)


# A batch of 75 gives shares of 38 and 37 images, and a last batch of 5 to share.
DIGITS = ("examples/digits.py", "--quick", "--batch-sizes", 75, 1280)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run_and_read(DIGITS, tmp_path_factory.mktemp("digits") / "digits.png")


def test_digits_are_learnt(digits):
    _, rows, _ = digits
    assert [(row["optimizer"], row["batch_size"]) for row in rows] == [
        (name, size) for size in (75, 1280) for name in ("LARS", "SGD", "tuned SGD")
    ]
    for row in rows:
        # Guessing gets 10 per cent of 517 images, with a standard deviation of 1.3. At a rate scaled linearly
        # to the whole training set, SGD need not learn. If it does not, that is a result.
        if (row["optimizer"], row["batch_size"]) != ("SGD", 1280):
            assert min(row["accuracies"]) > 60, row


def test_digits_prints_what_it_measured(digits):
    printed, rows, _ = digits
    for row in rows:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [str(row["batch_size"])])
        means = [float(mean) for mean in re.findall(r"([\d.]+) ±", line)]
        mean = means[["LARS", "SGD", "tuned SGD"].index(row["optimizer"])]
        assert mean == pytest.approx(statistics.fmean(row["accuracies"]), abs=0.006)


def test_digits_tuned_rate_is_that_of_the_batch_size(digits):
    # Of the tuned batch sizes, 64 is nearest to 75.
    rates = {(row["optimizer"], row["batch_size"]): row["lr"] for row in digits[1]}
    assert rates["tuned SGD", 75] == 2**-5
    assert rates["tuned SGD", 1280] == 2**-3
    assert rates["SGD", 75] == pytest.approx(2**-5 * 75 / 32)


def test_digits_plot_shows_every_line(digits):
    image = without_labels(digits[2])
    assert has_colour(image, "#0b6e99")
    assert has_colour(image, "#d9730d")
    assert has_colour(image, "#8a4fbf")


# As above. The embeddings of shares of 38 and 37 images come together for one loss.
SELF_SUPERVISED = ("examples/self_supervised.py", "--quick", "--batch-size", 75)


@pytest.fixture(scope="module")
def self_supervised(tmp_path_factory):
    return run_and_read(SELF_SUPERVISED, tmp_path_factory.mktemp("self_supervised") / "self_supervised.png")


def test_self_supervised_features_are_better_than_untrained_ones(self_supervised):
    rows = {row["features"]: row for row in self_supervised[1]}
    assert list(rows) == ["pixels", "untrained", "LARS", "SGD"]
    # LARS gains over 4. What SGD learns at a rate scaled to this batch is a result, not a requirement.
    untrained = statistics.fmean(rows["untrained"]["few_labels"])
    assert statistics.fmean(rows["LARS"]["few_labels"]) > 2 + untrained
    for name in ("LARS", "SGD"):
        for curve, accuracy in zip(rows[name]["curves"], rows[name]["few_labels"]):
            assert len(curve) == len(rows[name]["epochs"])
            assert curve[-1] == accuracy


def test_self_supervised_prints_what_it_measured(self_supervised):
    printed, rows, _ = self_supervised
    for row in rows:
        line = next(line for line in printed.splitlines() if line.split()[:1] == [row["features"]])
        means = [float(mean) for mean in re.findall(r"([\d.]+) ±", line)]
        assert means == [
            pytest.approx(statistics.fmean(row[labels]), abs=0.006) for labels in ("few_labels", "all_labels")
        ]


def test_self_supervised_plot_shows_both_optimizers(self_supervised):
    image = without_labels(self_supervised[2])
    assert has_colour(image, "#0b6e99")
    assert has_colour(image, "#d9730d")


def test_self_supervised_under_torchrun_gives_the_same_table(self_supervised, tmp_path):
    printed, rows, _ = self_supervised
    printed_by_two, rows_of_two = run_by_two(SELF_SUPERVISED, tmp_path / "self_supervised.png")
    assert accuracies(printed_by_two) == accuracies(printed)
    assert rows_of_two == rows


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("examples/digits.py", ["--epochs", 0], "allowed: 1 and more"),
        ("examples/digits.py", ["--batch-sizes", 64, 5000], "there are 1280 images"),
        ("examples/digits.py", ["--output", "nowhere/digits.png"], "a folder that exists"),
        ("examples/self_supervised.py", ["--batch-size", 1281], "there are 1280 images"),
        ("examples/self_supervised.py", ["--batch-size", 1280, "--tune"], "there are 1024 images"),
        ("examples/self_supervised.py", ["--output", "nowhere/plot.png"], "a folder that exists"),
        ("benchmarks/step.py", ["--output", "step.json"], "allowed is a .png"),
    ],
)
def test_bad_options_are_found_before_the_work(script, arguments, message):
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert message in done.stderr


def test_digits_under_torchrun_gives_the_same_table(digits, tmp_path):
    printed, rows, _ = digits
    printed_by_two, rows_of_two = run_by_two(DIGITS, tmp_path / "digits.png")
    assert accuracies(printed_by_two) == accuracies(printed)
    assert rows_of_two == rows


def test_step_benchmark(device, tmp_path):
    # One peer cannot be imported. It is reported, and the others are measured.
    (tmp_path / "lightly.py").write_text("raise ImportError('not on this machine')")
    plot = tmp_path / "step.png"
    # torch's own models are many and large for a simulated device, which is a device too.
    workloads = ["ResNet-50", "400 small tensors", "465 small tensors"][device == "cuda" :]
    options = ("--device", device, "--quick", "--workloads", *workloads, "--output", plot)
    printed = run("benchmarks/step.py", *options, path=[tmp_path])
    report = json.loads(plot.with_suffix(".json").read_text())

    assert "left out: lightly: not on this machine" in printed
    assert "lightly: not on this machine" in report["left_out"]
    results = {result["workload"]: result for result in report["results"]}
    assert list(results) == workloads
    sizes = {"ResNet-50": 25_557_032, "400 small tensors": 409_600, "465 small tensors": 476_160}
    for workload, result in results.items():
        assert result["parameters"] == sizes[workload]
        assert result["floor_ms"] == pytest.approx(20 * sizes[workload] / result["add_gb_per_s"] / 1e6)
        for step in result["steps"]:
            assert step["times_floor"] == pytest.approx(step["ms"] / result["floor_ms"])
            assert f"{step['ms']:.3f} ms" in printed
    timed = {step["optimizer"] for step in results["400 small tensors"]["steps"]}
    assert {"fused_lars", "timm", "timm foreach", "pytorch_optimizer", "torch SGD fused"} <= timed
    assert has_colour(matplotlib.image.imread(plot), "#0b6e99")


def test_a_program_without_python_trains_what_python_saved(tmp_path):
    # `make train-cpp` puts the environment's programs on the PATH, besides the rest of a user's shell.
    folder = shutil.copytree(ROOT / "examples" / "train_without_python", tmp_path / "train_without_python")
    done = subprocess.run(
        ["make", "-C", str(folder)],
        env={
            **environment(),
            "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses, accuracies = zip(*re.findall(r"loss ([\d.]+)  test accuracy ([\d.]+) %", done.stdout))
    assert len(losses) == 7
    assert float(losses[-1]) < 0.1 * float(losses[0])
    assert float(accuracies[-1]) > 95
    assert "trust_coefficient=0.02, states=3)" in done.stdout
    assert (folder / "build" / "trained.pt").exists()
    linked = subprocess.run(
        ["ldd", str(folder / "build" / "train")], capture_output=True, text=True, check=True
    )
    assert "libfused_lars" in linked.stdout
    assert "python" not in re.sub(r"=> \S+", "", linked.stdout)


def test_layers_are_drawn_and_the_first_nan_is_named(tmp_path):
    """A gradient is NaN from step 4 on, first in the middle one of three layers."""
    names = ["0.weight", "1.weight", "2.weight"]
    for file in ("trust_ratios.csv", "weight_norms.csv", "grad_norms.csv"):
        lines = [",".join(["step", *names])]
        for step in range(1, 7):
            first_bad = {1: 4, 0: 5}  # by layer
            values = [
                "nan"
                if file == "grad_norms.csv" and step >= first_bad.get(layer, 99)
                else (1 + layer) * 1.5**step
                for layer in range(3)
            ]
            lines.append(",".join(map(str, [step, *values])))
        (tmp_path / file).write_text("\n".join(lines) + "\n")
    printed = run("examples/plot_layers.py", tmp_path, "--output", tmp_path / "all.png")
    assert "grad_norms.csv: first value that is not finite, step 4: 1.weight\n" in printed
    assert printed.count("not finite") == 1
    thin = {"pixels": 10, "tolerance": 0.15}  # smoothed edges
    image = matplotlib.image.imread(tmp_path / "all.png")
    assert all(has_colour(image, colour, **thin) for colour in ("#440154", "#fde725", "#ff0000"))
    printed = run("examples/plot_layers.py", tmp_path, "--only", "2.", "--output", tmp_path / "one.png")
    assert "not finite" not in printed
    assert not has_colour(matplotlib.image.imread(tmp_path / "one.png"), "#ff0000", **thin)
