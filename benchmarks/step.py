"""Times one optimizer step of fused_lars beside its peers, as a multiple of what memory allows.

    python benchmarks/step.py
    python benchmarks/step.py --device cuda

The floor is the time to move 20 bytes per parameter: read the fp32 weight, gradient and momentum, and write
two of them. It is computed from the bandwidth of `x.add_(y)`, which moves 12 bytes per element. That is timed
in the same rounds, on tensors larger than the caches. --types chooses other types: parameters, gradients and
momentum in bf16 (10 bytes), or what only fused_lars has: bf16 parameters and gradients with an fp32 master
and momentum (20 bytes); fp32 parameters with momentum in fewer bits ("momentum"); bf16 parameters that are
rounded stochastically ("stochastic"). The last two have several optimizers that move different numbers of
bytes, and one floor for all.

In a round every optimizer makes one step on the same parameters, in an order that changes from round to
round. Before each step the gradients are written again, as by a backward pass. The printed figure is the
median over all rounds. All LARS do the same work: momentum 0.9, layer adaptation and weight decay on matrices
and kernels, and neither on vectors. SGD takes no norms, so it shows what they cost.

On CUDA the device's time and the host's are measured separately, see timing.py. "ms" is the device's time
with a cold L2, as after a backward pass. "warm" follows another step. "graph" is a replay of a captured step.
"host" is the time until the step is queued. The table also has GB/s (of the floor's bytes), per cent of a
device-to-device copy (8 bytes per element) in the same rounds, and the number of kernels, copies and memsets
in a step if torch's profiler shows it. A peer that is not installed, or does not run on the device, is named
and left out.
"""

import argparse
import json
import pathlib
import platform
import random
import statistics
from time import perf_counter as time_now

import torch
from shapes import resnet50, vit_b_16
from timing import Timer, capture, launches

import fused_lars

ADD_BYTES, COPY_BYTES = 12, 8
# The dtype of parameters and gradients, and the bytes per parameter that a step must move.
TYPES = {
    "fp32": (torch.float32, 20),
    "bf16": (torch.bfloat16, 10),
    "masters": (torch.bfloat16, 20),
    "momentum": (torch.float32, 20),
    "stochastic": (torch.bfloat16, 10),
}
ADD, COPY = "x.add_(y)", "x.copy_(y)"
# A rate so small that thousands of steps with the same gradients leave the weights as they are.
OPTIONS = {"lr": 1e-6, "momentum": 0.9}
WEIGHT_DECAY = 1e-4

# ---------------------------------------------------------------- what is timed


def timm(foreach):
    from timm.optim.lars import Lars

    return lambda groups: Lars(groups, foreach=foreach, **OPTIONS)


def lightly():
    from lightly.utils.lars import LARS

    return lambda groups: LARS(groups, **OPTIONS)


def pytorch_optimizer(foreach):
    from pytorch_optimizer import LARS

    return lambda groups: LARS(groups, foreach=foreach, **OPTIONS)


def apex():
    from apex.optimizers import FusedLARS

    def make(groups):
        return FusedLARS([{**group, "is_skipped": not group["weight_decay"]} for group in groups], **OPTIONS)

    return make


def torch_sgd(**implementation):
    return lambda groups: torch.optim.SGD(groups, **implementation, **OPTIONS)


# Each entry imports its optimizer and returns a function that makes one for parameter groups.
PEERS = {
    "fused_lars": lambda: lambda groups: fused_lars.LARS(groups, capturable=True, **OPTIONS),
    "timm": lambda: timm(foreach=False),
    "timm foreach": lambda: timm(foreach=True),
    "lightly": lightly,
    "pytorch_optimizer": lambda: pytorch_optimizer(foreach=False),
    "pytorch_optimizer foreach": lambda: pytorch_optimizer(foreach=True),
    "apex": apex,
    "torch SGD for-loop": lambda: torch_sgd(foreach=False, fused=False),
    "torch SGD foreach": lambda: torch_sgd(foreach=True),
    "torch SGD fused": lambda: torch_sgd(fused=True),
}


def two_groups(params):
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "layer_adaptation": False},
    ]
    return [group for group in groups if group["params"]]


ONE_GROUP_OR_MANY = {
    "fused_lars, one group of 465": lambda params: fused_lars.LARS(params, **OPTIONS),
    "fused_lars, 465 groups of one": lambda params: fused_lars.LARS(
        [{"params": [p]} for p in params], **OPTIONS
    ),
}


def low_precision(**options):
    return lambda params: fused_lars.LARS(two_groups(params), capturable=True, **options, **OPTIONS)


def torch_sgd_in_two_groups(params):
    return torch.optim.SGD(two_groups(params), fused=True, **OPTIONS)


