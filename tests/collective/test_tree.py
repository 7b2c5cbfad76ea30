"""Trees and hypercubes take a logarithmic number of steps, and no more bytes than the papers say."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.tree import binomial_tree, double_tree, halving_doubling
from headway.collective.verify import verify
from headway.hardware.catalog import load_cluster

CLUSTER = load_cluster("dgx-a100:4")
NAMES = [device.name for device in CLUSTER.devices]


def chosen(size: int) -> list[str]:
    return NAMES[:size]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(2, 32), data=st.data())
def test_no_rank_passes_on_in_both_trees(size, data):
    """Sanders, Speck and Träff 2009, section 2: an inner node of one tree is a leaf of the other."""
    root = data.draw(st.integers(0, size - 1))
    program = double_tree(CLUSTER, "broadcast", chosen(size), root=root)
    inner = [{one.source for one in program.transfers if one.chunk == chunk} - {root} for chunk in (0, 1)]
    assert not inner[0] & inner[1]
    report = verify(program)
    # So no rank but the root sends more than the whole vector, and each receives it once.
    assert all(sent <= 1 + 1e-9 for rank, sent in enumerate(report.sent) if rank != root)
    assert report.received == pytest.approx([float(rank != root) for rank in range(size)])
    # A child waits for its parent alone: the depth of the tree.
    assert report.steps <= math.ceil(math.log2(size)) + 1


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 32))
def test_a_double_tree_all_reduce_is_shallow_and_balanced(size):
    report = verify(double_tree(CLUSTER, "all_reduce", chosen(size)))
    # Up, where the two children of a rank are added one after the other, and down.
    assert report.steps <= 3 * math.ceil(math.log2(size + 1))
    # In each tree a rank sends half the vector up and to two children at most; one tree has it as a leaf.
    assert all(sent <= 2 + 1e-9 for sent in report.sent)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 32), data=st.data())
def test_a_binomial_tree_takes_the_fewest_steps(size, data):
    root = data.draw(st.integers(0, size - 1))
    broadcast = binomial_tree(CLUSTER, "broadcast", chosen(size), root=root)
    assert len(broadcast.transfers) == size - 1
    # One transfer at a time for each rank: everyone who has it sends it on.
    have, steps = {root}, 0
    left = list(broadcast.transfers)
    while left:
        busy: set[int] = set()
        for one in list(left):
            if one.source in have and one.source not in busy and one.target not in busy:
                busy |= {one.source, one.target}
                left.remove(one)
        have |= busy
        steps += 1
    assert steps == math.ceil(math.log2(size))
    assert verify(binomial_tree(CLUSTER, "reduce", chosen(size), root=root)).steps == math.ceil(math.log2(size))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 32))
def test_halving_and_doubling_moves_as_little_as_a_ring_in_fewer_steps(size):
    """Thakur, Rabenseifner and Gropp 2005, section 4."""
    power = 1 << (size.bit_length() - 1)
    report = verify(halving_doubling(CLUSTER, "all_reduce", chosen(size)))
    if size == power:
        assert report.steps == 2 * int(math.log2(size))
        assert report.sent == pytest.approx([2 * (size - 1) / size] * size)
    else:
        assert report.steps == 2 * int(math.log2(power)) + 2
        # Who lends its data sends the whole vector once; who works for it sends the result back.
        assert max(report.sent) == pytest.approx(2 * (power - 1) / power + 1)
        assert sum(1 for sent in report.sent if sent == pytest.approx(1.0)) >= size - power
    for collective in ("reduce_scatter", "all_gather"):
        half = verify(halving_doubling(CLUSTER, collective, chosen(size)))
        if size == power:
            assert half.sent == pytest.approx([(size - 1) / size] * size)


def test_the_large_halves_stay_in_the_node():
    program = halving_doubling(CLUSTER, "all_reduce")
    node_of = {device.name: device.node for device in CLUSTER.devices}
    across = sum(
        program.fraction(one.chunk)
        for one in program.transfers
        if node_of[program.devices[one.source]] != node_of[program.devices[one.target]]
    )
    # 3/32 of the vector leave each rank for other nodes before and after, of 62/32 in all.
    assert across == pytest.approx(32 * 2 * 3 / 32)
