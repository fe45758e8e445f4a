"""param_groups on models of every kind: each parameter once, with its name, in the right group."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from fused_lars import LARS, param_groups


def names(group):
    return {name for name, _ in group["params"]}


def check_complete(model, groups):
    """Checks that two groups hold every parameter once, under its name in the model."""
    assert [set(group) for group in groups] == [
        {"params", "weight_decay"},
        {"params", "weight_decay", "layer_adaptation"},
    ]
    assert groups[1]["weight_decay"] == 0.0
    assert groups[1]["layer_adaptation"] is False
    named = [pair for group in groups for pair in group["params"]]
    expected = dict(model.named_parameters())
    assert len(named) == len(expected)
    assert all(expected[name] is p for name, p in named)


def test_resnet():
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18()
    groups = param_groups(model, weight_decay=1e-4)
    check_complete(model, groups)
    assert groups[0]["weight_decay"] == 1e-4
    assert names(groups[0]) == {name for name, p in model.named_parameters() if p.ndim > 1}
    assert {"bn1.weight", "bn1.bias", "fc.bias", "layer2.0.downsample.1.weight"} <= names(groups[1])


def test_transformer():
    """in_proj_bias is not named "bias" in any module. in_proj_weight is a weight."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    groups = param_groups(model)
    check_complete(model, groups)
    assert groups[0]["weight_decay"] == 0.0
    of_layer = {
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    }
    assert names(groups[0]) == {f"layers.{i}.{name}" for i in range(2) for name in of_layer}
    assert "layers.0.self_attn.in_proj_bias" in names(groups[1])


