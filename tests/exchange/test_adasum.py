"""Adasum: Maleki et al., "Scaling Distributed Training with Adaptive Summation", MLSys 2021."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError
from headway.exchange.adasum import adasum, pair, reference

sys.path.insert(0, str(Path(__file__).parent))

import gloo_ranks

SIZE = 5
vectors = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=3, max_size=3).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def by_the_formula(a, b):
    """The combination on plain numbers, from the paper's equation."""
    a, b = a.tolist(), b.tolist()
    both, aa, bb = (math.fsum(x * y for x, y in zip(*pair)) for pair in ((a, b), (a, a), (b, b)))
    scale_a = 1 - both / (2 * aa) if aa else 1.0
    scale_b = 1 - both / (2 * bb) if bb else 1.0
    return [scale_a * x + scale_b * y for x, y in zip(a, b)]


@settings(deadline=None, max_examples=100)
@given(vectors, vectors)
def test_two_gradients_are_combined_by_the_papers_formula(a, b):
    assert pair(a, b).tolist() == pytest.approx(by_the_formula(a, b), rel=1e-9, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(vectors, st.floats(0.1, 10), st.floats(-3, 3))
def test_alike_ones_are_averaged_right_angled_ones_added_and_order_and_turns_do_not_matter(a, factor, angle):
    torch.testing.assert_close(pair(a, a), a)
    torch.testing.assert_close(pair(a, factor * a), (1 + factor) / 2 * a)
    torch.testing.assert_close(pair(a, torch.zeros(3, dtype=torch.float64)), a)
    across = torch.linalg.cross(a, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(pair(a, across), a + across)
    b = a.roll(1) * factor
    torch.testing.assert_close(pair(a, b), pair(b, a))
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(turn @ pair(a, b), pair(turn @ a, turn @ b), atol=1e-6, rtol=1e-7)


def test_a_number_that_is_no_power_of_two_merges_the_first_ranks_in_pairs():
    g = [torch.tensor([math.cos(i), math.sin(2 * i), 1.0], dtype=torch.float64) for i in range(6)]
    assert torch.equal(reference(g[:1]), g[0])
    torch.testing.assert_close(reference(g[:3]), pair(pair(g[0], g[1]), g[2]))
    torch.testing.assert_close(reference(g[:4]), pair(pair(g[0], g[1]), pair(g[2], g[3])))
    torch.testing.assert_close(reference(g[:5]), pair(pair(pair(g[0], g[1]), g[2]), pair(g[3], g[4])))
    torch.testing.assert_close(reference(g), pair(pair(pair(g[0], g[1]), pair(g[2], g[3])), pair(g[4], g[5])))


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    return gloo_ranks.run_case("adasum", SIZE, tmp_path_factory.mktemp("adasum"))


@pytest.mark.processes
@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_over_a_process_group_it_is_the_recursive_definition_tensor_by_tensor(exchanged, size):
    for seed in range(3):
        ranks = [gloo_ranks.gradients(rank, seed) for rank in range(size)]
        for i, found in enumerate(exchanged[0][size, seed]):
            torch.testing.assert_close(found, reference([rank[i] for rank in ranks]), rtol=1e-5, atol=1e-6)
    assert exchanged[0][size, "none"] == []


@pytest.mark.processes
@pytest.mark.parametrize("size", range(1, SIZE + 1))
def test_all_ranks_have_the_same_bits_and_the_dtype_they_gave(exchanged, size):
    for key, tensors in exchanged[0].items():
        if key[0] == size:
            for other in exchanged[1:size]:
                assert all(torch.equal(a, b) for a, b in zip(tensors, other[key]))
    (half,), (double,) = exchanged[0][size, "bfloat16"], exchanged[0][size, "float64"]
    expected = reference([gloo_ranks.gradients(rank, 5)[0].double() for rank in range(size)])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(double, expected, rtol=1e-12, atol=1e-12)


def test_tensors_that_do_not_go_together_are_refused():
    with pytest.raises(FieldError, match=r"tensors\[1\]"):
        adasum([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    with pytest.raises(FieldError, match="int64"):
        adasum([torch.tensor([1, 2])])
