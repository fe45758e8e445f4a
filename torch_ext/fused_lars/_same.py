"""Compares an optimizer with the step before, by the identity of what it holds."""

from operator import is_, itemgetter

from ._checks import STATE


class SameParams:
    """Whether an optimizer still has the same parameters in the same groups, by identity."""

    def __init__(self, param_groups) -> None:
        self.of_groups = [[*group["params"]] for group in param_groups]

    def are_still(self, param_groups) -> bool:
        if len(param_groups) != len(self.of_groups):
            return False
        return all(
            len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, params in zip(param_groups, self.of_groups)
        )


class SameState:
    """Whether an optimizer still keeps the same tensors for the same parameters, by identity."""

    def __init__(self, state) -> None:
        self._params = [*state]
        keys = [key for key in STATE if any(key in values for values in state.values())]
        # Raises KeyError if parameters keep different kinds of state.
        self._tensors = [(get, [*map(get, state.values())]) for get in map(itemgetter, keys)]

    def is_still(self, state) -> bool:
        if len(state) != len(self._params) or not all(map(is_, state, self._params)):
            return False
        try:
            return all(all(map(is_, map(get, state.values()), tensors)) for get, tensors in self._tensors)
        except KeyError:
            return False
