"""A switch that adds up what passes through it, beside rings and parameter servers.

The switch has memory for few segments and handles so many packets a second; links have a rate, a latency and losses.
`simulate_switch` drives the very machines that `exchange.aggregation` runs on UDP (`collective.aggregator` and
`collective.aggregation_worker`), packet by packet, so what it shows is what the protocol does. That is a few ten
thousand packets a second of ours; `predict_switch` is the closed form for what is larger, where nothing is lost.

In the switch a vector passes each worker's link once in either direction, and both directions at a time; in a ring
nearly twice, and with 2 (n - 1) latencies (iSwitch, ISCA 2019, section 2; SwitchML, NSDI 2021, section 2). But a
segment's slot is taken for a whole round trip, so the switch reaches the rate of the links only with
slots · payload >= rate · round trip, and falls below a ring with half of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from headway.collective.aggregation_worker import Worker
from headway.collective.aggregator import Aggregator
from headway.collective.algorithms import generate
from headway.collective.packets import HEADER_BYTES, Kind, Operation, Packet
from headway.errors import InputError, RunError
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.simulate.communication import simulate
from headway.simulate.engine import Engine, Timer
from headway.value import Value

__all__ = [
    "SwitchComparison",
    "SwitchModel",
    "SwitchRun",
    "compare_switch",
    "predict_switch",
    "simulate_switch",
    "star",
]

# Ethernet's preamble, header, check and gap (38), IPv4 (20) and UDP (8), around a packet of ours.
_FRAME_BYTES = 66
_ALGORITHMS = ("ring", "sharded-server", "parameter-server")


class SwitchModel(Value):
    """`workers` around a switch with `slots` segments of memory, each worker with a link of its own.

    `latency_seconds` is one way, from a worker's send to the switch, or back. `packet_seconds` is what the switch needs
    for a packet that it receives; sending copies of a result costs it nothing, as replication in hardware does.
    `loss` is the share of packets lost on each link.
    """

    workers: int
    link_bytes_per_second: float = 1.25e9
    latency_seconds: float = 5e-6
    slots: int = 64
    payload_bytes: int = 1408
    packet_seconds: float = 0.0
    loss: float = 0.0
    patience_seconds: float = 1e-3  # of a worker, before it asks for what was lost

    def validate(self, *, place: str = "switch") -> SwitchModel:
        """This model, if it can be. Raises InputError naming the field."""
        for field, is_good, remedy in (
            ("workers", 1 <= self.workers < 1 << 16, "1 to 65535"),
            ("link_bytes_per_second", 0 < self.link_bytes_per_second < math.inf, "above 0"),
            ("latency_seconds", 0 <= self.latency_seconds < math.inf, "0 or more"),
            ("slots", self.slots >= 1, "1 or more"),
            ("payload_bytes", self.payload_bytes >= 8, "8 or more"),
            ("packet_seconds", 0 <= self.packet_seconds < math.inf, "0 or more"),
            ("loss", 0 <= self.loss < 1, "0 to 1, below 1"),
            ("patience_seconds", 0 < self.patience_seconds < math.inf, "above 0"),
        ):
            if not is_good:
                raise InputError(f"{field} is {getattr(self, field)}", place=place, remedy=remedy)
        return self

    @property
    def packet_bytes(self) -> int:
        """What a contribution or a result takes on a link."""
        return self.payload_bytes + HEADER_BYTES + _FRAME_BYTES

    @property
    def round_trip_seconds(self) -> float:
        """From a contribution's departure to its result's arrival, when all workers send at once and nothing waits."""
        return 2 * (self.latency_seconds + self.packet_bytes / self.link_bytes_per_second) + (
            self.workers * self.packet_seconds
        )

    @property
    def slots_needed(self) -> int:
        """With how many slots the links are busy all the time: bandwidth times delay, in packets."""
        return math.ceil(self.round_trip_seconds * self.link_bytes_per_second / self.packet_bytes)


class SwitchRun(Value):
    """What a simulated all-reduce showed: `seconds` until the last worker had the last result; packets `sent` by all,
    and `lost`; Help packets (`asked`) and contributions sent again (`resent`); `is_exact`: all sums were right."""

    seconds: float
    sent: int
    lost: int
    asked: int
    resent: int
    is_exact: bool


class SwitchComparison(Value):
    """One number of workers: seconds of an all-reduce in the switch, and by the other algorithms on the same links."""

    workers: int
    size_bytes: float
    switch_seconds: float
    other_seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The name of the fastest: "switch", or another's."""
        return min({"switch": self.switch_seconds, **self.other_seconds}.items(), key=lambda entry: entry[1])[0]


