"""Stochastic rounding and 8-bit momentum in NumPy, one element at a time. It does not call the package."""

import numpy as np
import torch
from torch import Tensor

MOMENTUM_BUFFER, WEIGHT = 0, 1  # what is rounded
BLOCK = 128
F32 = np.float32
LEAST_SCALE = F32(2.0**-112)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter, key, rounds=7) -> list[np.ndarray]:
    """Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3.

    `counter` has four words and `key` has two: numbers or arrays of one size.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        shift = np.uint64(32)
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def random_bits(rng_state, which: int, numel: int) -> np.ndarray:
    """16 bits for each element. 16 elements in a row share a draw, the last eight with its complement."""
    key, update, first_element = (int(x) for x in rng_state)
    element = np.arange(numel, dtype=np.uint64) + np.uint64(first_element)
    draw, place = element // np.uint64(16), element % np.uint64(8)
    words = philox4x32(
        (draw & _LOW, draw >> np.uint64(32), update % 2**32, which), (key % 2**32, key >> 32 & 0xFFFFFFFF)
    )
    word = np.stack(words)[(place // np.uint64(2)).astype(np.int64), np.arange(numel)]
    bits = (word >> (place % np.uint64(2) * np.uint64(16)) & np.uint64(0xFFFF)).astype(np.int64)
    return np.where(element % np.uint64(16) < 8, bits, 0xFFFF - bits)


def to_16_bits(x: np.ndarray, random: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 numbers. A number goes away from zero if its fraction and the random one reach 1."""
    magnitude = np.abs(x.astype(np.float64))
    finite = np.isfinite(magnitude)
    magnitude[~finite] = 0.0
    mantissa, least, largest = (7, -126, 2.0**128) if dtype == torch.bfloat16 else (10, -14, 2.0**16)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - mantissa)
    units = magnitude / unit  # exact
    if dtype == torch.bfloat16:
        rounded = np.floor(units + random * 2.0**-16)
    else:
        # fp32 adds here. That matters only for numbers far below the smallest one of fp16.
        rounded = np.floor(units.astype(F32) + (random >> 3).astype(F32) * F32(2.0**-13)).astype(np.float64)
    result = rounded * unit
    result[result >= largest] = np.inf
    result = np.copysign(np.where(finite, result, np.abs(x)), x)
    return torch.from_numpy(result).to(dtype)


def to_int8(x: np.ndarray, random: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a vector of fp32 numbers. Without random bits it rounds to nearest."""
    codes, scales = np.zeros(x.size, np.int8), np.zeros(-(-x.size // BLOCK), F32)
    for i in range(scales.size):
        block = x[i * BLOCK : (i + 1) * BLOCK].astype(F32)
        largest = np.abs(block).max()
        if not np.isfinite(largest):
            scales[i] = np.nan
            continue
        scales[i] = max(largest, LEAST_SCALE)
        draw = np.full(block.size, 0.5) if random is None else (random[i * BLOCK :][: block.size] >> 4) / 4096
        # 2^-13 is the middle of a step of the random number.
        draw = draw.astype(F32) + F32(2.0**-13)
        square = np.abs(block) * (F32(127**2) / scales[i])
        code = np.floor(np.sqrt(square))
        code += square - code * code > draw * (2 * code + 1)
        codes[i * BLOCK : (i + 1) * BLOCK] = np.copysign(code, block).astype(np.int8)
    return codes, scales


# ---------------------------------------------------------------- the order of elements in memory


def is_dense(tensor: Tensor) -> bool:
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1 and stride != step and tensor.numel():
            return False
        step *= size
    return True


def in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """Returns values as a vector, in the order in which `like` has its elements in memory.

    They are numbered in this order for random bits and blocks: the index order if `like` has gaps.
    """
    if not is_dense(like):
        return values.detach().cpu().reshape(-1)
    copy = torch.empty_strided(like.shape, like.stride(), dtype=values.dtype)
    copy.copy_(values.detach())
    return copy.as_strided((copy.numel(),), (1,))


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of an int8 buffer, which are fp32, in fp64 with the buffer's sizes."""
    result = torch.empty_strided(codes.shape, codes.stride(), dtype=torch.float64)
    vector = in_memory_order(codes, codes).double()
    scale = scales.detach().cpu().double().repeat_interleave(BLOCK)[: vector.numel()]
    factor = (vector * vector.abs()).float() * F32(1 / 127**2)
    result.as_strided((vector.numel(),), (1,)).copy_(factor * scale.float())
    return result
