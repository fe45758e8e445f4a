"""Scratch memory of the op, kept from step to step."""

import torch


class Workspace:
    """An op's scratch on a device, kept so that a step allocates nothing.

    The op gives it larger memory where it is too small. A captured CUDA graph, or a step on another stream,
    may still use the memory that it had, so that is kept too; since it at least doubles, that is not much.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(0, dtype=torch.int32, device=device)
        self._memory = [self.tensor.untyped_storage()]

    def after_use(self) -> None:
        memory = self.tensor.untyped_storage()
        if memory.data_ptr() != self._memory[-1].data_ptr():
            self._memory.append(memory)


class Workspaces(dict[torch.device, Workspace]):
    """One for each device; one that is missing is made."""

    def __missing__(self, device) -> Workspace:
        workspace = self[device] = Workspace(device)
        return workspace
