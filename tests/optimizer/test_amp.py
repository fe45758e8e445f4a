"""GradScaler: an overflow skips the whole step, in any step, and gradients are divided by the scale.

With fused=True the kernels do both. Otherwise the scaler does, as with torch's own optimizers.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_lars import LARS
from stepping import same_bits

OPTIONS = {
    "classic": dict(lr=0.5, momentum=0.9, weight_decay=1e-2),
    "torch": dict(lr=0.5, momentum=0.9, weight_decay=1e-2, classic_momentum=False, dampening=0.1),
    "no momentum": dict(lr=0.5, weight_decay=1e-2),
    "no adaptation": dict(lr=0.1, momentum=0.9, nesterov=True, layer_adaptation=False),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=["fused", "foreach", "default"])
def implementation(request):
    return {} if request.param == "default" else {request.param: True}


def make_params(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in (33, 1, 0, 130)]


def set_grads(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        # Half precision holds every value times every scale used here.
        p.grad = (torch.randn(p.shape, generator=generator).bfloat16() * scale).to(p.device, p.dtype)


def scaler_step(scaler, optimizer, params, step, overflow=False):
    set_grads(params, step, scaler.get_scale())
    if overflow:
        params[0].grad[5] = torch.inf
    grads = [p.grad.clone() for p in params]
    scaler.step(optimizer)
    scaler.update()
    # The kernels unscale, so neither the scaler nor the optimizer writes gradients.
    if optimizer.param_groups[0]["fused"]:
        for p, grad in zip(params, grads):
            assert same_bits(p.grad, grad)


def scaler_takes(dtype, device) -> bool:
    """Whether torch's scaler takes gradients of this dtype. On a GPU it takes no bf16."""
    found_inf, scale = torch.zeros((), device=device), torch.ones((), device=device)
    try:
        torch._amp_foreach_non_finite_check_and_unscale_(
            [torch.zeros(1, dtype=dtype, device=device)], found_inf, scale
        )
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_step_overflows(implementation, options, dtype, master_weights, device):
    """A momentum buffer that a skipped step has made must act like none."""
    params, plain = make_params(device, dtype), make_params(device, dtype)
    options = dict(options, **implementation, master_weights=master_weights)
    optimizer, expected = LARS(params, **options), LARS(plain, **options)
    # The scaler reads its first scale on the device of the first tensor that it scales.
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    scaler.scale(torch.zeros((), device=device))
    before = [p.detach().clone() for p in params]
    if dtype == torch.float16 and "fused" not in implementation:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            scaler_step(scaler, optimizer, params, 0)
        return
    if not scaler_takes(dtype, device):
        with pytest.raises(NotImplementedError, match="not implemented for 'BFloat16'"):
            scaler_step(scaler, optimizer, params, 0)
        return
    for _ in range(2):
        scaler_step(scaler, optimizer, params, 0, overflow=True)
    for p, old in zip(params, before):
        assert same_bits(p, old)
        buffer = optimizer.state[p].get("momentum_buffer")
        assert buffer is None or not buffer.any()
    for step in range(3):
        scaler_step(scaler, optimizer, params, step)
        set_grads(plain, step)
        expected.step()
    for p, q in zip(params, plain):
        assert same_bits(p, q)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_power_of_two_scales_leave_no_trace(implementation, options, device):
    """Scaling by 2^k is exact in fp32. So training with the scaler gives the same bits as without."""
    params, plain = make_params(device), make_params(device)
    optimizer, expected = LARS(params, **options, **implementation), LARS(plain, **options, **implementation)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    scaler.scale(torch.zeros((), device=device))
    scales = set()
    for step in range(8):
        scales.add(scaler.get_scale())
        skipped = step in (3, 4)
        scaler_step(scaler, optimizer, params, step, overflow=skipped)
        if not skipped:
            set_grads(plain, step)
            expected.step()
    assert len(scales) > 2
    for p, q in zip(params, plain):
        assert same_bits(p, q)


@pytest.mark.parametrize("found", [1.0, 2.0, torch.inf])
def test_found_inf_is_a_sum_over_devices(implementation, found, device):
    params = make_params(device)
    optimizer = LARS(params, lr=0.5, momentum=0.9, **implementation)
    set_grads(params, 0)
    optimizer.step()
    before = [(p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()) for p in params]
    ratios = {p: q.clone() for p, q in optimizer.trust_ratios().items()}
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor([found], device=device)
    set_grads(params, 1)
    params[0].grad[2] = torch.nan
    optimizer.step()
    for p, (old, old_buffer) in zip(params, before):
        assert same_bits(p, old)
        assert same_bits(optimizer.state[p]["momentum_buffer"], old_buffer)
        assert same_bits(optimizer.trust_ratios()[p], ratios[p])


# ---------------------------------------------------------------- who unscales


def test_who_unscales_is_said_as_torch_says_it(device):
    """For each optimizer, and for fused=True only: frameworks read _step_supports_amp_scaling."""
    for optimizer_class in (LARS, torch.optim.SGD):
        for options in ({}, dict(fused=False), dict(foreach=True), dict(fused=None)):
            optimizer = optimizer_class(make_params(device), lr=0.5, **options)
            assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        assert optimizer_class(make_params("cpu"), lr=0.5, fused=True)._step_supports_amp_scaling


