"""Which sets of a machine's devices a job may be given, up to symmetry.

A scheduler hands out any free devices, so a collective must be good on all sets of them and not only on the whole
machine. Many of the sets look alike: a DGX-1V has 219 sets of 3 to 8 GPUs, 181 of which NVLink alone joins, and these
are of 46 kinds (Wang et al., "Blink", MLSys 2020, section 5).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import rustworkx

from headway.collective.topology import Topology, fast_kinds, topology_of
from headway.errors import DisconnectedError
from headway.hardware.cluster import Cluster

__all__ = ["allocation_classes"]


def allocation_classes(
    cluster: Cluster, sizes: Sequence[int] = (3, 4, 5, 6, 7, 8), *, kinds: Collection[str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """One representative (names of devices) of each class of connected allocations of these sizes.

    Two allocations are of one class where a renaming of devices, and of switches, turns the links of one into those of
    the other, bandwidths included. Connected means by links of `kinds` (unless given: `fast_kinds` of the whole
    cluster, which is NVLink alone on a DGX-1), and without the devices of others. The representative is the first of
    its class in lexicographic order; smaller allocations come first. Looks at every subset of these sizes: meant for
    one machine. Sizes above the number of devices have no allocation.
    """
    names = [device.name for device in cluster.devices]
    allowed = fast_kinds(cluster, names) if kinds is None else frozenset(kinds)
    found: list[tuple[str, ...]] = []
    alike: dict[tuple[object, ...], list[rustworkx.PyDiGraph]] = {}
    for size in sizes:
        for devices in itertools.combinations(names, size):
            try:
                topology = topology_of(cluster, devices, kinds=allowed)
            except DisconnectedError:
                continue
            graph = _graph(topology)
            # What no renaming changes comes first; few pairs are left for the search for a renaming.
            candidates = alike.setdefault((size, *_degrees(topology)), [])
            if not any(
                rustworkx.is_isomorphic(graph, other, node_matcher=_same, edge_matcher=_same) for other in candidates
            ):
                candidates.append(graph)
                found.append(devices)
    return tuple(found)


def _graph(topology: Topology) -> rustworkx.PyDiGraph:
    graph: rustworkx.PyDiGraph = rustworkx.PyDiGraph()
    graph.add_nodes_from([index < topology.ranks for index in range(len(topology.names))])
    graph.add_edges_from([(*ends, rate) for ends, rate in topology.capacity.items()])
    return graph


def _degrees(topology: Topology) -> list[tuple[bool, tuple[float, ...], tuple[float, ...]]]:
    leaving: list[list[float]] = [[] for _ in topology.names]
    arriving: list[list[float]] = [[] for _ in topology.names]
    for (source, target), rate in topology.capacity.items():
        leaving[source].append(rate)
        arriving[target].append(rate)
    ends = enumerate(zip(leaving, arriving))
    return sorted((index < topology.ranks, tuple(sorted(out)), tuple(sorted(into))) for index, (out, into) in ends)


def _same(one: object, other: object) -> bool:
    return one == other
