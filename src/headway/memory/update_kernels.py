"""The arithmetic of Adam and SGD in one pass, compiled: gradient in, master and moments on, parameter out.

Blocks of a few thousand numbers go through several small loops, each of which vectorises, while they stay in the
first-level cache; memory is read and written once. The order of the operations, and which of them are fused
multiply-adds, is that of torch's kernels for one tensor at a time (`foreach=False, fused=False`), which `fused=True`
shares but for the square root: torch calls MKL's where it was built with it, and that one is not always rounded
correctly. So which square root it is comes in as a number: `EXACT_ROOT` for the processor's own, `NEWTON_ROOT` for one
that is made as MKL's is on some processors (an estimate, and two of Newton's steps without fused multiply-adds, where
`newton_roots` has the same bits), or the address of MKL's function.

bfloat16 lies as 16 bits. Moments can be narrower than float32:

- bfloat16, rounded up or down at random (seeded by step and place): to the nearest, a second moment that changes by a
  thousandth in a step would never change at all.
- 8 bits, a float32 scale for each 256 of them and Dettmers' dynamic tree of 256 values (8-bit Optimizers via Block-wise
  Quantization, ICLR 2022, section 2.2), to the nearest.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.extending import intrinsic

from headway.compiled import compiled

__all__ = [
    "BLOCK_ELEMENTS",
    "EXACT_ROOT",
    "HAS_ESTIMATES",
    "NEWTON_ROOT",
    "adam_update",
    "decode",
    "dynamic_codes",
    "encode",
    "newton_roots",
    "sgd_update",
]

BLOCK_ELEMENTS = 256
"""Moments of 8 bits that share a scale."""

EXACT_ROOT = 0
"""The processor's own square root, rounded correctly."""

NEWTON_ROOT = 1
"""The square root of `newton_roots`."""

_CHUNK = 1024  # elements that go through all loops before the next: some 30 KB of all arrays together
_CALL = 1024  # elements that go through the two halves of AdamW with torch's root: fewer take longer each
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_LARGEST_SQUARED = np.float32((2 - 2.0**-11) * 2.0**127)  # of what lies above, the square of a root may be infinite
_FIRST_SERVED, _LAST_SERVED = _SMALLEST_NORMAL.view(np.uint32), _LARGEST_SQUARED.view(np.uint32)
_FLOAT32, _BFLOAT16, _INT8 = 4, 2, 1  # bytes of an element tell which it is


# numpy's division: Python's looks for zeros first, and so cannot be vectorised.
_compiled = compiled(nogil=True, error_model="numpy")


@intrinsic
def _fma(typing_context, a, b, c):  # the typing context is numba's
    """a * b + c, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return signature, generate


@intrinsic
def _call_root(typing_context, address, count, source, target, mode):  # the typing context is numba's
    """Call MKL's vmsSqrt(count, source, target, mode)."""
    signature = types.void(types.int64, types.int32, types.int64, types.int64, types.int64)

    def generate(context, builder, signature, arguments):
        word, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), (ir.IntType(32), pointer, pointer, word))
        address, count, source, target, mode = arguments
        function = builder.inttoptr(address, kind.as_pointer())
        places = builder.inttoptr(source, pointer), builder.inttoptr(target, pointer)
        builder.call(function, (count, *places, mode))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _bits(typing_context, value):  # the typing context is numba's
    """The bits of a float32."""
    signature = types.uint32(types.float32)

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return signature, generate


@intrinsic
def _number(typing_context, bits):  # the typing context is numba's
    """The float32 that has these bits."""
    signature = types.float32(types.uint32)

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return signature, generate


_WIDTH = 8  # estimates that are made at a time


@intrinsic
def _estimate_roots(typing_context, source, target):  # the typing context is numba's
    """The processor's estimates (12 bits) of 1 / sqrt of the 8 float32 at `source`, to `target`."""
    signature = types.void(types.int64, types.int64)

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.FloatType(), _WIDTH)
        source, target = (builder.inttoptr(each, vector.as_pointer()) for each in arguments)
        name = "llvm.x86.avx.rsqrt.ps.256" if HAS_ESTIMATES else "llvm.sqrt.v8f32"  # the latter is never called
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(vector, (vector,)))
        builder.store(builder.call(function, (builder.load(source, align=4),)), target, align=4)
        return context.get_dummy_value()

    return signature, generate


