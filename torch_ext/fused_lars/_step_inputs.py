"""The inputs of a step."""

from typing import Any, NamedTuple

from torch import Tensor


class StepInputs(NamedTuple):
    """What an optimizer passes to a step."""

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, Any]
    grad_scale: Tensor | None  # this and found_inf: of a GradScaler
    found_inf: Tensor | None
