"""masters_follow: masters take over what was written into their parameters before the step."""

import copy

import pytest
import torch

from cases import BF16, F16, F32, OPTIONS
from layouts import LAYOUTS, Layout, Layouts
from reference import Rule
from stepping import Dtypes, call_op_for_norms, make_leaf, same_bits

# Several tiles on CUDA, and not a multiple of any size.
LARGE = Layouts(Layout((30_001,)))
DTYPES = {
    "bf16": Dtypes(BF16, BF16, F32, master=True),
    "fp16, fp32 gradient": Dtypes(F16, F32, F32, master=True),
}


def make_written_leaves(dtypes, options, device, generator):
    """Leaves with some elements written, and copies whose masters have taken them over by hand."""
    rule = Rule(**options, master_weights=True)
    layouts = {**LAYOUTS, "large": LARGE}
    leaves = [make_leaf(name, of, dtypes, rule, device, generator) for name, of in layouts.items()]
    expected = []
    for leaf in leaves:
        value = torch.randn(leaf.param.shape, generator=generator).to(leaf.param.dtype)
        value[torch.rand(value.shape, generator=generator) < 0.1] = -0.0
        value = value.to(device)
        written = torch.rand(value.shape, generator=generator).to(device) < 0.3
        # By chance a written element may be what it was.
        differs = written & (value.view(torch.int16) != leaf.param.contiguous().view(torch.int16))
        leaf.param.copy_(torch.where(written, value, leaf.param))
        twin = copy.deepcopy(leaf)
        twin.master_param.copy_(torch.where(differs, value.float(), leaf.master_param))
        expected.append(twin)
    return leaves, expected


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["everything classic", "everything with a decayed norm", "plain"])
def test_step_of_what_was_written(op, dtypes, name, device, generator):
    leaves, expected = make_written_leaves(dtypes, OPTIONS[name], device, generator)
    results = call_op_for_norms(leaves, op=op, masters_follow=True)
    for result, of_twins in zip(results, call_op_for_norms(expected, op=op)):
        assert same_bits(result, of_twins)
    for leaf, twin in zip(leaves, expected):
        for key, tensor in leaf.tensors().items():
            assert same_bits(tensor, twin.tensors()[key]), (leaf.name, key)


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_a_skipped_step_changes_no_master(op, device, generator):
    leaves, _ = make_written_leaves(DTYPES["bf16"], OPTIONS["plain"], device, generator)
    before = [leaf.master_param.clone() for leaf in leaves]
    call_op_for_norms(leaves, op=op, masters_follow=True, found_inf=torch.ones((), device=device))
    for leaf, master in zip(leaves, before):
        assert same_bits(leaf.master_param, master)


def test_masters_keep_their_low_bits_without_the_flag(device, generator):
    leaves, _ = make_written_leaves(DTYPES["bf16"], {"lr": 0.0}, device, generator)
    before = [leaf.master_param.clone() for leaf in leaves]
    call_op_for_norms(leaves)
    for leaf, master in zip(leaves, before):
        assert same_bits(leaf.master_param, master)
