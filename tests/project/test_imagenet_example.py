"""examples/imagenet.py on a small folder of images, on 2 processes."""

import csv
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image

from distributed_harness import run_on_ranks
from distributed_nets import full
from paths import ROOT

SCRIPT = ROOT / "examples" / "imagenet.py"
STEPS = 16  # 8 epochs of 2
ARGUMENTS = [
    "--model=resnet18", "--image-size=32", "--batch-size=31", "--micro-batch=8", "--epochs=8",
    "--warmup-epochs=2", "--lr=0.1", "--trust-coefficient=0.03", "--workers=0", "--checkpoint-every=5",
    "--log-every=1", "--keep-checkpoints=4", "--device=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    """Reddish noise and bluish noise: 64 images to train on and 16 others.

    Their colours are far apart. After 16 steps the running statistics of batch normalisation lag behind the
    weights. So an evaluation of any finer difference would depend on how the processor rounds.
    """
    root = tmp_path_factory.mktemp("images")
    random = numpy.random.default_rng(0)
    for part, count in (("train", 32), ("val", 8)):
        for name, tint in (("red", (100, 0, 0)), ("blue", (0, 0, 100))):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = random.normal(100, 30, (48, 48, 3)) + tint
                Image.fromarray(image.clip(0, 255).astype("uint8")).save(folder / f"{i}.png")
    return root


def load_script():
    spec = importlib.util.spec_from_file_location("imagenet", SCRIPT)
    imagenet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imagenet)
    return imagenet


def train(arguments: list[str]):
    """Runs the example and returns, on each rank, everything that the run consists of."""
    run = load_script().main(arguments)
    tensors = [*run.model.parameters(), *run.model.buffers()]
    tensors += [run.optimizer.state[p]["momentum_buffer"] for p in run.model.parameters()]
    return [full(t.detach()).clone() for t in tensors]


def rows(path: pathlib.Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_trains_and_goes_on(parallel, data, tmp_path):
    """From any checkpoint, a run goes on to the same bits and the same log."""
    arguments = [str(data), f"--parallel={parallel}", *ARGUMENTS]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, second = run_on_ranks(2, train, arguments=[*arguments, f"--output={whole}"])
    assert all(map(torch.equal, first, second))

    log = rows(whole / "log.csv")
    assert [int(row["step"]) for row in log] == [*range(1, STEPS + 1)]
    losses = [float(row["loss"]) for row in log]
    assert max(losses[-3:]) < 0.6 * losses[0]
    assert float(log[-1]["accuracy"]) > 0.8
    rates = [float(row["lr"]) for row in log]
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1 * (11 / 12) ** 2], rel=1e-5)
    assert rates[-1] == pytest.approx(0.1 * (1 / 12) ** 2, rel=1e-5)
    ratios = rows(whole / "trust_ratios.csv")
    assert len(ratios) == STEPS
    assert len(ratios[0]) == 1 + 21  # resnet18 has 20 convolutions and a linear layer
    assert 0 < float(ratios[-1]["layer1.0.conv1.weight"]) < 1
    weights, grads = rows(whole / "weight_norms.csv"), rows(whole / "grad_norms.csv")
    assert len(weights) == len(grads) == STEPS
    assert len(weights[0]) == len(grads[0]) == 1 + 62  # batch normalisation and the bias too
    w, g = (float(norms[-1]["layer1.0.conv1.weight"]) for norms in (weights, grads))
    q = 0.03 * w / (g + 5e-5 * w)  # the preset's weight decay
    assert float(ratios[-1]["layer1.0.conv1.weight"]) == pytest.approx(q, rel=1e-4)

    assert sorted(int(p.name[5:]) for p in whole.glob("step-*")) == [5, 10, 15, 16]
    shutil.copytree(whole, resumed)
    for step in (10, 15, 16):
        shutil.rmtree(resumed / f"step-{step}")
    third, fourth = run_on_ranks(2, train, arguments=[*arguments, f"--output={resumed}"])
    assert all(map(torch.equal, first, third))
    assert all(map(torch.equal, first, fourth))
    for name in ("log.csv", "trust_ratios.csv", "weight_norms.csv", "grad_norms.csv"):
        assert (whole / name).read_text() == (resumed / name).read_text()


def test_under_torchrun_and_then_alone(data, tmp_path):
    """As a user starts it. One process goes on with what two have saved."""
    arguments = [
        str(SCRIPT),
        str(data),
        "--parallel=fsdp",
        *ARGUMENTS,
        f"--output={tmp_path}",
        "--log-every=6",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, *arguments, "--workers=1"], check=True, timeout=300, capture_output=True)
    log = (tmp_path / "log.csv").read_text()
    for step in (15, 16):
        shutil.rmtree(tmp_path / f"step-{step}")
    subprocess.run([sys.executable, *arguments], check=True, timeout=300, capture_output=True)
    assert [row["step"] for row in rows(tmp_path / "log.csv")] == [
        row["step"] for row in csv.DictReader(log.splitlines())
    ]


def nccl_fails() -> str:
    """Returns NCCL's error if it does not work: on a simulated device, or without a driver."""
    program = """
import torch, torch.distributed as dist
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
dist.all_reduce(torch.ones((), device="cuda"))
torch.cuda.synchronize()
"""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no end in time"
    if done.returncode == 0:
        return ""
    lines = reversed(done.stderr.splitlines())
    return next((line for line in lines if "Error: " in line), "the process died")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_all_gpus_cuda(parallel, data, tmp_path):
    """One process for each GPU, and then another run on one GPU from a checkpoint."""
    if failure := nccl_fails():
        pytest.skip(f"NCCL does not work here: {failure}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    arguments = [str(SCRIPT), str(data), *ARGUMENTS, "--device=cuda", f"--parallel={parallel}"]
    arguments.append(f"--output={tmp_path}")
    subprocess.run([*torchrun, str(torch.cuda.device_count()), *arguments], check=True, timeout=300)
    losses = [float(row["loss"]) for row in rows(tmp_path / "log.csv")]
    assert len(losses) == STEPS
    assert max(losses[-3:]) < 0.6 * losses[0]
    for step in (15, 16):
        shutil.rmtree(tmp_path / f"step-{step}")
    subprocess.run([*torchrun, "1", *arguments], check=True, timeout=300)
    again = [float(row["loss"]) for row in rows(tmp_path / "log.csv")]
    assert len(again) == STEPS
    assert again[:10] == losses[:10]


def test_each_process_needs_a_gpu_cuda(data, monkeypatch):
    gpus = torch.cuda.device_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(gpus + 1))
    message = refused(data, *([] if gpus else ["--device=cuda"]))
    assert f"{gpus + 1} run on this machine and torch sees {gpus}: start fewer" in message


def run(data, tmp_path, *arguments) -> subprocess.CompletedProcess:
    """A short run of one process. It saves after each of its 4 steps, or resumes."""
    command = [
        sys.executable,
        SCRIPT,
        data,
        *ARGUMENTS,
        "--epochs=2",
        "--warmup-epochs=1",
        "--checkpoint-every=1",
    ]
    return subprocess.run(
        [*command, f"--output={tmp_path}", *arguments], capture_output=True, text=True, timeout=300
    )


def steps_in(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "data": lambda checkpoint: truncate(checkpoint / "__0_0.distcp"),
    "no data": lambda checkpoint: (checkpoint / "__0_0.distcp").unlink(),
    "metadata": lambda checkpoint: truncate(checkpoint / ".metadata"),
    "no metadata": lambda checkpoint: (checkpoint / ".metadata").unlink(),
    "empty": lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()],
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run(data, folder).returncode == 0
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_skipped(damage, finished, data, tmp_path):
    """The newest two are skipped. The run goes on from the one before, and its checkpoints replace them."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for step in (4, 3):
        DAMAGES[damage](tmp_path / f"step-{step}")
    went_on = run(data, tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    for step in (4, 3):
        assert f"warning: {tmp_path}/step-{step} cannot be read and is skipped: " in went_on.stderr
    assert f"{tmp_path}: going on from step 2" in went_on.stdout
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "log.csv").read_text() == (finished / "log.csv").read_text()
    again = run(data, tmp_path)
    assert "going on from step 4" in again.stdout
    assert "warning: " not in again.stderr


def test_damaged_on_two_processes(finished, data, tmp_path):
    """One file that only one process cannot read. All processes fall back to the same checkpoint."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    arguments = [
        str(data),
        *ARGUMENTS,
        "--epochs=2",
        "--warmup-epochs=1",
        f"--output={tmp_path}",
        "--parallel=fsdp",
    ]
    shutil.rmtree(tmp_path / "step-4")
    run_on_ranks(2, train, arguments=arguments)
    truncate(tmp_path / "step-4" / "__1_0.distcp")
    shutil.rmtree(tmp_path / "step-2")
    first, second = run_on_ranks(2, train, arguments=arguments)
    assert all(map(torch.equal, first, second))
    assert steps_in(tmp_path) == [1, 3, 4]


