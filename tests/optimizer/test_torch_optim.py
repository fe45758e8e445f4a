"""What torch and its users expect of any torch.optim.Optimizer."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_lars import LARS
from stepping import same_bits

IMPLEMENTATIONS = ["fused", "foreach"]
OPTIONS = {
    "classic": dict(lr=0.5, momentum=0.9, weight_decay=0.1),
    "dampening": dict(lr=0.5, momentum=0.9, classic_momentum=False, dampening=0.3),
    "master": dict(lr=0.5, momentum=0.9, master_weights=True),
    "clip": dict(lr=0.5, trust_clip=True),
    "tensor lr": dict(lr=torch.tensor(0.5), momentum=0.9),
}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return {request.param: True}


def make_model(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).to(device, dtype)


def batch(model, step=0):
    p = next(model.parameters())
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator).to(p.device, p.dtype)


def backward(model, step=0):
    model.zero_grad()
    loss = model(batch(model, step)).square().mean()
    loss.backward()
    return loss


def assert_same_models(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert same_bits(p, q)


# ---------------------------------------------------------------- closures and hooks


def test_closure(implementation, device):
    model, expected = make_model(device), make_model(device)
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9, **implementation)
    other = LARS(expected.parameters(), lr=0.5, momentum=0.9, **implementation)

    def closure():
        assert torch.is_grad_enabled()
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss == backward(expected)
    assert other.step() is None
    assert_same_models(model, expected)


def test_step_hooks():
    model = make_model()
    optimizer = LARS(model.parameters(), lr=0.5)
    weight, seen = model[0].weight, []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(weight.detach().clone()))
    start = weight.detach().clone()
    backward(model)
    optimizer.step()
    assert len(seen) == 2
    assert same_bits(seen[0], start)
    assert not same_bits(seen[1], start)
    assert same_bits(seen[1], weight)


def test_state_dict_hooks():
    """They see the same as with any optimizer: the dict to load unchanged, then the loaded optimizer."""
    model = make_model(dtype=torch.bfloat16)
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9, master_weights=True)
    backward(model)
    optimizer.step()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))

    def saved(o, state_dict):
        calls.append("saved")
        state_dict["note"] = "kept"

    optimizer.register_state_dict_post_hook(saved)
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == "kept"

    def load(o, state_dict):
        calls.append(("load", state_dict["note"]))
        changed = copy.copy(state_dict)
        changed["param_groups"] = [dict(group, lr=0.25) for group in state_dict["param_groups"]]
        return changed

    def loaded(o):
        state = o.state[model[0].weight]
        calls.append(("loaded", state["master_param"].dtype, o.param_groups[0]["foreach"]))

    optimizer.register_load_state_dict_pre_hook(load)
    optimizer.register_load_state_dict_post_hook(loaded)
    state_dict["param_groups"][0]["foreach"] = True
    optimizer.load_state_dict(state_dict)
    assert calls == ["save", "saved", ("load", "kept"), ("loaded", torch.float32, None)]
    assert optimizer.param_groups[0]["lr"] == 0.25
    # Loading leaves no hook behind.
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


# ---------------------------------------------------------------- parameters


def test_named_parameters():
    model = make_model()
    optimizer = LARS(model.named_parameters(), lr=0.5, momentum=0.9)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    expected = make_model()
    other = LARS(expected.parameters(), lr=0.5, momentum=0.9)
    for m, o in ((model, optimizer), (expected, other)):
        backward(m)
        o.step()
    assert_same_models(model, expected)
    optimizer.load_state_dict(optimizer.state_dict())
    model[3].weight.grad = model[3].weight.grad.to_sparse()
    with pytest.raises(ValueError, match=r"parameter '3\.weight'"):
        optimizer.step()


def test_repr_shows_the_options():
    text = repr(LARS([nn.Parameter(torch.ones(1))], lr=0.5, trust_coefficient=0.02))
    assert text.startswith("LARS (")
    assert "trust_coefficient: 0.02" in text
    assert "classic_momentum: True" in text


def test_zero_grad_then_step_changes_nothing(implementation):
    model = make_model()
    optimizer = LARS(model.parameters(), lr=0.5, **implementation)
    backward(model)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    optimizer.step()
    assert_same_models(model, before)


# ---------------------------------------------------------------- what torch builds on optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dcp_state_probe(options, dtype, implementation, device):
    """DCP runs a real step with zero gradients and lr = 0, to learn what state there is."""
    model = make_model(device, dtype)
    options = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    optimizer = LARS(model.parameters(), **options, **implementation)
    before = copy.deepcopy(model)
    saved = get_optimizer_state_dict(model, optimizer)
    assert_same_models(model, before)
    assert optimizer.param_groups[0]["lr"] is options["lr"]
    has_state = options.get("momentum", 0) > 0
    assert all((p in optimizer.state) == has_state for p in model.parameters())
    for state in optimizer.state.values():
        assert not state["momentum_buffer"].any()
        assert not state.get("step", torch.tensor(0)).isnan().any()
    if has_state:
        assert "0.weight" in saved["state"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dcp_round_trip(options, implementation):
    """A run resumed through DCP's state dicts is the uninterrupted one, masters in fp32 included."""
    runs = []
    for _ in range(2):
        model = make_model(dtype=torch.bfloat16)
        values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        runs.append((model, LARS(model.parameters(), **values, **implementation)))
    (model, optimizer), (resumed, other) = runs
    for step in range(3):
        backward(model, step)
        optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, saved)
    for step in range(3, 6):
        for m, o in runs:
            backward(m, step)
            o.step()
    assert_same_models(model, resumed)


