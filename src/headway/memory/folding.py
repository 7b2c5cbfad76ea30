"""CRC-32C by carry-less multiplication, 64 bytes at a time, and copying in the same pass.

A checksum is a remainder of polynomials, so 64 bytes may be replaced by what they leave some way further on: two
products, added to the bytes there (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
Instruction", Intel 2009). Four such rows are carried along side by side; the 256 bytes that are left at the end have
the checksum of all.

The lines are asked for as not to be kept, and copies may go past the caches: what is checksummed on its way to the disk
is next read by the disk, and nobody here looks at it again.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
import platform
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = ["ROWS_BYTES", "fold", "fold_and_copy", "fold_and_stream", "is_available"]

_POLYNOMIAL = 0x11EDC6F41  # Castagnoli's, of degree 32
_WORDS = 8  # of 64 bits, in a register
_ROWS = 4  # as many as the processor needs to be busy while a product is under way
_ROW_BYTES = 8 * _WORDS
_AHEAD = 4096  # bytes: how far ahead memory is asked for
_LOW_WITH_LOW, _HIGH_WITH_HIGH = 0x00, 0x11  # which halves are multiplied

ROWS_BYTES = _ROWS * _ROW_BYTES
"""Bytes that are folded at a time, and that are left at the end."""


def is_available() -> bool:
    """Whether this processor multiplies 512 bits without carries (AVX-512 with VPCLMULQDQ), and numba may know it."""
    features = dict(binding.get_host_cpu_features())
    is_own = numba.config.ENABLE_AVX and not (numba.config.CPU_NAME or numba.config.CPU_FEATURES)  # type: ignore[attr-defined]
    wanted = ("avx512f", "vpclmulqdq", "sse4.2")
    return bool(is_own) and platform.machine() == "x86_64" and all(features.get(feature) for feature in wanted)


def _forwards(bits: int) -> int:
    """x^bits modulo the polynomial, the lowest power in the highest bit, as a factor of 64 such bits."""
    value = 1
    for _ in range(bits):
        value <<= 1
        if value >> 32:
            value ^= _POLYNOMIAL
    return int(f"{value:032b}"[::-1], 2) << 1  # a product of two such numbers lies one bit too low


def _folding(*, copies: bool, past_caches: bool) -> Any:
    @intrinsic
    def folding(typing_context, source, target, size, checksum, left):  # the typing context is numba's
        """Fold `size` bytes (a multiple of `ROWS_BYTES`, not 0) at the address `source`; all arguments are numbers.

        What is left is put down at the address `left`; `checksum` is that of what came before, as it is carried.
        """
        signature = types.void(types.int64, types.int64, types.int64, types.uint64, types.int64)

        def generate(context, builder, signature, arguments):
            source, target, size, checksum, left = arguments
            byte, number, word = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            row = ir.VectorType(word, _WORDS)
            module = builder.module
            multiply = module.declare_intrinsic("llvm.x86.pclmulqdq.512", (), ir.FunctionType(row, (row, row, byte)))
            kind = ir.FunctionType(ir.VoidType(), (byte.as_pointer(), number, number, number))
            fetch = module.declare_intrinsic("llvm.prefetch", (byte.as_pointer(),), kind)
            factors = ir.Constant(row, [_forwards(8 * ROWS_BYTES + 32), _forwards(8 * ROWS_BYTES - 32)] * (_WORDS // 2))

            def address(base, offset, number_of_row):
                return builder.add(base, builder.add(offset, word(number_of_row * _ROW_BYTES)))

            def taken(offset, number_of_row):
                place = builder.inttoptr(address(source, offset, number_of_row), row.as_pointer())
                value = builder.load(place, align=1)
                if copies:
                    place = builder.inttoptr(address(target, offset, number_of_row), row.as_pointer())
                    stored = builder.store(value, place, align=_ROW_BYTES if past_caches else 1)
                    if past_caches:
                        stored.set_metadata("nontemporal", module.add_metadata([number(1)]))
                return value

            first = [taken(word(0), i) for i in range(_ROWS)]
            before = builder.insert_element(ir.Constant(row, [0] * _WORDS), checksum, number(0))
            first[0] = builder.xor(first[0], before)
            entry = builder.block
            head, body, end = (builder.append_basic_block(name) for name in ("head", "body", "end"))
            builder.branch(head)

            builder.position_at_end(head)
            offset = builder.phi(word)
            rows = [builder.phi(row) for _ in range(_ROWS)]
            offset.add_incoming(word(ROWS_BYTES), entry)
            for carried, value in zip(rows, first, strict=True):
                carried.add_incoming(value, entry)
            builder.cbranch(builder.icmp_signed("<", offset, size), body, end)

            builder.position_at_end(body)
            for i in range(_ROWS):
                line = builder.add(address(source, offset, i), word(_AHEAD))
                # To read, not to be kept, data. It is a wish: beyond the end nothing happens.
                builder.call(fetch, (builder.inttoptr(line, byte.as_pointer()), number(0), number(0), number(1)))
            for i, carried in enumerate(rows):
                low = builder.call(multiply, (carried, factors, byte(_LOW_WITH_LOW)))
                high = builder.call(multiply, (carried, factors, byte(_HIGH_WITH_HIGH)))
                carried.add_incoming(builder.xor(builder.xor(low, high), taken(offset, i)), body)
            offset.add_incoming(builder.add(offset, word(ROWS_BYTES)), body)
            builder.branch(head)

            builder.position_at_end(end)
            for i, carried in enumerate(rows):
                builder.store(carried, builder.inttoptr(address(left, word(0), i), row.as_pointer()), align=1)
            if past_caches:  # before anybody is told that it is there
                builder.call(
                    module.declare_intrinsic("llvm.x86.sse.sfence", (), ir.FunctionType(ir.VoidType(), ())), ()
                )
            return context.get_dummy_value()

        return signature, generate

    return folding


fold = _folding(copies=False, past_caches=False)
"""For compiled code: fold bytes (`source`, any `target`, `size`, `checksum`, `left`)."""

fold_and_copy = _folding(copies=True, past_caches=False)
"""For compiled code: `fold`, and copy the bytes to the address `target`."""

fold_and_stream = _folding(copies=True, past_caches=True)
"""For compiled code: `fold_and_copy` past the caches, to a `target` that is a multiple of 64."""
