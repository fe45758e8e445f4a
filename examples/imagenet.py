"""Trains an image classifier with LARS on ImageNet, or on any folder of images with the same layout.

    torchrun --nproc-per-node 8 examples/imagenet.py /data/imagenet --batch-size 3264
    torchrun --nproc-per-node 8 examples/imagenet.py /data/imagenet --batch-size 32768 --parallel fsdp

The folder has train/CLASS/*.jpeg and val/CLASS/*.jpeg. The batch size is that of a step over all processes. A
process runs --micro-batch images at a time and accumulates their gradients, so a batch need not fit the GPUs
at once. The batch sizes of MLPerf's ResNet-50 results come with their hyperparameters (PRESETS). Others need
--lr.

Checkpoints go to OUTPUT/step-N. The same command goes on from the newest one that can be read. With the same
number of processes, the run is then the same to the bit as one that was never interrupted, because the images
of a step, their augmentation and its random numbers depend only on the seed and the step. With another number
of processes it is the same to rounding. Other hyperparameters make another run, which needs another OUTPUT.
OUTPUT/log.csv has loss and learning rate. trust_ratios.csv, weight_norms.csv and grad_norms.csv have a column
for each layer. plot_layers.py draws them.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import re
import shutil
import sys
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torchvision
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

import fused_lars

# From the logs of MLPerf Training's closed division. All reach a top-1 accuracy of 75.9 %.
PRESETS = {
    3264: {"lr": 10.5, "momentum": 0.9, "weight_decay": 5e-5, "warmup_epochs": 2, "epochs": 37},
    32768: {"lr": 27.5, "momentum": 0.9321, "weight_decay": 1e-4, "warmup_epochs": 16, "epochs": 60},
    67456: {"lr": 24.7, "momentum": 0.9518, "weight_decay": 1e-4, "warmup_epochs": 31, "epochs": 90},
}
# The options that identify a run. Others may change when it is resumed.
OF_A_RUN = ("model", "batch_size", *PRESETS[3264], "trust_coefficient", "image_size", "seed")


# ---------------------------------------------------------------- data


class Images(torchvision.datasets.ImageFolder):
    """An image folder whose random augmentation is a function of seed, epoch and image."""

    def __init__(self, root, transform, seed: int) -> None:
        super().__init__(root, transform)
        self.seed = seed

    def __getitem__(self, key):
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.seed << 52) + (epoch << 32) + index)
            return super().__getitem__(index)


def micro_batches(options) -> int:
    """How many times a step runs the model. It is the same in all processes, whose shares may be uneven."""
    return math.ceil(math.ceil(options.batch_size / dist.get_world_size()) / options.micro_batch)


class MicroBatches:
    """A batch sampler: this process's micro-batches of the steps from `first` to `last`, across epochs.

    The batch of a step has the same images with any number of processes, which take them in turn.
    """

    def __init__(self, images: int, options, first: int, last: int) -> None:
        self.images, self.options, self.steps = images, options, range(first, last)

    def __iter__(self):
        size, steps_an_epoch = self.options.batch_size, self.images // self.options.batch_size
        ordered = None
        for step in self.steps:
            epoch, place = divmod(step, steps_an_epoch)
            if ordered != epoch:
                generator = torch.Generator().manual_seed((self.options.seed << 32) + epoch)
                order, ordered = torch.randperm(self.images, generator=generator), epoch
            own = order[place * size : (place + 1) * size][dist.get_rank() :: dist.get_world_size()]
            for part in own.tensor_split(micro_batches(self.options)):
                yield [(epoch, index) for index in part.tolist()]


def load_data(options):
    normalise = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    normalise.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    size = options.image_size
    augment = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *normalise])
    centre = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *normalise])
    train = Images(options.data / "train", augment, options.seed)
    return train, torchvision.datasets.ImageFolder(options.data / "val", centre)


# ---------------------------------------------------------------- model, optimizer, schedule


def build_model(options, classes: int, device: torch.device) -> nn.Module:
    torch.manual_seed(options.seed)  # the same weights in every process
    model = torchvision.models.get_model(options.model, num_classes=classes).to(device)
    if options.parallel == "fsdp":
        # Layers are gathered and freed one after another. FSDP2 only takes contiguous parameters, so here
        # only the images are channels_last.
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for child in model.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    model = model.to(memory_format=torch.channels_last)
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def without_ddp(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def build_optimizer(options, model: nn.Module, steps_an_epoch: int):
    groups = fused_lars.param_groups(without_ddp(model), weight_decay=options.weight_decay)
    optimizer = fused_lars.LARS(
        groups, lr=options.lr, momentum=options.momentum, trust_coefficient=options.trust_coefficient
    )
    warmup = round(options.warmup_epochs * steps_an_epoch)
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    # MLPerf's decay ends at 1e-4 instead of 0. That is 1e-5 of the peak.
    decay = PolynomialLR(optimizer, total_iters=options.epochs * steps_an_epoch - warmup, power=2.0)
    return optimizer, SequentialLR(optimizer, [rise, decay], milestones=[warmup])


@contextmanager
def gradients_sent(model: nn.Module, sent: bool):
    """A context in which backward sends gradients to the other processes, or only accumulates them."""
    if isinstance(model, DistributedDataParallel):
        with nullcontext() if sent else model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(sent)
        yield


def average_statistics(model: nn.Module) -> None:
    """Averages the running statistics of batch normalisation, which each process took of its share."""
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if statistics:
        flat = torch.cat([b.flatten() for b in statistics]) / dist.get_world_size()
        dist.all_reduce(flat)
        for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics])):
            buffer.copy_(mean.view_as(buffer))


# ---------------------------------------------------------------- checkpoints


def checkpoints(output: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in a folder, the newest first."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in output.iterdir())
    return sorted((int(name[1]) for name in names if name), reverse=True)


def remove(folder: pathlib.Path) -> None:
    """Removes a checkpoint. It is renamed first, so that only whole checkpoints have the name of one."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"unfinished-removal-of-{folder.name}")))


