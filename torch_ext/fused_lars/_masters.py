"""Updates fp32 masters when something has written into their parameters between steps."""

from operator import is_

import torch
from torch import Tensor

from ._checks import HALF
from ._torch_internals import is_dtensor_like, is_under_dispatch_mode, local_of, version_of


def take_over(param: Tensor, master: Tensor) -> None:
    """Copies into `master` the elements of `param` that it does not round to. Others keep their low bits."""
    # Compares bits, because Inductor drops a rounding whose result is only compared as a value.
    param_bits, rounded_bits = (t.detach().view(torch.int16) for t in (param, master.to(param.dtype)))
    master.copy_(torch.where(param_bits != rounded_bits, param, master))


def is_captured() -> bool:
    """Whether the step is being captured in a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class WrittenParams:
    """Finds the parameters with a master that were written since the last step. Usually there are none.

    A write raises a tensor's version counter, and ``param.data = ...`` usually changes its address. If the
    last versions and addresses are unknown, for example after a load or a copy, values are compared instead.
    So this class only saves comparisons. A write through ``param.data``, such as ``param.data.copy_(...)``,
    changes neither and is not noticed.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._has_dtensors = False
        self._versions: list = []
        self._addresses: list = []

    def before_step(self, param_groups, state) -> None:
        """Copies what was written into the masters in `state`."""
        groups = [group for group in param_groups if group["master_weights"]]
        params: list[Tensor] = []
        for group in groups:
            params += group["params"]
        known = len(params) == len(self._params) and all(map(is_, params, self._params))
        if not known:
            self._params = params
            self._has_dtensors = any(map(is_dtensor_like, params))
        before = self._versions, self._addresses
        self._versions, self._addresses = after = self._get_versions(), self._get_addresses()
        # A captured graph and a traced program do not run this code, so they compare values every time.
        if is_captured() or is_under_dispatch_mode():
            known = False
        if known and before == after:
            return
        unwritten = set()
        if known:
            marks = zip(params, *before, *after)
            unwritten = {id(p) for p, *old, version, address in marks if old == [version, address]}
        for group in groups:
            with torch.set_grad_enabled(bool(group["differentiable"])):
                for p in group["params"]:
                    if p in state and id(p) not in unwritten:
                        _take_over_if_it_fits(p, state[p].get("master_param"))

    def after_step(self) -> None:
        """Takes the versions after the step's own writes. Any later write comes from elsewhere."""
        self._versions = self._get_versions()

    def _get_versions(self) -> list:
        try:
            if self._has_dtensors:  # a DTensor and its local tensor have a version each
                return [version_of(p) + version_of(local_of(p)) for p in self._params]
            return [*map(version_of, self._params)]
        except RuntimeError:  # an inference tensor has no version
            return [object() for _ in self._params]  # equal to no other

    def _get_addresses(self) -> list:
        try:
            return [
                *map(Tensor.data_ptr, map(local_of, self._params) if self._has_dtensors else self._params)
            ]
        except RuntimeError:  # a fake tensor has no address
            return [object() for _ in self._params]


def _take_over_if_it_fits(param: Tensor, master: Tensor | None) -> None:
    # The op refuses a master that does not fit.
    if (
        master is not None
        and param.dtype in HALF
        and (param.shape, param.device) == (master.shape, master.device)
    ):
        take_over(local_of(param), local_of(master))
