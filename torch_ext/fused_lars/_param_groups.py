"""Parameter groups for LARS: bias, normalisation and other vectors without weight decay and adaptation."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ._torch_internals import BATCH_NORM_BASE

__all__ = ["param_groups"]

_NORMALISATION = (
    BATCH_NORM_BASE,  # batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_NORMALISATION_NAMES = {
    name for name, cls in vars(nn).items() if isinstance(cls, type) and issubclass(cls, _NORMALISATION)
}


def _is_vector_or_bias(name: str, param: nn.Parameter) -> bool:
    is_vector = param.ndim <= 1 and not is_lazy(param)  # which has no shape yet
    return is_vector or name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _is_norm(module: nn.Module) -> bool:
    # What torch.jit or torch.fx has made of a module keeps the name of its class.
    name = None
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
    elif isinstance(module, GraphModule):
        name = type(module).__name__
    return isinstance(module, _NORMALISATION) or name in _NORMALISATION_NAMES


def _has_no_type(module: nn.Module, in_graph: bool) -> bool:
    """Whether a module is what torch.export or torch.fx puts parameters into, whatever had them before."""
    kind = type(module)
    return in_graph and (
        kind is nn.Module or kind.__name__ == "GraphModule" or kind.__module__ == "torch.export.unflatten"
    )


def param_groups(
    model: nn.Module | Iterable[nn.Module],
    weight_decay: float = 0.0,
    *,
    exclude: Callable[[str, nn.Parameter], bool] | None = None,
    named: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model's parameters as large-batch recipes do (MLPerf's ResNet reference, BYOL, Barlow Twins).

    Args:
        model: the model, or several, whose parameters have the model's place in front of their names, as in a
            ``torch.nn.ModuleList``. ``DTensor`` parameters and models of ``torch.jit`` are fine.
        weight_decay: of the first group, finite and >= 0. Default: 0.
        exclude: called with a parameter's full name and the parameter; True puts a weight into the second
            group too.
        named: whether the groups hold pairs of a name and a parameter, so that errors and state_dicts have
            the names. ``torch.distributed.optim.ZeroRedundancyOptimizer`` takes parameters alone.

    Returns:
        Two groups for :class:`fused_lars.LARS`, with every parameter in exactly one. The first has the
        weights, with ``weight_decay``. The second has bias and normalisation parameters and all others of at
        most one dimension (the scales of LayerScale, PReLU's slopes), with ``weight_decay=0,
        layer_adaptation=False``. A bias is called so (``bias``, ``in_proj_bias``, ``bias_ih_l0``); a
        normalisation layer is torch's, or a class that inherits from it. A parametrization is taken for the
        parameter that it makes. A parameter that several modules share counts where
        ``model.named_parameters()`` names it first. Scales of more dimensions, (C, 1, 1) in torchvision's
        ConvNeXt, are for ``exclude``.

    Raises:
        TypeError: `model` is something else.
        ValueError: a parameter of several dimensions is in a module of ``torch.export`` or ``torch.fx`` that
            no longer says what it was, and there is no ``exclude`` to decide.
    """
    if not isinstance(model, nn.Module):
        models = list(model) if isinstance(model, Iterable) else [model]
        for module in models:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"param_groups got {torch.typename(module)}; allowed: a torch.nn.Module or several"
                )
        model = nn.ModuleList(models)
    in_graph = any(
        isinstance(module, GraphModule) or type(module).__module__ == "torch.export.unflatten"
        for module in model.modules()
    )
    weights: list[Any] = []
    others: list[Any] = []
    seen = set()
    # What a parametrization's own parameters stand for.
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        if is_parametrized(module):
            made_by_name = cast(nn.ModuleDict, module.parametrizations)
            parametrized.update({made: (module, name) for name, made in made_by_name.items()})
        for name, param in module.named_parameters(prefix="", recurse=False):
            if param in seen:
                continue
            seen.add(param)
            full_name = f"{prefix}.{name}" if prefix else name
            owner, meaning = parametrized.get(module, (module, name))
            excluded = _is_vector_or_bias(meaning, param) or _is_norm(owner)
            if exclude is not None:
                excluded = excluded or exclude(full_name, param)
            elif not excluded and _has_no_type(owner, in_graph):
                raise ValueError(
                    f"parameter {full_name!r} of shape {tuple(param.shape)} is in a module of torch.export "
                    "or torch.fx, which keep no type to know a normalisation layer by; pass exclude, a "
                    "function of name and parameter that is True for what is to be left out of decay and "
                    "adaptation"
                )
            (others if excluded else weights).append((full_name, param) if named else param)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "layer_adaptation": False},
    ]
    for group in groups if named else ():
        # torch takes an empty group for one without names and refuses it beside one with names.
        if not group["params"]:
            group["param_names"] = []
    return groups