def test_attention_with_extra_biases():
    """bias_k and bias_v have three dimensions but are biases."""
    groups = param_groups(nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=4, vdim=4))
    assert {"bias_k", "bias_v", "in_proj_bias", "out_proj.bias"} == names(groups[1])
    assert {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"} == names(groups[0])


def test_vision_transformer():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    groups = param_groups(model, weight_decay=0.1)
    check_complete(model, groups)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names(
        groups[0]
    )
    assert {"norm.weight", "blocks.1.norm2.bias", "blocks.0.mlp.fc1.bias"} <= names(groups[1])


def test_recurrent_layers():
    """bias_ih_l0 and similar names."""
    groups = param_groups(nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2))
    assert all("weight" in name for name in names(groups[0]))
    assert len(names(groups[0])) == 12
    assert len(names(groups[1])) == 8
    assert all(name.startswith("bias_") for name in names(groups[1]))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
        nn.LazyBatchNorm1d(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_normalisation_layers(norm):
    weights, others = param_groups(nn.Sequential(nn.Linear(4, 4, bias=False), norm))
    assert names(weights) == {"0.weight"}
    assert names(others) == {f"1.{name}" for name, _ in norm.named_parameters()}


def test_a_models_own_norm_class():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert names(param_groups(LlamaRMSNorm())[1]) == {"weight"}


def test_a_subclass_of_a_norm():
    class Whitening(nn.LayerNorm):
        pass

    assert names(param_groups(Whitening(3))[1]) == {"weight", "bias"}


def test_tied_weights():
    """One parameter in one group, under its first name in named_parameters()."""
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = model["embed"].weight
    groups = param_groups(model, weight_decay=0.1)
    check_complete(model, groups)
    assert names(groups[0]) == {"embed.weight"}
    assert names(groups[1]) == {"head.bias"}


def test_parameters_of_the_model_itself():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.inner = nn.ParameterList([torch.ones(2, 2)])

    groups = param_groups(Model())
    assert names(groups[0]) == {"inner.0"}
    assert names(groups[1]) == {"scale", "bias"}


def test_frozen_parameters_are_listed():
    """They have no gradient, so a step skips them. Unfreezing needs no new optimizer."""
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    check_complete(model, param_groups(model))


def test_exclude():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    groups = param_groups(model, 0.1, exclude=lambda name, p: name.startswith("0.") and p.ndim == 2)
    check_complete(model, groups)
    assert names(groups[0]) == {"1.weight"}
    assert names(groups[1]) == {"0.weight", "1.bias"}


def test_training_with_groups():
    """Weights are adapted and decayed. The others take plain steps."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = LARS(param_groups(model, weight_decay=0.1), lr=0.5, trust_coefficient=0.01)
    assert [group["layer_adaptation"] for group in optimizer.param_groups] == [True, False]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.ones(2, 3)).pow(3).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if name == "0.weight":
            w, g = before[name].norm(), p.grad.norm()
            q = 0.01 * w / (g + 0.1 * w)
            expected = before[name] - 0.5 * q * (p.grad + 0.1 * before[name])
        else:
            expected = before[name] - 0.5 * p.grad
        torch.testing.assert_close(p.detach(), expected)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


def test_a_model_without_one_of_the_groups():
    """An empty group is allowed beside one with names."""
    for model, empty in ((nn.Linear(3, 2, bias=False), 1), (nn.LayerNorm(3), 0)):
        groups = param_groups(model, weight_decay=0.1)
        assert groups[empty]["params"] == []
        optimizer = LARS(groups, lr=0.1)
        optimizer.load_state_dict(optimizer.state_dict())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def test_what_is_called_a_norm_and_is_none():
    class NormedLinear(nn.Linear):
        pass

    class RootMeanSquareNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    groups = param_groups(nn.Sequential(NormedLinear(3, 2), RootMeanSquareNorm()))
    assert names(groups[0]) == {"0.weight"}
    assert names(groups[1]) == {"0.bias", "1.gain"}


def test_parametrizations_count_for_what_they_make():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for module, name in ((model[0], "weight"), (model[0], "bias"), (model[1], "weight")):
        nn.utils.parametrize.register_parametrization(module, name, nn.Identity())
    groups = param_groups(model)
    check_complete(model, groups)
    assert names(groups[0]) == {"0.parametrizations.weight.original"}


# ---------------------------------------------------------------- vectors


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x):
        return self.gamma * x


def test_vectors_of_any_kind():
    """LayerScale, PReLU and gains are neither norms nor biases, but they are excluded too."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.D = nn.Parameter(torch.ones(4))
            self.A_log = nn.Parameter(torch.ones(4, 2))
            self.logit_scale = nn.Parameter(torch.ones(()))

    groups = param_groups(nn.Sequential(nn.Linear(4, 4), LayerScale(4), nn.PReLU(4), Mixer()))
    assert names(groups[0]) == {"0.weight", "3.A_log"}
    assert names(groups[1]) == {"0.bias", "1.gamma", "2.weight", "3.D", "3.logit_scale"}


def test_a_layer_scale_grows():
    """It starts at 1e-6. A step in proportion to its norm would leave it there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), LayerScale(4))
    optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
    x = torch.randn(16, 4)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
    assert model[1].gamma.norm() > 0.1


def test_vectors_of_models():
    timm = pytest.importorskip("timm")
    model = timm.create_model("cait_xxs24_224", depth=2, img_size=32)
    assert any("gamma" in name for name, _ in model.named_parameters())
    groups = param_groups(model)
    check_complete(model, groups)
    assert names(groups[1]) >= {name for name, p in model.named_parameters() if p.ndim <= 1}
    assert all(p.ndim > 1 for _, p in groups[0]["params"])


def test_lazy_parameters():
    """They have no shape yet, so their dimensions tell nothing."""
    groups = param_groups(nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyConv2d(2, 3)))
    assert names(groups[0]) == {"0.weight", "2.weight"}


# ---------------------------------------------------------------- models that are no longer Python modules


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm([3, 4])
        self.conv = nn.Conv1d(3, 3, 1)
        self.bn = nn.BatchNorm1d(3)
        self.scale = LayerScale(4)

    def forward(self, x):
        return self.scale(self.bn(self.conv(self.norm(x))))


def jit_models(path):
    scripted = torch.jit.script(Block())
    traced = torch.jit.trace(Block().eval(), torch.ones(2, 3, 4))
    for name, model in {"scripted": scripted, "traced": traced}.items():
        yield name, model
        torch.jit.save(model, path)
        yield f"{name} and loaded", torch.jit.load(path)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_models_of_torch_jit(tmp_path):
    """A multi-dimensional norm is known by the name of its class, the only thing that remains of it."""
    for kind, model in jit_models(tmp_path / "model.pt"):
        groups = param_groups(model, weight_decay=0.1)
        check_complete(model, groups)
        assert names(groups[0]) == {"conv.weight"}, kind
        assert {"norm.weight", "norm.bias", "bn.weight", "scale.gamma"} <= names(groups[1]), kind
        LARS(groups, lr=0.1)


def graph_models():
    exported = torch.export.export(Block().eval(), (torch.ones(2, 3, 4),))
    yield exported.module()
    yield torch.export.unflatten(exported)


def test_models_of_torch_export():
    """Nothing tells what their modules were, so the caller has to."""
    for model in graph_models():
        with pytest.raises(ValueError, match=r"parameter 'norm\.weight' of shape \(3, 4\) .* pass exclude"):
            param_groups(model)
        with pytest.raises(ValueError, match="pass exclude"):
            param_groups(nn.Sequential(nn.Linear(2, 2), model))
        groups = param_groups(model, exclude=lambda name, p: "norm" in name)
        check_complete(model, groups)
        assert names(groups[0]) == {"conv.weight"}


def test_models_of_torch_fx():
    """Modules that tracing keeps whole keep their types. Modules that it traces through do not."""
    groups = param_groups(torch.fx.symbolic_trace(Block()))
    assert names(groups[0]) == {"conv.weight"}
    assert "norm.weight" in names(groups[1])

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.table = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return x @ self.inner.table

    assert names(param_groups(Outer())[0]) == {"inner.table"}
    with pytest.raises(ValueError, match=r"parameter 'inner\.table'"):
        param_groups(torch.fx.symbolic_trace(Outer()))


def test_compiled_models():
    model = Block()
    groups = param_groups(torch.compile(model))
    assert names(groups[0]) == {"_orig_mod.conv.weight"}


# ---------------------------------------------------------------- several models, groups without names


def test_several_models():
    backbone, head = Block(), nn.Linear(4, 2)
    head.extra = backbone.conv.weight  # both models share this weight
    for models in ([backbone, head], (m for m in (backbone, head))):
        groups = param_groups(models, weight_decay=0.1)
        check_complete(nn.ModuleList([backbone, head]), groups)
        assert names(groups[0]) == {"0.conv.weight", "1.weight"}
        LARS(groups, lr=0.1)


@pytest.mark.parametrize("model", [nn.Linear(2, 2).parameters(), [nn.Linear(2, 2), "head"], None, {"a": 1}])
def test_no_model(model):
    with pytest.raises(TypeError, match=r"param_groups got .*; allowed: a torch\.nn\.Module or several"):
        param_groups(model)


def test_groups_without_names():
    model = Block()
    named, plain = param_groups(model, 0.1), param_groups(model, 0.1, named=False)
    for group, other in zip(plain, named):
        assert all(p is q for p, (_, q) in zip(group["params"], other["params"], strict=True))
        assert group.keys() == other.keys()
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    for model in (nn.Linear(3, 2, bias=False), nn.LayerNorm(3)):
        LARS(param_groups(model, named=False), lr=0.1)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_zero_redundancy_optimizer(one_process):
    """It takes no names, and each group keeps its own options."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    options = dict(lr=0.5, momentum=0.9, trust_coefficient=0.01)
    sharded = ZeroRedundancyOptimizer(param_groups(models[0], 0.1, named=False), LARS, **options)
    optimizers = sharded, LARS(param_groups(models[1], 0.1), **options)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            model(torch.ones(2, 3)).pow(3).sum().backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(p, q)
