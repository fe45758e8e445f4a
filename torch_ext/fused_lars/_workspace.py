"""Scratch memory of the op, kept from step to step."""

import torch


class Workspace:
    """An op's scratch memory on a device, kept so that a step allocates nothing.

    If it is too small, the op replaces it by larger memory. A captured CUDA graph, or a step on another
    stream, may still use the old memory, so that is kept too. The size at least doubles, so the old memory is
    never much.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(0, dtype=torch.int32, device=device)
        self._memory = [self.tensor.untyped_storage()]

    def after_use(self) -> None:
        memory = self.tensor.untyped_storage()
        if memory.data_ptr() != self._memory[-1].data_ptr():
            self._memory.append(memory)


class Workspaces(dict[torch.device, Workspace]):
    """One workspace for each device. A missing one is made."""

    def __missing__(self, device) -> Workspace:
        workspace = self[device] = Workspace(device)
        return workspace
