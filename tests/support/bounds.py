"""How far a correct implementation may be from reference.py, derived from the number of roundings.

u is the unit roundoff of the computation: 2^-53 for fp64 parameters, 2^-24 for all others. To first order:

squared norm  A square is rounded and then added to a lane. An fp32 tile of 4,096 elements has 32 lanes of 128
              additions, which are added up in fp64. An fp64 tile has 16 lanes of 256, then 16 lanes and the
              tiles are added up. Terms are positive, so the relative error is at most 129 u (fp32) or
              257 + 16 + tiles (fp64). The norm has half of it. A backend that adds fewer numbers in a row is
              within the same bound.
decayed norm  In its elements g' + weight_decay * w, each factor and product is rounded (2 of each term), and
              the sum (1). That is 2 u of the terms' norms and u of the norm, beside the norm's own error.
q             The sum of the relative errors of both norms. The operations that follow in fp64 add nothing in
              fp32, and at most 8 u in fp64.
u             q and each coefficient are rounded to the computation's type (1 each). Then come a product (1),
              a sum (1) and the product with q (1): q + 5.
v             One coefficient (1), product (1) and sum (1) more: q + 8 of the terms' absolute values.
direction     With Nesterov, the same three more: q + 11.
w             Coefficient and product with step_size: q + 13 of the absolute values of the update's terms. The
              subtraction adds 1 of |w|.
storage       Half a unit in the last place of the stored dtype: its unit roundoff times the value, or half of
              its smallest number.
stochastic    A number is rounded to one of its two neighbours. So the error is up to a whole unit in the last
              place: twice the unit roundoff times the value, or the smallest number.
int8          In a block whose largest magnitude is L, a code c stands for (c / 127)^2 * L. x becomes one of
              its two neighbours. They are (2 c + 1) / 127^2 * L apart, where c is at most 127 * sqrt(x / L).
              Four operations to encode and to decode are rounded (u each). L is at least 2^-112.

SLACK covers the products of errors that a first-order bound leaves out.
"""

import numpy as np
import torch

SLACK = 1.02
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
SMALLEST = {
    torch.float64: 5e-324,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
_TILE = 4096

# int8 momentum: elements that share a scale, the least scale, and the relative error of the arithmetic.
BLOCK = 128
LEAST_SCALE = 2.0**-112
CODE_ERROR = 4 * 2.0**-24


def norm_error(dtype: torch.dtype, numel: int) -> float:
    """Relative error of the norm of a tensor."""
    if dtype == torch.float64:
        return (257 + 16 + numel // _TILE) / 2 * ROUNDOFF[dtype]
    return 129 / 2 * ROUNDOFF[torch.float32]


def grad_norm_error(weight_dtype, grad_dtype, numel, terms=0.0) -> float:
    """Relative error of the norm of a gradient. `terms` (reference.Norms) is for a decayed gradient."""
    u = ROUNDOFF[torch.float64 if weight_dtype == torch.float64 else torch.float32]
    return norm_error(grad_dtype, numel) + (2 * terms + 1) * u * (terms > 0)


def trust_ratio_error(weight_dtype, grad_dtype, numel, terms=0.0) -> float:
    """Relative error of the trust ratio."""
    fp64 = 8 * ROUNDOFF[torch.float64]
    grad_error = grad_norm_error(weight_dtype, grad_dtype, numel, terms)
    return SLACK * (norm_error(weight_dtype, numel) + grad_error + fp64)


def compute_errors(result, weight_dtype, grad_dtype) -> tuple[np.ndarray, np.ndarray]:
    """Absolute errors of the weight and the momentum buffer before they are stored."""
    u = ROUNDOFF[torch.float64 if weight_dtype == torch.float64 else torch.float32]
    q = trust_ratio_error(weight_dtype, grad_dtype, result.weight.size, result.norms.terms)
    weight = (q + 13 * u) * result.update_terms + u * np.abs(result.weight)
    return SLACK * weight, SLACK * (q + 8 * u) * result.buffer_terms


def stored(value, error, dtype) -> np.ndarray:
    """The error of `value` after it is stored as `dtype`, if its error was `error` before."""
    return error + np.maximum(ROUNDOFF[dtype] * (np.abs(value) + error), SMALLEST[dtype] / 2)


def stored_stochastically(value, error, dtype) -> np.ndarray:
    """Like stored(), of a value that is rounded stochastically."""
    return error + np.maximum(2 * ROUNDOFF[dtype] * (np.abs(value) + error), SMALLEST[dtype])


def stored_in_int8(value, error) -> np.ndarray:
    """Like stored(), of a vector of int8 momentum in the order of memory."""
    most = np.abs(value) + error
    padded = np.zeros(-(-most.size // BLOCK) * BLOCK)
    padded[: most.size] = most
    largest = padded.reshape(-1, BLOCK).max(axis=1).repeat(BLOCK)[: most.size]
    return error + code_gap(most, largest) + CODE_ERROR * most


def code_gap(magnitude, largest) -> np.ndarray:
    """The distance of the codes around a number in a block with a largest magnitude."""
    largest = np.maximum(largest, LEAST_SCALE)
    return (254 * np.sqrt(magnitude / largest) + 1) / 127**2 * largest
