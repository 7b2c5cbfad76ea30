"""A network in virtual time: messages flow over paths of directed links and share them max-min fairly.

A message leaves when it is sent, as a fluid: at each moment it has one rate on all links of its path (data passes a
switch as it comes in), and the rates are what `simulate.sharing` gives: max-min fair, weighted if weights are given.
When its last byte has left (`Flow.sent`), it takes the latency of the path until that byte arrives, which is when the
`Flow` itself happens. `Conditions` adds what real networks cost beyond bandwidth and latency; all of it is off unless
asked for.

Links of a cluster with the same ends are one link here, with the sum of their bandwidths and the larger latency.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from headway.errors import ClusterError, InputError
from headway.hardware.cluster import Cluster
from headway.simulate.engine import Engine, Event, Timer
from headway.simulate.shares import Shares, add_path, grown, new_shares
from headway.simulate.sharing import TOGETHER, add_and_refill, cancel_flow, change_capacity, complete
from headway.value import Value

__all__ = ["Conditions", "Flow", "LinkChange", "Links", "Network"]


class Conditions(Value):
    """What a network costs beyond the bandwidth and the latency of its links.

    `hop_seconds` are added to the latency for every link of a path (a switch that decides where a packet goes).
    `message_seconds` pass before the first byte of a message leaves (software, doorbells, handshakes).

    `loss` is the share of packets that each link loses. A lost packet is sent again over that link, so it carries
    1 - loss of its bandwidth as payload: the expectation, not a draw, so that a run needs no seed and equal messages
    stay equal.

    Congestion: a link that more than `congestion_free_flows` messages share loses `congestion_share` of its bandwidth
    for each one more, down to `congestion_floor` of it. That is the shape which incast and the detection of collisions
    give a link's throughput; the share is to be measured.
    """

    hop_seconds: float = 0.0
    message_seconds: float = 0.0
    loss: float = 0.0
    congestion_free_flows: int = 1
    congestion_share: float = 0.0
    congestion_floor: float = 0.5

    def validate(self, *, place: str = "conditions") -> Conditions:
        """These conditions, or InputError naming the field."""
        for field in ("hop_seconds", "message_seconds", "congestion_free_flows", "congestion_share"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError("must be 0 or more", place=f"{place}.{field}", remedy="write 0 to leave it out")
        if not 0 <= self.loss < 1:
            raise InputError(
                f"a loss of {self.loss:g}", place=f"{place}.loss", remedy="give a share, 0 or more, below 1"
            )
        if not 0 < self.congestion_floor <= 1:
            raise InputError(
                f"must be a share, not {self.congestion_floor:g}", place=f"{place}.congestion_floor", remedy="0 to 1"
            )
        return self

    @cached_property
    def congestion(self) -> tuple[float, float, float]:
        """The congestion model, as `simulate.sharing` wants it."""
        return (float(self.congestion_free_flows), self.congestion_share, self.congestion_floor)


class LinkChange(Value):
    """At `seconds`, the link from `source` to `target` goes on with `scale` of its bandwidth: 0 is down, 1 as built."""

    seconds: float
    source: str
    target: str
    scale: float

    def validate(self, *, place: str = "") -> LinkChange:
        """This change, or InputError for a time or a scale that cannot be."""
        if not (0 <= self.seconds < math.inf and 0 <= self.scale < math.inf):
            raise InputError(
                f"a change at {self.seconds:g} s to {self.scale:g} times the bandwidth",
                place=place or f"link {self.source} -> {self.target}",
                remedy="give a time of 0 or more, and 0 for a link that is down",
            )
        return self


class Links:
    """The links of a cluster by number; those with the same ends are one."""

    def __init__(self, cluster: Cluster, conditions: Conditions) -> None:
        self.cluster = cluster
        self.conditions = conditions
        self.number: dict[tuple[str, str], int] = {}
        rates: list[float] = []
        latencies: list[float] = []
        for link in cluster.links:
            key = (link.source, link.target)
            at = self.number.setdefault(key, len(rates))
            if at == len(rates):
                rates.append(0.0)
                latencies.append(0.0)
            rates[at] += link.bytes_per_second
            latencies[at] = max(latencies[at], link.latency_seconds)
        self.names = tuple(self.number)
        self.bytes_per_second = np.array(rates, dtype=np.float64)
        self.payload_per_second = self.bytes_per_second * (1 - conditions.loss)
        self.latency_seconds = np.array(latencies, dtype=np.float64) + conditions.hop_seconds

    def find(self, source: str, target: str, *, place: str = "") -> int:
        """The number of a link. Raises ClusterError if there is none."""
        found = self.number.get((source, target))
        if found is None:
            raise ClusterError(
                f"no link leads from {source} to {target}",
                place=place or self.cluster.name,
                remedy="use a program or a path that was made for this cluster",
            )
        return found

    def along(self, path: Sequence[str], *, place: str = "") -> tuple[int, ...]:
        """The numbers of the links along the things named in `path`. Raises ClusterError where there is none."""
        return tuple(self.find(*ends, place=place) for ends in itertools.pairwise(path))

    def latency(self, links: Sequence[int]) -> float:
        """Seconds from the last byte's leaving to its arrival."""
        return float(sum(self.latency_seconds[link] for link in links))