def test_no_checkpoint_can_be_read(finished, data, tmp_path):
    """The checkpoints are not overwritten by training from weights that may have been read in part."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for step in range(1, 5):
        truncate(tmp_path / f"step-{step}" / "__0_0.distcp")
    message = run(data, tmp_path)
    assert message.returncode != 0
    assert f"none of the checkpoints in {tmp_path} can be read: give another --output" in message.stderr


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", None])
def test_damaged_description_of_the_run(text, finished, data, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    if text is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_text(text)
    went_on = run(data, tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    assert f"warning: {tmp_path}/run.json cannot be read" in went_on.stderr
    assert "going on from step 4" in went_on.stdout
    assert (tmp_path / "run.json").read_text() == (finished / "run.json").read_text()


def test_what_lies_beside_the_checkpoints(finished, data, tmp_path):
    """A user's copies, leftovers of an interrupted run, and a log that ends in the middle of a row."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("step-6.bak", "step-", "step-x", "unfinished-step-5", "unfinished-removal-of-step-2"):
        shutil.copytree(tmp_path / "step-1", tmp_path / name)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("\n3,0.")
    went_on = run(data, tmp_path)
    assert went_on.returncode == 0, went_on.stderr
    assert f"warning: {tmp_path}/step-6.bak has no checkpoint's name and is skipped" in went_on.stderr
    assert "going on from step 4" in went_on.stdout
    assert {path.name for path in tmp_path.glob("*step-*")} == {
        "step-1", "step-2", "step-3", "step-4", "step-6.bak", "step-", "step-x",
    }  # fmt: skip
    assert (tmp_path / "log.csv").read_text() == (finished / "log.csv").read_text()


