"""Machines as a directed graph: devices and switches, and the links between them.

A `Device` computes and has memory. A `Switch` only passes data on (NVSwitch, a PCIe root, a NIC, a rack switch).
A `Link` goes one way; the two directions of a cable are two links. Devices of different kinds may stand in one
cluster, and in one node: nothing here assumes that two of them are alike.
"""

from __future__ import annotations

import difflib
import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property

import msgspec

from headway.errors import ClusterError, DisconnectedError
from headway.value import Value

__all__ = ["Accelerator", "Cluster", "Device", "Link", "Switch"]


class Accelerator(Value):
    """A kind of device: what one of them can do, and what it costs.

    `flop_per_second` maps a dtype ("float32", "bfloat16", …) to the dense peak, or, for a probed machine, to what a
    large matrix product achieves. `efficiency` is the share of that peak which large matrix products reach (1.0 when
    the figure was measured), `memory_efficiency` likewise for streaming operators.
    """

    name: str
    flop_per_second: dict[str, float]
    memory_bytes: float
    memory_bytes_per_second: float
    efficiency: float = 1.0
    memory_efficiency: float = 1.0
    launch_seconds: float = 0.0  # fixed cost of starting one operator
    power_watts: float = 0.0  # 0: not known
    dollars_per_hour: float = 0.0  # 0: not known
    torch_device: str = "cuda"  # "cuda" or "cpu": where the runtime puts tensors
    threads: int = 0  # CPU threads of one rank; 0: torch's own choice
    source: str = ""  # where the figures are from

    def flop_rate(self, dtype: str) -> float:
        """Peak FLOP per second in `dtype`; an unlisted dtype runs at the rate of float32."""
        rate = self.flop_per_second.get(dtype) or self.flop_per_second.get("float32")
        return rate if rate else max(self.flop_per_second.values())


class Device(Value):
    """One device: its name is unique in the cluster, `accelerator` names its kind, `node` the machine it sits in."""

    name: str
    accelerator: str
    node: str


class Switch(Value):
    """Something that passes data on: NVSwitch, PCIe switch, NIC (of `node`), or a network switch (node "")."""

    name: str
    node: str = ""


class Link(Value):
    """A one-way connection between two devices or switches."""

    source: str
    target: str
    bytes_per_second: float
    latency_seconds: float = 0.0
    kind: str = ""  # "nvlink", "pcie", "network", "shared memory", …