# By type: what takes the place of fused_lars and its peers.
LOW_PRECISION = {
    # One only: an optimizer with masters compares all that another one has written.
    "masters": {"fused_lars": low_precision(master_weights=True)},
    "momentum": {
        "fused_lars": low_precision(),
        "fused_lars, bf16 momentum": low_precision(momentum_dtype=torch.bfloat16),
        "fused_lars, fp16 momentum": low_precision(momentum_dtype=torch.float16),
        "fused_lars, int8 momentum": low_precision(momentum_dtype="int8"),
        "torch SGD fused": torch_sgd_in_two_groups,
    },
    "stochastic": {
        "fused_lars, to nearest": low_precision(),
        "fused_lars": low_precision(stochastic_rounding=True),
        "fused_lars, int8 momentum": low_precision(stochastic_rounding=True, momentum_dtype="int8"),
        "torch SGD fused": torch_sgd_in_two_groups,
    },
}

# By name: shapes, and what to time. None stands for fused_lars and its peers.
WORKLOADS = {
    "ResNet-50": (resnet50(), None),
    "ViT-B/16": (vit_b_16(), None),
    "161 tensors of one element": ([(1,)] * 161, None),
    "400 small tensors": ([(32, 32)] * 400, None),
    "465 small tensors": ([(32, 32)] * 465, ONE_GROUP_OR_MANY),
}


def find_peers(names):
    """Returns a maker for each optimizer, and lines about the optimizers that are missing."""
    makers, left_out = {}, []
    for name in names:
        try:
            make = PEERS[name]()
        except ImportError as error:
            left_out.append(f"{name}: {error}")
        else:
            makers[name] = lambda params, make=make: make(two_groups(params))
    return makers, left_out


# ---------------------------------------------------------------- timing


def take_turns(names, time, seconds):
    """Returns medians of the figures of `time(name)`, by name and kind, and the number of rounds."""
    order, shuffle = list(names), random.Random(0).shuffle
    rounds = []
    end = time_now() + seconds
    while len(rounds) < 3 or time_now() < end:
        shuffle(order)
        rounds.append({name: time(name) for name in order})
    medians = {
        name: {kind: statistics.median(times[name][kind] for times in rounds) for kind in rounds[0][name]}
        for name in names
    }
    return medians, len(rounds)


def measure(shapes, dtype, makers, options, probe_elements):
    """Returns medians by name and kind, the number of rounds, and lines about what the device cannot run."""
    device = options.device
    torch.manual_seed(0)
    # Drawn on the CPU, because a refused capture may leave the GPU's generator unusable.
    params = [torch.nn.Parameter((0.05 * torch.randn(shape)).to(device, dtype)) for shape in shapes]
    gradients = [(1e-3 * torch.randn(shape)).to(device, dtype) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)

    def write_gradients():
        torch._foreach_copy_([p.grad for p in params], gradients)

    x, y = torch.zeros(probe_elements, device=device), torch.ones(probe_elements, device=device)
    timer = Timer(device, y, most_copies=8 if options.quick else 512)
    timed, left_out = {ADD: lambda: x.add_(y)}, []
    if device == "cuda":
        timed[COPY] = lambda: x.copy_(y)
    for name, make in makers.items():
        write_gradients()
        try:
            optimizer = make(params)
            optimizer.step()  # creates its state
        except (RuntimeError, TypeError) as error:  # TypeError: a version without one of the options
            left_out.append(f"{name}: {error}")
        else:
            timed[name] = optimizer.step

    def time(name) -> dict[str, float]:
        write_gradients()
        if device == "cpu":
            return {"ms": timer.host_ms(timed[name])}
        kinds = {}
        kinds["ms"], was_busy = timer.device_ms(timed[name])
        kinds["idle"] = float(not was_busy)
        if name not in (ADD, COPY):
            kinds["warm_ms"], _ = timer.device_ms(timed[name], warm=True)
            kinds["host_ms"] = timer.host_ms(timed[name])
        return kinds

    medians, rounds = take_turns(timed, time, options.seconds)
    if device == "cuda":
        steps = {name: step for name, step in timed.items() if name not in (ADD, COPY)}
        replays = {name: replay for name, step in steps.items() if (replay := capture(step))}
        replayed, _ = take_turns(
            replays, lambda name: {"graph_ms": timer.replay_ms(replays[name])}, options.seconds / 4
        )
        for name, step in steps.items():
            # After all timing, because a profiler may slow down what follows it.
            medians[name] |= {**replayed.get(name, {}), "launches": launches(step)}
    return medians, rounds, left_out


