"""LARS for PyTorch with fused CPU and CUDA kernels; see ``fused_lars.LARS``."""

import torch

from . import _library  # noqa: F401  registers the ops
from .optimizer import LARS
from .param_groups import param_groups

ops = torch.ops.fused_lars

__all__ = ["LARS", "ops", "param_groups"]