def predict_switch(model: SwitchModel, size_bytes: float) -> float:
    """Seconds of an all-reduce of so many bytes, if nothing is lost and all workers begin at once.

    A segment follows another when the link is free and the switch has handled all contributions, and its slot's last
    one a round trip later. Raises InputError for what cannot be.
    """
    model.validate()
    segments = _segments(model, size_bytes)
    step = max(model.packet_bytes / model.link_bytes_per_second, model.workers * model.packet_seconds)
    turns, rest = divmod(segments - 1, model.slots)
    return model.round_trip_seconds + max((segments - 1) * step, turns * model.round_trip_seconds + rest * step)


def _segments(model: SwitchModel, size_bytes: float) -> int:
    if not 0 < size_bytes < math.inf:
        raise InputError(f"a vector of {size_bytes:g} bytes", place="size_bytes", remedy="give more than 0")
    return math.ceil(size_bytes / model.payload_bytes)


class _Line:
    """One direction of a link: packets one after the other, at its rate, then the latency; some are lost."""

    def __init__(self, engine: Engine, model: SwitchModel, name: str) -> None:
        self._engine, self._model = engine, model
        self._random = engine.random(name)
        self._free_at = 0.0
        self.sent = self.lost = 0

    def carry(self, packet: Packet, deliver: Any, *arguments: Any) -> None:
        size = HEADER_BYTES + _FRAME_BYTES
        size += self._model.payload_bytes if packet.kind in (Kind.DATA, Kind.RESULT) else len(packet.payload)
        self._free_at = max(self._engine.now, self._free_at) + size / self._model.link_bytes_per_second
        self.sent += 1
        if self._random.random() < self._model.loss:
            self.lost += 1
        else:
            self._engine.call_at(self._free_at + self._model.latency_seconds, deliver, packet, *arguments)


