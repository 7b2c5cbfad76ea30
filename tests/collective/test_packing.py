"""Packings are at the bound, keep to the links, and make programs that verify."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.allocations import allocation_classes
from headway.collective.packing import Packing, Tree, optimal_rate, pack, packed_program
from headway.collective.topology import Edge, Topology, topology_of
from headway.collective.verify import verify
from headway.errors import DisconnectedError, ProgramError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

PACKED = ("broadcast", "reduce", "all_gather", "reduce_scatter", "all_reduce")
LINK = 25e9  # one NVLink of a V100, one way

relaxed = settings(deadline=None, max_examples=40)


def entering(topology: Topology, inside: frozenset[int]) -> float:
    return sum(rate for (u, v), rate in topology.capacity.items() if u not in inside and v in inside)


@cache
def subsets(count: int) -> tuple[frozenset[int], ...]:
    return tuple(frozenset(some) for size in range(count + 1) for some in itertools.combinations(range(count), size))


def partitions(things: tuple[int, ...]):
    if not things:
        yield []
        return
    for smaller in partitions(things[1:]):
        yield [frozenset(things[:1]), *smaller]
        for position, part in enumerate(smaller):
            yield [*smaller[:position], part | {things[0]}, *smaller[position + 1 :]]


def best_by_cuts(topology: Topology, collective: str, root: int) -> float:
    """The bound by enumeration of every cut, and for all-reduce of every partition."""
    ranks, count = topology.ranks, len(topology.names)
    everything = frozenset(range(count))
    rates = [math.inf]
    for inside in subsets(count):
        there = sum(node < ranks for node in inside)
        if not 0 < there < ranks:
            continue
        into, out = entering(topology, inside), entering(topology, everything - inside)
        match collective:
            case "broadcast" | "reduce" if root not in inside:
                rates.append(into if collective == "broadcast" else out)
            case "all_gather":
                rates.append(into * ranks / (ranks - there))
            case "reduce_scatter":
                rates.append(out * ranks / (ranks - there))
            case "all_reduce":
                rates += [into, out]
    if collective == "all_reduce":
        # What leaves a part or enters it, with switches on the side where that is least.
        for way in (everything, frozenset()):
            least: dict[frozenset[int], float] = {}
            for inside in subsets(count):
                part = frozenset(node for node in inside if node < ranks)
                least[part] = min(least.get(part, math.inf), entering(topology, inside ^ way))
            for parts in partitions(tuple(range(ranks))):
                if len(parts) > 1:
                    rates.append(sum(map(least.__getitem__, parts)) / (2 * len(parts) - 2))
    return min(rates)


def check(topology: Topology, packing: Packing) -> None:
    """Trees span, go on only from what they have reached, keep to the links, and weigh what the rate says."""
    width: dict[tuple[str, str], float] = {}
    for edge in topology.edges:
        for pair in itertools.pairwise(edge.path):
            width[pair] = width.get(pair, 0.0) + edge.bytes_per_second
    used: dict[tuple[str, str], int] = {}
    for tree in packing.trees:
        assert tree.weight > 0
        assert (packing.collective in ("broadcast", "all_gather", "all_reduce")) == bool(tree.outward)
        assert (packing.collective in ("reduce", "reduce_scatter", "all_reduce")) == bool(tree.inward)
        for branches in (tree.outward, tree.inward[::-1]):
            reached = {tree.root}
            for branch in branches:
                near, far = branch.source, branch.target
                if branches is not tree.outward:
                    near, far = far, near
                assert near in reached
                assert far not in reached
                reached.add(far)
            assert not branches or reached == set(range(topology.ranks))
        for branch in (*tree.inward, *tree.outward):
            ends = topology.names[branch.source], topology.names[branch.target]
            assert (branch.path[0], branch.path[-1]) == ends
            assert len(set(branch.path)) == len(branch.path)
            for pair in itertools.pairwise(branch.path):
                used[pair] = used.get(pair, 0) + tree.weight
    for pair, weight in used.items():
        assert weight * packing.unit_bytes_per_second <= width[pair] * (1 + 1e-12), pair
    weights = [sum(tree.weight for tree in packing.trees if tree.root == rank) for rank in range(topology.ranks)]
    if packing.collective in ("all_gather", "reduce_scatter"):
        assert len(set(weights)) == 1
    elif packing.collective != "all_reduce":
        assert weights[packing.root] == sum(weights)
    assert packing.rate_bytes_per_second == pytest.approx(sum(weights) * packing.unit_bytes_per_second, rel=1e-12)
    assert packing.rate_bytes_per_second <= packing.bound_bytes_per_second * (1 + 1e-9)


def is_at_the_bound(packing: Packing) -> bool:
    return packing.rate_bytes_per_second == pytest.approx(packing.bound_bytes_per_second, rel=1e-12)


@cache
def allocations(name: str) -> tuple[Topology, ...]:
    cluster = load_cluster(name)
    return tuple(topology_of(cluster, devices, kinds={"nvlink"}) for devices in allocation_classes(cluster))


@st.composite
def topologies(draw: st.DrawFn, *, switches: int = 2, symmetric: bool = False, balanced: bool = True):
    """Joined, of 2 to 5 ranks; two things may be joined over different paths; every switch receives what it sends."""
    ranks = draw(st.integers(2, 5))
    count = ranks + draw(st.integers(0, switches))
    wires: list[tuple[int, int, int]] = []

    def circle(nodes: list[int], units: int) -> None:
        for position, node in enumerate(nodes):
            if nodes[position - 1] != node:
                wires.append((nodes[position - 1], node, units))
                if symmetric:
                    wires.append((node, nodes[position - 1], units))

    circle(draw(st.permutations(range(count))), draw(st.integers(1, 4)))
    for _ in range(draw(st.integers(0, 4))):
        circle(draw(st.permutations(range(count)))[: draw(st.integers(2, count))], draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(0, 5))):
        limit = ranks if balanced else count
        one, other = draw(st.integers(0, limit - 1)), draw(st.integers(0, limit - 1))
        if symmetric:
            circle([one, other], draw(st.integers(1, 9)))
        elif one != other:
            wires.append((one, other, draw(st.integers(1, 9))))
    names = tuple(f"d{rank}" if rank < ranks else f"s{rank}" for rank in range(count))
    return Topology(
        names=names,
        ranks=ranks,
        edges=tuple(
            # Each edge passes a thing of its own, so that no two have the same path.
            Edge(source=u, target=v, bytes_per_second=units * 1e9, path=(names[u], f"w{min(u, v)}.{at}", names[v]))
            for at, (u, v, units) in enumerate(wires)
        ),
    )


# --------------------------------------------------------------------------------------------- the machines of Blink


@pytest.mark.parametrize(("name", "classes"), [("dgx-1v", 46), ("dgx-1p", 14)])
@pytest.mark.parametrize("collective", PACKED)
def test_every_allocation_of_a_dgx_1_is_packed_to_the_optimum_that_enumeration_finds(name, classes, collective):
    assert len(allocations(name)) == classes
    for topology in allocations(name):
        root = topology.ranks // 2
        packing = pack(topology, collective, root)
        check(topology, packing)
        assert packing.bound_bytes_per_second == pytest.approx(best_by_cuts(topology, collective, root), rel=1e-12)
        assert is_at_the_bound(packing)


@pytest.mark.parametrize(
    ("collective", "links"), [("broadcast", 6), ("all_gather", Fraction(48, 7)), ("all_reduce", Fraction(24, 7))]
)
def test_eight_v100s_reach_the_known_optimum(collective, links):
    packing = pack(topology_of(load_cluster("dgx-1v")), collective)
    assert packing.rate_bytes_per_second == pytest.approx(float(links) * LINK, rel=1e-15)


def test_broadcast_weighs_as_many_trees_as_the_rate_has_links():
    for topology in allocations("dgx-1v"):
        packing = pack(topology, "broadcast")
        weight = sum(tree.weight for tree in packing.trees)
        assert weight * packing.unit_bytes_per_second == packing.rate_bytes_per_second
        assert packing.unit_bytes_per_second in (LINK, 2 * LINK)


def test_packed_trees_beat_reduce_scatter_with_all_gather_by_up_to_five_thirds():
    gains = []
    for topology in allocations("dgx-1v"):
        halves = [optimal_rate(topology, collective) for collective in ("reduce_scatter", "all_gather")]
        gains.append(optimal_rate(topology, "all_reduce") * sum(1 / rate for rate in halves))
    assert min(gains) >= 1 - 1e-12
    assert max(gains) == pytest.approx(5 / 3)


# ------------------------------------------------------------------------------------------------- any topology at all


@relaxed
@given(topologies(), st.sampled_from(PACKED[:4]), st.data())
def test_directed_switched_topologies_are_packed_to_the_bound(topology, collective, data):
    root = data.draw(st.integers(0, topology.ranks - 1))
    packing = pack(topology, collective, root)
    check(topology, packing)
    assert packing.bound_bytes_per_second == pytest.approx(best_by_cuts(topology, collective, root), rel=1e-12)
    assert is_at_the_bound(packing)


@relaxed
@given(topologies(symmetric=True))
def test_all_reduce_is_at_the_worst_partition_wherever_edges_are_as_wide_both_ways(topology):
    packing = pack(topology, "all_reduce")
    check(topology, packing)
    assert packing.bound_bytes_per_second == pytest.approx(best_by_cuts(topology, "all_reduce", 0), rel=1e-12)
    assert is_at_the_bound(packing)


@relaxed
@given(topologies())
def test_all_reduce_on_directed_edges_is_no_worse_than_reduce_scatter_with_all_gather(topology):
    packing = pack(topology, "all_reduce")
    check(topology, packing)
    assert packing.bound_bytes_per_second == pytest.approx(best_by_cuts(topology, "all_reduce", 0), rel=1e-12)
    halves = [optimal_rate(topology, collective) for collective in ("reduce_scatter", "all_gather")]
    assert packing.rate_bytes_per_second * sum(1 / rate for rate in halves) >= 1 - 1e-12


@relaxed
@given(topologies(balanced=False, switches=3), st.sampled_from(PACKED))
def test_switches_that_could_send_more_than_they_receive_copy_nothing(topology, collective):
    check(topology, pack(topology, collective))


def test_a_switch_that_would_have_to_copy_halves_the_rate():
    # One unit comes in and two go out: the cuts say 1, but without copying it takes turns.
    rates = {("d0", "s"): 1e9, ("s", "d1"): 1e9, ("s", "d2"): 1e9, ("d1", "d0"): 5e9, ("d2", "d0"): 5e9}
    names = ("d0", "d1", "d2", "s")
    edges = tuple(
        Edge(source=names.index(u), target=names.index(v), bytes_per_second=rate, path=(u, v))
        for (u, v), rate in rates.items()
    )
    packing = pack(Topology(names=names, ranks=3, edges=edges), "broadcast")
    assert packing.bound_bytes_per_second == 1e9
    assert packing.rate_bytes_per_second == pytest.approx(0.5e9, rel=2e-3)


def test_an_nvswitch_gives_trees_without_detours():
    topology = topology_of(load_cluster("dgx-a100"))
    gathered, reduced, spread = (pack(topology, name) for name in ("all_gather", "all_reduce", "broadcast"))
    for packing in (gathered, reduced, spread):
        check(topology, packing)
        assert is_at_the_bound(packing)
    assert [{branch.source for branch in tree.outward} for tree in gathered.trees] == [{t.root} for t in gathered.trees]
    assert len(gathered.trees) == len(reduced.trees) == 8
    assert len(spread.trees) == 7


@pytest.mark.parametrize("name", ["dgx-a100:2", "dgx-1v:2"])
@pytest.mark.parametrize("collective", ["broadcast", "reduce_scatter", "all_reduce"])
def test_two_machines_are_packed_to_the_bound(name, collective):
    topology = topology_of(load_cluster(name))
    packing = pack(topology, collective)
    check(topology, packing)
    assert is_at_the_bound(packing)


@pytest.mark.parametrize("counts", [(3, 5), (2, 4, 3)])
def test_all_reduce_among_uneven_parts_of_machines_is_at_the_bound_that_equal_blocks_miss(counts):
    devices = [f"node{node}/gpu{at}" for node, count in enumerate(counts) for at in range(count)]
    topology = topology_of(load_cluster(f"dgx-1v:{len(counts)}"), devices)
    packing = pack(topology, "all_reduce")
    check(topology, packing)
    assert is_at_the_bound(packing)
    assert optimal_rate(topology, "all_gather") / 2 < 0.9 * packing.rate_bytes_per_second


def test_many_ranks_take_the_same_road_without_a_table_of_all_sets():
    # A torus of 4 by 5: more ranks than the table of cuts is made for.
    names = tuple(f"d{rank}" for rank in range(20))
    edges = []
    for row, column in itertools.product(range(4), range(5)):
        for other in (((row + 1) % 4, column), (row, (column + 1) % 5)):
            u, v = row * 5 + column, other[0] * 5 + other[1]
            edges += [
                Edge(source=a, target=b, bytes_per_second=1e9, path=(names[a], names[b])) for a, b in ((u, v), (v, u))
            ]
    topology = Topology(names=names, ranks=20, edges=tuple(edges))
    rates = {"broadcast": 4e9, "all_gather": 4e9 * 20 / 19, "all_reduce": 2e9 * 20 / 19}
    for packing in (pack(topology, "broadcast"), pack(topology, "all_gather"), pack(topology, "all_reduce")):
        check(topology, packing)
        assert packing.rate_bytes_per_second == pytest.approx(rates[packing.collective])


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("collective", PACKED)
def test_programs_of_every_allocation_verify_and_load_links_like_their_packing(collective):
    cluster = load_cluster("dgx-1v")
    for topology in allocations("dgx-1v"):
        program = packed_program(cluster, collective, topology.devices, root=1, kinds={"nvlink"})
        assert verify(program).ranks == topology.ranks
        packing = pack(topology, collective, 1)
        busiest: dict[tuple[str, str], float] = {}
        for transfer in program.transfers:
            for pair in itertools.pairwise(program.paths[transfer.path]):
                busiest[pair] = busiest.get(pair, 0.0) + program.fraction(transfer.chunk)
        width = {edge.path: edge.bytes_per_second for edge in topology.edges}
        seconds = max(share / width[pair] for pair, share in busiest.items())
        assert seconds <= 1 / packing.rate_bytes_per_second * (1 + 1e-12)


@relaxed
@given(topologies(symmetric=True) | topologies(), st.sampled_from(PACKED), st.data())
def test_programs_of_any_topology_verify(topology, collective, data):
    kind = Accelerator(name="any", flop_per_second={"float32": 1.0}, memory_bytes=1.0, memory_bytes_per_second=1.0)
    inner = dict.fromkeys(name for edge in topology.edges for name in edge.path if name not in topology.devices)
    cluster = Cluster(
        name="drawn",
        accelerators={"any": kind},
        devices=tuple(Device(name=name, accelerator="any", node="") for name in topology.devices),
        switches=tuple(Switch(name=name) for name in inner),
        links=tuple(
            Link(source=one, target=other, bytes_per_second=edge.bytes_per_second)
            for edge in topology.edges
            for one, other in itertools.pairwise(edge.path)
        ),
    ).validate()
    root = data.draw(st.integers(0, topology.ranks - 1))
    program = packed_program(cluster, collective, root=root)
    verify(program)
    links = {(link.source, link.target) for link in cluster.links}
    assert all(pair in links for path in program.paths for pair in itertools.pairwise(path))


# -------------------------------------------------------------------------------------------------- units and refusals


def line(*rates: float) -> Topology:
    """Ranks in a row, each neighbour joined both ways."""
    names = tuple(f"d{rank}" for rank in range(len(rates) + 1))
    ends = [(u, v, rate) for at, rate in enumerate(rates) for u, v in ((at, at + 1), (at + 1, at))]
    edges = tuple(Edge(source=u, target=v, bytes_per_second=rate, path=(names[u], names[v])) for u, v, rate in ends)
    return Topology(names=names, ranks=len(names), edges=edges)


def test_capacities_are_counted_in_their_largest_common_unit():
    packing = pack(line(31e9, 300e9), "broadcast")
    assert packing.unit_bytes_per_second == 1e9
    assert [tree.weight for tree in packing.trees] == [31]


def test_probed_bandwidths_are_rounded_down_a_little_and_the_rate_says_so():
    topology = line(12345678901.25, 300e9 / 7)
    packing = pack(topology, "broadcast")
    check(topology, packing)
    assert packing.bound_bytes_per_second == pytest.approx(12345678901.25, rel=1e-9)
    assert 0.99 < packing.rate_bytes_per_second / packing.bound_bytes_per_second <= 1


def test_a_tiny_bandwidth_beside_a_huge_one_is_not_lost():
    packing = pack(line(1.5, 3e12), "all_reduce")
    assert packing.bound_bytes_per_second == pytest.approx(1.5)
    assert packing.rate_bytes_per_second == pytest.approx(1.5, rel=1e-2)


def test_a_single_rank_moves_nothing():
    alone = Topology(names=("d0",), ranks=1, edges=())
    for collective in PACKED:
        packing = pack(alone, collective)
        assert packing.trees == (Tree(root=0, weight=1),)
        assert packing.rate_bytes_per_second == optimal_rate(alone, collective) == math.inf
    verify(packed_program(load_cluster("dgx-1v"), "all_reduce", ["node0/gpu0"]))


@pytest.mark.parametrize("collective", PACKED)
def test_ranks_that_are_not_joined_are_refused(collective):
    apart = Topology(names=("d0", "d1"), ranks=2, edges=())
    with pytest.raises(DisconnectedError):
        pack(apart, collective)


def test_what_is_not_made_of_spanning_trees_is_refused():
    with pytest.raises(ProgramError, match="all_to_all is not made of spanning trees"):
        pack(line(1e9), "all_to_all")
    with pytest.raises(ProgramError, match="no collective is called 'all_sum'"):
        optimal_rate(line(1e9), "all_sum")  # type: ignore[arg-type]
    with pytest.raises(ProgramError, match="no rank 2"):
        pack(line(1e9), "broadcast", 2)


def test_a_packing_survives_json():
    packing = pack(topology_of(load_cluster("dgx-1v")), "all_reduce")
    assert Packing.from_json(packing.to_json()) == packing
