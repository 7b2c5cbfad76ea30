"""What collectives cost on the links that they really use.

The alpha-beta model (Hockney 1994; Thakur, Rabenseifner, Gropp, IJHPCA 2005): a message of B bytes takes
alpha + B / bandwidth. Here bandwidth is not a number of the cluster but of a *group of devices at work*: every group
of a mesh axis (all tensor-parallel groups, say) communicates at the same time, each along rings laid over the links;
the load of every link is counted, and a group goes at the pace of its most loaded one. `wiring.py` knows the routes and
rings, `families.py` counts what all groups of an axis load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Literal, NamedTuple, Protocol

import numpy as np

from headway.hardware.cluster import Cluster
from headway.predict.efficiency import DEFAULT, efficiency_of
from headway.predict.families import Families
from headway.predict.orders import Order, Orders
from headway.predict.wiring import Loads, Wiring

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


Seconds = Callable[[float, Channel], float]


def _known_first(kind: str) -> Callable[[Seconds], Seconds]:
    """Of a formula: nothing for a group of one, and what is known of this kind of collective before the formula."""

    def with_known(formula: Seconds) -> Seconds:
        @wraps(formula)
        def seconds(size_bytes: float, channel: Channel) -> float:
            if channel.size <= 1:
                return 0.0
            if channel.known is not None:
                # What is known speaks of the whole tensor; an all-to-all is asked for with one member's.
                whole = size_bytes * channel.size if kind == "all_to_all" else size_bytes
                found = channel.known.seconds(kind, whole)
                if found is not None:
                    return found
            return formula(size_bytes, channel)

        return seconds

    return with_known


@_known_first("all_reduce")
def all_reduce_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group, the result on every member.

    The better of a ring, 2 (n-1) alpha + 2 (n-1)/n B/bandwidth (Patarasuk and Yuan, JPDC 2009), and of NCCL's double
    binary tree, 2 log2(n) alpha + 2 B/bandwidth (Sanders, Speck, Träff, Parallel Computing 2009); gloo has no tree.
    """
    n = channel.size
    ring = channel.seconds(2 * (n - 1), 2 * size_bytes * (n - 1) / n)
    if channel.backend == "nccl" and n > 2:
        return min(ring, channel.seconds(2 * math.ceil(math.log2(n)), 2 * size_bytes))
    return ring


@_known_first("all_gather")
def all_gather_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to put together `size_bytes` (the whole result), of which each member has 1/n: (n-1)/n of it is moved."""
    n = channel.size
    return channel.scale_gather * channel.seconds(n - 1, size_bytes * (n - 1) / n)


@_known_first("reduce_scatter")
def reduce_scatter_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group and leave 1/n of the result on each member.

    The reverse of an all-gather, except that torch's gloo backend reduces everything and throws the rest away.
    """
    n = channel.size
    if channel.backend == "gloo" and not channel.scale_scatter:
        return all_reduce_seconds(size_bytes, channel)
    return (channel.scale_scatter or 1.0) * channel.seconds(n - 1, size_bytes * (n - 1) / n)


@_known_first("broadcast")
def broadcast_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to copy `size_bytes` from one member to all.

    NCCL pipelines along the ring: (n-1) alpha + B/bandwidth. gloo sends whole messages along a binomial tree.
    """
    n = channel.size
    if channel.backend == "gloo":
        rounds = math.ceil(math.log2(n))
        return channel.seconds(rounds, rounds * size_bytes)
    return channel.seconds(n - 1, size_bytes)


@_known_first("reduce")
def reduce_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to sum `size_bytes` over the group, the result on one member.

    NCCL pipelines along the ring, a broadcast backwards: (n-1) alpha + B/bandwidth. gloo reduce-scatters round a ring,
    then every member sends its part to the one: n alpha + 2 (n-1)/n B/bandwidth.
    """
    n = channel.size
    if channel.backend == "gloo":
        return channel.seconds(n, 2 * size_bytes * (n - 1) / n)
    return channel.seconds(n - 1, size_bytes)


