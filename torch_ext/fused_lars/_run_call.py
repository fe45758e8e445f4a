"""Makes an op call, and makes its errors name groups and parameters. The op knows only lists and indices."""

import re

from torch import Tensor

from ._checks import check_group
from ._names import parameter_name
from ._op_call import OpCall
from ._records import Record
from ._step_inputs import StepInputs


def run_call(
    call: OpCall,
    inputs: StepInputs,
    record: Record | None,
    workspace: Tensor | None,
    check_only: bool,
    masters_follow: bool = False,
) -> None:
    """Makes an op call.

    Raises:
        ValueError: the op refuses it. The text has the parameter's name and its place in param_groups.
        RuntimeError, TypeError: as the op raises them.
    """
    try:
        call.run(inputs.grad_scale, inputs.found_inf, record, workspace, check_only, masters_follow)
    except ValueError as error:
        raise ValueError(
            _in_words_of_param_groups(str(error), call, inputs.param_groups, inputs.state)
        ) from None
    except (RuntimeError, TypeError):
        # check_group has a better text for a value that does not fit the op's schema.
        for index in call.group_indices:
            check_group(inputs.param_groups[index], index)
        raise


def _in_words_of_param_groups(message: str, call: OpCall, param_groups, state) -> str:
    groups = call.group_indices
    text = re.sub(r"(?<=in group )\d+", lambda m: str(groups[int(m[0])]), message)
    text = re.sub(r"\blr\[(\d+)\]", lambda m: f"lr of group {groups[int(m[1])]}", text)
    found = re.match(r"(\w+)\[(\d+)\]", message)
    if not found or found[1] not in call.lists._fields:
        return text
    tensor = getattr(call.lists, found[1])[int(found[2])]
    for group_index, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            if any(tensor is t for t in (p, p.grad, *state.get(p, {}).values())):
                return f"{text} ({parameter_name(group, group_index, index)})"
    return text
