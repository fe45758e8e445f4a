"""The same inputs give the same bits: in every run, on any number of threads, with any instruction set."""

import subprocess
import sys

import pytest
import torch

from cases import DTYPES, FEW_OPTIONS, OPTIONS, ROUNDED_DTYPES
from fused_lars import LARS
from layouts import LAYOUTS, Layout, Layouts
from paths import ROOT
from python_program import environment
from reference import Rule
from stepping import Dtypes, call_op, make_leaf, same_bits


def digests(capability: str, threads: list[int]) -> list[str]:
    command = [sys.executable, ROOT / "tests" / "support" / "digest.py", "cpu", *map(str, threads)]
    variables = {**environment(), "ATEN_CPU_CAPABILITY": capability}
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def one_thread() -> str:
    return digests("", [1])[0]


def test_any_number_of_threads(one_thread):
    assert digests("", [2, 3, 5, 1]) == [one_thread] * 4


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_any_instruction_set(one_thread, capability):
    """If the machine lacks one, the next lower one is used, so this passes on any machine."""
    assert digests(capability, [2]) == [one_thread]


def test_again(device):
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        leaf = make_leaf(
            "w", Layouts(Layout((30_000,))), Dtypes(torch.float32), Rule(momentum=0.5), device, generator
        )
        ratios = call_op([leaf])
        runs.append((leaf.param, leaf.momentum_buffer, ratios))
    for a, b in zip(*runs):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    "options", [dict(momentum=0.9, nesterov=True), dict(classic_momentum=False, momentum=0.9), {}]
)
def test_the_update_of_every_implementation_is_one_arithmetic(options, device):
    """The reference sums norms in another order. Without adaptation it gives the bits of the kernels."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator)
    results = []
    for implementation in ("fused", "foreach"):
        param = torch.nn.Parameter(values[0].to(device))
        optimizer = LARS(
            [param], lr=0.3, weight_decay=0.1, layer_adaptation=False, **options, **{implementation: True}
        )
        for _ in range(3):
            param.grad = values[1].to(device)
            optimizer.step()
        results.append(param)
    assert same_bits(*results)


# In fp64 the last bit of a trust ratio shows.
COMPUTED_IN_FP32 = {
    name: dtypes for name, dtypes in {**DTYPES, **ROUNDED_DTYPES}.items() if dtypes.param != torch.float64
}


@pytest.mark.parametrize("dtypes", COMPUTED_IN_FP32.values(), ids=COMPUTED_IN_FP32)
def test_from_the_same_norms_the_reference_gives_the_same_bits(dtypes, device):
    """It draws the same random bits and numbers elements alike, in every layout."""
    every = []
    for op in ("step_", "reference_step_"):
        generator = torch.Generator().manual_seed(0)
        leaves = [
            make_leaf(f"{name}, {layout}", of, dtypes, Rule(**options, **dtypes.switches), device, generator)
            for name, options in ((name, OPTIONS[name]) for name in FEW_OPTIONS)
            for layout, of in LAYOUTS.items()
        ]
        norms = torch.ops.fused_lars.squared_norms(
            [leaf.weight for leaf in leaves], [leaf.grad for leaf in leaves]
        )
        for _ in range(2):
            call_op(leaves, squared_norms=norms, op=op)
        every.append(leaves)
    for leaf, other in zip(*every):
        for name, tensor in leaf.tensors().items():
            assert same_bits(tensor, other.tensors()[name]), f"{name} of {leaf.name}"
