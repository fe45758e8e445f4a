"""What a step begins with."""

from typing import Any, NamedTuple

from torch import Tensor


class StepInputs(NamedTuple):
    """What an optimizer has when it steps."""

    param_groups: list[dict[str, Any]]
    state: dict[Tensor, Any]
    grad_scale: Tensor | None  # of a GradScaler, and what it found
    found_inf: Tensor | None
