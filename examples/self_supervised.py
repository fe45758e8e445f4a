"""Learns features of handwritten digits without labels: Barlow Twins with LARS and with SGD at a large batch.

    python examples/self_supervised.py
    torchrun --nproc-per-node 2 examples/self_supervised.py

Barlow Twins (Zbontar et al. 2021) shows a network two random views of every image. It takes the correlations
between their embeddings over the batch, and trains this matrix to be the identity. Only the encoder is kept.
Its features are as good as the accuracy of a linear classifier (a probe) on them. One probe is trained with
100 labels, as the mean of five draws, and one with all. The same probes judge the pixels and the features of
the untrained network.

The data are the 1,797 images of 8 x 8 pixels in scikit-learn: 1,280 to train on, 517 to test the probes. A
batch is 512 images. The images that are left at the end of an epoch are not used. Both optimizers take the
same views. LARS has the trust coefficient 0.02. It puts the rates of the layers in the range that suits
biases and normalisation parameters. The paper gives these a rate of their own instead.

Only the learning rate is tuned, in the same way for both optimizers. Of eight rates a factor of two apart,
the best has probes with 100 labels that have the least loss on held-out training images, over three of five
folds (`--tune` repeats this). At other batch sizes the rates follow the usual rules: SGD's grows with the
batch size, that of LARS with its square root.

Under torchrun every process takes its share of every batch, and the correlations stay those of the whole
batch. With two processes the results are the same too, to the bit, because one process splits a batch into
the same two shares. The network has no batch normalisation, because its statistics would be those of a share.
"""

import argparse
import json
import pathlib
import statistics
import sys

import sklearn.datasets
import threadpoolctl
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import fused_lars

TRAINING_IMAGES = 1280
FEW_LABELS = 100
DRAWS = 5  # of the 100 labels
FOLDS, FOLDS_TO_TRY = 5, 3
MARKS = 10  # probes during a training run
SHARES = 2  # of a batch, unless there are more processes
EMBEDDING = 256  # the size of the features too
REDUNDANCY = 0.0051  # the paper's lambda
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

# The base rate comes from --tune and is for a batch of 512. It grows with this power of the batch size.
BASE_BATCH_SIZE = 512
BASE_RATE = {"LARS": 1.0, "SGD": 8.0}
SCALING_POWER = {"LARS": 0.5, "SGD": 1.0}
RATES_TO_TRY = {"LARS": [2.0**k for k in range(-5, 3)], "SGD": [2.0**k for k in range(-3, 5)]}
COLOURS = {"pixels": "#777777", "untrained": "#aaaaaa", "LARS": "#0b6e99", "SGD": "#d9730d"}


def make_optimizer(name, model, lr):
    groups = fused_lars.param_groups(model, weight_decay=WEIGHT_DECAY)
    if name == "LARS":
        return fused_lars.LARS(groups, lr=lr, momentum=MOMENTUM, trust_coefficient=0.02)
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)


def make_schedule(optimizer, steps):
    warmup = steps // 10
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    decay = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    return SequentialLR(optimizer, [rise, decay], milestones=[warmup])


def make_model():
    """Returns the encoder, and the projector, which only the loss needs."""

    def convolution(inputs, outputs, stride):
        return nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()

    def hidden():
        return nn.Linear(EMBEDDING, EMBEDDING, bias=False), nn.LayerNorm(EMBEDDING), nn.ReLU()

    encoder = [*convolution(1, 16, 1), *convolution(16, 32, 2), *convolution(32, 64, 2), nn.Flatten()]
    projector = [*hidden(), *hidden(), nn.Linear(EMBEDDING, EMBEDDING, bias=False)]
    return nn.Sequential(nn.Sequential(*encoder), nn.Sequential(*projector))


