"""The compiled reductions against torch's own, element for element."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.exchange.kernels import OPERATIONS, check_operation, reduction_kernel

WHOLE = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def reduce(sources: list[torch.Tensor], operation: str, *, out=None, also=None, divisor: int = 1) -> torch.Tensor:
    """What the kernel makes of `sources`."""
    kernel = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(reduction_kernel(sources[0].dtype, operation))
    out = torch.empty_like(sources[0]) if out is None else out
    addresses = np.array([source.data_ptr() for source in sources], np.int64)
    also_address = 0 if also is None else also.data_ptr()
    kernel(out.data_ptr(), also_address, addresses.ctypes.data, len(sources), out.numel(), divisor)
    return out


def in_order(sources: list[torch.Tensor], combine) -> torch.Tensor:
    result = sources[0]
    for source in sources[1:]:
        result = combine(result, source)
    return result


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_sums_are_torch_s_sums_in_the_order_of_the_sources(data):
    dtype = data.draw(st.sampled_from(WHOLE + REAL))
    count, many = data.draw(st.integers(0, 5000)), data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    if dtype.is_floating_point:
        sources = [torch.randn(count, generator=generator).to(dtype) for _ in range(many)]
    else:
        sources = [torch.randint(-100, 100, (count,), generator=generator).to(dtype) for _ in range(many)]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    expected = in_order([source.to(wide) for source in sources], torch.add).to(dtype)
    also = torch.empty_like(expected) if data.draw(st.booleans()) else None
    in_place = data.draw(st.booleans())
    found = reduce(sources, "sum", out=sources[0] if in_place else None, also=also)
    assert torch.equal(found, expected)
    assert also is None or torch.equal(also, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("operation", "combine"), [("min", torch.minimum), ("max", torch.maximum), ("product", torch.mul)]
)
def test_min_max_and_product_are_torch_s(dtype, operation, combine):
    generator = torch.Generator().manual_seed(7)
    sources = [torch.randint(-7, 8, (3001,), generator=generator).to(dtype) for _ in range(3)]
    assert torch.equal(reduce(sources, operation), in_order(sources, combine))


@pytest.mark.parametrize(
    ("operation", "combine"),
    [("band", torch.bitwise_and), ("bor", torch.bitwise_or), ("bxor", torch.bitwise_xor)],
)
def test_bitwise_operations_are_torch_s(operation, combine):
    generator = torch.Generator().manual_seed(7)
    sources = [torch.randint(-(2**31), 2**31 - 1, (1000,), generator=generator).to(torch.int32) for _ in range(4)]
    assert torch.equal(reduce(sources, operation), in_order(sources, combine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    strange = torch.tensor([math.nan, 1.0, math.inf, -math.inf, math.nan, -0.0, 0.0], dtype=dtype)
    other = torch.tensor([2.0, math.nan, math.inf, math.inf, math.nan, 0.0, -0.0], dtype=dtype)
    for operation, combine in (("sum", torch.add), ("min", torch.minimum), ("max", torch.maximum)):
        expected = combine(strange, other)
        assert torch.equal(reduce([strange, other], operation).nan_to_num(9.5), expected.nan_to_num(9.5)), operation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_torch_s_for_every_pattern_of_bits(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    shifted = every.roll(12345)
    expected = (every.float() + shifted.float()).to(dtype)
    found = reduce([every, shifted], "sum")
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(found[kept], expected[kept])


def test_an_average_divides_floating_point_and_rounds_integers_towards_zero():
    a, b = torch.tensor([-7, 7, 5, -1], dtype=torch.int32), torch.tensor([0, 0, 0, 0], dtype=torch.int32)
    assert reduce([a, b], "average", divisor=2).tolist() == [-3, 3, 2, 0]
    assert reduce([a.float(), b.float()], "average", divisor=2).tolist() == [-3.5, 3.5, 2.5, -0.5]
    large = torch.tensor([250, 5], dtype=torch.uint8)
    assert reduce([large, torch.zeros_like(large)], "average", divisor=3).tolist() == [83, 1]


def test_truth_values_are_combined_as_such():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    for operation in ("sum", "max", "bor"):
        assert reduce([a, b], operation).tolist() == [True, True, True, False]
    for operation in ("product", "min", "band"):
        assert reduce([a, b], operation).tolist() == [True, False, False, False]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_that_mean_nothing_are_refused(operation):
    with pytest.raises(InputError):
        check_operation(torch.complex64, operation)
    if operation.startswith("b"):
        with pytest.raises(InputError, match="means nothing for"):
            check_operation(torch.float32, operation)
    else:
        check_operation(torch.float32, operation)


def test_unknown_operations_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match="no operation is called 'add'") as caught:
        reduction_kernel(torch.float32, "add")
    assert "sum, average" in str(caught.value)
