"""Compression: error feedback (Stich et al., NeurIPS 2018; Lin et al., ICLR 2018) and Horovod's interface."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError
from headway.exchange.compression import Compression, TopK

sys.path.insert(0, str(Path(__file__).parent))

import gloo_ranks

SIZE = 3
# Multiples of 1/8: their sums are exact, so the properties below hold to the bit.
steps = st.lists(
    st.lists(st.integers(-80, 80).map(lambda i: i / 8), min_size=6, max_size=6).map(torch.tensor),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=100)
@given(steps, st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_what_was_sent_and_the_residual_add_up_to_the_gradients(gradients, ratio):
    compressor = TopK(ratio)
    sent = torch.zeros(6)
    for gradient in gradients:
        before = gradient.clone()
        values, context = compressor.compress(gradient, "weight")
        assert torch.equal(gradient, before)
        assert values.numel() == math.ceil(ratio * 6)
        whole = compressor.decompress(values, context)
        # What is sent is the largest of it all: nothing that stays behind is larger than anything that goes.
        residual = compressor.residuals["weight"]
        assert whole.abs()[context[0].long()].min() >= residual.abs().max()
        sent += whole
        assert torch.equal(sent + residual, torch.stack(gradients).cumsum(0)[_index(gradients, gradient)])


def _index(gradients, gradient):
    return next(i for i, other in enumerate(gradients) if other is gradient)


def test_each_name_has_a_residual_of_its_own_and_a_change_of_shape_is_refused():
    compressor = TopK(0.5)
    compressor.compress(torch.tensor([3.0, 1.0]), "a")
    compressor.compress(torch.tensor([1.0, 5.0]), "b")
    values, (positions, _) = compressor.compress(torch.tensor([0.5, 0.0]), "a")
    assert (values.tolist(), positions.tolist()) == ([1.0], [1])
    with pytest.raises(FieldError, match="'b'"):
        compressor.compress(torch.ones(3), "b")


def test_half_precision_remembers_what_rounding_took_and_infinity_does_not_stay():
    compressor = TopK(1.0)
    gradient = torch.tensor([1.0, 2.0**-7], dtype=torch.bfloat16)
    for _ in range(3):
        compressor.compress(gradient, "w")
    assert compressor.residuals["w"].dtype == torch.float32
    compressor.compress(torch.tensor([math.inf, 1.0], dtype=torch.bfloat16), "w")
    assert compressor.residuals["w"].isfinite().all()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_casting_narrows_wide_floats_alone_and_gives_their_dtype_back(name, dtype):
    compressor = getattr(Compression, name)
    tensor = torch.tensor([1.0, -2.5, 1 / 3])
    sent, context = compressor.compress(tensor)
    assert sent.dtype == dtype
    assert torch.equal(compressor.decompress(sent, context), tensor.to(dtype).float())
    for other in (torch.tensor([1, 2]), torch.tensor([1.0], dtype=torch.float16)):
        sent, context = compressor.compress(other)
        assert sent is other
        assert compressor.decompress(sent, context).dtype == other.dtype


def test_misuse_is_refused():
    for ratio in (0, -0.1, 1.5, math.nan):
        with pytest.raises(FieldError, match="ratio"):
            Compression.topk(ratio)
    with pytest.raises(FieldError, match="int64"):
        Compression.topk(0.5).compress(torch.tensor([1]), "step")


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    return gloo_ranks.run_case("compression", SIZE, tmp_path_factory.mktemp("compression"))


@pytest.mark.processes
def test_all_ranks_get_the_same_bits(exchanged):
    def flat(value):
        return [part for item in value for part in flat(item)] if isinstance(value, list) else [value]

    for key, value in exchanged[0].items():
        if key != "residual" and "left" not in key:
            for other in exchanged[1:]:
                assert all(torch.equal(a, b) for a, b in zip(flat(value), flat(other[key]))), key


@pytest.mark.processes
@pytest.mark.parametrize(("name", "near"), [("none", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_dense_compression_gives_sum_and_average_to_its_precision(exchanged, name, near):
    gradients = [gloo_ranks.gradients(rank, 0)[0] for rank in range(SIZE)]
    average, total = exchanged[0][name]
    torch.testing.assert_close(total, sum(gradients), rtol=near, atol=3 * near)
    torch.testing.assert_close(average, sum(gradients) / SIZE, rtol=near, atol=3 * near)
    for rank, gradient in enumerate(gradients):
        assert torch.equal(exchanged[rank][name, "left"], gradient), "the caller's tensor was changed"


@pytest.mark.processes
def test_integers_are_summed_as_they_are_and_an_fp16_average_overflows_no_earlier_than_itself(exchanged):
    assert exchanged[0]["integers"].tolist() == [sum(range(SIZE)), 7 * SIZE]
    assert exchanged[0]["overflow"].tolist() == pytest.approx([6e4, 6e4], rel=2e-3)


@pytest.mark.processes
def test_over_ranks_too_what_was_sent_and_all_residuals_add_up_to_the_gradients(exchanged):
    sent = torch.zeros(64)
    gradients = torch.zeros(64)
    for step in range(4):
        sent += exchanged[0]["topk"][step]
        gradients += sum(gloo_ranks.gradients(rank, step)[3] for rank in range(SIZE))
        residuals = torch.stack([exchanged[rank]["residual"][step] for rank in range(SIZE)]).sum(0)
        torch.testing.assert_close(sent + residuals, gradients, rtol=1e-5, atol=1e-5)
        assert residuals.abs().max() > 0
    torch.testing.assert_close(
        exchanged[0]["whole"], sum(gloo_ranks.gradients(rank, 0)[3] for rank in range(SIZE)) / SIZE
    )
    assert exchanged[0]["half"].dtype == torch.bfloat16


@pytest.mark.processes
def test_with_error_feedback_a_convex_problem_is_solved_that_plain_top_k_does_not_solve(exchanged):
    parts = [gloo_ranks.regression(rank) for rank in range(SIZE)]
    matrix, target = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    best = torch.linalg.lstsq(matrix, target).solution
    assert (exchanged[0]["descent", True] - best).norm() < 0.05 * best.norm()
    assert (exchanged[0]["descent", False] - best).norm() > 0.5 * best.norm()