def test_who_unscales_follows_the_groups():
    """The kernels unscale if all groups ask for them."""

    def make(*fused):
        return LARS([{"params": p, "fused": f} for p, f in zip(make_params("cpu"), fused)], lr=0.5)

    optimizer = make(True, True)
    assert optimizer._step_supports_amp_scaling
    assert not make(True, None)._step_supports_amp_scaling
    for twin in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin._step_supports_amp_scaling
    # How a process computes does not come from the saved run.
    other = make(None, None)
    other.load_state_dict(optimizer.state_dict())
    assert not other._step_supports_amp_scaling
    optimizer.load_state_dict(other.state_dict())
    assert optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": make_params("cpu"), "fused": True})
    assert optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": make_params("cpu")})
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_knows_whether_it_skipped(implementation, overflow, device):
    """By default step() is not called after an overflow. Accelerate's step_was_skipped relies on that."""
    params = make_params(device)
    optimizer = LARS(params, lr=0.5, **implementation)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    scaler.scale(torch.zeros((), device=device))
    set_grads(params, 0, 64.0)
    if overflow:
        params[0].grad[0] = torch.inf
    before = params[0].detach().clone()
    scaler.step(optimizer)
    assert bool(calls) == (not overflow or "fused" in implementation)
    assert same_bits(params[0], before) == overflow


def test_lightning_clips_gradients():
    """Its plugins for mixed precision refuse to clip if an optimizer unscales by itself."""
    amp = pytest.importorskip("pytorch_lightning.plugins.precision")
    plugin = amp.MixedPrecision("16-mixed", "cpu")
    params = make_params("cpu")
    set_grads(params, 0)
    plugin.clip_gradients(LARS(params, lr=0.5), 0.1)
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.1), rtol=1e-4, atol=0)
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        plugin.clip_gradients(LARS(params, lr=0.5, fused=True), 0.1)


def test_accelerate_reports_a_skipped_step():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    params = make_params("cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.zeros(()))
    optimizer = accelerate.optimizer.AcceleratedOptimizer(LARS(params, lr=0.5), scaler=scaler)
    for overflow in (False, True, False):
        set_grads(params, 0, scaler.get_scale())
        if overflow:
            params[0].grad[0] = torch.inf
        optimizer.step()
        assert optimizer.step_was_skipped == overflow


# ---------------------------------------------------------------- around a scaler


def test_unscale_then_clip(implementation, device):
    """After scaler.unscale_ the scaler passes no grad_scale, and clipping sees the true gradients."""
    params, plain = make_params(device), make_params(device)
    optimizer = LARS(params, lr=0.5, momentum=0.9, **implementation)
    expected = LARS(plain, lr=0.5, momentum=0.9, **implementation)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    scaler.scale(torch.zeros((), device=device))
    for step in range(3):
        set_grads(params, step, 256.0)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, 0.1)
        scaler.step(optimizer)
        scaler.update()
        set_grads(plain, step)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain, 0.1), rtol=1e-6, atol=0)
        expected.step()
    for p, q in zip(params, plain):
        assert same_bits(p, q)


def test_accumulated_gradients(implementation, device):
    """Two micro-batches of half the loss under the scaler equal one batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(8, 6, generator=generator).to(device),
        torch.randn(8, 3, generator=generator).to(device),
    )
    models = [nn.Linear(6, 3).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (LARS(model.parameters(), lr=0.5, momentum=0.9, **implementation) for model in models)
    scaler = torch.amp.GradScaler(device, init_scale=128.0)
    for _ in range(3):
        nn.functional.mse_loss(models[0](x), y).backward()
        first.step()
        first.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            scaler.scale(nn.functional.mse_loss(models[1](x[half]), y[half]) / 2).backward()
        scaler.step(second)
        scaler.update()
        second.zero_grad()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        # Gradients are summed in another order, over three steps with trust coefficient 0.001.
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


def test_two_optimizers_share_a_scaler(implementation, device):
    """An overflow in one model's gradients only skips that model's optimizer."""
    left, right = make_params(device), make_params(device)
    optimizers = [LARS(params, lr=0.5, momentum=0.9, **implementation) for params in (left, right)]
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    scaler.scale(torch.zeros((), device=device))
    before = [p.detach().clone() for p in left]
    for params in (left, right):
        set_grads(params, 0, 64.0)
    left[0].grad[0] = torch.nan
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    for p, q, old in zip(left, right, before):
        assert same_bits(p, old)
        assert p.numel() == 0 or not same_bits(q, old)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_overflow_without_a_scaler_reaches_the_weights(implementation, value, device):
    """As in torch.optim.SGD: broken weights must not look healthy."""
    params = make_params(device)
    optimizer = LARS(params, lr=0.5, momentum=0.9, **implementation)
    set_grads(params, 0)
    params[0].grad[7] = value
    optimizer.step()
    assert not params[0][7].isfinite()
    assert params[3].isfinite().all()
