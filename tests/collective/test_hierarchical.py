"""Levels and tori: what leaves a node leaves it once, and all directions carry the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.hierarchical import COLLECTIVES, hierarchical, torus
from headway.collective.verify import verify
from headway.errors import ProgramError
from headway.hardware.catalog import load_cluster

CLUSTER = load_cluster("dgx-a100:3")
MIXED = load_cluster("dgx-a100:2+dgx-1v:1")


def across(program, cluster) -> float:
    """Shares of the vector that go from one node to another."""
    node_of = {device.name: device.node for device in cluster.devices}
    return sum(
        program.fraction(one.chunk)
        for one in program.transfers
        if node_of[program.devices[one.source]] != node_of[program.devices[one.target]]
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data(), collective=st.sampled_from(COLLECTIVES))
def test_each_byte_leaves_a_node_as_often_as_if_the_node_were_one_rank(data, collective):
    cluster = data.draw(st.sampled_from([CLUSTER, MIXED]))
    size = data.draw(st.integers(2, 12))
    devices = data.draw(st.permutations([device.name for device in cluster.devices]))[:size]
    program = hierarchical(cluster, collective, devices, root=data.draw(st.integers(0, size - 1)))
    verify(program, slots=1)
    nodes = len({name.split("/")[0] for name in devices})
    times = 2 if collective == "all_reduce" else 1
    assert across(program, cluster) == pytest.approx(times * (nodes - 1))


def test_all_devices_of_a_node_share_the_work_between_nodes():
    program = hierarchical(CLUSTER, "all_reduce")
    node_of = {device.name: device.node for device in CLUSTER.devices}
    sent = [0.0] * program.size
    for one in program.transfers:
        if node_of[program.devices[one.source]] != node_of[program.devices[one.target]]:
            sent[one.source] += program.fraction(one.chunk)
    assert sent == pytest.approx([sent[0]] * program.size)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), collective=st.sampled_from(COLLECTIVES), data=st.data())
def test_any_shape_of_torus_is_right(rows, columns, collective, data):
    size = rows * columns
    if size == 1:
        return
    devices = [device.name for device in CLUSTER.devices][:size] if size <= 24 else None
    if devices is None:
        return
    root = data.draw(st.integers(0, size - 1))
    program = torus(CLUSTER, collective, devices, root=root, shape=(rows, columns))
    report = verify(program, slots=1)
    steps = (rows - 1) + (columns - 1)
    assert report.steps == (2 * steps if collective == "all_reduce" else steps)


def test_a_torus_uses_its_four_neighbours_alike():
    cluster = load_cluster("dgx-a100:2")
    program = torus(cluster, "all_reduce", shape=(4, 4))
    load: dict[tuple[int, int], float] = {}
    for one in program.transfers:
        pair = (one.source, one.target)
        load[pair] = load.get(pair, 0.0) + program.fraction(one.chunk)
    # Each rank sends to four others, as much as on a ring in all.
    assert len(load) == 16 * 4
    assert sum(load.values()) == pytest.approx(16 * 2 * 15 / 16)
    assert max(load.values()) == pytest.approx(min(load.values()))


def test_nodes_of_one_size_are_the_rows():
    program = torus(CLUSTER, "all_reduce")
    nodes = [{rank for rank in range(24) if rank // 8 == node} for node in range(3)]
    for one in program.transfers:
        assert any({one.source, one.target} <= node for node in nodes) or one.source % 8 == one.target % 8


@pytest.mark.parametrize("shape", [(2, 3), (0, 8), (-2, -4)])
def test_a_shape_that_the_ranks_do_not_fill_is_refused(shape):
    with pytest.raises(ProgramError, match="is not 8 ranks"):
        torus(CLUSTER, "all_reduce", [device.name for device in CLUSTER.devices][:8], shape=shape)
