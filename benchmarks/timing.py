"""Measures how long a call takes: on the host by its clock, on a GPU by events, one apart from the other.

Events around a call on an idle GPU would time the host, which queues work more slowly than the GPU does it.
So copies keep the stream busy until the call has been queued. The copies also overwrite the L2.
"""

import time

import torch

_RESOLUTION_MS = 0.0005


class Timer:
    """Times calls on a device, "cpu" or "cuda".

    `filler` is a tensor on the GPU, larger than its L2. Copying it keeps the GPU busy. At most `most_copies`
    copies are queued before a call.
    """

    def __init__(self, device: str, filler: torch.Tensor, most_copies: int = 512) -> None:
        self.device = device
        self._filler, self._copy = filler, torch.empty_like(filler)
        self._copies, self._most_copies = min(8, most_copies), most_copies

    def host_ms(self, function) -> float:
        """Milliseconds until the call returns. On a GPU that is when its work has been queued.

        A copy is queued before, as training queues work before a step: the first call to an idle GPU can take
        the host several times as long.
        """
        if self.device == "cuda":
            torch.cuda.synchronize()
            self._copy.copy_(self._filler)
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)

    def device_ms(self, function, warm: bool = False, calls: int = 1) -> tuple[float, bool]:
        """GPU milliseconds per call for `calls` calls in a row, and whether the GPU was busy throughout.

        Before the calls the L2 holds other data or, if `warm`, what an untimed call has left there. A call
        that queues more work than a stream holds always leaves the GPU idle in between.
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
        """GPU milliseconds per replay, for several replays of a graph in a row."""
        return self.device_ms(replay, warm=True, calls=5)[0]


def capture(function):
    """Returns a function that replays the call as a CUDA graph, or None if the call refuses capture.

    Do this last: after a refusal, torch may believe until the process ends that a capture is still under way.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        return None
    return graph.replay


def launches(function) -> int | None:
    """Counts kernels, copies and memsets of one call. None if torch's profiler does not see the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not e.is_user_annotation for e in on_device) or None
