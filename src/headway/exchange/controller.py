"""The background thread that exchanges tensors while the main thread computes.

A `Controller` carries `exchange.negotiation` out on real processes. Its thread goes through cycles: every rank sends
what it has ready to rank 0, rank 0 answers, and all carry the answered batches out in the same order
(`exchange.batches`). What the main thread submits gets a `Handle`, which is waited for when the result is needed.

When a rank dies, every survivor notices by itself (`exchange.watch`), and whatever waits there raises RankFailedError
naming it at once. The threads end in good order: the exchange fails on the dead one's neighbours, which make it fail on
theirs (`Carrier.abort`); so all survivors come to the next cycle, where rank 0 misses the dead one's message
(`exchange.control`), and tells the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from headway.collective.fusion import CACHE_CAPACITY, CYCLE_SECONDS, THRESHOLD_BYTES
from headway.errors import HeadwayError, InputError, MismatchError, RankFailedError
from headway.exchange.autotune import Autotuner, Setting
from headway.exchange.batches import Carrier, Task
from headway.exchange.control import Alone, Star, died
from headway.exchange.negotiation import Answer, Coordinator, Negotiator, Outcome, Response, Submission
from headway.exchange.watch import Watch
from headway.timeline import Span, Timeline

__all__ = ["Controller", "Handle", "Options"]

log = logging.getLogger("headway.exchange")

_IDLE_CYCLES = 5  # cycles without work, after which a rank sleeps until it has some, or this long:
_IDLE_SECONDS = 0.01
_LEAVE_SECONDS = 10.0  # beyond the time-out, for the last cycle to end
_CYCLES_PER_SAMPLE = 10  # of the autotuner, counting those that exchanged something; as in Horovod
_MOST_SPANS = 500_000  # a forgotten timeline must not fill the memory


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to exchange. Bytes, seconds; the fields that are not about one rank must be the same on all.

    `cycle_seconds`: from the start of a cycle to the next; tensors are collected in it. `threshold_bytes`: of a fused
    buffer. `cache_capacity`: tensors that have a bit. `stall_seconds`: until a rank that does not submit is reported;
    `stall_error_seconds`: until it ends the run; 0 for never. `timeout_seconds`: for a rank to answer, and for a
    collective. `backend`: of torch.distributed for CPU tensors, empty for gloo. `autotune`: find threshold and cycle
    time; `autotune_log`: a CSV file of what was tried. `timeline`: a file for spans; `mark_cycles`: with cycles in it.
    """

    cycle_seconds: float = CYCLE_SECONDS
    threshold_bytes: float = THRESHOLD_BYTES
    cache_capacity: int = CACHE_CAPACITY
    stall_seconds: float = 60.0
    stall_error_seconds: float = 0.0
    timeout_seconds: float = 300.0
    backend: str = "headway"
    autotune: bool = False
    autotune_log: str = ""
    timeline: str = ""
    mark_cycles: bool = False


class Handle:
    """A tensor that is being exchanged. `wait` gives the result; `is_done` says whether it would have to wait."""

    def __init__(self, controller: Controller, submission: Submission, task: Task, now: float) -> None:
        self.name = submission.name
        self._controller, self._task = controller, task
        self._submission, self._since = submission, now
        self._finished = threading.Event()
        self._result: Any = None
        self._error: HeadwayError | None = None

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self._finished.is_set()

    def wait(self) -> Any:
        """The result. Raises MismatchError, StalledError or RankFailedError if the exchange did not come about."""
        if not self._finished.is_set():
            self._controller.hurry()
        while not self._finished.wait(1.0):
            if not self._controller.is_running and not self._finished.wait(1.0):
                raise RankFailedError("the exchange has ended", place=self.name)
        if self._error is not None:
            # A copy: the same error may be raised for many tensors, and a traceback belongs to one of them.
            error = self._error
            raise type(error)(error.message, place=error.place, remedy=error.remedy)
        if self._submission.device == "cuda" and self._task.ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._task.ready)
            for tensor in self._result if isinstance(self._result, tuple) else (self._result,):
                if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                    tensor.record_stream(stream)
        return self._result

    def _finish(self, result: Any = None, error: HeadwayError | None = None) -> None:
        with self._controller._finishing:
            if not self._finished.is_set():  # whoever comes first
                self._result, self._error = result, error
                self._finished.set()