class Cluster(Value):
    """Devices, switches and directed links. Construct it, then `validate()`; presets and files come validated."""

    name: str
    accelerators: dict[str, Accelerator]
    devices: tuple[Device, ...]
    switches: tuple[Switch, ...] = ()
    links: tuple[Link, ...] = ()
    fingerprint: str = ""  # of the hardware that was probed; empty for a description
    # What starting one collective costs beyond the links' own latency. On a probed machine this, and the bandwidth of
    # the links, are fitted to measured all-reduces by the closed form of a ring.
    collective_latency_seconds: float = 0.0
    # Measured time of another operation ("all_gather", "reduce_scatter", "send") over what the closed form gives with
    # the figures fitted to all-reduce; an operation that is not listed: 1.
    operation_scale: dict[str, float] = {}
    contention: float = 1.0  # slowdown of compute when every device of a node computes at once (shared cache, memory)
    memory_contention: float = 1.0  # likewise of streaming operators, against `memory_bytes_per_second` alone

    def __len__(self) -> int:
        return len(self.devices)

    @cached_property
    def _index(self) -> dict[str, int]:
        names = [device.name for device in self.devices] + [switch.name for switch in self.switches]
        return {name: index for index, name in enumerate(names)}

    @cached_property
    def _node_of(self) -> dict[str, str]:
        return {thing.name: thing.node for thing in (*self.devices, *self.switches)}

    @cached_property
    def _sources(self) -> tuple[list[int], list[int]]:
        """The index of each link's source, and the links by that: a list for each of thousands of things costs more."""
        sources = [self._index[link.source] for link in self.links]
        return sources, sorted(range(len(sources)), key=sources.__getitem__)

    @cached_property
    def _leaving(self) -> dict[str, dict[str, list[int]]]:
        return {}

    def _leaving_from(self, name: str) -> dict[str, list[int]]:
        """Links out of a device or switch, by the node that they lead to.

        A network switch has thousands of links, and a route needs two nodes'.
        """
        found = self._leaving.get(name)
        if found is None:
            found = self._leaving[name] = {}
            sources, by_source = self._sources
            at = self._index[name]
            first = bisect_left(by_source, at, key=sources.__getitem__)
            for position in by_source[first : bisect_right(by_source, at, lo=first, key=sources.__getitem__)]:
                found.setdefault(self._node_of[self.links[position].target], []).append(position)
        return found

    @cached_property
    def _turn(self) -> dict[str, int]:
        return {
            self.devices[position].name: turn
            for positions in self.nodes.values()
            for turn, position in enumerate(positions)
        }

    @cached_property
    def _routes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        return {}

    @cached_property
    def nodes(self) -> dict[str, tuple[int, ...]]:
        """Node name to the positions of its devices, in the order of `devices`."""
        nodes: dict[str, list[int]] = {}
        for position, device in enumerate(self.devices):
            nodes.setdefault(device.node, []).append(position)
        return {name: tuple(positions) for name, positions in nodes.items()}

    def accelerator_of(self, position: int) -> Accelerator:
        """The kind of the device at `position` in `devices`."""
        return self.accelerators[self.devices[position].accelerator]

    @property
    def is_homogeneous(self) -> bool:
        """Whether all devices are of one kind."""
        return len({device.accelerator for device in self.devices}) == 1

    def validate(self, *, place: str = "") -> Cluster:
        """This cluster, or ClusterError: duplicate names, links to nowhere, no bandwidth, unknown kinds of device."""
        place = place or self.name
        if not self.devices:
            raise ClusterError("no devices", place=place, remedy="list at least one device")
        seen: set[str] = set()
        for thing in (*self.devices, *self.switches):
            if thing.name in seen:
                raise ClusterError(f"two things are named {thing.name!r}", place=place, remedy="give each its own name")
            seen.add(thing.name)
        for position, device in enumerate(self.devices):
            if device.accelerator not in self.accelerators:
                known = ", ".join(sorted(self.accelerators)) or "none"
                raise ClusterError(
                    f"device {device.name!r} is of unknown kind {device.accelerator!r}",
                    place=f"{place}: devices[{position}].accelerator",
                    remedy=f"one of: {known}",
                )
        for key, accelerator in self.accelerators.items():
            where = f"{place}: accelerators.{key}"
            rates = accelerator.flop_per_second.values()
            if not rates or not all(0 < rate < math.inf for rate in rates):
                raise ClusterError(
                    "FLOP/s must be a positive number for at least one dtype",
                    place=f"{where}.flop_per_second",
                    remedy="give what the device does in float32, say",
                )
            for field in ("memory_bytes", "memory_bytes_per_second", "efficiency", "memory_efficiency"):
                if not 0 < getattr(accelerator, field) < math.inf:
                    raise ClusterError(
                        f"must be a positive number, not {getattr(accelerator, field):g}", place=f"{where}.{field}"
                    )
            for field in ("launch_seconds", "power_watts", "dollars_per_hour", "threads"):
                if not 0 <= getattr(accelerator, field) < math.inf:
                    raise ClusterError(
                        "must not be negative", place=f"{where}.{field}", remedy="write 0 where it is not known"
                    )
        for position, link in enumerate(self.links):
            if (
                link.source in seen
                and link.target in seen
                and 0 < link.bytes_per_second < math.inf
                and 0 <= link.latency_seconds < math.inf
                and link.source != link.target
            ):
                continue
            self._refuse(link, seen, f"{place}: links[{position}] ({link.source} -> {link.target})")
        return self

    @staticmethod
    def _refuse(link: Link, known: set[str], where: str) -> None:
        for end in (link.source, link.target):
            if end not in known:
                close = difflib.get_close_matches(end, known, n=1)
                raise ClusterError(
                    f"goes to {end!r}, which is neither a device nor a switch",
                    place=where,
                    remedy=f"did you mean {close[0]!r}?" if close else "name a device or a switch of this cluster",
                )
        if link.source == link.target:
            raise ClusterError("joins a thing to itself", place=where, remedy="remove the link")
        if not 0 < link.bytes_per_second < math.inf:
            raise ClusterError(
                f"bandwidth must be more than zero, not {link.bytes_per_second:g}",
                place=where,
                remedy="remove the link if it is down",
            )
        raise ClusterError(
            f"latency must not be negative: {link.latency_seconds:g}", place=where, remedy="write 0 if it is not known"
        )

    def route(self, source: str, target: str) -> tuple[int, ...]:
        """Positions in `links` along the best path from one device to another: fewest hops, then the widest.

        Data passes through a third device, or a third node, only where nothing else leads there. Among paths that
        are equal in all this, the devices of a node take turns, so that two GPUs at one PCIe switch use its two NICs.
        The first call for a pair searches the two nodes and the network between them; later calls look it up.
        Raises DisconnectedError, and ClusterError for a name that is not there.
        """
        key = (source, target)
        found = self._routes.get(key)
        if found is None:
            for name in key:
                if name not in self._index:
                    raise ClusterError(f"no device is named {name!r}", place=self.name)
            # Without a detour first: through a third node only where nothing else leads there.
            nodes = tuple(dict.fromkeys((self._node_of[source], self._node_of[target], "")))
            found = self._search(source, target, nodes)
            if found is None:
                found = self._search(source, target, None)
            if found is None:
                raise DisconnectedError(
                    f"no path from {source} to {target}",
                    place=self.name,
                    remedy="add the missing links, or leave a device out",
                )
            self._routes[key] = found
        return found

    def _search(self, source: str, target: str, nodes: tuple[str, ...] | None) -> tuple[int, ...] | None:
        """Dijkstra's search in lexicographic order of (devices passed through, hops, slowest link), inside `nodes`."""
        count = len(self.devices)
        best: dict[str, tuple[int, int, float]] = {source: (0, 0, 0.0)}
        arrivals: dict[str, list[int]] = {}  # links that reach a thing at its best cost
        queue: list[tuple[tuple[int, int, float], str]] = [(best[source], source)]
        done: set[str] = set()
        while queue:
            cost, name = heapq.heappop(queue)
            if name == target:
                break
            if name in done:
                continue
            done.add(name)
            passed, hops, slowness = cost
            passed += self._index[name] < count and name != source
            leaving = self._leaving_from(name)
            for node in leaving if nodes is None else nodes:
                for position in leaving.get(node, ()):
                    link = self.links[position]
                    if link.target in done:
                        continue
                    reached = (passed, hops + 1, max(slowness, 1.0 / link.bytes_per_second))
                    known = best.get(link.target)
                    if known is None or reached < known:
                        best[link.target] = reached
                        arrivals[link.target] = [position]
                        heapq.heappush(queue, (reached, link.target))
                    elif reached == known:
                        arrivals[link.target].append(position)
        else:
            return None
        path: list[int] = []
        name = target
        while name != source:
            choices = sorted(arrivals[name])
            # Equal choices beside an end of the path fall to that end's devices in turn.
            near = source if self._node_of[self.links[choices[0]].source] == self._node_of[source] else target
            path.append(choices[self._turn.get(near, 0) % len(choices)])
            name = self.links[path[-1]].source
        return tuple(reversed(path))

    def select(self, text: str, *, place: str = "--devices") -> tuple[str, ...]:
        """Names of the devices that `text` lists by position or by name: `"0,1,4"`, `"0-3,node1/gpu0"`.

        Raises ClusterError for one that is not there, or is listed twice.
        """
        chosen: list[str] = []
        for word in (word.strip() for word in text.split(",")):
            first, dash, last = word.partition("-")
            if word.isdecimal():
                positions = range(int(word), int(word) + 1)
            elif dash and first.isdecimal() and last.isdecimal():
                positions = range(int(first), int(last) + 1)
            else:
                if self._index.get(word, len(self.devices)) >= len(self.devices):
                    close = difflib.get_close_matches(word, [device.name for device in self.devices], n=1, cutoff=0)
                    raise ClusterError(
                        f"no device is named {word!r}",
                        place=place,
                        remedy=f"write positions (0,1,4) or names ({close[0]})",
                    )
                chosen.append(word)
                continue
            if not positions or positions[-1] >= len(self.devices):
                raise ClusterError(
                    f"{word!r} is not in this cluster",
                    place=place,
                    remedy=f"positions are 0 to {len(self.devices) - 1}",
                )
            chosen.extend(self.devices[position].name for position in positions)
        for position, name in enumerate(chosen):
            if name in chosen[:position]:
                raise ClusterError(f"device {name!r} is listed twice", place=place, remedy="list each once")
        return tuple(chosen)

    def subset(self, names: Iterable[str] | int) -> Cluster:
        """The cluster with only these devices (or the first so many); switches and links that serve them stay.

        Raises ClusterError for a name that is not there.
        """
        if isinstance(names, int):
            if not 0 < names <= len(self.devices):
                raise ClusterError(
                    f"{names} devices asked for, and there are {len(self.devices)}",
                    place=self.name,
                    remedy="ask for fewer devices, or describe more with --cluster",
                )
            chosen: Sequence[str] = [device.name for device in self.devices[:names]]
        else:
            chosen = list(names)
        for name in chosen:
            if self._index.get(name, len(self.devices)) >= len(self.devices):
                raise ClusterError(f"no device is named {name!r}", place=self.name)
        if len(chosen) == len(self.devices):
            return self
        keep = set(chosen)
        nodes = {device.node for device in self.devices if device.name in keep}
        gone = {device.name for device in self.devices if device.name not in keep}
        gone |= {switch.name for switch in self.switches if switch.node and switch.node not in nodes}
        devices = tuple(device for device in self.devices if device.name in keep)
        kinds = {device.accelerator for device in devices}
        return msgspec.structs.replace(
            self,
            devices=devices,
            accelerators={name: kind for name, kind in self.accelerators.items() if name in kinds},
            switches=tuple(switch for switch in self.switches if switch.name not in gone),
            links=tuple(link for link in self.links if link.source not in gone and link.target not in gone),
        )
