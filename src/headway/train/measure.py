"""Where the time of a step went, and how much memory it took, measured on the rank itself.

Time. A step is divided into four parts that add up: waiting for communication that compute did not hide, waiting for
other pipeline stages (the bubble, which includes the passing of activations that nothing hides), the optimizer's
update, and the rest, which is compute. Waiting is what the main thread spends in `Work.wait`, and in backward after the
last gradient bucket was handed over for reduction. On a GPU the boundaries are CUDA events on the compute stream.

Memory. On a GPU, the peak that the caching allocator reports. On a CPU, the same notion: the parameters, gradients,
optimizer states and buffers alive before a step, plus the highest level that torch's CPU allocator reached above that
during one step, taken from its own log of every allocation. Resident memory above what the process had when the session
began is reported beside it: it adds what torch does not allocate (gloo's buffers, library state, fragmentation).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.predict.prediction import StepTime
from headway.timeline import Span, Timeline
from headway.value import Value

__all__ = ["Measured", "Meter", "allocated_peak", "reset_resident_peak", "resident_bytes", "resident_peak"]

_TIMELINE_STEPS = 3


class Measured(Value):
    """What one rank measured: medians over the steps after warm-up, and its peak of memory in bytes.

    `peak_bytes` counts what torch allocated, `peak_resident_bytes` what the process held above its start (0: unknown).
    `tier_bytes`: the most that rested in each tier off the device, and what its transfer buffers held ("buffers").
    """

    rank: int
    time: StepTime
    peak_bytes: float
    peak_resident_bytes: float = 0.0
    tier_bytes: dict[str, float] = {}
    steps: int = 0
    spans: tuple[Span, ...] = ()


class Meter:
    """The stop-watch of one rank. `step()` surrounds a step, `section(kind)` what belongs to one part of it.

    Kinds: "communication", "bubble", "optimizer" are parts; "forward" and "backward" are drawn in the timeline only.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self.waiting_kind = "communication"  # what a wait outside of any section counts as
        self.last_bucket: Any = None  # when DDP handed over the last gradients of the backward pass going on
        self.times: list[StepTime] = []
        self.spans: list[Span] = []
        self.last: StepTime | None = None
        self._sections: list[tuple[str, str, Any, Any, str]] = []
        self._depth = 0  # a wait within a section of waiting is part of it, not to be counted twice
        self._within = ""  # ZeRO-1 hands out parameters inside the optimizer's step: that is communication, not update
        self._origin = 0.0
        self._traced_steps = 0
        self._install()

    def _install(self) -> None:
        """Make `Work.wait` report to the meter that is at work. Once for the process."""
        global _wait
        if _wait is None and dist.is_available():
            _wait = dist.Work.wait
            dist.Work.wait = _timed_wait  # type: ignore[method-assign]

    def mark(self) -> Any:
        """This moment, on the clock of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, stop: Any) -> float:
        return stop - start if self.device.type != "cuda" else start.elapsed_time(stop) * 1e-3

    @contextlib.contextmanager
    def section(self, kind: str, name: str = "") -> Iterator[None]:
        """Count what goes on inside as `kind`; a wait inside "forward" or "backward" is communication."""
        start, outer, within = self.mark(), self.waiting_kind, self._within
        waits = kind in ("communication", "bubble")
        self.waiting_kind = "communication"
        self._within = kind if kind == "optimizer" else within
        self._depth += waits
        try:
            yield
        finally:
            self.waiting_kind, self._within = outer, within
            self._depth -= waits
            stop = self.mark()
            self.add(kind, start, stop, name)
            if kind == "backward" and self.last_bucket is not None:
                self.add("communication", self.last_bucket, stop, "gradients")
                self.last_bucket = None

    def add(self, kind: str, start: Any, stop: Any, name: str = "") -> None:
        """Count the time between two marks as `kind`, unless it lies within a section of waiting."""
        if self._depth == 0:
            self._sections.append((kind, name or kind, start, stop, self._within))

    @contextlib.contextmanager
    def step(self, number: int, *, keep: bool = True) -> Iterator[None]:
        """Measure one step. With `keep` false (warm-up, or a step with a memory log) it does not count."""
        global _active
        self._sections.clear()
        _active = self
        start = self.mark()
        try:
            yield
        finally:
            _active = None
        stop = self.mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = self._seconds(start, stop)
        parts: dict[str, float] = {"communication": 0.0, "bubble": 0.0, "optimizer": 0.0}
        for kind, _, begin, end, within in self._sections:
            seconds = self._seconds(begin, end)
            if kind in parts:
                parts[kind] += seconds
                if within:
                    parts[within] -= seconds
        self.last = StepTime(
            step_seconds=total,
            compute_seconds=max(0.0, total - sum(parts.values())),
            communication_seconds=parts["communication"],
            bubble_seconds=parts["bubble"],
            optimizer_seconds=parts["optimizer"],
        )
        if keep:
            self.times.append(self.last)
            if self._traced_steps < _TIMELINE_STEPS:
                self._trace(number, start, total)

    def _trace(self, number: int, start: Any, total: float) -> None:
        if self._traced_steps == 0:
            self._origin = 0.0
        self._traced_steps += 1
        for kind, name, begin, end, _ in self._sections:
            lane = "communication" if kind in ("communication", "bubble") else "compute"
            self.spans.append(
                Span(
                    name=name,
                    lane=f"rank {self.rank}/{lane}",
                    start_seconds=self._origin + self._seconds(start, begin),
                    duration_seconds=self._seconds(begin, end),
                    kind={"bubble": "idle"}.get(kind, kind),
                    detail={"step": number},
                )
            )
        self._origin += total

    def measured(
        self, *, peak_bytes: float, peak_resident_bytes: float = 0.0, tier_bytes: dict[str, float] | None = None
    ) -> Measured:
        """Medians of the steps that counted."""

        def median(pick: Callable[[StepTime], float]) -> float:
            return statistics.median(pick(moment) for moment in self.times) if self.times else 0.0

        total = median(lambda moment: moment.step_seconds)
        communication = median(lambda moment: moment.communication_seconds)
        bubble = median(lambda moment: moment.bubble_seconds)
        optimizer = median(lambda moment: moment.optimizer_seconds)
        return Measured(
            rank=self.rank,
            # Medians of parts need not add up to the median of the whole: compute takes the difference.
            time=StepTime(
                step_seconds=total,
                compute_seconds=max(0.0, total - communication - bubble - optimizer),
                communication_seconds=communication,
                bubble_seconds=bubble,
                optimizer_seconds=optimizer,
            ),
            peak_bytes=peak_bytes,
            peak_resident_bytes=peak_resident_bytes,
            tier_bytes=tier_bytes or {},
            steps=len(self.times),
            spans=tuple(self.spans),
        )

    def timeline(self, name: str, others: Iterable[Measured] = ()) -> Timeline:
        """The measured steps of this rank and the others. Ranks are aligned at the beginning of each step."""
        return Timeline(name=name, spans=tuple(span for each in others for span in each.spans) or tuple(self.spans))


_wait: Callable[..., Any] | None = None
_active: Meter | None = None


def _timed_wait(self: Any, *args: Any, **kwargs: Any) -> Any:
    assert _wait is not None
    meter = _active
    if meter is None:
        return _wait(self, *args, **kwargs)
    start = meter.mark()
    try:
        return _wait(self, *args, **kwargs)
    finally:
        meter.add(meter.waiting_kind, start, meter.mark())


@contextlib.contextmanager
def allocated_peak(found: list[float]) -> Iterator[None]:
    """Append to `found` the most bytes that torch's CPU allocator held inside, above the level at the beginning."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent():
        known = torch.ones(1)
        profiler.start()
        del known  # freed but not logged as made: torch warns of the first such block, and here nobody need read it
    try:
        yield
    finally:
        with _silent():
            profiler.stop()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    # The profiler sees no block that another thread frees (gloo's threads free what they have sent); but when its
    # address is given out again, it must have been free.
    blocks = [event for event in _all_events(results.experimental_event_tree()) if event.tag == _EventType.Allocation]
    live: dict[int, int] = {}
    level = peak = 0
    for event in sorted(blocks, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        level -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            level += size
            peak = max(peak, level)
    found.append(float(peak))


def _all_events(events: Iterable[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        yield event


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that the profiler writes to stderr whenever it starts or stops."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def resident_bytes() -> float:
    """Resident memory of this process, or 0 where the kernel does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def reset_resident_peak() -> None:
    """Begin a new high-water mark of resident memory (proc(5), clear_refs); the old stays where that is forbidden."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> float:
    """The high-water mark of resident memory in bytes, or 0 where the kernel does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    except OSError:
        return 0.0
    return 0.0
