"""What differs in torch itself between the supported versions.

Each difference was seen in torch alone, without LARS, in 2.9.1, and in 2.11.0 if it names a later version.
Versions between the last one seen and the named one were not tried. They count as the older.
"""

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# clip_grad_norm_ takes the right norm of Partial DTensor gradients, and does not change their placements.
CLIPS_PARTIAL_GRADIENTS = TORCH >= (2, 14)

# A gradient may have another dtype than its parameter. grad_dtype allows that.
GRADIENTS_HAVE_DTYPES = hasattr(torch.Tensor, "grad_dtype")

# SequentialLR and CosineAnnealingWarmRestarts write to an lr tensor instead of replacing it.
SCHEDULERS_KEEP_LR_TENSORS = TORCH >= (2, 11)

# If a scheduler has written to an lr tensor, SequentialLR takes that value for the initial lr. So each part
# of the schedule starts where the one before it ended.
SEQUENTIAL_LR_TAKES_TENSORS = TORCH >= (2, 11)
