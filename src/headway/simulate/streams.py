"""Streams in virtual time: what does one thing after the other, at a pace that may change, on media that others share.

A `Stream` is a lane of a device: its collectives of one group, its sends. It takes work in seconds, as long as it takes
when nothing else is in the way. Where several streams use one medium (the network interface of a device, its ports in
the node), `Media` shares it max-min fairly among those at work, by the very code that shares links among messages
(`simulate.sharing`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from headway.simulate.engine import Engine, Event, Timer

__all__ = ["Busy", "Media", "Pace", "Stream"]


class Pace:
    """How fast something works: speed 1, and from each time in `changes` on the speed given with it."""

    __slots__ = ("speeds", "times")

    def __init__(self, changes: Iterable[tuple[float, float]] = ()) -> None:
        ordered = sorted(dict(changes).items())
        self.times = [time for time, _ in ordered]
        self.speeds = [speed for _, speed in ordered]

    def at(self, time: float) -> float:
        """The speed at a time."""
        position = bisect_right(self.times, time)
        return self.speeds[position - 1] if position else 1.0

    def end(self, start: float, seconds: float) -> float:
        """When work of so many seconds at speed 1, begun at `start`, is done; infinity if never."""
        if not self.times:
            return start + seconds
        position = bisect_right(self.times, start)
        speed = self.speeds[position - 1] if position else 1.0
        now = start
        for time, following in zip(self.times[position:], self.speeds[position:], strict=True):
            if seconds <= (time - now) * speed:
                return now + seconds / speed if speed else now
            seconds -= (time - now) * speed
            now, speed = time, following
        if not seconds:
            return now
        return now + seconds / speed if speed else math.inf

    def worked_until(self, start: float, end: float) -> float:
        """`end`, as `Pace.end` gave it; or, where that is never, when it came to a stop."""
        return end if end < math.inf else max(start, self.times[-1])


class Busy(NamedTuple):
    """A stream was at work on `what` from `start` to `stop` (infinity: it was not done when all was over)."""

    what: Any
    start: float
    stop: float


class Media:
    """Capacities of 1, shared max-min fairly by the work that passes several of them at once.

    `paths`: for each path the capacities that it passes.
    """

    def __init__(self, engine: Engine, capacities: int, paths: Sequence[Sequence[int]]) -> None:
        # Imported here: compiling takes a moment, and most steps share nothing.
        from headway.simulate import shares, sharing

        self.engine = engine
        self._sharing = sharing
        slots = sum(len(path) for path in paths)
        self._shares = shares.new_shares(np.ones(capacities), paths=len(paths), slots=slots, flows=len(paths))
        for path in paths:
            shares.add_path(self._shares, path)
        self._done: dict[int, Callable[[], object]] = {}
        self._starting: list[tuple[int, float]] = []
        self._timer: Timer | None = None
        self._is_unsettled = False

    def start(self, path: int, seconds: float, done: Callable[[], object]) -> None:
        """Work of so many seconds along `path`, which has no other under way; `done` is called at its end."""
        self._done[path] = done
        self._starting.append((path, seconds))
        self._unsettle()

    def change(self, capacity: int, share: float) -> None:
        """From now on, a capacity is so much of what it was built as."""
        self._sharing.change_capacity(self._shares, capacity, share)
        self._unsettle()

    def _unsettle(self) -> None:
        if not self._is_unsettled:
            self._is_unsettled = True
            self.engine.when_settled(self._settle)

    def _settle(self) -> None:
        self._is_unsettled = False
        starting, self._starting = self._starting, []
        # A path has one flow at a time, so that they share a number.
        numbers = np.array([path for path, _ in starting], dtype=np.int64)
        seconds = np.array([seconds for _, seconds in starting], dtype=np.float64)
        weights = np.ones(len(starting))
        due = self._sharing.add_and_refill(self._shares, numbers, numbers, seconds, weights, self.engine.now)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due < math.inf:
            self._timer = self.engine.call_at(due, self._end)

    def _end(self) -> None:
        self._timer = None
        count = self._sharing.complete(self._shares, self.engine.now)
        for path in sorted(self._shares.flows["done"][:count].tolist()):
            self._done.pop(path)()
        self._unsettle()


class Stream:
    """One thing after the other, in the order of asking; `busy` is the record of it.

    Alone on its media it goes at `pace`. With `media` it shares them along its own `path`, and they know its pace.
    """

    __slots__ = ("_free", "_is_at_work", "_waiting", "busy", "engine", "media", "pace", "path")

    def __init__(self, engine: Engine, pace: Pace, media: Media | None = None, path: int = -1) -> None:
        self.engine = engine
        self.pace = pace
        self.media = media
        self.path = path
        self.busy: list[Busy] = []
        self._free = 0.0
        self._is_at_work = False
        self._waiting: deque[tuple[float, Any, Event]] = deque()

    def submit(self, seconds: float, what: Any, done: Event) -> Event:
        """Do work of so many seconds when all before it is done; `done` happens at its end. Returns `done`."""
        if self.media is not None:
            self._waiting.append((seconds, what, done))
            if not self._is_at_work:
                self._begin(self.media)
            return done
        start = max(self.engine.now, self._free)
        if start == math.inf:
            return done
        self._free = self.pace.end(start, seconds)
        self.busy.append(Busy(what, start, self.pace.worked_until(start, self._free)))
        if self._free < math.inf:
            self.engine.call_at(self._free, done.succeed)
        return done

    def _begin(self, media: Media) -> None:
        seconds, what, done = self._waiting.popleft()
        start = self.engine.now
        self._is_at_work = True
        at = len(self.busy)
        self.busy.append(Busy(what, start, math.inf))

        def end() -> None:
            self.busy[at] = Busy(what, start, self.engine.now)
            self._is_at_work = False
            done.succeed()
            if self._waiting and not self._is_at_work:
                self._begin(media)

        media.start(self.path, seconds, end)