class _Play:
    """One all-reduce: the real machines, on simulated links. Payloads are 8 bytes that stand for whole ones."""

    def __init__(self, model: SwitchModel, segments: int, seed: int) -> None:
        self.engine = Engine(seed)
        self.model = model
        self.aggregator = Aggregator(slots=model.slots)
        self.up = [_Line(self.engine, model, f"up {worker}") for worker in range(model.workers)]
        self.down = [_Line(self.engine, model, f"down {worker}") for worker in range(model.workers)]
        self.workers = [
            Worker(0, worker.to_bytes(8, "big"), workers=model.workers, patience_seconds=model.patience_seconds)
            for worker in range(model.workers)
        ]
        self.timers: list[Timer | None] = [None] * model.workers
        self.handled_at = 0.0  # when the switch has handled all that has come in
        self.left = model.workers
        self.done = self.engine.event("all workers have all results")
        self.is_exact = True
        # Joining is not part of the time.
        for number, worker in enumerate(self.workers):
            for target, answer in self.aggregator.handle(worker.poll(0.0)[0], number):
                assert isinstance(target, int)
                self.workers[target].handle(answer, 0.0)
        for number, worker in enumerate(self.workers):
            payloads = [_payload(number + 1, segment) for segment in range(segments)]
            worker.begin(payloads, Operation.SUM_INT32, deliver=self._check)
            self.engine.call_later(0.0, self._go_on, number)

    def _check(self, position: int, packet: Packet) -> None:
        count = self.model.workers
        self.is_exact &= bytes(packet.payload) == _payload(count * (count + 1) // 2, position, count)

    def _go_on(self, number: int) -> None:
        worker = self.workers[number]
        for packet in worker.poll(self.engine.now):
            self.up[number].carry(packet, self._reach_switch, number)
        timer = self.timers[number]
        if timer is not None:
            timer.cancel()
        self.timers[number] = None
        if worker.wake_seconds < math.inf:
            at = max(worker.wake_seconds, self.engine.now)
            self.timers[number] = self.engine.call_at(at, self._go_on, number)

    def _reach_switch(self, packet: Packet, number: int) -> None:
        self.handled_at = max(self.engine.now, self.handled_at) + self.model.packet_seconds
        self.engine.call_at(self.handled_at, self._handle, packet, number)

    def _handle(self, packet: Packet, number: int) -> None:
        for target, answer in self.aggregator.handle(packet, number):
            assert isinstance(target, int)
            self.down[target].carry(answer, self._reach_worker, target)

    def _reach_worker(self, packet: Packet, number: int) -> None:
        worker = self.workers[number]
        was_done = worker.is_done
        worker.handle(packet, self.engine.now)
        if worker.is_done and not was_done:
            self.left -= 1
            if not self.left:
                self.done.succeed()
        self._go_on(number)


def _payload(first: int, segment: int, times: int = 1) -> bytes:
    return first.to_bytes(4, "little") + (segment % 1000 * times).to_bytes(4, "little")


def simulate_switch(model: SwitchModel, size_bytes: float, *, seed: int = 0) -> SwitchRun:
    """Play an all-reduce of so many bytes, packet by packet, with losses drawn by the seed.

    Raises InputError for what cannot be, StalledError if the losses are such that a worker gives up after 30 simulated
    seconds without a result.
    """
    model.validate()
    play = _Play(model, _segments(model, size_bytes), seed)
    play.engine.run(until=play.done)
    lines = (*play.up, *play.down)
    return SwitchRun(
        seconds=play.engine.now,
        sent=sum(line.sent for line in lines),
        lost=sum(line.lost for line in lines),
        asked=sum(worker.asked for worker in play.workers),
        resent=sum(worker.resent for worker in play.workers),
        is_exact=play.is_exact,
    )


def star(model: SwitchModel) -> Cluster:
    """The same workers and links around a switch that only passes on, for the algorithms that run on the workers."""
    kind = Accelerator(
        name="worker", flop_per_second={"float32": 1e12}, memory_bytes=1e12, memory_bytes_per_second=1e12
    )
    names = [f"node{worker}/worker" for worker in range(model.workers)]
    link = {
        "bytes_per_second": model.link_bytes_per_second, "latency_seconds": model.latency_seconds, "kind": "network",
    }  # fmt: skip
    return Cluster(
        name=f"{model.workers} workers around a switch",
        accelerators={"worker": kind},
        devices=tuple(
            Device(name=name, accelerator="worker", node=f"node{worker}") for worker, name in enumerate(names)
        ),
        switches=(Switch(name="switch"),),
        links=tuple(
            Link(source=source, target=target, **link)
            for name in names
            for source, target in ((name, "switch"), ("switch", name))
        ),
    ).validate()


def compare_switch(
    model: SwitchModel,
    size_bytes: float,
    counts: Iterable[int],
    *,
    algorithms: Sequence[str] = _ALGORITHMS,
    most_packets: int = 20_000,
    seed: int = 0,
) -> list[SwitchComparison]:
    """The switch against other algorithms for each number of workers, on links of the model's rate and latency.

    The switch is played packet by packet where that takes no more than `most_packets` contributions, else, and only if
    nothing is lost, by `predict_switch`. The others send no headers and lose nothing: that is in their favour. Raises
    InputError for a model with losses that is too large to be played.
    """
    found = []
    for count in counts:
        if count < 2:
            raise InputError(f"{count} workers", place="counts", remedy="give 2 or more")
        one = SwitchModel(**{**model.to_builtins(), "workers": count}).validate()
        if count * _segments(one, size_bytes) <= most_packets:
            run = simulate_switch(one, size_bytes, seed=seed)
            if not run.is_exact:
                raise RunError("a simulated sum is wrong", place=f"{count} workers, seed {seed}")
            seconds = run.seconds
        elif one.loss:
            raise InputError(
                f"{count} workers send more than {most_packets} packets", place="compare_switch: loss",
                remedy="give a smaller vector or larger payloads, or raise most_packets",
            )  # fmt: skip
        else:
            seconds = predict_switch(one, size_bytes)
        cluster = star(one)
        others = {
            name: simulate(generate(name, cluster, "all_reduce"), cluster, size_bytes).seconds for name in algorithms
        }
        found.append(SwitchComparison(
            workers=count, size_bytes=size_bytes, switch_seconds=seconds, other_seconds=others
        ))  # fmt: skip
    return found