def test_interrupted_while_saving(finished, data, tmp_path, monkeypatch):
    """Every folder with a checkpoint's name is a whole checkpoint."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"step-{step}")
    imagenet = load_script()
    save = imagenet.checkpoint.save

    def save_and_die(*arguments, checkpoint_id):
        save(*arguments, checkpoint_id=checkpoint_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet.checkpoint, "save", save_and_die)
    options = [*ARGUMENTS, "--epochs=2", "--warmup-epochs=1", "--checkpoint-every=1", f"--output={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        imagenet.main([str(data), *options])
    assert steps_in(tmp_path) == [1, 2]
    assert "going on from step 2" in run(data, tmp_path).stdout
    assert steps_in(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("keep", [1, 2])
def test_old_checkpoints_are_removed(keep, finished, data, tmp_path):
    """The last ones are kept. A newer checkpoint that could not be read does not count."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "step-4" / "__0_0.distcp")
    shutil.rmtree(tmp_path / "step-3")
    killed = run(data, tmp_path, f"--keep-checkpoints={keep}", "--epochs=2")
    assert killed.returncode == 0, killed.stderr
    assert steps_in(tmp_path) == ([4] if keep == 1 else [3, 4])


def refused(data, *arguments) -> str:
    result = subprocess.run([sys.executable, SCRIPT, data, *arguments], capture_output=True, text=True)
    assert result.returncode != 0
    return result.stderr


def test_batch_size_without_preset(data):
    message = refused(data, "--batch-size=100")
    assert "no preset for this batch size, only for 3264, 32768, 67456: give --lr" in message


def test_options_that_make_no_run(data):
    assert "--warmup-epochs 16 of --epochs 3 leave no decay" in refused(
        data, "--batch-size=32768", "--epochs=3"
    )
    assert "allowed: 1 and more" in refused(data, "--batch-size=0")
    assert "is no folder" in refused(data / "train")


def test_another_run_does_not_go_on_with_a_checkpoint(data, tmp_path):
    """It would follow the old schedule to its end, where the learning rate is 0."""
    arguments = [*ARGUMENTS, f"--output={tmp_path}"]
    subprocess.run([sys.executable, SCRIPT, data, *arguments], check=True, capture_output=True)
    message = refused(data, *arguments, "--lr=5", "--epochs=9")
    assert re.search("holds a run with lr .*, not 5.0; epochs .*, not 9: give another --output", message)
    went_on = subprocess.run([sys.executable, SCRIPT, data, *arguments], capture_output=True, text=True)
    assert "going on from step 16" in went_on.stdout
