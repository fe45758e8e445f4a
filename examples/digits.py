"""Trains a small convolutional network on handwritten digits with LARS and with SGD, at growing batch sizes.

    python examples/digits.py
    torchrun --nproc-per-node 2 examples/digits.py

The data are the 1,797 images of 8 x 8 pixels in scikit-learn: 1,280 to train on, 517 to test on. Both
optimizers see the same batches for the same number of epochs. They use momentum 0.9, weight decay on weights
only, a linear warm-up over a sixth of the steps, and then a polynomial decay of power 2. LARS has LARC's
trust coefficient, 0.02. It puts the rates of the layers in the range that suits biases and normalisation
parameters, whose rates LARS does not adapt.

Only the learning rate is tuned, in the same way for both optimizers. Of ten rates a factor of two apart, the
best has the least loss in a five-fold cross-validation on the training images (`--tune` repeats this). For
the lines LARS and SGD, the rate is tuned at the smallest batch size only. From there each follows its usual
rule: SGD's rate grows with the batch size (Goyal et al. 2017), that of LARS with its square root (close to
what MLPerf's results use). So these lines show how far one well-tuned setting carries. For the line tuned
SGD, the rate is tuned at each batch size, which is the least that a fair baseline needs (Nado et al. 2021).
It shows what LARS saves where it is as good, and what it costs where it is not.

Under torchrun every process takes its share of every batch, so the batches are the same as with one process.
With two processes the results are the same too, to the bit, because one process splits a batch into the same
two shares. Other splits change sums in their last place, and training makes the difference grow. The network
has no batch normalisation, because its statistics would be those of a share.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import sklearn.datasets
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR
from tqdm import tqdm

import fused_lars

TRAINING_IMAGES = 1280
FOLDS = 5
SHARES = 2  # of a batch, unless there are more processes
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

# The base rate comes from --tune and is for a batch of 32. It grows with this power of the batch size.
BASE_BATCH_SIZE = 32
BASE_RATE = {"LARS": 0.5, "SGD": 0.03125}
SCALING_POWER = {"LARS": 0.5, "SGD": 1.0}
RATES_TO_TRY = {"LARS": [2.0**k for k in range(-6, 4)], "SGD": [2.0**k for k in range(-9, 1)]}
# The rates of tuned SGD, also from --tune.
TUNED_RATE = {32: 0.03125, 64: 0.03125, 128: 0.0625, 256: 0.0625, 640: 0.0625, 1280: 0.125}
COLOURS = {"LARS": "#0b6e99", "SGD": "#d9730d", "tuned SGD": "#8a4fbf"}


def rate(name, batch_size):
    if name == "tuned SGD":
        # A batch size that is not in the table gets the rate of the nearest one.
        return TUNED_RATE[min(TUNED_RATE, key=lambda size: abs(math.log(size / batch_size)))]
    return BASE_RATE[name] * (batch_size / BASE_BATCH_SIZE) ** SCALING_POWER[name]


def make_optimizer(name, network, lr):
    groups = fused_lars.param_groups(network, weight_decay=WEIGHT_DECAY)
    if name == "LARS":
        return fused_lars.LARS(groups, lr=lr, momentum=MOMENTUM, trust_coefficient=0.02)
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)


def make_schedule(optimizer, steps):
    warmup = steps // 6
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    decay = PolynomialLR(optimizer, total_iters=steps - warmup, power=2.0)
    return SequentialLR(optimizer, [rise, decay], milestones=[warmup])


def make_network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def load_digits():
    """Returns the images and labels to train on, then those to test on. Classes are in proportion."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    training, test = train_test_split(
        range(len(labels)), train_size=TRAINING_IMAGES, stratify=labels, random_state=0
    )
    labels = torch.tensor(labels)
    return images[training], labels[training], images[test], labels[test]


