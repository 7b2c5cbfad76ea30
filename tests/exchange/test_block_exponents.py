"""Floats as integers with a common exponent: nothing is lost but what the bits cannot hold, at any magnitude."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headway.exchange.block_exponents import NOT_FINITE, block_exponents, quantise, restore

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=200)
@given(arrays(np.float32, st.integers(1, 40), elements=floats), st.integers(1, 9), st.integers(4, 29))
def test_what_is_restored_is_the_nearest_multiple_of_the_block_s_unit(values, width, bits):
    exponents = block_exponents(values, width).tolist()
    assert len(exponents) == math.ceil(len(values) / width)
    for block, exponent in enumerate(exponents):
        part = values[block * width : (block + 1) * width]
        largest = float(max(abs(part)))
        if largest == 0:
            assert exponent == 0
        else:
            # The least power of two above all of them, but not below 2**-125.
            assert exponent - 126 == max(math.frexp(largest)[1], -125)
        integers, back = np.empty(len(part), np.int32), np.empty(len(part), np.float32)
        quantise(part, exponent, exponent, bits, integers)
        assert max(abs(int(x)) for x in integers) <= 2**bits
        with np.errstate(over="ignore"):
            restore(integers, exponent, bits, 1.0, back)
            for number, integer, found in zip(part, integers, back, strict=True):
                right = round(math.ldexp(float(number), bits - (exponent - 126))) if exponent else 0
                assert int(integer) == right
                assert found == np.float32(math.ldexp(right, exponent - 126 - bits) if exponent else 0.0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_block_that_is_not_finite_is_marked_and_comes_back_as_nan(bad):
    values = np.array([1, bad, 3, 4], np.float32)
    exponents = block_exponents(values, 2).tolist()
    assert exponents == [NOT_FINITE, 129]
    integers, back = np.full(2, 9, np.int32), np.zeros(2, np.float32)
    quantise(values[:2], NOT_FINITE, NOT_FINITE, 28, integers)
    assert integers.tolist() == [0, 0]
    restore(integers, NOT_FINITE, 28, 1.0, back)
    assert np.isnan(back).all()


def test_values_above_the_agreed_exponent_are_clipped_and_never_wrap_around():
    values = np.array([1e38, -1e38, 1.0, np.nan, np.inf], np.float32)
    integers = np.empty(5, np.int32)
    quantise(values, NOT_FINITE, 128, 20, integers)
    assert integers.tolist() == [2**20, -(2**20), 2**18, 0, 2**20]
    quantise(values[:2], 253, 0, 20, integers[:2])
    assert integers[:2].tolist() == [0, 0]


def test_an_average_is_rounded_once():
    back = np.empty(1, np.float32)
    restore(np.array([2**24 + 1], np.int32), 126 + 24, 24, 1 / 3, back)
    assert back[0] == np.float32((2**24 + 1) / 3)