def test_swap_in_params_and_state(implementation):
    """A step on swapped-in tensors works, and does not change the live optimizer."""
    if not hasattr(torch.optim, "swap_in_optimizer_params_and_state"):
        pytest.skip("needs torch 2.14")
    model, twin = make_model(), make_model()
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9, **implementation)
    expected = LARS(twin.parameters(), lr=0.5, momentum=0.9, **implementation)
    for m, o in ((model, optimizer), (twin, expected)):
        backward(m)
        o.step()
    live = copy.deepcopy(model)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = [p.grad for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, state):
        for p, grad in zip(params.values(), grads):
            p.grad = grad
        optimizer.step()
    expected.step()
    for p, q in zip(params.values(), twin.parameters()):
        assert same_bits(p, q)
    for i, p in enumerate(twin.parameters()):
        assert same_bits(state["state"][i]["momentum_buffer"], expected.state[p]["momentum_buffer"])
    assert_same_models(model, live)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())


def test_apply_optimizer_in_backward(implementation):
    model, expected = make_model(), make_model()
    options = dict(lr=0.5, momentum=0.9, **implementation)
    apply_optimizer_in_backward(LARS, model.parameters(), options)
    optimizer = LARS(expected.parameters(), **options)
    for step in range(3):
        model(batch(model, step)).square().mean().backward()
        backward(expected, step)
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert_same_models(model, expected)


def test_step_in_a_post_accumulate_grad_hook(implementation):
    """This is the public way to step an optimizer in backward."""
    model, expected = make_model(), make_model()
    optimizers = {p: LARS([p], lr=0.5, momentum=0.9, **implementation) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    optimizer = LARS(expected.parameters(), lr=0.5, momentum=0.9, **implementation)
    for i in range(3):
        model(batch(model, i)).square().mean().backward()
        backward(expected, i)
        optimizer.step()
    assert_same_models(model, expected)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_model(average, implementation):
    model = make_model()
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9, trust_coefficient=0.1, **implementation)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if average == "ema" else None)
    seen = []
    for step in range(4):
        backward(model, step)
        optimizer.step()
        averaged.update_parameters(model)
        seen.append(model[0].weight.detach().clone())
    mean = seen[0]
    for i, x in enumerate(seen[1:], 2):
        mean = mean.lerp(x, 0.5 if average == "ema" else 1 / i)
    torch.testing.assert_close(averaged.module[0].weight, mean)


# ---------------------------------------------------------------- wrappers


def dict_of(optimizer):
    """As Lightning's wrapper did for years: another object with the attributes of that moment."""
    wrapper = LARS.__new__(LARS)
    wrapper.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    return wrapper


def lightning(optimizer):
    core = pytest.importorskip("pytorch_lightning.core.optimizer")
    return core.LightningOptimizer(optimizer)


def accelerate(optimizer):
    """AcceleratedOptimizer does not show the attributes of the optimizer inside."""
    module = pytest.importorskip("accelerate")
    module.Accelerator(cpu=True)
    return module.optimizer.AcceleratedOptimizer(optimizer).optimizer


@pytest.mark.parametrize("wrap", [copy.copy, dict_of, lightning, accelerate], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stepped", [False, True])
def test_trust_ratios_through_a_wrapper(wrap, stepped):
    """It shows the last step's ratios, whether it is made before or after the first step."""
    model = make_model()
    optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9)
    if stepped:
        backward(model)
        optimizer.step()
    wrapper = wrap(optimizer)
    for step in range(1, 3):
        backward(model, step)
        optimizer.step()
        ratios = optimizer.trust_ratios()
        assert list(ratios) == list(model.parameters())
        assert wrapper.trust_ratios() == ratios


def test_a_shallow_copy_steps_what_it_was_copied_from():
    models = make_model(), make_model()
    optimizer, expected = (LARS(model.parameters(), lr=0.5, momentum=0.9) for model in models)
    for step in range(4):
        for model, o in zip(models, (optimizer, expected)):
            backward(model, step)
            (copy.copy(o) if o is optimizer and step % 2 else o).step()
        ratios = zip(optimizer.trust_ratios().values(), expected.trust_ratios().values(), strict=True)
        assert all(q == r for q, r in ratios)
    assert_same_models(*models)


class Classifier(nn.Sequential):
    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer(tmp_path):
    """It wraps the optimizer, schedules it, saves it and resumes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(16)]
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=6,
        save_steps=3,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    options = dict(lr=1.0, momentum=0.9, layer_adaptation="decayed", trust_coefficient=0.02)
    trainers = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = Classifier(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        trainer = transformers.Trainer(
            model, args, train_dataset=data, optimizer_cls_and_kwargs=(LARS, options)
        )
        before = copy.deepcopy(model.state_dict())
        trainer.train(resume_from_checkpoint=checkpoint)
        assert all(not torch.equal(before[name], x) for name, x in model.state_dict().items())
        trainers.append(trainer)
    assert_same_models(*(trainer.model for trainer in trainers))
    ratios = trainers[0].optimizer.optimizer.trust_ratios()
    assert [ratios[p] == 1 for p in trainers[0].model.parameters()] == [False, True, True, True, False, True]


def test_inference_mode_parameters():
    """Tensors made in inference mode have no version to increase."""
    with torch.inference_mode():
        param, grad = torch.ones(3), torch.ones(3)
        optimizer = LARS([param], lr=1.0, trust_coefficient=0.5)
        param.grad = grad
        optimizer.step()
        assert param.eq(0.5).all()


def test_training_moves_the_loss(implementation, device):
    model = make_model(device)
    optimizer = LARS(model.parameters(), lr=5.0, momentum=0.9, trust_coefficient=0.01, **implementation)
    losses = []
    for _ in range(30):
        losses.append(backward(model).item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
