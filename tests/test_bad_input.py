"""What does not fit is named, with what it was and what is allowed; nothing has changed by then."""

import pytest
import torch
from torch import nn

from fused_lars import LARS
from layouts import Layout, Layouts
from reference import Rule
from stepping import Dtypes, call_op, make_leaf, make_optimizer, same_bits, snapshot

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
    """A scheduler's mistake is found by step(), which names the group."""
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


def test_fused_on_a_device_without_kernels():
    with pytest.raises(
        RuntimeError, match="parameter 0 is on meta, for which this build has no fused kernel"
    ):
        LARS([nn.Parameter(torch.ones(2, device="meta"))], fused=True)


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
@pytest.mark.parametrize("kind", ["sparse", "device"])
def test_the_optimizer_changes_nothing_before_a_bad_gradient_is_found(implementation, kind):
    """Not even the state of a first step."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 4)]
    optimizer = LARS(params, lr=0.1, momentum=0.9, **{implementation: True})
    params[0].grad = torch.ones(3)
    if kind == "sparse":
        params[1].grad = torch.ones(4).to_sparse()
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
    # As if the failed step had not been.
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


def test_gradients_are_not_rewritten(device):
    """timm, pytorch_optimizer and torchlars write to p.grad; here its bits and its version stay."""
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
    """Not as the op does, for which only the groups on its device with its implementation are there."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [{"params": [params[0]], "foreach": True}, {"params": [params[1]]}, {"params": [params[2]]}]
    optimizer = LARS(groups, lr=0.1)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.param_groups[2].update(spoil)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(bool((p == 1).all()) for p in params)


@pytest.mark.parametrize("value", [None, "0.1", [0.1]])
@pytest.mark.parametrize("name", ["lr", "momentum", "eps"])
def test_options_that_are_no_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*; allowed: a number"):
        LARS([nn.Parameter(torch.ones(2))], **{name: value})


def test_a_sparse_parameter():
    with pytest.raises(
        ValueError, match=r"parameter 1 has layout torch\.sparse_coo; allowed: torch\.strided"
    ):
        LARS([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).to_sparse())])


def test_a_default_device_that_is_not_the_parameters():
    """An lr that is a float beside one that is a tensor becomes a tensor on the CPU, not on that device."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = LARS([{"params": [params[0]], "lr": torch.tensor(0.5)}, {"params": [params[1]]}], lr=0.5)
    for p in params:
        p.grad = torch.ones(2)
    with torch.device("meta"):
        optimizer.step()
    assert torch.equal(*params)
