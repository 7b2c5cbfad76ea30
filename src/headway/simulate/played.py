"""What came out of playing a step: who did what and when, as a timeline, as shares of the time, and as what was held.

One kind of team was played for all that are alike; everything here is asked for by rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from headway.plan.plan import Plan
from headway.predict.parts import Offload
from headway.predict.pipeline import WEIGHT, Cell
from headway.predict.prediction import StepTime
from headway.simulate.streams import Busy, Pace
from headway.simulate.symmetry import Kind
from headway.timeline import Span, Timeline

__all__ = ["Held", "Pass", "Played", "StageWork", "StepSimulation", "Use"]

# More kinds of team, or spans, than these are not drawn unless asked for.
_MOST_KINDS = 64
_MOST_SPANS = 20_000
_INSIDE = {
    "tensor": "all-reduce of blocks",
    "context": "keys and values",
    "expert": "tokens to experts",
    "copies": "copies between tiers",
    "gather": "gather parameters",
    "scatter": "scatter gradients",
}
_SHARED = {"bucket": "reduce gradients", "after": "send parameters round", "loss": "average loss",
           "tied": "sum tied gradients", "gather": "gather parameters", "scatter": "scatter gradients"}  # fmt: skip


class StageWork(NamedTuple):
    """A stage's work on one micro-batch, in seconds, as it is played. `compute`, `inside` are by `Cell.backward`."""

    compute: tuple[float, float, float]
    inside: tuple[tuple[tuple[str, float], ...], ...]  # (lane, seconds) of communication that compute waits for
    layers: tuple[tuple[float, ...], tuple[float, ...]]  # each layer's share of compute: forward, backward
    gathers: tuple[tuple[float, ...], tuple[float, ...]]  # ZeRO: seconds for each layer; empty: none beside compute
    scatters: tuple[float, ...]
    gradients: tuple[float, ...]  # each layer's bytes of gradients, as they are reduced

    def inside_seconds(self, backward: int) -> float:
        """All communication that a pass waits for."""
        return sum(seconds for _, seconds in self.inside[backward])


class Pass(NamedTuple):
    """A micro-batch in a stage (`layer` -1), or in one of its layers: compute to `middle`, communication to `stop`."""

    cell: Cell
    layer: int
    start: float
    middle: float
    stop: float


class Played(NamedTuple):
    """One attempt, from `begun` until all steps were done or it was stopped; what is by kind is in their order.

    `ends`: when each completed step ended. `groups`: the replicas of each pipeline rank; `tied`: the pipeline ranks
    that sum tied gradients, and when. `copies`: gradients on their way to another tier, and the updates there.
    `losses`: (seconds, rank) of devices lost.
    """

    begun: float
    stop: float
    ends: tuple[float, ...]
    is_complete: bool
    passes: tuple[tuple[Pass, ...], ...]
    updates: tuple[tuple[tuple[float, float], ...], ...]
    sends: tuple[tuple[tuple[Busy, ...], tuple[Busy, ...]], ...]
    groups: tuple[tuple[Busy, ...], ...]
    tied: tuple[tuple[tuple[int, ...], tuple[Busy, ...]], ...]
    copies: tuple[tuple[tuple[Busy, ...], tuple[Busy, ...]], ...]
    everybody: tuple[Busy, ...]
    losses: tuple[tuple[float, int], ...]

    def stop_of(self, rank: int) -> float:
        """When a rank did its last thing at the latest."""
        return min([self.stop, *(seconds for seconds, lost in self.losses if lost == rank)])


class Use(NamedTuple):
    """How a rank spent the time, in seconds. `communication`: only what compute did not hide; `idle`: it waited."""

    compute: float
    communication: float
    optimizer: float
    idle: float

    @property
    def total(self) -> float:
        """The whole simulated time."""
        return sum(self)


class Held(NamedTuple):
    """From `seconds` on, a rank holds activations of `micro_batches` micro-batches of `stage`."""

    seconds: float
    stage: int
    micro_batches: int


