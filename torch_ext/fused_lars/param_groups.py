"""Parameter groups for LARS: bias and normalisation parameters without weight decay and layer adaptation."""

from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["param_groups"]

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def _is_bias_or_norm(module: nn.Module, name: str, param: nn.Parameter) -> bool:
    # Normalisation layers that models bring along (LlamaRMSNorm, LayerNorm2d) are known by their name only; a
    # normalised linear layer has such a name too, but its weight is a matrix.
    is_norm = isinstance(module, _NORMALISATION) or ("Norm" in type(module).__name__ and param.ndim <= 1)
    return is_norm or name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, *, exclude: Callable[[str, nn.Parameter], bool] | None = None
) -> list[dict]:
    """Splits a model's parameters as large-batch recipes do (MLPerf's ResNet reference, BYOL, Barlow Twins).

    Args:
        model: the model; ``DTensor`` parameters are fine.
        weight_decay: of the first group, finite and >= 0. Default: 0.
        exclude: called with a parameter's full name and the parameter; True puts a weight into the second
            group too.

    Returns:
        Two groups for :class:`fused_lars.LARS`, every parameter in exactly one, with its name: the weights,
        with ``weight_decay``; and bias and normalisation parameters, with ``weight_decay=0,
        layer_adaptation=False``. A bias is called so (``bias``, ``in_proj_bias``, ``bias_ih_l0``). A
        normalisation layer is torch's, or one whose class has ``Norm`` in its name; of the latter, parameters
        of at most one dimension. A parametrization is taken for the parameter that it makes. A parameter
        that several modules share counts where ``model.named_parameters()`` names it first.
    """
    weights, others, seen = [], [], set()
    parametrized = {}  # what a parametrization's own parameters stand for
    for prefix, module in model.named_modules():
        if is_parametrized(module):
            parametrized.update({made: (module, name) for name, made in module.parametrizations.items()})
        for name, param in module.named_parameters(prefix="", recurse=False):
            if param in seen:
                continue
            seen.add(param)
            full_name = f"{prefix}.{name}" if prefix else name
            excluded = _is_bias_or_norm(*parametrized.get(module, (module, name)), param)
            excluded = excluded or (exclude is not None and exclude(full_name, param))
            (others if excluded else weights).append((full_name, param))
    groups = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "layer_adaptation": False},
    ]
    for group in groups:
        # torch takes an empty group for one without names and refuses it beside one with names.
        if not group["params"]:
            group["param_names"] = []
    return groups
