"""fused_lars.Lars, keyed by parameter id, from eager Python. tests/cpp/test_lars.cpp tests it in C++."""

import copy
import copyreg
import inspect
import io
import pickle
import subprocess
import sys
import typing

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_lars
import reference
from fused_lars import Lars
from paths import ROOT
from python_program import environment

RULE = reference.Rule(lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02)


def make() -> Lars:
    return (
        Lars(RULE.lr)
        .with_momentum(RULE.momentum)
        .with_weight_decay(RULE.weight_decay)
        .with_trust_coefficient(RULE.trust_coefficient)
    )


def tensors(device, *shapes, seed=0, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


class Ops(TorchDispatchMode):
    """Counts the calls of this library's ops."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_lars":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_is_one_class_with_the_torchscript_one():
    lars = Lars(0.1)
    assert isinstance(lars, Lars)
    assert isinstance(torch.classes.fused_lars.Lars(0.1), Lars)
    assert not isinstance(0.1, Lars)
    assert not isinstance(torch.jit.script(torch.nn.Linear(1, 1))._c, Lars)


def test_declares_the_methods_of_the_torchscript_class():
    """Type checkers, help() and the API page see the declared methods. Programs call the others."""
    lars = Lars(0.1)
    declared = {name: value for name, value in vars(Lars).items() if not name.startswith("_")}
    assert sorted(declared) == sorted(name for name in lars._method_names() if not name.startswith("_"))
    for name, method in declared.items():
        schema = lars._get_method(name).schema
        hints = typing.get_type_hints(method)
        returned = hints.pop("return")
        assert list(inspect.signature(method).parameters)[1:] == [a.name for a in schema.arguments[1:]], name
        for argument in schema.arguments[1:]:
            assert torch.jit.annotations.try_ann_to_type(hints[argument.name], None) == argument.type, name
        if returned is Lars:
            assert schema.returns[0].type == lars._type(), name
        else:
            assert torch.jit.annotations.try_ann_to_type(returned, None) == schema.returns[0].type, name


def test_declared_methods_are_those_of_the_object(device):
    (weight,) = tensors(device, (4,))
    one, other = weight.clone(), weight.clone()
    make().step(0, one, weight)
    assert isinstance(Lars.with_momentum(Lars(0.1), 0.5), Lars)
    Lars.step(make(), 0, other, weight)
    assert torch.equal(one, other)
    assert not torch.equal(one, weight)


def test_repr_and_settings(device):
    lars = make()
    assert isinstance(lars.with_momentum(0.9), Lars)
    lars.step(4, *tensors(device, (3, 2), (3, 2)))
    text = "Lars(lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02, states=1)"
    assert repr(lars) == str(lars) == f"{lars}" == text
    lars.set_learning_rate(0.25)
    assert lars.learning_rate() == 0.25
    lars.clear_state()
    assert repr(lars) == text.replace("lr=0.5", "lr=0.25").replace("states=1", "states=0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_follows_the_rule(device, dtype):
    lars = make()
    (weight,) = tensors(device, (37, 150), dtype=dtype)
    expected, velocity = weight.double().cpu().numpy().copy(), None
    for seed in range(1, 4):
        (grad,) = tensors(device, (37, 150), seed=seed, dtype=dtype)
        lars.step(0, weight, grad)
        result = reference.step(expected, grad.double().cpu().numpy(), velocity, RULE)
        expected, velocity = result.weight, result.momentum_buffer
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        weight.double().cpu(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("decayed_norm", [False, True])
def test_gives_the_bits_of_the_optimizer_class(device, decayed_norm):
    shapes = [(64, 9), (300,), (), (0, 4)]
    weights = tensors(device, *shapes)
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = fused_lars.LARS(
        params,
        RULE.lr,
        RULE.momentum,
        weight_decay=RULE.weight_decay,
        trust_coefficient=RULE.trust_coefficient,
        decayed_norm=decayed_norm,
        fused=True,
    )
    together, apart, nodes = (make().with_decayed_norm(decayed_norm) for _ in range(3))
    alone, leaves = [w.clone() for w in weights], [w.clone().requires_grad_() for w in weights]
    for seed in range(1, 4):
        for values, param, leaf in zip(tensors(device, *shapes, seed=seed), params, leaves):
            param.grad, leaf.grad = values, values
        optimizer.step()
        together.step_all([5, 6, 7, 8], weights, [p.grad for p in params])
        for i, (weight, param) in enumerate(zip(alone, params)):
            apart.step(i, weight, param.grad)
            nodes.step_graph_node(leaves, i)
    for weight, other, leaf, param in zip(weights, alone, leaves, params):
        assert torch.equal(weight, param)
        assert torch.equal(other, param)
        assert torch.equal(leaf, param)


def test_step_all_is_one_op_call(device):
    weights, grads = tensors(device, *[(7,)] * 50), tensors(device, *[(7,)] * 50, seed=1)
    lars = make()
    with Ops() as ops:
        lars.step_all(list(range(50)), weights, grads)
    assert ops.names == ["fused_lars::step_"]


def test_nodes_of_a_graph(device):
    weight, frozen, unused = tensors(device, (4,), (4,), (4,))
    graph = [weight.requires_grad_(), frozen, unused.requires_grad_()]
    (weight * frozen).sum().backward()
    before = [leaf.detach().clone() for leaf in graph]
    lars = make()
    lars.step_graph_node(graph, 0)
    lars.step_graph_node(graph, 1)
    with pytest.raises(ValueError, match="node 2 of the graph requires grad and has no gradient"):
        lars.step_graph_node(graph, 2)
    with pytest.raises(ValueError, match="node 3 is not in the graph"):
        lars.step_graph_node(graph, 3)
    with pytest.raises(ValueError, match="node -1 is not in the graph"):
        lars.step_graph_node(graph, -1)
    assert not torch.equal(graph[0], before[0])
    assert torch.equal(graph[1], before[1])
    assert torch.equal(graph[2], before[2])
    assert graph[0].is_leaf
    assert graph[0].requires_grad


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda lars, w, g: Lars(-1.0), "Invalid learning rate: -1; allowed: finite and >= 0"),
        (lambda lars, w, g: Lars(float("nan")), "Invalid learning rate: nan"),
        (lambda lars, w, g: lars.set_learning_rate(float("inf")), "Invalid learning rate: inf"),
        (lambda lars, w, g: lars.with_momentum(1.0), "Invalid momentum value: 1; allowed: >= 0 and < 1"),
        (lambda lars, w, g: lars.with_weight_decay(-1.0), "Invalid weight_decay value: -1"),
        (lambda lars, w, g: lars.with_trust_coefficient(0.0), "Invalid trust_coefficient value: 0"),
        (
            lambda lars, w, g: lars.step(7, w, g[:2]),
            r"the gradient of parameter 7 has shape \[2\]; expected the shape of its weights, \[4\]",
        ),
        (lambda lars, w, g: lars.step(7, w, g.to_sparse()), "layout Sparse"),
        (lambda lars, w, g: lars.step(7, w, g.half()), "dtype Half; allowed for a parameter of Float: Float"),
        (lambda lars, w, g: lars.step(7, w.long(), g), "dtype Long; allowed: Float, Double, Half, BFloat16"),
        (lambda lars, w, g: lars.step(7, w, g.to("meta")), "is on meta"),
        (
            lambda lars, w, g: lars.step_all([0, 7], [w], [g]),
            "have 2, 1 and 1 entries; expected equally many",
        ),
        (lambda lars, w, g: lars.step_all([7, 7], [w, w + 1], [g, g]), "parameter id 7 comes more than once"),
        (
            lambda lars, w, g: lars.step_all([7, 8], [w, w], [g, g]),
            "the weights of parameter 8 are another parameter's as well",
        ),
        (lambda lars, w, g: lars.step_all([7, 8], [w, w + 1], [g, g.half()]), "grads.1. has dtype Half"),
    ],
)
def test_bad_input_is_a_value_error_and_changes_nothing(device, fault, message):
    lars = make()
    weight, grad = tensors(device, (4,), (4,))
    lars.step(0, weight, grad)
    text, before, untouched = repr(lars), weight.clone(), copy.deepcopy(lars)
    with pytest.raises(ValueError, match=message):
        fault(lars, weight, grad)
    assert repr(lars) == text
    assert torch.equal(weight, before)
    lars.step(0, weight, grad)
    untouched.step(0, before, grad)
    assert torch.equal(weight, before)


def test_deepcopy_has_a_state_of_its_own(device):
    lars = make()
    weight, grad = tensors(device, (4,), (4,))
    lars.step(0, weight, grad)
    clones = {
        "deepcopy": copy.deepcopy(lars),
        "inside of a module": copy.deepcopy(Holder(lars)).optimizer,
        "inside of a scripted module": copy.deepcopy(torch.jit.script(Holder(lars))).optimizer,
        "pickle": pickle.loads(pickle.dumps(lars)),
    }
    weights = [weight.clone() for _ in clones]
    lars.step(0, weight, grad)
    for (name, clone), other in zip(clones.items(), weights):
        assert repr(clone) == repr(lars)
        clone.step(0, other, grad)
        assert torch.equal(other, weight), name


class Holder(torch.nn.Module):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def forward(self) -> float:
        return self.optimizer.learning_rate()


def test_pickle_goes_on_in_another_process(device, tmp_path):
    lars = make()
    weight, grad = tensors(device, (5, 5), (5, 5))
    lars.step(3, weight, grad)
    torch.save((lars, weight, grad), tmp_path / "half.pt")
    lars.step(3, weight, grad)
    code = f"""
import torch, fused_lars
lars, weight, grad = torch.load({str(tmp_path / "half.pt")!r}, weights_only=False)
assert isinstance(lars, fused_lars.Lars)
lars.step(3, weight, grad)
torch.save((repr(lars), weight), {str(tmp_path / "end.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
    text, resumed = torch.load(tmp_path / "end.pt")
    assert text == repr(lars)
    assert torch.equal(resumed, weight)


def test_loads_by_default(tmp_path):
    """With weights_only=True, and with no import before pickle.loads: the pickle names the package."""
    lars = make()
    lars.step(3, torch.ones(4), torch.ones(4))
    torch.save({"optimizer": lars}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt", weights_only=True)["optimizer"]
    assert isinstance(loaded, Lars)
    assert repr(loaded) == repr(lars)
    code = f"import pickle; print(pickle.loads({pickle.dumps(lars)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == repr(lars)


def test_files_of_the_time_before_load():
    """Without a registered reducer, objects of TorchScript are pickled by their state."""
    lars = make()
    lars.step(3, torch.ones(4), torch.ones(4))
    file = io.BytesIO()
    reduce = copyreg.dispatch_table.pop(torch.ScriptObject)
    try:
        torch.save(lars, file)
    finally:
        copyreg.dispatch_table[torch.ScriptObject] = reduce
    for weights_only in (False, True):
        file.seek(0)
        with torch.serialization.safe_globals([torch.ScriptObject]):
            assert repr(torch.load(file, weights_only=weights_only)) == repr(lars)


def test_other_objects_of_torchscript_are_pickled_as_before():
    packed = torch.ops.quantized.conv2d_prepack(
        torch.quantize_per_tensor(torch.ones(2, 1, 3, 3), 0.1, 0, torch.qint8),
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        1,
    )
    assert isinstance(packed, torch.ScriptObject)
    assert not isinstance(packed, Lars)
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.unpack()[0].dequantize(), packed.unpack()[0].dequantize())


def test_damaged_copies_are_refused_without_a_crash():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests" / "support" / "fuzz_lars.py", "250"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for line in done.stdout.splitlines():
        refused = int(line.partition("'refused': ")[2].split(",")[0].rstrip("}"))
        assert refused > 125, line
    assert len(done.stdout.splitlines()) == 4


def test_a_stored_object_of_another_version_is_refused():
    (version, *rest), name = make().__getstate__()
    with pytest.raises(ValueError, match="format version 3; this library reads version 2"):
        torch.ScriptObject.__new__(torch.ScriptObject).__setstate__(((version + 1, *rest), name))


def test_a_stored_object_of_the_first_version_has_no_decayed_norm():
    (_, settings, *rest), name = make().__getstate__()
    old = torch.ScriptObject.__new__(torch.ScriptObject)
    old.__setstate__(((1, settings[:4], *rest), name))
    assert repr(old) == repr(make())


def test_steps_are_outside_of_autograd(device):
    (weight,) = tensors(device, (4,))
    weight.requires_grad_()
    loss = weight.square().sum()
    make().step(0, weight, torch.ones_like(weight))
    assert weight.grad_fn is None
    assert not weight._backward_hooks
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_steps_inference_tensors(device):
    with torch.inference_mode():
        weight, grad = tensors(device, (4,), (4,))
        lars = make()
        lars.step(0, weight, grad)
        lars.step(0, weight, grad)
    same, same_grad = tensors(device, (4,), (4,))
    other = make()
    other.step(0, same, same_grad)
    other.step(0, same, same_grad)
    assert torch.equal(weight, same)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_parameters_on_several_devices():
    weights = [t for d in ("cuda:0", "cpu", "cuda:1") for t in tensors(d, (40, 3))]
    grads = [torch.ones_like(w) for w in weights]
    lars = make()
    for _ in range(2):
        lars.step_all([0, 1, 2], weights, grads)
    torch.testing.assert_close(weights[0].cpu(), weights[1])
    assert torch.equal(weights[0].cpu(), weights[2].cpu())


def test_steps_alternate_between_devices(device):
    weights = [*tensors(device, (40, 3)), *tensors("cpu", (40, 3))]
    lars = make()
    for _ in range(3):
        for i, weight in enumerate(weights):
            lars.step(i, weight, torch.ones_like(weight))
    torch.testing.assert_close(weights[0].cpu(), weights[1])
