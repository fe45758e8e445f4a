"""What torch itself does otherwise in some of the versions that are supported.

Each was seen in torch alone, without LARS, in 2.9.1 and in 2.11.0 where it names a later version. Versions
between the last one seen and the one named have not been tried and count as the older.
"""

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# clip_grad_norm_ takes the right norm of Partial DTensor gradients, and leaves them as they are.
CLIPS_PARTIAL_GRADIENTS = TORCH >= (2, 14)

# A gradient may have another dtype than its parameter, which grad_dtype allows.
GRADIENTS_HAVE_DTYPES = hasattr(torch.Tensor, "grad_dtype")

# SequentialLR and CosineAnnealingWarmRestarts write to an lr tensor and do not put another in its place.
SCHEDULERS_KEEP_LR_TENSORS = TORCH >= (2, 11)

# SequentialLR takes an lr tensor that a scheduler has written to for the initial lr: each part of the
# schedule starts from where the one before it ended.
SEQUENTIAL_LR_TAKES_TENSORS = TORCH >= (2, 11)
