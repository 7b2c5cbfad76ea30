"""CRC-32C in three ways, the same numbers; and copies that are exact, made in the same pass."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.memory import checksum
from headway.memory.buffers import AlignedMemory
from headway.memory.checksum import copy_with_crc32c, crc32c
from headway.memory.folding import ROWS_BYTES, is_available

LANES = 3 * 4096  # bytes that the instruction's three lanes take at a time


def numbers(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, as RFC 3720 (section 12.1) defines it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.fixture(params=["folding", "instruction", "table"])
def way(request, monkeypatch):
    if request.param == "folding":
        if not is_available():
            pytest.skip("this processor multiplies no 512 bits without carries")
        return request.param
    monkeypatch.setattr(checksum, "_FOLDS", False)
    if request.param == "instruction":
        if not checksum._INSTRUCTION:
            pytest.skip("this processor has no instruction for CRC-32C")
    else:
        monkeypatch.setattr(checksum, "_INSTRUCTION", "")
    return request.param


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=3000))
def test_checksums_are_crc32c(data):
    assert crc32c(np.frombuffer(data, np.uint8)) == slow_crc32c(data)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 255, 256, 257, 511, 512, 1000, 2049])
def test_each_way_computes_crc32c(way, size):
    data = numbers(size + 3, size)[3:]
    assert crc32c(data) == slow_crc32c(data.tobytes())
    assert not size or crc32c(data) != zlib.crc32(data)


@pytest.mark.parametrize("size", [LANES - 1, LANES, LANES + 1, 5 * LANES + 3, 100 * ROWS_BYTES])
def test_each_way_agrees_with_the_table_beyond_the_lanes(way, size, monkeypatch):
    data = numbers(size, size)
    found = crc32c(data)
    monkeypatch.setattr(checksum, "_FOLDS", False)
    monkeypatch.setattr(checksum, "_INSTRUCTION", "")
    assert crc32c(data) == found


def test_checksum_of_the_published_vectors(way):
    # RFC 3720, appendix B.4.
    assert crc32c(np.zeros(32, np.uint8)) == 0x8A9136AA
    assert crc32c(np.full(32, 255, np.uint8)) == 0x62A8AB43
    assert crc32c(np.arange(32, dtype=np.uint8)) == 0x46DD794E


@pytest.mark.parametrize("place", [0, 1, 63, 64, 100])
@pytest.mark.parametrize("start", [0, 1, 64])
@pytest.mark.parametrize("size", [0, 5, 255, 256, 300, 5000])
def test_a_copy_is_exact_stays_within_its_bounds_and_has_the_checksum_of_its_source(way, size, start, place):
    data = numbers(size + start, size)[start:]
    memory = AlignedMemory(8192).tensor.numpy()
    memory[:] = 171
    assert copy_with_crc32c(memory[place : place + size], data) == crc32c(data)
    assert np.array_equal(memory[place : place + size], data)
    assert (memory[:place] == 171).all()
    assert (memory[place + size :] == 171).all()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 6000), flipped=st.integers(0, 48000), seed=st.integers(0, 99))
def test_no_flipped_bit_goes_unnoticed(size, flipped, seed):
    data = numbers(size, seed)
    before = crc32c(data)
    data[flipped // 8 % size] ^= 1 << flipped % 8
    assert crc32c(data) != before