class StepSimulation:
    """`steps` steps as played: `seconds` in all, what was lost to faults included."""

    def __init__(
        self,
        plan: Plan,
        kinds: Sequence[Kind],
        attempts: tuple[Played, ...],
        steps: int,
        works: Sequence[dict[int, StageWork]],
        paces: dict[tuple[int, int], tuple[Pace, Pace]],
        offloads: Sequence[Offload | None] = (),
    ) -> None:
        self.plan = plan
        self.kinds = tuple(kinds)
        self.attempts = attempts
        self.steps = steps
        self._works = works  # by kind, then stage
        self._offloads = offloads  # by kind
        self._paces = paces  # (kind, position in the team) → its own pace, and its team's
        self._where = {
            rank: (number, position)
            for number, kind in enumerate(self.kinds)
            for team in kind.teams
            for position, rank in enumerate(team.ranks)
        }

    # ------------------------------------------------------------------------------------------------------ in figures

    @property
    def seconds(self) -> float:
        """From the beginning to the end of the last step."""
        return self.attempts[-1].stop

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, on average."""
        return self.seconds / self.steps

    @property
    def restarts(self) -> int:
        """How often all ranks had to begin again."""
        return len(self.attempts) - 1

    def use_of(self, rank: int) -> Use:
        """How a rank spent the time."""
        number, position = self._where[rank]
        return self._use(number, position)

    @cached_property
    def uses(self) -> tuple[tuple[Use, int], ...]:
        """For ranks that are alike, how each spent the time, and how many there are."""
        found = []
        for number, kind in enumerate(self.kinds):
            apart = [position for position in range(len(kind.one.ranks)) if (number, position) in self._paces]
            found += [(self._use(number, position), len(kind.teams)) for position in apart]
            if len(apart) < len(kind.one.ranks):
                rest = next(at for at in range(len(kind.one.ranks)) if (number, at) not in self._paces)
                found.append((self._use(number, rest), len(kind.teams) * (len(kind.one.ranks) - len(apart))))
        return tuple(found)

    @property
    def bubble_share(self) -> float:
        """The share of the time that ranks wait, on average over all of them."""
        return sum(use.idle * count for use, count in self.uses) / (self.seconds * self.plan.world_size)

    @property
    def time(self) -> StepTime:
        """One step on the rank that waits least, in the parts of a prediction."""
        use = min((use for use, _ in self.uses), key=lambda use: use.idle)
        return StepTime(
            step_seconds=self.step_seconds,
            compute_seconds=use.compute / self.steps,
            communication_seconds=use.communication / self.steps,
            bubble_seconds=use.idle / self.steps,
            optimizer_seconds=use.optimizer / self.steps,
        )

    def _use(self, number: int, position: int) -> Use:
        compute = communication = optimizer = 0.0
        pipeline = self.kinds[number].one.pipeline
        own, team = self._paces.get((number, position), (None, None))
        rank = self.kinds[number].one.ranks[position]
        for attempt in self.attempts:
            stop = attempt.stop_of(rank)
            occupied: list[tuple[float, float]] = []
            for one in attempt.passes[number]:
                middle = min(one.middle, stop)
                if one.start < stop:
                    share = _share(own, team, one.start)
                    compute += (middle - one.start) * share
                    communication += min(one.stop, stop) - middle
                    occupied.append((one.start, min(one.stop, stop)))
            for start, end in attempt.updates[number]:
                if start < stop:
                    optimizer += (min(end, stop) - start) * _share(own, team, start)
                    occupied.append((start, min(end, stop)))
            beside = [(busy.start, min(busy.stop, stop)) for busy in self._beside(attempt, pipeline, stop)]
            communication += _uncovered(sorted(beside), sorted(occupied))
        # What is left may be a rounding error below nothing.
        return Use(compute, communication, optimizer, max(0.0, self.seconds - compute - communication - optimizer))

    def _beside(self, attempt: Played, pipeline: int, stop: float) -> list[Busy]:
        """What a pipeline rank communicates beside its passes, sends left out."""
        found = [*attempt.groups[pipeline], *attempt.everybody]
        for holders, busy in attempt.tied:
            if pipeline in holders:
                found += busy
        return [busy for busy in found if busy.start < stop]

    def held(self, rank: int) -> tuple[Held, ...]:
        """Micro-batches whose activations a rank holds, stage by stage, whenever their number changes.

        From the beginning of its forward pass to the end of its backward pass, of its parameters' gradients where the
        schedule splits those off.
        """
        number, _ = self._where[rank]
        releases = WEIGHT if self.plan.schedule == "zero_bubble" else 1
        changes: list[tuple[float, int, int]] = []
        for attempt in self.attempts:
            begins: dict[tuple[int, int, int], float] = {}
            ends: dict[tuple[int, int, int], float] = {}
            steps = [attempt.begun, *attempt.ends]
            at = 0
            for one in attempt.passes[number]:
                while at + 1 < len(steps) and one.start >= steps[at + 1]:
                    at += 1
                key = (at, one.cell.stage, one.cell.micro_batch)
                if not one.cell.backward:
                    begins.setdefault(key, one.start)
                elif one.cell.backward == releases:
                    ends[key] = one.stop
            for key, start in begins.items():
                if start < attempt.stop:
                    changes.append((start, 1, key[1]))
                    changes.append((min(ends.get(key, math.inf), attempt.stop), -1, key[1]))
        count: dict[int, int] = defaultdict(int)
        found = []
        for seconds, change, stage in sorted(changes, key=lambda each: (each[0], each[1])):
            count[stage] += change
            found.append(Held(seconds, stage, count[stage]))
        return tuple(found)

    # ----------------------------------------------------------------------------------------------------- as a picture

    @cached_property
    def timeline(self) -> Timeline:
        """One rank of each kind, by the first that is like it; the first 64 kinds where there are more."""
        return self.timeline_of(kind.one.ranks[0] for kind in self.kinds[:_MOST_KINDS])

    def timeline_of(self, ranks: Iterable[int]) -> Timeline:
        """The lanes of these ranks: compute, and communication by what it is for."""
        chosen = list(ranks)
        count = 0
        for rank in chosen:
            number, _ = self._where[rank]
            for attempt in self.attempts:
                count += sum(
                    2 * len(self._works[number][one.cell.stage].layers[0])
                    for one in attempt.passes[number]
                    if one.layer < 0 and one.stop > one.middle
                )
        by_layer = count <= _MOST_SPANS
        spans: list[Span] = []
        for rank in chosen:
            spans += self._spans(rank, by_layer)
        for before, after in zip(self.attempts, self.attempts[1:], strict=False):
            for seconds, rank in before.losses:
                length = before.stop - seconds
                spans.append(_span(f"rank {rank} lost", "job/faults", seconds, seconds + length, "idle"))
            if not before.losses:
                spans.append(_span("stalled", "job/faults", before.stop, before.stop, "idle"))
            spans.append(_span("restart", "job/faults", before.stop, after.begun, "idle"))
        return Timeline(name=f"{self.plan.model}: {self.plan.describe()}, simulated", spans=tuple(spans))

    def _spans(self, rank: int, by_layer: bool) -> list[Span]:
        number, position = self._where[rank]
        pipeline = self.kinds[number].one.pipeline
        own, team = self._paces.get((number, position), (None, None))
        found: list[Span] = []
        for attempt in self.attempts:
            stop = attempt.stop_of(rank)
            for one in attempt.passes[number]:
                if one.start < stop:
                    found += self._pass_spans(rank, number, one, stop, _share(own, team, one.start), by_layer)
            for start, end in attempt.updates[number]:
                if start < stop:
                    end = min(end, stop)
                    end = start + (end - start) * _share(own, team, start)
                    found.append(_span("optimizer", f"rank {rank}/compute", start, end, "optimizer"))
            for busy in self._beside(attempt, pipeline, stop):
                name = _SHARED[busy.what[0]] + (f" {busy.what[-1]}" if busy.what[0] == "bucket" else "")
                lane = "pipeline" if busy.what[0] == "tied" else "data"
                found.append(_span(name, f"rank {rank}/{lane}", busy.start, min(busy.stop, stop), "communication"))
            found += self._offload_spans(rank, number, attempt, stop)
            for lane, name, stream in (
                ("send", "send activation", attempt.sends[number][0]),
                ("send back", "send gradient", attempt.sends[number][1]),
            ):
                for busy in stream:
                    if busy.start < stop:
                        detail = {"stage": busy.what.stage, "micro_batch": busy.what.micro_batch}
                        end = min(busy.stop, stop)
                        found.append(_span(name, f"rank {rank}/{lane}", busy.start, end, "communication", detail))
        return sorted((span for span in found if span.duration_seconds > 0), key=lambda span: span.start_seconds)

    def _offload_spans(self, rank: int, number: int, attempt: Played, stop: float) -> list[Span]:
        """The lanes of an update away from the device: copies both ways, the host, and the tier of its states."""
        parts = self._offloads[number] if self._offloads else None
        if parts is None:
            return []
        away, updates = attempt.copies[number]
        found = [
            _span("gradients to their tier", f"rank {rank}/copies", busy.start, min(busy.stop, stop), "communication")
            for busy in away
            if busy.start < stop
        ]
        for busy in updates:
            for lane, name, seconds in (
                ("host", "update", parts.update),
                ("states", "read and write optimizer states", parts.states),
                ("copies", "updated parameters", parts.back),
            ):
                end = min(busy.start + seconds, busy.stop, stop)
                if busy.start < end:
                    found.append(_span(name, f"rank {rank}/{lane}", busy.start, end, "optimizer"))
        return found

    def _pass_spans(self, rank: int, number: int, one: Pass, stop: float, share: float, by_layer: bool) -> list[Span]:
        stage, index, backward = one.cell
        work = self._works[number][stage]
        name = ("forward", "backward", "gradients of parameters")[backward]
        if backward == 1 and self.plan.schedule == "zero_bubble":
            name = "gradient of input"
        name += f" {index}" + (f" of stage {stage}" if self.plan.virtual_stages > 1 else "")
        kind = "backward" if backward else "forward"
        detail: dict[str, str | int | float] = {"stage": stage, "micro_batch": index}
        if backward == WEIGHT:
            detail["part"] = "weight"
        if one.layer >= 0:
            detail["layer"] = one.layer
        compute, inside = one.middle - one.start, one.stop - one.middle
        total = work.inside_seconds(backward)
        shares = work.layers[1 if backward else 0]
        if one.layer >= 0 or not inside or not by_layer:
            shares = (1.0,)
        elif backward:
            shares = shares[::-1]
        found = []
        now = one.start
        for each in shares:
            pieces = [("compute", name, kind, compute * each, compute * each * share)]
            for lane, seconds in work.inside[backward] if inside and total else ():
                length = inside * each * seconds / total
                pieces.append((lane, _INSIDE[lane], "communication", length, length))
            for lane, text, of_kind, takes, shown in pieces:
                if now < stop:
                    found.append(_span(text, f"rank {rank}/{lane}", now, min(now + shown, stop), of_kind, detail))
                now += takes
        return found


def _share(own: Pace | None, team: Pace | None, time: float) -> float:
    """How much of its team's time a rank needs itself."""
    if own is None or team is None or not own.at(time):
        return 1.0
    return team.at(time) / own.at(time)


def _uncovered(parts: Sequence[tuple[float, float]], covers: Sequence[tuple[float, float]]) -> float:
    """Seconds of `parts` that lie outside of `covers`; both in order, and each without overlaps."""
    total = 0.0
    at = 0
    for start, stop in parts:
        total += stop - start
        while at < len(covers) and covers[at][1] <= start:
            at += 1
        to = at
        while to < len(covers) and covers[to][0] < stop:
            total -= max(0.0, min(covers[to][1], stop) - max(covers[to][0], start))
            to += 1
    return total


def _span(
    name: str, lane: str, start: float, stop: float, kind: str, detail: dict[str, str | int | float] | None = None
) -> Span:
    return Span(
        name=name, lane=lane, start_seconds=start, duration_seconds=stop - start, kind=kind, detail=detail or {}
    )
