"""Blink (MLSys 2020): trees against brute force, rates against cuts and partitions, programs by symbolic execution."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway.collective.allocations import allocation_classes
from headway.collective.blink import (
    FractionalPacking,
    approximate_packing,
    blink_packing,
    blink_program,
    few_trees,
    hybrid_program,
    hybrid_split,
    minimum_arborescence,
    three_phase_program,
)
from headway.collective.program import Program
from headway.collective.topology import Topology, topology_of
from headway.collective.verify import verify
from headway.errors import DisconnectedError, InputError, MissingExtraError, ProgramError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Cluster, Device, Link

DGX = load_cluster("dgx-1v")
LINK = 25e9
COLLECTIVES = ("broadcast", "reduce", "all_reduce", "all_gather", "reduce_scatter")
PCIE = ("pcie", "socket")


def cluster_of(size: int, rates: dict[tuple[int, int], float]) -> Cluster:
    kind = next(iter(DGX.accelerators))
    return Cluster(
        name="drawn",
        accelerators=DGX.accelerators,
        devices=tuple(Device(name=f"d{rank}", accelerator=kind, node="n") for rank in range(size)),
        links=tuple(
            Link(source=f"d{one}", target=f"d{other}", bytes_per_second=rate) for (one, other), rate in rates.items()
        ),
    ).validate()


@st.composite
def drawn_rates(draw: st.DrawFn, *, both_ways: bool) -> tuple[int, dict[tuple[int, int], float]]:
    size = draw(st.integers(2, 5))
    pairs = [(a, b) for a in range(size) for b in range(size) if (a < b if both_ways else a != b)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, min_size=size - 1))
    rates = {pair: draw(st.sampled_from([1.0, 2.0, 2.5, 3.0, 3.7123])) for pair in chosen}
    if both_ways:
        rates |= {(other, one): rate for (one, other), rate in rates.items()}
    return size, rates


def topology_or_reject(size: int, rates: dict[tuple[int, int], float]) -> tuple[Cluster, Topology]:
    cluster = cluster_of(size, rates)
    try:
        return cluster, topology_of(cluster)
    except DisconnectedError:
        assume(False)
        raise


def smallest_cut(size: int, rates: dict[tuple[int, int], float], root: int) -> float:
    """Edmonds' bound on broadcast by looking at every set without the root."""
    others = [rank for rank in range(size) if rank != root]
    return min(
        sum(rate for (one, other), rate in rates.items() if one not in inside and other in inside)
        for count in range(1, size)
        for inside in map(set, itertools.combinations(others, count))
    )


def strength(size: int, rates: dict[tuple[int, int], float]) -> float:
    """Tutte's and Nash-Williams' bound on trees that are used both ways, by looking at every partition."""
    best = math.inf
    for labels in itertools.product(range(size), repeat=size):
        parts = len(set(labels))
        if parts > 1:
            crossing = sum(rate for (one, other), rate in rates.items() if labels[one] != labels[other]) / 2
            best = min(best, crossing / (parts - 1))
    return best


def loads_of(packing: FractionalPacking) -> dict[tuple[str, str], float]:
    loads: dict[tuple[str, str], float] = {}
    for tree in packing.trees:
        for branch in tree.branches:
            down = [] if packing.direction == "in" else [branch.path]
            up = [] if packing.direction == "out" else [branch.path[::-1]]
            for path in down + up:
                for pair in itertools.pairwise(path):
                    loads[pair] = loads.get(pair, 0.0) + tree.rate
    return loads


def assert_links_carry(cluster: Cluster, packing: FractionalPacking) -> None:
    rates = {(link.source, link.target): link.bytes_per_second for link in cluster.links}
    for pair, load in loads_of(packing).items():
        assert load <= rates[pair] * (1 + 1e-9)


def assert_trees_span(packing: FractionalPacking, ranks: int) -> None:
    for tree in packing.trees:
        reached = {tree.root}
        for branch in tree.branches:
            assert branch.source in reached
            assert branch.target not in reached
            reached.add(branch.target)
        assert reached == set(range(ranks))
        assert tree.rate > 0


def rate_of(cluster: Cluster, program: Program) -> float:
    """Bytes of the vector per second, by the most loaded link."""
    rates = {(link.source, link.target): link.bytes_per_second for link in cluster.links}
    loads: dict[tuple[str, str], float] = {}
    for transfer in program.transfers:
        for pair in itertools.pairwise(program.paths[transfer.path]):
            loads[pair] = loads.get(pair, 0.0) + program.fraction(transfer.chunk)
    return 1 / max(load / rates[pair] for pair, load in loads.items())


