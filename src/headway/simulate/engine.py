"""A deterministic event core: virtual time, processes, and events that they wait for.

A process is a generator. It yields a number of seconds to sleep, an `Event` to wait for it (and gets its value), or
another `Process` to wait for its end (and get what it returned)::

    def worker(engine, ready):
        yield 0.5                                  # half a second later
        chunk = yield ready                        # what somebody gave to ready.succeed(...)
        first = yield engine.any_of(ready, 3.0)    # whichever comes first

    engine = Engine(seed=1)
    engine.process(worker(engine, engine.event("ready")), name="worker")
    engine.run()

There is no clock but `Engine.now` and no chance but `Engine.random`: the same processes and the same seed give the same
run, event by event. What is due at the same instant happens in the order in which it was asked for.

The loop keeps one heap of (time, number, who) tuples. Numbers only grow, so who is next at an instant never depends on
`who`, and an entry is out of date when `who` has been given a newer number: cancelling is one assignment.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from headway.errors import InputError, StalledError

__all__ = ["Engine", "Event", "Interruption", "Process", "Queue", "Resource", "Timer"]

_DONE = object()  # what a timer "yields"
_LISTED = 8  # processes named in a report of a deadlock
_FEW = 256  # entries out of date that are not worth cleaning up


class Interruption(Exception):
    """Thrown into a process that is interrupted or whose partner was cancelled; `cause` is what the caller gave."""

    def __init__(self, cause: Any = None) -> None:
        super().__init__(cause)
        self.cause = cause


class _Stopped(Exception):
    """The event that `Engine.run` was to run until has happened."""


class Event:
    """Something that happens once. Processes wait for it by yielding it."""

    __slots__ = ("_waiters", "engine", "failure", "happened", "name", "value")

    def __init__(self, engine: Engine, name: str = "") -> None:
        self.engine = engine
        self.name = name
        self.happened = False
        self.value: Any = None
        self.failure: BaseException | None = None
        # (process, number): it waits unless it has a newer number by now. (function, -1): called on the spot.
        self._waiters: list[tuple[Any, int]] | None = None

    def succeed(self, value: Any = None) -> None:
        """It happens now: whoever waits goes on at this instant, with `value`. Raises InputError if it has already."""
        self._happen(value, None)

    def fail(self, failure: BaseException) -> None:
        """It fails now: `failure` is raised in whoever waits for it, now or later."""
        self._happen(None, failure)

    def then(self, function: Callable[[Event], object]) -> None:
        """Call `function(event)` at the moment when it happens; at once if it has happened."""
        if self.happened:
            function(self)
        elif self._waiters is None:
            self._waiters = [(function, -1)]
        else:
            self._waiters.append((function, -1))

    def _happen(self, value: Any, failure: BaseException | None) -> None:
        if self.happened:
            raise InputError(
                "happens a second time", place=f"event {self.name!r}", remedy="make a new event for each occasion"
            )
        self.happened = True
        self.value = value
        self.failure = failure
        waiters, self._waiters = self._waiters, None
        if waiters:
            ready = self.engine._ready
            for who, number in waiters:
                if number >= 0:
                    ready.append((who, number, self))
                else:
                    who(self)

    def _is_awaited(self) -> bool:
        return any(number < 0 or who._number == number for who, number in self._waiters or ())

    def _is_abandoned(self) -> bool:
        """Whether somebody waited for it, and nobody does any more."""
        return self._waiters is not None and not self._is_awaited()


class Process(Event):
    """A generator under way; as an event, its end. Its value is what the generator returned."""

    __slots__ = ("_generator", "_number", "_step", "daemon", "waits_for")

    def __init__(self, engine: Engine, generator: Any, name: str, daemon: bool) -> None:
        super().__init__(engine, name)
        self.daemon = daemon
        self.waits_for: Event | None = None
        self._generator = generator
        self._step = generator.send
        self._number = engine._next_number()  # of the only entry that may wake it

    def interrupt(self, cause: Any = None) -> None:
        """Raise `Interruption(cause)` in the process, at this instant; what it waited for no longer wakes it.

        Nothing happens if it has ended. Raises InputError if a process interrupts itself.
        """
        if self.happened:
            return
        self._refuse_self("interrupts")
        note = Event(self.engine)
        note.happened, note.failure = True, Interruption(cause)
        self._leave()
        self.engine._ready.append((self, self._number, note))

    def cancel(self) -> None:
        """End the process where it stands (its `finally` blocks run); `Interruption` is raised in who waits for it.

        Nothing happens if it has ended. Raises InputError if a process cancels itself.
        """
        if self.happened:
            return
        self._refuse_self("cancels")
        self._leave()
        self._generator.close()
        self.engine._live.pop(self, None)
        self.fail(Interruption(f"process {self.name!r} was cancelled"))

    def _leave(self) -> None:
        self.waits_for = None
        self._number = self.engine._next_number()
        self.engine._forget()

    def _refuse_self(self, does: str) -> None:
        if self._generator.gi_running:
            raise InputError(f"{does} itself", place=f"process {self.name!r}", remedy="return from the generator")


class Timer:
    """A function that will be called once, unless it is cancelled."""

    __slots__ = ("_arguments", "_engine", "_function", "_number")

    def __init__(self, engine: Engine, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self._engine = engine
        self._function = function
        self._arguments = arguments
        self._number = engine._next_number()

    def cancel(self) -> None:
        """Do not call it; nothing happens if it has been called."""
        if self._number:
            self._number = 0
            self._engine._forget()

    @property
    def is_pending(self) -> bool:
        """Whether it will still be called."""
        return self._number != 0

    @property
    def name(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    def _step(self, _: None) -> object:
        self._number = 0
        self._function(*self._arguments)
        return _DONE


class Engine:
    """The clock (`now`, in seconds), what is due, and the seeded random streams."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 0.0
        self.seed = seed
        self.events = 0  # entries carried out so far
        self._next_number = itertools.count(1).__next__
        self._heap: list[tuple[float, int, Any]] = []
        # Due at this instant, after everything in the heap that is: (who, number, the event that wakes it).
        self._ready: deque[tuple[Any, int, Event | None]] = deque()
        self._settling: list[Callable[[], object]] = []
        self._forgotten = 0  # entries of the heap that are out of date
        self._live: dict[Process, None] = {}
        self._streams: dict[str, random.Random] = {}
        self._is_running = False

    def random(self, stream: str) -> random.Random:
        """The random stream of that name: it depends on the engine's seed and the name, and on no other stream."""
        found = self._streams.get(stream)
        if found is None:
            # A text is hashed by SHA-512, so the stream is the same in every process and on every machine.
            found = self._streams[stream] = random.Random(f"{self.seed}/{stream}")
        return found

    def event(self, name: str = "") -> Event:
        """A new event; its name appears in reports of deadlocks."""
        return Event(self, name)

    def process(self, generator: Generator[Any, Any, Any], *, name: str = "", daemon: bool = False) -> Process:
        """Start a process at this instant. A `daemon` may wait for ever without being reported as deadlocked."""
        if not isinstance(generator, Generator):
            raise InputError(
                f"a process must be a generator, not {type(generator).__name__}",
                place=name,
                remedy="give what calling a function that yields returns",
            )
        process = Process(self, generator, name or getattr(generator, "__name__", "process"), daemon)
        self._live[process] = None
        self._ready.append((process, process._number, None))
        return process

    def timeout(self, seconds: float, value: Any = None) -> Event:
        """An event that happens `seconds` from now."""
        event = Event(self, f"{seconds:g} s")
        self.call_later(seconds, event.succeed, value)
        return event

    def call_later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> Timer:
        """Call `function(*arguments)` in `seconds`. Raises InputError unless 0 <= seconds < infinity."""
        return self.call_at(self.now + seconds, function, *arguments)

    def call_at(self, time: float, function: Callable[..., object], *arguments: Any) -> Timer:
        """Call `function(*arguments)` when the clock shows `time`. Raises InputError for a time that has passed."""
        if not self.now <= time < math.inf:
            raise InputError(f"asked for at {time:g} s, and it is {self.now:g} s", remedy="give a time to come")
        timer = Timer(self, function, arguments)
        if time > self.now:
            heapq.heappush(self._heap, (time, timer._number, timer))
        else:
            self._ready.append((timer, timer._number, None))
        return timer

    def when_settled(self, function: Callable[[], object]) -> None:
        """Call `function()` when all else that is due at this instant has been done, before the clock moves on."""
        self._settling.append(function)
        if len(self._settling) == 1:
            settle = Timer(self, self._settle, ())
            self._ready.append((settle, settle._number, None))

    def any_of(self, *what: Event | float) -> Event:
        """Happens with the first of these (events, or seconds from now); its value is that one, as it was given.

        Fails when the first to happen fails.
        """
        _refuse_nothing(what, "any_of")
        first = Event(self, _names("any of", what))
        timers = [self.call_later(each, _succeed, first, each) for each in what if not isinstance(each, Event)]

        def decide(event: Event) -> None:
            if first.happened:
                return
            for timer in timers:
                timer.cancel()
            if event.failure is None:
                first.succeed(event)
            else:
                first.fail(event.failure)

        for each in what:
            if isinstance(each, Event):
                each.then(decide)
        return first

    def all_of(self, *what: Event | float) -> Event:
        """Happens when all of these (events, or seconds from now) have; its value is the tuple of their values.

        Fails with the first that fails.
        """
        every = Event(self, _names("all of", what))
        events = [each if isinstance(each, Event) else self.timeout(each) for each in what]
        missing = len(events)

        def count(event: Event) -> None:
            nonlocal missing
            if every.happened:
                return
            missing -= 1
            if event.failure is not None:
                every.fail(event.failure)
            elif not missing:
                every.succeed(tuple(each.value for each in events))

        for event in events:
            event.then(count)
        if not events:
            every.succeed(())
        return every

    def waiting(self) -> tuple[tuple[str, str], ...]:
        """(process, what it waits for) of each process that waits for an event that has not happened; no daemons."""
        return tuple(
            (process.name, process.waits_for.name or "an event without a name")
            for process in self._live
            if not process.daemon and process.waits_for is not None and not process.waits_for.happened
        )

    def run(self, until: float | Event | None = None) -> Any:
        """Carry out what is due: until a time, until an event has happened (and give its value), or all there is.

        Whatever a process or a function raises, and nobody waits for, is raised here with a note of where and when.
        Raises StalledError when nothing is left to do and processes (daemons aside), or the event `until`, still wait:
        a deadlock; InputError for a time that has passed.
        """
        if self._is_running:
            raise InputError("the engine is running already", remedy="yield a process instead of running the engine")
        limit = math.inf
        if isinstance(until, Event):
            if not until.happened:
                until.then(self._stop)
        elif until is not None:
            limit = float(until)
            if not limit >= self.now:
                raise InputError(
                    f"asked to run until {limit:g} s, and it is {self.now:g} s", remedy="give a later time"
                )
        self._is_running = True
        try:
            if not (isinstance(until, Event) and until.happened):
                self._loop(limit)
        except _Stopped:
            pass
        finally:
            self._is_running = False
        if isinstance(until, Event):
            if not until.happened:
                raise self._deadlock(f"nothing is left to do, and {until.name or 'the event'!r} has not happened")
            if until.failure is not None:
                raise until.failure
            return until.value
        if until is not None:
            self.now = limit
        elif self.waiting():
            raise self._deadlock("nothing is left to do")
        return None

    def _loop(self, limit: float) -> None:
        heap, ready, number_of = self._heap, self._ready, self._next_number
        replace, pop = heapq.heapreplace, heapq.heappop
        events = 0
        now = self.now
        try:
            while True:
                if ready and not (heap and heap[0][0] <= now):
                    who, number, event = ready.popleft()
                    if who._number == number:
                        events += 1
                        self._wake(who, event)
                    continue
                if not heap:
                    return
                time, number, who = heap[0]
                if who._number != number:
                    pop(heap)
                    self._forgotten -= 1
                    continue
                if time > limit:
                    return
                self.now = now = time
                events += 1
                try:
                    what = who._step(None)
                except BaseException as error:  # noqa: BLE001 - given to those who wait for the process, or raised
                    pop(heap)
                    self._end(who, error)
                    continue
                if type(what) is float:
                    later = time + what
                    if later > time:  # false for what is negative, too small to move the clock, or not a number
                        # The entry is still the first: whatever was added since has a greater number. So the sleeper's
                        # next entry takes its place in one step.
                        who._number = number = number_of()
                        replace(heap, (later, number, who))
                        continue
                pop(heap)
                if what is not _DONE:
                    self._wait(who, what)
        finally:
            self.events += events

    def _wake(self, who: Any, event: Event | None) -> None:
        try:
            if event is None:
                what = who._step(None)
            elif event.failure is None:
                what = who._step(event.value)
            else:
                what = who._generator.throw(event.failure)
        except BaseException as error:  # noqa: BLE001 - given to those who wait for the process, or raised
            self._end(who, error)
        else:
            if what is not _DONE:
                self._wait(who, what)

    def _wait(self, process: Process, what: Any) -> None:
        number = process._number = self._next_number()
        if isinstance(what, Event):
            process.waits_for = what
            if what.happened:
                self._ready.append((process, number, what))
            elif what._waiters is None:
                what._waiters = [(process, number)]
            else:
                what._waiters.append((process, number))
            return
        if isinstance(what, int | float) and 0 <= what < math.inf:
            later = self.now + float(what)
            if later > self.now:
                heapq.heappush(self._heap, (later, number, process))
            else:
                self._ready.append((process, number, None))
            return
        # Raised where the process yielded it, so that the traceback shows the line.
        mistake = Event(self)
        mistake.happened = True
        mistake.failure = InputError(
            f"yields {what!r}",
            place=f"process {process.name!r}",
            remedy="yield seconds (0 or more, finite), an Event or a Process",
        )
        self._wake(process, mistake)

    def _end(self, who: Any, error: BaseException) -> None:
        if isinstance(who, Timer):
            if not isinstance(error, _Stopped):
                error.add_note(f"called by the simulation: {who.name}, at {self.now:g} s")
            raise error
        who._number = 0
        self._live.pop(who, None)
        if isinstance(error, StopIteration):
            who.succeed(error.value)
            return
        if not isinstance(error, Exception):  # Ctrl-C is nobody's result
            raise error
        error.add_note(f"in the simulated process {who.name!r}, at {self.now:g} s")
        if who._is_awaited():
            who.fail(error)
            return
        who.happened, who.failure = True, error
        raise error

    def _settle(self) -> None:
        if self._ready:
            # Somebody else is due: behind them, then.
            again = Timer(self, self._settle, ())
            self._ready.append((again, again._number, None))
            return
        functions, self._settling = self._settling, []
        for function in functions:
            function()

    def _stop(self, _: Event) -> None:
        stop = Timer(self, _raise_stopped, ())
        self._ready.append((stop, stop._number, None))

    def _forget(self) -> None:
        """Count an entry that went out of date, and clean the heap when these are the most."""
        self._forgotten += 1
        if self._forgotten >= _FEW and 2 * self._forgotten > len(self._heap):
            # Not here: the loop relies on the first entry while it is carried out.
            self._forgotten = 0
            clean = Timer(self, self._clean, ())
            self._ready.append((clean, clean._number, None))

    def _clean(self) -> None:
        self._heap[:] = [entry for entry in self._heap if entry[2]._number == entry[1]]
        heapq.heapify(self._heap)
        self._forgotten = 0

    def _deadlock(self, text: str) -> StalledError:
        waiting = self.waiting()
        named = "; ".join(f"{process!r} waits for {event!r}" for process, event in waiting[:_LISTED])
        more = f"; and {len(waiting) - _LISTED} more" if len(waiting) > _LISTED else ""
        return StalledError(
            f"{text}: {named or 'no process is left'}{more}",
            place=f"simulation at {self.now:g} s",
            remedy="make what they wait for happen, or start processes that may wait for ever as daemons",
        )