class Flow(Event):
    """A message on its way; as an event, the arrival of its last byte. `sent` happens when that byte leaves."""

    __slots__ = ("_number", "_path", "_serial", "is_stalled", "network", "sent", "size_bytes", "weight")

    def __init__(self, network: Network, name: str, path: int, serial: int, size_bytes: float, weight: float) -> None:
        super().__init__(network.engine, name)
        self.network = network
        self.sent = Event(network.engine, f"{name} sent")
        self.size_bytes = size_bytes
        self.weight = weight
        self.is_stalled = False  # a link on its path is down
        self._path = path
        self._serial = serial
        self._number = -1  # in the shares; -1: not flowing

    @property
    def path(self) -> tuple[str, ...]:
        """What it passes, both ends included."""
        return self.network._paths[self._path].names

    @property
    def bytes_per_second(self) -> float:
        """Its rate at this moment, once everything at this instant has settled."""
        if self._number < 0:
            return 0.0
        return float(self.network._shares.paths["level"][self._path]) * self.weight

    @property
    def remaining_bytes(self) -> float:
        """What has not left yet."""
        return self.network._remaining(self)

    def cancel(self) -> float:
        """Take it off the network; how many bytes had not left. Neither `sent` nor the arrival will happen then.

        A message that has left arrives all the same.
        """
        return self.network._cancel(self)


class _Path:
    """A path that has been used: its links and latency."""

    def __init__(self, names: tuple[str, ...], links: tuple[int, ...], latency_seconds: float) -> None:
        self.names = names
        self.links = links
        self.latency_seconds = latency_seconds