def run(workload, types, options):
    """Times one set of shapes with one type. Returns figures, and lines about what was left out."""
    shapes, makers = WORKLOADS[workload]
    dtype, step_bytes = TYPES[types]
    left_out = []
    if types in LOW_PRECISION:
        makers = LOW_PRECISION[types]
    elif makers is None:
        makers, left_out = find_peers(options.optimizers)
    probe_elements = 2**22 if options.quick else 2**26
    medians, rounds, not_run = measure(shapes, dtype, makers, options, probe_elements)
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    add_gb_per_s = ADD_BYTES * probe_elements / medians.pop(ADD)["ms"] / 1e6
    floor_ms = step_bytes * parameters / add_gb_per_s / 1e6
    copy_gb_per_s = COPY_BYTES * probe_elements / medians.pop(COPY)["ms"] / 1e6 if COPY in medians else None
    steps = []
    for name, kinds in sorted(medians.items(), key=lambda item: item[1]["ms"]):
        ms = kinds["ms"]
        step = {"optimizer": name, **kinds, "times_floor": ms / floor_ms}
        if copy_gb_per_s is not None:
            step["gb_per_s"] = step_bytes * parameters / ms / 1e6
            step["per_cent_of_copy"] = 100 * step["gb_per_s"] / copy_gb_per_s
        steps.append(step)
    return {
        "workload": workload,
        "types": types,
        "tensors": len(shapes),
        "parameters": parameters,
        "rounds": rounds,
        "add_gb_per_s": add_gb_per_s,
        "copy_gb_per_s": copy_gb_per_s,
        "floor_ms": floor_ms,
        "steps": steps,
    }, left_out + not_run


# ---------------------------------------------------------------- output


def table(result):
    lines = [
        f"{result['workload']}, {result['types']}: {result['tensors']} tensors, {result['parameters']:,} "
        f"parameters. Floor {result['floor_ms']:.3f} ms at {result['add_gb_per_s']:.1f} GB/s. "
        f"{result['rounds']} rounds."
    ]
    for step in result["steps"]:
        line = f"  {step['optimizer']:26} {step['ms']:9.3f} ms  {step['times_floor']:8.2f} x floor"
        if "gb_per_s" in step:
            graph = f"{step['graph_ms']:.3f}" if "graph_ms" in step else "-"
            line += f"  {step['gb_per_s']:8.1f} GB/s  {step['per_cent_of_copy']:6.1f} % of copy"
            line += f"  warm {step['warm_ms']:.3f}  graph {graph}  host {step['host_ms']:.3f}"
            line += f"  {step['launches']} launches" if step["launches"] else ""
            line += "  (the device was idle in between)" if step["idle"] else ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def plot(report, path):
    """Plots a report's results, one panel each. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    results = report["results"]
    heights = [len(result["steps"]) + 1.5 for result in results]
    figure = Figure(figsize=(9, 0.3 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(results), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, result in zip(panels, results):
        steps = result["steps"][::-1]
        names = [step["optimizer"] for step in steps]
        colours = [
            "#0b6e99" if "fused_lars" in n else "#bdbdbd" if n.startswith("torch") else "#e5b278"
            for n in names
        ]
        bars = axes.barh(names, [step["times_floor"] for step in steps], color=colours)
        labels = [f"{s['times_floor']:.2f} x  ({s['ms']:,.{1 if s['ms'] > 10 else 3}f} ms)" for s in steps]
        axes.bar_label(bars, labels, padding=4)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xlim(0, 1.3 * max(step["times_floor"] for step in steps))
        axes.set_ylim(-0.6, len(steps) - 0.4)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", left=False)
        axes.set_title(f"{result['workload']}, {result['types']}", loc="left", fontweight="bold")
    panels[-1].set_xlabel("multiple of the memory floor: the bytes of a step at the speed of x.add_(y)")
    figure.suptitle(f"One optimizer step on {report['device']}; shorter is better, 1 is the floor")
    figure.savefig(path, dpi=120)


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS), metavar="NAME")
    parser.add_argument(
        "--types", choices=TYPES, nargs="+", default=["fp32"], help="of the parameters (fp32)"
    )
    parser.add_argument("--optimizers", choices=PEERS, nargs="+", default=list(PEERS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=40, help="for each workload and type (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds each: only to try it out")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("step.png"),
        help="the plot; the numbers go beside it as .json (%(default)s)",
    )
    options = parser.parse_args()
    # Checked now, not after the whole run.
    if options.output.suffix != ".png" or not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: allowed is a .png in a folder that exists")
    if options.quick:
        options.seconds = 0
    return options


def main():
    options = parse_options()
    results, left_out = [], []
    for workload in options.workloads:
        for types in options.types:
            result, not_run = run(workload, types, options)
            results.append(result)
            left_out += [line for line in not_run if line not in left_out]
            print(table(result), flush=True)
    for line in left_out:
        print(f"left out: {line}")

    threads, simd = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    cpu = f"{platform.machine()} ({simd}, {threads} threads)"
    report = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu,
        "torch": torch.__version__,
        "results": results,
        "left_out": left_out,
    }
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    try:
        plot(report, options.output)
    except ImportError as error:
        print(f"no plot: {error}")
    else:
        print(f"plot: {options.output}")


if __name__ == "__main__":
    main()
