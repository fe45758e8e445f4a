"""Errors name what does not fit, with its value and what is allowed. Nothing has changed by then."""

import dataclasses
import re
from random import Random

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import torch_versions
from devices import has_kernels
from fused_lars import LARS
from layouts import Layout, Layouts
from reference import Rule
from stepping import HYPERPARAMETERS, Dtypes, call_op, make_leaf, make_optimizer, same_bits, snapshot

nan, inf = float("nan"), float("inf")

RANGES = [
    (dict(lr=-0.1), r"Invalid learning rate: -0\.1; allowed: finite and >= 0"),
    (dict(lr=nan), "Invalid learning rate: nan"),
    (dict(lr=inf), "Invalid learning rate: inf"),
    (dict(lr=torch.tensor(-0.5)), r"Invalid learning rate: -0\.5"),
    (dict(lr=torch.tensor([0.1, 0.2])), r"Tensor lr must be 1-element.*\(2,\)"),
    (dict(momentum=-0.1), r"Invalid momentum value: -0\.1; allowed: >= 0 and < 1"),
    (dict(momentum=1.0), "Invalid momentum value: 1;"),
    (dict(momentum=nan), "Invalid momentum value: nan"),
    (dict(weight_decay=-1e-4), "Invalid weight_decay value: -0.0001; allowed: finite and >= 0"),
    (dict(weight_decay=inf), "Invalid weight_decay value: inf"),
    (dict(trust_coefficient=0.0), "Invalid trust_coefficient value: 0; allowed: finite and > 0"),
    (dict(trust_coefficient=nan), "Invalid trust_coefficient value: nan"),
    (dict(eps=-1e-8), "Invalid eps value"),
    (dict(eps=inf), "Invalid eps value: inf"),
    (dict(momentum=0.9, classic_momentum=False, dampening=-0.1), "Invalid dampening value"),
    (dict(momentum=0.9, classic_momentum=False, dampening=1.1), "Invalid dampening value: 1.1"),
    (dict(momentum=0.9, dampening=0.1), "dampening belongs to torch's momentum"),
    (dict(nesterov=True), "Nesterov momentum requires a momentum and zero dampening"),
    (
        dict(momentum=0.9, nesterov=True, dampening=0.1, classic_momentum=False),
        "Nesterov momentum requires a momentum and zero dampening",
    ),
]


@pytest.mark.parametrize(("options", "message"), RANGES, ids=str)
def test_hyperparameters_out_of_range(options, message):
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        LARS([param], **options)
    with pytest.raises(ValueError, match=message):
        LARS([{"params": [param], **options}])
    optimizer = LARS([param])
    other = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", nan), ("momentum", 1.0), ("weight_decay", -1.0), ("trust_coefficient", 0.0)],
)
def test_hyperparameters_that_go_out_of_range_later(implementation, name, value):
    """step() finds a scheduler's mistake and names the group."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = LARS([{"params": p} for p in params], lr=0.1, momentum=0.9, **{implementation: True})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match="in group 1: "):
        optimizer.step()
    for p, old in zip(params, before):
        assert same_bits(p, old)


def test_fused_excludes_the_reference():
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        LARS([param], fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        LARS([param], fused=True, differentiable=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_fused_with_an_unsupported_dtype(dtype):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)]
    with pytest.raises(
        RuntimeError, match=f"parameter 1 has dtype {dtype}; allowed: torch.float32, torch.float64"
    ):
        LARS(params, fused=True)
    with pytest.raises(RuntimeError, match=f"parameter named_one has dtype {dtype}"):
        LARS([("named_one", params[1])], fused=True)


NO_KERNELS = "`fused=True` requires all the params to be floating point Tensors of supported devices; "


def test_fused_on_meta(device):
    """Models get their memory later. The first step raises, in torch's words, and makes no state on meta."""
    if not has_kernels(device):
        pytest.skip("the build has no CUDA kernels")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = LARS(model.named_parameters(), lr=0.1, momentum=0.9, fused=True)
    optimizer.step()  # no gradients yet
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=f"{NO_KERNELS}parameter '0.weight'.* is on meta, for which this"):
        optimizer.step()
    assert not optimizer.state
    for p in model.parameters():
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(torch.ones(p.shape, device=device)))
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(bool((p < 1).all()) for p in model.parameters())


def test_fused_on_meta_beside_another_device():
    params = [nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "meta")]
    optimizer = LARS(params, lr=0.1, momentum=0.9, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match=rf"{NO_KERNELS}parameter param_groups\[0\]\['params'\]\[1\] is on meta"
    ):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(params[0], torch.ones(2))
    params[1].grad = None  # as if this part of the model were not trained
    optimizer.step()
    assert not torch.equal(params[0], torch.ones(2))


@pytest.mark.parametrize("params", [[], [{"params": []}, {"params": None}]], ids=str)
def test_no_parameters(params):
    with pytest.raises((ValueError, TypeError)):
        LARS(params)