class Network:
    """The links of `cluster`, shared by what is sent over them in the virtual time of `engine`.

    Everything that is sent, ends or changes at one instant is taken into account at once, when the instant has settled,
    and only those flows get a new rate that it concerns. `on_stall` is called with each flow that stops because a link
    on its path is down; it goes on by itself when the link does, unless it is cancelled.
    """

    def __init__(
        self,
        engine: Engine,
        cluster: Cluster,
        *,
        conditions: Conditions | None = None,
        on_stall: Callable[[Flow], object] | None = None,
    ) -> None:
        self.engine = engine
        self.conditions = (conditions or Conditions()).validate()
        self.links = Links(cluster, self.conditions)
        self.on_stall = on_stall
        self.flows_ended = 0
        self._shares: Shares = new_shares(
            self.links.payload_per_second, paths=64, slots=256, flows=64, congestion=self.conditions.congestion
        )
        self._slots = 0
        self._paths: list[_Path] = []
        self._path_of: dict[tuple[str, ...], int] = {}
        self._flowing: dict[int, Flow] = {}  # by number
        self._free: list[int] = list(range(63, -1, -1))
        self._serials = itertools.count()
        self._starting: list[Flow] = []
        self._down: set[int] = set()
        self._has_gone_down = False  # since the last report
        self._timer: Timer | None = None
        self._due = math.inf
        self._is_unsettled = False

    def route(self, source: str, target: str) -> tuple[str, ...]:
        """What the best path from one device to another passes. Raises DisconnectedError."""
        links = self.links.cluster.route(source, target)
        return (source, *(self.links.cluster.links[link].target for link in links))

    def send(self, path: Sequence[str], size_bytes: float, *, weight: float = 1.0, name: str = "") -> Flow:
        """Send a message along `path` (devices and switches, both ends included), from now on.

        It gets `weight` times the share of a flow of weight 1. Raises ClusterError where no link joins two neighbours
        in the path, InputError for a size or a weight that cannot be.
        """
        if not (0 <= size_bytes < math.inf and 0 < weight < math.inf):
            raise InputError(
                f"a message of {size_bytes:g} bytes with weight {weight:g}",
                place=name,
                remedy="give a size of 0 or more, and a weight above 0",
            )
        names = tuple(path)
        known = self._path_of.get(names)
        if known is None:
            known = self._learn(names)
        flow = Flow(self, name or f"{names[0]} to {names[-1]}", known, next(self._serials), size_bytes, weight)
        if not self._paths[known].links:
            # From a device to itself: nothing to pass.
            self.engine.call_later(self.conditions.message_seconds, self._has_left, flow)
        elif self.conditions.message_seconds:
            self.engine.call_later(self.conditions.message_seconds, self._start, flow)
        else:
            self._start(flow)
        return flow

    def change(self, source: str, target: str, scale: float) -> None:
        """From now on, a link has `scale` of its bandwidth; 0: it is down. Raises ClusterError, InputError."""
        self._apply(LinkChange(seconds=self.engine.now, source=source, target=target, scale=scale))

    def schedule(self, changes: Iterable[LinkChange]) -> None:
        """Let these changes happen in time. Raises ClusterError for a link, InputError for a time that cannot be."""
        for each in changes:
            self.links.find(each.source, each.target)
            self.engine.call_at(each.validate().seconds, self._apply, each)

    def stalled(self) -> tuple[Flow, ...]:
        """The flows that wait for a link which is down, in the order of sending."""
        return tuple(
            sorted((flow for flow in self._flowing.values() if flow.is_stalled), key=lambda flow: flow._serial)
        )

    def load(self, source: str, target: str) -> float:
        """Bytes per second that a link carries at this moment, once everything at this instant has settled."""
        link = self.links.find(source, target)
        levels, weights = self._shares.paths["level"], self._shares.paths["weight"]
        return float(
            sum(
                levels[number] * weights[number] * path.links.count(link)
                for number, path in enumerate(self._paths)
                if link in path.links
            )
        )

    def _in_order(self) -> list[Flow]:
        return sorted(self._flowing.values(), key=lambda flow: flow._serial)

    def _learn(self, names: tuple[str, ...]) -> int:
        links = self.links.along(names)
        self._slots += len(links)
        self._shares = grown(self._shares, paths=len(self._paths) + 1, slots=self._slots, flows=0)
        number = add_path(self._shares, links)
        self._paths.append(_Path(names, links, self.links.latency(links)))
        self._path_of[names] = number
        return number

    def _start(self, flow: Flow) -> None:
        if flow._serial < 0:  # cancelled before its first byte
            return
        if not self._free:
            before = len(self._shares.flows)
            self._shares = grown(self._shares, paths=0, slots=0, flows=2 * before)
            self._free.extend(range(len(self._shares.flows) - 1, before - 1, -1))
        flow._number = self._free.pop()
        self._flowing[flow._number] = flow
        self._starting.append(flow)
        self._unsettle()

    def _unsettle(self) -> None:
        if not self._is_unsettled:
            self._is_unsettled = True
            self.engine.when_settled(self._settle)

    def _settle(self) -> None:
        self._is_unsettled = False
        starting, self._starting = self._starting, []
        count = len(starting)
        due = add_and_refill(
            self._shares,
            np.fromiter((flow._number for flow in starting), np.int64, count),
            np.fromiter((flow._path for flow in starting), np.int64, count),
            np.fromiter((flow.size_bytes for flow in starting), np.float64, count),
            np.fromiter((flow.weight for flow in starting), np.float64, count),
            self.engine.now,
        )
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due = due
        if due < math.inf:
            self._timer = self.engine.call_at(due, self._end)
        if self._down:
            self._report(starting)

    def _end(self) -> None:
        self._timer = None
        count = complete(self._shares, self.engine.now)
        numbers = self._shares.flows["done"][:count].tolist()
        self._free.extend(numbers)
        ended = [self._flowing.pop(number) for number in numbers]
        if count > 1:
            ended.sort(key=lambda flow: flow._serial)
        self.flows_ended += count
        for flow in ended:
            self._has_left(flow)
        self._unsettle()

    def _has_left(self, flow: Flow) -> None:
        if flow._serial < 0:
            return
        flow._number = -1
        flow.is_stalled = False
        flow.sent.succeed()
        latency = self._paths[flow._path].latency_seconds
        if latency:
            self.engine.call_later(latency, flow.succeed)
        else:
            flow.succeed()

    def _cancel(self, flow: Flow) -> float:
        if flow.sent.happened or flow._serial < 0:
            return 0.0
        flow._serial = -1
        number, flow._number = flow._number, -1
        if number < 0:
            return flow.size_bytes
        del self._flowing[number]
        self._free.append(number)
        self._unsettle()
        if flow in self._starting:
            self._starting.remove(flow)
            return flow.size_bytes
        return cancel_flow(self._shares, number, self.engine.now)

    def _remaining(self, flow: Flow) -> float:
        if flow.sent.happened or flow._serial < 0:
            return 0.0
        if flow._number < 0 or flow in self._starting:
            return flow.size_bytes
        queue = self._shares.queues[flow._path]
        level = self._shares.paths["level"][flow._path]
        served = queue["service"] + level * (self.engine.now - queue["updated"])
        return max(0.0, float(self._shares.flows["threshold"][flow._number] - served)) * flow.weight

    def _apply(self, change: LinkChange) -> None:
        change.validate()
        if self._timer is not None and self._due <= self.engine.now * (1 + TOGETHER):
            # What is through at this very moment, but for rounding, must not wait for the link to come back.
            self._timer.cancel()
            self._end()
        link = self.links.find(change.source, change.target)
        change_capacity(self._shares, link, float(self.links.payload_per_second[link]) * change.scale)
        if change.scale:
            self._down.discard(link)
            for flow in self._flowing.values():
                flow.is_stalled = flow.is_stalled and not self._down.isdisjoint(self._paths[flow._path].links)
        else:
            self._down.add(link)
            self._has_gone_down = True
        self._unsettle()

    def _report(self, starting: list[Flow]) -> None:
        """Tell who has come to a stop, in the order of sending."""
        candidates = self._in_order() if self._has_gone_down else starting
        self._has_gone_down = False
        for flow in candidates:
            if flow._number >= 0 and not flow.is_stalled and not self._down.isdisjoint(self._paths[flow._path].links):
                flow.is_stalled = True
                if self.on_stall is not None:
                    self.on_stall(flow)
