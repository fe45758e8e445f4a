"""The name of a parameter for errors and records."""


def parameter_name(group, group_index: int, index: int) -> str:
    """A parameter's name in an error."""
    name = name_in_group(group, index)
    return f"parameter{'' if name is None else f' {name!r},'} {place_of(group_index, index)}"


def name_in_group(group, index: int) -> str | None:
    """None for a parameter that was given without a name, or put into the list later."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else None


def place_of(group_index: int, index: int) -> str:
    """Where a parameter stands in an optimizer."""
    return f"param_groups[{group_index}]['params'][{index}]"
