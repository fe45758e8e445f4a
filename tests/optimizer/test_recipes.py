"""The LARS of published training recipes, by their fp64 formulas: step by step, and taken over half-way.

docs/migration.md has a row for each. The formulas are those of the projects' own optimizers, rewritten here.
"""

import copy

import pytest
import torch
from torch import nn

from fused_lars import LARS, convert_state_dict

F64 = torch.float64
STEPS = 12
SHAPES = [(5, 3), (2, 3, 2, 2), (7,), (1, 4), (6,), (3, 2)]


def make_params():
    """Weights and biases. The last of each starts at zero."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)) for shape in SHAPES]
    with torch.no_grad():
        for p in params[-2:]:
            p.zero_()
    return params


def set_grads(params, step, zeros=True):
    """Gradients do not depend on the parameters. Now and then a whole gradient is zero."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator, dtype=F64)
        if zeros and (step + i) % 5 == 4:
            p.grad.zero_()


def rate(step: int) -> float:
    return 1.0 + step % 4


class Theirs(torch.optim.Optimizer):
    """The common part: parameters in one group, momentum under `key`, a formula in direction()."""

    key = "mu"

    def __init__(self, params, lr, momentum=0.9, **options) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, **options})

    def direction(self, p, group):
        raise NotImplementedError

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                u = self.direction(p, group)
                buffer = self.state[p].setdefault(self.key, torch.zeros_like(p))
                buffer.copy_(group["momentum"] * buffer + u)
                p.sub_(group["lr"] * buffer)


class Decayed(Theirs):
    """BYOL, Barlow Twins, VICReg, DINO, MoCo v3, MAE: decay first, then the norm of the sum.

    `excluded` holds the parameters without both: one-dimensional ones, by the filters or always.
    """

    def direction(self, p, group):
        if p.ndim == 1 and group["excluded"]:
            return p.grad
        u = p.grad + group["weight_decay"] * p
        if p.norm() > 0 and u.norm() > 0:
            u = u * group["eta"] * p.norm() / u.norm()
        return u


class DecayedOnly(Decayed):
    """With weight_decay_filter only: one-dimensional parameters are adapted but not decayed."""

    def direction(self, p, group):
        decay = 0.0 if p.ndim == 1 else group["weight_decay"]
        return super().direction(p, {**group, "weight_decay": decay, "excluded": False})


class SoloLearn(Theirs):
    """Both norms are added, as in the paper. If a norm is 0, the parameter is not decayed."""

    key = "momentum_buffer"

    def direction(self, p, group):
        w, g, decay = p.norm(), p.grad.norm(), group["weight_decay"]
        if (p.ndim == 1 and group["exclude_bias_n_norm"]) or w == 0 or g == 0:
            return p.grad
        q = group["eta"] * w / (g + decay * w + group["eps"])
        if group["clip_lr"]:
            q = min(q / group["lr"], torch.ones(()))
        return q * (p.grad + decay * p)


class SimCLR(Theirs):
    """The TensorFlow version: lr inside the momentum, norms after the decay."""

    key = "Momentum"

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                skipped = p.ndim == 1
                g = p.grad if skipped else p.grad + group["weight_decay"] * p
                scaled_lr = group["lr"]
                if not skipped and p.norm() > 0 and g.norm() > 0:
                    scaled_lr = scaled_lr * group["eeta"] * p.norm() / g.norm()
                v = self.state[p].setdefault(self.key, torch.zeros_like(p))
                v.copy_(group["momentum"] * v + scaled_lr * g)
                p.sub_(group["momentum"] * v + scaled_lr * g if group["use_nesterov"] else v)


def groups_of(params, **one_dimension):
    """Weights, and one-dimensional parameters, which most recipes exclude from decay and adaptation."""
    return [
        {"params": [p for p in params if p.ndim != 1]},
        {"params": [p for p in params if p.ndim == 1], **one_dimension},
    ]


PLAIN = {"weight_decay": 0.0, "layer_adaptation": False}
OURS = {"momentum": 0.9, "weight_decay": 0.05, "trust_coefficient": 0.2, "classic_momentum": False}
DECAYED = {**OURS, "decayed_norm": True}
THEIRS = {"weight_decay": 0.05, "eta": 0.2}

