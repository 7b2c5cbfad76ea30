"""Routes and rings on the links of a cluster: which links each hop of a group takes, and in which order they go round.

Rings keep the devices of a node adjacent, as NCCL lays them. A group with k devices in each of several nodes gets k
rings, each leaving a node at another device, so that all network interfaces carry. Inside a node whose devices are
wired directly (DGX-1) as many edge-disjoint rings are packed as the links allow, greedily by the widest bottleneck.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from headway.hardware.cluster import Cluster

__all__ = ["Loads", "Wiring"]


class Loads(NamedTuple):
    """What hops at work together do to the links, for each owner of hops.

    `slowness`: seconds per byte on its most loaded link. `latency`: mean seconds of a hop. `crossing`: the share of
    its hops that leave a node.
    """

    slowness: np.ndarray
    latency: np.ndarray
    crossing: np.ndarray


class Wiring:
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
                rate = float(self.bytes_per_second[position])
                slots[node].append((source, target, rate, link.latency_seconds, position))
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

    def loads(
        self, source: np.ndarray, target: np.ndarray, weight: np.ndarray, owner: np.ndarray, owners: int
    ) -> tuple[Loads, bool]:
        """Loads of hops that are all at work, `weight` the share of the data that each carries, for each owner of hops.

        And whether they pass no other links than those of a hop's own two nodes.
        """
        hop, link, is_own = self.links_of(source, target)
        load = np.bincount(link, weights=weight[hop], minlength=len(self.bytes_per_second))
        seconds_per_byte = load[link] / self.bytes_per_second[link]
        slowness = np.zeros(owners)
        np.maximum.at(slowness, owner[hop], seconds_per_byte)
        hop_latency = np.bincount(hop, weights=self.latency_seconds[link], minlength=len(source))
        hops = np.maximum(np.bincount(owner, weights=weight, minlength=owners), 1e-30)
        latency = np.bincount(owner, weights=hop_latency * weight, minlength=owners) / hops
        leaves = self.node_of[source] != self.node_of[target]
        crossing = np.bincount(owner, weights=leaves * weight, minlength=owners) / hops
        return Loads(slowness, latency, crossing), is_own

    def links_of(self, source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Every link of every hop: position of the hop, position of the link; and whether all are of its own nodes."""
        source_node, target_node = self.node_of[source], self.node_of[target]
        same = source_node == target_node
        key = self.class_of[source_node] * self.classes + self.class_of[target_node]
        key = (key * 2 + same) * self.widest + self.local_of[source]
        key = key * self.widest + self.local_of[target]
        order = np.argsort(key, kind="stable")
        bounds = np.flatnonzero(np.diff(key[order], prepend=-1))
        hops: list[np.ndarray] = []
        links: list[np.ndarray] = []
        is_own = True
        for start, stop in zip(bounds, [*bounds[1:], len(order)], strict=True):
            members = order[start:stop]
            first = int(members[0])
            template = self._template(int(source[first]), int(target[first]))
            if template is None:
                is_own = False
                for member in members:
                    route = self._route(int(source[member]), int(target[member]))
                    hops.append(np.full(len(route), member))
                    links.append(np.array(route, dtype=np.int64))
                continue
            for side, slot in template:
                hops.append(members)
                if side == 2:
                    is_own = False
                    links.append(np.full(len(members), slot))
                else:
                    node = (source_node if side == 0 else target_node)[members]
                    links.append(self.link_of_slot[node, slot])
        if not hops:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), is_own
        return np.concatenate(hops), np.concatenate(links), is_own

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
