"""As many rings as the links allow, each as long as it must be, none using another's lane."""

from __future__ import annotations

import itertools

import highspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.allocations import allocation_classes
from headway.collective.ring import Ring, local_order, ring, rings
from headway.collective.topology import topology_of
from headway.collective.verify import verify
from headway.errors import ProgramError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link

MACHINES = {spec: load_cluster(spec) for spec in ("dgx-1v", "dgx-1p", "mi300x-8")}


def hops(order):
    return list(zip(order, (*order[1:], order[0]), strict=True))


def most_rings(lanes: dict[tuple[int, int], int], size: int) -> int:
    """By brute force: all cycles, and how often each is taken as an integer program."""
    cycles = [
        (0, *rest) for rest in itertools.permutations(range(1, size)) if all(hop in lanes for hop in hops((0, *rest)))
    ]
    if not cycles:
        return 0
    model = highspy.Highs()
    model.silent()
    times = [model.addIntegral(lb=0) for _ in cycles]
    for pair, count in lanes.items():
        uses = [variable for variable, cycle in zip(times, cycles, strict=True) if pair in hops(cycle)]
        if uses:
            model.addConstr(model.qsum(uses) <= count)
    model.maximize(model.qsum(times))
    return round(model.getObjectiveValue())


def lanes_of(cluster, devices):
    capacity = topology_of(cluster, devices).capacity
    lane = min(capacity.values())
    return {pair: round(rate / lane) for pair, rate in capacity.items()}


def check_disjoint(found: list[Ring], lanes) -> None:
    used: dict[tuple[int, int], int] = {}
    for one in found:
        for pair in hops(one.order):
            used[pair] = used.get(pair, 0) + one.weight
    assert all(count <= lanes[pair] for pair, count in used.items())


