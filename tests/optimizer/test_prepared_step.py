"""A step prepared in C++ has the bits of a step that is gathered again, whatever changed before it."""

import copy

import numpy as np
import pytest
import torch

from fused_lars import LARS
from stepping import same_bits


def make(device, **options):
    """An optimizer with two groups. The last parameter has no gradient."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
        for shape in ((5, 3), (7,), (2, 2), (3,), (4,))
    ]
    groups = [
        {"params": params[:3], "weight_decay": 0.1},
        {"params": params[3:], "weight_decay": 0.0, "layer_adaptation": False},
    ]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, trust_coefficient=0.02, **options)
    set_grads(optimizer, 0)
    return optimizer


def set_grads(optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params[:-1]:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def first(optimizer) -> torch.nn.Parameter:
    return optimizer.param_groups[0]["params"][0]


class SetOption:
    def __init__(self, name, value, group=0) -> None:
        self.name, self.value, self.group = name, value, group

    def __call__(self, optimizer) -> None:
        optimizer.param_groups[self.group][self.name] = self.value

    def __str__(self) -> str:
        return f"{self.name}={self.value} in group {self.group}"


def new_state_tensor(optimizer):
    optimizer.state[first(optimizer)]["momentum_buffer"] = torch.ones_like(first(optimizer))


def state_deleted(optimizer):
    del optimizer.state[first(optimizer)]


def state_cleared(optimizer):
    optimizer.state.clear()


def states_exchanged(optimizer):
    a, b = first(optimizer), optimizer.param_groups[0]["params"][2]
    a.data, b.data = torch.ones(2, 3, device=a.device), torch.ones(2, 3, device=a.device)
    a.grad, b.grad = torch.ones_like(a), 2 * torch.ones_like(b)
    optimizer.state[a] = {"momentum_buffer": torch.ones_like(a)}
    optimizer.state[b] = {"momentum_buffer": torch.full_like(b, 3.0)}
    optimizer.step()
    optimizer.state[a], optimizer.state[b] = optimizer.state[b], optimizer.state[a]


def grad_missing(optimizer):
    first(optimizer).grad = None


def grad_of_the_last(optimizer):
    p = optimizer.param_groups[-1]["params"][-1]
    p.grad = torch.ones_like(p)


def data_replaced(optimizer):
    p = first(optimizer)
    p.data = torch.full((2, 4), 0.5, device=p.device)
    p.grad = torch.ones_like(p)
    del optimizer.state[p]


def param_replaced(optimizer):
    params = optimizer.param_groups[0]["params"]
    params[0] = torch.nn.Parameter(torch.full_like(params[0], 0.5))
    params[0].grad = torch.ones_like(params[0])


def group_added(optimizer):
    p = torch.nn.Parameter(torch.ones(3, device=first(optimizer).device))
    p.grad = torch.ones_like(p)
    optimizer.add_param_group({"params": p, "weight_decay": 0.25})


def group_removed(optimizer):
    del optimizer.param_groups[1]


def state_loaded(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for values in state["state"].values():
        values["momentum_buffer"].mul_(2.0)
    optimizer.load_state_dict(state)


CHANGES = [
    SetOption("lr", 0.25),
    SetOption("lr", torch.tensor(0.25)),
    SetOption("momentum", 0.5, group=1),
    SetOption("momentum", 0.0),
    SetOption("weight_decay", 0.3),
    SetOption("eps", 0.1),
    SetOption("layer_adaptation", True, group=1),
    SetOption("maximize", True),
    SetOption("nesterov", True),
    SetOption("foreach", True),
    SetOption("fused", False, group=1),
    new_state_tensor,
    state_deleted,
    state_cleared,
    states_exchanged,
    grad_missing,
    grad_of_the_last,
    data_replaced,
    param_replaced,
    group_added,
    group_removed,
    state_loaded,
]  # fmt: skip


def tensors_of(optimizer) -> list[torch.Tensor]:
    tensors = [*optimizer.trust_ratios().values()]
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            tensors += [p.detach().clone(), *(state[key].clone() for key in sorted(state))]
    return tensors


def run(optimizer, change, is_prepared: bool) -> list[torch.Tensor]:
    """Three steps, the change, and three more steps."""
    for step in range(6):
        set_grads(optimizer, step)
        if step == 3:
            assert optimizer._stepper.prepared is not None or not is_prepared
            change(optimizer)
        if not is_prepared:
            optimizer._stepper.prepared = None
        optimizer.step()
    return tensors_of(optimizer)


def name(change) -> str:
    return getattr(change, "__name__", str(change))


def check(change, device, **options) -> None:
    results = [run(make(device, **options), change, is_prepared) for is_prepared in (True, False)]
    assert len(results[0]) == len(results[1])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("change", [lambda _: None, *CHANGES], ids=name)
def test_what_changes_between_steps_counts(device, change):
    check(change, device)


@pytest.mark.parametrize(
    "change", [SetOption("dampening", 0.0), SetOption("dampening", 0.5), state_deleted], ids=name
)
def test_dampening(device, change):
    check(change, device, classic_momentum=False, dampening=0.25)


@pytest.mark.parametrize("value", ["0.1", None, -1.0, float("nan")])
def test_a_bad_option_has_the_error_of_any_step(device, value):
    optimizer = make(device)
    for step in range(4):
        set_grads(optimizer, step)
        optimizer.step()
    before = tensors_of(optimizer)
    optimizer.param_groups[1]["lr"] = value
    with pytest.raises(ValueError, match=r"(?i)(lr|learning rate) in group 1"):
        optimizer.step()
    assert all(map(same_bits, before, tensors_of(optimizer)))


def test_a_bad_gradient_has_the_error_of_any_step(device):
    optimizer = make(device)
    for step in range(4):
        set_grads(optimizer, step)
        optimizer.step()
    p = optimizer.param_groups[1]["params"][0]
    p.data = p.data.new_ones(6)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\]"):
        optimizer.step()


def test_gradients_that_come_and_go_are_not_prepared(device):
    """Preparing for one step only would cost more than it saves."""
    optimizer = make(device)
    for step in range(6):
        set_grads(optimizer, step)
        if step % 2:
            first(optimizer).grad = None
        optimizer.step()
        assert optimizer._stepper.prepared is None


def test_an_option_that_is_changed_in_place_counts(device):
    """Every step reads an option that is a tensor, which the constructor would refuse."""
    results = []
    for is_prepared in (True, False):
        optimizer = make(device)
        for step in range(8):
            if step == 4:
                decay = optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.5)
            if step == 6:
                decay.zero_()
            set_grads(optimizer, step)
            if not is_prepared:
                optimizer._stepper.prepared = None
            optimizer.step()
        results.append(tensors_of(optimizer))
    assert all(map(same_bits, *results))


@pytest.mark.parametrize(
    "lr", [torch.tensor([0.1, 0.2]), torch.tensor(1), np.array([0.1, 0.2]), np.array(0.5)], ids=str
)
def test_an_lr_of_the_wrong_kind_has_the_error_of_any_step(device, lr):
    texts = []
    for is_prepared in (True, False):
        optimizer = make(device)
        for step in range(4):
            set_grads(optimizer, step)
            optimizer.step()
        optimizer.param_groups[1]["lr"] = lr
        if not is_prepared:
            optimizer._stepper.prepared = None
        with pytest.raises(ValueError, match="lr") as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
