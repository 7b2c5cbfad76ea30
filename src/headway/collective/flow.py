"""Flows, cuts and trees in directed graphs whose capacities are whole numbers.

A graph is a square matrix: `capacity[u][v]` units go from u to v. Its first nodes are the ranks, the others switches,
which pass data on and neither keep nor copy it. A *supply* says how many units each rank sends to all the others:
in broadcast one rank has a supply, in all-gather all have the same. Spanning trees can serve it if, and only if, every
set of nodes with a rank in it is entered by as many units as the ranks outside it supply (Edmonds 1973), and if the
switches can receive what they send (Bang-Jensen, Frank and Jackson 1995). Max-flows prove this *cut condition*. On it
stand

- `broadcast_bound`, `gather_bound`, `partition_bound`: the best possible rates, as fractions;
- `split_switches`: switches replaced by arcs between ranks, as ForestColl does (Zhao et al. 2024);
- `pack_arborescences`: spanning trees that serve a supply, grown arc by arc under the cut condition (Bérczi and Frank
  2010 pack trees so; ForestColl, again, for collectives);
- `aimed`: a graph with edges as wide both ways, directed so that as many trees as its strength leave chosen ranks
  (Frank 1978; Tutte 1961; Nash-Williams 1961).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

__all__ = [
    "Arborescence",
    "Matrix",
    "Residual",
    "Routes",
    "aimed",
    "broadcast_bound",
    "gather_bound",
    "pack_arborescences",
    "partition_bound",
    "shortfall",
    "split_switches",
    "transposed",
]

Matrix = list[list[int]]
Routes = dict[tuple[int, int], dict[tuple[int, ...], int]]  # arc → what it consists of → how many units of that

_UNLIMITED = 1 << 200  # beyond all sums of capacities, which may be long integers
_UNBOUNDED = 1 << 62  # likewise in tables of 64-bit integers
_TABLE_RANKS = 14  # up to here the slack of all sets of ranks fits into a table that numpy handles at once


class Residual:
    """What may still flow from each node to each other; `push` sends more, along shortest paths (Edmonds, Karp 1972).

    Sets of nodes are bit masks, so that one search step costs a few operations on small integers.
    """

    __slots__ = ("ahead", "room")

    def __init__(self, capacity: Sequence[Sequence[int]]) -> None:
        self.room = [list(row) for row in capacity]
        self.ahead = [sum(1 << node for node, room in enumerate(row) if room > 0) for row in self.room]

    def change(self, source: int, target: int, amount: int) -> None:
        """Widen an arc, or narrow it by a negative amount."""
        self.room[source][target] += amount
        if self.room[source][target] > 0:
            self.ahead[source] |= 1 << target
        else:
            self.ahead[source] &= ~(1 << target)

    def push(self, source: int, target: int, limit: int = _UNLIMITED) -> int:
        """Send as much as possible from `source` to `target`, at most `limit`; the amount that went."""
        room, ahead = self.room, self.ahead
        goal = 1 << target
        pushed = 0
        while pushed < limit:
            before = {}
            seen = 1 << source
            queue = [source]
            for node in queue:
                new = ahead[node] & ~seen
                if new & goal:
                    before[target] = node
                    break
                seen |= new
                while new:
                    low = new & -new
                    other = low.bit_length() - 1
                    before[other] = node
                    queue.append(other)
                    new ^= low
            else:
                break
            path = []
            node = target
            amount = limit - pushed
            while node != source:
                parent = before[node]
                path.append((parent, node))
                amount = min(amount, room[parent][node])
                node = parent
            for parent, node in path:
                room[parent][node] -= amount
                if not room[parent][node]:
                    ahead[parent] &= ~(1 << node)
                room[node][parent] += amount
                ahead[node] |= 1 << parent
            pushed += amount
        return pushed

    def reach(self, source: int) -> int:
        """The nodes that `source` could still send to, as a mask: its side of a smallest cut after a `push`."""
        seen = 1 << source
        new = seen
        while new:
            low = new & -new
            more = self.ahead[low.bit_length() - 1] & ~seen
            seen |= more
            new = (new ^ low) | more
        return seen


def transposed(capacity: Matrix) -> Matrix:
    """The graph with every arc turned round."""
    return [list(column) for column in zip(*capacity, strict=True)]


def _with_source(capacity: Matrix, supply: Sequence[int]) -> Matrix:
    """The graph with one more node, from which each rank gets its supply."""
    extended = [[*row, 0] for row in capacity]
    extended.append([*supply, *[0] * (len(capacity) + 1 - len(supply))])
    return extended


def shortfall(capacity: Matrix, supply: Sequence[int]) -> int:
    """How much of the supply (an entry for each rank) does not reach the rank that is worst off, at least 0."""
    extended = _with_source(capacity, supply)
    total = sum(supply)
    return max(total - Residual(extended).push(len(capacity), rank, total) for rank in range(len(supply)))


def broadcast_bound(capacity: Matrix, ranks: int, root: int) -> int:
    """The smallest max-flow from `root` to another rank (Edmonds 1973): that many units can be broadcast at a time."""
    least = _UNLIMITED
    for rank in range(ranks):
        if rank != root:
            least = min(least, Residual(capacity).push(root, rank, least))
    return least


def gather_bound(capacity: Matrix, ranks: int) -> Fraction:
    """The most units that every rank can send to all the others at a time: one over ForestColl's time for a unit.

    It is the least, over sets S of nodes that lack a rank, of (capacity leaving S) / (ranks in S). Newton's method on
    that fraction: a max-flow that falls short shows a set with a smaller one; a few rounds lead to the least.
    """
    node_count = len(capacity)
    # A set that lacks one rank alone: what enters that rank, over all the others.
    best = min(Fraction(sum(row[rank] for row in capacity), ranks - 1) for rank in range(ranks))
    improved = True
    while improved and best:
        improved = False
        for rank in range(ranks):
            scaled = [[units * best.denominator for units in row] for row in capacity]
            residual = Residual(_with_source(scaled, [best.numerator] * ranks))
            if residual.push(node_count, rank) < best.numerator * ranks:
                side = residual.reach(node_count)
                leaving = _leaving(capacity, side)
                best = Fraction(leaving, (side & ((1 << ranks) - 1)).bit_count())
                improved = True
                if not best:
                    break
    return best


def _leaving(capacity: Matrix, side: int) -> int:
    return sum(
        units
        for source, row in enumerate(capacity)
        if side >> source & 1
        for target, units in enumerate(row)
        if units and not side >> target & 1
    )


def partition_bound(capacity: Matrix, ranks: int) -> Fraction:
    """The least, over partitions of the ranks into k > 1 parts, of (what can leave the parts, added up) / (2 (k - 1)).

    No all-reduce that stores, adds up and forwards is faster: among k parts it takes 2 (k - 1) messages for each piece
    of the vector (one-way gossip, Harary and Schwenk 1974), and each leaves a part. Without switches, and with edges as
    wide both ways, this is the strength of the graph (Cunningham 1985).

    Newton's method; each round finds the worst partition greedily, by one min-cut for each rank (Frank's algorithm for
    intersecting submodular functions).
    """
    best = Fraction(sum(_least_leaving(capacity, ranks, rank) for rank in range(ranks)), ranks - 1)
    while best:
        scaled = [[units * best.denominator for units in row] for row in capacity]
        parts, excess = _worst_partition(scaled, ranks, best.numerator)
        # `excess` is the sum over the parts of (leaving - price); a single part, with -price, is no partition.
        if excess >= -best.numerator:
            break
        best = Fraction(excess + best.numerator * parts, best.denominator * (parts - 1))
    return best / 2


def _least_leaving(capacity: Matrix, ranks: int, rank: int) -> int:
    """The smallest cut around one rank; the others are its sink."""
    node_count = len(capacity)
    extended = [[*row, 0] for row in capacity]
    extended.append([0] * (node_count + 1))
    for other in range(ranks):
        if other != rank:
            extended[other][node_count] = _UNLIMITED
    return Residual(extended).push(rank, node_count)


def _worst_partition(capacity: Matrix, ranks: int, price: int) -> tuple[int, int]:
    """The number of parts, and the least sum over the parts of (what leaves it - price)."""
    node_count = len(capacity)
    value: list[int] = []
    parts: list[int] = []
    for rank in range(ranks):
        # The least, over sets X of ranks up to this one and with it, of leaving(X) - price - value(X without it).
        extended = [[*row, 0] for row in capacity]
        extended.append([0] * (node_count + 1))
        gain = 0
        for other in range(ranks):
            if other > rank:
                extended[other][node_count] = _UNLIMITED
            elif other < rank and value[other] > 0:
                extended[rank][other] += value[other]
                gain += value[other]
            elif other < rank:
                extended[other][node_count] -= value[other]
        residual = Residual(extended)
        value.append(residual.push(rank, node_count) - gain - price)
        # Tight sets that meet are one part.
        part = residual.reach(rank) & ((1 << ranks) - 1)
        for known in [known for known in parts if known & part]:
            parts.remove(known)
            part |= known
        parts.append(part)
    return len(parts), sum(value)


# ------------------------------------------------------------------------------------------------------------- switches


class _Supplied:
    """A graph and, for each rank, a flow of the whole supply to it, mended whenever the graph changes.

    The flows prove that the supply can be served. Splitting two arcs off a switch touches few of them, so mending is
    much cheaper than computing them anew.
    """

    def __init__(self, capacity: Matrix, supply: Sequence[int]) -> None:
        self.capacity = [list(row) for row in capacity]
        self.source = len(capacity)
        self.total = sum(supply)
        extended = _with_source(capacity, supply)
        self.flows: list[Residual] = []
        for rank in range(len(supply)):
            residual = Residual(extended)
            served = residual.push(self.source, rank, self.total)
            assert served == self.total, "the supply can be served before the first change"
            self.flows.append(residual)

    def split(self, source: int, switch: int, target: int, wanted: int) -> int:
        """Replace source → switch → target by source → target, as much as the supply permits, at most `wanted`."""
        amount = min(wanted, self.capacity[source][switch], self.capacity[switch][target])
        for rank, residual in enumerate(self.flows):
            if not amount:
                break
            lost = self._shift(residual, rank, source, switch, target, amount)
            if lost:
                # Every set that gets too narrow is narrowed by all of `amount`: so much less is just right.
                for mended, other in enumerate(self.flows[: rank + 1]):
                    self._shift_back(other, mended, source, switch, target, lost)
                amount -= lost
        self.capacity[source][switch] -= amount
        self.capacity[switch][target] -= amount
        if source != target:
            self.capacity[source][target] += amount
        return amount

    def _shift(self, flow: Residual, rank: int, source: int, switch: int, target: int, amount: int) -> int:
        """Mend one flow after a split; how much of it is lost."""
        room = flow.room
        flow.change(source, switch, -amount)
        flow.change(switch, target, -amount)
        if source != target:
            flow.change(source, target, amount)
            # What used both arcs takes the new one.
            through = min(max(-room[source][switch], -room[switch][target]), room[switch][source], room[target][switch])
            if through > 0:
                for one, other in ((source, switch), (switch, target)):
                    flow.change(one, other, through)
                    flow.change(other, one, -through)
                flow.change(source, target, -through)
                flow.change(target, source, through)
        for one, other in ((source, switch), (switch, target)):
            over = -room[one][other]
            if over > 0:
                flow.change(one, other, over)
                flow.change(other, one, -over)
                missing = over - flow.push(one, other, over)
                if missing:
                    # No way round: this much flows back to where it came from, and is missing at the end.
                    if one != self.source:
                        flow.push(one, self.source, missing)
                    if other != rank:
                        flow.push(rank, other, missing)
        return self._complete(flow, rank)

    def _shift_back(self, flow: Residual, rank: int, source: int, switch: int, target: int, amount: int) -> None:
        """Undo part of a split, and complete the flow again."""
        flow.change(source, switch, amount)
        flow.change(switch, target, amount)
        if source != target:
            flow.change(source, target, -amount)
            over = -flow.room[source][target]
            if over > 0:
                for one, other in ((source, switch), (switch, target)):
                    flow.change(one, other, -over)
                    flow.change(other, one, over)
                flow.change(source, target, over)
                flow.change(target, source, -over)
        self._complete(flow, rank)

    def _complete(self, flow: Residual, rank: int) -> int:
        """Send what is missing at `rank`; how much of that does not go."""
        missing = sum(flow.room[self.source])
        return missing - flow.push(self.source, rank, missing) if missing else 0


def split_switches(capacity: Matrix, supply: Sequence[int], routes: Routes, *, quantum: int) -> tuple[Matrix, Routes]:
    """The graph of the ranks alone that serves the same supply, and what its arcs consist of.

    `routes` says what each arc consists of, say {(0, 8): {(3,): 5}}: five units of whatever the caller calls 3. The
    routes that come back are joined from these. Every switch must receive at least as much as it sends, and the supply
    must be servable (`shortfall`): then splitting two arcs at a time, one into a switch and one out of it, never gets
    stuck (Bang-Jensen, Frank and Jackson 1995). Any pairs will do; they are split in turns of `quantum`
    units. About as much as a tree uses spreads a switch over many pairs of ranks, and so keeps trees shallow.
    A switch that the supply does not need is left out altogether, the narrowest first.
    """
    ranks = len(supply)
    switches = range(ranks, len(capacity))
    capacity = [list(row) for row in capacity]
    for switch in sorted(switches, key=lambda switch: sum(capacity[switch])):
        without = [[0 if switch in (u, v) else units for v, units in enumerate(row)] for u, row in enumerate(capacity)]
        if _receives_enough(without, ranks) and _serves(without, supply):
            capacity = without
    routes = {arc: dict(parts) for arc, parts in routes.items() if capacity[arc[0]][arc[1]]}
    graph = _Supplied(capacity, supply) if any(map(any, capacity[ranks:])) else None
    # The leaves of a hierarchy first, so that what is above them then joins ranks.
    for switch in sorted(switches, key=lambda switch: sum(map(bool, capacity[switch]))):
        if graph is not None:
            _split_switch(graph, switch, routes, quantum)
    final = graph.capacity if graph is not None else capacity
    return [row[:ranks] for row in final[:ranks]], routes


def _receives_enough(capacity: Matrix, ranks: int) -> bool:
    """Whether no switch can send more than it receives."""
    return all(sum(capacity[switch]) <= sum(row[switch] for row in capacity) for switch in range(ranks, len(capacity)))


def _serves(capacity: Matrix, supply: Sequence[int]) -> bool:
    extended = _with_source(capacity, supply)
    total = sum(supply)
    return all(Residual(extended).push(len(capacity), rank, total) == total for rank in range(len(supply)))


def _split_switch(graph: _Supplied, switch: int, routes: Routes, quantum: int) -> None:
    capacity = graph.capacity
    nodes = range(len(capacity))
    moving = True
    while moving and any(capacity[switch]):
        moving = False
        pairs = [(u, v) for u in nodes if capacity[u][switch] for v in nodes if capacity[switch][v]]
        # Pairs that nothing joins yet first, the others can do without; back to where it came from as a last resort.
        pairs.sort(key=lambda pair: (pair[0] == pair[1], capacity[pair[0]][pair[1]]))
        for source, target in pairs:
            if source == target and moving:
                break
            amount = graph.split(source, switch, target, quantum)
            if amount:
                moving = True
                _join(routes, source, switch, target, amount)
    assert not any(capacity[switch]), "a switch that receives what it sends can be split off"
    for node in nodes:
        capacity[node][switch] = 0  # what it receives beyond that is of no use
        routes.pop((node, switch), None)


def _join(routes: Routes, source: int, switch: int, target: int, amount: int) -> None:
    """Move `amount` units from the routes of two arcs to routes of the arc that replaces them."""
    arriving, leaving = routes[source, switch], routes[switch, target]
    while amount:
        first, second = next(iter(arriving)), next(iter(leaving))
        step = min(amount, arriving[first], leaving[second])
        for parts, part in ((arriving, first), (leaving, second)):
            parts[part] -= step
            if not parts[part]:
                del parts[part]
        if source != target:
            joined = routes.setdefault((source, target), {})
            joined[first + second] = joined.get(first + second, 0) + step
        amount -= step


# ---------------------------------------------------------------------------------------------------------------- trees


class Arborescence(NamedTuple):
    """A spanning tree out of `root`: its arcs in an order in which data can follow them, and how many such trees."""

    root: int
    arcs: tuple[tuple[int, int], ...]
    weight: int


class _Slack(Protocol):
    """Says how much of an arc the tree at hand may use so that all trees still to come can be packed."""

    def start(self, root: int, weight: int) -> None:
        """Begin a tree: `weight` of the root's supply."""
        ...

    def room(self, source: int, target: int) -> int:
        """How much of a tree that has `source` and not `target` may go on to `target` by this arc."""
        ...

    def grow(self, source: int, target: int) -> None:
        """Let the whole tree go on."""
        ...

    def shrink(self, weight: int) -> None:
        """Make the tree at hand lighter, from its first arc on; what it gives up returns to the root's supply."""
        ...