class Resource:
    """`capacity` slots, given in order of priority (the smallest number first), then in order of asking."""

    def __init__(self, engine: Engine, capacity: int = 1, name: str = "") -> None:
        self.engine = engine
        self.name = name
        self.free = capacity
        self._queue: list[tuple[float, int, Event]] = []

    def acquire(self, priority: float = 0.0) -> Event:
        """An event that happens when a slot is the caller's, who must give it back by `release`.

        A process that is interrupted while it waits loses its place in the queue and has nothing to give back, unless
        the event `happened` at that very instant.
        """
        event = Event(self.engine, self.name)
        if self.free:
            self.free -= 1
            event.succeed(self)
        else:
            heapq.heappush(self._queue, (priority, self.engine._next_number(), event))
        return event

    def release(self) -> None:
        """Give one slot back; the next in the queue gets it at this instant."""
        while self._queue:
            event = heapq.heappop(self._queue)[2]
            if not event._is_abandoned():
                event.succeed(self)
                return
        self.free += 1


class Queue:
    """Items in order: `put` never waits, `get` waits until there is one."""

    def __init__(self, engine: Engine, name: str = "") -> None:
        self.engine = engine
        self.name = name
        self._items: deque[Any] = deque()
        self._getters: deque[Event] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Any) -> None:
        """Add an item; the process that has waited longest gets it at this instant."""
        while self._getters:
            event = self._getters.popleft()
            if not event._is_abandoned():
                event.succeed(item)
                return
        self._items.append(item)

    def get(self) -> Event:
        """An event whose value is the next item."""
        event = Event(self.engine, self.name)
        if self._items:
            event.succeed(self._items.popleft())
        else:
            self._getters.append(event)
        return event


def _succeed(event: Event, value: Any) -> None:
    if not event.happened:
        event.succeed(value)


def _raise_stopped() -> None:
    raise _Stopped


def _refuse_nothing(what: tuple[Event | float, ...], function: str) -> None:
    if not what:
        raise InputError(f"{function} of nothing never happens", remedy="give at least one event")


def _names(kind: str, what: tuple[Event | float, ...]) -> str:
    return f"{kind} " + ", ".join(each.name if isinstance(each, Event) else f"{each:g} s" for each in what)