def train(name, lr, batch_size, seed, epochs, data, bar):
    """Trains a new network. Returns its accuracy in per cent and its mean loss on the test images."""
    images, labels, test_images, test_labels = data
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(seed)
    network = make_network()
    model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
    optimizer = make_optimizer(name, network, lr)
    schedule = make_schedule(optimizer, steps=epochs * math.ceil(len(images) / batch_size))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size):
            for share in batch.tensor_split(max(world, SHARES))[rank::world]:
                loss = nn.functional.cross_entropy(model(images[share]), labels[share], reduction="sum")
                # The mean over the batch is a sum over all processes, divided by the batch size. DDP averages
                # gradients over processes, whose shares may be uneven, so `world` turns its mean into the
                # sum.
                (loss * world / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.update()
    with torch.no_grad():
        logits = network(test_images)
    accuracy = (logits.argmax(1) == test_labels).double().mean()
    return 100 * accuracy.item(), nn.functional.cross_entropy(logits, test_labels).item()


def compare(options, bar):
    """Trains in all three ways at every batch size. Returns a row for each, with accuracies of all seeds."""
    data = load_digits()
    rows = []
    for batch_size in options.batch_sizes:
        for name in COLOURS:
            lr = rate(name, batch_size)
            bar.set_description(f"{name}, batch size {batch_size}")
            results = [
                train(name, lr, batch_size, seed, options.epochs, data, bar) for seed in range(options.seeds)
            ]
            accuracies, losses = zip(*results)
            steps = options.epochs * math.ceil(TRAINING_IMAGES / batch_size)
            row = {"optimizer": name, "batch_size": batch_size, "steps": steps, "lr": lr}
            rows.append({**row, "accuracies": accuracies, "losses": losses})
    return rows


def tune(options, bar):
    """Cross-validates every candidate rate on the training images. Returns a row for each."""
    images, labels, _, _ = load_digits()
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(images, labels))
    rows = []
    for batch_size in options.batch_sizes:
        for name, rates in RATES_TO_TRY.items():
            for lr in rates:
                bar.set_description(f"{name}, batch size {batch_size}, rate {lr:g}")
                results = []
                for seed, (rest, fold) in enumerate(folds):
                    data = images[rest], labels[rest], images[fold], labels[fold]
                    results.append(train(name, lr, batch_size, seed, options.epochs, data, bar))
                accuracy, loss = map(statistics.fmean, zip(*results, strict=True))
                rows.append(
                    {
                        "optimizer": name,
                        "batch_size": batch_size,
                        "lr": lr,
                        "accuracy": accuracy,
                        "loss": loss,
                    }
                )
    return rows


def table_of_accuracies(rows, options):
    lines = [
        f"Test accuracy in per cent after {options.epochs} epochs: mean ± standard deviation "
        f"(lowest to highest) of {options.seeds} seeds",
        "",
        f"{'batch size':>10}  {'steps':>6}" + "".join(f"  {name:>27}" for name in COLOURS),
    ]
    for batch_size in options.batch_sizes:
        cells = {row["optimizer"]: row for row in rows if row["batch_size"] == batch_size}
        line = f"{batch_size:10}  {cells['LARS']['steps']:6}"
        for name in COLOURS:
            a = cells[name]["accuracies"]
            line += (
                f"  {statistics.fmean(a):6.2f} ± {statistics.pstdev(a):5.2f} ({min(a):5.1f} to {max(a):5.1f})"
            )
        lines.append(line)
    return "\n".join(lines)


def table_of_rates(rows):
    lines = [f"{'optimizer':>9}  {'batch size':>10}  {'rate':>11}  {'loss':>7}  {'accuracy':>8}"]
    for row in rows:
        peers = [
            r for r in rows if (r["optimizer"], r["batch_size"]) == (row["optimizer"], row["batch_size"])
        ]
        lines.append(
            f"{row['optimizer']:>9}  {row['batch_size']:10}  {row['lr']:11g}  {row['loss']:7.4f}  "
            f"{row['accuracy']:8.2f}" + ("  least loss" if row is min(peers, key=lambda r: r["loss"]) else "")
        )
    return "\n".join(lines)


