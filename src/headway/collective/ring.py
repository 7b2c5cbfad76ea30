"""Rings: each rank sends to the next alone, and every link of the ring is busy all the time.

All-reduce goes round twice (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", JPDC 2009; Horovod, Sergeev and Del Balso 2018): first the partial sums, then the results. Of n equal
chunks each rank sends 2 (n-1), which is the least possible where each rank has one way in and one way out.

Where devices are wired to each other directly (DGX-1), several rings fit that share no lane of a link: they are found
by an exact search in small machines. Where data pass switches and NICs, one ring for each NIC of a node is laid
through all nodes, entering and leaving each at another device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from headway.collective.chains import Chain, add_chains, begin, choose_devices, group_by_node
from headway.collective.program import Builder, Chunk, Collective, Program, blocks
from headway.collective.topology import Topology, topology_of
from headway.errors import DisconnectedError
from headway.hardware.cluster import Cluster

__all__ = ["COLLECTIVES", "Ring", "local_order", "ring", "rings"]

COLLECTIVES: tuple[Collective, ...] = ("broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather")

# Bounds of the exact search. It is complete on every allocation of a DGX-1; on larger graphs it gives up early, and
# rings are taken one after the other.
_MOST_RINGS = 6000
_MOST_VISITS = 60_000  # of ranks, while looking for all rings
_MOST_TRIALS = 300_000  # of rings, while looking for the most that fit together
_MOST_STEPS = 5000  # of the search for a single ring


class Ring(NamedTuple):
    """Ranks in the order of the ring, its share of the data relative to other rings, and the way of each hop.

    `paths[i]` leads from `order[i]` to the rank after it; None: what `Cluster.route` says.
    """

    order: tuple[int, ...]
    weight: int
    paths: tuple[tuple[str, ...] | None, ...]


def ring(cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0) -> Program:
    """Any of `COLLECTIVES` on as many rings as the links allow, the vector divided among them by their rates.

    Broadcast goes from the root around each ring, reduce around each ring to the root: chains, whose steps overlap
    when the chunks are cut into pieces. Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("ring", COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    found = rings(cluster, names)
    weights = [one.weight for one in found]
    if collective in ("reduce_scatter", "all_gather"):
        chunks = blocks(size, weights)
    elif collective == "all_reduce":
        chunks = tuple(Chunk(weight=weight) for weight in weights for _ in range(size))
    else:
        chunks = tuple(Chunk(weight=weight) for weight in weights)
    builder = Builder("ring", collective, names, chunks, cluster=cluster, root=root)
    gathering: list[Chain] = []
    reducing: list[Chain] = []
    for number, one in enumerate(found):
        if collective in ("broadcast", "reduce"):
            begins = one.order.index(root) + (collective == "reduce")
            chain = _around(one, number, begins, collective == "reduce")
            (reducing if chain.reduce else gathering).append(chain)
            continue
        for position, rank in enumerate(one.order):
            chunk = number * size + position if collective == "all_reduce" else rank * len(found) + number
            if collective != "all_gather":
                reducing.append(_around(one, chunk, position + 1, True))
            if collective != "reduce_scatter":
                gathering.append(_around(one, chunk, position, False))
    add_chains(builder, reducing)
    add_chains(builder, gathering)
    return builder.build()


def _around(one: Ring, chunk: int, begins: int, reduce: bool) -> Chain:
    """Once around the ring from this position, without the hop that would close it."""
    size = len(one.order)
    positions = [(begins + step) % size for step in range(size)]
    return Chain(
        chunk, [one.order[at] for at in positions], reduce, paths=[one.paths[position] for position in positions[:-1]]
    )


def rings(cluster: Cluster, devices: Sequence[str] | None = None) -> list[Ring]:
    """As many rings through `devices` (at least two) as the links allow, with weights in proportion to their rates.

    Among directly wired devices the rings share no lane, a lane being as wide as the narrowest link; the number of
    lanes used is the largest possible on any allocation of a DGX-1 (on larger graphs the search is cut short). Else
    the number of rings is the one at which the most loaded link limits the total rate least. Raises
    DisconnectedError where no path joins two devices.
    """
    names = choose_devices(cluster, devices)
    try:
        topology = topology_of(cluster, names)
    except DisconnectedError:
        topology = None  # only with the help of other devices: `Cluster.route` knows the way
    if topology is not None and not topology.is_switched:
        packed = _packed(topology)
        if packed:
            return packed
    return _through_nodes(cluster, names)


def _packed(topology: Topology) -> list[Ring]:
    """The most rings of directly wired devices, or none if there is no ring."""
    widest: dict[tuple[int, int], tuple[float, tuple[str, ...]]] = {}
    for edge in topology.edges:
        pair = (edge.source, edge.target)
        widest[pair] = max(widest.get(pair, (0.0, ())), (edge.bytes_per_second, edge.path))
    lane = min(rate for rate, _ in widest.values())
    lanes = {pair: int(rate / lane + 1e-6) for pair, (rate, _) in widest.items()}
    found = _pack(topology.ranks, lanes)
    divisor = math.gcd(*(weight for _, weight in found)) if found else 1
    return [Ring(order, weight // divisor, tuple(widest[hop][1] for hop in _hops(order))) for order, weight in found]


def _hops(order: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(order, (*order[1:], order[0]), strict=True)


def _cycles(size: int, pairs: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, ...]], bool]:
    """The cycles through ranks 0 to `size` - 1 that these directed pairs allow, and whether these are all."""
    following: list[list[int]] = [[] for _ in range(size)]
    for source, target in pairs:
        following[source].append(target)
    cycles: list[tuple[int, ...]] = []
    path = [0]
    choices = [iter(following[0])]
    visits = 0
    while choices and len(cycles) < _MOST_RINGS and visits < _MOST_VISITS:
        visits += 1
        choice = next(choices[-1], None)
        if choice is None:
            choices.pop()
            path.pop()
        elif choice not in path:
            path.append(choice)
            if len(path) < size:
                choices.append(iter(following[choice]))
            else:
                if 0 in following[choice]:
                    cycles.append(tuple(path))
                path.pop()
    return cycles, not choices


def _pack(size: int, lanes: dict[tuple[int, int], int]) -> list[tuple[tuple[int, ...], int]]:
    """Cycles and how often each, as many as the lanes allow if the graph is small, else many."""
    possible = _bound(size, lanes)
    cycles, complete = _cycles(size, sorted(lanes))
    found = _pack_exactly(size, lanes, cycles, possible) if complete else []
    if sum(times for _, times in found) < possible and (cycles or not complete):
        # Only where the exact search may have been cut short can this find more.
        for step, back in itertools.product((1, 2, 3), (True, False)):
            attempt = _pack_greedily(size, lanes, step, back)
            if sum(times for _, times in attempt) > sum(times for _, times in found):
                found = attempt
            if sum(times for _, times in found) == possible:
                break
    return found


def _bound(size: int, lanes: dict[tuple[int, int], int]) -> int:
    """The lanes that leave, or reach, the rank that has the fewest."""
    ends = [0] * (2 * size)
    for (source, target), count in lanes.items():
        ends[2 * source] += count
        ends[2 * target + 1] += count
    return min(ends)


def _pack_exactly(
    size: int, lanes: dict[tuple[int, int], int], cycles: Sequence[tuple[int, ...]], possible: int
) -> list[tuple[tuple[int, ...], int]]:
    """Branch and bound on how often each cycle is taken; `possible` is known not to be exceeded."""
    number = {pair: at for at, pair in enumerate(sorted(lanes))}
    # A ring and its way back side by side, so that symmetric packings come first.
    ordered = sorted(cycles, key=lambda order: (min(order, (0, *order[:0:-1])), order))
    left = [lanes[pair] for pair in number]
    ends = [[at for pair, at in number.items() if pair[side] == rank] for rank in range(size) for side in (0, 1)]
    best: list[tuple[tuple[int, ...], int]] = []
    most = trials = 0

    def search(candidates: list[tuple[tuple[int, ...], list[int]]], chosen: list, total: int) -> None:
        nonlocal best, most, trials
        if total > most:
            best, most = list(chosen), total
        for at, (order, uses) in enumerate(candidates):
            if most >= possible or trials > _MOST_TRIALS or total + min(sum(left[i] for i in e) for e in ends) <= most:
                return
            trials += len(candidates) - at
            for times in range(min(left[i] for i in uses), 0, -1):
                for i in uses:
                    left[i] -= times
                fitting = [other for other in candidates[at + 1 :] if all(left[i] for i in other[1])]
                search(fitting, [*chosen, (order, times)], total + times)
                for i in uses:
                    left[i] += times

    search([(order, [number[hop] for hop in _hops(order)]) for order in ordered], [], 0)
    return best


def _pack_greedily(
    size: int, lanes: dict[tuple[int, int], int], step: int, back: bool
) -> list[tuple[tuple[int, ...], int]]:
    """Ring after ring of what is left; with `back` each is taken in both directions where possible.

    The first ring prefers to go `step` ranks on, the next one more, and so forth: in a full mesh that alone keeps
    them apart.
    """
    left = dict(lanes)
    taken: dict[tuple[int, ...], int] = {}
    failures = 0
    while failures < 2:
        order = _one_cycle(size, left, step + len(taken) + failures)
        failures += not order
        for one in (order, (0, *order[:0:-1])) if order and back else (order,):
            if one and all(left.get(hop, 0) > 0 for hop in _hops(one)):
                for hop in _hops(one):
                    left[hop] -= 1
                taken[one] = taken.get(one, 0) + 1
    return list(taken.items())


def _one_cycle(size: int, left: dict[tuple[int, int], int], step: int) -> tuple[int, ...]:
    """A cycle on the lanes that are left, or nothing if it isn't found soon.

    Goes first where fewest ways lead on (Warnsdorff's rule), then `step` ranks on.
    """
    following: list[set[int]] = [set() for _ in range(size)]
    for (source, target), count in left.items():
        if count > 0:
            following[source].add(target)
    path, free = [0], set(range(1, size))

    def onward() -> list[int]:
        here = path[-1]
        return sorted(
            following[here] & free,
            key=lambda other: (len(following[other] & free), (other - here - step) % size),
            reverse=True,
        )

    choices = [onward()]
    for _ in range(_MOST_STEPS):
        if not choices:
            break
        if not free and 0 in following[path[-1]]:
            return tuple(path)
        if choices[-1]:
            path.append(choices[-1].pop())
            free.remove(path[-1])
            choices.append(onward())
        else:
            choices.pop()
            free.add(path.pop())
    return ()


def local_order(cluster: Cluster, names: Sequence[str]) -> tuple[int, ...]:
    """The positions of a node's devices in an order in which neighbours are directly wired, where there is one.

    If possible the last and the first are wired too, so that the order may begin anywhere.
    """
    size = len(names)
    if size < 3:
        return tuple(range(size))
    try:
        topology = topology_of(cluster, names)
    except DisconnectedError:
        return tuple(range(size))
    if topology.is_switched:
        return tuple(range(size))
    pairs = sorted(topology.capacity)
    cycles, _ = _cycles(size, pairs)
    if cycles:
        return cycles[0]
    # A path is a cycle through one more device that is wired to all.
    everybody = [pair for rank in range(size) for pair in ((rank, size), (size, rank))]
    for cycle in _cycles(size + 1, [*pairs, *everybody])[0][:1]:
        gap = cycle.index(size)
        return (*cycle[gap + 1 :], *cycle[:gap])
    return tuple(range(size))


def _through_nodes(cluster: Cluster, names: Sequence[str]) -> list[Ring]:
    """Rings node by node; in each the devices of a node begin at another one."""
    groups = [
        [group[at] for at in local_order(cluster, [names[rank] for rank in group])]
        for group in group_by_node(cluster, names)
    ]
    longest = max(map(len, groups)) if len(groups) > 1 else 1
    best: tuple[float, list[tuple[int, ...]]] = (0.0, [])
    for count in (number for number in range(1, longest + 1) if longest % number == 0):
        orders = []
        for at in range(count):
            turn = at * longest // count
            starts = [turn * len(group) // longest for group in groups]
            orders.append(
                tuple(rank for group, start in zip(groups, starts) for rank in (*group[start:], *group[:start]))
            )
        rate = _rate(cluster, names, orders)
        if rate > best[0] * (1 + 1e-9):
            best = (rate, orders)
    return [Ring(order, 1, (None,) * len(names)) for order in best[1]]


def _rate(cluster: Cluster, names: Sequence[str], orders: Sequence[Sequence[int]]) -> float:
    """Bytes per second of these rings together, all alike, until the most loaded link is full."""
    uses: dict[int, int] = {}
    for order in orders:
        for source, target in _hops(order):
            for link in cluster.route(names[source], names[target]):
                uses[link] = uses.get(link, 0) + 1
    return len(orders) * min(cluster.links[link].bytes_per_second / times for link, times in uses.items())