@_known_first("all_to_all")
def all_to_all_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds for every member to hand 1/n of its `size_bytes` to each other member, all pairs at once.

    For a channel of the axis "expert", whose pace counts the pairs' loads.
    """
    n = channel.size
    return channel.seconds(n - 1, size_bytes)


@_known_first("send")
def send_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to send `size_bytes` from one device to another."""
    # A message starts no collective.
    return channel.scale_send * channel._replace(start_seconds=0.0).seconds(1, size_bytes)


class Communication:
    """Channels of every axis of a device mesh on one cluster, memoised by mesh.

    Nodes that are wired alike share one table of routes, so that 16,384 devices cost about as much to route as 16, and
    loads are counted on as few of them as tell the whole (`Families`). `symmetric=False` routes every pair by itself
    and counts every group (the tests compare the two). `known`: times that go before the formulas, wherever it knows
    them.
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
        self.orders = Orders(cluster)
        self._wiring = Wiring(cluster, symmetric=symmetric, achieved=achieved)
        self._families = Families(self._wiring)
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
        order = self.orders.of(devices)
        key = (order.number, pipeline, data, tensor, axis, context, expert)
        found = self._channels.get(key)
        if found is None:
            if axis == "pipeline":
                found = self._along(order, pipeline)
            else:
                found = self._groups(order, pipeline, *_family(axis, data * context, tensor, context, expert), axis)
            if self.known is not None and found[0].size > 1:
                known = self.known.place(devices, *key[1:])
                made = {channel: channel._replace(known=known) for channel in set(found)}
                found = tuple(made[channel] for channel in found)
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
            one, two = self.orders.of(sources).positions, self.orders.of(targets).positions
            at = np.arange(count)
            source, target = one[at * len(one) // count], two[at * len(two) // count]
            loads, _ = self._wiring.loads(source, target, np.ones(count), np.zeros(count, dtype=np.int64), 1)
            found = self._channels[key] = (self._channel(2, *(float(figure[0]) for figure in loads)),)
        return found[0]

    def _along(self, order: Order, pipeline: int) -> tuple[Channel, ...]:
        if pipeline == 1:
            return (Channel(backend=self.backend),)
        return self._shared(2, self._families.along(order, pipeline))

    def _groups(self, order: Order, pipeline: int, stride: int, size: int, axis: Axis) -> tuple[Channel, ...]:
        if size == 1:
            return (Channel(backend=self.backend),) * pipeline
        loads = self._families.groups(order, stride, size, pairwise=axis == "expert")
        # Blocks of one pipeline rank follow each other; a family that was worked out in part repeats.
        blocks = len(order.positions) // (stride * size)
        if blocks // pipeline % len(loads.slowness) == 0:
            return self._shared(size, Loads(*(figure.max(keepdims=True) for figure in loads))) * pipeline
        place = np.arange(blocks) % len(loads.slowness)
        return self._shared(size, Loads(*(figure[place].reshape(pipeline, -1).max(axis=1) for figure in loads)))

    def _shared(self, size: int, loads: Loads) -> tuple[Channel, ...]:
        """A channel for each owner of `loads`; equal ones are one value."""
        rows = list(zip(*(figure.tolist() for figure in loads), strict=True))
        made = {row: self._channel(size, *row) for row in set(rows)}
        return tuple(made[row] for row in rows)

    def _channel(self, size: int, slowness: float, latency: float, crossing: float) -> Channel:
        return Channel(
            size=size,
            latency_seconds=latency,
            bytes_per_second=1 / slowness if slowness > 0 else math.inf,
            start_seconds=self.cluster.collective_latency_seconds,
            backend=self.backend,
            between_nodes=crossing,
            protocols=self._on_paper,
            scale_gather=self.cluster.operation_scale.get("all_gather", 1.0),
            scale_scatter=self.cluster.operation_scale.get("reduce_scatter", 0.0),
            scale_send=self.cluster.operation_scale.get("send", 1.0),
        )


def _family(axis: Axis, replicas: int, tensor: int, context: int, expert: int) -> tuple[int, int]:
    """Stride and size of the groups of an axis, in ranks; `replicas`: data x context."""
    if axis == "tensor":
        return 1, tensor
    if axis == "data":
        return tensor, replicas
    if axis == "context":
        return tensor, context
    if axis == "expert":
        return tensor, expert
    return tensor * expert, replicas // expert