class _SlackTable:
    """The slack of every set X of ranks, in a table with one axis of length 2 for each rank: is it in X?

    The slack is what enters X, less what must enter it: the supply of the ranks outside, and the tree at hand if none
    of its ranks is inside. With each arc that enters X the tree takes from that slack, except with the arc that first
    leads it there. `_met` is the table with only the sets that the tree has met, all others being without bound.
    """

    def __init__(self, capacity: Matrix, supply: Sequence[int]) -> None:
        ranks = len(supply)
        self.shape = (2,) * ranks
        slack = np.zeros(self.shape, dtype=np.int64)
        for rank, units in enumerate(supply):
            slack[self._axes(absent=rank)] -= units
        for source, row in enumerate(capacity):
            for target, units in enumerate(row):
                if units:
                    slack[self._axes(target, source)] += units
        slack[(0,) * ranks] = _UNBOUNDED  # nothing has to enter the empty set
        self._met = slack
        self._before = slack

    def _axes(self, present: int | None = None, absent: int | None = None) -> tuple[int | slice, ...]:
        axes: list[int | slice] = [slice(None)] * len(self.shape)
        if present is not None:
            axes[present] = 1
        if absent is not None:
            axes[absent] = 0
        return tuple(axes)

    def start(self, root: int, weight: int) -> None:
        self._before = self._met
        self._root, self._weight = root, weight
        self._arcs: list[tuple[int, int]] = []
        self._met = np.full(self.shape, _UNBOUNDED)
        here = self._axes(root)
        self._met[here] = self._before[here]

    def room(self, source: int, target: int) -> int:
        return int(self._met[self._axes(target, source)].min())

    def grow(self, source: int, target: int) -> None:
        self._arcs.append((source, target))
        self._met[self._axes(target, source)] -= self._weight
        here = self._axes(target)
        met, before = self._met[here], self._before[here]
        np.copyto(met, before, where=met > _UNBOUNDED // 2)

    def shrink(self, weight: int) -> None:
        arcs = self._arcs
        self._met = self._before
        self.start(self._root, weight)
        for source, target in arcs:
            self.grow(source, target)


class _SlackFlow:
    """The same answers by max-flows, for more ranks than a table has room for."""

    def __init__(self, capacity: Matrix, supply: Sequence[int]) -> None:
        self.capacity = [list(row) for row in capacity]
        self.supply = list(supply)

    def start(self, root: int, weight: int) -> None:
        self._root, self._weight = root, weight
        self.supply[root] -= weight
        self._arcs: list[tuple[int, int]] = []

    def room(self, source: int, target: int) -> int:
        # Every other tree still to come starts at `source` as well, over an arc to its root as wide as its supply.
        residual = Residual(self.capacity)
        for rank, units in enumerate(self.supply):
            if rank != source and units:
                residual.change(source, rank, units)
        # A tree that is to start at `source` has to enter the set that `target` is in all the same.
        others = sum(self.supply)
        return residual.push(source, target, others + self._weight) - others

    def grow(self, source: int, target: int) -> None:
        self._arcs.append((source, target))
        self.capacity[source][target] -= self._weight

    def shrink(self, weight: int) -> None:
        self.supply[self._root] += self._weight - weight
        for source, target in self._arcs:
            self.capacity[source][target] += self._weight - weight
        self._weight = weight


def pack_arborescences(capacity: Matrix, supply: Sequence[int]) -> list[Arborescence]:
    """Spanning trees that use no arc beyond its capacity; those out of a rank weigh its supply together.

    `capacity` is that of the ranks alone, and must serve the supply (`shortfall` says so): then trees always exist
    (Edmonds 1973; Frank 1978). Each tree is made as heavy as its arcs allow, so that there are few, and as shallow as
    that allows.
    """
    remaining = list(supply)
    unused = [list(row) for row in capacity]
    slack: _Slack = (_SlackTable if len(supply) <= _TABLE_RANKS else _SlackFlow)(capacity, supply)
    trees: list[Arborescence] = []
    while any(remaining):
        root = max(range(len(supply)), key=remaining.__getitem__)
        tree = _grow_tree(slack, unused, root, remaining[root])
        remaining[root] -= tree.weight
        for source, target in tree.arcs:
            unused[source][target] -= tree.weight
        trees.append(tree)
    return trees


def _grow_tree(slack: _Slack, unused: Matrix, root: int, weight: int) -> Arborescence:
    slack.start(root, weight)
    reached = [root]
    missing = set(range(len(unused))) - {root}
    arcs: list[tuple[int, int]] = []
    while missing:
        best, chosen = 0, (root, root)
        for source, target in _candidates(unused, reached, missing):
            width = unused[source][target]
            if width > best:
                width = min(width, slack.room(source, target))
                if width > best:
                    best, chosen = width, (source, target)
                    if best >= weight:
                        break
        assert best, "the cut condition leaves an arc to go on by"
        if best < weight:
            weight = best
            slack.shrink(weight)
        slack.grow(*chosen)
        arcs.append(chosen)
        reached.append(chosen[1])
        missing.remove(chosen[1])
    return Arborescence(root, tuple(arcs), weight)


def _candidates(unused: Matrix, reached: Sequence[int], missing: set[int]) -> Iterator[tuple[int, int]]:
    """Arcs that a tree may go on by: near its root first, the widest first."""
    for source in reached:
        row = unused[source]
        for target in sorted((target for target in missing if row[target]), key=row.__getitem__, reverse=True):
            yield source, target


# ----------------------------------------------------------------------------------------------------------- undirected


def aimed(capacity: Matrix, ranks: int, total: int, root: int | None) -> tuple[Matrix, list[int]]:
    """Directions for the edges of an undirected graph, and supplies of the ranks that it then serves.

    `capacity`, as wide both ways, is half of each edge's width; from there on, width is moved from one direction of an
    edge to the other. The supplies add up to `total`, which must be at most twice the `partition_bound` of `capacity`.
    They are all at `root`, or, without one, shared out as evenly as is possible.

    First come supplies, negative ones allowed, such that each set of nodes with a rank in it is entered by and supplies
    at least `total` together. What a set must supply for that is an intersecting supermodular function, so lowering
    one supply after the other as far as possible leads to the smallest sum, `total`, in whatever order. Then a flow
    carries supplies to where they should be. Turning round a path from u to v lets one unit more enter u, and one less
    v; so if a unit of supply moves from u to v meanwhile, every set has what it had. The cut condition says that such
    a flow exists (after Frank 1978, on orientations and on roots of arborescences).
    """
    supply = [total] * ranks
    share = total // ranks
    for floor in (share + 1, share, None) if root is None else (None,):
        for rank in range(ranks):
            # What the rank needs by itself is a bound to begin with.
            lowest = total - sum(row[rank] for row in capacity)
            lowest = lowest if floor is None else max(floor, lowest)
            if supply[rank] > lowest:
                supply[rank] = lowest
                supply[rank] += _lacking(capacity, supply, total)
    residual = Residual(capacity)
    for rank in range(ranks):
        _move(residual, supply, rank, -supply[rank])
    if root is not None:
        _move(residual, supply, root, total - supply[root])
    assert min(supply) >= 0, "supplies can be moved to where they are missing"
    return residual.room, supply


def _lacking(capacity: Matrix, supply: Sequence[int], total: int) -> int:
    """How much of `total` the set of nodes that is worst off lacks; some supplies are negative."""
    owed = sum(-units for units in supply if units < 0)
    extended = _with_source(capacity, [max(units, 0) for units in supply])
    worst = 0
    for rank in range(len(supply)):
        residual = Residual(extended)
        # A negative supply outside the set counts as if it entered; all of them are then asked for in addition.
        for other, units in enumerate(supply):
            if units < 0 and other != rank:
                residual.change(other, rank, -units)
        worst = max(worst, total + owed - residual.push(len(capacity), rank, total + owed))
    return worst


def _move(residual: Residual, supply: list[int], target: int, wanted: int) -> None:
    """Move so much supply to `target` from where there is some, by turning paths round."""
    for source, units in enumerate(supply):
        if source != target and min(units, wanted) > 0:
            moved = residual.push(source, target, min(units, wanted))
            supply[source] -= moved
            supply[target] += moved
            wanted -= moved
