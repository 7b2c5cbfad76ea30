"""What collectives cost on the links that they really use.

The alpha-beta model (Hockney 1994; Thakur, Rabenseifner, Gropp, IJHPCA 2005): a message of B bytes takes
alpha + B / bandwidth. Here bandwidth is not a number of the cluster but of a *group of devices at work*: every group
of a mesh axis (all tensor-parallel groups, say) communicates at the same time, each along rings laid over the links;
the load of every link is counted, and a group goes at the pace of its most loaded one.

Rings keep the devices of a node adjacent, as NCCL lays them. A group with k devices in each of several nodes gets k
rings, each leaving a node at another device, so that all network interfaces carry. Inside a node whose devices are
wired directly (DGX-1) as many edge-disjoint rings are packed as the links allow, greedily by the widest bottleneck.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np

from headway.hardware.cluster import Cluster
from headway.predict.efficiency import DEFAULT, efficiency_of

__all__ = [
    "Axis",
    "Channel",
    "Communication",
    "KnownPlaces",
    "KnownTimes",
    "all_gather_seconds",
    "all_reduce_seconds",
    "all_to_all_seconds",
    "broadcast_seconds",
    "reduce_scatter_seconds",
    "reduce_seconds",
    "send_seconds",
]

# NCCL's own figures for one hop and for one collective, in seconds, by protocol (NCCL 2.18, src/graph/tuning.cc,
# `hwLat` and `baseLat` of rings): low latency at a quarter of the bandwidth, and "simple" at all of it. They are added
# where the cluster is described on paper; a probed cluster carries what was measured.
_PROTOCOLS = (
    # start, hop within a node, hop between nodes, share of the bandwidth
    (6.6e-6, 0.6e-6, 2.7e-6, 0.25),
    (8.4e-6, 3.4e-6, 14.0e-6, 1.0),
)

Axis = Literal["data", "tensor", "pipeline", "context", "expert", "expert_data"]


class KnownTimes(Protocol):
    """Times of collectives in one place that are known otherwise than by the formulas here: measured, or of programs.

    `seconds` of a collective over `size_bytes` (the whole tensor); None: not known, the formula stands.
    """

    def seconds(self, kind: str, size_bytes: float) -> float | None: ...


class KnownPlaces(Protocol):
    """Known times of the axes of device meshes (see `Communication.channels`); None: nothing is known there."""

    def place(
        self, devices: tuple[str, ...], pipeline: int, data: int, tensor: int, axis: Axis, context: int, expert: int
    ) -> KnownTimes | None: ...


class Channel(NamedTuple):
    """What a group of `size` devices has to communicate with.

    `latency_seconds`: mean latency of one hop. `bytes_per_second`: of all its rings together, while the other groups
    of the same axis are at work too. `start_seconds`: fixed cost of one collective. `backend`: "nccl" or "gloo".
    `between_nodes`: the share of hops that leave a node; `protocols`: whether NCCL's own latencies are to be added. The
    `scale_*` are measured times over those of the formulas (`Cluster.operation_scale`); `scale_scatter` 0: unknown.
    What `known` knows goes before every formula.
    """

    size: int = 1
    latency_seconds: float = 0.0
    bytes_per_second: float = math.inf
    start_seconds: float = 0.0
    backend: str = "nccl"
    between_nodes: float = 0.0
    protocols: bool = False
    scale_gather: float = 1.0
    scale_scatter: float = 0.0
    scale_send: float = 1.0
    known: KnownTimes | None = None

    def seconds(self, hops: float, moved_bytes: float) -> float:
        """Seconds until `moved_bytes` have passed the slowest link, after `hops` hops one behind the other."""
        if not self.protocols:
            return self.start_seconds + hops * self.latency_seconds + moved_bytes / self.bytes_per_second
        least = math.inf
        for start, inside, outside, share in _PROTOCOLS:  # a loop: this is asked millions of times in a search
            hop = self.latency_seconds + inside + self.between_nodes * (outside - inside)
            seconds = start + hops * hop + moved_bytes / (self.bytes_per_second * share)
            if seconds < least:
                least = seconds
        return self.start_seconds + least


def all_reduce_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group, the result on every member.

    The better of a ring, 2 (n-1) alpha + 2 (n-1)/n B/bandwidth (Patarasuk and Yuan, JPDC 2009), and of NCCL's double
    binary tree, 2 log2(n) alpha + 2 B/bandwidth (Sanders, Speck, Träff, Parallel Computing 2009); gloo has no tree.
    """
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("all_reduce", size_bytes)) is not None:
        return found
    ring = channel.seconds(2 * (n - 1), 2 * size_bytes * (n - 1) / n)
    if channel.backend == "nccl" and n > 2:
        return min(ring, channel.seconds(2 * math.ceil(math.log2(n)), 2 * size_bytes))
    return ring


