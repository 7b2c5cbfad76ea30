"""The arithmetic of collectives: element-wise reductions of several arrays into one or two, compiled for each dtype.

A kernel is a C function that takes addresses, so that the interpreter is compiled once and calls any of them::

    kernel(out, also, sources, source_count, count, divisor)

`out` and `also` (0: none) get the same result; `sources` is the address of `source_count` addresses, combined from left
to right. An output may be one of the sources, but must not overlap one otherwise. Half-precision numbers are combined
in float32 and rounded once, when they are written. `divisor` above 1 divides the result (average).

Everything is element by element, so neither the number of pieces nor the width of a vector register changes a bit.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
from functools import cache

import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from headway.errors import InputError

__all__ = ["OPERATIONS", "call_kernel", "check_operation", "copy_bytes", "reduction_kernel"]

OPERATIONS = ("sum", "average", "min", "max", "product", "band", "bor", "bxor")
"""Names of the operations. Bitwise ones are for integers and bool, `average` is not for bool."""

_SUM, _MIN, _MAX, _PRODUCT, _BAND, _BOR, _BXOR = range(7)
_CODES = {
    "sum": _SUM, "average": _SUM, "min": _MIN, "max": _MAX, "product": _PRODUCT,
    "band": _BAND, "bor": _BOR, "bxor": _BXOR,
}  # fmt: skip

# dtype → (how it lies in memory, what it is computed in). bfloat16 and float16 lie as 16 bits and are widened by hand,
# because numba has no arithmetic for them on processors.
_TYPES = {
    torch.float32: (types.float32, types.float32),
    torch.float64: (types.float64, types.float64),
    torch.bfloat16: (types.uint16, types.float32),
    torch.float16: (types.int16, types.float32),
    torch.int8: (types.int8, types.int8),
    torch.int16: (types.int16, types.int16),
    torch.int32: (types.int32, types.int32),
    torch.int64: (types.int64, types.int64),
    torch.uint8: (types.uint8, types.uint8),
    torch.bool: (types.uint8, types.uint8),
}
_BLOCK = 2048  # elements: what is summed up in between stays in the first-level cache
_PLAIN, _BFLOAT16, _FLOAT16 = range(3)
_FORMATS = {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}


def check_operation(dtype: torch.dtype, operation: str) -> None:
    """Raise InputError where `operation` is unknown or means nothing for `dtype`."""
    if operation not in OPERATIONS:
        raise InputError(f"no operation is called {operation!r}", remedy=f"one of {', '.join(OPERATIONS)}")
    if dtype not in _TYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _TYPES)
        raise InputError(f"{dtype} cannot be reduced", remedy=f"convert to one of {known}")
    if operation in ("band", "bor", "bxor") and dtype.is_floating_point:
        raise InputError(f"{operation} means nothing for {dtype}", remedy="use an integer dtype")
    if operation == "average" and dtype == torch.bool:
        raise InputError("truth values have no average", remedy="convert to float32")


@cache
def reduction_kernel(dtype: torch.dtype, operation: str) -> int:
    """The address of the kernel for `dtype` and `operation` (see the module). Compiled at the first use, then cached
    on disk. Raises InputError as `check_operation` does.

    Truth values: sum and max are "or", product and min are "and". An integer average is rounded towards zero; integer
    overflow wraps around. min and max give NaN where any source is NaN.
    """
    check_operation(dtype, operation)
    stored, computed = _TYPES[dtype]
    code = _CODES[operation]
    if dtype == torch.bool:
        code = {_SUM: _BOR, _MAX: _BOR, _MIN: _BAND, _PRODUCT: _BAND}.get(code, code)
    address = _compile(code, _FORMATS.get(dtype, _PLAIN), stored, computed).address
    assert address is not None
    return address


def _compile(code: int, form: int, stored: types.Type, computed: types.Type):
    is_integer = int(isinstance(computed, types.Integer))
    block, width = _BLOCK, stored.bitwidth // 8

    # The closure holds nothing but numbers and numba types: then numba can find the compiled code on disk again.
    @cfunc(types.void(*[types.int64] * 6), cache=True, error_model="numpy")
    def kernel(out_address, also_address, sources_address, source_count, count, divisor):
        sources = carray(_pointer(sources_address), (source_count,), types.int64)
        scratch = carray(_stack(computed, block), (block,), computed)
        for start in range(0, count, block):
            length = min(block, count - start)
            # Arrays of their own for each block: indices that count from 0 are what the compiler can vectorise.
            offset = start * width
            left = carray(_pointer(sources[0] + offset), (length,), stored)
            right = carray(_pointer(sources[1] + offset), (length,), stored)
            for i in range(length):
                scratch[i] = _combine(code, _widen(form, left[i]), _widen(form, right[i]))
            for position in range(2, source_count):
                more = carray(_pointer(sources[position] + offset), (length,), stored)
                for i in range(length):
                    scratch[i] = _combine(code, scratch[i], _widen(form, more[i]))
            if divisor != 1:
                for i in range(length):
                    scratch[i] = _divide(is_integer, scratch[i], divisor)
            out = carray(_pointer(out_address + offset), (length,), stored)
            if also_address == 0:
                for i in range(length):
                    out[i] = _narrow(form, scratch[i])
            else:
                also = carray(_pointer(also_address + offset), (length,), stored)
                for i in range(length):
                    value = _narrow(form, scratch[i])
                    out[i] = value
                    also[i] = value

    return kernel


@intrinsic(prefer_literal=True)
def _pointer(context, address):
    """An address as a pointer."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic(prefer_literal=True)
