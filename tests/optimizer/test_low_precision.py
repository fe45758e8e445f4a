"""momentum_dtype and stochastic_rounding: state, errors, saved runs, conversions, training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fused_lars
from fused_lars import LARS
from stepping import same_bits

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
HALF = (F16, BF16)
SEED = 5

IMPLEMENTATIONS = ["fused", "foreach"]
ROUNDINGS = {"nearest": {}, "master": {"master_weights": True}, "stochastic": {"stochastic_rounding": True}}

# What each dtype of parameters takes.
MOMENTUM_DTYPES = {
    F64: (None, F32),
    F32: (None, F32, BF16, F16, "int8"),
    F16: (None, F32, F16, "int8"),
    BF16: (None, F32, BF16, "int8"),
}
CASES = [
    (dtype, momentum, rounding)
    for dtype, allowed in MOMENTUM_DTYPES.items()
    for momentum in allowed
    for rounding in (ROUNDINGS if dtype in HALF else ["nearest"])
]

# Several blocks of scales and a part of one, no elements, one element, and two orders in memory.
SHAPES = [(300,), (0,), (), (2, 3, 5, 6), (17, 19)]


def tensors(seed: int, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    result = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in result]


def make_params(device, dtype=F32, shapes=SHAPES):
    return [nn.Parameter(x.to(device, dtype)) for x in tensors(1, shapes)]


def options_of(momentum_dtype, rounding="nearest", **others):
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01, trust_coefficient=0.1, rounding_seed=SEED)
    return {**options, "momentum_dtype": momentum_dtype, **ROUNDINGS[rounding], **others}


def train(optimizer, steps) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, grad in zip(params, tensors(100 + step, [p.shape for p in params])):
            p.grad = grad.to(p.device, p.dtype)
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def params_of(optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def momentum_of(optimizer) -> list[torch.Tensor]:
    """The momentum of all parameters, decoded."""
    states = optimizer.state_dict()["state"].values()
    return [values["momentum_buffer"].clone() for values in states if "momentum_buffer" in values]


def assert_same(optimizer, other) -> None:
    pairs = zip(params_of(optimizer), params_of(other), strict=True)
    for p, q in pairs:
        assert same_bits(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert same_bits(value, other.state[q][name]), name


def unit(values: torch.Tensor, kind) -> torch.Tensor:
    """The distance between neighbours of a dtype around each value."""
    if kind == "int8":  # of values whose memory is contiguous
        units = []
        for block in values.flatten().split(128):
            largest = block.abs().amax(dim=0, keepdim=True).clamp_min(1e-30) if len(block) else block
            units.append((254 * (block.abs() / largest).sqrt() + 1) / 127**2 * largest)
        return torch.cat([values.new_empty(0), *units]).view(values.shape)
    if kind in HALF:
        exponents = torch.frexp(values.cpu()).exponent.clamp_min(-13 if kind == F16 else -125)
        units = torch.ldexp(torch.ones(values.shape), exponents - (11 if kind == F16 else 8))
        return units.to(values.device)
    return torch.zeros_like(values)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "momentum", "rounding"), CASES, ids=str)
def test_state_of_a_parameter(dtype, momentum, rounding, implementation, device):
    params = make_params(device, dtype)
    optimizer = LARS(params, **options_of(momentum, rounding), **{implementation: True})
    train(optimizer, range(3))
    has_master = rounding == "master" and dtype in HALF
    weight = F32 if has_master else dtype
    buffer = {None: weight, "int8": torch.int8}.get(momentum, momentum)
    expected = {"momentum_buffer": buffer}
    if has_master:
        expected["master_param"] = F32
    if momentum == "int8":
        expected["momentum_scale"] = F32
    is_narrower = buffer == torch.int8 or (buffer in HALF and weight not in HALF)
    if is_narrower or (rounding == "stochastic" and weight in HALF):
        expected["rng_state"] = torch.int64
    for position, p in enumerate(params):
        state = optimizer.state[p]
        assert {name: tensor.dtype for name, tensor in state.items()} == expected
        assert all(tensor.device == p.device for tensor in state.values())
        assert state["momentum_buffer"].shape == p.shape
        assert state["momentum_buffer"].stride() == p.stride()
        if "momentum_scale" in state:
            assert state["momentum_scale"].shape == ((p.numel() + 127) // 128,)
        if "rng_state" in state:
            assert state["rng_state"].tolist() == [SEED * 2**32 + position, 3, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [BF16, F16, "int8"], ids=str)
def test_narrower_momentum_is_rounded_to_either_neighbour(momentum, implementation, device):
    """The mean is right: rounding to nearest would have the same error in every copy."""
    shape, copies = (200,), 200
    (grad,) = tensors(3, [shape])
    params = [nn.Parameter(torch.zeros(shape, device=device)) for _ in range(copies)]
    optimizer = LARS(params, lr=1.0, momentum=0.9, momentum_dtype=momentum, **{implementation: True})
    for p in params:
        p.grad = grad.to(device)
    optimizer.step()
    kept = torch.stack(momentum_of(optimizer)).float().cpu()
    distance = unit(grad, momentum)
    assert ((kept - grad).abs() <= distance * 1.0001).all()
    # The deviation of the mean is at most half a unit over sqrt(200), so this is 6 of it.
    assert ((kept.mean(0) - grad).abs() <= distance * 0.21 + 1e-6).all()
    between = (kept[0] != grad) & ((kept[0] - grad).abs() > 0.1 * distance)
    assert (kept.std(0)[between] > 0).all()
    assert between.sum() > 100


def test_parameters_of_several_groups(device):
    """Groups with int8, fp32 and bf16 momentum in one step have the bits that each has alone."""
    params, alone = make_params(device), make_params(device)
    groups = [
        {"params": params[:3], "momentum_dtype": "int8"},
        {"params": params[3:4]},
        {"params": params[4:], "momentum_dtype": BF16},
    ]
    optimizer = LARS(groups, **options_of(None))
    separate = [
        LARS(alone[:3], **options_of("int8")),
        LARS(alone[3:4], **options_of(None)),
        # Parameters without a gradient have a position too.
        LARS([*make_params(device)[:4], alone[4]], **options_of(BF16)),
    ]
    for step in range(5):
        for p, q, grad in zip(params, alone, tensors(100 + step)):
            p.grad = q.grad = grad.to(device)
        for o in (optimizer, *separate):
            o.step()
    assert all(map(same_bits, params, alone))
    assert [optimizer.state[p]["momentum_buffer"].dtype for p in params[2:]] == [torch.int8, F32, BF16]
    assert optimizer.state[params[4]]["rng_state"].tolist() == [SEED * 2**32 + 4, 5, 0]


def test_a_parameter_without_a_gradient_gets_no_state(device):
    params = make_params(device, BF16)
    optimizer = LARS(params, **options_of("int8", "stochastic"))
    train(optimizer, range(1))
    before = copy.deepcopy(optimizer.state[params[0]])
    value = params[0].detach().clone()
    for p in params[:2]:
        p.grad = None
    optimizer.step()
    assert same_bits(params[0], value)
    assert all(same_bits(optimizer.state[params[0]][name], before[name]) for name in before)
    assert [optimizer.state[p]["rng_state"][1].item() for p in params] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_momentum_that_is_switched_on_later(implementation, device):
    """Without momentum, 16-bit weights alone need random bits. They go on when momentum comes."""
    for dtype, expected in ((F32, set()), (BF16, {"rng_state"})):
        params = make_params(device, dtype)
        optimizer = LARS(params, **options_of("int8", "stochastic", momentum=0.0), **{implementation: True})
        train(optimizer, range(2))
        assert {*optimizer.state[params[0]]} == expected
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, range(2, 4))
        state = optimizer.state[params[0]]
        assert {*state} == {"momentum_buffer", "momentum_scale", "rng_state"}
        assert state["rng_state"][1].item() == (4 if expected else 2)
        optimizer.param_groups[0]["momentum"] = 0.0
        train(optimizer, range(4, 6))
        assert state["rng_state"][1].item() == (6 if expected else 2)


def test_a_parameter_that_is_swapped_starts_anew(device):
    params = make_params(device)
    optimizer = LARS(params, **options_of("int8"))
    train(optimizer, range(4))
    new = nn.Parameter(torch.ones(150, device=device))
    optimizer.param_groups[0]["params"][3] = new
    train(optimizer, range(4, 6))
    assert optimizer.state[new]["rng_state"].tolist() == [SEED * 2**32 + 3, 2, 0]
    assert optimizer.state[new]["momentum_scale"].shape == (2,)


def test_a_parameter_with_gaps_in_memory(device):
    """Codes are dense, whatever the parameter is."""
    runs = []
    for has_gaps in (False, True):
        (values,) = tensors(1, [(40, 12)])
        values = values.to(device)
        param = nn.Parameter(torch.empty(40, 24, device=device)[:, ::2].copy_(values) if has_gaps else values)
        optimizer = LARS([param], **options_of("int8"))
        train(optimizer, range(3))
        resumed = LARS([param], **options_of("int8"))
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        train(resumed, range(3, 6))
        runs.append((param, *momentum_of(resumed)))
    assert all(map(same_bits, *runs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_parameter_that_changes_its_memory_format(implementation, device):
    """The codes stay in their own order."""
    shape = (4, 6, 5, 5)
    (values,) = tensors(1, [shape])
    param = nn.Parameter(values.contiguous().to(device))
    optimizer = LARS([param], **options_of("int8", lr=1.0), **{implementation: True})
    train(optimizer, range(4))
    for order in (torch.channels_last, torch.contiguous_format):
        (before,) = momentum_of(optimizer)
        param.data = param.data.contiguous(memory_format=order)
        param.grad = torch.zeros_like(param)
        optimizer.param_groups[0].update(lr=0.0, momentum_dtype="int8")
        optimizer.step()
        (after,) = momentum_of(optimizer)
        error = (after - 0.9 * before).abs().contiguous()
        assert (error <= 1.0001 * unit(0.9 * before.contiguous(), "int8")).all()


# ---------------------------------------------------------------- errors

BAD_OPTIONS = [
    (F32, dict(momentum_dtype=torch.int8), r"momentum_dtype(?: in group 0)? is torch.int8; allowed: None, "),
    (F32, dict(momentum_dtype="bf16"), "momentum_dtype(?: in group 0)? is 'bf16'; allowed: None, torch.f"),
    (F32, dict(momentum_dtype=F64), "momentum_dtype(?: in group 0)? is torch.float64; allowed: None, "),
    (F64, dict(momentum_dtype=BF16), "momentum_dtype is torch.bfloat16 for .* of torch.float64; allowed th"),
    (F64, dict(momentum_dtype="int8"), "momentum_dtype is 'int8' for .* of torch.float64; allowed there: N"),
    (BF16, dict(momentum_dtype=F16), "momentum_dtype is torch.float16 for .* of torch.bfloat16; allowed t"),
    (F16, dict(momentum_dtype=BF16), "momentum_dtype is torch.bfloat16 for .* of torch.float16; allowed t"),
    (BF16, dict(momentum_dtype=F16, master_weights=True), "torch.float16 for .* of torch.bfloat16; allowed"),
    (BF16, dict(stochastic_rounding=True, master_weights=True), "stochastic_rounding.*allowed without mast"),
    (BF16, dict(stochastic_rounding="yes"), "stochastic_rounding(?: in group 0)? is 'yes'; allowed: True, F"),
]  # fmt: skip
SEEDS = [-1, 2**31, True, 1.5, "0", None]
BAD_OPTIONS += [
    (
        BF16,
        dict(stochastic_rounding=True, rounding_seed=seed),
        "rounding_seed.* is .*; allowed: an int from 0",
    )
    for seed in SEEDS
]


def name_of(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize(("dtype", "options", "message"), BAD_OPTIONS, ids=name_of)
def test_bad_options_are_refused(dtype, options, message):
    params = make_params("cpu", dtype)
    with pytest.raises(ValueError, match=message):
        LARS(params, lr=0.1, momentum=0.9, **options)
    optimizer = LARS(params[:1], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps_before", [0, 4])
@pytest.mark.parametrize(("dtype", "options", "message"), BAD_OPTIONS, ids=name_of)
def test_bad_options_that_come_later_change_nothing(dtype, options, message, steps_before, implementation):
    params = make_params("cpu", dtype)
    optimizer = LARS(params, lr=0.1, momentum=0.9, **{implementation: True})
    train(optimizer, range(steps_before))
    weights, momentum = [p.detach().clone() for p in params], momentum_of(optimizer)
    good = {name: optimizer.param_groups[0][name] for name in options}
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        train(optimizer, range(1))
    assert all(map(same_bits, params, weights))
    for after, before in zip(momentum_of(optimizer), momentum):
        assert torch.equal(after.double(), before.double())  # master_weights may have made it wider
    optimizer.param_groups[0].update(good)
    train(optimizer, range(1))


def test_a_refused_dtype_changes_no_parameter_of_its_group():
    """The first parameter could have fp16 momentum. The second cannot."""
    params = [*make_params("cpu", F32, [(200,)]), *make_params("cpu", BF16, [(9,)])]
    optimizer = LARS([("a", params[0]), ("b", params[1])], lr=0.1, momentum=0.9, momentum_dtype="int8")
    train(optimizer, range(2))
    before = momentum_of(optimizer)
    optimizer.param_groups[0]["momentum_dtype"] = F16
    with pytest.raises(
        ValueError, match=r"for parameter 'b', param_groups\[0\]\['params'\]\[1\] of torch.bf"
    ):
        train(optimizer, range(1))
    assert all(map(same_bits, momentum_of(optimizer), before))


@pytest.mark.parametrize(
    "options", [dict(stochastic_rounding=True), dict(momentum_dtype=BF16), dict(momentum_dtype="int8")],
    ids=str,
)  # fmt: skip
def test_differentiable_steps_do_not_round(options):
    message = "differentiable(?: in group 0)? is True, and autograd cannot follow a rounding; allowed"
    params = make_params("cpu", BF16)
    with pytest.raises(ValueError, match=message):
        LARS(params, differentiable=True, **options)
    optimizer = LARS([nn.Parameter(torch.ones(2).bfloat16())], momentum=0.9, differentiable=True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params, **options})
    optimizer.param_groups[0].update(options)
    (weight,) = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [weight.clone()]
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(weight)
    if options.get("momentum_dtype") != BF16:  # that is the parameter's own, so nothing would be rounded anew
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    LARS(params, differentiable=True, momentum_dtype=F32)


def test_bad_state_is_refused(device):
    params = make_params(device)
    optimizer = LARS(params, **options_of("int8"))
    train(optimizer, range(2))
    before = copy.deepcopy(optimizer)
    for name, value, message in (
        ("rng_state", torch.zeros(3), "rng_state of parameter 0 .* has dtype torch.float32; expected"),
        ("rng_state", torch.zeros(2, dtype=torch.int64), r"rng_state of .* \(2,\); expected \(3,\)"),
        ("rng_state", 3, "rng_state of parameter 0 in the state_dict is 3; expected a Tensor"),
        ("momentum_buffer", torch.zeros(300, dtype=torch.int8), "has dtype torch.int8; expected a fl"),
        ("momentum_scale", torch.ones(3), r"parameter 0 .* has the state \['momentum_scale'\]"),
    ):  # fmt: skip
        bad = optimizer.state_dict()
        bad["state"][0] = {**bad["state"][0], name: value}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert_same(optimizer, before)


def test_masters_of_a_saved_run_exclude_stochastic_rounding():
    """master_weights comes from the saved run, and stochastic_rounding stays that of the optimizer."""
    params = make_params("cpu", BF16)
    saved = LARS(params, momentum=0.9, master_weights=True)
    train(saved, range(1))
    optimizer = LARS(params, momentum=0.9, stochastic_rounding=True)
    with pytest.raises(
        ValueError, match=r"stochastic_rounding value in group 0.*without master_weights only"
    ):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state


# ---------------------------------------------------------------- saved runs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "momentum", "rounding"), CASES, ids=str)
def test_resumed_run_is_the_uninterrupted_one(dtype, momentum, rounding, implementation, device):
    """With the same random bits. So are copies of the optimizer."""
    options = {**options_of(momentum, rounding), implementation: True}
    optimizer = LARS(make_params(device, dtype), **options)
    train(optimizer, range(3))
    saved = through_a_file(
        {"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params_of(optimizer)]}
    )
    for values in saved["optimizer"]["state"].values():
        assert "momentum_scale" not in values
        assert values["momentum_buffer"].is_floating_point()
    for group in saved["optimizer"]["param_groups"]:
        # Types that torch.distributed.checkpoint takes. It takes no torch.dtype.
        assert {*map(type, group.values())} <= {float, int, bool, str, list, type(None)}
    # The resumed run is made with another seed, and resumes its own random numbers.
    resumed = LARS(map(nn.Parameter, saved["params"]), **{**options, "rounding_seed": 77, "lr": 3.0})
    resumed.load_state_dict(saved["optimizer"])
    runs = [resumed, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for run in runs:
        assert_same(optimizer, run)
    for run in (optimizer, *runs):
        train(run, range(3, 5))
    for run in runs:
        assert_same(optimizer, run)


@pytest.mark.parametrize("momentum", [F32, BF16, F16, "int8"], ids=str)
@pytest.mark.parametrize("target", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (2, 3, 4, 5)], ids=str)
def test_state_of_another_memory_format(shape, target, momentum, device):
    """Values are converted, not the bytes. Only the blocks of scales are others, if there are several."""
    formats = {torch.channels_last, torch.contiguous_format}
    (source,) = formats - {target}
    (values,) = tensors(1, [shape])
    params = [nn.Parameter(values.contiguous(memory_format=f).to(device)) for f in (source, target)]
    optimizer, other = (LARS([p], **options_of(momentum)) for p in params)
    train(optimizer, range(3))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    if momentum == "int8":
        assert other.state[params[1]]["momentum_buffer"].stride() == params[1].stride()
    (before,), (after,) = momentum_of(optimizer), momentum_of(other)
    if momentum == "int8" and before.numel() > 128:
        # In the order of the new codes.
        before, after = (
            m.permute(0, 2, 3, 1) if target == torch.channels_last else m for m in (before, after)
        )
        error, step = (after - before).abs().contiguous(), unit(before.contiguous(), "int8")
        assert (error <= 0.5001 * step).all()
    else:
        assert torch.equal(before, after)
    train(other, range(3, 5))


def test_a_run_from_before_these_options_goes_on(device):
    """By state_dict and by pickle."""
    names = ("momentum_dtype", "stochastic_rounding", "rounding_seed")
    params = make_params(device, BF16)
    optimizer = LARS(params, lr=0.1, momentum=0.9)
    train(optimizer, range(2))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in names:
            del group[name]
    newer = LARS(make_params(device, BF16), lr=0.1, rounding_seed=9, momentum_dtype="int8")
    newer.load_state_dict(state)
    group = newer.param_groups[0]
    # The dtype is this optimizer's, and a seed of an old run is the default.
    assert [group[name] for name in names] == ["int8", False, 0]
    train(newer, range(2, 4))
    assert newer.state[params_of(newer)[3]]["rng_state"].tolist() == [3, 2, 0]

    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in names:
            options.pop(name, None)
    old = LARS.__new__(LARS)
    old.__setstate__(state)
    train(old, range(2, 4))
    assert [old.param_groups[0][name] for name in names] == [None, False, 0]
    old.add_param_group({"params": [nn.Parameter(torch.ones(3, device=device))]})


def test_momentum_of_sgd_becomes_int8(device):
    params = make_params(device)
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    train(sgd, range(3))
    optimizer = LARS(params, **options_of("int8", classic_momentum=False))
    optimizer.load_state_dict(fused_lars.convert_state_dict(sgd.state_dict(), optimizer, "sgd"))
    for p, momentum in zip(params, momentum_of(optimizer)):
        assert optimizer.state[p]["momentum_buffer"].dtype == torch.int8
        order = (0, 2, 3, 1) if p.dim() == 4 else tuple(range(p.dim()))
        theirs = sgd.state[p]["momentum_buffer"].permute(order)
        assert theirs.is_contiguous()
        assert ((momentum.permute(order) - theirs).abs() <= 0.5001 * unit(theirs, "int8")).all()
    train(optimizer, range(3, 5))


# ---------------------------------------------------------------- conversions

OF_FP32 = [F32, BF16, F16, "int8"]


def assert_converted(before, after, target, units=0.5001, roundoff=0.0, growth=1.0) -> None:
    """`growth`: by how much a number was larger when it was rounded."""
    for old, new in zip(before, after, strict=True):
        old, new = (x.float().contiguous(memory_format=torch.contiguous_format) for x in (old, new))
        distance = unit(old * growth, target)
        assert ((new - old).abs() <= units * distance + roundoff * old.abs()).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("target", OF_FP32, ids=str)
@pytest.mark.parametrize("source", OF_FP32, ids=str)
def test_a_loaded_buffer_is_converted(source, target, implementation, device):
    shapes = [(300,), (0,), (), (17, 19)]
    saved = LARS(make_params(device, shapes=shapes), **options_of(source))
    train(saved, range(3))
    optimizer = LARS(
        make_params(device, shapes=shapes), **{**options_of(target), "lr": 7.0}, **{implementation: True}
    )
    optimizer.load_state_dict(through_a_file(saved.state_dict()))
    assert optimizer.param_groups[0]["momentum_dtype"] == target
    assert_converted(momentum_of(saved), momentum_of(optimizer), target)
    for p in params_of(optimizer):
        state = optimizer.state[p]
        assert state["momentum_buffer"].dtype == (torch.int8 if target == "int8" else target)
        assert ("momentum_scale" in state) == (target == "int8")
    if target == F32:  # nothing is lost, so it goes back to the same codes
        saved_again = LARS(make_params(device, shapes=shapes), **options_of(source))
        saved_again.load_state_dict(optimizer.state_dict())
        for p, q in zip(params_of(saved), params_of(saved_again)):
            for name, value in saved.state[p].items():
                if name in saved_again.state[q]:
                    assert same_bits(value, saved_again.state[q][name]), name
    train(optimizer, range(3, 5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("target", [None, *OF_FP32], ids=str)
@pytest.mark.parametrize("source", [None, *OF_FP32], ids=str)
def test_a_dtype_that_changes_between_steps(source, target, implementation, device):
    """A step that could have been repeated notices."""
    shapes = [(300,), (0,), (), (17, 19)]
    optimizer = LARS(make_params(device, shapes=shapes), **options_of(source), **{implementation: True})
    train(optimizer, range(4))
    assert (optimizer._stepper.prepared is not None) == (implementation == "fused")
    before = momentum_of(optimizer)
    optimizer.param_groups[0].update(momentum_dtype=target, lr=0.0)
    train(optimizer, range(1))  # lr 0: momentum decays, and the weights keep going
    expected = [0.9 * m.float() for m in before]
    # Half a unit for the conversion, which came before the decay and may have rounded up. One for the step.
    growth = (1 + 2.0**-7) / 0.9
    after = momentum_of(optimizer)
    assert_converted(expected, after, target, units=1.5001, roundoff=2.0**-22, growth=growth)
    for p in params_of(optimizer):
        state = optimizer.state[p]
        assert state["momentum_buffer"].dtype == {None: F32, "int8": torch.int8}.get(target, target)
        assert ("momentum_scale" in state) == (target == "int8")
    train(optimizer, range(4, 7))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_dtype_of_16_bit_parameters_changes(dtype, implementation, device):
    (param,) = make_params(device, dtype, [(300,)])
    optimizer = LARS([param], **options_of(None, lr=0.0), **{implementation: True})
    seen = []
    for momentum in (None, "int8", F32, dtype, F32, None, "int8", None):
        optimizer.param_groups[0]["momentum_dtype"] = momentum
        train(optimizer, range(2))
        seen.append(optimizer.state[param]["momentum_buffer"].dtype)
    # An fp32 buffer stays as it is if no dtype is asked for.
    assert seen == [dtype, torch.int8, F32, dtype, F32, F32, torch.int8, dtype]
    assert optimizer.state[param]["rng_state"][1].item() == 4  # of the two times with int8


def test_stochastic_rounding_that_is_switched_on_and_off(device):
    params, plain = make_params(device, BF16), make_params(device, BF16)
    optimizer, other = (LARS(p, **options_of(None)) for p in (params, plain))
    for o in (optimizer, other):
        train(o, range(4))
    optimizer.param_groups[0]["stochastic_rounding"] = True
    for o in (optimizer, other):
        train(o, range(4, 7))
    assert not same_bits(params[0], plain[0])
    assert optimizer.state[params[0]]["rng_state"][1].item() == 3
    optimizer.param_groups[0]["stochastic_rounding"] = False
    train(optimizer, range(7, 9))
    assert optimizer.state[params[0]]["rng_state"][1].item() == 3


# ---------------------------------------------------------------- random bits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "momentum"), [(F32, BF16), (F32, "int8"), (BF16, None)], ids=str)
def test_random_bits(dtype, momentum, implementation, device):
    """Copies stay equal. A parameter at another place and another seed have other bits."""
    rounding = "stochastic" if dtype == BF16 else "nearest"

    def run(**options):
        (values,) = tensors(1, [(300,)])
        params = [nn.Parameter(values.to(device, dtype, copy=True)) for _ in range(2)]
        optimizer = LARS(params, **{**options_of(momentum, rounding), **options}, **{implementation: True})
        for step in range(4):
            for p in params:
                p.grad = tensors(step, [(300,)])[0].to(device, dtype)
            optimizer.step()
        return optimizer

    first, copy_of_it, other = run(), run(), run(rounding_seed=SEED + 1)
    assert_same(first, copy_of_it)
    buffers = [o.state[p]["momentum_buffer"] for o in (first, other) for p in params_of(o)]
    for i, buffer in enumerate(buffers):
        for another in buffers[:i]:
            assert (buffer != another).float().mean() > 0.1


@pytest.mark.parametrize("implementation", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize(("dtype", "momentum"), [(F32, BF16), (F32, "int8"), (BF16, None)], ids=str)
def test_a_step_that_a_scaler_skips_changes_no_state(dtype, momentum, implementation, device):
    if dtype == BF16 and device != "cpu":
        pytest.skip("torch's scaler takes no bf16 gradients on a GPU")
    options = {**options_of(momentum, "stochastic"), **implementation}
    optimizer, expected = (LARS(make_params(device, dtype), **options) for _ in range(2))
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    scaler.scale(torch.zeros((), device=device))
    for step in range(6):
        overflows = step in (0, 3)
        for p, q, grad in zip(params_of(optimizer), params_of(expected), tensors(step)):
            q.grad = grad.to(device, dtype)
            p.grad = q.grad * scaler.get_scale()
        if overflows:
            params_of(optimizer)[0].grad[7] = torch.inf
        before = copy.deepcopy(optimizer.state[params_of(optimizer)[0]])
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            after = optimizer.state[params_of(optimizer)[0]]
            assert all(same_bits(after[name], before[name]) for name in before)
            continue
        expected.step()
    assert_same(optimizer, expected)
    assert optimizer.state[params_of(optimizer)[0]]["rng_state"][1].item() == 4


# ---------------------------------------------------------------- masters


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "momentum"), [(BF16, BF16), (BF16, "int8"), (F16, F16), (F16, "int8")], ids=str
)
def test_masters_are_fp32_weights_with_the_same_momentum(dtype, momentum, implementation, device):
    """Also when their parameters are written."""
    params = make_params(device, dtype)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    optimizer = LARS(params, **options_of(momentum, "master"), **{implementation: True})
    expected = LARS(twins, **options_of(momentum), **{implementation: True})
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                params[0][5:50] = 0.25
                twins[0][5:50] = 0.25
        for p, q, grad in zip(params, twins, tensors(step)):
            p.grad = grad.to(device, dtype)
            q.grad = p.grad.float()
        optimizer.step()
        expected.step()
        for p, q in zip(params, twins):
            state = optimizer.state[p]
            assert same_bits(state["master_param"], q)
            assert same_bits(p, q.to(dtype))
            for name, value in expected.state[q].items():
                assert same_bits(state[name], value), name


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_compiled_step_gives_the_eager_bits(implementation, device):
    torch._dynamo.reset()
    options = {**options_of("int8", "stochastic"), implementation: True}
    optimizer, other = (LARS(make_params(device, F16, [(150,)]), **options) for _ in range(2))
    compiled = torch.compile(other.step, backend="aot_eager")
    for step in range(3):
        for o, run in ((optimizer, optimizer.step), (other, compiled)):
            (p,) = params_of(o)
            p.grad = tensors(step, [p.shape])[0].to(device, p.dtype)
            run()
    assert_same(optimizer, other)


# ---------------------------------------------------------------- training


def follow(weight, optimizer, curvature, target, steps) -> torch.Tensor:
    for _ in range(steps):
        weight.grad = curvature * (weight.detach() - target)
        optimizer.step()
    return weight.detach()


def test_momentum_in_few_bits_trains_as_in_fp32():
    """Slow descent of a quadratic. Rounding to nearest loses small gradients beside large momentum."""
    n, lr, momentum, steps = 256, 1e-5, 0.99, 1500
    generator = torch.Generator().manual_seed(0)
    curvature, target = torch.logspace(-1, 0, n), torch.randn(n, generator=generator)
    results = {}
    for dtype in (None, BF16, "int8"):
        weight = nn.Parameter(torch.zeros(n))
        options = dict(lr=lr, momentum=momentum, layer_adaptation=False, classic_momentum=False)
        optimizer = LARS([weight], **options, momentum_dtype=dtype)
        results[dtype] = follow(weight, optimizer, curvature, target, steps)
    expected = results.pop(None)
    assert (expected - target).norm() < 0.7 * target.norm()

    weight, buffer = torch.zeros(n), torch.zeros(n, dtype=BF16)
    for _ in range(steps):
        buffer = (momentum * buffer.float() + curvature * (weight - target)).bfloat16()
        weight -= lr * buffer.float()

    def error(result) -> float:
        return ((result - expected).norm() / expected.norm()).item()

    assert error(weight) > 0.05
    assert all(error(result) < 0.01 for result in results.values()), {k: error(v) for k, v in results.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "momentum"), [(F32, BF16), (F32, "int8"), (BF16, None)], ids=str)
def test_momentum_decays_where_it_would_stand_still(dtype, momentum, implementation, device):
    """It loses 0.1 % a step. Half a unit of bf16 is at least 0.2 %, so the nearest number is the same."""
    n, steps, decay = 1000, 500, 0.999
    values = torch.linspace(1, 1.9, n).to(BF16)
    assert torch.equal((decay * values.float()).to(BF16), values)
    weight = nn.Parameter(torch.zeros(n, device=device, dtype=dtype))
    optimizer = LARS(
        [weight], lr=1.0, momentum=decay, layer_adaptation=False, momentum_dtype=momentum,
        stochastic_rounding=True, **{implementation: True},
    )  # fmt: skip
    weight.grad = values.to(device, dtype)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(steps):
        optimizer.step()
    (buffer,) = momentum_of(optimizer)
    # The mean of n elements, each of which has drifted by at most sqrt(500) half units of 2^-7.
    expected = decay**steps * values.float().mean().item()
    assert buffer.float().mean().item() == pytest.approx(expected, abs=4 * 500**0.5 * 2**-8 / n**0.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_updates_below_half_a_unit_are_not_lost(dtype, implementation, device):
    n, steps = 1000, 200
    last_place = 2.0**-7 if dtype == BF16 else 2.0**-10  # of numbers from 1 to 2
    update = last_place / 16
    moved = {}
    for rounding in (False, True):
        weight = nn.Parameter(torch.full((n,), 1.5, device=device, dtype=dtype))
        optimizer = LARS(
            [weight], lr=1.0, layer_adaptation=False, stochastic_rounding=rounding, **{implementation: True}
        )
        for _ in range(steps):
            weight.grad = torch.full_like(weight, update)
            optimizer.step()
        moved[rounding] = 1.5 - weight.detach().float().mean().item()
    assert moved[False] == 0.0
    # Each update is rounded to 0 or to a whole unit.
    deviation = last_place * (steps * n / 16) ** 0.5 / n
    assert moved[True] == pytest.approx(steps * update, abs=5 * deviation)


def test_small_momentum_beside_large_is_not_lost(device):
    """One element of a block sets the scale. The mean of those far below a code is right."""
    n = 128
    params = [nn.Parameter(torch.zeros(n, device=device)) for _ in range(300)]
    grad = torch.full((n,), 0.1 / 127**2, device=device)
    grad[0] = 1.0
    optimizer = LARS(params, lr=1.0, momentum=0.9, layer_adaptation=False, momentum_dtype="int8")
    for p in params:
        p.grad = grad
    optimizer.step()
    small = torch.stack(momentum_of(optimizer))[:, 1:] * 127**2
    assert {*small.round(decimals=3).unique().tolist()} == {0.0, 1.0}
    assert small.mean().item() == pytest.approx(0.1, abs=5 * 0.3 / small.numel() ** 0.5)
