"""Atomic verbs on words of shared memory, and copies that keep each word whole; compiled by numba.

Addresses are int64, and so are words here: a caller with unsigned ones converts.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["compare_and_swap", "copy_words", "fetch_and_add"]


def _pointer(builder, address):
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _compare_exchange(context, address, expected, desired):
    def generate(context, builder, signature, arguments):
        pair = builder.cmpxchg(_pointer(builder, arguments[0]), arguments[1], arguments[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _add(context, address, amount):
    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _load(context, address):
    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(context, address, value):
    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _pointer(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit("int64(int64, int64, int64)", nogil=True, cache=True)
def compare_and_swap(address, expected, desired):
    """Replace the word at `address` by `desired` if it is `expected`, atomically, a full fence; what was there."""
    return _compare_exchange(address, expected, desired)


@njit("int64(int64, int64)", nogil=True, cache=True)
def fetch_and_add(address, amount):
    """Add `amount` to the word at `address`, atomically, a full fence; what was there."""
    return _add(address, amount)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def copy_words(source, target, count):
    """Copy `count` words, each of them whole: the tearing of a longer access lies between words, never within one."""
    for i in range(count):
        _store(target + 8 * i, _load(source + 8 * i))