@pytest.mark.parametrize("spec", ["dgx-1v", "dgx-1p"])
def test_on_each_class_of_allocations_the_rings_are_as_many_as_there_can_be(spec):
    cluster = MACHINES[spec]
    for devices in allocation_classes(cluster):
        lanes = lanes_of(cluster, devices)
        most = most_rings(lanes, len(devices))
        found = rings(cluster, devices)
        if most == 0:
            # Not even one ring by NVLink alone: some hops go another way.
            assert len(found) == 1
            assert found[0].paths == (None,) * len(devices)
            continue
        check_disjoint(found, lanes)
        weight = sum(one.weight for one in found)
        # Weights are divided by what they have in common.
        assert most % weight == 0
        check_disjoint([Ring(one.order, one.weight * (most // weight), one.paths) for one in found], lanes)


@pytest.mark.parametrize(("spec", "count"), [("dgx-1v", 6), ("dgx-1p", 4), ("mi300x-8", 7)])
def test_whole_machines_have_the_rings_that_are_known(spec, count):
    found = rings(MACHINES[spec])
    assert sum(one.weight for one in found) == count
    assert all(sorted(one.order) == list(range(8)) for one in found)
    check_disjoint(found, lanes_of(MACHINES[spec], None))


def wired(size: int, pairs) -> Cluster:
    """Devices wired both ways along these pairs, one lane each way."""
    kind = Accelerator(name="any", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)
    ends = sorted({end for one, other in pairs for end in ((one, other), (other, one)) if one != other})
    return Cluster(
        name="wired",
        accelerators={"any": kind},
        devices=tuple(Device(name=f"d{rank}", accelerator="any", node="n") for rank in range(size)),
        links=tuple(Link(source=f"d{one}", target=f"d{other}", bytes_per_second=1e9) for one, other in ends),
    ).validate()


@pytest.mark.parametrize(("size", "count"), [(3, 2), (4, 2), (5, 4), (6, 4), (7, 6), (9, 8), (16, 15)])
def test_a_full_mesh_is_made_of_rings(size, count):
    """All of it but for 4 and 6 devices, where that cannot be (Tillson 1980)."""
    cluster = wired(size, itertools.combinations(range(size), 2))
    found = rings(cluster)
    assert sum(one.weight for one in found) == count
    check_disjoint(found, lanes_of(cluster, None))


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (4, 4), (4, 8), (8, 8)])
def test_a_torus_is_made_of_two_rings_each_way(rows, columns):
    pairs = [
        (row * columns + column, other)
        for row in range(rows)
        for column in range(columns)
        for other in ((row + 1) % rows * columns + column, row * columns + (column + 1) % columns)
    ]
    cluster = wired(rows * columns, pairs)
    found = rings(cluster)
    assert sum(one.weight for one in found) == 4
    check_disjoint(found, lanes_of(cluster, None))


def test_between_nodes_each_nic_carries_one_ring_each_way():
    cluster = load_cluster("dgx-a100:2")
    found = rings(cluster)
    assert len(found) == 8
    carried: dict[tuple[str, str], int] = {}
    for one in found:
        for source, target in hops(one.order):
            for link in cluster.route(cluster.devices[source].name, cluster.devices[target].name):
                what = cluster.links[link]
                if what.kind == "network":
                    carried[what.source, what.target] = carried.get((what.source, what.target), 0) + 1
    assert len(carried) == 8 * 2 * 2  # NICs, nodes, directions
    assert set(carried.values()) == {1}


def test_rings_of_several_machines_follow_the_wiring_inside():
    cluster = load_cluster("dgx-1v:2")
    wired = {(link.source, link.target) for link in cluster.links if link.kind == "nvlink"}
    names = [device.name for device in cluster.devices]
    for one in rings(cluster):
        across = [pair for pair in hops(one.order) if (names[pair[0]], names[pair[1]]) not in wired]
        assert len(across) == 2  # once to the other node and once back


def test_the_local_order_is_a_cycle_of_wired_neighbours():
    names = [device.name for device in MACHINES["dgx-1v"].devices]
    capacity = topology_of(MACHINES["dgx-1v"], names).capacity
    order = local_order(MACHINES["dgx-1v"], names)
    assert all(pair in capacity for pair in hops(order))


def test_without_a_ring_of_wires_a_path_of_wires_is_closed_by_one_other_hop():
    # GPUs 3 - 0 - 4 of a DGX-1V: 3 and 4 are not wired to each other.
    devices = ["node0/gpu3", "node0/gpu4", "node0/gpu0"]
    (one,) = rings(MACHINES["dgx-1v"], devices)
    assert set(hops(one.order)) in ({(0, 2), (2, 1), (1, 0)}, {(1, 2), (2, 0), (0, 1)})
    program = ring(MACHINES["dgx-1v"], "all_reduce", devices)
    lengths = sorted(len(path) for path in program.paths)
    assert lengths[:2] == [2, 2]
    assert lengths[2] > 2
    verify(program)


@settings(deadline=None, max_examples=60)
@given(
    spec=st.sampled_from(sorted(MACHINES)),
    collective=st.sampled_from(["broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather"]),
    data=st.data(),
)
def test_each_rank_sends_no_more_than_it_must(spec, collective, data):
    cluster = MACHINES[spec]
    size = data.draw(st.integers(2, 8))
    devices = data.draw(st.permutations([device.name for device in cluster.devices]))[:size]
    report = verify(ring(cluster, collective, devices, root=data.draw(st.integers(0, size - 1))))
    share = (size - 1) / size
    if collective == "all_reduce":
        assert report.steps == 2 * (size - 1)
        assert report.sent == pytest.approx([2 * share] * size)
    elif collective in ("reduce_scatter", "all_gather"):
        assert report.steps == size - 1
        assert report.sent == pytest.approx([share] * size)
    else:
        assert report.steps == size - 1
        assert sum(report.sent) == pytest.approx(size - 1)


def test_the_parts_of_the_vector_are_in_proportion_to_the_rings():
    # GPUs 0 and 3 of a DGX-1V: two lanes each way, and the ring takes both.
    program = ring(MACHINES["dgx-1v"], "all_reduce", ["node0/gpu0", "node0/gpu3"])
    assert len(program.chunks) == 2
    for one in allocation_classes(MACHINES["dgx-1v"], (4,)):
        found = rings(MACHINES["dgx-1v"], one)
        program = ring(MACHINES["dgx-1v"], "all_reduce", one)
        parts = [sum(program.fraction(at * 4 + chunk) for chunk in range(4)) for at in range(len(found))]
        whole = sum(weight for _, weight, _ in found)
        assert parts == pytest.approx([weight / whole for _, weight, _ in found])


def test_gather_is_not_for_a_ring():
    with pytest.raises(ProgramError, match="does not do 'gather'"):
        ring(MACHINES["dgx-1v"], "gather")
