"""Blink's own way to collectives (Wang et al., "Blink: Fast and Generic Collectives for Distributed ML", MLSys 2020).

Spanning trees are packed in two steps (section 3.2). Multiplicative weights find trees, one each round, whose rates
together come close to the largest possible; an integer program then keeps few of them. `collective.packing` attains
the largest rate itself; this is here to compare with it.

Broadcast and reduce take trees that lead out of the root (arborescences). All-reduce, all-gather and reduce-scatter
take trees whose links are used both ways: up to the root, then down from it (section 3.3). Where there are switches,
the edges of a tree are paths between ranks, and a link that several of them pass counts several times.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import msgspec

from headway.collective.packing import Branch, Packing, Tree, optimal_rate, pack
from headway.collective.program import Builder, Chunk, Collective, Program
from headway.collective.topology import Topology, topology_of
from headway.errors import DisconnectedError, InputError, MissingExtraError, ProgramError
from headway.hardware.cluster import Cluster

__all__ = [
    "FractionalPacking",
    "FractionalTree",
    "approximate_packing",
    "blink_packing",
    "blink_program",
    "few_trees",
    "hybrid_program",
    "hybrid_split",
    "minimum_arborescence",
    "three_phase_program",
]

Direction = Literal["out", "in", "both"]

_DIRECTIONS: dict[str, Direction] = {"broadcast": "out", "reduce": "in"}  # the others: "both"
_INWARD = {"reduce", "all_reduce", "reduce_scatter"}
_OUTWARD = {"broadcast", "all_reduce", "all_gather"}
_BLOCKED = {"all_gather", "reduce_scatter"}
_PCIE_KINDS = frozenset({"pcie", "socket"})

# Rates are sought in whole links first, then in halves, thirds, … of a link, which takes more trees.
_PARTS = (1, 2, 3, 4, 6, 8)
_NODES = 1  # of the integer program: beyond the root node, the search took 15 times as long and saved one tree of six
_RESOLUTION = 5_040  # parts into which a vector is divided at most, where the rates of trees have no simple ratio


class FractionalTree(msgspec.Struct, frozen=True):
    """A spanning tree that carries `rate` bytes per second; `branches` lead away from the root, parents first."""

    root: int
    branches: tuple[Branch, ...]
    rate: float

    def rooted_at(self, root: int) -> FractionalTree:
        """The same links with another root; for trees that are used both ways."""
        joined: dict[int, list[Branch]] = {}
        for branch in self.branches:
            joined.setdefault(branch.source, []).append(branch)
            joined.setdefault(branch.target, []).append(_turned(branch))
        return FractionalTree(root=root, branches=_nearest_first(root, joined), rate=self.rate)


class FractionalPacking(msgspec.Struct, frozen=True):
    """Trees whose rates the links carry all at once.

    `direction`: "out" where data goes down the trees, "in" where it goes up, "both" where each tree carries its rate up
    and down at the same time. `bound`: no such packing has a larger rate (bytes per second). `rounds`: how many trees
    were looked for.
    """

    direction: Direction
    trees: tuple[FractionalTree, ...]
    bound: float
    rounds: int

    @property
    def rate(self) -> float:
        """Bytes per second of all trees together."""
        return sum(tree.rate for tree in self.trees)


def _turned(branch: Branch) -> Branch:
    return Branch(source=branch.target, target=branch.source, path=branch.path[::-1])


def _nearest_first(root: int, leaving: Mapping[int, Sequence[Branch]]) -> tuple[Branch, ...]:
    """The branches of a tree, parents before their children."""
    ordered: list[Branch] = []
    reached = [root]
    for rank in reached:
        for branch in leaving.get(rank, ()):
            if branch.target not in reached:
                ordered.append(branch)
                reached.append(branch.target)
    return tuple(ordered)


# --- Multiplicative weights ---


def minimum_arborescence(
    size: int, root: int, edges: Sequence[tuple[int, int]], costs: Sequence[float]
) -> tuple[int, ...]:
    """Positions in `edges` (from, to) of the spanning out-tree of `root` with the least sum of `costs`.

    By contracting cycles of cheapest arriving edges (Chu and Liu 1965, Edmonds 1967). Raises DisconnectedError where
    something cannot be reached from the root.
    """
    live = [(*edge, cost, position) for position, (edge, cost) in enumerate(zip(edges, costs)) if edge[1] != root]
    return tuple(sorted(_arborescence(size, root, live)))


def _arborescence(size: int, root: int, edges: list[tuple[int, int, float, int]]) -> list[int]:
    """Positions (the last entry of each edge) of the cheapest arborescence."""
    cheapest: list[tuple[int, int, float, int] | None] = [None] * size
    for edge in edges:
        best = cheapest[edge[1]]
        if best is None or edge[2] < best[2]:
            cheapest[edge[1]] = edge
    arriving: dict[int, tuple[int, int, float, int]] = {}
    for vertex, edge in enumerate(cheapest):
        if edge is not None:
            arriving[vertex] = edge
        elif vertex != root:
            raise DisconnectedError(
                "no tree out of the root reaches every rank",
                remedy="add the missing links, or choose devices that are joined both ways",
            )
    cycles = _cycles(size, root, arriving)
    if not cycles:
        return [edge[3] for edge in arriving.values()]
    # Each cycle becomes one vertex; to enter it at a vertex saves the edge of the cycle that arrives there.
    label = [-1] * size
    on_cycle = {vertex for cycle in cycles for vertex in cycle}
    for number, cycle in enumerate(cycles):
        for vertex in cycle:
            label[vertex] = number
    others = (vertex for vertex in range(size) if vertex not in on_cycle)
    for number, vertex in enumerate(others, start=len(cycles)):
        label[vertex] = number
    contracted: list[tuple[int, int, float, int]] = []
    entrance: dict[int, int] = {}
    for source, target, cost, position in edges:
        if label[source] != label[target]:
            saved = arriving[target][2] if target in on_cycle else 0.0
            contracted.append((label[source], label[target], cost - saved, position))
            entrance[position] = target
    chosen = _arborescence(max(label) + 1, label[root], contracted)
    entered = {entrance[position] for position in chosen}
    return chosen + [arriving[vertex][3] for vertex in on_cycle if vertex not in entered]


def _cycles(size: int, root: int, arriving: dict[int, tuple[int, int, float, int]]) -> list[list[int]]:
    """The cycles that arise when every vertex but the root keeps just its arriving edge."""
    cycles: list[list[int]] = []
    seen_from = [-1] * size
    seen_from[root] = size
    for start in range(size):
        vertex = start
        while seen_from[vertex] < 0:
            seen_from[vertex] = start
            vertex = arriving[vertex][0]
        if seen_from[vertex] == start and vertex != root:
            cycle = [vertex]
            while (vertex := arriving[vertex][0]) != cycle[0]:
                cycle.append(vertex)
            cycles.append(cycle)
    return cycles


class _Wiring:
    """The branches that trees may be made of, and how often each passes which link.

    A link is a pair of neighbours in a path; `capacities` are relative to the slowest link, whose rate is `unit`.
    """

    def __init__(self, topology: Topology, direction: Direction) -> None:
        rates: dict[tuple[str, str], float] = {}
        for edge in topology.edges:
            for pair in itertools.pairwise(edge.path):
                rates[pair] = max(rates.get(pair, 0.0), edge.bytes_per_second)
        self.number = {pair: number for number, pair in enumerate(rates)}
        self.unit = min(rates.values(), default=1.0)
        self.capacities = [rate / self.unit for rate in rates.values()]
        self.direction: Direction = direction
        self.branches: list[Branch] = []
        for source, target, path in _routes(topology):
            if direction == "in":
                self.branches.append(Branch(source=target, target=source, path=path[::-1]))
            elif direction == "out" or all(pair in rates for pair in itertools.pairwise(path[::-1])):
                self.branches.append(Branch(source=source, target=target, path=path))
        self.passes = [self.links_of(branch) for branch in self.branches]

    def links_of(self, branch: Branch) -> list[int]:
        """The links that a branch of a tree loads."""
        down = [] if self.direction == "in" else [self.number[pair] for pair in itertools.pairwise(branch.path)]
        up = [] if self.direction == "out" else [self.number[pair] for pair in itertools.pairwise(branch.path[::-1])]
        return down + up

    def load(self, branches: Sequence[Branch]) -> dict[int, int]:
        """Link → how often a tree of these branches passes it."""
        load: dict[int, int] = {}
        for branch in branches:
            for link in self.links_of(branch):
                load[link] = load.get(link, 0) + 1
        return load


def _routes(topology: Topology) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(source, target, path) between ranks: every direct edge, else the best way through switches alone."""
    direct: set[tuple[int, int]] = set()
    for edge in topology.edges:
        if edge.source < topology.ranks and edge.target < topology.ranks:
            direct.add((edge.source, edge.target))
            yield edge.source, edge.target, edge.path
    if not topology.is_switched:
        return
    leaving: dict[int, list[tuple[int, float, tuple[str, ...]]]] = {}
    for edge in topology.edges:
        leaving.setdefault(edge.source, []).append((edge.target, edge.bytes_per_second, edge.path))
    for source in range(topology.ranks):
        # Fewest edges first, then the fastest slowest link, then the order of names: nothing is left to chance.
        queue: list[tuple[int, float, int, tuple[str, ...]]] = [(0, -math.inf, source, (topology.names[source],))]
        done: set[int] = set()
        while queue:
            length, slowest, at, path = heapq.heappop(queue)
            if at in done:
                continue
            done.add(at)
            if at < topology.ranks and at != source:
                if (source, at) not in direct:
                    yield source, at, path
                continue
            for target, rate, step in leaving.get(at, ()):
                if target not in done:
                    heapq.heappush(queue, (length + 1, max(slowest, -rate), target, path + step[1:]))