def all_gather_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to put together `size_bytes` (the whole result), of which each member has 1/n: (n-1)/n of it is moved."""
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("all_gather", size_bytes)) is not None:
        return found
    return channel.scale_gather * channel.seconds(n - 1, size_bytes * (n - 1) / n)


def reduce_scatter_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group and leave 1/n of the result on each member.

    The reverse of an all-gather, except that torch's gloo backend reduces everything and throws the rest away.
    """
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("reduce_scatter", size_bytes)) is not None:
        return found
    if channel.backend == "gloo" and not channel.scale_scatter:
        return all_reduce_seconds(size_bytes, channel)
    return (channel.scale_scatter or 1.0) * channel.seconds(n - 1, size_bytes * (n - 1) / n)


def broadcast_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to copy `size_bytes` from one member to all.

    NCCL pipelines along the ring: (n-1) alpha + B/bandwidth. gloo sends whole messages along a binomial tree.
    """
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("broadcast", size_bytes)) is not None:
        return found
    if channel.backend == "gloo":
        rounds = math.ceil(math.log2(n))
        return channel.seconds(rounds, rounds * size_bytes)
    return channel.seconds(n - 1, size_bytes)


def reduce_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group, the result on one member.

    NCCL pipelines along the ring, a broadcast backwards: (n-1) alpha + B/bandwidth. gloo reduce-scatters round a ring,
    then every member sends its part to the one: n alpha + 2 (n-1)/n B/bandwidth.
    """
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("reduce", size_bytes)) is not None:
        return found
    if channel.backend == "gloo":
        return channel.seconds(n, 2 * size_bytes * (n - 1) / n)
    return channel.seconds(n - 1, size_bytes)


def all_to_all_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds for every member to hand 1/n of its `size_bytes` to each other member, all pairs at once.

    For a channel of the axis "expert", whose pace counts the pairs' loads.
    """
    n = channel.size
    if n <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("all_to_all", n * size_bytes)) is not None:
        return found
    return channel.seconds(n - 1, size_bytes)


def send_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to send `size_bytes` from one device to another."""
    if channel.size <= 1:
        return 0.0
    if channel.known is not None and (found := channel.known.seconds("send", size_bytes)) is not None:
        return found
    # A message starts no collective.
    return channel.scale_send * channel._replace(start_seconds=0.0).seconds(1, size_bytes)


