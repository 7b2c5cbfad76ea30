"""The machines as the scheduler sees them: nodes of so many devices of one kind, in racks.

A scheduler needs no links: what a placement costs is said by a `Pace` (pace.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.schedule.job import Job
from headway.value import Value

__all__ = ["Fleet", "FleetNode", "fleet_of_cluster", "parse_fleet", "uniform_fleet"]

_WORD = re.compile(r"n([0-9]+)g([0-9]+)(?:r([0-9]+))?")


class FleetNode(Value):
    """One machine: `devices` of one `kind`, each with `memory_bytes` (0: not said, enough for all), in a `rack`."""

    name: str
    devices: int
    kind: str = ""
    rack: str = ""
    memory_bytes: float = 0.0


class Fleet(Value):
    """The machines of one scheduler, in the order in which ties between them are broken."""

    name: str
    nodes: tuple[FleetNode, ...]

    @cached_property
    def devices(self) -> int:
        """Devices of all nodes together."""
        return sum(node.devices for node in self.nodes)

    @cached_property
    def devices_by_kind(self) -> dict[str, int]:
        """Kind to how many devices of it all nodes have together, in the order in which kinds come."""
        found: dict[str, int] = {}
        for node in self.nodes:
            found[node.kind] = found.get(node.kind, 0) + node.devices
        return found

    @cached_property
    def position(self) -> dict[str, int]:
        """Name of a node to its place in `nodes`."""
        return {node.name: index for index, node in enumerate(self.nodes)}

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """For each node the number of its class: nodes of one class have one kind and one size of memory."""
        seen: dict[tuple[str, float], int] = {}
        return tuple(seen.setdefault((node.kind, node.memory_bytes), len(seen)) for node in self.nodes)

    @cached_property
    def uniform(self) -> bool:
        """Whether all nodes have as many devices of the same kind: then any node is as good as any other."""
        return len({(node.devices, node.kind, node.memory_bytes) for node in self.nodes}) <= 1

    @cached_property
    def _eligible(self) -> dict[tuple[tuple[str, ...], float], tuple[int, ...]]:
        return {}

    def eligible(self, job: Job) -> tuple[int, ...]:
        """Places in `nodes` of those that the job may use: of a kind that it names, with memory enough."""
        key = (job.kinds, job.memory_bytes)
        found = self._eligible.get(key)
        if found is None:
            found = tuple(
                index
                for index, node in enumerate(self.nodes)
                if (not job.kinds or node.kind in job.kinds)
                and (not node.memory_bytes or job.memory_bytes <= node.memory_bytes)
            )
            self._eligible[key] = found
        return found

    def capacity(self, job: Job) -> int:
        """Devices that the job could have at most, if it were alone."""
        if self.uniform and not job.kinds and not job.memory_bytes:
            return self.devices
        return sum(self.nodes[index].devices for index in self.eligible(job))

    def fewest_nodes(self, job: Job, devices: int) -> int:
        """On how few nodes so many devices can be had, all being free. 0 if they cannot be had at all."""
        key = (job.kinds, job.memory_bytes, devices)
        found = self._fewest.get(key)
        if found is None:
            found, missing = 0, devices
            for size in sorted((self.nodes[index].devices for index in self.eligible(job)), reverse=True):
                if missing <= 0:
                    break
                found, missing = found + 1, missing - size
            found = 0 if missing > 0 else found
            self._fewest[key] = found
        return found

    @cached_property
    def _fewest(self) -> dict[tuple[tuple[str, ...], float, int], int]:
        return {}

    def validate(self) -> Fleet:
        """This fleet, or InputError naming the node."""
        if not self.nodes:
            raise InputError("has no nodes", place=f"fleet {self.name}", remedy="give at least one")
        if len(self.position) < len(self.nodes):
            raise InputError("two nodes have one name", place=f"fleet {self.name}", remedy="name each differently")
        for node in self.nodes:
            if node.devices < 1:
                raise InputError(
                    f"has {node.devices} devices", place=f"fleet {self.name}: node {node.name}", remedy="at least 1"
                )
        return self


def uniform_fleet(nodes: int, devices: int, *, rack: int = 0, kind: str = "", name: str = "") -> Fleet:
    """So many nodes of so many devices each; `rack` nodes in a rack (0: all in one). Raises InputError."""
    return Fleet(
        name=name or f"n{nodes}g{devices}",
        nodes=tuple(
            FleetNode(name=f"n{index}", devices=devices, kind=kind, rack=f"r{index // rack if rack else 0}")
            for index in range(nodes)
        ),
    ).validate()


def parse_fleet(word: str) -> Fleet:
    """`"n256g8"`: 256 nodes of 8 devices; `"n256g8r32"`: in racks of 32 nodes. Raises InputError."""
    match = _WORD.fullmatch(word)
    if match is None:
        raise InputError(f"{word!r} is no fleet", place="fleet", remedy="write it like n256g8 or n256g8r32")
    return uniform_fleet(int(match[1]), int(match[2]), rack=int(match[3] or 0), name=word)


def fleet_of_cluster(cluster: Cluster, racks: Iterable[tuple[str, str]] = ()) -> Fleet:
    """The nodes of a described or probed cluster; `racks` says (node, rack) where that is known.

    The others are in one rack if the same network switches are next to their NICs.

    Raises InputError for a node whose devices are of several kinds: a gang on it could not be told which it has.
    """
    rack_of = _racks_of(cluster) | dict(racks)
    nodes: list[FleetNode] = []
    by_node: dict[str, list[str]] = {}
    for device in cluster.devices:
        by_node.setdefault(device.node, []).append(device.accelerator)
    for name, kinds in by_node.items():
        if len(set(kinds)) > 1:
            raise InputError(f"has devices of several kinds: {', '.join(sorted(set(kinds)))}", place=f"node {name}")
        memory = cluster.accelerators[kinds[0]].memory_bytes
        nodes.append(FleetNode(name=name, devices=len(kinds), kind=kinds[0], rack=rack_of[name], memory_bytes=memory))
    return Fleet(name=cluster.name, nodes=tuple(nodes)).validate()


def _racks_of(cluster: Cluster) -> dict[str, str]:
    """Node to rack: those whose devices and NICs link to the same switches of no node."""
    node_of = {device.name: device.node for device in cluster.devices}
    node_of |= {switch.name: switch.node for switch in cluster.switches}
    beside: dict[str, set[str]] = {device.node: set() for device in cluster.devices}
    for link in cluster.links:
        if node_of[link.source] in beside and not node_of[link.target]:
            beside[node_of[link.source]].add(link.target)
    numbers: dict[frozenset[str], int] = {}
    return {node: f"r{numbers.setdefault(frozenset(found), len(numbers))}" for node, found in beside.items()}