def load_digits():
    """Returns the images and labels to train on, then those to test on. Classes are in proportion."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    training, test = train_test_split(
        range(len(labels)), train_size=TRAINING_IMAGES, stratify=labels, random_state=0
    )
    labels = torch.tensor(labels)
    return images[training], labels[training], images[test], labels[test]


def random_views(images):
    """Crops, shifts, turns, shears and bends every image in its own way, and adds noise."""
    maps = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    bends = nn.functional.interpolate(
        0.2 * torch.randn(len(images), 2, 3, 3), size=images.shape[2:], mode="bilinear", align_corners=True
    )
    grid = nn.functional.affine_grid(maps, images.shape, align_corners=False) + bends.permute(0, 2, 3, 1)
    views = nn.functional.grid_sample(images, grid, align_corners=False)
    return views + 0.1 * torch.randn_like(views)


def barlow_twins_loss(first, second):
    first, second = (nn.functional.batch_norm(z, None, None, training=True) for z in (first, second))
    correlations = first.T @ second / len(first)
    squares = correlations.square()
    on_diagonal = (correlations.diagonal() - 1).square().sum()
    # The mean over the components, not the sum, because the loss's scale affects biases, which LARS does not
    # adapt.
    return (on_diagonal + REDUNDANCY * (squares.sum() - squares.diagonal().sum())) / EMBEDDING


def rank_and_world_size():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def take_gradients(model, views):
    """Adds the gradients of the loss over a batch of pairs of views. Each process embeds its share."""
    rank, world = rank_and_world_size()
    shares = torch.arange(len(views)).tensor_split(max(world, SHARES))[rank::world]
    outputs = [model(views[share].flatten(0, 1)).unflatten(0, (-1, 2)) for share in shares]
    # Every process needs all embeddings for the correlations. It has zeros in place of the others'
    # embeddings, so their sum is exact, and shares may have any size.
    embeddings = torch.zeros(len(views), 2, EMBEDDING)
    for share, output in zip(shares, outputs):
        embeddings[share] = output.detach()
    if world > 1:
        dist.all_reduce(embeddings)
    embeddings.requires_grad_()
    barlow_twins_loss(*embeddings.unbind(1)).backward()
    for share, output in zip(shares, outputs):
        # DDP averages gradients over processes, but this one has to be the sum.
        output.backward(world * embeddings.grad[share])


def probe(features, labels, test_features, test_labels):
    """Trains a linear classifier. Returns its accuracy in per cent and its mean loss on the test images."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, labels)
    loss = log_loss(test_labels, classifier.predict_proba(test_features))
    return 100 * classifier.score(test_features, test_labels), loss


def features_of(encoder, data):
    images, labels, test_images, test_labels = data
    with torch.no_grad():
        return encoder(images).numpy(), labels.numpy(), encoder(test_images).numpy(), test_labels.numpy()


def probe_with_few_labels(encoder, seed, data):
    """Returns the mean accuracy and loss over several draws of labels."""
    features, labels, test_features, test_labels = features_of(encoder, data)
    results = []
    for draw in range(DRAWS * seed, DRAWS * (seed + 1)):
        few, _ = train_test_split(
            range(len(labels)), train_size=FEW_LABELS, stratify=labels, random_state=draw
        )
        results.append(probe(features[few], labels[few], test_features, test_labels))
    return [statistics.fmean(values) for values in zip(*results)]


def train(name, lr, seed, options, data, bar, marks=()):
    """Trains a new model. Returns its encoder, and the accuracies with few labels after some epochs."""
    torch.manual_seed(seed)
    images, model = data[0], make_model()
    replica = nn.parallel.DistributedDataParallel(model) if rank_and_world_size()[1] > 1 else model
    optimizer = make_optimizer(name, model, lr)
    batches = len(images) // options.batch_size
    schedule = make_schedule(optimizer, steps=options.epochs * batches)
    curve = []
    for epoch in range(1, options.epochs + 1):
        for batch in torch.randperm(len(images)).split(options.batch_size)[:batches]:
            # Every process makes the views of the whole batch, so that all draw the same random numbers.
            views = torch.stack([random_views(images[batch]), random_views(images[batch])], dim=1)
            take_gradients(replica, views)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if epoch in marks:
            curve.append(probe_with_few_labels(model[0], seed, data)[0])
        bar.update()
    return model[0], curve