class Communication:
    """Channels of every axis of a device mesh on one cluster, memoised by mesh.

    Nodes that are wired alike share one table of routes, so that 16,384 devices cost about as much to route as 16;
    loads are then counted over all groups exactly, in numpy. `symmetric=False` routes every pair by itself (the tests
    compare the two). `known`: times that go before the formulas, wherever it knows them.
    """

    def __init__(self, cluster: Cluster, *, symmetric: bool = True, known: KnownPlaces | None = None) -> None:
        self.cluster = cluster
        self.known = known
        kinds = {device.accelerator for device in cluster.devices}
        self.backend = "gloo" if all(cluster.accelerators[kind].torch_device == "cpu" for kind in kinds) else "nccl"
        self._on_paper = self.backend == "nccl" and not cluster.fingerprint
        achieved: dict[str, float] = {}
        if self._on_paper:
            # What NCCL gets out of links with large messages; between kinds of devices what the weaker one does.
            reached = [efficiency_of(kind) or DEFAULT for kind in cluster.accelerators.values()]
            achieved = {"nvlink": min(one.nvlink for one in reached), "network": min(one.network for one in reached)}
        self._wiring = _Wiring(cluster, symmetric=symmetric, achieved=achieved)
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._channels: dict[tuple, tuple[Channel, ...]] = {}

    def channels(
        self,
        devices: tuple[str, ...],
        pipeline: int,
        data: int,
        tensor: int,
        axis: Axis,
        *,
        context: int = 1,
        expert: int = 1,
    ) -> tuple[Channel, ...]:
        """For each pipeline rank the slowest of its groups along `axis`, all groups of that axis at work together.

        `devices` holds the device of rank ((p * data + d) * context + c) * tensor + t. Groups of the axis "data" are
        the data x context replicas of the same parameters; "expert" those `expert` neighbours of them that divide the
        experts, all pairs of which exchange tokens (see `all_to_all_seconds`); "expert_data" those that hold the same
        experts. For the axis "pipeline" element p is the channel from rank p to rank p + 1, the last one back to rank
        0 (the interleaved schedule needs it). Raises DisconnectedError if two members cannot reach each other.
        """
        key = (devices, pipeline, data, tensor, axis, context, expert)
        found = self._channels.get(key)
        if found is None:
            positions = np.fromiter((self._position[name] for name in devices), dtype=np.int64, count=len(devices))
            mesh = positions.reshape(pipeline, data * context, tensor)
            if axis == "pipeline":
                found = self._along(mesh.reshape(pipeline, -1))
            else:
                found = self._groups(pipeline, _groups_of(mesh, axis, context, expert), axis == "expert")
            if self.known is not None and found[0].size > 1:
                known = self.known.place(*key)
                found = tuple(channel._replace(known=known) for channel in found)
            self._channels[key] = found
        return found

    def group(self, devices: tuple[str, ...]) -> Channel:
        """The channel of one group of devices that has the links to itself."""
        return self.channels(devices, 1, len(devices), 1, "data")[0]

    def crossing(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> Channel:
        """The channel between the ranks of two stages of unequal width, which pair up in order, both ways at once."""
        key = (sources, targets)
        found = self._channels.get(key)
        if found is None:
            count = max(len(sources), len(targets))
            source = np.array([self._position[sources[at * len(sources) // count]] for at in range(count)])
            target = np.array([self._position[targets[at * len(targets) // count]] for at in range(count)])
            slowness, latency, crossing = self._pace(source, target, None, np.zeros(count, dtype=np.int64), 1)
            found = self._channels[key] = (self._channel(2, latency[0], slowness[0], crossing[0]),)
        return found[0]

    def _along(self, source: np.ndarray) -> tuple[Channel, ...]:
        pipeline = len(source)
        if pipeline == 1:
            return (Channel(backend=self.backend),)
        target = np.roll(source, -1, axis=0)
        owner = np.repeat(np.arange(pipeline), source.shape[1])
        # The way back from the last rank to the first is idle except for the interleaved schedule: count it alone.
        count = (pipeline - 1) * source.shape[1]
        forward = self._pace(source.ravel()[:count], target.ravel()[:count], None, owner[:count], pipeline)
        back = self._pace(source.ravel()[count:], target.ravel()[count:], None, owner[count:], pipeline)
        slowness = np.maximum(forward[0], back[0])
        latency = np.maximum(forward[1], back[1])
        crossing = np.maximum(forward[2], back[2])
        return tuple(self._channel(2, latency[p], slowness[p], crossing[p]) for p in range(pipeline))

    def _groups(self, pipeline: int, groups: np.ndarray, pairwise: bool) -> tuple[Channel, ...]:
        size = groups.shape[1]
        if size == 1:
            return (Channel(backend=self.backend),) * pipeline
        of_pipeline = np.repeat(np.arange(pipeline), len(groups) // pipeline)
        if pairwise:
            one, other = (at.ravel() for at in np.nonzero(~np.eye(size, dtype=bool)))
            source, target = groups[:, one].ravel(), groups[:, other].ravel()
            owner = np.repeat(np.arange(len(groups)), len(one))
            weight = np.full(len(source), 1 / size)
        else:
            source, target, weight, owner = self._wiring.rings(groups)
        figures = []
        for figure in self._pace(source, target, weight, owner, len(groups)):
            worst = np.zeros(pipeline)
            np.maximum.at(worst, of_pipeline, figure)
            figures.append(worst)
        slowest, farthest, crossing = figures
        return tuple(self._channel(size, farthest[p], slowest[p], crossing[p]) for p in range(pipeline))

    def _pace(
        self, source: np.ndarray, target: np.ndarray, weight: np.ndarray | None, owner: np.ndarray, owners: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each owner of hops: seconds per byte on its most loaded link, mean latency, share that leaves a node."""
        if weight is None:
            weight = np.ones(len(source))
        wiring = self._wiring
        hop, link = wiring.links_of(source, target)
        load = np.bincount(link, weights=weight[hop], minlength=len(wiring.bytes_per_second))
        seconds_per_byte = load[link] / wiring.bytes_per_second[link]
        slowness = np.zeros(owners)
        np.maximum.at(slowness, owner[hop], seconds_per_byte)
        hop_latency = np.bincount(hop, weights=wiring.latency_seconds[link], minlength=len(source))
        hops = np.maximum(np.bincount(owner, weights=weight, minlength=owners), 1e-30)
        latency = np.bincount(owner, weights=hop_latency * weight, minlength=owners) / hops
        leaves = wiring.node_of[source] != wiring.node_of[target]
        crossing = np.bincount(owner, weights=leaves * weight, minlength=owners) / hops
        return slowness, latency, crossing

    def _channel(self, size: int, latency: float, slowness: float, crossing: float) -> Channel:
        return Channel(
            size=size,
            latency_seconds=float(latency),
            bytes_per_second=float(1 / slowness) if slowness > 0 else math.inf,
            start_seconds=self.cluster.collective_latency_seconds,
            backend=self.backend,
            between_nodes=float(crossing),
            protocols=self._on_paper,
            scale_gather=self.cluster.operation_scale.get("all_gather", 1.0),
            scale_scatter=self.cluster.operation_scale.get("reduce_scatter", 0.0),
            scale_send=self.cluster.operation_scale.get("send", 1.0),
        )


def _groups_of(mesh: np.ndarray, axis: Axis, context: int, expert: int) -> np.ndarray:
    """The groups of an axis, one a row, those of a pipeline rank together; `mesh`: pipeline x (data context) x tensor.

    A pipeline rank's groups follow each other.
    """
    pipeline, replicas, tensor = mesh.shape
    if axis == "tensor":
        return mesh.reshape(-1, tensor)
    across = mesh.transpose(0, 2, 1)  # pipeline x tensor x replicas
    if axis == "data":
        return across.reshape(-1, replicas)
    if axis == "context":
        return across.reshape(-1, context)
    if axis == "expert":
        return across.reshape(-1, expert)
    return across.reshape(pipeline, tensor, -1, expert).transpose(0, 1, 3, 2).reshape(-1, replicas // expert)


class _Wiring:
    """Routes and rings of a cluster. Nodes of one class are wired alike, down to the switches outside."""

    def __init__(self, cluster: Cluster, *, symmetric: bool, achieved: dict[str, float]) -> None:
        self.cluster = cluster
        links = cluster.links
        self.bytes_per_second = np.array(
            [link.bytes_per_second * achieved.get(link.kind, 1.0) for link in links] or [1.0]
        )
        self.latency_seconds = np.array([link.latency_seconds for link in links] or [0.0])
        names = list(cluster.nodes)
        number = {name: position for position, name in enumerate(names)}
        self.node_of = np.array([number[device.node] for device in cluster.devices])
        self.local_of = np.zeros(len(cluster.devices), dtype=np.int64)
        for positions in cluster.nodes.values():
            self.local_of[list(positions)] = range(len(positions))
        self.widest = max(len(positions) for positions in cluster.nodes.values())
        self._classify(names, number, symmetric)
        self._templates: dict[tuple[int, int, int, int, bool], list[tuple[int, int]] | None] = {}
        self._packings: dict[tuple[int, tuple[int, ...]], list[tuple[tuple[int, ...], float]]] = {}
        self._device_of = {
            (int(node), int(local)): position
            for position, (node, local) in enumerate(zip(self.node_of, self.local_of, strict=True))
        }

    def _classify(self, names: list[str], number: dict[str, int], symmetric: bool) -> None:
        cluster = self.cluster
        where: dict[str, tuple[int, tuple]] = {}  # name → (its node or -1, its name within the node)
        for position, device in enumerate(cluster.devices):
            where[device.name] = (int(self.node_of[position]), ("device", int(self.local_of[position])))
        counts: dict[int, int] = defaultdict(int)
        for switch in cluster.switches:
            node = number.get(switch.node, -1)
            where[switch.name] = (node, ("switch", counts[node]) if node >= 0 else ("outside", switch.name))
            counts[node] += 1
        slots: list[list[tuple]] = [[] for _ in names]
        regular = symmetric
        for position, link in enumerate(cluster.links):
            (source_node, source), (target_node, target) = where[link.source], where[link.target]
            if source_node >= 0 and target_node >= 0 and source_node != target_node:
                regular = False  # a cable from node to node: no two nodes are alike
            for node in {source_node, target_node} - {-1}:
                slots[node].append((source, target, link.bytes_per_second, link.latency_seconds, position))
        classes: dict[tuple, int] = {}
        self.class_of = np.zeros(len(names), dtype=np.int64)
        self.slot_of_link: dict[int, tuple[int, int]] = {}
        tables: list[np.ndarray] = []
        for node, name in enumerate(names):
            ordered = sorted(slots[node], key=lambda slot: (str(slot[0]), str(slot[1]), slot[4]))
            kinds = tuple(cluster.devices[at].accelerator for at in cluster.nodes[name])
            signature = (kinds, tuple(slot[:4] for slot in ordered), None if regular else node)
            self.class_of[node] = classes.setdefault(signature, len(classes))
            tables.append(np.array([slot[4] for slot in ordered], dtype=np.int64))
            for slot, entry in enumerate(ordered):
                self.slot_of_link[entry[4]] = (node, slot)
        width = max((len(table) for table in tables), default=0)
        self.link_of_slot = np.full((len(names), max(width, 1)), -1, dtype=np.int64)
        for node, table in enumerate(tables):
            self.link_of_slot[node, : len(table)] = table
        self.classes = len(classes)

    def links_of(self, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every link of every hop: two arrays, position of the hop and position of the link."""
        source_node, target_node = self.node_of[source], self.node_of[target]
        same = source_node == target_node
        key = self.class_of[source_node] * self.classes + self.class_of[target_node]
        key = (key * 2 + same) * self.widest + self.local_of[source]
        key = key * self.widest + self.local_of[target]
        order = np.argsort(key, kind="stable")
        bounds = np.flatnonzero(np.diff(key[order], prepend=-1))
        hops: list[np.ndarray] = []
        links: list[np.ndarray] = []
        for start, stop in zip(bounds, [*bounds[1:], len(order)], strict=True):
            members = order[start:stop]
            first = int(members[0])
            template = self._template(int(source[first]), int(target[first]))
            if template is None:
                for member in members:
                    route = self._route(int(source[member]), int(target[member]))
                    hops.append(np.full(len(route), member))
                    links.append(np.array(route, dtype=np.int64))
                continue
            for side, slot in template:
                hops.append(members)
                if side == 2:
                    links.append(np.full(len(members), slot))
                else:
                    node = (source_node if side == 0 else target_node)[members]
                    links.append(self.link_of_slot[node, slot])
        if not hops:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(hops), np.concatenate(links)

    def _route(self, source: int, target: int) -> tuple[int, ...]:
        devices = self.cluster.devices
        return self.cluster.route(devices[source].name, devices[target].name)

    def _template(self, source: int, target: int) -> list[tuple[int, int]] | None:
        """The route between two devices in terms that hold for all nodes of their classes, or None if there are none.

        Each link is (0, slot of the source's node), (1, slot of the target's node) or (2, link between switches).
        """
        source_node, target_node = int(self.node_of[source]), int(self.node_of[target])
        key = (
            int(self.class_of[source_node]), int(self.class_of[target_node]),
            int(self.local_of[source]), int(self.local_of[target]), source_node == target_node,
        )  # fmt: skip
        if key in self._templates:
            return self._templates[key]
        template: list[tuple[int, int]] | None = []
        for link in self._route(source, target):
            node, slot = self.slot_of_link.get(link, (-1, link))
            if node == source_node:
                template.append((0, slot))
            elif node == target_node:
                template.append((1, slot))
            elif node == -1:
                template.append((2, link))
            else:
                template = None  # through a third node: which one depends on the pair
                break
        self._templates[key] = template
        return template

    def rings(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rings for each row of `groups` (device positions): the hops' source, target, share of the data, and row."""
        rank = self.node_of[groups] * self.widest + self.local_of[groups]
        groups = np.take_along_axis(groups, np.argsort(rank, axis=1), axis=1)
        node = self.node_of[groups]
        first_of_node = np.diff(node, axis=1, prepend=-1) != 0
        pattern = (self.class_of[node] * self.widest + self.local_of[groups]) * 2 + first_of_node
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for row in range(len(groups)):
            buckets[pattern[row].tobytes()].append(row)
        sources, targets, weights, owners = [], [], [], []
        for rows in buckets.values():
            members = groups[rows]
            for order, weight in self._orders(members[0], first_of_node[rows[0]]):
                ring = members[:, order]
                sources.append(ring.ravel())
                targets.append(np.roll(ring, -1, axis=1).ravel())
                weights.append(np.full(ring.size, weight))
                owners.append(np.repeat(np.array(rows), ring.shape[1]))
        return np.concatenate(sources), np.concatenate(targets), np.concatenate(weights), np.concatenate(owners)

    def _orders(self, group: np.ndarray, first_of_node: np.ndarray) -> list[tuple[np.ndarray, float]]:
        starts = np.flatnonzero(first_of_node)
        stops = np.append(starts[1:], len(group))
        parts = []
        for start, stop in zip(starts, stops, strict=True):
            packing = self._packing(group[start:stop])
            if len(starts) == 1:
                return [(np.array(order), share) for order, share in packing]
            parts.append(start + np.array(packing[0][0]))
        rings = max(len(part) for part in parts)
        if all(len(part) == rings for part in parts):
            # Thousands of nodes, mostly alike: one array of them is turned at once.
            stacked = np.stack(parts)
            return [(np.roll(stacked, -turn, axis=1).ravel(), 1 / rings) for turn in range(rings)]
        return [(np.concatenate([np.roll(part, -turn) for part in parts]), 1 / rings) for turn in range(rings)]

    def _packing(self, members: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
        """Rings through devices of one node: orders (positions in `members`), and each one's share of the data."""
        node = int(self.node_of[members[0]])
        key = (int(self.class_of[node]), tuple(int(local) for local in self.local_of[members]))
        found = self._packings.get(key)
        if found is None:
            found = self._packings[key] = self._pack(members)
        return found

    def _pack(self, members: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
        count = len(members)
        if count == 1:
            return [((0,), 1.0)]
        routes = {
            (a, b): self._route(int(members[a]), int(members[b])) for a in range(count) for b in range(count) if a != b
        }
        hops = sorted({len(route) for route in routes.values()})
        if count > 8 or (hops == [hops[-1]] and hops[0] > 1):
            # Everybody reaches everybody through switches: one ring already fills the devices' own links.
            return [(tuple(range(count)), 1.0)]
        links = {link: float(self.bytes_per_second[link]) for route in routes.values() for link in route}
        # Greedy packing depends on what is tried first: whole widths or single lanes, and which neighbour.
        attempts = [
            _pack_greedily(count, routes, dict(links), lane, prefer)
            for lane in (math.inf, min(links.values()))
            for prefer in ("first", "last", "widest")
        ]
        rings = max(attempts, key=lambda attempt: sum(width for _, width in attempt))
        whole = sum(width for _, width in rings)
        return [(order, width / whole) for order, width in rings]


_Routes = dict[tuple[int, int], tuple[int, ...]]


def _pack_greedily(
    count: int, routes: _Routes, left: dict[int, float], lane: float, prefer: str
) -> list[tuple[tuple[int, ...], float]]:
    """Rings (orders and bytes per second), one after the other on what is `left` of the links, none above `lane`."""
    rings: list[tuple[tuple[int, ...], float]] = []
    longest = 0
    while (found := _widest_ring(count, routes, left, longest, prefer)) is not None:
        order, width = found
        width = min(width, lane)
        path = [routes[pair] for pair in _hops(order)]
        if not rings:
            # Further rings must not take worse routes than the first: NCCL does not mix NVLink with PCIe.
            longest = max(len(route) for route in path)
        for route in path:
            for link in route:
                left[link] -= width
        rings.append((order, width))
    return rings


def _hops(order: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return zip(order, (*order[1:], order[0]), strict=True)


def _widest_ring(
    count: int, routes: _Routes, left: dict[int, float], longest: int, prefer: str
) -> tuple[tuple[int, ...], float] | None:
    """The Hamiltonian cycle whose narrowest hop is widest on what is `left`, by trying the widths from the largest."""
    width = {
        pair: min(left[link] for link in route)
        for pair, route in routes.items()
        if not longest or len(route) <= longest
    }
    smallest = 1e-6 * max(left.values(), default=0.0)
    for threshold in sorted({value for value in width.values() if value > max(smallest, 1.0)}, reverse=True):
        following: dict[int, list[int]] = defaultdict(list)
        for (a, b), value in width.items():
            if value >= threshold:
                following[a].append(b)
        for a, choices in following.items():
            if prefer == "widest":
                choices.sort(key=lambda b: -width[a, b])
            else:
                choices.sort(reverse=prefer == "last")
        order = _hamiltonian_cycle(count, following)
        if order is not None:
            uses = Counter(link for pair in _hops(order) for link in routes[pair])
            # A link that several hops of this ring share gives each its part.
            return order, min(left[link] / times for link, times in uses.items())
    return None


def _hamiltonian_cycle(count: int, following: dict[int, list[int]]) -> tuple[int, ...] | None:
    """A cycle through 0 to `count` - 1 along the arcs `following`, or None."""
    path = [0]
    seen = {0}

    def extend() -> bool:
        if len(path) == count:
            return 0 in following[path[-1]]
        for choice in following[path[-1]]:
            if choice not in seen:
                path.append(choice)
                seen.add(choice)
                if extend():
                    return True
                path.pop()
                seen.remove(choice)
        return False

    return tuple(path) if extend() else None