def test_an_empty_group_is_no_error():
    param = nn.Parameter(torch.ones(2))
    optimizer = LARS([{"params": []}, {"params": [param]}, {"params": []}], lr=1.0, trust_coefficient=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(param, torch.full((2,), 0.5))


# ---------------------------------------------------------------- tensors that do not fit, last in the list


def set_dtype(leaf, dtype):
    leaf.grad = leaf.grad.to(dtype)


BAD_GRADIENTS = {
    "sparse": (lambda leaf: leaf.grad.to_sparse(), r"grads\[3\] has layout Sparse; allowed: Strided"),
    "shape": (
        lambda leaf: leaf.grad[:-1],
        r"grads\[3\] has shape \[9\]; expected the shape of its parameter, \[10\]",
    ),
    "broadcastable": (lambda leaf: leaf.grad[:1], r"grads\[3\] has shape \[1\]; expected .*\[10\]"),
    "dtype": (
        lambda leaf: leaf.grad.double(),
        r"grads\[3\] has dtype Double; allowed for a parameter of Float: Float",
    ),
    "integers": (lambda leaf: leaf.grad.int(), r"grads\[3\] has dtype Int; allowed for a parameter of Float"),
    "device": (
        lambda leaf: leaf.grad.to("meta"),
        r"grads\[3\] is on meta; expected the device of its parameter, cpu",
    ),
}
BAD_STATE = {
    "buffer shape": (
        dict(momentum_buffer=lambda x: x[:-1].clone()),
        r"momentum_buffers\[3\] has shape \[9\]; expected the shape of its parameter, \[10\]",
    ),
    "buffer dtype": (
        dict(momentum_buffer=lambda x: x.double()),
        r"momentum_buffers\[3\] has dtype Double; allowed",
    ),
    "buffer overlaps": (
        dict(momentum_buffer=lambda x: x[:1].expand(10)),
        r"momentum_buffers\[3\] overlaps itself \(expanded, strides \[0\]\)",
    ),
    "buffer device": (
        dict(momentum_buffer=lambda x: x.to("meta")),
        r"momentum_buffers\[3\] is on meta; expected",
    ),
    "step dtype": (dict(step=lambda x: x.double()), r"steps\[3\] is Double on cpu; expected Float on cpu"),
    "step size": (dict(step=lambda x: x.expand(2)), r"steps\[3\] has shape \[2\]; expected 1 element"),
}


def make_leaves(device="cpu"):
    rule = Rule(lr=0.1, momentum=0.9, dampening=0.1, classic_momentum=False, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    return [
        make_leaf(str(n), Layouts(Layout((n,))), Dtypes(torch.float32), rule, device, generator)
        for n in (5, 0, 3, 10)
    ]


def assert_unchanged(leaves, before):
    for leaf, old in zip(leaves, before):
        for name, tensor in leaf.tensors().items():
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                assert same_bits(tensor, old[name]), f"{name} of {leaf.name} changed"


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize(("spoil", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_a_bad_gradient_is_found_before_anything_is_written(op, spoil, message):
    leaves = make_leaves()
    leaves[3].grad = spoil(leaves[3])
    before = snapshot(leaves)
    with pytest.raises(ValueError, match=message):
        call_op(leaves, op=op)
    assert_unchanged(leaves, before)


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize(("spoil", "message"), BAD_STATE.values(), ids=BAD_STATE)
def test_bad_state_is_found_before_anything_is_written(op, spoil, message):
    leaves = make_leaves()
    for name, change in spoil.items():
        setattr(leaves[3], name, change(getattr(leaves[3], name)))
    before = snapshot(leaves)
    with pytest.raises(ValueError, match=message):
        call_op(leaves, op=op)
    assert_unchanged(leaves, before)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("kind", ["sparse", "dtype"])
def test_the_optimizer_changes_nothing_before_a_bad_gradient_is_found(implementation, kind):
    """It does not even create the state of a first step."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LARS(params, lr=0.1, momentum=0.9, **{implementation: True})
    params[0].grad = torch.ones(3)
    if kind == "sparse":
        params[1].grad = torch.ones(4).to_sparse()
    elif not torch_versions.GRADIENTS_HAVE_DTYPES:
        pytest.skip("this torch takes no gradient of another dtype than the parameter's")
    else:
        params[1].grad_dtype = torch.float64
        params[1].grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"grads\[1\] has "):
        optimizer.step()
    assert all(p.eq(1).all() for p in params)
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())
    for p in params:
        p.grad_dtype = None
        p.grad = torch.ones_like(p)
    optimizer.step()
    # The run goes on as if the failed step had not happened.
    others = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    expected = LARS(others, lr=0.1, momentum=0.9, **{implementation: True})
    for p in others:
        p.grad = torch.ones_like(p)
    expected.step()
    for p, q in zip(params, others):
        assert same_bits(p, q)


def test_sparse_gradients_of_an_embedding():
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"Sparse; allowed: Strided.*sparse gradients are not supported"):
        LARS(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_a_parameter_that_overlaps_itself(op):
    leaves = make_leaves()
    leaves[0].param = torch.ones(1).expand(5)
    with pytest.raises(ValueError, match=r"params\[0\] overlaps itself"):
        call_op(leaves, op=op)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_check_step_refuses_what_step_refuses_and_writes_nothing(device, tensor_lr):
    leaves = make_leaves(device)
    before = snapshot(leaves)
    assert call_op(leaves, tensor_lr=tensor_lr, op="check_step").isnan().all()
    assert_unchanged(leaves, before)
    leaves[3].momentum_buffer = leaves[3].momentum_buffer[:-1]
    messages = []
    for op in ("step_", "check_step"):
        with pytest.raises(ValueError, match=r"momentum_buffers\[3\] has shape") as error:
            call_op(leaves, tensor_lr=tensor_lr, op=op)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class SeenOps(TorchDispatchMode):
    """Collects the names of the ops that a dispatch mode sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_steps_but_no_checks():
    params, grads = [torch.ones(3)], [torch.ones(3)]
    with SeenOps() as seen:
        call(params, grads, op="check_step")
        call(params, grads)
    assert seen.names == ["fused_lars::step_"]


def test_lists_of_the_wrong_length():
    leaves = make_leaves()
    missing = make_leaves()
    missing[3].momentum_buffer = None
    with pytest.raises(
        ValueError, match=r"momentum_buffers has 3 tensors; expected 4, one for each parameter"
    ):
        call_op(missing)
    missing = make_leaves()
    missing[3].step = None
    with pytest.raises(ValueError, match=r"steps has 3 tensors; expected 4"):
        call_op(missing)
    before = snapshot(leaves)
    with pytest.raises(ValueError, match=r"squared_norms has shape \[4, 1\]; expected \[4, 2\]"):
        call_op(leaves, squared_norms=torch.ones(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"squared_norms is Float on cpu; expected Double on cpu"):
        call_op(leaves, squared_norms=torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"found_inf is Double on cpu; expected Float on cpu"):
        call_op(leaves, found_inf=torch.zeros((), dtype=torch.float64))
    with pytest.raises(ValueError, match=r"grad_scale has shape \[2\]; expected 1 element"):
        call_op(leaves, grad_scale=torch.ones(2))
    assert_unchanged(leaves, before)


def test_a_master_of_the_wrong_dtype():
    generator = torch.Generator().manual_seed(0)
    leaf = make_leaf(
        "w",
        Layouts(Layout((4,))),
        Dtypes(torch.bfloat16, master=True),
        Rule(master_weights=True),
        "cpu",
        generator,
    )
    leaf.master_param = leaf.master_param.bfloat16()
    with pytest.raises(ValueError, match=r"master_params\[0\] has dtype BFloat16; allowed .*Float"):
        call_op([leaf])


# ---------------------------------------------------------------- state of rounding that does not fit


def make_rounded_leaves(device="cpu"):
    """Leaves with int8 momentum of several blocks, of which the last one is bad in the tests."""
    generator = torch.Generator().manual_seed(0)
    dtypes, rule = Dtypes(torch.float32, state=torch.int8), Rule(lr=0.1, momentum=0.9)
    layouts = [Layouts(Layout(sizes)) for sizes in ((5,), (0,), (3, 4), (10, 30))]
    return [make_leaf(f"{i}", of, dtypes, rule, device, generator) for i, of in enumerate(layouts)]


BAD_ROUNDING_STATE = {
    "scale missing": (
        "momentum_scale",
        lambda x: None,
        r"momentum_scales has 3 tensors; expected 4, one for",
    ),
    "scale shape": (
        "momentum_scale",
        lambda x: x[:2],
        r"momentum_scales\[3\] has shape \[2\]; expected \[3\]",
    ),
    "scale dimensions": (
        "momentum_scale",
        lambda x: x.view(3, 1),
        r"momentum_scales\[3\] has shape \[3, 1\]; expected \[3\]",
    ),
    "scale dtype": (
        "momentum_scale",
        lambda x: x.double(),
        r"momentum_scales\[3\] is Double on cpu with strides \[1\]; expected contiguous Float on cpu",
    ),
    "scale device": (
        "momentum_scale",
        lambda x: x.to("meta"),
        r"momentum_scales\[3\] is Float on meta .*; expected contiguous Float on cpu",
    ),
    "scale strides": (
        "momentum_scale",
        lambda x: torch.ones(3, 2)[:, 0],
        r"momentum_scales\[3\] is Float on cpu with strides \[2\]; expected contiguous Float on cpu",
    ),
    "scale layout": (
        "momentum_scale",
        lambda x: x.to_sparse(),
        r"momentum_scales\[3\] has layout Sparse; allowed: Strided",
    ),
    "state missing": (
        "rng_state",
        lambda x: None,
        r"rng_states has 3 tensors; expected 4, one for each param",
    ),
    "state shape": ("rng_state", lambda x: x[:2], r"rng_states\[3\] has shape \[2\]; expected \[3\]"),
    "state dtype": (
        "rng_state",
        lambda x: x.int(),
        r"rng_states\[3\] is Int on cpu with strides \[1\]; expected contiguous Long on cpu",
    ),
    "state device": (
        "rng_state",
        lambda x: x.to("meta"),
        r"rng_states\[3\] is Long on meta .*; expected contiguous Long on cpu",
    ),
    "state strides": (
        "rng_state",
        lambda x: torch.ones(6, dtype=torch.int64)[::2],
        r"rng_states\[3\] is Long on cpu with strides \[2\]; expected contiguous Long on cpu",
    ),
    "buffer with gaps": (
        "momentum_buffer",
        lambda x: torch.zeros(10, 40, dtype=torch.int8)[:, :30],
        r"momentum_buffers\[3\] is int8 with strides \[40, 1\]; expected a dense tensor",
    ),
    "buffer expanded": (
        "momentum_buffer",
        lambda x: torch.zeros(30, dtype=torch.int8).expand(10, 30),
        r"momentum_buffers\[3\] overlaps itself \(expanded, strides \[0, 1\]\)",
    ),
    "buffer unsigned": (
        "momentum_buffer",
        lambda x: x.view(torch.uint8),
        r"momentum_(buffers\[3\] has dtype Byte; allowed|scales has 4 tensors; expected 3)",
    ),
    "buffer shape": (
        "momentum_buffer",
        lambda x: x.view(300),
        r"momentum_buffers\[3\] has shape \[300\]; expected the shape of its parameter, \[10, 30\]",
    ),
}


@pytest.mark.parametrize("op", ["step_", "reference_step_", "check_step"])
@pytest.mark.parametrize(
    ("name", "spoil", "message"), BAD_ROUNDING_STATE.values(), ids=list(BAD_ROUNDING_STATE)
)
def test_bad_state_of_rounding_is_found_before_anything_is_written(op, name, spoil, message):
    leaves = make_rounded_leaves()
    before = snapshot(leaves)
    good = getattr(leaves[3], name)
    setattr(leaves[3], name, spoil(good))
    with pytest.raises(ValueError, match=f"^{message}"):
        call_op(leaves, op=op)
    setattr(leaves[3], name, good)
    assert_unchanged(leaves, before)
    call_op(leaves, op=op)


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize(
    ("param", "state", "allowed"),
    [
        (torch.float64, torch.int8, "Double: Double, Float"),
        (torch.float64, torch.bfloat16, "Double: Double, Float"),
        (torch.float64, torch.float16, "Double: Double, Float"),
        (torch.float32, torch.float64, "Float: Float, BFloat16, Half, Char"),
        (torch.float32, torch.int16, "Float: Float, BFloat16, Half, Char"),
        (torch.bfloat16, torch.float16, "BFloat16: BFloat16, Float, Char"),
        (torch.float16, torch.bfloat16, "Half: Half, Float, Char"),
        (torch.bfloat16, torch.float64, "BFloat16: BFloat16, Float, Char"),
    ],
    ids=str,
)
@pytest.mark.parametrize("master", [False, True])
def test_momentum_of_a_dtype_that_does_not_fit(op, param, state, allowed, master):
    rule = Rule(momentum=0.9, master_weights=master)
    dtypes = Dtypes(param, state=state, master=master and param in (torch.float16, torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    leaf = make_leaf("w", Layouts(Layout((4,))), dtypes, rule, "cpu", generator)
    before = snapshot([leaf])
    with pytest.raises(ValueError, match=rf"^momentum_buffers\[0\] has dtype \w+; allowed .* of {allowed}"):
        call_op([leaf], op=op)
    assert_unchanged([leaf], before)


def test_lists_that_no_parameter_needs():
    leaves = make_leaves()
    before = snapshot(leaves)
    leaves[0].momentum_scale = torch.ones(1)
    with pytest.raises(ValueError, match=r"^momentum_scales has 1 tensors; expected 0, one for each int8"):
        call_op(leaves)
    leaves[0].momentum_scale, leaves[0].rng_state = None, torch.zeros(3, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"^rng_states has 1 tensors; expected 0, one for each .* rounded stochastically"
    ):
        call_op(leaves)
    leaves[0].rng_state = None
    assert_unchanged(leaves, before)


def test_a_master_is_not_rounded_stochastically():
    message = "Invalid stochastic_rounding value{}: true; allowed without master_weights only"
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message.format("")):
        LARS([param], master_weights=True, stochastic_rounding=True)
    optimizer = LARS([param], lr=0.1, master_weights=True)
    optimizer.param_groups[0]["stochastic_rounding"] = True
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=message.format(" in group 0")):
        optimizer.step()
    rule = Rule(master_weights=True, stochastic_rounding=True)
    leaf = make_leaf(
        "w",
        Layouts(Layout((4,))),
        Dtypes(torch.bfloat16, master=True),
        rule,
        "cpu",
        torch.Generator().manual_seed(0),
    )
    for op in ("step_", "reference_step_", "check_step"):
        with pytest.raises(ValueError, match=f"^{message.format(' in group 0')}"):
            call_op([leaf], op=op)
    assert bool((param == 1).all())


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_state_of_rounding_needs_memory_of_its_own(op, device):
    leaves = make_rounded_leaves(device)
    before = snapshot(leaves)

    def expect(message, **shared):
        old = {name: getattr(leaves[3], name) for name in shared}
        for name, tensor in shared.items():
            setattr(leaves[3], name, tensor)
        with pytest.raises(ValueError, match=f"^{message}; every tensor that a step writes needs"):
            call_op(leaves, op=op)
        for name, tensor in old.items():
            setattr(leaves[3], name, tensor)

    expect(
        r"momentum_scales\[3\] shares memory with params\[3\]",
        momentum_scale=leaves[3].param.view(-1)[290:293],
    )
    expect(
        r"momentum_scales\[3\] shares memory with grads\[3\]",
        momentum_scale=leaves[3].grad.view(-1)[:3],
    )
    memory = torch.zeros(8, dtype=torch.int64, device=device)
    expect(
        r"rng_states\[3\] shares memory with momentum_scales\[3\]",
        rng_state=memory[:3],
        momentum_scale=memory.view(torch.float32)[4:7],
    )
    expect(r"rng_states\[3\] shares memory with rng_states\[2\]", rng_state=leaves[2].rng_state)
    codes = torch.zeros(304, dtype=torch.int8, device=device)
    expect(
        r"momentum_scales\[3\] shares memory with momentum_buffers\[3\]",
        momentum_buffer=codes[:300].view(10, 30),
        momentum_scale=codes.view(torch.float32)[73:76],
    )
    assert_unchanged(leaves, before)


# ---------------------------------------------------------------- memory that a step would write twice


def call(params, grads, buffers=(), op="step_", **options):
    """Calls the op on one group, with momentum if there are buffers."""
    rule = Rule(lr=0.1, momentum=0.9 if buffers else 0.0)
    values = {name: [getattr(rule, name)] for name in HYPERPARAMETERS}
    getattr(torch.ops.fused_lars, op)(
        list(params), list(grads), list(buffers), [], [], [], [], [len(params)], **{**values, **options}
    )


def like(*tensors):
    return [torch.ones_like(t, memory_format=torch.contiguous_format) for t in tensors]


SHARED = {
    "the same tensor": lambda x: (x, x),
    "a tied weight": lambda x: (x, x.detach()),
    "a slice": lambda x: (x, x[2:4]),
    "two slices": lambda x: (x[:4], x[3:]),
    "crossing slices": lambda x: (x[2], x[:, 3]),
    "one element": lambda x: (x[:2], x[1, 5]),
    "the transpose": lambda x: (x, x.t()),
    "another dtype": lambda x: (x, x.view(torch.float16)[:, 3]),
}
NOT_SHARED = {
    "rows": lambda x: (x[:3], x[3:]),
    "columns": lambda x: (x[:, :2], x[:, 2:]),
    "every other row": lambda x: (x[::2], x[1::2]),
    "every other column": lambda x: (x[:, ::2], x[:, 1::2]),
    "a row and the others' column": lambda x: (x[0], x[1:, 3]),
    "halves of a transpose": lambda x: (x.t()[:3], x.t()[3:]),
    "nothing": lambda x: (x, x[2:2]),
    "another dtype": lambda x: (x[:, :3], x.view(torch.float16)[:, 6:]),
}


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("views", SHARED.values(), ids=SHARED)
def test_memory_that_is_written_twice_is_refused(device, op, views):
    x = torch.ones(6, 6, device=device)
    params = views(x)
    with pytest.raises(ValueError, match=r"^params\[1\] shares memory with params\[0\]; every tensor that "):
        call(params, like(*params), op=op)
    with pytest.raises(ValueError, match=r"^momentum_buffers\[0\] shares memory with params\[0\]"):
        call(params[:1], like(params[0]), [params[0].detach()], op=op)
    with pytest.raises(ValueError, match=r"^grads\[0\] shares memory with params\[0\]"):
        call(params[:1], params[:1], op=op)
    assert bool((x == 1).all())


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("views", NOT_SHARED.values(), ids=NOT_SHARED)
def test_neighbours_in_one_storage_are_stepped(device, op, views):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).to(device)
    params, apart = views(x), [p.clone() for p in views(x)]
    call(params, like(*params), op=op)
    call(apart, like(*params), op=op)
    assert all(same_bits(p, q) for p, q in zip(params, apart))


def test_memory_that_came_from_elsewhere():
    """Two torch storages can share the same NumPy memory."""
    array = np.ones(10, dtype=np.float32)
    one, other, apart = (torch.from_numpy(array[part]) for part in (np.s_[:6], np.s_[5:9], np.s_[9:]))
    call([one, apart], like(one, apart))
    with pytest.raises(ValueError, match=r"^params\[2\] shares memory with params\[0\]"):
        call([one, apart, other], like(one, apart, other))


def test_what_is_only_read_may_be_shared():
    grad, params = torch.ones(4), [torch.ones(4) for _ in range(3)]
    call(params, [grad, grad, grad.detach()])
    assert torch.equal(params[0], params[2])
    with pytest.raises(ValueError, match=r"^params\[1\] shares memory with grads\[0\]"):
        call([params[0], grad], [grad, grad])


def test_shared_memory_is_found_where_there_is_some():
    """Compares with sets of elements, for slices of every kind."""
    random = Random(0)
    outcomes = []
    for _ in range(400):
        shape = [random.randint(1, 5) for _ in range(random.randint(1, 4))]
        base = torch.arange(torch.Size(shape).numel()).double().reshape(shape)
        views = []
        for _ in range(2):
            view = base
            for d, size in enumerate(shape):
                begin = random.randrange(size)
                view = view.transpose(0, d)[begin : random.randint(begin + 1, size) : random.randint(1, 3)]
                view = view.transpose(0, d)
            views.append(view.permute(random.sample(range(view.dim()), view.dim())))
        shared = bool({*views[0].flatten().tolist()} & {*views[1].flatten().tolist()})
        outcomes.append(shared)
        if shared:
            with pytest.raises(ValueError, match="shares memory"):
                call(views, like(*views))
        else:
            call(views, like(*views))
    assert 100 < sum(outcomes) < 300


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_weight_that_two_parameters_share(implementation):
    weight = torch.ones(3, 2)
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(weight), nn.Parameter(weight[1])]
    optimizer = LARS([{"params": p} for p in params], lr=0.1, **{implementation: True})
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"params\[2\] shares memory with params\[1\]"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_parameter_that_is_listed_twice(implementation):
    """torch only warns about it, and would step it twice."""
    param = nn.Parameter(torch.ones(3))
    optimizer = LARS([param, param], lr=0.1, momentum=0.9, **{implementation: True})
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"params\[1\] shares memory with params\[0\]"):
        optimizer.step()
    assert bool((param == 1).all())


# ---------------------------------------------------------------- what autograd would refuse half-way


def test_the_reference_finds_leaves_before_anything_is_written():
    """The reference goes through autograd, which refuses to write a leaf that requires grad."""
    leaves = make_leaves()
    before = snapshot(leaves)
    for name in ("param", "momentum_buffer", "step"):
        tensor = getattr(leaves[3], name).requires_grad_()
        of = {"param": "params", "momentum_buffer": "momentum_buffers", "step": "steps"}[name]
        with pytest.raises(
            ValueError, match=rf"^{of}\[3\] is a (view of a )?leaf that requires grad; allowed: under"
        ):
            call_op(leaves, op="reference_step_")
        tensor.requires_grad_(False)
    whole = torch.ones(20).requires_grad_()
    leaves[3].param = whole[:10]
    with pytest.raises(ValueError, match=r"^params\[3\] is a view of a leaf that requires grad"):
        call_op(leaves, op="reference_step_")
    leaves[3].param = whole.detach()[:10]
    with torch.inference_mode():
        leaves[3].momentum_buffer = torch.zeros(10)
    with pytest.raises(ValueError, match=r"^momentum_buffers\[3\] is an inference tensor"):
        call_op(leaves, op="reference_step_")
    assert_unchanged(leaves[:3], before)


@pytest.mark.parametrize("kind", ["leaf", "inference"])
def test_step_is_below_autograd(device, kind):
    """Leaves that require grad, and inference tensors, are stepped like others, also through a dense copy."""
    with torch.inference_mode(kind == "inference"):
        leaves, expected = make_leaves(device), make_leaves(device)
        leaves[3].param = torch.ones(10, 2, device=device)[:, 0]
        leaves[3].param.copy_(expected[3].param)
    if kind == "leaf":
        for leaf in leaves:
            for tensor in leaf.tensors().values():
                tensor.requires_grad_()
    call_op(leaves)
    call_op(expected)
    for leaf, other in zip(leaves, expected):
        for name, tensor in leaf.tensors().items():
            assert same_bits(tensor, other.tensors()[name]), name


# ---------------------------------------------------------------- odd calls of the ops


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize(
    "name", ["squared_norms", "grad_scale", "found_inf", "trust_ratios", "layer_norms", "workspace"]
)
def test_arguments_that_are_not_strided(op, name):
    param = torch.ones(3)
    sparse = torch.ones(1, dtype=torch.int32 if name == "workspace" else torch.float32).to_sparse()
    with pytest.raises(ValueError, match=f"^{name} has layout Sparse; allowed: Strided"):
        call([param], like(param), op=op, **{name: sparse})
    assert bool((param == 1).all())


def norms_with(workspace, params, grads):
    options = {"weight_decay": [0.0], "maximize": [False], "decayed_norm": [False], "grad_scale": None}
    op = torch.ops.fused_lars.squared_norms.groups
    return op(params, grads, [len(params)], **options, workspace=workspace)


def test_a_workspace_that_kernels_cannot_use(device):
    """Its contents cannot be checked without waiting for the device. What kind of tensor it is can be."""
    param = torch.ones(3, device=device)
    memory = torch.zeros(9, dtype=torch.int32, device=device)
    for workspace, message in [
        (memory[1:], "^workspace starts at an address that is no multiple of 8"),
        (memory[::2], "^workspace is Int.* expected a contiguous vector of Int"),
        (memory.view(3, 3), "^workspace is Int.* expected a contiguous vector of Int"),
        (memory.long(), "^workspace is Long.* expected a contiguous vector of Int"),
    ]:
        with pytest.raises(ValueError, match=message):
            call([param], like(param), workspace=workspace)
        with pytest.raises(ValueError, match=message):
            norms_with(workspace, [param], [param])
    with pytest.raises(ValueError, match=r"^workspace shares memory with params\[0\]"):
        call([memory[2:].view(torch.float32)], like(memory[2:].view(torch.float32)), workspace=memory)
    assert bool((param == 1).all())
    assert not memory.any()


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("value", [-1.0, nan, inf])
def test_an_lr_tensor_that_the_host_sees(op, value):
    leaves = make_leaves()
    leaves[3].rule = dataclasses.replace(leaves[3].rule, lr=value)
    before = snapshot(leaves)
    with pytest.raises(ValueError, match=r"^Invalid learning rate in group 1: "):
        call_op(leaves, tensor_lr=True, op=op)
    assert_unchanged(leaves, before)


@pytest.mark.parametrize("where", ["cpu", "meta", "cuda"])
def test_no_tensors(where):
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    ops = torch.ops.fused_lars
    workspace = torch.zeros(4, dtype=torch.int32, device=where)
    norms = norms_with(workspace, [], [])
    assert norms.shape == (0, 2)
    assert norms.dtype == torch.float64
    assert norms.device == workspace.device
    assert ops.squared_norms([], []).shape == (0, 2)
    call([], [], workspace=workspace)
    call([], [])
    with pytest.raises(ValueError, match=r"^momentum_buffers has 1 tensors; expected 0"):
        call([], [], [workspace])
    with pytest.raises(ValueError, match=r"^grads has 1 tensors; expected 0"):
        ops.squared_norms([], [torch.ones(2, device=where)])
    with pytest.raises(ValueError, match="expected a contiguous vector of Int"):
        norms_with(workspace.float(), [], [])


def test_gradients_are_not_rewritten(device):
    """timm, pytorch_optimizer and torchlars write to p.grad. Here its bits and its version stay the same."""
    for implementation in ("fused", "foreach"):
        leaves = make_leaves(device)
        optimizer = make_optimizer(leaves, **{implementation: True})
        before = [(leaf.grad.clone(), leaf.grad._version) for leaf in leaves]
        optimizer.grad_scale = torch.tensor(4.0, device=device)
        optimizer.step()
        for leaf, (grad, version) in zip(leaves, before):
            assert leaf.param.grad is leaf.grad
            assert same_bits(leaf.grad, grad)
            assert leaf.grad._version == version


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"momentum": 2.0}, "Invalid momentum.*in group 2"),
        ({"lr": torch.tensor(1)}, "lr of group 2 has dtype Long"),
    ],
)
def test_errors_count_groups_as_param_groups_does(spoil, message):
    """The op counts only groups on its device and with its implementation. Errors count all groups."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [params[0]], "foreach": True}, {"params": [params[1]]}, {"params": [params[2]]}]
    optimizer = LARS(groups, lr=0.1)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.param_groups[2].update(spoil)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)


@pytest.mark.parametrize(
    "value", [None, "0.1", [0.1], np.array([0.1]), np.array(0.1), np.array([0.1, 0.2]), 0.1 + 0j], ids=repr
)
@pytest.mark.parametrize("name", ["lr", "momentum", "eps"])
def test_options_that_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; allowed: a number"):
        LARS([nn.Parameter(torch.ones(2))], **{name: value})


@pytest.mark.parametrize("lr", [0.1, 1, torch.tensor(0.1)], ids=repr)
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", x) for x in (None, "0.1", [0.1], np.array([0.1]), np.array(0.1), np.array([0.1, 0.2]), 0.1 + 0j)]
    + [(name, x) for name in ("momentum", "weight_decay") for x in (None, "0.1", np.array([0.1]))],
    ids=repr,
)
def test_options_that_are_no_numbers_later(name, value, implementation, lr):
    """If a schedule writes such a value, the next step raises the constructor's error, with the group."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[0], "foreach": implementation != "foreach"}]
    groups += [{"params": p} for p in params[1:]]
    optimizer = LARS(groups, lr=lr, **{implementation: None if implementation == "fused" else True})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[2][name] = value
    with pytest.raises(
        ValueError, match=rf"^{name} in group 2 is {re.escape(repr(value))}; allowed: a number$"
    ):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)
    assert not optimizer.trust_ratios() or all(q.isnan() for q in optimizer.trust_ratios().values())


