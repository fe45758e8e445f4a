"""Lars in TorchScript: scripted, saved with its state, and trained on with and without Python."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import cpp_program
import fused_lars
from python_program import environment
from scripted_trainer import Trainer, batches

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")

STEPS = 8
HALF = 4


@pytest.fixture(autouse=True)
def no_fuser():
    """On a GPU, TorchScript compiles its own kernels after some calls, and these round differently."""
    before = torch._C._jit_can_fuse_on_gpu()
    torch._C._jit_override_can_fuse_on_gpu(False)
    yield
    torch._C._jit_override_can_fuse_on_gpu(before)


def train(module, some_batches, method="train_step") -> list[float]:
    return [getattr(module, method)(*batch).item() for batch in some_batches]


def assert_same_bits(module, other):
    ours, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert repr(module.optimizer) == repr(other.optimizer)
    (_, settings, ids, buffers), _ = module.optimizer.__getstate__()
    (_, other_settings, other_ids, other_buffers), _ = other.optimizer.__getstate__()
    assert (settings, ids) == (other_settings, other_ids)
    assert all(torch.equal(a, b) for a, b in zip(buffers, other_buffers))


@pytest.mark.parametrize("method", ["train_step", "train_step_by_node"])
def test_scripted_training_gives_the_eager_bits(device, method):
    eager, scripted = Trainer(device), torch.jit.script(Trainer(device))
    losses = train(eager, batches(STEPS, device), method)
    assert train(scripted, batches(STEPS, device), method) == losses
    assert_same_bits(eager, scripted)
    assert "states=4" in repr(scripted.optimizer)


def test_both_ways_to_step_give_the_same_bits(device):
    one, other = Trainer(device), Trainer(device)
    train(one, batches(STEPS, device), "train_step")
    train(other, batches(STEPS, device), "train_step_by_node")
    assert_same_bits(one, other)


@pytest.fixture
def half(device, tmp_path):
    """A run saved half-way. Returns its path, that of the batches left, and the uninterrupted run."""
    scripted = torch.jit.script(Trainer(device))
    all_batches = batches(STEPS, device)
    train(scripted, all_batches[:HALF])
    scripted.save(tmp_path / "half.pt")
    torch.save(all_batches[HALF:], tmp_path / "batches.pt")
    uninterrupted = torch.jit.script(Trainer(device))
    train(uninterrupted, all_batches)
    return tmp_path / "half.pt", tmp_path / "batches.pt", uninterrupted


def test_trains_on_in_a_fresh_python(half, tmp_path):
    saved, rest, uninterrupted = half
    code = f"""
import torch, fused_lars
torch._C._jit_override_can_fuse_on_gpu(False)
module = torch.jit.load({str(saved)!r})
assert isinstance(module.optimizer, fused_lars.Lars)
for batch in torch.load({str(rest)!r}):
    module.train_step(*batch)