def _stack(context, kind, count):
    """Uninitialised memory on the stack, for `count` (known when compiling) elements of `kind`."""
    size = count.literal_value
    element = kind.dtype if hasattr(kind, "dtype") else kind.instance_type

    def generate(context, builder, signature, arguments):
        array = ir.ArrayType(context.get_value_type(element), size)
        with builder.goto_entry_block():
            place = builder.alloca(array)
            place.align = 64
        return builder.bitcast(place, cgutils.voidptr_t)

    return types.voidptr(kind, count), generate


@intrinsic(prefer_literal=True)
def _combine(context, code, left, right):
    """`left` and `right` combined, both of one type, by an operation that is known when compiling."""
    is_float = isinstance(left, types.Float)
    is_signed = isinstance(left, types.Integer) and left.signed
    what = code.literal_value

    def generate(context, builder, signature, arguments):
        _, a, b = arguments
        if what == _SUM:
            return builder.fadd(a, b) if is_float else builder.add(a, b)
        if what == _PRODUCT:
            return builder.fmul(a, b) if is_float else builder.mul(a, b)
        if what == _BAND:
            return builder.and_(a, b)
        if what == _BOR:
            return builder.or_(a, b)
        if what == _BXOR:
            return builder.xor(a, b)
        sign = "<" if what == _MIN else ">"
        if is_float:
            # NaN on the left stays, NaN on the right fails the ordered comparison and is taken.
            keep = builder.or_(builder.fcmp_ordered(sign, a, b), builder.fcmp_unordered("uno", a, a))
        else:
            keep = (builder.icmp_signed if is_signed else builder.icmp_unsigned)(sign, a, b)
        return builder.select(keep, a, b)

    return left(code, left, right), generate


@intrinsic(prefer_literal=True)
def _divide(context, is_integer, value, divisor):
    """`value` by the int64 `divisor`, in the type of `value`; integers towards zero."""
    kind = value

    def generate(context, builder, signature, arguments):
        _, number, by = arguments
        target = context.get_value_type(kind)
        if not is_integer.literal_value:
            return builder.fdiv(number, builder.sitofp(by, target))
        wide = ir.IntType(64)
        if kind.signed:
            return builder.trunc(builder.sdiv(builder.sext(number, wide), by), target) if kind.bitwidth < 64 else (
                builder.sdiv(number, by)
            )  # fmt: skip
        return builder.trunc(builder.udiv(builder.zext(number, wide), by), target)

    return kind(is_integer, value, divisor), generate


@intrinsic(prefer_literal=True)
def _widen(context, form, stored):
    """What is computed with: the number itself, or the float32 of 16 bits."""
    kind = form.literal_value
    result = stored if kind == _PLAIN else types.float32

    def generate(context, builder, signature, arguments):
        bits = arguments[1]
        if kind == _PLAIN:
            return bits
        if kind == _FLOAT16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, 16)), ir.FloatType())

    return result(form, stored), generate


@intrinsic(prefer_literal=True)
def _narrow(context, form, value):
    """What is stored: the number itself, or float32 rounded to the nearest (ties to even) of 16 bits."""
    kind = form.literal_value
    result = {_PLAIN: value, _BFLOAT16: types.uint16, _FLOAT16: types.int16}[kind]

    def generate(context, builder, signature, arguments):
        number = arguments[1]
        if kind == _PLAIN:
            return number
        half, word = ir.IntType(16), ir.IntType(32)
        if kind == _FLOAT16:
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), half)
        bits = builder.bitcast(number, word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        # Rounding may carry a NaN's fraction over into infinity.
        quiet = builder.or_(bits, ir.Constant(word, 0x400000))
        is_nan = builder.fcmp_unordered("uno", number, number)
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), ir.Constant(word, 16)), half)

    return result(form, value), generate


@intrinsic(prefer_literal=True)
def call_kernel(context, kernel, out, also, sources, source_count, count, divisor):
    """Call the kernel at the address `kernel`, from code that numba compiles."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [word] * 6)
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@intrinsic(prefer_literal=True)
def copy_bytes(context, target, source, count):
    """Copy `count` bytes between two addresses, from code that numba compiles."""

    def generate(context, builder, signature, arguments):
        target, source, count = arguments
        cgutils.raw_memcpy(
            builder,
            builder.inttoptr(target, cgutils.voidptr_t),
            builder.inttoptr(source, cgutils.voidptr_t),
            count,
            1,
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