@pytest.mark.parametrize("value", [-1.0, nan, inf])
@pytest.mark.parametrize(
    "implementation",
    [dict(fused=True), dict(foreach=True), dict(fused=False), dict(differentiable=True)],
    ids=repr,
)
@pytest.mark.parametrize("others", ["numbers", "tensors"])
def test_an_lr_tensor_that_goes_bad_later(value, implementation, others, device):
    """Every implementation gives the same error, if the host sees the value."""
    if implementation.get("fused") and not has_kernels(device):
        pytest.skip("the build has no CUDA kernels")
    params = [torch.ones(3, device=device) for _ in range(2)]
    lr = torch.tensor(0.5)
    groups = [{"params": params[0]}, {"params": params[1], "lr": lr}]
    optimizer = LARS(groups, lr=torch.tensor(0.5) if others == "tensors" else 0.5, **implementation)
    for p in params:
        p.grad = torch.ones_like(p)
    lr.fill_(value)
    with pytest.raises(
        ValueError, match=f"^Invalid learning rate in group 1: {value:g}; allowed: finite and >= 0"
    ):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)


def test_a_traced_lr_is_not_read():
    """Its value is an input of the program."""
    param = torch.full((3,), 2.0)
    optimizer = LARS([param], lr=1.0, foreach=True, layer_adaptation=False)

    def step(lr, p, grad):
        optimizer.param_groups[0].update(params=[p], lr=lr)
        p.grad = grad
        optimizer.step()
        return p

    program = make_fx(step)(torch.tensor(0.5), param.clone(), torch.ones(3))
    assert program(torch.tensor(0.25), param.clone(), torch.ones(3)).eq(1.75).all()


