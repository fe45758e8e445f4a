"""How long a call takes: the host by its clock, a GPU by events, each apart from the other.

Events around a call on an idle GPU time the host, which queues work more slowly than the GPU does it. So the
stream is kept busy with copies until the call has been queued. The copies also overwrite the L2.
"""

import time

import torch

_RESOLUTION_MS = 0.0005


class Timer:
    """Times calls on a device, "cpu" or "cuda".

    `filler` is a tensor on a GPU, larger than its L2, to keep it busy with; at most `most_copies` of it are
    queued before a call.
    """

    def __init__(self, device: str, filler: torch.Tensor, most_copies: int = 512) -> None:
        self.device = device
        self._filler, self._copy = filler, torch.empty_like(filler)
        self._copies, self._most_copies = min(8, most_copies), most_copies

    def host_ms(self, function) -> float:
        """Milliseconds until the call returns, which on a GPU is until its work is queued."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    def device_ms(self, function, warm: bool = False, calls: int = 1) -> tuple[float, bool]:
        """Milliseconds of a GPU for one of `calls` calls in a row, and whether the GPU was busy throughout.

        Before them the L2 holds other data or, if `warm`, what a call that is not timed left there. A call
        that queues more work than a stream takes leaves the GPU idle in between, whatever is done here.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            torch.cuda.synchronize()
            for _ in range(self._copies):
                self._copy.copy_(self._filler)
            if warm:
                function()
            start.record()
            for _ in range(calls):
                function()
            end.record()
            was_busy = not start.query()
            end.synchronize()
            if was_busy or self._copies >= self._most_copies:
                return max(start.elapsed_time(end), _RESOLUTION_MS) / calls, was_busy
            self._copies *= 2

    def replay_ms(self, replay) -> float:
        """Milliseconds of a GPU for one of several replays of a graph in a row."""
        return self.device_ms(replay, warm=True, calls=5)[0]


def capture(function):
    """What replays the call as a CUDA graph; None if it refuses capture.

    After a refusal torch may believe that a capture is still under way, until the process ends: do this last.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        return None
    return graph.replay


def launches(function) -> int | None:
    """Kernels, copies and memsets of one call; None where torch's profiler sees nothing of the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.is_user_annotation for e in on_device) or None
