"""Reproduces the LARS of other libraries, step by step. docs/migration.md describes this in words."""

import copy
import tempfile

import pytest
import torch
from torch import nn

from fused_lars import LARS

STEPS = 12
SHAPES = [(5, 3), (2, 3, 2, 2), (7,), (1, 4), ()]


def make_params(dtype):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    # A bias and a weight that start at zero.
    return [*params, *(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((6,), (3, 2)))]


def set_grads(params, step):
    """Gradients do not depend on the parameters, so a rounding error does not grow."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def train(optimizer, params, steps=range(STEPS)):
    """Yields the parameters after every step, while lr changes."""
    base = [group["lr"] for group in optimizer.param_groups]
    for step in steps:
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * (1 + step % 4)
        set_grads(params, step)
        optimizer.step()
        yield [p.detach().clone() for p in params]
    for group, lr in zip(optimizer.param_groups, base):
        group["lr"] = lr


def assert_same_steps(ours, params, theirs, their_params, steps=range(STEPS)):
    # Both differ from the exact result by a few hundred roundings a step, of numbers below 10.
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[params[0].dtype]
    pairs = zip(train(ours, params, steps), train(theirs, their_params, steps), strict=True)
    for step, (got, expected) in enumerate(pairs):
        for i, (a, b) in enumerate(zip(got, expected)):
            torch.testing.assert_close(
                a,
                b,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, step=step, i=i: f"step {step}, parameter {i}: {text}",
            )


def split(params, one_dimension):
    """Two groups: the parameters that a project excludes from decay and adaptation, and the others."""
    excluded = [p for p in params if p.ndim <= 1]
    return [
        {"params": [p for p in params if p.ndim > 1]},
        {"params": excluded, **one_dimension},
    ]


TORCH_FORM = {
    "momentum": dict(momentum=0.9),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "dampening": dict(momentum=0.9, dampening=0.3),
    "no momentum": {},
}
FP = [torch.float32, torch.float64]


# ---------------------------------------------------------------- timm


def make_timm(params, **options):
    timm = pytest.importorskip("timm.optim")
    return timm.Lars(split(params, dict(weight_decay=0.0)), **options)


def make_ours_for_timm(
    params, *, always_adapt=False, trust_coeff=0.001, eps=1e-8, trust_clip=False, **options
):
    # Without decay, timm neither adapts nor clips, unless always_adapt is set.
    plain = {} if always_adapt else dict(layer_adaptation=False, trust_clip=False)
    return LARS(
        split(params, dict(weight_decay=0.0, **plain)),
        trust_coefficient=trust_coeff,
        eps=eps,
        trust_clip=trust_clip,
        classic_momentum=False,
        **options,
    )


@pytest.mark.parametrize("dtype", FP, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, dict(always_adapt=True), dict(trust_clip=True), dict(eps=0.1)], ids=str
)
@pytest.mark.parametrize("options", TORCH_FORM.values(), ids=TORCH_FORM)
def test_timm(options, extra, foreach, dtype):
    options = dict(lr=0.3, weight_decay=0.05, trust_coeff=0.2, **options, **extra)
    params, their_params = make_params(dtype), make_params(dtype)
    ours, theirs = make_ours_for_timm(params, **options), make_timm(their_params, foreach=foreach, **options)
    assert_same_steps(ours, params, theirs, their_params)


# ---------------------------------------------------------------- lightly, lightning-bolts


def make_lightly(params, **options):
    lightly = pytest.importorskip("lightly.utils.lars")
    return lightly.LARS(split(params, dict(weight_decay=0.0)), **options)


def make_ours_for_lightly(params, *, eps=1e-8, **options):
    groups = split(params, dict(weight_decay=0.0, layer_adaptation=False))
    return LARS(groups, eps=eps, classic_momentum=False, **options)


@pytest.mark.parametrize("dtype", FP, ids=str)
@pytest.mark.parametrize("options", TORCH_FORM.values(), ids=TORCH_FORM)
def test_lightly(options, dtype):
    options = dict(lr=0.3, weight_decay=0.05, trust_coefficient=0.2, **options)
    # lightly does not decay a weight of zeros. Here it has nothing to decay either.
    params, their_params = make_params(dtype), make_params(dtype)
    ours, theirs = make_ours_for_lightly(params, **options), make_lightly(their_params, **options)
    assert_same_steps(ours, params, theirs, their_params)


def test_lightly_does_not_decay_without_a_gradient():
    """If a weight's gradient is all zeros, q is 1 in LARS and the weight decays at the full lr."""
    params, their_params = ([nn.Parameter(torch.ones(2, 2))] for _ in range(2))
    ours, theirs = (
        make_ours_for_lightly(params, lr=0.5, weight_decay=0.1),
        make_lightly(their_params, lr=0.5, weight_decay=0.1),
    )
    for optimizer, p in ((ours, params[0]), (theirs, their_params[0])):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    assert torch.equal(their_params[0], torch.ones(2, 2))