@pytest.mark.parametrize("value", ["no", None, 0.5, "Decayed"])
def test_layer_adaptation_of_another_kind(value):
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    with pytest.raises(ValueError, match=f'layer_adaptation is {value!r}; allowed: True, False, "decayed"'):
        LARS(params, layer_adaptation=value)
    optimizer = LARS([{"params": p} for p in params])
    for p in params:
        p.grad = torch.ones(2)
    optimizer.param_groups[1]["layer_adaptation"] = value
    with pytest.raises(ValueError, match=f"layer_adaptation in group 1 is {value!r}; allowed: True, False"):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)


def test_options_after_momentum_are_keywords():
    """torch's SGD has dampening next, lightly weight_decay. By position they could be mistaken."""
    params = [nn.Parameter(torch.ones(2))]
    LARS(params, 0.1, 0.9)
    for more in ((0,), (0, 1e-4)):
        with pytest.raises(TypeError, match="positional arguments"):
            LARS(params, 0.1, 0.9, *more)


def test_a_sparse_parameter():
    with pytest.raises(
        ValueError, match=r"parameter 1 has layout torch\.sparse_coo; allowed: torch\.strided"
    ):
        LARS([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).to_sparse())])


def test_a_default_device_that_is_not_the_parameters():
    """Beside a tensor lr, a float lr becomes a tensor on the CPU, not on the default device."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = LARS([{"params": [params[0]], "lr": torch.tensor(0.5)}, {"params": [params[1]]}], lr=0.5)
    for p in params:
        p.grad = torch.ones(2)
    with torch.device("meta"):
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize(
    "name",
    ["nesterov", "maximize", "trust_clip", "decayed_norm", "master_weights", "stochastic_rounding"],
)
def test_a_switch_that_is_none(name):
    for value in ("no", None, 2):
        with pytest.raises(ValueError, match=rf"^{name} is {value!r}; allowed: True, False"):
            LARS([nn.Parameter(torch.ones(2))], **{name: value})
    if name == "stochastic_rounding":
        return  # a load leaves it as it is
    optimizer = LARS([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=rf"^{name} in group 1 is 'no'; allowed: True, False"):
        optimizer.load_state_dict(
            {
                "state": {},
                "param_groups": [
                    optimizer.state_dict()["param_groups"][0],
                    {**optimizer.state_dict()["param_groups"][0], name: "no"},
                ],
            }
        )
