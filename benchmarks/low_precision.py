"""Prints what weights and momentum in fewer bits change in a training and save in memory, as Markdown tables.

    python benchmarks/low_precision.py
    python benchmarks/low_precision.py --seeds 3 --only digits memory

digits: examples/digits.py with LARS at batch size 128, 20 epochs. Each seed trains once with each choice of
dtypes, from the same weights and with the same batches. The differences are to fp32 with the same seed.
One row is fp32 from weights that are moved by a unit in the last place. It shows how far apart trainings end
that differ by chance alone. The network computes in fp32 also with bf16 weights (and bf16 gradients), so the
optimizer's rounding is all that differs.

ssl: the same for examples/self_supervised.py, 20 epochs, with the main choices.

stress: problems that defeat rounding to nearest. The first table is momentum SGD (LARS without layer
adaptation), and the same by hand with a buffer that is rounded to nearest: least squares with momentum 0.999,
and 127 weights with one whose gradient is noise, all in one block of int8 momentum. The second table is least
squares with LARS, and 10,000 weights of 1 that become 0 by 1,000 updates.

memory: bytes of the optimizer's state after a step. Those of bitsandbytes' LARS8bit are by its rule (0.50,
bitsandbytes/optim/optimizer.py, Optimizer1State.init_state): fp32 for a tensor of less than 4,096 elements,
else a byte for each element and an fp32 maximum for each 256, and one fp32 number for each tensor.
"""

import argparse
import functools
import importlib
import math
import pathlib
import statistics
import sys

import torch
from shapes import resnet50, vit_b_16
from torch import nn
from torch.func import functional_call

import fused_lars

FP32, BF16 = torch.float32, torch.bfloat16
# By name: the dtype of weights and gradients, and options of LARS.
CHOICES = {
    "fp32": (FP32, {}),
    "fp32, bf16 momentum": (FP32, {"momentum_dtype": BF16}),
    "fp32, fp16 momentum": (FP32, {"momentum_dtype": torch.float16}),
    "fp32, int8 momentum": (FP32, {"momentum_dtype": "int8"}),
    "bf16 to nearest": (BF16, {}),
    "bf16 stochastic": (BF16, {"stochastic_rounding": True}),
    "bf16 stochastic, int8 momentum": (BF16, {"stochastic_rounding": True, "momentum_dtype": "int8"}),
    "bf16 with masters": (BF16, {"master_weights": True}),
    "bf16 with masters, bf16 momentum": (BF16, {"master_weights": True, "momentum_dtype": BF16}),
    "bf16 with masters, int8 momentum": (BF16, {"master_weights": True, "momentum_dtype": "int8"}),
}
MOVED = "fp32, first weights moved by an ulp"
MAIN_CHOICES = ["fp32", MOVED, "fp32, bf16 momentum", "fp32, int8 momentum", "bf16 stochastic"]
NOT_TRAINED = ["bf16 with masters", "bf16 with masters, int8 momentum"]  # to save time
EPOCHS = 20


def print_row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def print_header(title, *columns):
    print(f"\n{title}\n")
    print_row("", *columns)
    print_row(*["---"] * (len(columns) + 1))


# ---------------------------------------------------------------- trainings


