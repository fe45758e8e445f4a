"""LARS for PyTorch with fused CPU and CUDA kernels.

:class:`LARS`, in capitals, is the ``torch.optim.Optimizer``. :class:`Lars` is for programs that cannot use
one, such as TorchScript. The caller gives it parameters and gradients, and it keeps its state under ids that
the caller chooses.
"""

from typing import Any

import torch

from ._convert import convert_state_dict
from ._lars_class import Lars
from ._library import __version__, cmake_prefix_path, show_config
from ._optimizer import LARS
from ._param_groups import param_groups

ops: Any = torch.ops.fused_lars

__all__ = [
    "LARS",
    "Lars",
    "__version__",
    "cmake_prefix_path",
    "convert_state_dict",
    "ops",
    "param_groups",
    "show_config",
]
