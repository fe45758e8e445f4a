"""Checkpoints load bit for bit. How a process computes is not part of them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fused_lars import LARS
from stepping import same_bits

BF16 = torch.bfloat16
OPTIONS = {
    "classic": dict(lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "dampening": dict(lr=0.5, momentum=0.9, classic_momentum=False, dampening=0.3),
    "master": dict(lr=0.5, momentum=0.9, weight_decay=1e-2, master_weights=True),
    "no momentum": dict(lr=0.5, weight_decay=1e-2),
    "tensor lr": dict(lr=torch.tensor(0.5), momentum=0.9),
}


def make_params(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in (33, 0, 130)]


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def through_a_file(state, **options):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, **options)


def assert_same_state(optimizer, params, other, other_params):
    for p, q in zip(params, other_params):
        assert same_bits(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert same_bits(value, other.state[q][name]), name
            assert other.state[q][name].device == q.device


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_resumed_run_is_the_uninterrupted_one(options, dtype, implementation, device):
    params = make_params(device, dtype)
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    optimizer = LARS(params, **options, **{implementation: True})
    train(optimizer, params, range(3))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]})

    resumed_params = [nn.Parameter(p) for p in saved["params"]]
    resumed = LARS(resumed_params, lr=0.1, **{implementation: True})
    resumed.load_state_dict(saved["optimizer"])
    assert_same_state(optimizer, params, resumed, resumed_params)
    for run, of in ((optimizer, params), (resumed, resumed_params)):
        train(run, of, range(3, 6))
    assert_same_state(optimizer, params, resumed, resumed_params)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_fp32_state_of_half_parameters_stays_fp32(dtype, device):
    """The base class casts floating-point state to the parameter's dtype. A master would lose 16 bits."""
    params = make_params(device, dtype)
    optimizer = LARS(params, lr=0.5, momentum=0.9, master_weights=True)
    train(optimizer, params, range(3))
    state = optimizer.state[params[0]]
    # There are bits that the cast would lose.
    assert not torch.equal(state["master_param"], state["master_param"].to(dtype).float())
    assert not torch.equal(state["momentum_buffer"], state["momentum_buffer"].to(dtype).float())
    loaded = LARS(params, lr=0.5, momentum=0.9, master_weights=True)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in params:
        for name in ("master_param", "momentum_buffer"):
            assert loaded.state[p][name].dtype == torch.float32
            assert same_bits(loaded.state[p][name], optimizer.state[p][name])


def test_map_location(device):
    """A checkpoint loaded on the CPU resumes on the parameters' device, with master and buffer."""
    params = make_params(device, BF16)
    options = dict(lr=torch.tensor(0.5, device=device), momentum=0.9, master_weights=True)
    optimizer = LARS(params, **options)
    train(optimizer, params, range(2))
    saved = through_a_file(optimizer.state_dict(), map_location="cpu")
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = LARS(other_params, **options)
    other.load_state_dict(saved)
    assert_same_state(optimizer, params, other, other_params)
    for run, of in ((optimizer, params), (other, other_params)):
        train(run, of, range(2, 4))
    assert_same_state(optimizer, params, other, other_params)


def test_saved_flags_do_not_choose_the_implementation(device):
    params = make_params(device)
    saved = LARS(params, lr=0.5, momentum=0.9, foreach=True, capturable=False).state_dict()
    loaded = LARS(params, lr=0.1, momentum=0.0, fused=True, capturable=True)
    loaded.load_state_dict(saved)
    group = loaded.param_groups[0]
    assert (group["foreach"], group["fused"], group["capturable"], group["differentiable"]) == (
        None,
        True,
        True,
        False,
    )
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)  # these come from the saved run
    train(loaded, params, range(1))


def test_checkpoint_of_an_older_version_lacks_options(device):
    params = make_params(device)
    optimizer = LARS(params, lr=0.5, momentum=0.9)
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    for name in ("classic_momentum", "master_weights", "trust_clip", "capturable", "fused"):
        del saved["param_groups"][0][name]
    other = LARS(params, lr=0.5, momentum=0.9, fused=True)
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["classic_momentum"] is True
    assert group["master_weights"] is False
    assert group["fused"] is True
    train(other, params, range(1, 2))