def compare(options, bar):
    """Probes all features. Returns a row for each kind, with the accuracies of all seeds."""
    data = load_digits()
    marks = sorted({max(1, options.epochs * mark // MARKS) for mark in range(1, MARKS + 1)})
    rows = []
    for name in COLOURS:
        bar.set_description(name)
        row = {"features": name, "few_labels": [], "all_labels": []}
        if name in BASE_RATE:
            lr = BASE_RATE[name] * (options.batch_size / BASE_BATCH_SIZE) ** SCALING_POWER[name]
            row.update(lr=lr, epochs=marks, curves=[])
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            encoder = nn.Flatten() if name == "pixels" else make_model()[0]
            if name in BASE_RATE:
                encoder, curve = train(name, row["lr"], seed, options, data, bar, marks)
                row["curves"].append(curve)
            row["few_labels"].append(probe_with_few_labels(encoder, seed, data)[0])
            row["all_labels"].append(probe(*features_of(encoder, data))[0])
        rows.append(row)
    return rows


def tune(options, bar):
    """Trains with every candidate rate and probes on held-out training images. Returns a row for each."""
    images, labels, _, _ = load_digits()
    folds = list(StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(images, labels))[:FOLDS_TO_TRY]
    rows = []
    for name, rates in RATES_TO_TRY.items():
        for lr in rates:
            bar.set_description(f"{name}, rate {lr:g}")
            results = []
            for seed, (rest, fold) in enumerate(folds):
                data = images[rest], labels[rest], images[fold], labels[fold]
                encoder, _ = train(name, lr, seed, options, data, bar)
                results.append(probe_with_few_labels(encoder, seed, data))
            accuracy, loss = map(statistics.fmean, zip(*results))
            rows.append({"optimizer": name, "lr": lr, "accuracy": accuracy, "loss": loss})
    return rows


def table_of_accuracies(rows, options):
    lines = [
        f"Test accuracy of linear probes in per cent, after {options.epochs} epochs at batch size "
        f"{options.batch_size}: mean ± standard deviation (lowest to highest) of {options.seeds} seeds",
        "",
        f"{'features':>10}  {f'{FEW_LABELS} labels':>27}  {'all labels':>27}",
    ]
    for row in rows:
        lines.append(f"{row['features']:>10}")
        for a in (row["few_labels"], row["all_labels"]):
            lines[-1] += f"  {statistics.fmean(a):6.2f} ± {statistics.pstdev(a):5.2f}"
            lines[-1] += f" ({min(a):5.1f} to {max(a):5.1f})"
    return "\n".join(lines)


def table_of_rates(rows):
    lines = [f"{'optimizer':>9}  {'rate':>11}  {'loss':>7}  {'accuracy':>8}"]
    for row in rows:
        least = min((r for r in rows if r["optimizer"] == row["optimizer"]), key=lambda r: r["loss"])
        line = f"{row['optimizer']:>9}  {row['lr']:11g}  {row['loss']:7.4f}  {row['accuracy']:8.2f}"
        lines.append(line + ("  least loss" if row is least else ""))
    return "\n".join(lines)


def plot(rows, options, path):
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        colour = COLOURS[row["features"]]
        if "curves" in row:
            marks, points = row["epochs"], list(zip(*row["curves"]))
            means, lowest, highest = (list(map(f, points)) for f in (statistics.fmean, min, max))
            axes.plot(marks, means, color=colour, linewidth=2.5, marker="o", markersize=7, clip_on=False)
            axes.fill_between(marks, lowest, highest, color=colour, alpha=0.15, linewidth=0)
        else:
            axes.axhline(statistics.fmean(row["few_labels"]), color=colour, linewidth=1.5, linestyle="--")
    axes.set(xlim=(0, options.epochs), xlabel="epochs without labels")
    low, high = axes.get_ylim()
    height = high
    for row in sorted(rows, key=lambda row: -statistics.fmean(row["few_labels"])):
        mean = statistics.fmean(row["few_labels"])
        height = min(mean, height - (high - low) / 18)  # keeps labels of equal means apart
        label = {"color": COLOURS[row["features"]], "fontsize": 13, "fontweight": "bold", "va": "center"}
        axes.text(1.02 * options.epochs, height, f"{row['features']}  {mean:.1f} %", **label)
    axes.set_ylabel(f"test accuracy of a linear probe with {FEW_LABELS} labels, per cent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    title = f"Barlow Twins on handwritten digits, batch size {options.batch_size}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    subtitle = f"Lines: mean of {options.seeds} seeds. Bands: lowest to highest."
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
    parser.add_argument("--epochs", type=positive, help="of training without labels (120)")
    parser.add_argument("--seeds", type=positive, help="models to train with each optimizer (4)")
    parser.add_argument("--batch-size", type=positive, default=BASE_BATCH_SIZE, help="(%(default)s)")
    parser.add_argument("--tune", action="store_true", help="try the learning rates instead, see above")
    parser.add_argument("--quick", action="store_true", help="10 epochs, 2 seeds")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("self_supervised.png"),
        help="the plot; the numbers go beside it as .json (%(default)s)",
    )
    options = parser.parse_args()
    images = TRAINING_IMAGES * (FOLDS - 1) // FOLDS if options.tune else TRAINING_IMAGES
    if options.batch_size > images:
        parser.error(f"--batch-size {options.batch_size}: there are {images} images")
    # Checked now, not after the whole run.
    if options.output.suffix != ".png" or not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: allowed is a .png in a folder that exists")
    options.epochs = options.epochs or (10 if options.quick else 120)
    options.seeds = options.seeds or (2 if options.quick else 4)
    return options


def main():
    options = parse_options()
    # Such small layers gain little from a second thread, and more threads round sums differently.
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    first = rank_and_world_size()[0] == 0
    runs = FOLDS_TO_TRY * sum(map(len, RATES_TO_TRY.values())) if options.tune else 2 * options.seeds
    every = 0.1 if sys.stderr.isatty() else 10.0  # seconds: a log needs fewer lines
    with tqdm(total=options.epochs * runs, unit="epoch", disable=not first, mininterval=every) as bar:
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
