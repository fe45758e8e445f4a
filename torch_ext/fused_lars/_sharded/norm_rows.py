"""The squared norms that ranks add up. One norms op for a device computes the rows of all its messages."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import HALF
from .._op_call import OpCall
from .._torch_internals import get_local
from .._workspace import Workspace
from .peers import Peers


class _GroupRows(NamedTuple):
    """Rows of one parameter group."""

    group_index: int | None  # None: the last row of a message
    size: int


class _Message(NamedTuple):
    """The rows that a set of ranks adds up."""

    begin: int
    end: int
    peers: Peers


class NormRows:
    """The rows of one norms op. The rows of one set of ranks are contiguous and form its message."""

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._found_inf = found_inf
        self._grad_scale = grad_scale
        self._weights: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._group_rows: list[_GroupRows] = []
        self._messages: list[_Message] = []
        self._begin = 0  # of the next message
        self._without_grad: dict[int, int] = {}  # the group of each row
        self._runs: defaultdict[OpCall, list[list[int]]] = defaultdict(list)
        # The op's call. It keeps the rows' weights in C++ for norms that are taken again.
        self._prepared: Any = None

    def add(
        self, call: OpCall, group_index: int, params: list[Tensor], local, is_shared: bool, state
    ) -> None:
        """Adds a row for each of `params` that has a gradient. If they are shared, the others get one too.

        `local` has the local lists of the parameters that have a gradient.
        """
        weights, grads = local.params, local.grads
        if local.master_params:
            masters = iter(local.master_params)
            weights = [next(masters) if w.dtype in HALF else w for w in weights]
        first = len(self._weights)
        runs = self._runs[call]
        done = 0
        # Usually all have a gradient, so they need not be asked one by one.
        stretches: Iterable[tuple[bool, Iterable[Tensor]]] = [(True, params)]
        if len(weights) < len(params):
            stretches = groupby(params, lambda p: p.grad is not None)
        for has_grad, members in stretches:
            members = list(members)
            begin = len(self._weights)
            if has_grad:
                self._weights += weights[done : done + len(members)]
                self._grads += grads[done : done + len(members)]
                done += len(members)
                if runs and runs[-1][1] == begin:
                    runs[-1][1] = len(self._weights)
                else:
                    runs.append([begin, len(self._weights)])
            elif is_shared:
                # Ranks that have a gradient need the part of the weight's norm that this shard has.
                self._weights += (_weight_without_grad(p, state) for p in members)
                self._grads += self._weights[begin:]
                self._without_grad.update(dict.fromkeys(range(begin, len(self._weights)), group_index))
        self._group_rows.append(_GroupRows(group_index, len(self._weights) - first))

    def end(self, peers: Peers | None) -> None:
        """Ends the rows that `peers` share. They begin at the last end. None: no other rank shares them."""
        if peers is not None:
            last = self._last()
            self._weights.append(last)
            self._grads.append(last)
            self._group_rows.append(_GroupRows(None, 1))
            self._messages.append(_Message(self._begin, len(self._weights), peers))
        self._begin = len(self._weights)

    def _last(self) -> Tensor:
        """The last row of a message: found_inf. Its squares add up to 0 only if it is 0 on all ranks."""
        return self._weights[0].new_empty(0) if self._found_inf is None else self._found_inf

    def keep(self) -> None:
        """Keeps the rows for the next step, but no gradients."""
        # Between two steps only its owner may keep a gradient's memory.
        self._grads.clear()
        if self._prepared is not None:
            self._prepared.release()

    def renew(self, grads: list[list[Tensor]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes other gradients for the same rows. `grads` has those of each set of ranks in turn."""
        ends = {message.begin: message.end for message in self._messages}
        # found_inf, if there is one, is the last row of each message, and a new tensor in every step.
        if found_inf is not None or self._found_inf is not None:
            self._found_inf, self._prepared = found_inf, None
            for end in ends.values():
                self._weights[end - 1] = self._last()
        self._grad_scale = grad_scale
        for of_set in grads:
            begin = len(self._grads)
            self._grads += of_set
            if begin in ends:
                self._grads.append(self._weights[ends[begin] - 1])

    def take(self, workspace: Workspace, param_groups) -> None:
        """Takes the norms, with the present options of the groups."""
        if not self._messages:
            return  # nothing is shared: the step takes its norms itself
        options: dict[int | None, tuple[float, bool, bool]] = {None: (0.0, False, False)}
        options.update({index: _norm_options(group) for index, group in enumerate(param_groups)})
        columns = zip(*(options[rows.group_index] for rows in self._group_rows))
        weight_decay, maximize, decayed_norm = map(list, columns)
        if self._prepared is None:
            self._prepared = torch.classes.fused_lars.PreparedNorms(
                self._weights, [rows.size for rows in self._group_rows]
            )
        self._norms = self._prepared.run_with(
            self._grads, weight_decay, maximize, decayed_norm, self._grad_scale, workspace.tensor
        )
        workspace.after_use()
        if self._without_grad:
            rows = torch.tensor([*self._without_grad], device="cpu")
            rows = rows.to(self._norms.device, non_blocking=True)
            # A missing gradient counts as zeros. With decay, its norm is that of the decay alone.
            squares = [options[index][0] ** 2 for index in self._without_grad.values()]
            decays = torch.tensor(squares, dtype=self._norms.dtype, device="cpu")
            decays = decays.to(self._norms.device, non_blocking=True)
            self._norms[rows, 1] = torch.where(decays > 0.0, self._norms[rows, 0] * decays, 0.0)

    def messages(self) -> list[tuple[Peers, Tensor]]:
        result = [(peers, self._norms[begin:end]) for begin, end, peers in self._messages]
        for peers, message in result:
            row = peers.last_row()
            if row or self._found_inf is not None:
                message[-1, 1] = row
        return result

    def hand_out(self) -> None:
        """Gives each call its squared norms, and the found_inf that tells it to change nothing."""
        if not self._messages:
            return
        norms, found_inf = self._norms, None
        last = [message.end - 1 for message in self._messages]
        if self._found_inf is None and norms.device.type == "cpu":
            pass  # the host has already read the sums
        elif self._found_inf is None and len(last) == 1:
            # The upper half of an fp64, seen as fp32, is 0 only if a whole number is 0. A view runs no
            # operator.
            found_inf = norms.view(torch.float32)[last[0], 3]
        else:
            found_inf = torch.linalg.vector_norm(torch.stack([norms[i] for i in last])).to(torch.float32)
        for call, runs in self._runs.items():
            rows = [norms[begin:end] for begin, end in runs]
            if rows:
                call.squared_norms = rows[0] if len(rows) == 1 else torch.cat(rows)
                call.found_inf = found_inf
                call.grads_taken = self._prepared, [*chain.from_iterable(runs)]


def _norm_options(group) -> tuple[float, bool, bool]:
    """The options that the norm of a gradient depends on."""
    decayed_norm = group["decayed_norm"]
    return (group["weight_decay"] if decayed_norm else 0.0, group["maximize"], decayed_norm)


def _weight_without_grad(param, state) -> Tensor:
    weight = get_local(state.get(param, {}).get("master_param", param))
    return weight if param.requires_grad else weight.new_empty(0)
