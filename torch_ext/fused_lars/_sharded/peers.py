"""Adds up messages of ranks that share parameters, and checks that these ranks step them alike.

A sum over ranks means something only if row n of every rank's message is about the same parameter. So the
ranks compare digests of their parameters and options before their first message. From then on each message
ends in a row that shows whether they still agree. Its sum is 0 if they do, and every rank sees the same sum.
Only if they do not, the ranks find out who differs and in what.
"""

import zlib
from array import array
from collections import Counter
from operator import itemgetter
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import HYPERPARAMETERS, NUMBERS
from .._op_call import get_hyperparameters

_ON_DEVICE = "a tensor on an accelerator"

# A rank that cannot step adds this to the sum. It is more than all digests together, so they cannot cancel
# it.
_TROUBLE = 2.0**52


class Peers:
    """Ranks that share parameters.

    Args:
        ranks: all of them, sorted, with this one.
        process_groups: the groups to sum over, one after another, to get the sum over all ranks.
        device: the device of the messages.
        staging: the device to sum on if the process groups have no back end for `device`, else None.
        params: a line about each parameter, in the order of the message.
        sizes: how many of these parameters each parameter group has, in the same order.
    """

    def __init__(self, ranks: tuple[int, ...], process_groups, device, staging, params, sizes) -> None:
        self.ranks, self.process_groups, self.device, self.staging = ranks, process_groups, device, staging
        self._params: list[str] = params
        self._sizes: list[int] = sizes
        self._layout_digest = zlib.crc32(f"{params} {sizes}".encode())
        self._options: list[tuple] = []
        self._given: dict[str, bool] = {}
        self._others: tuple = ()  # options that are not numbers; they seldom change
        self._digest = self._agreed = self._others_digest = 0
        # The weights of all ranks add up to 0, and those of only some ranks never do. So a different digest
        # shows, whichever ranks have it. Sums stay below 2**50, so that fp64 has them exactly.
        count, index = len(ranks), ranks.index(dist.get_rank())
        self._weight = index + 1 if index < count - 1 else -(count * (count - 1) // 2)
        self._mask = (1 << min(32, 50 - 2 * count.bit_length())) - 1

    def set_options(self, groups: list[dict], given: dict[str, bool]) -> None:
        """Takes the options of a step: those of the parameters' groups, and which tensors AMP gave.

        The value of an lr on an accelerator is left out, because reading it would wait for the device.
        """
        options = [get_hyperparameters(group) for group in groups]
        for i, (lr, *others) in enumerate(options):
            if isinstance(lr, Tensor):
                options[i] = (lr.item() if lr.device.type == "cpu" else _ON_DEVICE, *others)
        if options == self._options and given == self._given:
            return
        n = len(NUMBERS)
        numbers = array("d", [-1.0 if x is _ON_DEVICE else x for row in options for x in row[:n]])
        others = [row[n:] for row in options], given
        if others != self._others:
            self._others, self._others_digest = others, zlib.crc32(repr(others).encode(), self._layout_digest)
        digest = zlib.crc32(numbers, self._others_digest)
        self._options, self._given, self._digest = options, given, digest & self._mask

    def last_row(self) -> float:
        """What this rank adds to the sum: 0 unless its options changed. The sum is 0 if all ranks agree."""
        return float(self._weight * (self._digest - self._agreed))

    def message_of_trouble(self) -> Tensor:
        """What a rank that cannot step sends instead of its norms."""
        message = torch.zeros(len(self._params) + 1, 2, dtype=torch.float64, device=self.device)
        message[-1, 1] = _TROUBLE
        return message

    def settle(self) -> None:
        """Records that all ranks agree."""
        self._agreed = self._digest

    def disagreement(self, error: Exception | None = None) -> Exception | None:
        """Returns the `error` of this rank, that of another rank, or one that says how the ranks differ.

        All ranks call this at once. Either all get an error, or none does.
        """
        rank = dist.get_rank()
        text = None if error is None else f"{type(error).__name__}: {error}"
        reports = self._gather((rank, self._digest, text))
        if error is not None:
            return error
        for other, _, text in reports:
            if text is not None:
                return RuntimeError(f"rank {other} cannot step, so no rank has: {text[:2000]}")
        digests = {other: digest for other, digest, _ in reports}
        usual, _ = Counter(digests.values()).most_common(1)[0]
        if set(digests.values()) == {usual}:
            self.settle()
            return None
        # Only one rank sends its details, because there may be a thousand ranks.
        reference = min(other for other, digest in digests.items() if digest == usual)
        own = self._params, self._sizes, self._options, self._given
        theirs = dict(self._gather((rank, own if rank == reference else None)))[reference]
        own_text = None if self._digest == usual else _difference(own, theirs, reference)
        texts = self._gather((rank, own_text))
        found = [f"rank {other} {text}" for other, text in texts if text is not None]
        more = f"; {len(found) - 4} more ranks differ" if len(found) > 4 else ""
        return ValueError(
            f"ranks {_short(self.ranks)} share parameters and have to step them alike, so none has stepped: "
            f"{'; '.join(found[:4])}{more}"
        )

    def _gather(self, report: tuple) -> list[tuple]:
        """Collects the reports of all ranks, sorted by rank."""
        reports = [report]
        for group in self.process_groups:
            received: list = [None] * dist.get_world_size(group)
            dist.all_gather_object(received, reports, group=group)
            reports = [report for part in received for report in part]
        return sorted(reports, key=itemgetter(0))


class Exchange:
    """Adds up messages. If a rank has an error or differs from the others, all ranks get an error."""

    def __init__(self) -> None:
        self._unseen: list[tuple] = []  # sums on their way to the host

    def add_up(self, messages: list[tuple[Peers, Tensor]]) -> None:
        """Replaces each message by its sum over the ranks.

        The host does not wait for an accelerator. There a last row that is not 0 must keep the step from
        changing anything, and look_back() raises the error in the next step.
        """
        _all_reduce(messages)
        self._look(messages, None)

    def raise_everywhere(self, error: Exception, all_peers: list[Peers]) -> NoReturn:
        """Sends all messages, so that no other rank waits for this one, and then raises `error`."""
        messages = [(peers, peers.message_of_trouble()) for peers in all_peers]
        try:
            _all_reduce(messages)
            self._look(messages, error)
        finally:
            raise error

    def announce_other_params(self, all_peers: list[Peers]) -> None:
        """Tells the other ranks that this one has other parameters now. Returns if all ranks have."""
        messages = [(peers, peers.message_of_trouble()) for peers in all_peers]
        _all_reduce(messages)
        alone = [(peers, m) for peers, m in messages if m[-1, 1].item() != len(peers.ranks) * _TROUBLE]
        if alone:
            error = ValueError(
                "this rank has other parameters than in the step before, and other ranks have not"
            )
            self._look(alone, error)
            raise error

    def look_back(self) -> None:
        """Raises the errors that the sums of the step before show, if the host did not wait for them."""
        unseen, self._unseen = self._unseen, []
        for *_, event in unseen:
            event.synchronize()
        _raise_if_not_zero([(peers, value.item(), error) for peers, value, error, _ in unseen])

    def _look(self, messages, error: Exception | None) -> None:
        seen = []
        for peers, message in messages:
            value = message[-1, 1]
            if not message.is_cuda:
                seen.append((peers, value.item(), error))
            elif not torch.cuda.is_current_stream_capturing():
                on_host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(message.device))
                self._unseen.append((peers, on_host, error, event))
        _raise_if_not_zero(seen)


