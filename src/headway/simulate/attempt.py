"""One attempt at some steps, event by event, until all of them are done or a fault stops it.

Each kind of team is a player with streams; a stream does one thing after the other. Collectives of replicas begin when
the last of them is there, and axes that use the same ports of a device share them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Hashable, Sequence
from statistics import NormalDist
from typing import Any

from headway.predict.pipeline import WEIGHT, Cell, order_of_rank
from headway.simulate.engine import Engine, Event
from headway.simulate.faults import DeviceLost
from headway.simulate.played import Pass, Played, StageWork
from headway.simulate.setting import Setting
from headway.simulate.streams import Media, Pace, Stream
from headway.simulate.symmetry import Kind, Team

__all__ = ["Attempt"]

_NORMAL = NormalDist()
# Compute that lost less than this share of its time to communication beside it is done.
_NEGLIGIBLE = 1e-6
# Axes of communication that a medium may be shared among.
_AXES = ("inside", "data", "send")


class _Group:
    """The replicas of one pipeline rank: a collective begins when the last of them has come to it."""

    def __init__(self, engine: Engine, stream: Stream) -> None:
        self.engine = engine
        self.stream = stream
        self._meetings: dict[Hashable, tuple[Event, list[float]]] = {}

    def join(self, what: tuple, seconds: float, expected: int) -> Event:
        """One more has come to `what`, which takes the longest that any says; happens at the end of it."""
        event, said = self._meetings.setdefault(what, (self.engine.event(str(what)), []))
        said.append(seconds)
        if len(said) == expected:
            del self._meetings[what]
            self.stream.submit(max(said), what, event)
        return event


class _Player:
    """One kind of team at work: its streams, and the record of its passes."""

    def __init__(self, number: int, kind: Kind, setting: Setting, attempt: Attempt) -> None:
        team = kind.one
        self.number = number
        self.kind = kind
        self.pipeline = team.pipeline
        plan = setting.plan
        self.micro_batches = setting.micro_batches(team)
        self.order: tuple[Cell, ...] = order_of_rank(
            plan.schedule, team.pipeline, plan.pipeline, plan.virtual_stages, self.micro_batches
        )
        self.pace = setting.pace_of(team.ranks, attempt.gone)
        self.work = setting.works[number]
        # All gradients that its passes make in a step, in bytes.
        self.gradients = sum(sum(self.work.stages[at].gradients) for at in plan.stages_of(team.pipeline))
        self.group = attempt.groups[team.pipeline]
        self.inside, self.forth, self.back = attempt.streams_of(number, kind)
        # Copies of gradients to another tier, and the update there with what it reads, writes and sends back.
        self.copies, self.host = Stream(attempt.engine, Pace(())), Stream(attempt.engine, Pace(()))
        self.last_update: Event | None = None
        self.passes: list[Pass] = []
        self.updates: list[tuple[float, float]] = []
        self.outstanding: list[Event] = []
        self.random = random.Random(f"{setting.seed}/{team.ranks[0]}")
        self.filled = 0.0
        self.buckets = 0


class Attempt:
    """The steps from `first` on, begun at `begun`, until all are done or it is stopped."""

    def __init__(self, setting: Setting, gone: set[int], begun: float, first: int, steps: int) -> None:
        self.setting = setting
        self.plan = setting.plan
        self.gone = set(gone)
        self.begun = begun
        self.first, self.steps = first, steps
        self.engine = Engine(setting.seed)
        if begun:
            self.engine.run(until=begun)
        self.lost = self._losses()
        self._arrivals: dict[tuple, Event] = {}
        self._never = self.engine.event("what never happens")
        self._shared = self._shared_media()
        self.media = self._make_media()
        self.groups = [_Group(self.engine, self._group_stream(rank)) for rank in range(self.plan.pipeline)]
        self.everybody = _Group(self.engine, Stream(self.engine, self._pace("loss", 0, range(self.plan.pipeline))))
        self.tied = {
            stages: _Group(self.engine, Stream(self.engine, self._pace("send", stages[0], stages)))
            for stages in {self._holders(rank) for rank in range(self.plan.pipeline)} - {()}
        }
        self.players = [_Player(number, kind, setting, self) for number, kind in enumerate(setting.kinds)]
        self.of_rank = [sum(kind.one.pipeline == rank for kind in setting.kinds) for rank in range(self.plan.pipeline)]
        self.ends: list[float] = []

    # -- who can be slowed down by what

    def _losses(self) -> dict[int, float]:
        """Rank to when it is lost in this attempt."""
        return {
            self.setting.rank_of[fault.device]: max(self.begun, fault.seconds)
            for position, fault in enumerate(self.setting.faults)
            if isinstance(fault, DeviceLost) and position not in self.gone
        }

    def _pace(self, axis: str, rank: int, concerned: Sequence[int] = (), ranks: Sequence[int] = ()) -> Pace:
        """Of the communication of an axis; it stops when one of `ranks`, or of these pipeline ranks, is lost."""
        changes = self._link_changes(axis, rank)
        losses = [
            when for lost, when in self.lost.items() if lost in ranks or self.plan.coordinates(lost)[0] in concerned
        ]
        if losses:
            when = min(losses)
            changes = [change for change in changes if change[0] < when] + [(when, 0.0)]
        return Pace(changes)

    def _link_changes(self, axis: str, rank: int) -> list[tuple[float, float]]:
        cut = {position for position, fault in enumerate(self.setting.faults) if fault in self.setting.links.cut}
        if cut & self.gone:  # mended while all were stopped
            return [change for change in self.setting.links.paces.get((axis, rank), []) if change[1] > 0]
        return self.setting.links.paces.get((axis, rank), [])

    # -- media that several axes share

    def _shared_media(self) -> dict[int, dict[str, str]]:
        """Of each kind of team, the axes that share a medium with another: axis to "network" or "node"."""
        found = {}
        for number, kind in enumerate(self.setting.kinds):
            media = {axis: self._medium(kind.one, axis) for axis in _AXES}
            used = [medium for medium in media.values() if medium]
            found[number] = {axis: medium for axis, medium in media.items() if medium and used.count(medium) > 1}
        return found

    def _medium(self, team: Team, axis: str) -> str:
        """What an axis of a team communicates over: "network", "node", or "" if it does not communicate."""
        plan, rank = self.plan, team.ranks[0]
        if not self.setting.usual[axis, team.pipeline] and (axis != "send" or plan.pipeline == 1):
            return ""
        if axis == "inside":
            others = team.ranks
        elif axis == "data":
            others = (*plan.data_group(rank), *plan.context_group(rank))
        else:
            neighbours = {(team.pipeline + step) % plan.pipeline for step in (1, -1)}
            others = tuple(plan.first_rank(each) + team.ranks[0] % plan.width(each) for each in neighbours)
        nodes = {self.setting.device_of[plan.devices[each]].node for each in (rank, *others)}
        return "network" if len(nodes) > 1 else "node"

    def _make_media(self) -> Media | None:
        """A port in and a port out for each kind of team and medium; None where nothing is shared."""
        self._paths: dict[Hashable, int] = {}
        if not any(self._shared.values()):
            return None
        paths: list[list[int]] = []
        kinds = self.setting.kinds

        def ports(number: int, medium: str) -> tuple[int, int]:
            base = 4 * number + (2 if medium == "network" else 0)
            return base, base + 1

        def add(key: Hashable, path: list[int]) -> None:
            self._paths[key] = len(paths)
            paths.append(path)

        for number, kind in enumerate(kinds):
            shared = self._shared[number]
            if "inside" in shared:
                add(("inside", number), list(ports(number, shared["inside"])))
            for direction, others in (("forth", kind.after), ("back", kind.before)):
                if "send" in shared:
                    medium = shared["send"]
                    add((direction, number), [ports(number, medium)[0], *(ports(to, medium)[1] for to in others)])
        for rank in range(self.plan.pipeline):
            members = [at for at, kind in enumerate(kinds) if kind.one.pipeline == rank and "data" in self._shared[at]]
            if members:
                add(("data", rank), [port for at in members for port in ports(at, self._shared[at]["data"])])
        # Each path has a capacity of its own, by which faults slow it down.
        own = 4 * len(kinds)
        return Media(self.engine, own + len(paths), [[*path, own + at] for at, path in enumerate(paths)])

    def _stream(self, key: Hashable, pace: Pace) -> Stream:
        path = self._paths.get(key)
        if path is None or self.media is None:
            return Stream(self.engine, pace)
        capacity = 4 * len(self.setting.kinds) + path
        for time, speed in zip(pace.times, pace.speeds, strict=True):
            self.engine.call_at(max(time, self.engine.now), self.media.change, capacity, speed)
        return Stream(self.engine, pace, self.media, path)

    def _group_stream(self, rank: int) -> Stream:
        return self._stream(("data", rank), self._pace("data", rank, (rank,)))

    def streams_of(self, number: int, kind: Kind) -> tuple[Stream, Stream, Stream]:
        """Communication inside layers, sends to the next stage, and back to the one before."""
        plan, team = self.plan, kind.one
        behind = (team.pipeline - 1) % plan.pipeline
        facing = {
            direction: [rank for to in others for rank in self.setting.kinds[to].one.ranks]
            for direction, others in (("forth", kind.after), ("back", kind.before))
        }
        return (
            self._stream(("inside", number), self._pace("inside", team.pipeline, (), team.ranks)),
            self._stream(("forth", number), self._pace("send", team.pipeline, (), (*team.ranks, *facing["forth"]))),
            self._stream(("back", number), self._pace("send", behind, (), (*team.ranks, *facing["back"]))),
        )

    def _holders(self, rank: int) -> tuple[int, ...]:
        """The pipeline ranks that sum the gradients of tied parameters with this one."""
        if self.plan.pipeline == 1 or not self.setting.parts.ranks[rank].tied:
            return ()
        return tuple(at for at in range(self.plan.pipeline) if self.setting.parts.ranks[at].tied)

    # -- playing

    def play(self, deadline: float) -> Played:
        """Let it happen, and stop it at `deadline` if it is not done by then."""
        for player in self.players:
            name = f"stage {player.pipeline}, ranks {player.kind.one.ranks[0]} and alike"
            self.engine.process(self._work(player), name=name, daemon=deadline < math.inf)
        self.engine.run(until=deadline if deadline < math.inf else None)
        complete = len(self.ends) == self.steps - self.first
        stop = self.ends[-1] if complete else deadline
        lost = {at: rank for rank, at in self.lost.items() if at < stop}
        return Played(
            begun=self.begun,
            stop=stop,
            ends=tuple(self.ends),
            is_complete=complete,
            passes=tuple(tuple(player.passes) for player in self.players),
            updates=tuple(tuple(player.updates) for player in self.players),
            sends=tuple((tuple(player.forth.busy), tuple(player.back.busy)) for player in self.players),
            groups=tuple(tuple(group.stream.busy) for group in self.groups),
            tied=tuple((stages, tuple(group.stream.busy)) for stages, group in sorted(self.tied.items())),
            copies=tuple((tuple(player.copies.busy), tuple(player.host.busy)) for player in self.players),
            everybody=tuple(self.everybody.stream.busy),
            losses=tuple(sorted(lost.items())),
        )

    def _work(self, me: _Player) -> Generator[Any, Any, None]:
        engine, parts = self.engine, self.setting.parts
        rank = me.pipeline
        for step in range(self.first, self.steps):
            me.filled, me.buckets = 0.0, 0
            for cell in me.order:
                for event in self._awaited(me, step, cell):
                    if not event.happened:
                        yield event
                stage = me.work.stages[cell.stage]
                draw = self._draw(me)
                if self._goes_by_layer(me, stage, cell):
                    yield from self._by_layer(me, step, cell, stage, draw)
                else:
                    start = engine.now
                    middle = me.pace.end(start, stage.compute[cell.backward] * draw)
                    stop = me.inside.pace.end(middle, stage.inside_seconds(cell.backward))
                    worked = me.pace.worked_until(start, middle)
                    talked = me.inside.pace.worked_until(worked, stop) if middle < math.inf else worked
                    me.passes.append(Pass(cell, -1, start, worked, talked))
                    yield self._never if stop == math.inf else stop - start
                self._deliver(me, step, cell)
            self._fill(me, step, 0.0, last=True)
            for event in me.outstanding:
                if not event.happened:
                    yield event
            me.outstanding.clear()
            own = me.work.once
            if own.offload is not None and own.offload.out and not me.work.overlaps:
                yield me.copies.submit(own.offload.out, ("out", step), engine.event("gradients are away"))
            if holders := self._holders(rank):
                expected = sum(self.of_rank[each] for each in holders)
                yield self.tied[holders].join(("tied", step), own.tied, expected)
            if me.last_update is not None and not me.last_update.happened:
                yield me.last_update  # its parameters are those of the next step
            start = engine.now
            stop = me.pace.end(start, own.update if own.offload is None else own.update - own.offload.exposed_out)
            if own.offload is not None:
                done = me.host.submit(own.offload.seconds, ("update", step), engine.event("updated elsewhere"))
                me.last_update = done if own.background else None
            me.updates.append((start, me.pace.worked_until(start, stop)))
            yield self._never if stop == math.inf else stop - start
            if own.after:
                yield me.group.join(("after", step), own.after, self.of_rank[rank])
            yield self.everybody.join(("loss", step), parts.loss, len(self.players))
            if me.number == 0:
                self.ends.append(engine.now)

    def _draw(self, me: _Player) -> float:
        """The factor of one pass: the largest of one draw for each rank of the team, who wait for each other."""
        sigma = self.setting.jitter
        if not sigma:
            return 1.0
        highest = me.random.random() ** (1 / len(me.kind.one.ranks))
        return math.exp(sigma * _NORMAL.inv_cdf(min(max(highest, 1e-300), 1 - 1e-16)) - sigma * sigma / 2)

    def _arrival(self, key: tuple) -> Event:
        found = self._arrivals.get(key)
        if found is None:
            found = self._arrivals[key] = self.engine.event(f"stage {key[2]}, micro-batch {key[3]}")
        return found

    def _awaited(self, me: _Player, step: int, cell: Cell) -> list[Event]:
        """What must have arrived before a pass can begin."""
        stage, index, backward = cell
        if self.plan.pipeline == 1 or backward == WEIGHT:
            return []
        if backward:
            if stage == len(self.plan.stages) - 1:
                return []
            return [self._arrival((sender, step, stage + 1, index, 1)) for sender in me.kind.after]
        if not stage:
            return []
        return [self._arrival((sender, step, stage - 1, index, 0)) for sender in me.kind.before]

    def _deliver(self, me: _Player, step: int, cell: Cell) -> None:
        stage, index, backward = cell
        if backward == WEIGHT or self.plan.pipeline == 1:
            return
        if backward and stage:
            seconds = self.setting.parts.sends[(stage - 1) % self.plan.pipeline]
            me.back.submit(seconds, cell, self._arrival((me.number, step, stage, index, 1)))
        elif not backward and stage < len(self.plan.stages) - 1:
            seconds = self.setting.parts.sends[stage % self.plan.pipeline]
            me.forth.submit(seconds, cell, self._arrival((me.number, step, stage, index, 0)))

    # -- layer by layer

    def _finishes(self, me: _Player, cell: Cell) -> bool:
        """Whether a pass makes gradients that no later micro-batch of its stage adds to."""
        makes = WEIGHT if self.plan.schedule == "zero_bubble" else 1
        return cell.backward == makes and cell.micro_batch == me.micro_batches - 1

    def _leaving(self, me: _Player, cell: Cell) -> float:
        """Seconds that all gradients of a rank take to another tier, if they leave beside this pass."""
        offload = me.work.once.offload
        return offload.out if offload is not None and me.work.overlaps and self._finishes(me, cell) else 0.0

    def _gathers(self, stage: StageWork, cell: Cell) -> tuple[float, ...]:
        """Seconds to gather each layer's parameters for this pass; empty if they are there."""
        if cell.backward == WEIGHT:
            return ()
        found = stage.gathers[cell.backward]
        if found and self.plan.pipeline > 1 and self.plan.zero_stage == 2:
            # Gathered for the first micro-batch and kept; `parts` spreads that over all.
            count = self.plan.micro_batches
            return tuple(seconds * count for seconds in found) if not cell.micro_batch else ()
        return found

    def _scatters(self, me: _Player, stage: StageWork, cell: Cell) -> tuple[float, ...]:
        if not stage.scatters:
            return ()
        if self.plan.pipeline == 1:
            return stage.scatters if cell.backward == 1 else ()
        return tuple(each * self.plan.micro_batches for each in stage.scatters) if self._finishes(me, cell) else ()

    def _goes_by_layer(self, me: _Player, stage: StageWork, cell: Cell) -> bool:
        if me.inside.media is not None and stage.inside[cell.backward]:
            return True
        if not me.work.overlaps:
            return False
        if self._finishes(me, cell) and (me.work.once.exchanged or self._leaving(me, cell)):
            return True
        return bool(self._gathers(stage, cell) or self._scatters(me, stage, cell))

    def _by_layer(self, me: _Player, step: int, cell: Cell, stage: StageWork, draw: float) -> Generator[Any, Any, None]:
        engine = self.engine
        shares = stage.layers[1 if cell.backward else 0]
        order = range(len(shares) - 1, -1, -1) if cell.backward else range(len(shares))
        gathers, scatters = self._gathers(stage, cell), self._scatters(me, stage, cell)
        finishes = self._finishes(me, cell) and me.work.once.exchanged > 0
        leaves = self._leaving(me, cell)
        total = stage.compute[cell.backward] * draw
        inside = stage.inside_seconds(cell.backward)
        slowdown = me.work.slowdown
        ready: dict[int, Event] = {}

        def gather(layer: int) -> None:
            ready[layer] = me.group.join(("gather", step, *cell, layer), gathers[layer], self._expected(me, cell))

        if gathers:
            gather(order[0])
        for at, layer in enumerate(order):
            if gathers:
                if not ready[layer].happened:
                    yield ready[layer]
                if at + 1 < len(order):
                    gather(order[at + 1])  # one ahead, while this layer is at work
            start = engine.now
            left, least = shares[layer] * total, shares[layer] * total * _NEGLIGIBLE
            while left > least:
                since = engine.now
                stop = me.pace.end(since, left)
                if stop == math.inf:
                    worked = me.pace.worked_until(since, stop)
                    me.passes.append(Pass(cell, layer, start, worked, worked))
                    yield self._never
                yield stop - since
                left = slowdown * _overlap(me.group.stream, since, engine.now)
            middle = engine.now
            if inside:
                if me.inside.media is not None:
                    yield me.inside.submit(inside * shares[layer], cell, engine.event("inside a layer"))
                else:
                    stop = me.inside.pace.end(middle, inside * shares[layer])
                    if stop == math.inf:
                        talked = me.inside.pace.worked_until(middle, stop)
                        me.passes.append(Pass(cell, layer, start, middle, talked))
                        yield self._never
                    yield stop - middle
            me.passes.append(Pass(cell, layer, start, middle, engine.now))
            if scatters:
                what = ("scatter", step, *cell, layer)
                me.outstanding.append(me.group.join(what, scatters[layer], self._expected(me, cell)))
            elif finishes:
                self._fill(me, step, stage.gradients[layer])
            if leaves and stage.gradients[layer]:
                seconds = leaves * stage.gradients[layer] / me.gradients
                me.outstanding.append(me.copies.submit(seconds, ("out", step, layer), engine.event("gradients away")))

    def _expected(self, me: _Player, cell: Cell) -> int:
        """How many kinds of team come to a collective of this pass."""
        if not self.plan.shares:
            return self.of_rank[me.pipeline]
        others = (each for each in self.players if each.pipeline == me.pipeline)
        return sum(cell.micro_batch < each.micro_batches for each in others)

    def _fill(self, me: _Player, step: int, size_bytes: float, *, last: bool = False) -> None:
        """More gradients are complete: reduce the buckets that are full, and at the end what is left."""
        whole = me.work.once.exchanged
        if not whole:
            return
        total = me.gradients
        limit = min(float(self.plan.bucket_bytes), total) if me.work.overlaps else total
        me.filled += size_bytes
        if last and not me.work.overlaps:
            me.filled = total
        while me.filled >= limit * (1 - 1e-9) or (last and me.filled > total * 1e-9):
            size = min(limit, me.filled)
            me.filled -= size
            me.buckets += 1
            what = ("bucket", step, me.buckets - 1)
            me.outstanding.append(me.group.join(what, whole * size / total, self.of_rank[me.pipeline]))


def _overlap(stream: Stream, start: float, stop: float) -> float:
    """For how long a stream was at work between two times."""
    total = 0.0
    for busy in reversed(stream.busy):
        if busy.stop <= start:
            break
        total += max(0.0, min(busy.stop, stop) - max(busy.start, start))
    return total
