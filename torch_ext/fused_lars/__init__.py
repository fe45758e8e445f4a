"""LARS for PyTorch with fused CPU and CUDA kernels; see ``fused_lars.LARS``."""

import torch

from ._library import __version__, cmake_prefix_path, show_config
from .optimizer import LARS
from .param_groups import param_groups

ops = torch.ops.fused_lars

__all__ = ["LARS", "__version__", "cmake_prefix_path", "ops", "param_groups", "show_config"]
