"""Tests that run in several processes at once, each under a time limit, so that a hang is a failure.

Importing torch takes longer than most of the tests. So the processes are forked from one that has imported
it, and serve all tests of a session. If one hangs or dies, its whole group is ended, and the next test starts
a new one.
"""

import atexit
import functools
import importlib
import inspect
import os
import tempfile
import time
import traceback
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh

TIME_LIMIT = 120.0  # seconds for a test; a hang takes this long, and a slow machine must not look like a hang
PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint.state_dict",
]
GRACE = 5.0  # seconds for the other ranks after one has failed

_pools: dict[int, "Ranks"] = {}


class Ranks:
    """Processes of one gloo group on this machine that wait for functions to run."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._directory = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self._directory.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, module: str, name: str, kwargs: dict, time_limit: float) -> list:
        """Calls `module.name.body(**kwargs)` on every rank and returns their results.

        Fails the test with the traceback of every failed rank, and names the ranks that did not end in time.
        """
        for pipe in self._pipes:
            pipe.send((module, name, kwargs))
        results: dict[int, tuple[bool, object]] = {}
        deadline = time.monotonic() + time_limit
        while len(results) < len(self._pipes):
            pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            for pipe in wait([*pending], timeout=max(0.0, deadline - time.monotonic())):
                try:
                    results[pending[pipe]] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    results[pending[pipe]] = (False, "the process died")
                if not results[pending[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
            if time.monotonic() >= deadline:
                break
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in sorted(results.items()) if not ok]
        missing = [f"rank {rank}: no end in time" for rank in range(len(self._pipes)) if rank not in results]
        if missing or not self.are_alive():
            self.close()
        if missing or failures:
            pytest.fail("\n".join(failures + missing), pytrace=False)
        return [results[rank][1] for rank in range(len(self._pipes))]

    def are_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for world_size, ranks in [*_pools.items()]:
            if ranks is self:
                del _pools[world_size]
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._directory.cleanup()


def run_on_ranks(world_size: int, body, time_limit: float = TIME_LIMIT, **kwargs) -> list:
    """Runs a function of a test module on `world_size` ranks. It may be marked with :func:`on_ranks`."""
    if world_size in _pools and not _pools[world_size].are_alive():
        _pools[world_size].close()
    if world_size not in _pools:
        _pools[world_size] = Ranks(world_size)
    return _pools[world_size].run(body.__module__, body.__name__, kwargs, time_limit)


def on_ranks(*world_sizes: int, time_limit: float = TIME_LIMIT):
    """Makes a function a test that runs on all ranks, for each of `world_sizes`. It fails if one does."""

    def decorate(body):
        def test(world_size, **kwargs):
            run_on_ranks(world_size, body, time_limit, **kwargs)

        parameter = inspect.Parameter("world_size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([parameter, *inspect.signature(body).parameters.values()])
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        test.pytestmark = [*getattr(body, "pytestmark", [])]
        test.body = body
        return pytest.mark.parametrize("world_size", world_sizes)(test)

    return decorate


def _serve(rank: int, world_size: int, directory: str, pipe) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    # The groups of a mesh have threads that wake up all the time. Hundreds of them slow all other tests down.
    device_mesh.init_device_mesh = functools.cache(device_mesh.init_device_mesh)
    while True:
        try:
            module, name, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, getattr(function, "body", function)(**kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@atexit.register
def _close_all() -> None:
    for ranks in [*_pools.values()]:
        ranks.close()