class Controller:
    """Exchanges tensors among `size` ranks, of which this is `rank`, from a thread of its own.

    With more than one rank, `torch.distributed` must have been initialised, and all ranks make their controller at the
    same time. `submit` may be called from any thread. Call `shutdown` at the end.
    """

    def __init__(self, rank: int, size: int, options: Options | None = None) -> None:
        self.rank, self.size, self.options = rank, size, options or Options()
        options = self.options
        self._lock = threading.Lock()
        self._finishing = threading.Lock()
        self._handles: dict[str, Handle] = {}
        self._under_way: dict[str, Handle] = {}  # of this cycle
        self._lost: RankFailedError | None = None
        self._join: Handle | None = None
        self._wake = threading.Event()
        self._work = threading.Event()
        self._cycle_seconds = options.cycle_seconds
        self._spans: _Recorder | None = None
        self._negotiator = Negotiator(
            rank,
            size,
            capacity=options.cache_capacity,
            threshold_bytes=options.threshold_bytes,
            stall_seconds=options.stall_seconds,
        )
        coordinator = Coordinator(
            size,
            capacity=options.cache_capacity,
            stall_seconds=options.stall_seconds,
            stall_error_seconds=options.stall_error_seconds,
        )
        self._tuning = _Tuning(options) if options.autotune and rank == 0 else None
        self._carrier = Carrier(rank, size, backend=options.backend, timeout_seconds=options.timeout_seconds)
        self._link = (
            Alone(coordinator) if size == 1 else Star(rank, size, coordinator, timeout_seconds=options.timeout_seconds)
        )
        self._watch = Watch(rank, size, self._link.store, self._mourn) if isinstance(self._link, Star) else None
        if options.timeline:
            self.start_timeline(options.timeline, mark_cycles=options.mark_cycles)
        self._thread = threading.Thread(target=self._run, name="headway-exchange", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread still goes through cycles."""
        return self._thread.is_alive()

    @property
    def sets(self) -> dict[int, tuple[int, ...]]:
        """Ranks of each process set; number 0 has all."""
        return dict(self._negotiator.sets)

    def submit(self, submissions: Sequence[Submission], tasks: Sequence[Task]) -> list[Handle]:
        """Have tensors exchanged, all of them or none. A tensor must not be changed until its handle is done.

        Raises InputError for a name that is still in use or a process set without this rank, and what ended the
        exchange, if something has.
        """
        now = time.monotonic()
        with self._lock:
            self._check_lost()
            self._negotiator.submit(submissions, now)
            handles = [Handle(self, submission, task, now) for submission, task in zip(submissions, tasks, strict=True)]
            for submission, handle in zip(submissions, handles, strict=True):
                self._handles[submission.key] = handle
        self._work.set()
        return handles

    def join(self) -> Handle:
        """Take part with zeros until all ranks have joined; the result is the rank that joined last."""
        with self._lock:
            self._check_lost()
            self._negotiator.join()
            submission = Submission(name="join", operation="join")
            self._join = Handle(self, submission, Task(None), time.monotonic())
        self._work.set()
        return self._join

    def hurry(self) -> None:
        """Start the next cycle at once: somebody waits for its outcome."""
        self._wake.set()

    def start_timeline(self, path: str, *, mark_cycles: bool = False) -> None:
        """Record spans from now on. Raises InputError if they are being recorded already."""
        if self._spans is not None:
            raise InputError("a timeline is being recorded", place=path, remedy="stop it first")
        self._spans = _Recorder(path, mark_cycles)

    def stop_timeline(self) -> Path | None:
        """Stop recording, and write the file; its path, or None if nothing was being recorded. Raises FileError."""
        spans, self._spans = self._spans, None
        return None if spans is None else spans.write()

    def shutdown(self) -> None:
        """Leave. Other ranks that still wait for this one raise RankFailedError naming it."""
        with self._lock:
            self._negotiator.stop()
        self._wake.set()
        self._work.set()
        self._thread.join(self.options.timeout_seconds + _LEAVE_SECONDS)
        self.stop_timeline()
        if self._watch is not None:
            self._watch.close()
        if not self._thread.is_alive():
            self._link.close()
            self._carrier.close()

    # The background thread

    def _run(self) -> None:
        try:
            self._cycles()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread, nobody may wait for it for ever
            if not isinstance(error, HeadwayError):
                error = RankFailedError(f"the exchange on rank {self.rank} failed: {type(error).__name__}: {error}")
            self._end(error)
            self._carrier.abort()

    def _cycles(self) -> None:
        failure, idle = "", 0
        while True:
            started = time.monotonic()
            with self._lock:
                message = self._negotiator.message(started, failure)
            answer = self._link.exchange(message, self._tuned)
            with self._lock:
                outcome = self._negotiator.take(answer, started)
                handles = self._take_handles(outcome)
            if answer.cycle_seconds >= 0:
                self._cycle_seconds = answer.cycle_seconds
            for stall in outcome.stalls:
                log.warning("%s", stall)
            for response in outcome.errors:
                if response.submission.key in handles:
                    handles.pop(response.submission.key)._finish(error=MismatchError(response.error))
            if self._spans is not None:
                self._spans.cycle(started)
            failure = self._carry_out(outcome, handles, started)
            if self._negotiator.ended is not None:
                self._end(self._negotiator.ended)
                if outcome.ending is not None:
                    self._carrier.abort()  # some may still be in an exchange with this rank
                return
            idle = 0 if outcome.batches or failure or not self._negotiator.is_idle else idle + 1
            self._rest(started, idle)

    def _rest(self, started: float, idle: int) -> None:
        """Until the next cycle. A rank on its own, which nobody else waits for, sleeps until there is work."""
        self._work.clear()
        if self._negotiator.is_idle and (self.size == 1 or idle > _IDLE_CYCLES):
            self._work.wait(None if self.size == 1 else _IDLE_SECONDS)
            return
        left = started + self._cycle_seconds - time.monotonic()
        if left > 0:
            self._wake.wait(left)
        self._wake.clear()

    def _take_handles(self, outcome: Outcome) -> dict[str, Handle]:
        """The handles of what is answered now."""
        responses = [response for batch in outcome.batches for response in batch] + list(outcome.errors)
        keys = [response.submission.key for response in responses]
        self._under_way = {key: self._handles.pop(key) for key in keys if key in self._handles}
        return dict(self._under_way)

    def _carry_out(self, outcome: Outcome, handles: dict[str, Handle], started: float) -> str:
        """Carry the batches out; what went wrong, or nothing. Handles that got no result wait for the end to come."""
        exchanged_bytes = 0.0
        for batch in outcome.batches:
            first = batch[0].submission
            names = [response.submission.name for response in batch]
            mine = {key: handles[key] for response in batch if (key := response.submission.key) in handles}
            try:
                if first.operation in ("join", "add_process_set", "remove_process_set"):
                    self._settle(batch[0], mine)
                    continue
                if self.rank not in self._negotiator.sets[first.process_set]:
                    continue
                tasks = {key: handle._task for key, handle in mine.items()}
                with self._recorded(names, first, mine) as span:
                    results = self._carrier.run(batch, tasks, span)
            except Exception as error:  # noqa: BLE001 - a backend raises what it likes; all ranks must hear of it
                self._carrier.abort()
                reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
                with self._lock:  # they end with the reason that all ranks will agree on in the next cycle
                    for key, handle in handles.items():
                        if not handle.is_done:
                            self._handles[key] = handle
                return f"{first.operation} of {', '.join(map(repr, names[:3]))}: {reason}"
            for key, handle in mine.items():
                handle._finish(results.get(key))
            exchanged_bytes += sum(response.submission.request().size_bytes for response in batch)
        if self._tuning is not None and exchanged_bytes:
            self._tuning.exchanged(exchanged_bytes)
        return ""

    def _settle(self, response: Response, handles: dict[str, Handle]) -> None:
        """Responses that are about the ranks and carry no tensors."""
        submission = response.submission
        if submission.operation == "join":
            join, self._join = self._join, None
            if join is not None:
                join._finish(response.value)
            return
        if submission.operation == "add_process_set":
            self._carrier.add(response.value, submission.splits)
        else:
            self._carrier.remove(response.value)
        for handle in handles.values():
            handle._finish(response.value)

    def _end(self, error: HeadwayError) -> None:
        with self._lock:
            if self._negotiator.ended is None:
                self._negotiator.ended = error
            left, self._handles = list(self._handles.values()), {}
            if self._join is not None:
                left.append(self._join)
                self._join = None
        for handle in left:
            handle._finish(error=error)

    def _mourn(self, rank: int) -> None:
        """Another rank has died: nobody here waits any longer. The thread comes to its own end."""
        error = died(rank)
        with self._lock:
            if self._negotiator.ended is not None or self._lost is not None:
                return
            self._lost = error
            waiting = [*self._handles.values(), *self._under_way.values()]
            if self._join is not None:
                waiting.append(self._join)
        for handle in waiting:
            handle._finish(error=error)

    def _check_lost(self) -> None:
        if self._lost is not None:
            raise RankFailedError(self._lost.message, remedy=self._lost.remedy)

    def _tuned(self, answer: Answer) -> Answer:
        """Rank 0's answer with what the autotuner wants next."""
        setting = self._tuning.changed() if self._tuning is not None else None
        if setting is None:
            return answer
        return msgspec.structs.replace(
            answer, threshold_bytes=float(setting.threshold_bytes), cycle_seconds=setting.cycle_seconds
        )

    @contextmanager
    def _recorded(
        self, names: Sequence[str], submission: Submission, handles: dict[str, Handle]
    ) -> Iterator[Callable[[str], Any]]:
        spans = self._spans
        if spans is None:
            yield _unrecorded
            return
        operation = submission.operation.replace("_", "").upper()
        started = time.monotonic()
        for handle in handles.values():
            spans.add(f"NEGOTIATE_{operation}", handle.name, handle._since, started, "negotiate")
        yield lambda activity: spans.activity(activity, names)
        for name in names:
            spans.add(operation, name, started, time.monotonic(), "communication")


@contextmanager
def _unrecorded(activity: str) -> Iterator[None]:
    yield


class _Recorder:
    """Spans by tensor, in Horovod's words, until they are written."""

    def __init__(self, path: str, mark_cycles: bool) -> None:
        self._path, self._mark_cycles = path, mark_cycles
        self._origin = time.monotonic()
        self._spans: list[Span] = []

    def add(self, activity: str, tensor: str, start: float, stop: float, kind: str) -> None:
        if len(self._spans) < _MOST_SPANS:
            start = max(start - self._origin, 0.0)
            duration = max(stop - self._origin - start, 0.0)
            self._spans.append(
                Span(name=activity, lane=tensor, start_seconds=start, duration_seconds=duration, kind=kind)
            )

    def cycle(self, started: float) -> None:
        if self._mark_cycles:
            self.add("CYCLE_START", "cycles", started, started, "cycle")

    @contextmanager
    def activity(self, activity: str, tensors: Sequence[str]) -> Iterator[None]:
        start = time.monotonic()
        yield
        stop = time.monotonic()
        for tensor in tensors:
            self.add(activity, tensor, start, stop, "memory" if activity.startswith("MEMCPY") else "communication")

    def write(self) -> Path:
        spans = sorted(self._spans, key=lambda span: (span.start_seconds, -span.duration_seconds))
        Timeline(name="exchange", spans=tuple(spans)).save_horovod(self._path)
        return Path(self._path)


class _Tuning:
    """Feeds the autotuner with bytes per second, over several cycles that exchanged something."""

    def __init__(self, options: Options) -> None:
        start = Setting(threshold_bytes=int(options.threshold_bytes), cycle_seconds=options.cycle_seconds)
        self._tuner = Autotuner(start=start, log=options.autotune_log or None)
        self._used: Setting | None = start
        self._bytes, self._cycles, self._since = 0.0, 0, time.monotonic()

    def exchanged(self, size_bytes: float) -> None:
        self._bytes += size_bytes
        self._cycles += 1
        if self._cycles >= _CYCLES_PER_SAMPLE:
            now = time.monotonic()
            self._tuner.observe(self._bytes / max(now - self._since, 1e-9))
            self._bytes, self._cycles, self._since = 0.0, 0, time.monotonic()

    def changed(self) -> Setting | None:
        setting = self._tuner.suggest()
        if setting == self._used:
            return None
        self._used = setting
        return setting