def approximate_packing(
    topology: Topology, root: int = 0, *, direction: Direction = "out", gap: float = 0.05
) -> FractionalPacking:
    """Trees from `root` whose rates together are at least (1 - `gap`) of the largest possible, and usually many.

    Each round takes the tree whose links are cheapest, sends over it what its slowest link carries, and makes its links
    dearer (Garg and Könemann, FOCS 1998; Blink, section 3.2). It ends when the rate so far, scaled to what the links
    carry, is within the gap of the bound that linear programming's duality gives: Σ capacity·price / cheapest tree.
    Raises DisconnectedError, ProgramError for a root that is not there, and InputError for a gap outside 0 … 1.
    """
    if not 0 <= root < topology.ranks:
        raise ProgramError(f"no rank {root}", place="blink: root", remedy=f"0 to {topology.ranks - 1}")
    if not 0 < gap < 1:
        raise InputError(f"a gap of {gap:g} asks for the impossible", remedy="give a number between 0 and 1, like 0.05")
    wiring = _Wiring(topology, direction)
    ends = [(branch.source, branch.target) for branch in wiring.branches]
    step = gap / 2
    prices = [1 / capacity for capacity in wiring.capacities]
    loads = [0.0] * len(prices)
    amounts: dict[tuple[int, ...], float] = {}
    total, bound, rounds = 0.0, math.inf, 0
    while topology.ranks > 1:
        rounds += 1
        costs = [sum([prices[link] for link in passes]) for passes in wiring.passes]
        tree = minimum_arborescence(topology.ranks, root, ends, costs)
        price = sum([costs[edge] for edge in tree])
        bound = min(bound, sum(map(float.__mul__, wiring.capacities, prices)) / price)
        load: dict[int, int] = {}
        for edge in tree:
            for link in wiring.passes[edge]:
                load[link] = load.get(link, 0) + 1
        amount = min(wiring.capacities[link] / times for link, times in load.items())
        amounts[tree] = amounts.get(tree, 0.0) + amount
        total += amount
        for link, times in load.items():
            loads[link] += amount * times
            prices[link] *= 1 + step * amount * times / wiring.capacities[link]
        crowding = max(map(float.__truediv__, loads, wiring.capacities))
        if total / crowding >= (1 - gap) * bound:
            break
        if max(prices) > 1e100:  # only their ratios matter
            prices = [max(price / 1e100, 1e-200) for price in prices]
    else:
        crowding, bound = 1.0, 0.0
    trees: list[FractionalTree] = []
    for tree, amount in amounts.items():
        leaving: dict[int, list[Branch]] = {}
        for edge in tree:
            leaving.setdefault(wiring.branches[edge].source, []).append(wiring.branches[edge])
        rate = wiring.unit * amount / crowding
        trees.append(FractionalTree(root=root, branches=_nearest_first(root, leaving), rate=rate))
    return FractionalPacking(direction=direction, trees=tuple(trees), bound=wiring.unit * bound, rounds=rounds)