# ---------------------------------------------------------------- pytorch_optimizer


def make_pytorch_optimizer(params, **options):
    return pytest.importorskip("pytorch_optimizer").LARS(params, **options)


def make_ours_for_pytorch_optimizer(params, **options):
    groups = split(params, dict(weight_decay=0.0, layer_adaptation=False))
    return LARS(groups, classic_momentum=False, **options)


@pytest.mark.parametrize("dtype", FP, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", ["momentum", "nesterov", "no momentum"])
def test_pytorch_optimizer(options, maximize, foreach, dtype):
    options = dict(lr=0.1, weight_decay=0.05, trust_coefficient=0.2, momentum=0.0) | TORCH_FORM[options]
    options["maximize"] = maximize
    params, their_params = make_params(dtype), make_params(dtype)
    ours = make_ours_for_pytorch_optimizer(params, **options)
    # It makes its groups by dimension inside.
    theirs = make_pytorch_optimizer(their_params, foreach=foreach, **options)
    assert_same_steps(ours, params, theirs, their_params)


def test_pytorch_optimizer_damps_the_first_step():
    """torch leaves the first step undamped. A step count that starts at 1 damps it here too."""
    options = dict(lr=0.1, trust_coefficient=0.2, momentum=0.9, dampening=0.3)
    params, their_params = make_params(torch.float64), make_params(torch.float64)
    ours = make_ours_for_pytorch_optimizer(params, **options)
    for p in params:
        ours.state[p]["step"] = torch.ones(())
    assert_same_steps(ours, params, make_pytorch_optimizer(their_params, **options), their_params)


def test_pytorch_optimizer_adapts_a_zero_gradient():
    """There q is trust_coefficient / weight_decay, which is 1 here."""
    params, their_params = ([nn.Parameter(torch.ones(2, 2))] for _ in range(2))
    options = dict(lr=0.5, weight_decay=0.1, trust_coefficient=0.2, momentum=0.0)
    ours, theirs = LARS(params, **options), make_pytorch_optimizer(their_params, **options)
    for optimizer, p in ((ours, params[0]), (theirs, their_params[0])):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    torch.testing.assert_close(their_params[0].detach(), torch.full((2, 2), 1 - 0.5 * 0.1 * 0.2 / 0.1))


# ---------------------------------------------------------------- torch.optim.SGD


@pytest.mark.parametrize("dtype", FP, ids=str)
@pytest.mark.parametrize("sgd", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", TORCH_FORM.values(), ids=TORCH_FORM)
def test_sgd_is_lars_without_adaptation(options, maximize, sgd, dtype):
    options = dict(lr=0.05, weight_decay=0.1, maximize=maximize, **options)
    params, their_params = make_params(dtype), make_params(dtype)
    ours = LARS(params, layer_adaptation=False, classic_momentum=False, **options)
    assert_same_steps(ours, params, torch.optim.SGD(their_params, **options, **sgd), their_params)


@pytest.mark.parametrize("options", ["momentum", "nesterov", "no momentum"])
def test_classic_momentum_is_sgd_at_a_constant_lr(options):
    """The buffer is lr times torch's. They differ once lr changes."""
    options = dict(lr=0.05, weight_decay=0.1, **TORCH_FORM[options])
    params, their_params = make_params(torch.float64), make_params(torch.float64)
    ours, theirs = LARS(params, layer_adaptation=False, **options), torch.optim.SGD(their_params, **options)
    for step in range(STEPS):
        for optimizer, of in ((ours, params), (theirs, their_params)):
            set_grads(of, step)
            optimizer.step()
    for p, q in zip(params, their_params):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
        if "momentum" in options:
            torch.testing.assert_close(
                ours.state[p]["momentum_buffer"], 0.05 * theirs.state[q]["momentum_buffer"]
            )


# ---------------------------------------------------------------- torchlars, apex LARC: wrappers around SGD


@pytest.mark.parametrize("clip", [False, True], ids=["torchlars, LARC without clip", "LARC with clip"])
@pytest.mark.parametrize("options", TORCH_FORM.values(), ids=TORCH_FORM)
def test_wrappers_of_sgd(options, clip):
    """They scale the decayed gradient in place, and the wrapped SGD steps without decay."""
    lr, weight_decay, trust_coefficient, eps = 0.3, 0.05, 0.2, 1e-8
    # Without the zero weights: torchlars takes q = 1 for them, and LARC leaves out their decay.
    params, their_params = make_params(torch.float64)[:5], make_params(torch.float64)[:5]
    ours = LARS(
        params,
        lr=lr,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        trust_clip=clip,
        classic_momentum=False,
        **options,
    )
    sgd = torch.optim.SGD(their_params, lr=lr, **options)
    for step in range(STEPS):
        set_grads(params, step)
        ours.step()
        set_grads(their_params, step)
        for p in their_params:
            w, g = p.detach().norm(), p.grad.norm()
            q = trust_coefficient * w / (g + weight_decay * w + eps)
            p.grad = (p.grad + weight_decay * p.detach()) * (min(q / lr, 1.0) if clip else q)
        sgd.step()
    for p, q in zip(params, their_params):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- MLPerf's reference, apex FusedLARS


@pytest.mark.parametrize("eps", [0.0, 1e-7])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skipped_decay", [0.0, 0.05], ids=["MLPerf", "apex"])
def test_classic_form(skipped_decay, nesterov, eps):
    """Their formula: the buffer has the opposite sign and is added.

    Skipped parameters are not adapted. MLPerf's reference does not decay them either. apex decays them,
    unless their group says otherwise.
    """
    eeta, momentum, weight_decay = 0.2, 0.9, 0.05
    params, weights = make_params(torch.float64), make_params(torch.float64)
    ours = LARS(
        split(params, dict(weight_decay=skipped_decay, layer_adaptation=False)),
        lr=0.3,
        momentum=momentum,
        weight_decay=weight_decay,
        trust_coefficient=eeta,
        eps=eps,
        nesterov=nesterov,
    )
    buffers = [torch.zeros_like(w) for w in weights]
    for step, got in enumerate(train(ours, params)):
        lr = 0.3 * (1 + step % 4)
        set_grads(weights, step)
        with torch.no_grad():
            for w, buffer in zip(weights, buffers):
                skipped = w.ndim <= 1
                scaled_lr, decay = lr, skipped_decay if skipped else weight_decay
                if not skipped and w.norm() > 0 and w.grad.norm() > 0:
                    scaled_lr = lr * eeta * w.norm() / (w.grad.norm() + weight_decay * w.norm() + eps)
                change = scaled_lr * (w.grad + decay * w)
                buffer.copy_(momentum * buffer - change)
                w.add_(momentum * buffer - change if nesterov else buffer)
        for a, b in zip(got, weights):
            torch.testing.assert_close(a, b.detach(), rtol=1e-13, atol=1e-13)
    for p, buffer in zip(params, buffers):
        torch.testing.assert_close(ours.state[p]["momentum_buffer"], -buffer, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- optax


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_optax(momentum, nesterov, weight_decay):
    """optax takes the norm of the decayed gradient."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    jax.config.update("jax_enable_x64", True)
    rates = [0.3 * (1 + step % 4) for step in range(STEPS)]
    params = make_params(torch.float64)
    ours = LARS(
        params,
        lr=0.3,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        trust_coefficient=0.2,
        decayed_norm=True,
    )
    theirs = optax.lars(
        lambda count: jax.numpy.asarray(rates)[count],
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        trust_coefficient=0.2,
    )
    weights = [jax.numpy.asarray(p.detach().numpy()) for p in params]
    state = theirs.init(weights)
    for _step, got in enumerate(train(ours, params)):
        grads = [jax.numpy.asarray(p.grad.numpy()) for p in params]
        updates, state = theirs.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        for a, b in zip(got, weights):
            torch.testing.assert_close(
                a, torch.tensor(b.tolist(), dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


# ---------------------------------------------------------------- groups that know only weight_decay


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.LayerNorm(4),
        nn.Linear(4, 2),
    ).double()
    # No parameter may be zero, because lightly does not decay zeros, but timm does.
    for p in net.parameters():
        p.data.add_(0.1)
    return net


def groups_of_timm(net):
    timm = pytest.importorskip("timm.optim")
    return timm.param_groups_weight_decay(net, weight_decay=0.05)


def groups_of_lightly(net):
    utils = pytest.importorskip("lightly.models.utils")
    decayed, others = utils.get_weight_decay_parameters([net])
    return [{"name": "net", "params": decayed}, {"name": "no decay", "params": others, "weight_decay": 0.0}]


def groups_of_trainer(net):
    """The groups that Hugging Face's Trainer passes to an optimizer's class."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # Trainer needs it

    class Optimizer(torch.optim.SGD):
        def __init__(self, groups, **options):
            self.given = copy.copy(groups)
            super().__init__([dict(group) for group in groups], **options)

    with tempfile.TemporaryDirectory() as directory:
        args = transformers.TrainingArguments(directory, weight_decay=0.05, report_to=[], use_cpu=True)
        trainer = transformers.Trainer(net, args, optimizer_cls_and_kwargs=(Optimizer, dict(lr=0.1)))
        return trainer.create_optimizer().given


FACTORIES = {"timm": groups_of_timm, "lightly": groups_of_lightly, "Trainer": groups_of_trainer}
factories = pytest.mark.parametrize("make_groups", FACTORIES.values(), ids=FACTORIES)


@factories
@pytest.mark.parametrize("implementation", [{}, dict(foreach=True)], ids=str)
@pytest.mark.parametrize("peer", ["timm", "timm, always_adapt", "timm, trust_clip", "lightly"])
def test_another_libraries_groups(peer, make_groups, implementation):
    """With layer_adaptation="decayed", only the optimizer's class has to be replaced."""
    net, their_net = make_net(), make_net()
    options = dict(lr=0.3, momentum=0.9, weight_decay=0.05, eps=1e-8)
    more = {"timm, trust_clip": dict(trust_clip=True)}.get(peer, {})
    adapted = True if peer == "timm, always_adapt" else "decayed"
    groups = make_groups(net)
    assert len(groups) == 2
    ours = LARS(
        groups,
        layer_adaptation=adapted,
        classic_momentum=False,
        trust_coefficient=0.2,
        **options,
        **more,
        **implementation,
    )
    if peer == "lightly":
        lars = pytest.importorskip("lightly.utils.lars").LARS
        theirs = lars(make_groups(their_net), trust_coefficient=0.2, **options)
    else:
        lars = pytest.importorskip("timm.optim").Lars
        always = peer == "timm, always_adapt"
        theirs = lars(make_groups(their_net), trust_coeff=0.2, always_adapt=always, **options, **more)
    assert_same_steps(ours, list(net.parameters()), theirs, list(their_net.parameters()))
    ratios = {p.shape: q.item() for p, q in ours.trust_ratios().items()}
    assert (ratios[net[0].bias.shape] == 1) == (adapted == "decayed")


# ---------------------------------------------------------------- checkpoints

PEERS = {
    "timm": (make_timm, make_ours_for_timm, dict(trust_coeff=0.2, momentum=0.9)),
    "lightly": (make_lightly, make_ours_for_lightly, dict(trust_coefficient=0.2, momentum=0.9)),
    "pytorch_optimizer": (
        lambda params, **options: make_pytorch_optimizer(split(params, {}), **options),
        make_ours_for_pytorch_optimizer,
        dict(trust_coefficient=0.2, momentum=0.9),
    ),
    "SGD": (
        lambda params, **options: torch.optim.SGD(params, **options),
        lambda params, **options: LARS(params, layer_adaptation=False, classic_momentum=False, **options),
        dict(momentum=0.9),
    ),
}


@pytest.mark.parametrize(("make_theirs", "make_ours", "options"), PEERS.values(), ids=PEERS)
def test_a_run_changes_over_in_the_middle(make_theirs, make_ours, options):
    """Loads their momentum buffers into our groups, by the recipe of docs/migration.md."""
    options = dict(options, lr=0.1, weight_decay=0.05)
    their_params = make_params(torch.float64)
    theirs = make_theirs(their_params, **options)
    list(train(theirs, their_params, range(5)))
    params = [nn.Parameter(p.detach().clone()) for p in their_params]
    ours = make_ours(params, **options)
    state = copy.deepcopy(theirs.state_dict()["state"])
    ours.load_state_dict({"state": state, "param_groups": ours.state_dict()["param_groups"]})
    assert_same_steps(ours, params, theirs, their_params, range(5, STEPS))


def test_from_torchs_momentum_to_the_classic_one():
    options = dict(lr=0.1, momentum=0.9, layer_adaptation=False)
    before, after = make_params(torch.float64), make_params(torch.float64)
    ours, other = LARS(before, classic_momentum=False, **options), LARS(after, **options)
    for step in range(STEPS):
        if step == 5:
            for p, q in zip(before, after):
                q.data.copy_(p.data)
                other.state[q]["momentum_buffer"] = 0.1 * ours.state[p]["momentum_buffer"]
        for optimizer, of in ((ours, before), (other, after)):
            set_grads(of, step)
            optimizer.step()
    for p, q in zip(before, after):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)