# What numba was told to compile for, if it was told, need not have what the machine has.
HAS_ESTIMATES = (
    platform.machine() in ("x86_64", "AMD64")
    and config.CPU_NAME is None
    and config.CPU_FEATURES is None
    and get_host_cpu_features().get("avx", False)
)
"""Whether kernels are compiled for a processor that estimates square roots, which `NEWTON_ROOT` is made of."""

_ROOT_MODE = 0x140102  # VML_HA | VML_FTZDAZ_OFF | VML_ERRMODE_IGNORE, as torch calls it


def dynamic_codes(*, signed: bool) -> np.ndarray:
    """The 256 values of the dynamic tree in ascending order, from 0 (signed: nearly -1) to 1.

    The number of leading zeros of a code says the power of ten, the bits after it a fraction between 0.1 and 1: small
    numbers keep their magnitude, large ones their digits.
    """
    above = [value for power in range(7) for value in _middles(power, signed)]
    return np.array([*(-value for value in reversed(above) if signed), 0.0, *above, 1.0]).astype(np.float32)


def _middles(power: int, signed: bool) -> list[float]:
    """The codes between 10^(power - 7) and 10^(power - 6): middles of parts of one length."""
    edges = np.linspace(0.1, 1.0, 2 ** (power if signed else power + 1) + 1)
    return (10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2).tolist()


def _coder(*, signed: bool) -> Callable[[float], Any]:
    """What finds the place of the code nearest to a number from 0 to 1, counted from that of 0, without a branch.

    Where the codes between two powers of ten begin is a comparison, and between them they lie at equal distances. (A
    number halfway between two of them, within the rounding of float32, may get either.)
    """
    codes = np.array([0.0, *(value for power in range(7) for value in _middles(power, signed)), 1.0])
    parts = [2 ** (power if signed else power + 1) for power in range(7)]
    firsts = [1 + sum(parts[:power]) for power in range(7)]
    t0, t1, t2, t3, t4, t5, t6, t7 = (
        np.float32((codes[first - 1] + codes[first]) / 2) for first in [*firsts, len(codes) - 1]
    )
    s0, s1, s2, s3, s4, s5, s6 = (np.float32(parts[power] * 10.0 ** (6 - power) / 0.9) for power in range(7))
    o0, o1, o2, o3, o4, o5, o6 = (np.float32(first - part / 9) for first, part in zip(firsts, parts, strict=True))
    l0, l1, l2, l3, l4, l5, l6 = (np.float32(first + part - 1) for first, part in zip(firsts, parts, strict=True))
    top = np.float32(len(codes) - 1)

    @_compiled
    def code(number):
        slope, offset, last = np.float32(0), np.float32(0), np.float32(0)
        if number > t0:
            slope, offset, last = s0, o0, l0
        if number > t1:
            slope, offset, last = s1, o1, l1
        if number > t2:
            slope, offset, last = s2, o2, l2
        if number > t3:
            slope, offset, last = s3, o3, l3
        if number > t4:
            slope, offset, last = s4, o4, l4
        if number > t5:
            slope, offset, last = s5, o5, l5
        if number > t6:
            slope, offset, last = s6, o6, l6
        if number > t7:
            slope, offset, last = np.float32(0), top, top
        found = number * slope + offset
        return np.int32(found if found < last else last)

    return code


_code_signed, _code_unsigned = _coder(signed=True), _coder(signed=False)
_ZERO, _LOWEST = 127, 127  # the place of 0 among signed codes, and how many there are below


@_compiled
def _wide(stored):
    """float32 of a bfloat16."""
    return _number(np.uint32(stored) << np.uint32(16))


