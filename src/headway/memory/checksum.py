"""CRC-32C (Castagnoli) of bytes in memory, and copying them in the same pass.

The tensors on disk carry one for each block, and it is computed while other blocks are in flight: so it must be several
times faster than the disk. Where the processor multiplies 512 bits without carries, that is used (`folding.py`); where
it has an instruction for CRC-32C, that: it takes 8 bytes at a time but answers three cycles later, so three lanes side
by side keep it busy, and a table shifts the checksum of a lane over the bytes that follow it. Elsewhere a table of the
same polynomial gives the same numbers, more slowly.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
import platform

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from headway.compiled import compiled
from headway.memory.folding import ROWS_BYTES, fold, fold_and_copy, fold_and_stream, is_available

__all__ = ["copy_with_crc32c", "crc32c"]

_POLYNOMIAL = 0x82F63B78  # reflected
_LANE = 4096  # bytes of a lane
_LANE_WORDS = _LANE // 8
_LINE_WORDS = 8  # of what the processor fetches at once


def _instruction() -> str:
    features = dict(binding.get_host_cpu_features())
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # type: ignore[attr-defined]  # it compiles for another one
        return ""
    if platform.machine() == "x86_64" and features.get("sse4.2") and features.get("crc32", True):
        return "llvm.x86.sse42.crc32.64.64"
    return ""


def _byte_tables() -> np.ndarray:
    """What each of 8 bytes, 0 to 7 places before the end, does to the checksum ("slicing by 8")."""
    tables = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        tables[0, byte] = value
    for place in range(1, 8):
        tables[place] = (tables[place - 1] >> 8) ^ tables[0][tables[place - 1] & 255]
    return tables


def _lane_tables(bytes_table: np.ndarray) -> np.ndarray:
    """What a lane of zeros does to each byte of a checksum before it (it is linear, so four tables are enough)."""
    tables = np.zeros((4, 256), np.uint32)
    for place in range(4):
        state = np.arange(256, dtype=np.uint32) << (8 * place)
        for _ in range(_LANE):
            state = (state >> 8) ^ bytes_table[state & 255]
        tables[place] = state
    return tables


_INSTRUCTION = _instruction()
_FOLDS = bool(_INSTRUCTION) and is_available()
_LINE = 64  # bytes that go past the caches at a time
_BYTES = _byte_tables()
_LANES = _lane_tables(_BYTES[0])


@intrinsic
def _step(typing_context, checksum, word):  # the typing context is numba's
    signature = types.uint64(types.uint64, types.uint64)

    def generate(context, builder, signature, arguments):
        word_type = ir.IntType(64)
        function = builder.module.declare_intrinsic(
            _INSTRUCTION, (), ir.FunctionType(word_type, (word_type, word_type))
        )
        return builder.call(function, arguments)

    return signature, generate


@intrinsic
def _fetch(typing_context, address):  # the typing context is numba's
    """Ask for what lies at an address, wherever it is: nothing is read, and no address is wrong."""
    signature = types.void(types.int64)

    def generate(context, builder, signature, arguments):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
        place = builder.inttoptr(arguments[0], pointer)
        builder.call(function, (place, number(0), number(3), number(1)))  # to read, to stay, data
        return context.get_dummy_value()

    return signature, generate


@compiled(nogil=True)
def _by_table(checksum, data, start, tables):
    for i in range(start, len(data)):
        checksum = (checksum >> np.uint32(8)) ^ tables[0, (checksum ^ np.uint32(data[i])) & np.uint32(255)]
    return checksum


@compiled(nogil=True)
def _by_tables(data, tables):
    checksum = np.uint32(0xFFFFFFFF)
    whole = len(data) // 8 * 8
    for i in range(0, whole, 8):
        low = checksum ^ (
            np.uint32(data[i])
            | (np.uint32(data[i + 1]) << np.uint32(8))
            | (np.uint32(data[i + 2]) << np.uint32(16))
            | (np.uint32(data[i + 3]) << np.uint32(24))
        )
        checksum = (
            tables[7, low & np.uint32(255)]
            ^ tables[6, (low >> np.uint32(8)) & np.uint32(255)]
            ^ tables[5, (low >> np.uint32(16)) & np.uint32(255)]
            ^ tables[4, low >> np.uint32(24)]
            ^ tables[3, data[i + 4]]
            ^ tables[2, data[i + 5]]
            ^ tables[1, data[i + 6]]
            ^ tables[0, data[i + 7]]
        )
    return _by_table(checksum, data, whole, tables) ^ np.uint32(0xFFFFFFFF)


@compiled(nogil=True)
def _shift(checksum, lanes):
    value = np.uint32(checksum)
    return np.uint64(
        lanes[0, value & np.uint32(255)]
        ^ lanes[1, (value >> np.uint32(8)) & np.uint32(255)]
        ^ lanes[2, (value >> np.uint32(16)) & np.uint32(255)]
        ^ lanes[3, value >> np.uint32(24)]
    )


@compiled(nogil=True)
def _by_instruction(data, words, tables, lanes):
    first = np.uint64(0xFFFFFFFF)
    at = 0
    while at + 3 * _LANE_WORDS <= len(words):
        second = np.uint64(0)
        third = np.uint64(0)
        for line in range(at, at + _LANE_WORDS, _LINE_WORDS):
            # A lane is a page, where the processor's own foresight ends: it would wait for memory half of the time.
            for lane in range(3, 6):
                _fetch(words.ctypes.data + 8 * (line + lane * _LANE_WORDS))
            for i in range(line, line + _LINE_WORDS):
                first = _step(first, words[i])
                second = _step(second, words[i + _LANE_WORDS])
                third = _step(third, words[i + 2 * _LANE_WORDS])
        first = _shift(_shift(first, lanes) ^ second, lanes) ^ third
        at += 3 * _LANE_WORDS
    for i in range(at, len(words)):
        first = _step(first, words[i])
    return _by_table(np.uint32(first), data, 8 * len(words), tables) ^ np.uint32(0xFFFFFFFF)


@compiled(nogil=True)
def _finished(left, data, start, tables):
    """The checksum of the bytes that folding has left, and of those of `data` from `start`, which it did not take."""
    checksum = np.uint64(0)
    for i in range(len(left)):
        checksum = _step(checksum, left[i])
    return _by_table(np.uint32(checksum), data, start, tables) ^ np.uint32(0xFFFFFFFF)


@compiled(nogil=True)
def _by_folding(data, tables):
    left = np.empty(ROWS_BYTES // 8, np.uint64)
    size = len(data) // ROWS_BYTES * ROWS_BYTES
    fold(data.ctypes.data, data.ctypes.data, size, np.uint64(0xFFFFFFFF), left.ctypes.data)
    return _finished(left, data, size, tables)


@compiled(nogil=True)
def _copied_by_folding(target, data, tables, past_caches):
    left = np.empty(ROWS_BYTES // 8, np.uint64)
    size = len(data) // ROWS_BYTES * ROWS_BYTES
    if past_caches and target.ctypes.data % _LINE == 0:
        fold_and_stream(data.ctypes.data, target.ctypes.data, size, np.uint64(0xFFFFFFFF), left.ctypes.data)
    else:
        fold_and_copy(data.ctypes.data, target.ctypes.data, size, np.uint64(0xFFFFFFFF), left.ctypes.data)
    for i in range(size, len(data)):
        target[i] = data[i]
    return _finished(left, data, size, tables)


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C of a contiguous array of uint8 (RFC 3720, section 12.1). Lets other threads run."""
    if _FOLDS and len(data) >= ROWS_BYTES:
        return int(_by_folding(data, _BYTES))
    if not _INSTRUCTION:
        return int(_by_tables(data, _BYTES))
    words = data[: len(data) // 8 * 8].view(np.uint64)
    return int(_by_instruction(data, words, _BYTES, _LANES))


def copy_with_crc32c(target: np.ndarray, data: np.ndarray, *, past_caches: bool = False) -> int:
    """Copy `data` to `target`, which is as long (contiguous, uint8, apart), and return its CRC-32C.

    `past_caches`: the processor will not read `target` soon. One pass where the processor can. Lets other threads run.
    """
    if _FOLDS and len(data) >= ROWS_BYTES:
        return int(_copied_by_folding(target, data, _BYTES, past_caches))
    np.copyto(target, data)
    return crc32c(target)
