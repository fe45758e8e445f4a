"""The names of parameters in errors and records."""


def parameter_name(group, group_index: int, index: int) -> str:
    """A parameter's name in an error."""
    name = name_in_group(group, index)
    return f"parameter{'' if name is None else f' {name!r},'} {place_of(group_index, index)}"


def name_in_group(group, index: int) -> str | None:
    """A parameter's name. None if it was given without one, or was put into the list later."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else None


def place_of(group_index: int, index: int) -> str:
    """Where a parameter stands in an optimizer."""
    return f"param_groups[{group_index}]['params'][{index}]"