@_compiled
def _nearest(value):
    """The nearest bfloat16, ties to even."""
    b = _bits(value)
    odd = np.uint32(np.uint32(b >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(b + np.uint32(0x7FFF)) + odd) >> np.uint32(16)
    is_nan = np.uint32(b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16(0x7FC0) if is_nan else np.uint16(rounded)


@_compiled
def _widen(source, into):
    """float32 of float32 or bfloat16."""
    if source.itemsize == _FLOAT32:
        for i in range(len(into)):
            into[i] = source[i]
    else:
        for i in range(len(into)):
            into[i] = _wide(source[i])


@_compiled
def _narrow(values, into):
    """float32 or the nearest bfloat16, ties to even."""
    if into.itemsize == _FLOAT32:
        for i in range(len(values)):
            into[i] = values[i]
    else:
        for i in range(len(values)):
            into[i] = _nearest(values[i])


@_compiled
def _random(place, seed):
    """32 bits that look random, of a place and a seed (the finalizer of MurmurHash3)."""
    # numba widens sums and products of uint32 to 64 bits; cut back at once, they stay in 32.
    h = np.uint32(np.uint32(place + seed) * np.uint32(0x9E3779B9))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32(np.uint32(h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


@_compiled
def _beside(value, random):
    """One of the two bfloat16 beside a value, the nearer one the more likely; `random`: 16 bits."""
    b = _bits(value)
    is_finite = np.uint32(b & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.uint16(np.uint32(b + (random if is_finite else np.uint32(0))) >> np.uint32(16))


@_compiled
def _narrow_at_random(values, into, first, seed):
    """A bfloat16 beside each value; `first` is the place of values[0]."""
    base, start = np.uint32(seed), np.uint32(first)
    for i in range(len(values)):
        into[i] = _beside(values[i], _random(np.uint32(start + np.uint32(i)), base) >> np.uint32(16))


@_compiled
def decode(stored, scales, codes, into):
    """The moments `stored` (bfloat16, or codes with a scale for each block) in float32."""
    if stored.itemsize == _INT8:
        for a in range(0, len(into), BLOCK_ELEMENTS):
            scale = scales[a // BLOCK_ELEMENTS]
            block, target = stored[a : a + BLOCK_ELEMENTS], into[a : a + BLOCK_ELEMENTS]
            for i in range(len(target)):
                target[i] = codes[np.uint64(block[i])] * scale
    else:
        _widen(stored, into)


@_compiled
def _largest(values):
    """The largest magnitude; of bits, because numbers that may be no number would be compared one at a time."""
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(len(bits)):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))
        largest = magnitude if magnitude > largest else largest
    return _number(largest)


@_compiled
def encode(values, stored, scales, is_signed, first, seed):
    """Put `values` down as `stored` is. `first`: the place of values[0] in the tensor, a multiple of the block."""
    if stored.itemsize == _INT8:
        for a in range(0, len(values), BLOCK_ELEMENTS):
            block, target = values[a : a + BLOCK_ELEMENTS], stored[a : a + BLOCK_ELEMENTS]
            largest = _largest(block)
            scales[a // BLOCK_ELEMENTS] = largest
            inverse = np.float32(1) / largest if largest > np.float32(0) else np.float32(0)
            if not np.isfinite(inverse):
                inverse = np.float32(0)  # all of them too small for float32's own range
            if is_signed:
                for i in range(len(block)):
                    place = _code_signed(abs(block[i]) * inverse)
                    below = np.int32(_LOWEST) if place > np.int32(_LOWEST) else place
                    place = np.int32(-below) if block[i] < np.float32(0) else place
                    target[i] = np.uint8(np.int32(_ZERO) + place)
            else:
                for i in range(len(block)):
                    target[i] = np.uint8(_code_unsigned(block[i] * inverse))
    else:
        _narrow_at_random(values, stored, first, seed)


@_compiled
def _estimates(values, inverses):
    """Estimates of 1 / sqrt of each of `values`."""
    whole = len(values) // _WIDTH * _WIDTH
    source, target = values.ctypes.data, inverses.ctypes.data
    for i in range(0, whole, _WIDTH):
        _estimate_roots(source + 4 * i, target + 4 * i)
    if whole < len(values):
        rest = np.ones(_WIDTH, np.float32)
        for i in range(len(values) - whole):
            rest[i] = values[whole + i]
        _estimate_roots(rest.ctypes.data, rest.ctypes.data)
        for i in range(len(values) - whole):
            inverses[whole + i] = rest[i]


@_compiled
def _refined(value, inverse):
    """The square root of a normal number from an estimate of 1 / sqrt of it; of 0, 0."""
    half = np.float32(0.5)
    root = value * inverse
    error = half - half * (root * inverse)
    root = root + root * error
    inverse = inverse + inverse * error
    root = root + (value - root * root) * (half * inverse)
    return root if value != np.float32(0) else value


@_compiled
def newton_roots(values, roots):
    """Square roots (float32), within 0.75 of the last place: an estimate, refined twice, each product rounded.

    What an estimate does not serve is exact: 0, below the smallest normal number, infinity and just below, no number.
    """
    _estimates(values, roots)
    for i in range(len(values)):
        root = _refined(values[i], roots[i])
        is_served = (values[i] >= _SMALLEST_NORMAL) & (values[i] <= _LARGEST_SQUARED)
        roots[i] = root if is_served else np.sqrt(values[i])


@_compiled
def _roots(values, roots, root):
    if root == NEWTON_ROOT:
        newton_roots(values, roots)
    else:
        _call_root(root, np.int32(len(values)), values.ctypes.data, roots.ctypes.data, _ROOT_MODE)


@_compiled
def _adam_block(g, p, m, v, r, s, is_decoupled, root):
    """One block in float32. `s`: see `adam_update`; `r` is room for as many numbers."""
    scale, decay, weight, from_gradient, beta2, other2, negative_step, correction, eps = (
        s[0], s[1], s[2], s[3] > 0, s[4], s[5], s[6], s[7], s[8],
    )  # fmt: skip
    count = len(p)
    if not is_decoupled:
        if decay != np.float32(0):
            for i in range(count):
                g[i] = _fma(decay, p[i], g[i] * scale)
            scale = np.float32(1)
        decay = np.float32(1)
    # To multiply by 1 changes nothing, and so needs no loop without it.
    if root == EXACT_ROOT:
        for i in range(count):
            gradient = g[i] * scale
            first = _fma(weight, gradient - m[i], gradient if from_gradient else m[i])
            second = _fma(other2 * gradient, gradient, v[i] * beta2)
            p[i] = p[i] * decay + (negative_step * first) / (np.sqrt(second) / correction + eps)
            m[i] = first
            v[i] = second
        return
    for i in range(count):
        gradient = g[i] * scale
        m[i] = _fma(weight, gradient - m[i], gradient if from_gradient else m[i])
        v[i] = _fma(other2 * gradient, gradient, v[i] * beta2)
    _roots(v, r, root)
    for i in range(count):
        p[i] = p[i] * decay + (negative_step * m[i]) / (r[i] / correction + eps)


@_compiled
def _adam_bfloat16(g, p, m, v, s, is_decoupled, first, seed):
    """One block with moments in bfloat16 that are never put down in float32; one random number rounds both."""
    scale, decay, weight, from_gradient, beta2, other2, negative_step, correction, eps = (
        s[0], s[1], s[2], s[3] > 0, s[4], s[5], s[6], s[7], s[8],
    )  # fmt: skip
    added = np.float32(0) if is_decoupled else decay
    decay = decay if is_decoupled else np.float32(1)
    base, start = np.uint32(seed), np.uint32(first)
    for i in range(len(p)):
        gradient = _fma(added, p[i], g[i] * scale)
        mean, square = _wide(m[i]), _wide(v[i])
        mean = _fma(weight, gradient - mean, gradient if from_gradient else mean)
        square = _fma(other2 * gradient, gradient, square * beta2)
        p[i] = p[i] * decay + (negative_step * mean) / (np.sqrt(square) / correction + eps)
        random = _random(np.uint32(start + np.uint32(i)), base)
        m[i] = _beside(mean, random >> np.uint32(16))
        v[i] = _beside(square, np.uint32(random & np.uint32(0xFFFF)))


@_compiled
def _adamw_in_one_loop(gradient, p, m, v, out, s):
    """AdamW from bfloat16 to bfloat16 with the processor's square root, whose time the memory's then covers."""
    decay, weight, beta2, other2, negative_step, correction, eps = s[1], s[2], s[4], s[5], s[6], s[7], s[8]
    for i in range(len(p)):
        g = _wide(gradient[i])
        first = _fma(weight, g - m[i], m[i])
        second = _fma(other2 * g, g, v[i] * beta2)
        value = p[i] * decay + (negative_step * first) / (np.sqrt(second) / correction + eps)
        m[i] = first
        v[i] = second
        p[i] = value
        out[i] = _nearest(value)


@_compiled
def _first_half(gradient, m, v, weight, beta2, other2):
    """Both moments; how much of the second is neither 0 nor a number that `_refined` serves."""
    odd = np.uint32(0)
    for i in range(len(m)):
        g = _wide(gradient[i])
        m[i] = _fma(weight, g - m[i], m[i])
        second = _fma(other2 * g, g, v[i] * beta2)
        v[i] = second
        bits = _bits(second)
        is_odd = (np.uint32(bits - _FIRST_SERVED) > np.uint32(_LAST_SERVED - _FIRST_SERVED)) & (bits != np.uint32(0))
        odd |= np.uint32(is_odd)
    return odd


@_compiled
def _second_half(p, m, r, out, decay, negative_step, correction, eps):
    for i in range(len(p)):
        value = p[i] * decay + (negative_step * m[i]) / (r[i] / correction + eps)
        p[i] = value
        out[i] = _nearest(value)


@_compiled
def _second_half_refining(p, m, v, inverses, out, decay, negative_step, correction, eps):
    for i in range(len(p)):
        root = _refined(v[i], inverses[i])
        value = p[i] * decay + (negative_step * m[i]) / (root / correction + eps)
        p[i] = value
        out[i] = _nearest(value)


@_compiled
def _adamw_with_root(gradient, p, m, v, out, s, root):
    """AdamW from bfloat16 to bfloat16 with torch's square root, for as many numbers at a time as stay in the cache."""
    decay, weight, beta2, other2, negative_step, correction, eps = s[1], s[2], s[4], s[5], s[6], s[7], s[8]
    roots = np.empty(_CALL, np.float32)
    for a in range(0, len(p), _CALL):
        b = min(a + _CALL, len(p))
        # Slices from here on: an index that might be negative keeps a loop from being vectorised.
        g_part, p_part, m_part, v_part, out_part, r = gradient[a:b], p[a:b], m[a:b], v[a:b], out[a:b], roots[: b - a]
        odd = _first_half(g_part, m_part, v_part, weight, beta2, other2)
        if root == NEWTON_ROOT and odd == np.uint32(0):
            _estimates(v_part, r)
            _second_half_refining(p_part, m_part, v_part, r, out_part, decay, negative_step, correction, eps)
        else:
            _roots(v_part, r, root)
            _second_half(p_part, m_part, r, out_part, decay, negative_step, correction, eps)


@_compiled
def adam_update(
    gradient, master, first, first_scales, second, second_scales, out, s, is_decoupled, root, tables, start, seed
):
    """One step of Adam (L2) or AdamW (`is_decoupled`) for the elements given, which begin at `start` in their tensor.

    `gradient`, `out`: float32 or bfloat16 as uint16; `out` may be empty. `first`, `second`: moments as float32, uint16
    (bfloat16) or uint8 (codes with `*_scales`). `s`, float32: what gradients are multiplied with; weight decay (L2) or
    what parameters are multiplied with (decoupled); weight of the gradient in the first moment, less 1 where `s[3]`
    says that the sum starts from the gradient; beta2 and 1 - beta2; minus the step size; root of the second moment's
    bias correction; eps. `root`: `EXACT_ROOT`, `NEWTON_ROOT` or the address of MKL's vmsSqrt. Who calls with an address
    sees to it that MKL works in this thread alone. `tables`: codes of 8 bits with a sign and without.
    """
    count = len(master)
    # What training at scale does all day goes the shortest way; the arithmetic is the same.
    if (
        first.itemsize == _FLOAT32
        and gradient.itemsize == _BFLOAT16
        and out.itemsize == _BFLOAT16
        and len(out)
        and is_decoupled
        and s[0] == np.float32(1)
        and s[3] == np.float32(0)
    ):
        moments = first.view(np.float32), second.view(np.float32)
        if root == EXACT_ROOT:
            _adamw_in_one_loop(gradient.view(np.uint16), master, *moments, out.view(np.uint16), s)
        else:
            _adamw_with_root(gradient.view(np.uint16), master, *moments, out.view(np.uint16), s, root)
        return
    g = np.empty(_CHUNK, np.float32)
    m = np.empty(_CHUNK, np.float32)
    v = np.empty(_CHUNK, np.float32)
    r = np.empty(_CHUNK, np.float32)
    signed, unsigned = tables
    for a in range(0, count, _CHUNK):
        b = min(a + _CHUNK, count)
        n = b - a
        p, g_part, m_part, v_part = master[a:b], g[:n], m[:n], v[:n]
        _widen(gradient[a:b], g_part)
        scales1 = first_scales[a // BLOCK_ELEMENTS :]
        scales2 = second_scales[a // BLOCK_ELEMENTS :]
        if first.itemsize == _FLOAT32:
            moments = first[a:b].view(np.float32), second[a:b].view(np.float32)
            _adam_block(g_part, p, *moments, r[:n], s, is_decoupled, root)
        elif first.itemsize == _BFLOAT16:
            moments16 = first[a:b].view(np.uint16), second[a:b].view(np.uint16)
            _adam_bfloat16(g_part, p, *moments16, s, is_decoupled, start + a, seed)
        else:
            decode(first[a:b], scales1, signed, m_part)
            decode(second[a:b], scales2, unsigned, v_part)
            _adam_block(g_part, p, m_part, v_part, r[:n], s, is_decoupled, root)
            encode(m_part, first[a:b], scales1, True, start + a, seed)
            encode(v_part, second[a:b], scales2, False, start + a, seed ^ 0x5BD1E995)
        if len(out):
            _narrow(p, out[a:b])


@_compiled
def _sgd_block(g, p, buffer, n, s, has_momentum, is_first, is_nesterov):
    """One block in float32. `s`: see `sgd_update`."""
    scale, decay, momentum, other, negative_rate = s[0], s[1], s[2], s[3], s[4]
    if scale != np.float32(1):
        for i in range(n):
            g[i] = g[i] * scale
    if decay != np.float32(0):
        for i in range(n):
            g[i] = _fma(decay, p[i], g[i])
    if not has_momentum:
        for i in range(n):
            p[i] = _fma(negative_rate, g[i], p[i])
        return
    if is_first:
        for i in range(n):
            buffer[i] = g[i]
    else:
        for i in range(n):
            buffer[i] = _fma(other, g[i], buffer[i] * momentum)
    if is_nesterov:
        for i in range(n):
            p[i] = _fma(negative_rate, _fma(momentum, buffer[i], g[i]), p[i])
    else:
        for i in range(n):
            p[i] = _fma(negative_rate, buffer[i], p[i])


@_compiled
def sgd_update(gradient, master, buffer, scales, out, s, has_momentum, is_first, is_nesterov, tables, start, seed):
    """One step of SGD for the elements given; arguments as of `adam_update`.

    `s`, float32: what gradients are multiplied with, weight decay, momentum, 1 - dampening, minus the learning rate.
    """
    count = len(master)
    g = np.empty(_CHUNK, np.float32)
    m = np.empty(_CHUNK, np.float32)
    codes, _ = tables
    for a in range(0, count, _CHUNK):
        b = min(a + _CHUNK, count)
        n = b - a
        p = master[a:b]
        _widen(gradient[a:b], g[:n])
        if not has_momentum:
            _sgd_block(g, p, m, n, s, False, is_first, is_nesterov)
        elif buffer.itemsize == _FLOAT32:
            _sgd_block(g, p, buffer[a:b].view(np.float32), n, s, True, is_first, is_nesterov)
        else:
            block_scales = scales[a // BLOCK_ELEMENTS :]
            decode(buffer[a:b], block_scales, codes, m[:n])
            _sgd_block(g, p, m, n, s, True, is_first, is_nesterov)
            encode(m[:n], buffer[a:b], block_scales, True, start + a, seed)
        if len(out):
            _narrow(p, out[a:b])