module.save({str(tmp_path / "end.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment())
    assert_same_bits(torch.jit.load(tmp_path / "end.pt"), uninterrupted)


@pytest.mark.parametrize("device", ["cpu"])
def test_trains_on_in_a_program_without_python(half, tmp_path):
    saved, rest, uninterrupted = half
    printed = cpp_program.run("train_scripted", saved, rest, tmp_path / "end.pt")
    assert printed.strip() == repr(uninterrupted.optimizer)
    assert_same_bits(torch.jit.load(tmp_path / "end.pt"), uninterrupted)


def test_the_program_without_python_has_none():
    libraries = cpp_program.libraries(cpp_program.path("train_scripted"))
    assert {"libfused_lars.so", "libtorch_cpu.so"} <= libraries
    assert not [name for name in libraries if "python" in name]


def test_a_loaded_optimizer_can_be_changed(half):
    saved, *_ = half
    module = torch.jit.load(saved)
    module.optimizer.set_learning_rate(0.0)
    before = [p.clone() for p in module.parameters()]
    module.optimizer.clear_state()
    train(module, batches(1, next(module.parameters()).device))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.parametrize("move", ["double", "cuda"])
def test_a_loaded_module_that_is_moved_keeps_its_momentum(move, tmp_path):
    """The module moves its weights, but not the optimizer that it holds."""
    if move == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    scripted = torch.jit.script(Trainer())
    train(scripted, batches(HALF))
    scripted.save(tmp_path / "half.pt")
    moved, expected = torch.jit.load(tmp_path / "half.pt"), Trainer()
    expected.load_state_dict(scripted.state_dict())
    (version, settings, ids, buffers), name = scripted.optimizer.__getstate__()
    if move == "double":
        moved.double()
        expected.double()
        state = (version, settings, ids, [buffer.double() for buffer in buffers])
        rest = [(x.double(), y) for x, y in batches(STEPS)[HALF:]]
    else:
        moved.to("cuda")
        expected.to("cuda")
        state = (version, settings, ids, [buffer.cuda() for buffer in buffers])
        rest = batches(STEPS, "cuda")[HALF:]
    expected.optimizer = torch.ScriptObject.__new__(torch.ScriptObject)
    expected.optimizer.__setstate__((state, name))
    assert train(moved, rest) == train(expected, rest)
    assert_same_bits(moved, expected)


def test_errors_inside_of_scripted_code_are_runtime_errors():
    @torch.jit.script
    def make(lr: float):
        return (
            torch.classes.fused_lars.Lars(lr)
            .with_momentum(0.5)
            .with_weight_decay(0.1)
            .with_trust_coefficient(1.0)
        )

    assert repr(make(0.5)) == "Lars(lr=0.5, momentum=0.5, weight_decay=0.1, trust_coefficient=1, states=0)"
    with pytest.raises(RuntimeError, match="Invalid learning rate: -1; allowed: finite and >= 0"):
        make(-1.0)
    with pytest.raises(ValueError, match="Invalid learning rate: -1; allowed: finite and >= 0"):
        torch.classes.fused_lars.Lars(-1.0)


def test_the_ops_run_in_the_interpreter(device):
    @torch.jit.script
    def step(param: torch.Tensor, grad: torch.Tensor, momentum_buffer: torch.Tensor):
        norms = torch.ops.fused_lars.squared_norms([param], [grad])
        torch.ops.fused_lars.step_(
            [param], [grad], [momentum_buffer], [], [], [], [], [1], lr=[0.5], momentum=[0.9],
            weight_decay=[0.1], trust_coefficient=[0.02], eps=[0.0], dampening=[0.0], nesterov=[False],
            maximize=[False], trust_clip=[False], layer_adaptation=[True], decayed_norm=[False],
            classic_momentum=[True], master_weights=[False], stochastic_rounding=[False],
            squared_norms=norms,
        )  # fmt: skip

    param, grad = torch.randn(50).to(device), torch.randn(50).to(device)
    other, buffer = param.clone(), torch.zeros_like(param)
    lars = fused_lars.Lars(0.5).with_momentum(0.9).with_weight_decay(0.1).with_trust_coefficient(0.02)
    for _ in range(3):
        step(param, grad, buffer)
        lars.step(0, other, grad)
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- reads before and after the op in scripts
# TorchScript merges two reads of a tensor if it sees no write between them.


def step_(weight: Tensor, grad: Tensor, buffer: Tensor):
    torch.ops.fused_lars.step_(
        [weight], [grad], [buffer], [], [], [], [], [1], lr=[0.5], momentum=[0.9], weight_decay=[0.1],
        trust_coefficient=[0.2], eps=[0.0], dampening=[0.0], nesterov=[False], maximize=[False],
        trust_clip=[False], layer_adaptation=[True], decayed_norm=[False], classic_momentum=[True],
        master_weights=[False], stochastic_rounding=[False],
    )  # fmt: skip


def step_tensor_lr(weight: Tensor, grad: Tensor, buffer: Tensor):
    torch.ops.fused_lars.step_(
        [weight], [grad], [buffer], [], [], [], [], [1], lr=[torch.full([], 0.5)], momentum=[0.9],
        weight_decay=[0.1], trust_coefficient=[0.2], eps=[0.0], dampening=[0.0], nesterov=[False],
        maximize=[False], trust_clip=[False], layer_adaptation=[True], decayed_norm=[False],
        classic_momentum=[True], master_weights=[False], stochastic_rounding=[False],
    )  # fmt: skip


def reference_step_(weight: Tensor, grad: Tensor, buffer: Tensor):
    torch.ops.fused_lars.reference_step_(
        [weight], [grad], [buffer], [], [], [], [], [1], lr=[0.5], momentum=[0.9], weight_decay=[0.1],
        trust_coefficient=[0.2], eps=[0.0], dampening=[0.0], nesterov=[False], maximize=[False],
        trust_clip=[False], layer_adaptation=[True], decayed_norm=[False], classic_momentum=[True],
        master_weights=[False], stochastic_rounding=[False],
    )  # fmt: skip


class Model(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3).to(device).requires_grad_(False)
        self.register_buffer("momentum_buffer", torch.zeros_like(self.layer.weight))
        self.register_buffer("grad", torch.ones_like(self.layer.weight))

    def loss(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum()

    def step(self):
        step_(self.layer.weight, self.grad, self.momentum_buffer)


class StraightLine(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        before, buffer_before = self.loss(x), self.momentum_buffer.sum()
        self.step()
        return [before, self.loss(x), buffer_before, self.momentum_buffer.sum()]


class TensorLr(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        before = self.loss(x)
        step_tensor_lr(self.layer.weight, self.grad, self.momentum_buffer)
        return [before, self.loss(x)]


class Reference(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        before = self.loss(x)
        reference_step_(self.layer.weight, self.grad, self.momentum_buffer)
        return [before, self.loss(x)]


class TwoSteps(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        losses = [self.loss(x)]
        self.step()
        losses.append(self.loss(x))
        self.step()
        losses.append(self.loss(x))
        return losses


class Loop(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        losses = [self.loss(x)]
        for _ in range(3):
            self.step()
        losses.append(self.loss(x))
        for _ in range(2):
            losses.append(self.loss(x))
            self.step()
        return losses


class Branch(Model):
    def forward(self, x: Tensor) -> list[Tensor]:
        before = self.loss(x)
        if bool(before > 0):
            self.step()
            inside = self.loss(x)
        else:
            inside = before
        return [before, inside, self.loss(x)]


class View(Model):
    """The stepped tensor is read under another name."""

    def forward(self, x: Tensor) -> list[Tensor]:
        row, transposed = self.layer.weight[0], self.layer.weight.t()
        before = [row.sum(), transposed.sum()]
        step_(transposed, self.grad.t(), self.momentum_buffer.t())
        before += [row.sum(), transposed.sum(), self.loss(x)]
        return before


def scripted(module, x, tmp_path):
    return torch.jit.script(module)


def saved(module, x, tmp_path):
    torch.jit.script(module).save(tmp_path / "module.pt")
    return torch.jit.load(tmp_path / "module.pt")


def frozen(module, x, tmp_path):
    return torch.jit.freeze(torch.jit.script(module.eval()))


def optimized_for_inference(module, x, tmp_path):
    return torch.jit.optimize_for_inference(torch.jit.script(module.eval()))


@pytest.mark.parametrize("make", [scripted, saved, frozen, optimized_for_inference])
@pytest.mark.parametrize("kind", [StraightLine, TensorLr, Reference, TwoSteps, Loop, Branch, View])
def test_scripts_read_what_a_step_has_written(kind, make, device, tmp_path):
    torch.manual_seed(0)
    eager, x = kind(device), torch.randn(4, 5).to(device)
    script = make(copy.deepcopy(eager), x, tmp_path)
    losses = []
    for _ in range(4):  # it is optimized after the first calls
        expected, got = eager(x), script(x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        losses += [loss.item() for loss in expected[:2]]
    assert len(set(losses)) > 4, "the steps move what is read"