# By name: what makes their optimizer for parameters in one group, and what reproduces it here.
RECIPES = {
    "Barlow Twins, VICReg: both filters; DINO, MoCo v3, MAE, BYOL": (
        lambda params: Decayed(params, 0.3, excluded=True, **THEIRS),
        lambda params: LARS(groups_of(params, **PLAIN), lr=0.3, **DECAYED),
    ),
    "Barlow Twins, VICReg: no filter": (
        lambda params: Decayed(params, 0.3, excluded=False, **THEIRS),
        lambda params: LARS(params, lr=0.3, **DECAYED),
    ),
    "Barlow Twins, VICReg: weight_decay_filter": (
        lambda params: DecayedOnly(params, 0.3, excluded=True, **THEIRS),
        lambda params: LARS(groups_of(params, weight_decay=0.0), lr=0.3, **DECAYED),
    ),
    "Barlow Twins: learning rates of groups": (
        lambda params: Decayed(groups_of(params, lr=0.0048), 0.2, excluded=True, **THEIRS),
        lambda params: LARS(groups_of(params, lr=0.0048, **PLAIN), lr=0.2, **DECAYED),
    ),
    "SimCLR": (
        lambda params: SimCLR(params, 0.3, weight_decay=0.05, eeta=0.2, use_nesterov=False),
        lambda params: LARS(
            groups_of(params, **PLAIN), lr=0.3, **{**DECAYED, "classic_momentum": True}
        ),
    ),
    "SimCLR, nesterov": (
        lambda params: SimCLR(params, 0.3, weight_decay=0.05, eeta=0.2, use_nesterov=True),
        lambda params: LARS(
            groups_of(params, **PLAIN), lr=0.3, nesterov=True, **{**DECAYED, "classic_momentum": True}
        ),
    ),
    "solo-learn": (
        lambda params: SoloLearn(
            params, 0.3, eps=1e-8, clip_lr=False, exclude_bias_n_norm=False, **THEIRS
        ),
        lambda params: LARS(params, lr=0.3, eps=1e-8, **OURS),
    ),
    "solo-learn, clip_lr, exclude_bias_n_norm": (
        lambda params: SoloLearn(params, 0.3, eps=1e-8, clip_lr=True, exclude_bias_n_norm=True, **THEIRS),
        lambda params: LARS(
            groups_of(params, trust_clip=False, **PLAIN), lr=0.3, eps=1e-8, trust_clip=True, **OURS
        ),
    ),
}  # fmt: skip


def steps(optimizer, params, which, zeros):
    """Yields the parameters after every step, while the learning rate changes."""
    base = [group["lr"] for group in optimizer.param_groups]
    for step in which:
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * rate(step)
        set_grads(params, step, zeros)
        optimizer.step()
        yield [p.detach().clone() for p in params]
    for group, lr in zip(optimizer.param_groups, base):
        group["lr"] = lr


def assert_same_steps(ours, params, theirs, their_params, which, zeros):
    pairs = zip(steps(ours, params, which, zeros), steps(theirs, their_params, which, zeros), strict=True)
    for step, (got, expected) in zip(which, pairs):
        for i, (a, b) in enumerate(zip(got, expected)):
            # Some tens of roundings a step, of numbers below 10.
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, msg=f"step {step}, parameter {i}")


# solo-learn does not decay if the gradient is zero. LARS does.
def has_zero_gradients(name: str) -> bool:
    return not name.startswith("solo-learn")


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, implementation):
    make_theirs, make_ours = RECIPES[name]
    params, their_params = make_params(), make_params()
    ours = make_ours(params)
    for group in ours.param_groups:
        group[implementation] = True
    zeros = has_zero_gradients(name)
    assert_same_steps(ours, params, make_theirs(their_params), their_params, range(STEPS), zeros)


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("SimCLR")])
def test_a_run_taken_over_half_way(name):
    """Converts their checkpoint, which has all parameters in another order."""
    make_theirs, make_ours = RECIPES[name]
    zeros = has_zero_gradients(name)
    their_params = make_params()
    theirs = make_theirs(their_params)
    list(steps(theirs, their_params, range(5), zeros))
    params = [nn.Parameter(p.detach().clone()) for p in their_params]
    ours = make_ours(params)
    source = "sgd" if isinstance(theirs, SoloLearn) else "mu"
    order = [params[i] for group in theirs.param_groups for i in map(index_in(their_params), group["params"])]
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours, source, order))
    assert_same_steps(ours, params, theirs, their_params, range(5, STEPS), zeros)


def index_in(params):
    places = {id(p): i for i, p in enumerate(params)}
    return lambda p: places[id(p)]


def run_of(params, lr, classic_momentum, **options):
    return LARS(params, lr=lr, momentum=0.9, classic_momentum=classic_momentum, **options)