# --- The integer program that keeps few trees ---


def few_trees(topology: Topology, packing: FractionalPacking, *, share: float = 0.05) -> FractionalPacking:
    """A packing of few of the given trees, with a rate of at least (1 - `share`) of the given one.

    Among rates that are whole numbers of links, halves, thirds and so on, the first whose integer program comes that
    close is taken, and of its solutions one with few trees (Blink, section 3.2, relaxes its program likewise).
    Where none does, a vertex of the linear program has at most as many trees as there are links.
    Raises MissingExtraError without HiGHS, and InputError for a share outside 0 … 1.
    """
    if not 0 <= share < 1:
        raise InputError(f"a share of {share:g} leaves no rate", remedy="give a number from 0 to below 1, like 0.05")
    if len(packing.trees) < 2:
        return packing
    wiring = _Wiring(topology, packing.direction)
    loads = [wiring.load(tree.branches) for tree in packing.trees]
    needed = (1 - share) * packing.rate / wiring.unit
    # What capacities are multiples of: of 25 and 50 GB/s, 25; of 20 and 50, 10. Others, as probed, are rounded down.
    denominators = {Fraction(capacity).limit_denominator(12).denominator for capacity in wiring.capacities}
    grid = 1 / min(12, math.lcm(*denominators))
    for parts in _PARTS:
        quantum = grid / parts
        limits = [math.floor(capacity / quantum + 1e-6) for capacity in wiring.capacities]
        least = math.ceil(needed / quantum - 1e-6)
        most = [min(limits[link] // times for link, times in load.items()) for load in loads]
        if sum(most) < least:
            continue
        counts = _fewest(loads, limits, most, least)
        if counts is not None:
            return _keep(packing, [count * quantum * wiring.unit for count in counts])
    amounts = _solve(
        [(-1.0, math.inf, dict(load)) for load in loads],
        [(-math.inf, capacity) for capacity in wiring.capacities],
        integer=False,
    )
    return _keep(packing, [amount * wiring.unit for amount in amounts or ()])


def _fewest(
    loads: Sequence[dict[int, int]], limits: Sequence[int], most: Sequence[int], least: int
) -> list[int] | None:
    """How often each tree is taken, so that there are `least` in all, within `limits`, and few different ones."""
    links, trees = len(limits), len(loads)
    columns: list[_Column] = []
    for tree, load in enumerate(loads):
        columns.append((0.0, most[tree], {**load, links: 1, links + 1 + tree: 1}))
    for tree in range(trees):  # one for each: whether the tree is taken at all
        columns.append((1.0, 1, {links + 1 + tree: -most[tree]}))
    rows = [(-math.inf, limit) for limit in limits] + [(least, math.inf)] + [(-math.inf, 0)] * trees
    values = _solve(columns, rows, integer=True)
    return None if values is None else [round(value) for value in values[:trees]]


_Column = tuple[float, float, dict[int, Any]]  # cost, upper limit (the lower one is 0), row → coefficient


def _solve(columns: Sequence[_Column], rows: Sequence[tuple[float, float]], *, integer: bool) -> list[float] | None:
    """The columns' values of least cost with every row between its two limits, or None where HiGHS finds none."""
    try:
        import highspy
    except ImportError:
        raise MissingExtraError(library="highspy", extra="solve") from None
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(columns), len(rows)
    program.col_cost_ = [cost for cost, _, _ in columns]
    program.col_lower_ = [0.0] * len(columns)
    program.col_upper_ = [upper for _, upper, _ in columns]
    program.row_lower_ = [lower for lower, _ in rows]
    program.row_upper_ = [upper for _, upper in rows]
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = list(itertools.accumulate((len(entries) for _, _, entries in columns), initial=0))
    matrix.index_ = [row for _, _, entries in columns for row in entries]
    matrix.value_ = [float(value) for _, _, entries in columns for value in entries.values()]
    if integer:
        program.integrality_ = [highspy.HighsVarType.kInteger] * len(columns)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)  # and so no worker threads are left behind
    solver.setOptionValue("mip_max_nodes", _NODES)
    solver.passModel(program)
    solver.run()
    # What was found before the limit of nodes serves too: fewer trees might do, but these do.
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    return list(solver.getSolution().col_value)


def _keep(packing: FractionalPacking, rates: Sequence[float]) -> FractionalPacking:
    kept = (
        msgspec.structs.replace(tree, rate=rate)
        for tree, rate in zip(packing.trees, rates)
        if rate > 1e-9 * packing.bound
    )
    return msgspec.structs.replace(packing, trees=tuple(kept))


# --- Programs ---


def blink_packing(
    topology: Topology, collective: Collective, root: int = 0, *, gap: float = 0.05, share: float = 0.05
) -> Packing:
    """Blink's trees for a collective: `approximate_packing`, then `few_trees`, in the type of `collective.packing`.

    All-gather and reduce-scatter send each rank's block over every tree, from or to this rank.
    Raises ProgramError for what spanning trees do not carry and for a root that is not there, DisconnectedError,
    MissingExtraError, and InputError for a gap or share outside 0 … 1.
    """
    bound = optimal_rate(topology, collective, root)  # refuses what cannot be
    if topology.ranks == 1:
        return pack(topology, collective, root)
    wiring, found = _found(topology, collective, root, gap, share)
    trees = _oriented(collective, root, topology.ranks, found.trees)
    loads = [0] * len(wiring.capacities)
    for tree in trees:
        for branch in (*tree.inward, *tree.outward):
            for pair in itertools.pairwise(branch.path):
                loads[wiring.number[pair]] += tree.weight
    # As fast as the busiest link allows, which is more than `found` where blocks do not pass each branch both ways.
    unit = wiring.unit * min(capacity / load for load, capacity in zip(loads, wiring.capacities) if load)
    return Packing(
        collective=collective,
        root=root,
        trees=tuple(trees),
        unit_bytes_per_second=unit,
        rate_bytes_per_second=unit * sum(tree.weight for tree in trees),
        bound_bytes_per_second=bound,
    )


def _found(
    topology: Topology, collective: Collective, root: int, gap: float, share: float
) -> tuple[_Wiring, FractionalPacking]:
    direction = _DIRECTIONS.get(collective, "both")
    found = few_trees(topology, approximate_packing(topology, root, direction=direction, gap=gap), share=share)
    return _Wiring(topology, direction), found


def _oriented(collective: Collective, root: int, ranks: int, trees: Sequence[FractionalTree]) -> list[Tree]:
    """The trees with whole weights, from and to the root, or once for the block of each rank."""
    oriented: list[Tree] = []
    weights = _weights(trees)
    for centre in range(ranks) if collective in _BLOCKED else (root,):
        for tree, weight in zip(trees, weights):
            branches = tree.rooted_at(centre).branches if centre != tree.root else tree.branches
            oriented.append(
                Tree(
                    root=centre,
                    weight=weight,
                    inward=tuple(map(_turned, reversed(branches))) if collective in _INWARD else (),
                    outward=branches if collective in _OUTWARD else (),
                )
            )
    return oriented


def _weights(trees: Sequence[FractionalTree]) -> list[int]:
    """Whole numbers in the ratio of the trees' rates."""
    fastest = max(tree.rate for tree in trees)
    ratios = [Fraction(tree.rate / fastest).limit_denominator(48) for tree in trees]
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    if min(ratios) > 0 and sum(ratios) * common <= _RESOLUTION:
        weights = [int(ratio * common) for ratio in ratios]
    else:
        total = sum(tree.rate for tree in trees)
        weights = [max(1, math.floor(_RESOLUTION * tree.rate / total)) for tree in trees]
        weights[weights.index(max(weights))] += _RESOLUTION - sum(weights)
    divisor = math.gcd(*weights)
    return [weight // divisor for weight in weights]


def blink_program(
    cluster: Cluster,
    collective: Collective,
    devices: Sequence[str] | None = None,
    *,
    root: int = 0,
    kinds: Collection[str] | None = None,
    gap: float = 0.05,
    share: float = 0.05,
) -> Program:
    """The program of `blink_packing` on `topology_of(cluster, devices, kinds=kinds)`: a chunk for each tree.

    `gap` and `share` are what the two steps may lose of the rate. Where there are switches, each two ranks use one
    fixed path; across servers `three_phase_program` is what Blink does. Raises what those two raise.
    """
    topology = topology_of(cluster, devices, kinds=kinds)
    trees = blink_packing(topology, collective, root, gap=gap, share=share).trees
    return _over_trees("blink", cluster, collective, topology.devices, root, trees)


def _over_trees(
    name: str, cluster: Cluster, collective: Collective, devices: Sequence[str], root: int, trees: Sequence[Tree]
) -> Program:
    """The program that sends a chunk, or a chunk of its root's block, over each tree."""
    chunks = [Chunk(owner=tree.root if collective in _BLOCKED else 0, weight=tree.weight) for tree in trees]
    builder = Builder(name, collective, devices, chunks, cluster=cluster, root=root)
    for chunk, tree in enumerate(trees):
        for branch in tree.inward:
            builder.transfer(chunk, branch.source, branch.target, reduce=True, path=branch.path)
        for branch in tree.outward:
            builder.transfer(chunk, branch.source, branch.target, path=branch.path)
    return builder.build()


def three_phase_program(
    cluster: Cluster, devices: Sequence[str] | None = None, *, gap: float = 0.05, share: float = 0.05
) -> Program:
    """Blink's all-reduce across servers (section 3.5): within each, across, and within again.

    The vector is divided into as many partitions as the largest server has ranks. In every server each partition has a
    root of its own, in turn. First each server reduces each partition to its root, over trees packed in this server;
    then the roots of one partition all-reduce it among themselves, in one hop: each adds up its own part of what all
    the others send it, and sends the sum to all; last each server broadcasts from its roots.

    Raises DisconnectedError where the ranks of one server are not joined without another's help, and what
    `blink_program` raises. With one server it is `blink_program` with roots that take turns.
    """
    chosen = [device.name for device in cluster.devices] if devices is None else list(devices)
    topology_of(cluster, chosen, kinds={link.kind for link in cluster.links})  # refuses what cannot be
    node_of = {device.name: device.node for device in cluster.devices}
    servers: dict[str, list[int]] = {}
    for rank, device in enumerate(chosen):
        servers.setdefault(node_of[device], []).append(rank)
    sides: list[tuple[list[int], tuple[FractionalTree, ...]]] = []
    for ranks in servers.values():
        topology = topology_of(cluster, [chosen[rank] for rank in ranks])
        found = approximate_packing(topology, direction="both", gap=gap)
        sides.append((ranks, few_trees(topology, found, share=share).trees))
    # Servers cut a partition differently, by their trees' rates, and the roots cut it in equal parts: a piece is what
    # no cut divides.
    cuts = [_cuts(_weights(trees)) if trees else _cuts([1]) for _, trees in sides]
    shared = _cuts([1] * len(sides))
    marks = sorted({mark for some in (*cuts, shared) for mark in some})
    common = math.lcm(*(mark.denominator for mark in marks))
    weights = [int((stop - start) * common) for start, stop in itertools.pairwise(marks)]
    partitions = max(len(ranks) for ranks, _ in sides)
    chunks = [Chunk(weight=weight) for _ in range(partitions) for weight in weights]
    builder = Builder("blink three-phase", "all_reduce", chosen, chunks, cluster=cluster)
    pieces = [
        (partition, partition * len(weights) + number, mark)
        for partition in range(partitions)
        for number, mark in enumerate(marks[:-1])
    ]

    def within(*, reduce: bool) -> None:
        for (ranks, trees), own in zip(sides, cuts):
            if not trees:  # a server with one rank
                continue
            rooted = [[tree.rooted_at(root).branches for tree in trees] for root in range(len(ranks))]
            for partition, chunk, mark in pieces:
                branches = rooted[partition % len(ranks)][bisect_right(own, mark) - 1]
                for branch in map(_turned, reversed(branches)) if reduce else branches:
                    ends = ranks[branch.source], ranks[branch.target]
                    builder.transfer(chunk, *ends, reduce=reduce, path=branch.path)

    within(reduce=True)
    for partition, chunk, mark in pieces:
        roots = [ranks[partition % len(ranks)] for ranks, _ in sides]
        adder = roots[bisect_right(shared, mark) - 1]
        others = [root for root in roots if root != adder]
        for other in others:
            builder.transfer(chunk, other, adder, reduce=True)
        for other in others:
            builder.transfer(chunk, adder, other)
    within(reduce=False)
    return builder.build()


def _cuts(weights: Sequence[int]) -> list[Fraction]:
    """Where parts of these weights begin in 0 … 1, and 1."""
    return [Fraction(before, sum(weights)) for before in itertools.accumulate(weights, initial=0)]


# --- PCIe beside NVLink ---


def hybrid_split(
    size_bytes: float, nvlink_rate: float, pcie_rate: float, switch_seconds: float = 0.0
) -> tuple[float, float]:
    """(bytes over NVLink, bytes over PCIe) with which both finish at once (Blink, section 4.2).

    D_PCIe = D·B_P/(B_P+B_N) - T·B_P·B_N/(B_P+B_N), and not below zero: rates B in bytes per second, T the seconds that
    it takes to switch access between peers over to PCIe. Raises InputError for a negative size or time, or no rate.
    """
    if size_bytes < 0 or switch_seconds < 0 or not (nvlink_rate > 0 and pcie_rate >= 0):
        raise InputError(
            f"nothing to split: {size_bytes:g} bytes at {nvlink_rate:g} and {pcie_rate:g} bytes per second "
            f"after {switch_seconds:g} seconds",
            place="hybrid_split",
            remedy="give a size and a time that are not negative, and rates above zero",
        )
    both = nvlink_rate + pcie_rate
    pcie_bytes = max(0.0, size_bytes * pcie_rate / both - switch_seconds * pcie_rate * nvlink_rate / both)
    return size_bytes - pcie_bytes, pcie_bytes


def hybrid_program(
    cluster: Cluster,
    collective: Collective,
    devices: Sequence[str] | None = None,
    *,
    size_bytes: float,
    root: int = 0,
    switch_seconds: float = 0.0,
    gap: float = 0.05,
    share: float = 0.05,
) -> Program:
    """The collective over NVLink trees and PCIe trees at once, each with its share by `hybrid_split` (section 4.2).

    The time that switching takes is in the split alone: a program does not say when a transfer may start. Where PCIe
    gets nothing, this is `blink_program`. Raises what that raises; DisconnectedError too where either kind of link
    alone does not join the devices.
    """
    fast = {link.kind for link in cluster.links} - _PCIE_KINDS - {"network"}
    topologies = [topology_of(cluster, devices, kinds=kinds) for kinds in (fast, _PCIE_KINDS)]
    names = topologies[0].devices
    optimal_rate(topologies[0], collective, root)  # refuses what cannot be
    if len(names) < 2:
        return blink_program(cluster, collective, names, root=root)
    nvlink, pcie = [_found(topology, collective, root, gap, share)[1] for topology in topologies]
    parts = hybrid_split(size_bytes, nvlink.rate, pcie.rate, switch_seconds)
    trees = [
        msgspec.structs.replace(tree, rate=tree.rate * part / packing.rate)
        for packing, part in zip((nvlink, pcie), parts)
        for tree in packing.trees
        if part > 0
    ]
    oriented = _oriented(collective, root, len(names), trees)
    return _over_trees("blink hybrid", cluster, collective, names, root, oriented)
