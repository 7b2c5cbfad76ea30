"""Floating-point numbers as integers with one exponent for a whole block, so that their sum is exact.

Adding integers gives the same bits in whatever order they come, which adding floats does not. As in SwitchML (Sapio et
al., NSDI 2021, section 3.7) the workers first agree on the largest exponent that any of them has in a block; then each
rounds x to the integer x · 2**(bits - e), where 2**e is above the magnitude of all of them.

A block's exponent is a byte: that of its largest number as IEEE 754 has it, so |x| < 2**(byte - 126); 0 if all are
zero, `NOT_FINITE` if one is infinite or no number. All functions take flat arrays, and compiled code can call them.
"""

from __future__ import annotations

import math

import numpy as np

from headway.compiled import compiled

__all__ = ["NOT_FINITE", "block_exponents", "quantise", "restore"]

NOT_FINITE = 255
_BIAS = 126


@compiled(nogil=True)
def _largest(bits: np.ndarray) -> np.uint32:
    # Without its sign, a float32 is larger than another when its bits are; infinity and NaN are above all numbers.
    largest = np.uint32(0)
    for index in range(len(bits)):
        largest = max(largest, bits[index] & np.uint32(0x7FFFFFFF))
    return largest


@compiled(nogil=True)
def _block_exponents(bits: np.ndarray, width: int, exponents: np.ndarray) -> None:
    for block in range(len(exponents)):
        largest = _largest(bits[block * width : (block + 1) * width])
        # Numbers below 2**-126 have exponent 0 in IEEE 754, and are counted with those below 2**-125.
        exponents[block] = 0 if largest == 0 else max(largest >> np.uint32(23), np.uint32(1))


def block_exponents(values: np.ndarray, width: int) -> np.ndarray:
    """The exponents (uint8) of the blocks of `width` float32 each; the last block may be shorter."""
    exponents = np.empty(-(-len(values) // width), np.uint8)
    _block_exponents(values.view(np.uint32), width, exponents)
    return exponents


@compiled(nogil=True)
def quantise(values: np.ndarray, own: int, agreed: int, bits: int, integers: np.ndarray) -> None:
    """Write a block's float32 as int32 of magnitude 2**bits at most, for the exponent that was agreed.

    `own` is the block's own exponent. Where it is larger than the agreed one, as a worker's may be that was too late
    for the agreement, values are clipped, which the caller has to say. NaN becomes 0.
    """
    if agreed in (0, NOT_FINITE):
        integers[:] = 0
        return
    scale = math.ldexp(1.0, bits + _BIAS - agreed)
    if own <= agreed:
        for index in range(len(values)):
            integers[index] = np.int32(np.rint(np.float64(values[index]) * scale))
        return
    most = math.ldexp(1.0, bits)
    for index in range(len(values)):
        value = np.float64(values[index]) * scale
        integers[index] = np.int32(np.rint(min(max(value, -most), most))) if value == value else np.int32(0)


@compiled(nogil=True)
def restore(integers: np.ndarray, agreed: int, bits: int, factor: float, values: np.ndarray) -> None:
    """Write the float32 nearest to integer · factor · 2**(e - bits); NaN if the exponent is NOT_FINITE."""
    if agreed == NOT_FINITE:
        values[:] = np.nan
        return
    scale = math.ldexp(1.0, agreed - _BIAS - bits) * factor
    for index in range(len(values)):
        values[index] = np.float32(np.float64(integers[index]) * scale)
