"""torch's own test description of an optimizer: an OptimizerInfo, its inputs and its error cases."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from devices import has_kernels
from fused_lars import LARS

torch_tests = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="torch's own tests need expecttest"
)


def optim_inputs_func_lars(device, dtype=None):
    of_sgd = torch_tests.optim_inputs_func_sgd(device)
    # torch's convention, which all options of SGD belong to, and a trust coefficient with visible steps.
    torch_form = dict(classic_momentum=False, trust_coefficient=0.1)
    return [torch_tests.OptimizerInput(None, {**i.kwargs, **torch_form}, i.desc) for i in of_sgd] + [
        torch_tests.OptimizerInput(None, dict(lr=0.1, **kwargs), str(kwargs))
        for kwargs in (
            dict(momentum=0.9, trust_coefficient=0.5),
            dict(momentum=0.9, trust_coefficient=0.5, nesterov=True, weight_decay=0.1),
            dict(trust_clip=True, eps=1e-8),
            dict(layer_adaptation=False, momentum=0.5),
            dict(trust_coefficient=0.5, master_weights=True, maximize=True),
        )
    ]


def optim_error_inputs_func_lars(device, dtype):
    return torch_tests.optim_error_inputs_func_sgd(device, dtype)


INFO = torch_tests.OptimizerInfo(
    LARS,
    optim_inputs_func=optim_inputs_func_lars,
    optim_error_inputs_func=optim_error_inputs_func_lars,
    scheduler_inputs=next(
        info for info in torch_tests.optim_db if info.optim_cls is torch.optim.SGD
    ).scheduler_inputs,
    supported_impls=("foreach", "differentiable", "fused"),
    not_og_supported_flags=("classic_momentum", "master_weights", "capturable", "maximize"),
    supports_complex=False,
    has_capturable_arg=True,
    supports_fused_on=tuple(device for device in ("cpu", "cuda") if has_kernels(device)),
)

ALL_INPUTS = torch_tests._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)
all_inputs = pytest.mark.parametrize("optim_input", ALL_INPUTS, ids=lambda i: i.desc)
# A step with differentiable=True cannot write leaves. test_differentiable.py tests it.
inputs = pytest.mark.parametrize(
    "optim_input", [i for i in ALL_INPUTS if not i.kwargs.get("differentiable")], ids=lambda i: i.desc
)


def kwargs_of(optim_input, device):
    kwargs = copy.deepcopy(optim_input.kwargs)
    if kwargs.get("fused") and not has_kernels(device):
        pytest.skip("the build has no CUDA kernels")
    return kwargs


def make_problem(device, dtype=torch.float64, strided=False):
    """A weight and a bias to fit, and a closure that computes gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 5, 2, generator=generator, dtype=dtype).to(device)
    bias = torch.randn(10, 2, generator=generator, dtype=dtype).to(device)
    weight, bias = (x[..., 0] if strided else x[..., 0].contiguous() for x in (weight, bias))
    x = torch.randn(5, generator=generator, dtype=dtype).to(device)
    return nn.Parameter(weight), nn.Parameter(bias), x


def closure_of(optimizer, weight, bias, x, maximize=False):
    def closure():
        optimizer.zero_grad()
        loss = (weight @ x + bias).square().sum()
        (-loss if maximize else loss).backward()
        return loss.item()

    return closure


def test_error_inputs():
    for error_input in INFO.optim_error_inputs_func("cpu", torch.float32):
        optim_input = error_input.optimizer_error_input
        params = optim_input.params or [nn.Parameter(torch.randn(1))]
        assert error_input.error_on == torch_tests.OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error_input.error_type, Warning):
            with pytest.warns(error_input.error_type, match=error_input.error_regex):
                LARS(params, **optim_input.kwargs)
        else:
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                LARS(params, **optim_input.kwargs)


@inputs
@pytest.mark.parametrize("strided", [False, True])
def test_goes_in_the_right_direction(optim_input, strided, device):
    weight, bias, x = make_problem(device, strided=strided)
    optimizer = LARS([weight, bias], **kwargs_of(optim_input, device))
    # Maximising the negative loss minimises the loss.
    closure = closure_of(optimizer, weight, bias, x, optim_input.kwargs.get("maximize", False))
    first = closure()
    for _ in range(10):
        optimizer.step(closure)
    assert closure() < first


@pytest.mark.parametrize("constructors", INFO.scheduler_inputs, ids=lambda made: f"{len(made)} schedulers")
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_goes_in_the_right_direction_with_schedulers(constructors, lr):
    weight, bias, x = make_problem("cpu")
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr
    optimizer = LARS(
        [{"params": [weight]}, {"params": [bias], "weight_decay": 0.1}], lr=lr, trust_coefficient=0.05
    )
    schedulers = [constructor(optimizer) for constructor in constructors]
    closure = closure_of(optimizer, weight, bias, x)
    first = closure()
    for _ in range(10):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss) if plateau else scheduler.step()
    assert closure() < first