def plot(rows, options, path):
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        mine = [row for row in rows if row["optimizer"] == name]
        sizes = [row["batch_size"] for row in mine]
        means, lowest, highest = (
            [function(row["accuracies"]) for row in mine] for function in (statistics.fmean, min, max)
        )
        axes.plot(sizes, means, color=colour, linewidth=2.5, marker="o", markersize=7)
        axes.fill_between(sizes, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        for row in mine:
            count = len(row["accuracies"])
            axes.scatter([row["batch_size"]] * count, row["accuracies"], s=12, color=colour, alpha=0.5)
    height = 102.0
    for row in sorted(rows[-len(COLOURS) :], key=lambda row: -statistics.fmean(row["accuracies"])):
        mean = statistics.fmean(row["accuracies"])
        height = min(mean, height - 5)  # keeps labels of equal means apart
        end = {"xy": (sizes[-1], height), "xytext": (12, 0), "va": "center"}
        label = {"textcoords": "offset points", "fontsize": 13, "fontweight": "bold"}
        axes.annotate(f"{row['optimizer']}  {mean:.1f} %", **end, **label, color=COLOURS[row["optimizer"]])
    axes.axhline(10, color="grey", linewidth=1, linestyle=":")
    axes.annotate("chance", (sizes[0], 10), (0, 4), textcoords="offset points", color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{row['batch_size']:,}\n{row['steps']:,} steps" for row in mine])
    axes.minorticks_off()
    axes.set_xlabel("batch size, and steps in all")
    axes.set_ylabel("test accuracy, per cent")
    axes.set_ylim(0, 101)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    title = f"Handwritten digits, {options.epochs} epochs at every batch size"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    subtitle = (
        f"Rate tuned at batch size {BASE_BATCH_SIZE}, then scaled: LARS by the square root, SGD linearly. "
        "Tuned SGD: at every batch size.\n"
        f"Lines: mean of {options.seeds} seeds. Dots and bands: each seed, lowest to highest."
    )
    axes.set_title(subtitle, loc="left", fontsize=10, color="#444444")
    figure.savefig(path, dpi=130)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; allowed: 1 and more")
    return int(text)


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=positive, help="for every batch size alike (40)")
    parser.add_argument("--seeds", type=positive, help="networks to train for each entry of the table (5)")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", help="32 64 128 256 640 1280")
    parser.add_argument("--tune", action="store_true", help="cross-validate the rates instead, see above")
    parser.add_argument("--quick", action="store_true", help="10 epochs, 2 seeds, batch sizes 128 and 1280")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("digits.png"),
        help="the plot; the numbers go beside it as .json (%(default)s)",
    )
    options = parser.parse_args()
    if max(options.batch_sizes or [0]) > TRAINING_IMAGES:
        parser.error(f"--batch-sizes {max(options.batch_sizes)}: there are {TRAINING_IMAGES} images")
    # Checked now, not after the whole run.
    if options.output.suffix != ".png" or not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: allowed is a .png in a folder that exists")
    options.epochs = options.epochs or (10 if options.quick else 40)
    options.seeds = options.seeds or (2 if options.quick else 5)
    options.batch_sizes = options.batch_sizes or ([128, 1280] if options.quick else list(TUNED_RATE))
    return options


def main():
    options = parse_options()
    # Such small layers gain little from a second thread, and lose much if others use the cores too.
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    runs = FOLDS * sum(map(len, RATES_TO_TRY.values())) if options.tune else options.seeds * len(COLOURS)
    total = options.epochs * runs * len(options.batch_sizes)
    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log needs fewer lines
    with tqdm(total=total, unit="epoch", disable=not first, mininterval=every) as bar:
        rows = tune(options, bar) if options.tune else compare(options, bar)
    if first and options.tune:
        print(table_of_rates(rows))
    elif first:
        options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        print(table_of_accuracies(rows, options))
        plot(rows, options, options.output)
        print(f"\nPlot: {options.output}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
