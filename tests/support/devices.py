"""Tells what the build can do on a device."""

import torch


def has_kernels(device: str) -> bool:
    """Whether the device exists and the build has fused kernels for it."""
    if device == "cuda" and not torch.cuda.is_available():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("fused_lars::step_", device.upper())