@pytest.mark.parametrize(("source", "classic_momentum"), [("sgd", True), ("apex", False), ("apex", True)])
def test_between_momentum_conventions(source, classic_momentum):
    """At a constant rate both are the same run. apex's buffers have the opposite sign."""
    is_classic = source == "apex"
    before = make_params()
    saved = run_of(before, 0.3, is_classic)
    for step in range(5):
        set_grads(before, step)
        saved.step()
    state_dict = copy.deepcopy(saved.state_dict())
    del state_dict["param_groups"][0]["classic_momentum"]  # only LARS has it
    if source == "apex":
        for values in state_dict["state"].values():
            values["momentum_buffer"] = -values["momentum_buffer"]
    after = [nn.Parameter(p.detach().clone()) for p in before]
    ours = run_of(after, 0.3, classic_momentum)
    ours.load_state_dict(convert_state_dict(state_dict, ours, source))
    assert ours.param_groups[0]["classic_momentum"] == classic_momentum
    for step in range(5, 10):
        for optimizer, params in ((saved, before), (ours, after)):
            set_grads(params, step)
            optimizer.step()
    for p, q in zip(before, after):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def trained_with_mu():
    params = make_params()
    theirs = Decayed(params, 0.3, excluded=True, **THEIRS)
    list(steps(theirs, params, range(2), True))
    return theirs.state_dict()


def test_a_foreign_state_is_not_loaded_without_a_word():
    params = make_params()
    ours = LARS(params, momentum=0.9)
    state = {"state": trained_with_mu()["state"], "param_groups": ours.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"parameter 0 in the state_dict has the state \['mu'\]; allowed: "):
        ours.load_state_dict(state)
    assert not ours.state


def test_state_that_a_wrapper_keeps_beside_ours_is_loaded():
    params = make_params()
    ours = LARS(params, lr=0.1, momentum=0.9)
    for p in params:
        ours.state[p]["slow_buffer"] = p.detach().clone()
    set_grads(params, 0)
    ours.step()
    ours.load_state_dict(ours.state_dict())
    assert set(ours.state[params[0]]) == {"slow_buffer", "momentum_buffer"}


def test_what_cannot_be_converted_is_said():
    theirs = trained_with_mu()
    params = make_params()
    ours = LARS(groups_of(params, **PLAIN), **DECAYED)
    in_order = [params[i] for i in range(len(params))]
    for arguments, message in [
        (("adam",), "source is 'adam'; allowed: 'sgd', 'mu', 'apex'"),
        (("sgd", in_order), r"parameter 0 has the state \['mu'\]; expected of 'sgd': 'momentum_buffer'"),
        (("mu",), r"mu of parameter 2 has shape \(7,\); expected that of param_groups\[0\]\['params'\]\[2\]"),
        (("mu", in_order[:-1]), "the state_dict has 6 parameters; expected 5"),
        (("mu", [*in_order[:-1], nn.Parameter(torch.ones(3, 2))]), r"params\[5\], of shape \(3, 2\), is not"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_state_dict(theirs, ours, *arguments)
    apex = LARS(make_params(), lr=0.0, momentum=0.9)
    apex.state[apex.param_groups[0]["params"][0]]["momentum_buffer"] = torch.ones(5, 3, dtype=F64)
    state_dict = apex.state_dict()
    with pytest.raises(ValueError, match="this is a state_dict of LARS already"):
        convert_state_dict(state_dict, ours, "sgd")
    del state_dict["param_groups"][0]["classic_momentum"]
    with pytest.raises(ValueError, match="lr of parameter 0 is 0 in the state_dict; expected > 0"):
        convert_state_dict(state_dict, run_of(make_params(), 0.1, False), "apex")
    with pytest.raises(
        ValueError, match=r"this is not a state_dict: it has no .*, only .'model', 'optimizer'"
    ):
        convert_state_dict({"model": {}, "optimizer": theirs}, ours, "mu")
    with pytest.raises(ValueError, match=r"optimizer is SGD; expected fused_lars\.LARS"):
        convert_state_dict(theirs, torch.optim.SGD(params), "mu")
    with pytest.raises(ValueError, match=r"params\[0\] is str; expected a parameter"):
        convert_state_dict(theirs, ours, "mu", ["w"] * 6)
    assert not ours.state


def test_buffers_of_half_precision_keep_their_digits():
    """They are multiplied by the learning rate in fp32 if the optimizer keeps them in fp32."""
    param = nn.Parameter(torch.ones(100, dtype=torch.float16))
    sgd = torch.optim.SGD([param], lr=0.001, momentum=0.9)
    param.grad = torch.linspace(1e-4, 2e-4, 100).half()
    sgd.step()
    ours = LARS([param], lr=0.001, momentum=0.9, master_weights=True)
    ours.load_state_dict(convert_state_dict(sgd.state_dict(), ours, "sgd", [("w", param)]))
    expected = 0.001 * sgd.state[param]["momentum_buffer"].double()
    torch.testing.assert_close(ours.state[param]["momentum_buffer"].double(), expected, rtol=1e-6, atol=0)
