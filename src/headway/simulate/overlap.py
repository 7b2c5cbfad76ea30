"""One training step's gradient exchange, played: how much of it hides behind backward and the next forward pass.

Backward produces the gradients, the last layer's first. They go over one link, in an order and in pieces that a policy
decides: one by one as they come (`Fifo`), fused (`Fused`, Horovod's) or by priority (`Priority`, ByteScheduler's, whose
state machine `collective.priority` is the one that real processes use). The next forward pass begins at once, and each
layer waits for its own gradient. Its end is the end of the step: the next backward pass begins there.

**The link** carries one message at a time, in the order in which they are handed over. A message of B bytes occupies it
for `seconds(B)`, which is 0 or more and includes the cost of starting; `alpha_beta` makes the usual one. It reaches the
link `latency_seconds` after it was handed over. Latencies of messages in flight overlap: that is why the credit of a
priority scheduler should be larger than one part, and why a small one is slow on a long link.

**What follows** (and is tested). Where starting costs nothing and the latency is 0, priority is never slower than
first come, first served: the link is busy in the same intervals, and first come, first served finishes the first
layer's gradient, which everything waits for, at the very end of them. With parts as small as the data allow it is the
optimal order (Peng et al., SOSP 2019, section 4.1). Where starting costs `a` seconds, a tensor cut into n parts costs
(n - 1)·a more, so priority is slower than fusion as soon as these starts take longer than what it hides: with small
tensors, short forward passes or a slow start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from headway.collective.fusion import CYCLE_SECONDS, THRESHOLD_BYTES, Request, fuse
from headway.collective.priority import CREDIT_BYTES, PARTITION_BYTES, PriorityScheduler
from headway.errors import InputError
from headway.simulate.engine import Engine, Event
from headway.timeline import Span, Timeline
from headway.value import Value

__all__ = ["Fifo", "Fused", "Layer", "OverlappedStep", "Policy", "Priority", "alpha_beta", "play_step"]


class Layer(Value):
    """A layer of the model, or any part of it whose gradient is one tensor."""

    name: str
    size_bytes: int  # of the gradient; 0: it has none
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


class Fifo(msgspec.Struct, frozen=True, tag=True):
    """Every gradient by itself, as soon as it is there."""


class Fused(msgspec.Struct, frozen=True, tag=True):
    """Horovod's tensor fusion: once in a cycle, what is there is fused (`collective.fusion`) and exchanged.

    A cycle begins when `cycle_seconds` have passed since the last one began and its exchanges are done.
    `negotiation_seconds`: what it takes the ranks to agree, in each cycle that exchanges something.
    """

    threshold_bytes: float = THRESHOLD_BYTES
    cycle_seconds: float = CYCLE_SECONDS
    negotiation_seconds: float = 0.0


class Priority(msgspec.Struct, frozen=True, tag=True):
    """ByteScheduler's order: in parts, the first layer's first, with a limited number of bytes in flight."""

    partition_bytes: float = PARTITION_BYTES
    credit_bytes: float = CREDIT_BYTES


Policy = Fifo | Fused | Priority


class OverlappedStep(Value):
    """What a step took: `step_seconds` from the begin of backward to the end of the next forward pass.

    `exposed_seconds` of it nothing was computed. The link was busy for `communication_seconds` with `messages`
    messages; `arrivals_seconds`: when each layer's gradient was exchanged, 0 where there is none.
    """

    step_seconds: float
    compute_seconds: float
    communication_seconds: float
    messages: int
    arrivals_seconds: tuple[float, ...]
    timeline: Timeline

    @property
    def exposed_seconds(self) -> float:
        return self.step_seconds - self.compute_seconds


def alpha_beta(start_seconds: float, bytes_per_second: float) -> Callable[[float], float]:
    """What a message of a size takes: a start, and its bytes (Hockney 1994). Raises InputError for impossible rates."""
    if not (start_seconds >= 0 and bytes_per_second > 0):
        raise InputError(
            f"a start of {start_seconds} s and {bytes_per_second} bytes per second",
            place="alpha_beta",
            remedy="give a start of 0 or more and a rate above 0",
        )
    return lambda size_bytes: start_seconds + size_bytes / bytes_per_second


def play_step(
    layers: Sequence[Layer], policy: Policy, seconds: Callable[[float], float], *, latency_seconds: float = 0.0
) -> OverlappedStep:
    """Play backward, exchange and next forward of `layers`, given in the order of forward.

    `seconds`: how long the exchange of a number of bytes occupies the link, for instance `alpha_beta(...)` or
    `lambda size: predict.communication.all_reduce_seconds(size, channel)`. Raises InputError for times that cannot be
    and names that occur twice.
    """
    if len({layer.name for layer in layers}) != len(layers):
        raise InputError("two layers have one name", place="layers", remedy="give each its own")
    for layer in layers:
        if layer.size_bytes < 0 or not (
            0 <= layer.forward_seconds < math.inf and 0 <= layer.backward_seconds < math.inf
        ):
            raise InputError("has a size or a time that cannot be", place=f"layer {layer.name!r}", remedy="0 or more")
    return _Play(layers, policy, seconds, latency_seconds).run()


class _Play:
    def __init__(
        self, layers: Sequence[Layer], policy: Policy, seconds: Callable[[float], float], latency_seconds: float
    ) -> None:
        self.layers = layers
        self.policy = policy
        self.seconds = seconds
        self.latency_seconds = latency_seconds
        self.engine = Engine()
        self.arrived = [self.engine.event(f"gradient of {layer.name}") for layer in layers]
        self.arrivals = [0.0] * len(layers)
        self.index = {layer.name: i for i, layer in enumerate(layers)}
        self.missing = sum(layer.size_bytes > 0 for layer in layers)
        self.spans: list[Span] = []
        self.free_at = 0.0  # when the link has carried all that it was given
        self.busy_seconds = 0.0
        self.messages = 0
        self.waiting: list[int] = []  # gradients that the policy has not handed over
        self.news: Event | None = None  # what the fusing process waits for
        self.scheduler: PriorityScheduler | None = None
        if isinstance(policy, Priority):
            self.scheduler = PriorityScheduler(policy.partition_bytes, policy.credit_bytes)

    def run(self) -> OverlappedStep:
        if isinstance(self.policy, Fused) and self.missing:
            self.engine.process(self._fuse(self.policy), name="fusion")
        self.engine.process(self._backward(), name="backward")
        forward = self.engine.process(self._forward(), name="forward")
        self.engine.run(forward)
        compute = sum(layer.forward_seconds + layer.backward_seconds for layer in self.layers)
        spans = sorted(self.spans, key=lambda span: span.start_seconds)
        return OverlappedStep(
            step_seconds=self.engine.now,
            compute_seconds=compute,
            communication_seconds=self.busy_seconds,
            messages=self.messages,
            arrivals_seconds=tuple(self.arrivals),
            timeline=Timeline(name=type(self.policy).__name__.lower(), spans=tuple(spans)),
        )

    # The model.

    def _backward(self):
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            start = self.engine.now
            if layer.backward_seconds:
                yield layer.backward_seconds
                self._span(layer.name, "compute", start, "backward")
            if layer.size_bytes:
                self._produced(i)
            else:
                self.arrived[i].succeed()

    def _forward(self):
        # Backward has to end first: it occupies the same device. The first layer's gradient may have no bytes.
        yield self.engine.timeout(sum(layer.backward_seconds for layer in self.layers))
        for i, layer in enumerate(self.layers):
            yield self.arrived[i]
            start = self.engine.now
            if layer.forward_seconds:
                yield layer.forward_seconds
                self._span(layer.name, "compute", start, "forward")

    # The policies.

    def _produced(self, i: int) -> None:
        layer = self.layers[i]
        if self.scheduler is not None:
            self.scheduler.ready(layer.name, layer.size_bytes, priority=i)
            # Gradients that come at the same instant must all be known before the most urgent is chosen.
            self.engine.when_settled(self._start_parts)
        elif isinstance(self.policy, Fifo):
            self._hand_over(layer.name, layer.size_bytes, lambda: self._arrive(i))
        else:
            self.waiting.append(i)
            if self.news is not None:
                self.news.succeed()
                self.news = None

    def _start_parts(self) -> None:
        assert self.scheduler is not None
        for part in self.scheduler.next():
            name = part.tensor if part.parts == 1 else f"{part.tensor} {part.part + 1}/{part.parts}"

            def done(part=part, scheduler=self.scheduler) -> None:
                if scheduler.finished(part):
                    self._arrive(self.index[part.tensor])
                self.engine.when_settled(self._start_parts)

            self._hand_over(name, part.size_bytes, done)

    def _fuse(self, policy: Fused):
        begun = 0.0
        while self.missing:
            if not self.waiting:
                self.news = self.engine.event("a gradient")
                yield self.news
                if policy.cycle_seconds:
                    # The cycles in which there was nothing to do have passed as well.
                    begun += (
                        max(0.0, math.ceil((self.engine.now - begun) / policy.cycle_seconds)) * policy.cycle_seconds
                    )
            yield max(0.0, begun - self.engine.now)
            settled = self.engine.event("all gradients of this instant")
            self.engine.when_settled(settled.succeed)
            yield settled
            begun = self.engine.now
            ready, self.waiting = self.waiting, []
            yield policy.negotiation_seconds
            requests = [Request(name=str(i), shape=(self.layers[i].size_bytes,), element_bytes=1) for i in ready]
            last = None
            for batch in fuse(requests, policy.threshold_bytes):
                members = [int(name) for name in batch.names]
                name = self.layers[members[0]].name + (f" and {len(members) - 1} more" if len(members) > 1 else "")
                last = self.engine.event(f"exchange of {name}")

                def done(members=members, last=last) -> None:
                    for i in members:
                        self._arrive(i)
                    last.succeed()

                self._hand_over(name, batch.size_bytes, done)
            if last is not None:
                yield last
            begun += policy.cycle_seconds

    # The link.

    def _hand_over(self, name: str, size_bytes: int, done: Callable[[], None]) -> None:
        start = max(self.engine.now + self.latency_seconds, self.free_at)
        occupied = self.seconds(size_bytes)
        if not 0 <= occupied < math.inf:
            raise InputError(
                f"{size_bytes} bytes would take {occupied} s", place="seconds", remedy="return 0 or more, finite"
            )
        self.free_at = start + occupied
        self.busy_seconds += occupied
        self.messages += 1
        self.spans.append(
            Span(
                name=name,
                lane="step/link",
                start_seconds=start,
                duration_seconds=occupied,
                kind="communication",
                detail={"bytes": size_bytes},
            )
        )
        self.engine.call_at(self.free_at, done)

    def _arrive(self, i: int) -> None:
        self.arrivals[i] = self.engine.now
        self.missing -= 1
        self.arrived[i].succeed()

    def _span(self, name: str, lane: str, start: float, kind: str) -> None:
        self.spans.append(
            Span(
                name=name,
                lane=f"step/{lane}",
                start_seconds=start,
                duration_seconds=self.engine.now - start,
                kind=kind,
            )
        )