def test_state_dict_format(device):
    """{'state': {id: tensors}, 'param_groups': [...]} with ids by position, tensors, numbers and flags."""
    params = make_params(device, BF16)
    optimizer = LARS([{"params": params[:1]}, {"params": params[1:], "lr": 0.1}], lr=0.5, momentum=0.9)
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2]]
    assert sorted(saved["state"]) == [0, 1, 2]
    assert all(list(state) == ["momentum_buffer"] for state in saved["state"].values())
    torch.load(io.BytesIO(_bytes(saved)), weights_only=True)


def _bytes(obj) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def test_state_in_another_layout_is_stepped_right(device, generator):
    """A contiguous saved buffer goes on under a parameter that is now channels_last."""
    x = torch.randn(2, 3, 4, 5, generator=generator).to(device)
    params = [nn.Parameter(x.clone())], [nn.Parameter(x.clone(memory_format=torch.channels_last))]
    runs = [LARS(p, lr=0.5, momentum=0.9, layer_adaptation=False) for p in params]
    train(runs[0], params[0], range(2))
    with torch.no_grad():
        params[1][0].copy_(params[0][0])
    runs[1].load_state_dict(copy.deepcopy(runs[0].state_dict()))
    for run, p in zip(runs, params):
        train(run, p, range(2, 4))
    assert same_bits(params[0][0], params[1][0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d["param_groups"][0].pop("trust_coefficient"), "not a state_dict of LARS"),
        (lambda d: d["param_groups"][0].update(momentum=1.5), "Invalid momentum"),
        (lambda d: d["param_groups"][0].update(lr=-1.0), "Invalid learning rate"),
        (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), "different number of parameter groups"),
        (
            lambda d: d["state"][2].update(momentum_buffer=torch.zeros(7)),
            r"momentum_buffer of parameter 2.*\(7,\)",
        ),
        (
            lambda d: d["state"][0].update(momentum_buffer=0.5),
            "momentum_buffer of parameter 0 in the state_dict is 0.5; expected a Tensor",
        ),
        (
            lambda d: d["state"][0].update(step="3"),
            "step of parameter 0 in the state_dict is '3'; expected a Tensor or a number",
        ),
        (lambda d: d["state"][0].update(step=-1), "step of parameter 0 in the state_dict is -1; allowed"),
        (lambda d: d["param_groups"][0].update(lr="0.1"), "lr in group 0 is '0.1'; allowed: a number"),
        (lambda d: d.clear(), r"not a state_dict: it has no \['param_groups', 'state'\]"),
    ],
)
def test_a_bad_state_dict_changes_nothing(spoil, message):
    params = make_params("cpu")
    saved = LARS(params, lr=0.5, momentum=0.9)
    train(saved, params, range(1))
    bad = copy.deepcopy(saved.state_dict())
    spoil(bad)
    optimizer = LARS(params, lr=0.25, momentum=0.5)
    train(optimizer, params, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        assert same_bits(after["state"][i]["momentum_buffer"], state["momentum_buffer"])


def test_state_dict_of_sgd_is_refused():
    params = make_params("cpu")
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"not a state_dict of LARS.*dampening"):
        LARS(params, lr=0.5).load_state_dict(sgd.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_train_on_alike(duplicate, device):
    params = make_params(device, BF16)
    optimizer = LARS(params, lr=0.5, momentum=0.9, master_weights=True)
    train(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twin_params = twin.param_groups[0]["params"]
    assert all(p is not q for p, q in zip(params, twin_params))
    for run, of in ((optimizer, params), (twin, twin_params)):
        train(run, of, range(2, 4))
    assert_same_state(optimizer, params, twin, twin_params)
    assert twin.trust_ratios().keys() == set(twin_params)


def test_copied_lr_tensor_is_its_own():
    params = make_params("cpu")
    optimizer = LARS(params, lr=torch.tensor(0.5))
    twin = copy.deepcopy(optimizer)
    twin.param_groups[0]["lr"].fill_(0.25)
    assert optimizer.param_groups[0]["lr"].item() == 0.5


def test_fp32_state_of_another_dtype_than_half_is_converted():
    """As in torch: a run that goes on in fp64 keeps nothing in fp32."""
    single, double = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    saved, optimizer = LARS([single], momentum=0.9), LARS([double])
    train(saved, [single], range(1))
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.state[double]["momentum_buffer"].dtype == torch.float64


def test_masters_for_a_state_without_get_an_fp32_buffer():
    param = torch.nn.Parameter(torch.linspace(1, 2, 7).bfloat16())
    optimizer = LARS([param], lr=0.1, momentum=0.9)
    train(optimizer, [param], range(1))
    before = optimizer.state[param]["momentum_buffer"]
    optimizer.param_groups[0]["master_weights"] = True
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = torch.zeros_like(param)
    optimizer.step()
    after = optimizer.state[param]["momentum_buffer"]
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, 0.9 * before.float(), rtol=1e-6, atol=0)


def test_dampening_of_a_buffer_that_is_there_already():
    """As in torch's SGD, only the first update is not damped, also if dampening came later."""
    params = [torch.nn.Parameter(torch.linspace(-1, 2, 9, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        LARS([params[0]], lr=0.1, momentum=0.9, layer_adaptation=False, classic_momentum=False),
        torch.optim.SGD([params[1]], lr=0.1, momentum=0.9),
    ]
    for dampening in (0.0, 0.5):
        for optimizer, param in zip(optimizers, params):
            optimizer.param_groups[0]["dampening"] = dampening
            for _ in range(3):
                param.grad = torch.cos(param.detach())
                optimizer.step()
    torch.testing.assert_close(*params, rtol=1e-14, atol=0)


@pytest.mark.parametrize("number", [float, int, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int64)])
def test_a_step_that_is_a_number_loads(number, device):
    """Like test_load_nontensor_step of torch's suite: older states, and states from JSON."""
    runs = []
    for _ in range(2):
        params = make_params(device)
        optimizer = LARS(params, **OPTIONS["dampening"])
        train(optimizer, params, range(2))
        runs.append((optimizer, params))
    (optimizer, params), (other, other_params) = runs
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = number(state["step"].item())
    other.load_state_dict(saved)
    for run, of in runs:
        train(run, of, range(2, 4))
    assert_same_state(optimizer, params, other, other_params)
    assert all(state["step"].dtype == torch.float32 for state in other.state.values())


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("how", ["loaded", "set"])
def test_a_momentum_buffer_that_is_none(how, momentum):
    """Some versions of torch's SGD save it without momentum. No buffer: the next step is a first."""
    params = [[nn.Parameter(torch.linspace(-1, 2, 9, dtype=torch.float64))] for _ in range(2)]
    options = dict(lr=0.1, momentum=momentum, dampening=0.5 if momentum else 0.0)
    ours = LARS(params[0], layer_adaptation=False, classic_momentum=False, **options)
    theirs = torch.optim.SGD(params[1], **options)
    for optimizer, (param,) in zip((ours, theirs), params):
        if how == "set":
            optimizer.state[param]["momentum_buffer"] = None
        else:
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": groups})
        for _ in range(3):
            param.grad = torch.cos(param.detach())
            optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-14, atol=0)


def test_a_master_that_is_none():
    (param,) = [nn.Parameter(torch.linspace(1, 2, 7).bfloat16())]
    optimizer = LARS([param], lr=0.1, momentum=0.9, master_weights=True)
    saved = {0: {"momentum_buffer": None, "master_param": None, "step": None}}
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    train(optimizer, [param], range(1))
    assert {k: v.dtype for k, v in optimizer.state[param].items()} == {
        "master_param": torch.float32,
        "momentum_buffer": torch.float32,
    }


@pytest.mark.parametrize("now", [False, True])
def test_a_run_from_before_decayed_norm_goes_on_without_it(now):
    """Whatever option the optimizer is made with now, by state_dict and by pickle."""
    params = make_params("cpu")
    optimizer = LARS([{"params": params[:1]}, {"params": params[1:], "decayed_norm": now}], decayed_norm=now)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["decayed_norm"]
    optimizer.load_state_dict(state)
    assert [group["decayed_norm"] for group in optimizer.param_groups] == [False, False]
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        options.pop("decayed_norm", None)
    old = LARS.__new__(LARS)
    old.__setstate__(state)
    for p in params:
        p.grad = torch.ones_like(p)
    old.step()
