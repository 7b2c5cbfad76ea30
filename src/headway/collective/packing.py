"""Collectives at the best rate that a topology permits, by packing spanning trees exactly.

Blink (Wang et al., MLSys 2020) sends a vector in pieces over many spanning trees at once, one for each piece, so that
all links are busy. Its trees are packed approximately, out of one root. Here the packing is exact:

==============================  =================================================================================
broadcast, reduce               Edmonds (1973): the smallest max-flow from the root to a rank
all-gather, reduce-scatter      ForestColl (Zhao et al. 2024): blocks at a time: min over S of B⁺(S) / |S ∩ ranks|
all-reduce                      min over partitions of the ranks into k parts of (what can leave the parts, added up)
                                / (2 (k - 1)); without switches, and with edges as wide both ways, this is the
                                strength of the graph (Tutte 1961; Nash-Williams 1961)
==============================  =================================================================================

The first two lines are optimal, and reached, wherever each switch can receive as much as it sends (for reduce and
reduce-scatter: send as much as it receives), as do all that are cabled alike both ways. Switches do not copy, so
elsewhere the excess of a switch is left unused, and the rate may lie below the bound, and below what is possible.

The third line is optimal among all programs that store, add up and forward (see `flow.partition_bound`). It is reached
wherever edges are as wide both ways, through switches or not: each tree reduces towards its middle and broadcasts back
over the same edges, which are directed, and roots chosen, so that as many trees as possible can be packed
(`flow.aimed`, after Frank 1978). All-gather after reduce-scatter is the special case of edges that are halved and of
roots that are all ranks alike; on some allocations of a DGX-1V it takes 1.67 times as long. Where edges are not as
wide both ways, trees on what is wide both ways compete with reduce-scatter and all-gather, each packed for
itself; nothing is proven of the better of the two, unless it reaches `Packing.bound_bytes_per_second`.

Rates are bytes of the vector (see `Program`) per second, for vectors so large that latency does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, get_args

from headway.collective import flow
from headway.collective.program import Builder, Chunk, Collective, Program
from headway.collective.topology import Topology, topology_of
from headway.errors import DisconnectedError, ProgramError
from headway.hardware.cluster import Cluster
from headway.value import Value

__all__ = ["Branch", "Packing", "Tree", "optimal_rate", "pack", "packed_program"]

_PACKED = ("broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather")
_ROOTED = ("broadcast", "reduce")

_FINEST = 10_000  # units of an edge beyond which the unit is made coarser: the finer, the more trees
_COARSE_UNITS = 256  # of the narrowest edge then
# Of a root's supply, what is split off a switch at a time: finer makes more trees, coarser deeper ones. Seen on two to
# four DGX A100, DGX H100, DGX-1V and GB200 trays: a quarter halves the depth, at about as many trees.
_ROOTED_PORTION = Fraction(1, 4)
_TRIM_UNITS = 1024  # parts of a unit to which the excess of switches is taken away
_WIDEST = 1 << 45  # units that an edge is counted as at most: sums of them, times the ranks, still fit into 64 bits


class Branch(Value):
    """One edge of a tree: data goes from rank `source` to rank `target`, past all that `path` names, ends included."""

    source: int
    target: int
    path: tuple[str, ...]


class Tree(Value):
    """A spanning tree for one piece of the vector, `weight` parts of it.

    `inward` gathers contributions at `root`, leaves first; `outward` spreads from `root`, nearest first. Broadcast
    and all-gather have outward branches only, reduce and reduce-scatter inward ones only, all-reduce both.
    """

    root: int
    weight: int
    inward: tuple[Branch, ...] = ()
    outward: tuple[Branch, ...] = ()


class Packing(Value):
    """Trees that fill a topology: together they never use a link beyond its capacity.

    A tree of weight w takes w times `unit_bytes_per_second` of each edge on its branches. `rate_bytes_per_second` is
    what the trees reach, `bound_bytes_per_second` what nothing exceeds; infinite for one rank, which moves nothing.
    """

    collective: Collective
    root: int
    trees: tuple[Tree, ...]
    unit_bytes_per_second: float
    rate_bytes_per_second: float
    bound_bytes_per_second: float


def optimal_rate(topology: Topology, collective: Collective, root: int = 0) -> float:
    """The rate, in bytes of the vector per second, that no program for `collective` exceeds; infinite for one rank.

    See the module for where it is reached. For all-reduce it is the least over partitions, and over cuts where edges
    are not as wide both ways. Raises ProgramError for another collective or a root that is not there, and
    DisconnectedError.
    """
    _check(topology, collective, root)
    if topology.ranks == 1:
        return math.inf
    units, unit = _exact_units(topology)
    return float(_bound(_Network.of(topology, units), collective, root) * unit)


def pack(topology: Topology, collective: Collective, root: int = 0) -> Packing:
    """Trees for broadcast or reduce (from or to rank `root`), all-reduce, all-gather or reduce-scatter; see the module.

    Capacities are counted in the largest unit that divides them all. Where that leaves one with more than 10,000 units
    (probed bandwidths do, 31 beside 300 GB/s does not), the unit is 1/256 of the narrowest edge and the
    others are rounded down; `rate_bytes_per_second` is then that much smaller.

    Raises ProgramError for another collective or a root that is not there, DisconnectedError.
    """
    _check(topology, collective, root)
    if topology.ranks == 1:
        return Packing(
            collective=collective,
            root=root,
            trees=(Tree(root=0, weight=1),),
            unit_bytes_per_second=math.inf,
            rate_bytes_per_second=math.inf,
            bound_bytes_per_second=math.inf,
        )
    bound = optimal_rate(topology, collective, root)
    units, unit = _few_units(topology)
    network = _Network.of(topology, units)
    if collective == "all_reduce":
        trees, scale = _all_reduce(network)
    else:
        inward = collective in ("reduce", "reduce_scatter")
        trees, scale = _one_way(network.turned() if inward else network, root if collective in _ROOTED else None)
        if inward:
            trees = [tree.turned() for tree in trees]
    unit = unit / scale
    return Packing(
        collective=collective,
        root=root,
        trees=tuple(_value(topology, tree) for tree in trees),
        unit_bytes_per_second=float(unit),
        rate_bytes_per_second=float(unit * sum(tree.weight for tree in trees)),
        bound_bytes_per_second=bound,
    )


def packed_program(
    cluster: Cluster,
    collective: Collective,
    devices: Sequence[str] | None = None,
    *,
    root: int = 0,
    kinds: Collection[str] | None = None,
) -> Program:
    """The program of `pack` on `topology_of(cluster, devices, kinds=kinds)`: a chunk for each tree, weighted like it.

    Raises what these two raise.
    """
    topology = topology_of(cluster, devices, kinds=kinds)
    packing = pack(topology, collective, root)
    blocked = collective in ("all_gather", "reduce_scatter")
    chunks = [Chunk(owner=tree.root if blocked else 0, weight=tree.weight) for tree in packing.trees]
    builder = Builder("packed", collective, topology.devices, chunks, cluster=cluster, root=root)
    # All trees advance side by side: who carries out transfers in their order keeps all links busy.
    for branches, reduce in (
        ([tree.inward for tree in packing.trees], True),
        (
            [tree.outward for tree in packing.trees],
            False,
        ),
    ):
        for step in range(max(map(len, branches))):
            for chunk, tree in enumerate(branches):
                if step < len(tree):
                    branch = tree[step]
                    builder.transfer(chunk, branch.source, branch.target, reduce=reduce, path=branch.path)
    return builder.build()


def _check(topology: Topology, collective: Collective, root: int) -> None:
    if collective not in _PACKED:
        known = collective in get_args(Collective)
        raise ProgramError(
            f"{collective} is not made of spanning trees" if known else f"no collective is called {collective!r}",
            place="packing",
            remedy=f"one of: {', '.join(_PACKED)}",
        )
    if not 0 <= root < topology.ranks:
        raise ProgramError(f"no rank {root}", place="packing: root", remedy=f"0 to {topology.ranks - 1}")


# ------------------------------------------------------------------------------------------------------------- units


def _exact_units(topology: Topology) -> tuple[list[int], Fraction]:
    """Each edge's capacity in the largest unit that divides them all, and the bytes per second of that unit."""
    rates = [Fraction(edge.bytes_per_second) for edge in topology.edges]
    scale = math.lcm(*(rate.denominator for rate in rates))
    units = [int(rate * scale) for rate in rates]
    common = math.gcd(*units) or 1
    return [count // common for count in units], Fraction(common, scale)


def _few_units(topology: Topology) -> tuple[list[int], Fraction]:
    """The same, in a coarser unit where the exact one would make too many trees."""
    units, unit = _exact_units(topology)
    if not units or max(units) <= _FINEST:
        return units, unit
    coarse = max(1, min(units) // _COARSE_UNITS)
    return [min(count // coarse, _WIDEST) for count in units], unit * coarse


# ----------------------------------------------------------------------------------------------------------- networks


class _Network(NamedTuple):
    """A topology in whole units; routes consist of positions in `Topology.edges`."""

    capacity: flow.Matrix
    ranks: int
    routes: flow.Routes

    @classmethod
    def of(cls, topology: Topology, units: Sequence[int]) -> _Network:
        count = len(topology.names)
        capacity = [[0] * count for _ in range(count)]
        routes: flow.Routes = {}
        for position, (edge, width) in enumerate(zip(topology.edges, units, strict=True)):
            if width:
                capacity[edge.source][edge.target] += width
                routes.setdefault((edge.source, edge.target), {})[position,] = width
        return cls(capacity, topology.ranks, routes)

    @property
    def is_switched(self) -> bool:
        return len(self.capacity) > self.ranks

    @property
    def is_symmetric(self) -> bool:
        """Whether every edge is as wide both ways."""
        return self.capacity == flow.transposed(self.capacity)

    def turned(self) -> _Network:
        """Every edge the other way round."""
        routes = {
            (target, source): {part[::-1]: width for part, width in parts.items()}
            for (source, target), parts in self.routes.items()
        }
        return _Network(flow.transposed(self.capacity), self.ranks, routes)

    def scaled(self, factor: int) -> _Network:
        """Every edge `factor` times as wide."""
        routes = {arc: {part: width * factor for part, width in parts.items()} for arc, parts in self.routes.items()}
        return _Network([[width * factor for width in row] for row in self.capacity], self.ranks, routes)

    def without_switches(self, supply: Sequence[int], quantum: int) -> _Network:
        """Edges between ranks alone that serve the same supply, split off switches in portions of `quantum`."""
        if not self.is_switched:
            return self
        capacity, routes = flow.split_switches(self.capacity, supply, self.routes, quantum=quantum)
        return _Network(capacity, self.ranks, routes)

    def narrow(self, source: int, target: int, amount: int) -> None:
        """Take `amount` from an edge, in place."""
        self.capacity[source][target] -= amount
        parts = self.routes.get((source, target), {})
        while amount:
            part, width = next(iter(parts.items()))
            step = min(amount, width)
            amount -= step
            parts[part] -= step
            if not parts[part]:
                del parts[part]


def _bound(network: _Network, collective: Collective, root: int) -> Fraction:
    """The best rate in units; raises DisconnectedError where it is zero."""
    capacity, ranks = network.capacity, network.ranks
    back = flow.transposed(capacity)
    match collective:
        case "broadcast":
            best = Fraction(flow.broadcast_bound(capacity, ranks, root))
        case "reduce":
            best = Fraction(flow.broadcast_bound(back, ranks, root))
        case "all_gather":
            best = flow.gather_bound(capacity, ranks) * ranks
        case "reduce_scatter":
            best = flow.gather_bound(back, ranks) * ranks
        case _:
            best = flow.partition_bound(capacity, ranks)
            if capacity != back:
                # A partition in two already says this where edges are as wide both ways.
                cut = min(flow.broadcast_bound(way, ranks, 0) for way in (capacity, back))
                best = min(best, flow.partition_bound(back, ranks), Fraction(cut))
    if not best:
        raise DisconnectedError(
            "some rank cannot be reached",
            place="packing",
            remedy="add the missing links, or choose ranks that are joined",
        )
    return best


# -------------------------------------------------------------------------------------------------------------- trees


class _Tree(NamedTuple):
    """A tree whose branches are (source, target, positions of the topology's edges)."""

    root: int
    weight: int
    inward: tuple[tuple[int, int, tuple[int, ...]], ...]
    outward: tuple[tuple[int, int, tuple[int, ...]], ...]

    def turned(self) -> _Tree:
        """The tree the other way round: what went from the root comes to it."""
        inward, outward = (
            tuple((target, source, part[::-1]) for source, target, part in reversed(branches))
            for branches in (self.outward, self.inward)
        )
        return _Tree(self.root, self.weight, inward, outward)


def _one_way(network: _Network, root: int | None) -> tuple[list[_Tree], int]:
    """Trees out of `root`, or out of every rank alike, and by what factor edges were widened to make weights whole."""
    ranks_network, supply, scale = _best_supplied(network, root)
    packed = flow.pack_arborescences(ranks_network.capacity, supply)
    trees: list[_Tree] = []
    for tree in packed:
        for weight, branches in _routed(tree.arcs, tree.weight, ranks_network.routes):
            trees.append(_Tree(tree.root, weight, (), branches))
    return trees, scale


def _best_supplied(network: _Network, root: int | None) -> tuple[_Network, list[int], int]:
    """Edges between ranks alone that serve the best supply: from `root`, or from every rank alike.

    Returns them, the supply of each rank, and the factor by which the edges are wider than in `network`.
    """
    ranks = network.ranks
    supply, scale = _best_supply(network, root)
    portion = Fraction(1) if root is None else _ROOTED_PORTION
    if root is not None and network.is_switched and sum(network.capacity[root]) == supply[root]:
        # The root itself is the narrowest place: if it sends each rank a share of its own, trees need not be chains.
        supply, scale, portion = [units * (ranks - 1) for units in supply], ranks - 1, Fraction(1, ranks - 1)
    network = network.scaled(scale)
    if _has_excess(network):
        network, scale = network.scaled(_TRIM_UNITS), scale * _TRIM_UNITS
        _trim(network, [units * _TRIM_UNITS for units in supply])
        supply, more = _best_supply(network, root)
        network, scale = network.scaled(more), scale * more
        if not any(supply):
            raise DisconnectedError(
                "some rank is reached only by what switches send beyond what they receive",
                place="packing",
                remedy="make the links into a switch as wide as those out of it",
            )
    return network.without_switches(supply, max(1, int(max(supply) * portion))), supply, scale


def _best_supply(network: _Network, root: int | None) -> tuple[list[int], int]:
    """The largest supply, from `root` or from all alike, and what to multiply the capacities by to make it whole."""
    if root is None:
        best = flow.gather_bound(network.capacity, network.ranks)
        return [best.numerator] * network.ranks, best.denominator
    supply = [0] * network.ranks
    supply[root] = flow.broadcast_bound(network.capacity, network.ranks, root)
    return supply, 1


def _excess(network: _Network, switch: int) -> int:
    """What a switch can send beyond what it can receive."""
    return sum(network.capacity[switch]) - sum(row[switch] for row in network.capacity)


def _has_excess(network: _Network) -> bool:
    return any(_excess(network, switch) > 0 for switch in range(network.ranks, len(network.capacity)))


def _trim(network: _Network, supply: Sequence[int]) -> None:
    """Narrow, in place, what leaves switches until none can send more than it receives.

    First as far as the supply can still be served, then all that leaves a switch alike, which costs rate.
    """
    capacity = network.capacity
    while _has_excess(network):
        for switch in range(network.ranks, len(capacity)):
            leaving = capacity[switch]
            for target in sorted(range(len(leaving)), key=leaving.__getitem__, reverse=True):
                amount = min(_excess(network, switch), leaving[target])
                if amount > 0:
                    leaving[target] -= amount
                    lacking = flow.shortfall(capacity, supply)
                    leaving[target] += amount
                    network.narrow(switch, target, max(0, amount - lacking))
            excess, sent = _excess(network, switch), sum(leaving)
            if excess > 0:
                for target, units in enumerate(list(leaving)):
                    network.narrow(switch, target, -(-units * excess // sent))


def _all_reduce(network: _Network) -> tuple[list[_Tree], Fraction]:
    packed = _both_ways(network)
    if not network.is_symmetric:
        packed = max(packed, _gathered_and_spread(network), key=_rate)
    return packed


def _rate(packed: tuple[list[_Tree], Fraction]) -> Fraction:
    trees, scale = packed
    return sum(tree.weight for tree in trees) / scale


def _both_ways(network: _Network) -> tuple[list[_Tree], Fraction]:
    """Trees that reduce and broadcast over the same edges, on what is as wide both ways; none if that joins not all.

    Their rate is the `partition_bound`.
    """
    edges, strands = _coupled(network)
    ranks = network.ranks
    rate = flow.partition_bound(edges.capacity, ranks)
    if not rate:
        return [], Fraction(1)
    # Where ranks are joined directly, trees from one rank are fewest. Behind a switch they would be chains.
    root = None if network.is_switched else max(range(ranks), key=lambda rank: sum(map(bool, network.capacity[rank])))
    half = edges.scaled(rate.denominator)
    capacity, supply = flow.aimed(half.capacity, ranks, 2 * rate.numerator, root)
    network = _Network(capacity, ranks, _divided(half.scaled(2).routes, capacity))
    network = network.without_switches(supply, max(supply))
    trees: list[_Tree] = []
    for tree in flow.pack_arborescences(network.capacity, supply):
        centre, arcs = _centred(tree.root, tree.arcs, ranks)
        for weight, branches in _routed(tree.arcs, tree.weight, network.routes):
            parts = {(source, target): part for source, target, part in branches}
            # A strand's neighbour leads back.
            parts |= {arc[::-1]: tuple(strand ^ 1 for strand in reversed(part)) for arc, part in parts.items()}
            route = {arc: tuple(strands[strand] for strand in part) for arc, part in parts.items()}
            inward = tuple((target, source, route[target, source]) for source, target in reversed(arcs))
            trees.append(_Tree(centre, weight, inward, tuple((*arc, route[arc]) for arc in arcs)))
    return trees, Fraction(2 * rate.denominator)


def _coupled(network: _Network) -> tuple[_Network, list[int]]:
    """What of a network is as wide both ways, divided into strands, and the edge of the topology that each is part of.

    Strands come in couples, 2 i and 2 i + 1, of one width: one leads there and the other back. Routes consist of them.
    """
    strands: list[int] = []
    capacity = [[0] * len(network.capacity) for _ in network.capacity]
    routes: flow.Routes = {}
    for (source, target), parts in network.routes.items():
        there, back = list(parts.items()), list(network.routes.get((target, source), {}).items())
        while source < target and there and back:
            width = min(there[-1][1], back[-1][1])
            for arc, side in (((source, target), there), ((target, source), back)):
                (edge,), units = side.pop()
                if units > width:
                    side.append(((edge,), units - width))
                routes.setdefault(arc, {})[len(strands),] = width
                capacity[arc[0]][arc[1]] += width
                strands.append(edge)
    return _Network(capacity, network.ranks, routes), strands


def _divided(routes: flow.Routes, capacity: flow.Matrix) -> flow.Routes:
    """Each couple of strands divided between its two directions, as much of it each way as `capacity` says."""
    divided: flow.Routes = {}
    for (source, target), parts in routes.items():
        if source < target:
            left = dict(parts)
            for arc, back in (((source, target), 0), ((target, source), 1)):
                wanted = capacity[arc[0]][arc[1]]
                for (strand,) in parts:
                    used = min(wanted, left[strand,])
                    if used:
                        divided.setdefault(arc, {})[strand ^ back,] = used
                        left[strand,] -= used
                        wanted -= used
    return divided


def _gathered_and_spread(network: _Network) -> tuple[list[_Tree], Fraction]:
    """Reduce-scatter and all-gather, a tree of one with a tree of the other for each piece of a rank's block."""
    outward, scale = _one_way(network, None)
    total = sum(tree.weight for tree in outward)
    inward, inward_scale = _one_way(network.turned(), None)
    inward_total = sum(tree.weight for tree in inward)
    seconds = Fraction(scale, total) + Fraction(inward_scale, inward_total)
    trees: list[_Tree] = []
    for root in range(network.ranks):
        # Both lists in the same units, cut wherever one of them is: a rank's share is `total` times `inward_total`.
        spread = [(tree.outward, tree.weight * inward_total) for tree in outward if tree.root == root]
        gathered = [(tree.turned().inward, tree.weight * total) for tree in inward if tree.root == root]
        while spread and gathered:
            weight = min(spread[-1][1], gathered[-1][1])
            trees.append(_Tree(root, weight, gathered[-1][0], spread[-1][0]))
            for side in (spread, gathered):
                branches, left = side.pop()
                if left > weight:
                    side.append((branches, left - weight))
    common = math.gcd(*(tree.weight for tree in trees))
    trees = [tree._replace(weight=tree.weight // common) for tree in trees]
    return trees, Fraction(sum(tree.weight for tree in trees)) * seconds


def _centred(root: int, arcs: Sequence[tuple[int, int]], ranks: int) -> tuple[int, list[tuple[int, int]]]:
    """The middle of a tree, nearest to its farthest rank, and the arcs from there on; `root` if that is as near."""
    joined: list[list[int]] = [[] for _ in range(ranks)]
    for source, target in arcs:
        joined[source].append(target)
        joined[target].append(source)
    best: list[tuple[int, int]] = []
    least, centre = ranks, root
    for start in (root, *range(ranks)):
        depth = {start: 0}
        spread: list[tuple[int, int]] = []
        for node in (queue := [start]):
            for other in joined[node]:
                if other not in depth:
                    depth[other] = depth[node] + 1
                    spread.append((node, other))
                    queue.append(other)
        if depth[queue[-1]] < least:
            least, centre, best = depth[queue[-1]], start, spread
    return centre, best


def _routed(
    arcs: Sequence[tuple[int, int]], weight: int, routes: flow.Routes
) -> Iterator[tuple[int, tuple[tuple[int, int, tuple[int, ...]], ...]]]:
    """Choose what each arc of a tree goes over, and take it from `routes`; trees too heavy for one are divided."""
    while weight:
        step = min(weight, *(max(routes[arc].values()) for arc in arcs))
        branches = []
        for arc in arcs:
            parts = routes[arc]
            # The narrowest that will do, so that wide ones are left for heavy trees.
            part = min((part for part, width in parts.items() if width >= step), key=parts.__getitem__)
            parts[part] -= step
            if not parts[part]:
                del parts[part]
            branches.append((*arc, part))
        yield step, tuple(branches)
        weight -= step


def _value(topology: Topology, tree: _Tree) -> Tree:
    def branches(found: Sequence[tuple[int, int, tuple[int, ...]]]) -> tuple[Branch, ...]:
        return tuple(Branch(source=source, target=target, path=_path(topology, part)) for source, target, part in found)

    return Tree(root=tree.root, weight=tree.weight, inward=branches(tree.inward), outward=branches(tree.outward))


def _path(topology: Topology, part: Sequence[int]) -> tuple[str, ...]:
    """The names that edges one after the other pass; what lies between two visits of the same thing is left out."""
    names: list[str] = []
    for position in part:
        for name in topology.edges[position].path:
            if name in names:
                del names[names.index(name) :]
            names.append(name)
    return tuple(names)
