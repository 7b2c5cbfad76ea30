"""What was encoded comes back as far as backward can tell, in as many bytes as the planner reckons with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.memory.swapping.encodings import PoolWindow, decoded, encoded, packed_bits, unpacked_bits
from headway.memory.swapping.watching import Geometry, shaped


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(values):
    mask = torch.tensor(values, dtype=torch.bool)
    bits = packed_bits(mask)
    assert bits.numel() == (len(values) + 7) // 8
    assert torch.equal(unpacked_bits(bits, len(values)), mask)


@given(st.integers(1, 500), st.integers(0, 100), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_relu_outputs_come_back_whole_or_as_signs(count, seed, dtype):
    torch.manual_seed(seed)
    tensor = torch.randn(count).relu().to(dtype)
    sparse = encoded("sparse", tensor.untyped_storage(), Geometry(tensor))
    assert torch.equal(shaped(decoded(sparse), Geometry(tensor)), tensor)
    sign = encoded("sign", tensor.untyped_storage(), Geometry(tensor))
    assert sign.payload.numel() == (count + 7) // 8
    gradient = torch.randn(count).to(dtype)
    threshold = torch.ops.aten.threshold_backward
    again = shaped(decoded(sign), Geometry(tensor))
    assert torch.equal(threshold(gradient, again, 0), threshold(gradient, tensor, 0))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2)])
def test_positions_of_a_max_pool_come_back_from_a_byte_each(kernel, stride, padding):
    torch.manual_seed(0)
    images = torch.randn(3, 4, 33, 170)
    _, positions = torch.ops.aten.max_pool2d_with_indices(images, [kernel] * 2, [stride] * 2, [padding] * 2)
    window = PoolWindow(170, (stride, stride), (padding, padding))
    code = encoded("window", positions.untyped_storage(), Geometry(positions), window)
    assert code.payload.numel() == positions.numel()
    assert torch.equal(shaped(decoded(code), Geometry(positions)), positions)


def test_positions_without_a_window_are_copied():
    positions = torch.arange(24).view(1, 1, 4, 6)
    code = encoded("window", positions.untyped_storage(), Geometry(positions))
    assert torch.equal(shaped(decoded(code), Geometry(positions)), positions)


def test_a_shape_alone_takes_no_bytes():
    tensor = torch.randn(4, 5)
    code = encoded("shape", tensor.untyped_storage(), Geometry(tensor))
    assert code.payload.numel() == 0
    assert decoded(code).nbytes() == tensor.untyped_storage().nbytes()
