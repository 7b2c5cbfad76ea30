"""What a collective may use of a cluster: the ranks, the switches between them, and directed capacities.

A `Topology` is a cluster cut down to some devices and some kinds of links: other devices are gone (they belong to
somebody else), switches that lead nowhere are gone, and a switch between just two things is a link between these two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import rustworkx

from headway.errors import ClusterError, DisconnectedError
from headway.hardware.cluster import Cluster
from headway.value import Value

__all__ = ["Edge", "Topology", "fast_kinds", "topology_of"]

_SLOW_KINDS = ("pcie", "socket")


class Edge(Value):
    """A directed connection of two of `Topology.names`; `path` names all it passes, both ends included."""

    source: int
    target: int
    bytes_per_second: float
    path: tuple[str, ...]


class Topology(Value):
    """Things that are joined: `names[:ranks]` are the devices in the order of the ranks, the others are switches.

    Between two things there may be several edges, by different paths.
    """

    names: tuple[str, ...]
    ranks: int
    edges: tuple[Edge, ...]

    @cached_property
    def capacity(self) -> dict[tuple[int, int], float]:
        """(source, target) → bytes per second of all edges between them."""
        capacity: dict[tuple[int, int], float] = {}
        for edge in self.edges:
            key = (edge.source, edge.target)
            capacity[key] = capacity.get(key, 0.0) + edge.bytes_per_second
        return capacity

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each rank."""
        return self.names[: self.ranks]

    @property
    def is_switched(self) -> bool:
        """Whether there is a switch in it."""
        return len(self.names) > self.ranks


def fast_kinds(cluster: Cluster, devices: Sequence[str]) -> frozenset[str]:
    """The kinds of links that joining `devices` takes: without PCIe where NVLink or xGMI alone joins them all."""
    kinds = frozenset(link.kind for link in cluster.links)
    fast = kinds.difference(_SLOW_KINDS, ("network",))
    if fast and _is_connected(_cut(cluster, devices, fast)):
        return fast
    return kinds


def topology_of(
    cluster: Cluster, devices: Sequence[str] | None = None, *, kinds: Collection[str] | None = None
) -> Topology:
    """The topology among `devices` (all, unless given) over links of these kinds (unless given: `fast_kinds`).

    Raises ClusterError for a device that is not there or is named twice, DisconnectedError where a rank cannot reach
    another.
    """
    chosen = tuple(device.name for device in cluster.devices) if devices is None else tuple(devices)
    known = {device.name for device in cluster.devices}
    for position, name in enumerate(chosen):
        if name not in known:
            raise ClusterError(
                f"no device is named {name!r}", place=cluster.name, remedy="see `headway probe` or the preset's names"
            )
        if name in chosen[:position]:
            raise ClusterError(f"device {name!r} is named twice", place=cluster.name, remedy="name each device once")
    if not chosen:
        raise ClusterError("no devices are chosen", place=cluster.name, remedy="choose at least one")
    found = _cut(cluster, chosen, fast_kinds(cluster, chosen) if kinds is None else frozenset(kinds))
    if not _is_connected(found):
        apart = _apart(found)
        raise DisconnectedError(
            f"{apart[0]} cannot reach {apart[1]} without other devices' help",
            place=cluster.name,
            remedy="add the missing links, allow other kinds of links, or choose devices that are joined",
        )
    return found


def _cut(cluster: Cluster, devices: Sequence[str], kinds: frozenset[str]) -> Topology:
    switches = [switch.name for switch in cluster.switches]
    keep = {*devices, *switches}
    merged: dict[tuple[str, str], float] = {}
    for link in cluster.links:
        if link.kind in kinds and link.source in keep and link.target in keep:
            ends = (link.source, link.target)
            merged[ends] = merged.get(ends, 0.0) + link.bytes_per_second
    edges = _shortened(list(merged.items()), switches)
    used = {name for path, _ in edges for name in (path[0], path[-1])}
    names = (*devices, *(name for name in switches if name in used))
    index = {name: position for position, name in enumerate(names)}
    return Topology(
        names=names,
        ranks=len(devices),
        edges=tuple(
            Edge(source=index[path[0]], target=index[path[-1]], bytes_per_second=rate, path=path)
            for path, rate in edges
        ),
    )


def _shortened(
    edges: Sequence[tuple[tuple[str, ...], float]], switches: Sequence[str]
) -> list[tuple[tuple[str, ...], float]]:
    """The (path, rate) edges without switches that lead nowhere or only join two things."""
    alive = dict(enumerate(edges))
    leaving: dict[str, set[int]] = {}
    arriving: dict[str, set[int]] = {}

    def add(position: int) -> None:
        path = alive[position][0]
        leaving.setdefault(path[0], set()).add(position)
        arriving.setdefault(path[-1], set()).add(position)

    def drop(position: int) -> None:
        path = alive.pop(position)[0]
        leaving[path[0]].remove(position)
        arriving[path[-1]].remove(position)

    for position in alive:
        add(position)
    fresh = len(alive)
    known = set(switches)
    waiting = list(reversed(switches))
    while waiting:
        switch = waiting.pop()
        out, into = sorted(leaving.get(switch, ())), sorted(arriving.get(switch, ()))
        targets, sources = [alive[at][0][-1] for at in out], [alive[at][0][0] for at in into]
        ends = {*targets, *sources}
        if not ends or len(ends) > 2:
            continue
        # Several edges to one end would share the capacity of the other side: such a switch stays what it is.
        if len(ends) == 2 and (len(set(targets)) < len(targets) or len(set(sources)) < len(sources)):
            continue
        joined = [
            (alive[first][0] + alive[second][0][1:], min(alive[first][1], alive[second][1]))
            for first in into
            for second in out
            if alive[first][0][0] != alive[second][0][-1]
        ]
        for position in (*out, *into):
            drop(position)
        for edge in joined:
            alive[fresh] = edge
            add(fresh)
            fresh += 1
        waiting.extend(sorted(ends & known))
    return list(alive.values())


def _graph(topology: Topology) -> rustworkx.PyDiGraph:
    graph: rustworkx.PyDiGraph = rustworkx.PyDiGraph()
    graph.add_nodes_from(list(topology.names))
    graph.add_edges_from_no_data([(edge.source, edge.target) for edge in topology.edges])
    return graph


def _is_connected(topology: Topology) -> bool:
    components = rustworkx.strongly_connected_components(_graph(topology))
    ranks = set(range(topology.ranks))
    return any(ranks.issubset(component) for component in components)


def _apart(topology: Topology) -> tuple[str, str]:
    graph = _graph(topology)
    for rank in range(topology.ranks):
        reached = rustworkx.descendants(graph, rank) | {rank}
        for other in range(topology.ranks):
            if other not in reached:
                return topology.names[rank], topology.names[other]
    raise AssertionError("every rank reaches every other")