# --- The cheapest arborescence ---


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_the_cheapest_arborescence_is_as_cheap_as_brute_force_finds(data):
    size = data.draw(st.integers(1, 5))
    root = data.draw(st.integers(0, size - 1))
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    edges = data.draw(st.lists(st.sampled_from(pairs), max_size=12)) if pairs else []  # parallel edges may appear
    costs = [float(data.draw(st.integers(0, 9))) for _ in edges]
    arriving = [[at for at, edge in enumerate(edges) if edge[1] == vertex] for vertex in range(size) if vertex != root]
    best = math.inf
    for choice in itertools.product(*arriving):
        reached = {root}
        for _ in range(size):
            reached |= {edges[at][1] for at in choice if edges[at][0] in reached}
        if len(reached) == size:
            best = min(best, sum(costs[at] for at in choice))
    if best == math.inf:
        with pytest.raises(DisconnectedError):
            minimum_arborescence(size, root, edges, costs)
        return
    found = minimum_arborescence(size, root, edges, costs)
    assert sum(costs[at] for at in found) == best
    reached = {root}
    for _ in range(size):
        reached |= {edges[at][1] for at in found if edges[at][0] in reached}
    assert len(reached) == size
    assert len(found) == size - 1


# --- The two steps of the packing ---


@given(drawn_rates(both_ways=False), st.sampled_from(["out", "in"]), st.sampled_from([0.1, 0.03]), st.data())
@settings(deadline=None, max_examples=40)
def test_one_way_trees_come_within_the_gap_of_the_smallest_cut(drawn, direction, gap, data):
    size, rates = drawn
    cluster, topology = topology_or_reject(size, rates)
    root = data.draw(st.integers(0, size - 1))
    packing = approximate_packing(topology, root, direction=direction, gap=gap)
    turned = rates if direction == "out" else {pair[::-1]: rate for pair, rate in rates.items()}
    best = smallest_cut(size, turned, root)
    assert (1 - gap) * best * (1 - 1e-9) <= packing.rate <= best * (1 + 1e-9) <= packing.bound * (1 + 1e-9)
    assert_links_carry(cluster, packing)
    assert_trees_span(packing, size)


@given(drawn_rates(both_ways=True), st.sampled_from([0.1, 0.03]))
@settings(deadline=None, max_examples=40)
def test_trees_used_both_ways_come_within_the_gap_of_the_graphs_strength(drawn, gap):
    size, rates = drawn
    cluster, topology = topology_or_reject(size, rates)
    packing = approximate_packing(topology, direction="both", gap=gap)
    best = strength(size, rates)
    assert (1 - gap) * best * (1 - 1e-9) <= packing.rate <= best * (1 + 1e-9) <= packing.bound * (1 + 1e-9)
    assert_links_carry(cluster, packing)
    assert_trees_span(packing, size)


@given(drawn_rates(both_ways=True), st.sampled_from(["out", "in", "both"]), st.sampled_from([0.0, 0.05, 0.2]))
@settings(deadline=None, max_examples=40)
def test_few_trees_keep_their_share_of_the_rate(drawn, direction, share):
    size, rates = drawn
    cluster, topology = topology_or_reject(size, rates)
    many = approximate_packing(topology, direction=direction)
    few = few_trees(topology, many, share=share)
    assert len(few.trees) <= len(many.trees)
    assert few.rate >= (1 - share) * many.rate * (1 - 1e-6)
    assert few.rate <= many.bound * (1 + 1e-9)
    assert_links_carry(cluster, few)
    assert_trees_span(few, size)


def test_eight_v100s_broadcast_at_six_links_worth_over_at_most_six_trees():
    few = few_trees(topology_of(DGX), approximate_packing(topology_of(DGX)))
    assert few.rate == pytest.approx(6 * LINK)
    assert len(few.trees) <= 6


def test_all_reduce_on_eight_v100s_is_within_both_tolerances_of_its_strength():
    packing = blink_packing(topology_of(DGX), "all_reduce")
    assert packing.bound_bytes_per_second == pytest.approx(24 / 7 * LINK)
    assert 0.95 * 0.95 * 24 / 7 * LINK <= packing.rate_bytes_per_second <= 24 / 7 * LINK * (1 + 1e-9)