def raise_first(errors: list[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _raise_if_not_zero(sums: list[tuple[Peers, float, Exception | None]]) -> None:
    errors = []
    for peers, value, error in sums:
        if value != 0.0:
            errors.append(peers.disagreement(error))
        else:
            peers.settle()
    raise_first(errors)


def _all_reduce(messages: list[tuple[Peers, Tensor]]) -> None:
    sums = [message if peers.staging is None else message.to(peers.staging) for peers, message in messages]
    for depth in range(max((len(peers.process_groups) for peers, _ in messages), default=0)):
        works = [
            dist.all_reduce(total, group=peers.process_groups[depth], async_op=True)
            for (peers, _), total in zip(messages, sums)
            if depth < len(peers.process_groups)
        ]
        for work in works:
            work.wait()
    for (_, message), total in zip(messages, sums):
        if total is not message:
            message.copy_(total)


def _difference(own, theirs, reference: int) -> str:
    """Describes the first difference of a rank's parameters and options from those of rank `reference`."""
    (params, sizes, options, given), (their_params, their_sizes, their_options, their_given) = own, theirs
    for index, (param, their) in enumerate(zip(params, their_params)):
        if param != their:
            return f"has {param} as shared parameter {index} where rank {reference} has {their}"
    if len(params) != len(their_params):
        longer = max(params, their_params, key=len)
        return (
            f"has {len(params)} shared parameters and rank {reference} has {len(their_params)}; the first "
            f"that one of them lacks is {longer[min(len(params), len(their_params))]}"
        )
    begin = 0
    for size, their_size, values, their_values in zip(sizes, their_sizes, options, their_options):
        where = f"the group that begins with {params[begin]}"
        if size != their_size:
            return f"has {size} shared parameters in {where}; rank {reference} has {their_size}"
        for name, a, b in zip(HYPERPARAMETERS, values, their_values):
            if a != b:
                return f"has {name}={a!r} where rank {reference} has {b!r}, in {where}"
        begin += size
    for name, is_given in given.items():
        if is_given != their_given[name]:
            return f"has {'a' if is_given else 'no'} {name}, unlike rank {reference}"
    return f"has other options than rank {reference}"


def _short(ranks) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"