def look_into(output: pathlib.Path, own: dict) -> tuple[list[int], list[str]]:
    """Returns the checkpoints in a folder, and in what they differ from the run `own`."""
    output.mkdir(parents=True, exist_ok=True)
    for unfinished in output.glob("unfinished-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    steps, others, file = checkpoints(output), [], output / "run.json"
    for path in {*output.glob("step-*")} - {output / f"step-{step}" for step in steps}:
        warn(f"{path} has no checkpoint's name and is skipped")
    if steps:
        try:
            saved = json.loads(file.read_text())
            others = [f"{name} {saved[name]}, not {own[name]}" for name in own if saved[name] != own[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn(f"{file} cannot be read: the checkpoints are taken for this run's ({error!r})")
    if not others:
        new = file.with_name("run.json.new")
        new.write_text(json.dumps(own, indent=1) + "\n")
        new.replace(file)
    return steps, others


def warn(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- a run


class Run:
    """What a checkpoint holds, as torch.distributed.checkpoint saves and loads it."""

    def __init__(self, model, optimizer, schedule) -> None:
        self.model, self.optimizer, self.schedule, self.step = model, optimizer, schedule, 0

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def save(self, options) -> None:
        """Saves under another name, renames the checkpoint once it is whole, and removes old ones."""
        average_statistics(self.model)
        folder = options.output / f"step-{self.step}"
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        checkpoint.save({"run": self}, checkpoint_id=unfinished)
        if dist.get_rank() == 0:
            remove(folder)  # one that could not be read
            unfinished.rename(folder)
            # Newer ones could not be read, so they do not count.
            done = [step for step in checkpoints(options.output) if step <= self.step]
            for step in done[options.keep_checkpoints :]:
                remove(options.output / f"step-{step}")

    def resume(self, options) -> None:
        """Goes on from the newest readable checkpoint, if there is one. It must belong to the same run."""
        found: list = [None]
        if dist.get_rank() == 0:
            found = [look_into(options.output, {name: getattr(options, name) for name in OF_A_RUN})]
        dist.broadcast_object_list(found, src=0)
        steps, others = found[0]
        if others:
            raise SystemExit(f"{options.output} holds a run with {'; '.join(others)}: give another --output")
        for step in steps:
            folder = options.output / f"step-{step}"
            try:
                checkpoint.load({"run": self}, checkpoint_id=folder)
            except (Exception, CheckpointException) as error:  # on all ranks
                warn(f"{folder} cannot be read and is skipped: {error}")
                continue
            if dist.get_rank() == 0:
                print(f"{options.output}: going on from step {self.step}", flush=True)
            return
        if steps:
            # The weights may now come from the checkpoints in part.
            raise SystemExit(
                f"none of the checkpoints in {options.output} can be read: give another --output"
            )


class Log:
    """A CSV file that rank 0 writes. A resumed run drops the rows after its checkpoint."""

    def __init__(self, path: pathlib.Path, columns: list[str], step: int) -> None:
        kept = []
        if step and path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 1 + len(columns)]
                kept = [row for row in rows if row[0].isdigit() and int(row[0]) <= step]
        self.file = path.open("w", newline="", buffering=1)
        self.writer = csv.writer(self.file)
        self.writer.writerows([["step", *columns], *kept])

    def write(self, step: int, values) -> None:
        self.writer.writerow([step, *(f"{value:.6g}" for value in values)])


class LayerLogs:
    """Logs, after a step, the trust ratios of adapted layers and the norms of all layers."""

    def __init__(self, output: pathlib.Path, model: nn.Module, optimizer, step: int) -> None:
        self.optimizer = optimizer
        adapted = {name for g in optimizer.param_groups if g["layer_adaptation"] for name in g["param_names"]}
        self.all = [name for name, _ in without_ddp(model).named_parameters()]
        self.adapted = [name for name in self.all if name in adapted]
        self.ratios = Log(output / "trust_ratios.csv", self.adapted, step)
        self.weight_norms = Log(output / "weight_norms.csv", self.all, step)
        self.grad_norms = Log(output / "grad_norms.csv", self.all, step)

    def write(self, step: int) -> None:
        ratios = self.optimizer.trust_ratios(by_name=True, as_numbers=True)
        norms = self.optimizer.layer_norms(by_name=True, as_numbers=True)
        self.ratios.write(step, [ratios[name] for name in self.adapted])
        self.weight_norms.write(step, [norms[name].weight for name in self.all])
        self.grad_norms.write(step, [norms[name].grad for name in self.all])


def autocast(device: torch.device):
    """bf16 on a GPU. fp32 on a CPU, since many CPUs have no fast convolution in bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


def accuracy(model: nn.Module, dataset, options, device: torch.device) -> float:
    own = range(dist.get_rank(), len(dataset), dist.get_world_size())
    loader = DataLoader(dataset, options.micro_batch, sampler=own, num_workers=options.workers)
    right = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    with torch.no_grad(), autocast(device):
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            right += (model(images).argmax(1) == labels.to(device)).sum()
    model.train()
    dist.all_reduce(right)
    return right.item() / len(dataset)


def train_step(run: Run, loader, options, device: torch.device) -> torch.Tensor:
    """Makes one step. Returns this process's part of the batch's mean loss."""
    # The random numbers of dropout depend only on the seed, the step and the process.
    torch.manual_seed((options.seed << 40) + (run.step << 16) + dist.get_rank())
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    loss = torch.zeros((), device=device)
    for still_to_come in reversed(range(micro_batches(options))):
        images, labels = next(loader)
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with gradients_sent(run.model, sent=still_to_come == 0):
            with autocast(device):
                outputs = run.model(images)
            part = criterion(outputs.float(), labels) / options.batch_size
            # The processes average gradients, but the batch's mean loss is the sum of their parts.
            (part * dist.get_world_size()).backward()
        loss += part.detach()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.schedule.step()
    run.step += 1
    return loss


def train(options, device: torch.device) -> Run:
    training, validation = load_data(options)
    steps_an_epoch = len(training) // options.batch_size
    if steps_an_epoch == 0:
        raise SystemExit(f"{len(training)} images to train on; a batch has {options.batch_size}")
    model = build_model(options, len(training.classes), device)
    optimizer, schedule = build_optimizer(options, model, steps_an_epoch)
    run = Run(model, optimizer, schedule)
    run.resume(options)

    last = options.epochs * steps_an_epoch
    sampler = MicroBatches(len(training), options, run.step, last)
    pin = device.type == "cuda"
    loader = iter(DataLoader(training, batch_sampler=sampler, num_workers=options.workers, pin_memory=pin))
    first_rank = dist.get_rank() == 0
    if first_rank:
        log = Log(options.output / "log.csv", ["epoch", "loss", "lr", "accuracy"], run.step)
        layer_logs = LayerLogs(options.output, model, optimizer, run.step)
    model.train()
    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log needs fewer lines
    with tqdm(total=last, initial=run.step, unit="step", disable=not first_rank, mininterval=every) as bar:
        while run.step < last:
            lr = optimizer.param_groups[0]["lr"]
            loss = train_step(run, loader, options, device)
            bar.update()
            ends_epoch = run.step % steps_an_epoch == 0
            top1 = float("nan")
            if ends_epoch:
                average_statistics(model)
                top1 = accuracy(model, validation, options, device)
            if ends_epoch or run.step % options.log_every == 0:
                dist.all_reduce(loss)
                if first_rank:
                    epoch, loss = run.step / steps_an_epoch, loss.item()
                    log.write(run.step, [epoch, loss, lr, top1])
                    layer_logs.write(run.step)
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.3g}", refresh=False)
                    if ends_epoch:
                        bar.write(f"epoch {epoch:.0f}: loss {loss:.3f}, top-1 {100 * top1:.2f} %")
            if run.step % (options.checkpoint_every or steps_an_epoch) == 0 or run.step == last:
                run.save(options)
    return run


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 and more")
    return int(text)


def parse_options(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=pathlib.Path, help="a folder with train/ and val/")
    parser.add_argument(
        "--model", default="resnet50", help="a torchvision model that returns logits (%(default)s)"
    )
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="(%(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="cuda where there is one, if not given")
    parser.add_argument(
        "--batch-size", type=positive, default=3264, help="of a step over all processes (%(default)s)"
    )
    parser.add_argument(
        "--micro-batch", type=positive, default=256, help="images a process at once (%(default)s)"
    )
    for name in PRESETS[3264]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive if name == "epochs" else float)
    parser.add_argument("--trust-coefficient", type=float, default=0.001, help="(%(default)s)")
    parser.add_argument("--image-size", type=positive, default=224, help="(%(default)s)")
    parser.add_argument(
        "--seed", type=int, choices=range(1024), default=0, metavar="SEED", help="0 to 1,023 (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=8, help="that load images, a process (%(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default="imagenet-run", help="(%(default)s)")
    parser.add_argument("--checkpoint-every", type=positive, help="steps; an epoch if not given")
    parser.add_argument(
        "--keep-checkpoints", type=positive, default=3, help="how many, the last ones (%(default)s)"
    )
    parser.add_argument("--log-every", type=positive, default=10, help="steps (%(default)s)")
    options = parser.parse_args(arguments)
    if options.batch_size not in PRESETS and options.lr is None:
        parser.error(f"no preset for this batch size, only for {', '.join(map(str, PRESETS))}: give --lr")
    for name, value in PRESETS.get(options.batch_size, PRESETS[3264]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 <= options.warmup_epochs < options.epochs:
        parser.error(f"--warmup-epochs {options.warmup_epochs} of --epochs {options.epochs} leave no decay")
    for part in ("train", "val"):
        if not (options.data / part).is_dir():
            parser.error(f"{options.data / part} is no folder")
    return options


def choose_device(options) -> torch.device:
    """Returns the CPU, or a GPU of this process's own."""
    if options.device == "cpu" or not (options.device or torch.cuda.is_available()):
        return torch.device("cpu")
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > gpus:
        raise SystemExit(
            f"each process needs a GPU of its own; {processes} run on this machine and torch sees {gpus}: "
            "start fewer (--nproc-per-node) or train on the CPU (--device cpu)"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def main(arguments=None) -> Run:
    options = parse_options(arguments)
    device = choose_device(options)
    if dist.is_initialized():
        return train(options, device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:  # a single process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