def test_the_same_machine_always_gives_the_same_trees():
    assert blink_program(DGX, "all_reduce") == blink_program(DGX, "all_reduce")


# --- Programs ---


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_programs_do_their_collective_on_every_allocation_of_a_p100_machine(collective):
    cluster = load_cluster("dgx-1p")
    for devices in allocation_classes(cluster):
        program = blink_program(cluster, collective, devices, root=len(devices) - 1)
        verify(program)
        packing = blink_packing(topology_of(cluster, devices), collective, len(devices) - 1)
        assert rate_of(cluster, program) == pytest.approx(packing.rate_bytes_per_second)
        assert packing.rate_bytes_per_second <= packing.bound_bytes_per_second * (1 + 1e-9)
        if collective in ("broadcast", "reduce", "all_reduce"):
            assert packing.rate_bytes_per_second >= 0.95 * 0.95 * packing.bound_bytes_per_second


@given(drawn_rates(both_ways=True), st.sampled_from(COLLECTIVES), st.data())
@settings(deadline=None, max_examples=40)
def test_programs_do_their_collective_on_drawn_machines(drawn, collective, data):
    cluster, _ = topology_or_reject(*drawn)
    verify(blink_program(cluster, collective, root=data.draw(st.integers(0, drawn[0] - 1))))


@given(drawn_rates(both_ways=False), st.sampled_from(["broadcast", "reduce"]), st.data())
@settings(deadline=None, max_examples=25)
def test_broadcast_and_reduce_need_no_way_back(drawn, collective, data):
    cluster, _ = topology_or_reject(*drawn)
    verify(blink_program(cluster, collective, root=data.draw(st.integers(0, drawn[0] - 1))))


def test_all_reduce_over_a_one_way_circle_is_refused():
    circle = cluster_of(3, {(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0})
    verify(blink_program(circle, "broadcast"))
    with pytest.raises(DisconnectedError):
        blink_program(circle, "all_reduce")


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_trees_pass_switches_and_count_each_link_as_often_as_they_pass_it(collective):
    switched = load_cluster("dgx-a100")
    program = blink_program(switched, collective)
    verify(program)
    # A reduce-scatter and an all-gather through one switch take 2·7/8 of the vector over each GPU's link.
    best = {"all_reduce": 4 / 7, "all_gather": 8 / 7, "reduce_scatter": 8 / 7}.get(collective, 1.0)
    assert 0.9 * best * 300e9 <= rate_of(switched, program) <= best * 300e9 * (1 + 1e-9)
    over_pcie = blink_program(DGX, collective, kinds=PCIE)
    verify(over_pcie)
    assert all("pcie" in name for path in over_pcie.paths for name in path[1:2])


def test_one_device_has_nothing_to_send():
    for collective in COLLECTIVES:
        assert blink_program(DGX, collective, ["node0/gpu3"]).transfers == ()


def test_what_cannot_be_is_refused():
    topology = topology_of(DGX)
    with pytest.raises(ProgramError):
        blink_program(DGX, "all_to_all")
    with pytest.raises(ProgramError):
        blink_program(DGX, "broadcast", root=8)
    with pytest.raises(DisconnectedError):
        blink_program(DGX, "broadcast", ["node0/gpu1", "node0/gpu4"], kinds=["nvlink"])
    with pytest.raises(ProgramError):
        approximate_packing(topology, 8)
    for gap in (0.0, 1.0, math.nan):
        with pytest.raises(InputError):
            approximate_packing(topology, gap=gap)
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError):
            few_trees(topology, approximate_packing(topology), share=share)


def test_without_highs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(MissingExtraError, match="solve"):
        blink_program(DGX, "all_reduce")


# --- Several servers ---


def server_of(cluster: Cluster, program: Program, rank: int) -> str:
    return next(device.node for device in cluster.devices if device.name == program.devices[rank])


SERVERS = load_cluster("dgx-1p:2+dgx-a100:1")
# Sets of GPUs that NVLink joins on a DGX-1, and any of a DGX-A100's.
SIDES = [[(0,), (0, 3), (0, 1, 2), (0, 1, 2, 3), (0, 1, 4, 5, 6)]] * 2 + [[(2,), (0, 1), (0, 3, 5)]]