def train(script, network, rate, batch_size, take_gradients, images, choice, seed):
    """Trains a network as one of the examples does, with its weights and momentum kept as chosen."""
    dtype, options = CHOICES["fp32" if choice == MOVED else choice]
    if choice == MOVED:
        for p in network.parameters():
            p.data *= 1 + 1e-7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    network.to(dtype)

    def compute(inputs):
        return functional_call(network, {name: p.float() for name, p in network.named_parameters()}, inputs)

    groups = fused_lars.param_groups(network, weight_decay=script.WEIGHT_DECAY)
    constants = {"momentum": script.MOMENTUM, "trust_coefficient": 0.02, "rounding_seed": seed}
    optimizer = fused_lars.LARS(groups, lr=rate, **constants, **options)
    batches = len(images) // batch_size
    schedule = script.make_schedule(optimizer, steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(batch_size)[:batches]:
            take_gradients(compute, batch)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network.float()


def train_digits(script, data, choice, seed):
    """Returns the accuracy on the test images, in per cent, and the loss on the training images."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    network = script.make_network()

    def take_gradients(compute, batch):
        nn.functional.cross_entropy(compute(images[batch]), labels[batch]).backward()

    train(script, network, script.rate("LARS", 128), 128, take_gradients, images, choice, seed)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(images), labels)
        right = network(test_images).argmax(1) == test_labels
    return 100 * right.double().mean().item(), loss.item()


def train_self_supervised(script, data, choice, seed):
    """Returns the accuracy of a probe with few labels, in per cent, and the loss on the training images."""
    images, size = data[0], script.BASE_BATCH_SIZE
    torch.manual_seed(seed)
    model = script.make_model()

    def take_gradients(compute, batch):
        views = [script.random_views(images[batch]) for _ in range(2)]
        script.take_gradients(compute, torch.stack(views, dim=1))

    train(script, model, script.BASE_RATE["LARS"], size, take_gradients, images, choice, seed)
    with torch.no_grad():
        loss = script.barlow_twins_loss(*(model(script.random_views(images)) for _ in range(2)))
    return script.probe_with_few_labels(model[0], seed, data)[0], loss.item()


def compare(title, example, train, choices, seeds):
    """Prints a table of what the trainings return."""
    script = importlib.import_module(example)
    data, of_fp32 = script.load_digits(), None
    gap = "difference to fp32 ± standard error"
    title += f", {EPOCHS} epochs, mean ± standard deviation of {seeds} seeds"
    print_header(title, "accuracy, %", gap, "training loss", gap)
    for choice in choices:
        results = [*zip(*(train(script, data, choice, seed) for seed in range(seeds)))]
        of_fp32 = of_fp32 or results
        cells = []
        for values, others, form in zip(results, of_fp32, (".2f", ".5f")):
            gaps = [value - other for value, other in zip(values, others)]
            cells.append(f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}")
            error = statistics.stdev(gaps) / seeds**0.5
            cells.append("" if choice == "fp32" else f"{statistics.fmean(gaps):+{form}} ± {error:{form}}")
        print_row(choice, *cells)


# ---------------------------------------------------------------- stress


def to_bf16(v):
    return v.bfloat16().float()


def to_linear_int8(v):
    scale = v.abs().max().clamp(min=1e-30) / 127
    return (v / scale).round() * scale


# By name: options of LARS, or what the buffer by hand is rounded with.
MOMENTA = {
    **{name: options for name, (dtype, options) in CHOICES.items() if dtype == FP32},
    "by hand: bf16 to nearest": to_bf16,
    "by hand: linear int8 to nearest": to_linear_int8,
}


def descend(kept, gradient, elements, steps, lr, momentum, seed):
    """Returns the root of the mean square distance to 1 of weights that start at 0."""
    w, v = nn.Parameter(torch.zeros(elements)), torch.zeros(elements)
    generator, optimizer = torch.Generator().manual_seed(seed), None
    if not callable(kept):
        constants = {"layer_adaptation": False, "rounding_seed": seed}
        optimizer = fused_lars.LARS([w], lr=lr, momentum=momentum, **constants, **kept)
    for _ in range(steps):
        w.grad = gradient(w.data, generator)
        if optimizer:
            optimizer.step()
        else:
            v.mul_(momentum).add_(w.grad, alpha=lr)
            w.data -= v
            v = kept(v)
    return (w.data[1:] - 1).square().mean().sqrt().item()


def stress_momentum(seeds):
    curvatures, noises = torch.logspace(0, -1, 64), (30, 300, 1000, 10_000)

    def curved(w, _):
        return curvatures * (w - 1)

    def with_noise(noise, w, generator):
        g = w - 1
        g[0] = noise * torch.randn((), generator=generator)
        return g

    problems = [(curved, 64, 20_000, 1e-5, 0.999)]
    problems += [(functools.partial(with_noise, noise), 128, 300, 1e-3, 0.9) for noise in noises]
    title = f"Momentum: distance to the minimum (1 at first), mean of {seeds} seeds"
    print_header(title, "momentum 0.999", *(f"noise of {noise:,}" for noise in noises))
    for name, kept in MOMENTA.items():
        means = [statistics.fmean(descend(kept, *problem, s) for s in range(seeds)) for problem in problems]
        print_row(name, *(f"{mean:.2g}" for mean in means))


def regress(choice, lr, seed, steps=2000):
    """Least squares with LARS and a rate that decays to 0. Returns the last loss as a part of the first."""
    dtype, options = CHOICES[choice]
    torch.manual_seed(seed)
    x, goal = torch.randn(256, 64), torch.randn(64, 64) / 8
    curvature = 2 / (256 * 64) * x.T @ x
    w = nn.Parameter((torch.randn(64, 64) / 8).to(dtype))
    optimizer = fused_lars.LARS([w], momentum=0.9, weight_decay=1e-4, rounding_seed=seed, **options)
    first = (x @ (w.data.float() - goal)).square().mean()
    for t in range(steps):
        w.grad = (curvature @ (w.data.float() - goal)).to(dtype)
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        optimizer.step()
    return ((x @ (w.data.float() - goal)).square().mean() / first).item()


def count_down(choice):
    """Takes 0.001 from weights of 1, 1,000 times."""
    dtype, options = CHOICES[choice]
    w = nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer = fused_lars.LARS([w], lr=0.001, layer_adaptation=False, **options)
    w.grad = torch.ones_like(w)
    for _ in range(1000):
        optimizer.step()
    return f"{w.data.float().mean():.3f} ± {w.data.float().std():.3f}"


def stress_weights(seeds):
    rates = (1.0, 0.3, 0.1)
    title = (
        f"Weights: last loss / first loss, mean of {seeds} seeds, and 1 - 1,000 x 0.001 ± standard deviation"
    )
    print_header(title, *(f"rate {lr:g}" for lr in rates), "1 - 1,000 x 0.001")
    for choice in CHOICES:
        means = [statistics.fmean(regress(choice, lr, seed) for seed in range(seeds)) for lr in rates]
        print_row(choice, *(f"{mean:.2g}" for mean in means), count_down(choice))


# ---------------------------------------------------------------- memory


def state_bytes(make, shapes, dtype):
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make(params)
    optimizer.step()
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def lars8bit_bytes(shapes):
    sizes = map(math.prod, shapes)
    return sum(4 + (4 * n if n < 4096 else n + 4 * math.ceil(n / 256)) for n in sizes)


def memory():
    models = {"ResNet-50": resnet50(), "ViT-B/16": vit_b_16()}
    columns = [f"{name}, {what}" for name in models for what in ("state", "weights and state")]
    print_header("Megabytes (10^6 bytes)", *columns, "state, bytes a parameter of ViT-B/16")
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizers = {
        name: (dtype, functools.partial(fused_lars.LARS, momentum=0.9, **options))
        for name, (dtype, options) in CHOICES.items()
    }
    optimizers |= {"torch SGD, fp32": (FP32, sgd), "torch SGD, bf16": (BF16, sgd)}
    optimizers |= {"bitsandbytes LARS8bit, fp32": (FP32, None), "bitsandbytes LARS8bit, bf16": (BF16, None)}
    for name, (dtype, make) in optimizers.items():
        cells = []
        for shapes in models.values():
            state = state_bytes(make, shapes, dtype) if make else lars8bit_bytes(shapes)
            parameters = sum(map(math.prod, shapes))
            cells += [f"{state / 1e6:.1f}", f"{(state + dtype.itemsize * parameters) / 1e6:.1f}"]
        print_row(name, *cells, f"{state / parameters:.2f}")


def main():
    parts = ("digits", "ssl", "stress", "memory")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="2 and more (8 for digits, else 3)")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="(all)")
    options = parser.parse_args()
    if options.seeds is not None and options.seeds < 2:
        parser.error(f"--seeds {options.seeds}; allowed: 2 and more")
    torch.set_num_threads(1)  # such small layers gain little from a second one
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "examples"))
    seeds = options.seeds or 3
    print(f"torch {torch.__version__}, {fused_lars.show_config().splitlines()[-1]}")
    if "digits" in options.only:
        choices = ["fp32", MOVED, *[choice for choice in CHOICES if choice not in ("fp32", *NOT_TRAINED)]]
        compare("Digits, batch size 128", "digits", train_digits, choices, options.seeds or 8)
    if "ssl" in options.only:
        title = "Barlow Twins, batch size 512, probes with 100 labels"
        compare(title, "self_supervised", train_self_supervised, MAIN_CHOICES, seeds)
    if "stress" in options.only:
        stress_momentum(seeds)
        stress_weights(seeds)
    if "memory" in options.only:
        memory()


if __name__ == "__main__":
    main()
