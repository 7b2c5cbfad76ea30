"""Bounds and trees against brute force: every cut and every partition, enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective import flow

relaxed = settings(deadline=None, max_examples=60)


def entering(capacity: flow.Matrix, inside: set[int]) -> int:
    return sum(
        units
        for source, row in enumerate(capacity)
        for target, units in enumerate(row)
        if source not in inside and target in inside
    )


def sets_with_a_rank(node_count: int, ranks: int) -> Iterator[set[int]]:
    for size in range(1, node_count + 1):
        for chosen in itertools.combinations(range(node_count), size):
            if any(node < ranks for node in chosen):
                yield set(chosen)


def is_servable(capacity: flow.Matrix, supply: Sequence[int]) -> bool:
    ranks = len(supply)
    return all(
        entering(capacity, inside) >= sum(units for rank, units in enumerate(supply) if rank not in inside)
        for inside in sets_with_a_rank(len(capacity), ranks)
    )


def partitions(things: Sequence[int]) -> Iterator[list[set[int]]]:
    if not things:
        yield []
        return
    first, *rest = things
    for smaller in partitions(rest):
        yield [{first}, *smaller]
        for position, part in enumerate(smaller):
            yield [*smaller[:position], part | {first}, *smaller[position + 1 :]]


@st.composite
def graphs(draw: st.DrawFn, *, most_ranks: int = 6, most_switches: int = 3, symmetric: bool = False):
    """(capacity, ranks): strongly connected, and every switch receives as much as it sends."""
    ranks = draw(st.integers(2, most_ranks))
    count = ranks + draw(st.integers(0, most_switches))
    capacity = [[0] * count for _ in range(count)]
    ring = draw(st.permutations(range(count)))
    cycles = [(ring, draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(2, count))
        cycles.append((draw(st.permutations(range(count)))[:length], draw(st.integers(1, 9))))
    for cycle, units in cycles:
        for position, node in enumerate(cycle):
            capacity[cycle[position - 1]][node] += units
    for _ in range(draw(st.integers(0, 6))):
        source, target = draw(st.integers(0, ranks - 1)), draw(st.integers(0, ranks - 1))
        if source != target:
            capacity[source][target] += draw(st.integers(1, 9))
    if symmetric:
        capacity = [[one + other for one, other in zip(*rows)] for rows in zip(capacity, flow.transposed(capacity))]
    return capacity, ranks


def check_trees(trees: Sequence[flow.Arborescence], capacity: flow.Matrix, supply: Sequence[int]) -> None:
    used: dict[tuple[int, int], int] = {}
    weights = [0] * len(supply)
    for tree in trees:
        reached = {tree.root}
        assert tree.weight > 0
        for source, target in tree.arcs:
            assert source in reached
            assert target not in reached
            reached.add(target)
            used[source, target] = used.get((source, target), 0) + tree.weight
        assert reached == set(range(len(supply)))
        weights[tree.root] += tree.weight
    assert weights == list(supply)
    assert all(units <= capacity[source][target] for (source, target), units in used.items())


@relaxed
@given(graphs())
def test_broadcast_bound_is_the_smallest_cut_that_parts_the_root_from_a_rank(graph):
    capacity, ranks = graph
    for root in range(ranks):
        cuts = [entering(capacity, inside) for inside in sets_with_a_rank(len(capacity), ranks) if root not in inside]
        assert flow.broadcast_bound(capacity, ranks, root) == min(cuts)


@relaxed
@given(graphs())
def test_gather_bound_is_the_worst_cut_over_the_blocks_that_must_cross_it(graph):
    capacity, ranks = graph
    ratios = []
    for inside in sets_with_a_rank(len(capacity), ranks):
        outside = ranks - sum(node < ranks for node in inside)
        if outside:
            ratios.append(Fraction(entering(capacity, inside), outside))
    assert flow.gather_bound(capacity, ranks) == min(ratios)


@relaxed
@given(graphs(most_ranks=6, most_switches=2))
def test_partition_bound_is_the_worst_partition_with_switches_where_they_help_least(graph):
    capacity, ranks = graph
    back = flow.transposed(capacity)
    switches = range(ranks, len(capacity))
    subsets = [set(some) for size in range(len(switches) + 1) for some in itertools.combinations(switches, size)]

    def leaving(part: set[int]) -> int:
        return min(entering(back, part | some) for some in subsets)

    ratios = [
        Fraction(sum(map(leaving, parts)), 2 * (len(parts) - 1)) for parts in partitions(range(ranks)) if len(parts) > 1
    ]
    assert flow.partition_bound(capacity, ranks) == min(ratios)


@relaxed
@given(graphs(most_switches=0, symmetric=True))
def test_partition_bound_of_an_undirected_graph_is_its_strength(graph):
    capacity, ranks = graph
    ratios = []
    for parts in partitions(range(ranks)):
        if len(parts) > 1:
            crossing = sum(
                capacity[u][v]
                for one, other in itertools.combinations(parts, 2)
                for u, v in itertools.product(one, other)
            )
            ratios.append(Fraction(crossing, len(parts) - 1))
    assert flow.partition_bound(capacity, ranks) == min(ratios)


@relaxed
@given(graphs(), st.integers(1, 40), st.data())
def test_shortfall_says_whether_every_cut_is_wide_enough(graph, largest, data):
    capacity, ranks = graph
    supply = data.draw(st.lists(st.integers(0, largest), min_size=ranks, max_size=ranks))
    lacking = max(
        sum(units for rank, units in enumerate(supply) if rank not in inside) - entering(capacity, inside)
        for inside in sets_with_a_rank(len(capacity), ranks)
    )
    assert flow.shortfall(capacity, supply) == max(0, lacking)


@relaxed
@given(graphs(), st.booleans(), st.integers(1, 50))
def test_without_switches_the_same_supply_is_served_over_routes_that_fit(graph, all_roots, quantum):
    capacity, ranks = graph
    if all_roots:
        rate = flow.gather_bound(capacity, ranks)
        supply = [rate.numerator] * ranks
        capacity = [[units * rate.denominator for units in row] for row in capacity]
    else:
        supply = [0] * ranks
        supply[-1] = flow.broadcast_bound(capacity, ranks, ranks - 1)
    arcs = [(u, v) for u, row in enumerate(capacity) for v, units in enumerate(row) if units]
    routes: flow.Routes = {(u, v): {(at,): capacity[u][v]} for at, (u, v) in enumerate(arcs)}
    split, joined = flow.split_switches(capacity, supply, routes, quantum=quantum)
    assert len(split) == ranks
    assert is_servable(split, supply)
    used = [0] * len(arcs)
    for source, row in enumerate(split):
        for target, units in enumerate(row):
            parts = joined.get((source, target), {})
            assert sum(parts.values()) == units
            for part, amount in parts.items():
                ends = [arcs[at] for at in part]
                assert (ends[0][0], ends[-1][1]) == (source, target)
                assert all(first[1] == second[0] >= ranks for first, second in itertools.pairwise(ends))
                for at in part:
                    used[at] += amount
    assert all(amount <= capacity[u][v] for amount, (u, v) in zip(used, arcs))


@pytest.mark.parametrize("table_ranks", [0, 14], ids=["by max-flow", "by table"])
@relaxed
@given(graphs(most_switches=0), st.data())
def test_trees_serve_any_supply_that_every_cut_permits(table_ranks, graph, data):
    capacity, ranks = graph
    weights = data.draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks).filter(any))
    # The largest multiple of the weights that the cuts permit, in units that make it whole.
    rate = min(
        Fraction(entering(capacity, inside), outside)
        for inside in sets_with_a_rank(ranks, ranks)
        if (outside := sum(units for rank, units in enumerate(weights) if rank not in inside))
    )
    supply = [units * rate.numerator for units in weights]
    capacity = [[units * rate.denominator for units in row] for row in capacity]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "_TABLE_RANKS", table_ranks)
        trees = flow.pack_arborescences(capacity, supply)
    check_trees(trees, capacity, supply)


@relaxed
@given(graphs(symmetric=True), st.data())
def test_an_aimed_graph_serves_twice_the_bound_of_its_halves_from_any_root_or_from_all(graph, data):
    capacity, ranks = graph
    bound = flow.partition_bound(capacity, ranks)
    capacity = [[units * bound.denominator for units in row] for row in capacity]
    total = 2 * bound.numerator
    root = data.draw(st.none() | st.integers(0, ranks - 1))
    directed, supply = flow.aimed(capacity, ranks, total, root)
    for one, other in itertools.combinations(range(len(capacity)), 2):
        assert directed[one][other] + directed[other][one] == 2 * capacity[one][other]
        assert min(directed[one][other], directed[other][one]) >= 0
    for switch in range(ranks, len(capacity)):
        assert sum(directed[switch]) == sum(row[switch] for row in directed)
    assert sum(supply) == total
    assert min(supply) >= 0
    assert root is None or supply[root] == total
    assert is_servable(directed, supply)


def test_a_graph_in_two_pieces_has_no_rate():
    apart = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert flow.broadcast_bound(apart, 4, 0) == 0
    assert flow.gather_bound(apart, 4) == 0
    assert flow.partition_bound(apart, 4) == 0


def test_a_push_goes_no_further_than_its_limit_and_can_be_sent_back():
    residual = flow.Residual([[0, 5, 0], [0, 0, 3], [0, 0, 0]])
    assert residual.push(0, 2, 2) == 2
    assert residual.push(0, 2) == 1
    assert residual.reach(0) == 0b011
    assert residual.push(2, 0) == 3
    assert residual.reach(0) == 0b111