@given(st.data())
@settings(deadline=None, max_examples=20)
def test_three_phases_all_reduce_across_unlike_servers(data):
    nodes = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    names = list(SERVERS.nodes)
    devices = [f"{names[node]}/gpu{gpu}" for node in nodes for gpu in data.draw(st.sampled_from(SIDES[node]))]
    program = three_phase_program(SERVERS, data.draw(st.permutations(devices)))
    verify(program)
    if len(nodes) == 1:
        return
    # In the middle phase a server sends, as in a ring, 2 (S-1)/S of the vector to the others, and no more.
    crossing = dict.fromkeys(nodes, 0.0)
    for transfer in program.transfers:
        ends = [server_of(SERVERS, program, rank) for rank in (transfer.source, transfer.target)]
        if ends[0] != ends[1]:
            crossing[names.index(ends[0])] += program.fraction(transfer.chunk)
    for share in crossing.values():
        assert share == pytest.approx(2 * (len(nodes) - 1) / len(nodes))


def test_within_a_server_the_phases_use_all_its_trees():
    alone = rate_of(DGX, three_phase_program(DGX))
    assert alone == pytest.approx(rate_of(DGX, blink_program(DGX, "all_reduce")))


def test_the_roots_of_the_partitions_share_the_traffic_between_two_machines():
    cluster = load_cluster("dgx-a100:2")
    program = three_phase_program(cluster)
    verify(program)
    sent = [0.0] * 16
    for transfer in program.transfers:
        if server_of(cluster, program, transfer.source) != server_of(cluster, program, transfer.target):
            sent[transfer.source] += program.fraction(transfer.chunk)
    assert sent == pytest.approx([1 / 8] * 16)


# --- PCIe beside NVLink ---

sizes = st.floats(1, 1e10)
rates = st.floats(1e6, 1e12)


@given(sizes, rates, rates, st.floats(0, 1e-1))
def test_both_kinds_of_links_finish_at_once_or_pcie_gets_nothing(size, nvlink_rate, pcie_rate, switch_seconds):
    nvlink_bytes, pcie_bytes = hybrid_split(size, nvlink_rate, pcie_rate, switch_seconds)
    assert nvlink_bytes + pcie_bytes == pytest.approx(size)
    if size / nvlink_rate <= switch_seconds * (1 - 1e-9):  # NVLink alone is ready before PCIe begins
        assert pcie_bytes == 0
    elif size / nvlink_rate > switch_seconds * (1 + 1e-9):
        assert pcie_bytes > 0
        finished = switch_seconds + pcie_bytes / pcie_rate
        assert nvlink_bytes / nvlink_rate == pytest.approx(finished, rel=1e-6)


def over_pcie(program: Program) -> float:
    """The share of the vector that goes over PCIe, of what all ranks receive in a broadcast."""
    slow = [any("pcie" in name for name in path) for path in program.paths]
    shares = [program.fraction(transfer.chunk) for transfer in program.transfers if slow[transfer.path]]
    return sum(shares) / (program.size - 1)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_a_hybrid_program_does_its_collective(collective):
    verify(hybrid_program(DGX, collective, size_bytes=1e9, switch_seconds=1e-4, root=2))


def test_a_hybrid_program_sends_over_pcie_what_the_split_says():
    nvlink = blink_packing(topology_of(DGX), "broadcast").rate_bytes_per_second
    pcie = blink_packing(topology_of(DGX, kinds=PCIE), "broadcast").rate_bytes_per_second
    for size, switch_seconds in ((1e9, 0.0), (1e9, 1e-3), (1e8, 5e-4)):
        program = hybrid_program(DGX, "broadcast", size_bytes=size, switch_seconds=switch_seconds)
        expected = hybrid_split(size, nvlink, pcie, switch_seconds)[1] / size
        assert over_pcie(program) == pytest.approx(expected, rel=0.05)
    both = hybrid_program(DGX, "broadcast", size_bytes=1e9)
    assert rate_of(DGX, both) == pytest.approx(nvlink + pcie, rel=0.02)
    threshold = 1e-3 * nvlink  # NVLink alone is ready when PCIe could begin
    below = hybrid_program(DGX, "broadcast", size_bytes=0.99 * threshold, switch_seconds=1e-3)
    assert over_pcie(below) == 0
    assert over_pcie(hybrid_program(DGX, "broadcast", size_bytes=1.2 * threshold, switch_seconds=1e-3)) > 0


def test_a_split_of_nothing_sensible_is_refused():
    for arguments in ((-1.0, 1.0, 1.0, 0.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.0, -1.0, 0.0), (1.0, 1.0, 1.0, -1.0)):
        with pytest.raises(InputError):
            hybrid_split(*arguments)