@pytest.mark.parametrize("optim_input", INFO.optim_inputs_func("cpu"), ids=lambda i: i.desc)
def test_implementations_agree(optim_input, device):
    """foreach, fused and the choice of fused=None agree over some steps, in fp64."""
    results = []
    for flags in (dict(fused=False), dict(foreach=True), dict(fused=True), {}):
        if flags.get("fused") and not has_kernels(device):
            continue
        weight, bias, x = make_problem(device)
        optimizer = LARS([weight, bias], **copy.deepcopy(optim_input.kwargs), **flags)
        closure = closure_of(optimizer, weight, bias, x, optim_input.kwargs.get("maximize", False))
        for _ in range(7):
            optimizer.step(closure)
        results.append((weight, bias))
    for result in results[1:]:
        for p, q in zip(results[0], result):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@inputs
def test_state_dict_is_deterministic(optim_input, device):
    """An optimizer that loads another's state takes the same steps on a deep copy of the problem."""
    weight, bias, x = make_problem(device)
    kwargs = kwargs_of(optim_input, device)
    maximize = kwargs.get("maximize", False)
    optimizer = LARS([weight, bias], **kwargs)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, weight, bias, x, maximize))
    # Through a file that is read with weights_only, on the CPU.
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file, weights_only=True, map_location="cpu")
    other_weight, other_bias = (nn.Parameter(p.detach().clone()) for p in (weight, bias))
    other = LARS([other_weight, other_bias], **kwargs_of(optim_input, device))
    other.load_state_dict(state_dict)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, weight, bias, x, maximize))
        other.step(closure_of(other, other_weight, other_bias, x, maximize))
    assert torch.equal(weight, other_weight)
    assert torch.equal(bias, other_bias)


@inputs
def test_an_older_state_dict_loads(optim_input, device):
    weight, bias, x = make_problem(device)
    optimizer = LARS([weight, bias], **kwargs_of(optim_input, device))
    optimizer.step(closure_of(optimizer, weight, bias, x))
    old = copy.deepcopy(optimizer.state_dict())
    for flag in INFO.not_og_supported_flags + INFO.supported_impls:
        old["param_groups"][0].pop(flag, None)
    optimizer.load_state_dict(old)
    optimizer.step(closure_of(optimizer, weight, bias, x))
    old_pickle = LARS.__new__(LARS)
    state = optimizer.__getstate__()
    state["param_groups"] = [dict(group) for group in state["param_groups"]]
    for flag in INFO.not_og_supported_flags:
        state["param_groups"][0].pop(flag)
    old_pickle.__setstate__(state)
    old_pickle.step(closure_of(old_pickle, weight, bias, x))


@inputs
def test_a_state_dict_with_numbers_for_tensors_loads(optim_input, device):
    """Like test_load_nontensor_step of torch's suite."""
    weight, bias, x = make_problem(device)
    # Only dampening counts steps.
    kwargs = kwargs_of(optim_input, device)
    if kwargs.get("momentum") and not kwargs.get("nesterov") and not kwargs.get("classic_momentum", True):
        kwargs["dampening"] = 0.5
    optimizer = LARS([weight, bias], **kwargs)
    closure = closure_of(optimizer, weight, bias, x, kwargs.get("maximize", False))
    for _ in range(3):
        optimizer.step(closure)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    assert all(state.get("step", 3) == 3 for state in optimizer.state.values())
    optimizer.step(closure)
    assert all(state.get("step", 4) == 4 for state in optimizer.state.values())


def test_fused_on_parameters_on_meta(device):
    """Like test_fused_error_on_params_on_meta of torch's suite."""
    if not has_kernels(device):
        pytest.skip("the build has no CUDA kernels")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    optimizer = LARS(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"
    ):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.to_empty(device=device)
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_param_groups(option, device):
    """A group with lr 0 stays the same. A group with weight decay shrinks more."""
    weight, bias, x = make_problem(device)
    if option == "lr":
        groups = [{"params": [weight], "lr": 0.0}, {"params": [bias]}]
    else:
        groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias]}]
    twin_weight = nn.Parameter(weight.detach().clone())
    twin_bias = nn.Parameter(bias.detach().clone())
    runs = [
        (LARS(groups, lr=0.1, layer_adaptation=False), weight, bias),
        (LARS([twin_weight, twin_bias], lr=0.1, layer_adaptation=False), twin_weight, twin_bias),
    ]
    start = weight.detach().clone()
    for optimizer, w, b in runs:
        closure = closure_of(optimizer, w, b, x)
        closure()
        optimizer.step()
    assert torch.equal(bias, twin_bias)
    if option == "lr":
        assert torch.equal(weight, start)
    else:
        torch.testing.assert_close(weight, twin_weight - 0.1 * 0.5 * start)


@all_inputs
def test_step_without_gradients_is_no_step(optim_input, device):
    weight, bias, _ = make_problem(device)
    optimizer = LARS([weight, bias], **kwargs_of(optim_input, device))
    before = weight.detach().clone(), bias.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])
    assert not optimizer.state


def test_lr_as_tensor_and_as_number(device):
    results = []
    for lr in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64, device=device)):
        weight, bias, x = make_problem(device)
        optimizer = LARS([weight, bias], lr=lr, momentum=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(4):
                optimizer.step(closure_of(optimizer, weight, bias, x))
        results.append(weight)
    # torch.tensor(0.1) is an fp32 number, at most 2^-24 from 0.1, relatively.
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(results[2], results[0])
