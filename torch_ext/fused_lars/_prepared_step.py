"""A step whose arguments stay in C++ from one step to the next, as long as they are the same tensors."""

from itertools import chain
from operator import itemgetter

import torch
from torch import Tensor

from ._checks import HYPERPARAMETERS, NUMBERS, SWITCHES, are_plain
from ._op_call import OpCall, get_hyperparameters, hyperparameter_lists, on_device
from ._records import Record
from ._same import SameParams, SameState

_WAY_OF_STEP = ("foreach", "differentiable", "fused", "momentum_dtype")
_get_options = itemgetter(*HYPERPARAMETERS, *_WAY_OF_STEP)
_get_needs = itemgetter("momentum", "dampening", "master_weights", "stochastic_rounding", *_WAY_OF_STEP)


class PreparedStep:
    """The only op call of a step, ready to be repeated.

    Handing all tensors to an op takes the host longer than the op's checks. So this hands over only what can
    change between steps: options, if they changed, and gradients, which C++ reads from the parameters.
    Parameters and state are compared by identity. If anything else in them has changed, the op checks it.
    """

    def __init__(self, call: OpCall, param_groups, state, record: Record, workspace) -> None:
        self._device, self._record, self._workspace = call.device, record, workspace
        self._params = SameParams(param_groups)
        self._options: list[tuple] = []
        self._needs = [*map(needs, param_groups)]
        self._state = SameState(state)
        params, _, *state_lists = call.lists
        self.has_masters = bool(call.lists.master_params)
        called = {*map(id, params)}
        self._call = torch.classes.fused_lars.PreparedStep(
            params,
            *state_lists,
            [p for group in self._params.of_groups for p in group if id(p) not in called],
            call.group_sizes(),
        )
        self._run = self._call.run

    @classmethod
    def of(cls, calls, param_groups, state, records, workspaces) -> "PreparedStep | None":
        """Prepares the step that made `calls`.

        Returns None if it cannot be prepared: several calls, ordinary operators, lr as a tensor, DTensors.
        """
        if len(calls) != 1:
            return None
        ((key, call),) = calls.items()
        if call.reference or call.has_local_lists or len(call.group_indices) != len(param_groups):
            return None
        if any(isinstance(group["lr"], Tensor) for group in param_groups):
            return None
        try:
            return cls(call, param_groups, state, records[key], workspaces[call.device])
        except KeyError:
            return None  # parameters that keep different kinds of state

    def fits(self, param_groups, state) -> bool:
        """Whether a step of these groups is this call, apart from the gradients."""
        if not self._params.are_still(param_groups) or not self._state.is_still(state):
            return False
        # Records.of_call must see a capture, because the graph goes on writing to the record.
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        options = [*map(_get_options, param_groups)]
        if not are_plain(chain.from_iterable(options)):
            return False
        return options == self._options or self._hand_over(param_groups, options)

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Makes the step. Returns False, with nothing done, if it does not fit or is refused.

        The caller then gathers the step again, and that finds out why.
        """
        try:
            done = self._run(
                on_device(grad_scale, self._device),
                on_device(found_inf, self._device),
                self._record.trust_ratios,
                self._record.layer_norms,
                self._workspace.tensor,
            )
        except ValueError:
            return False
        self._workspace.after_use()
        return done

    def _hand_over(self, param_groups, options: list[tuple]) -> bool:
        if [*map(needs, param_groups)] != self._needs:
            return False
        try:
            values = hyperparameter_lists([*map(get_hyperparameters, param_groups)])
            self._call.set_hyperparameters([values[n] for n in NUMBERS], [values[n] for n in SWITCHES])
        except (RuntimeError, TypeError, ValueError):
            return False
        self._options = options
        return True


def needs(group) -> tuple:
    """The options that decide which tensors a group's call has, and how it is computed."""
    momentum, dampening, *others = _get_needs(group)
    return (bool(momentum), bool(dampening), *others)
