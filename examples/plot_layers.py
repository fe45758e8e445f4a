"""Draws the trust ratios and norms of every layer over a run, from the CSV files that imagenet.py writes.

    python examples/plot_layers.py imagenet-run --output layers.png
    python examples/plot_layers.py imagenet-run --only layer1 fc

Each line is a layer. Lines go from dark to bright in the order of the forward pass. A mark at the lower edge
is a step whose value is NaN or inf. The names of the layers that had such a value first are printed.
"""

import argparse
import csv
import math
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILES = {
    "trust_ratios.csv": "trust ratio",
    "weight_norms.csv": "norm of the weight",
    "grad_norms.csv": "norm of the gradient",
}


def read(path: pathlib.Path, only: list[str]) -> tuple[list[int], dict[str, list[float]]]:
    """Returns the steps, and the values of the columns whose name contains one of `only` (or of all)."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    columns = {
        name: [float(row[i]) for row in rows]
        for i, name in enumerate(header)
        if i and (not only or any(part in name for part in only))
    }
    return [int(row[0]) for row in rows], columns


def first_not_finite(steps: list[int], columns: dict[str, list[float]]) -> str | None:
    """Names the first step with a value that is not finite, and the layers that have one there."""
    for i, step in enumerate(steps):
        names = [name for name, values in columns.items() if not math.isfinite(values[i])]
        if names:
            return f"step {step}: {', '.join(names)}"
    return None


def draw(axes, title: str, steps: list[int], columns: dict[str, list[float]]) -> None:
    colours = plt.get_cmap("viridis")
    for i, (name, values) in enumerate(columns.items()):
        label = name if len(columns) <= 10 else None
        axes.plot(steps, values, color=colours(i / max(1, len(columns) - 1)), linewidth=0.8, label=label)
    bad = [s for k, s in enumerate(steps) if not all(math.isfinite(v[k]) for v in columns.values())]
    axes.plot(bad, [0.02] * len(bad), "rx", transform=axes.get_xaxis_transform())
    axes.set(title=title, xlabel="step", yscale="log")
    if columns and len(columns) <= 10:
        axes.legend(fontsize="x-small")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="the folder that imagenet.py wrote")
    parser.add_argument("--only", nargs="+", default=[], help="layers whose name contains one of these")
    parser.add_argument("--output", type=pathlib.Path, default="layers.png", help="(%(default)s)")
    options = parser.parse_args(arguments)
    figure, row = plt.subplots(1, len(FILES), figsize=(15, 4.5), layout="constrained")
    for axes, (name, title) in zip(row, FILES.items()):
        path = options.run / name
        if not path.is_file():
            parser.error(f"{path} is no file: imagenet.py writes it")
        steps, columns = read(path, options.only)
        draw(axes, title, steps, columns)
        if found := first_not_finite(steps, columns):
            print(f"{name}: first value that is not finite, {found}")
    figure.savefig(options.output, dpi=80)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
