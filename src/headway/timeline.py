"""One record for what was predicted, simulated and measured: named spans on named lanes.

A lane is one thing that does one thing at a time: the compute stream of a rank, its communication stream, a link.
`Timeline.to_chrome` writes the Trace Event Format that Perfetto and chrome://tracing open, with a thread for each lane;
`Timeline.to_horovod` writes it as Horovod's Timeline does, with a process for each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from headway.errors import FieldError
from headway.value import Value, write_atomically

__all__ = ["Span", "Timeline"]


class Span(Value):
    """Something that went on from `start_seconds` for `duration_seconds` on one lane."""

    name: str
    lane: str
    start_seconds: float
    duration_seconds: float
    kind: str = ""  # "forward", "backward", "communication", "optimizer", "idle": decides the colour
    detail: dict[str, str | int | float] = {}

    @property
    def stop_seconds(self) -> float:
        return self.start_seconds + self.duration_seconds


class _Event(msgspec.Struct):
    """What we read of an event of a trace; others may have more."""

    ph: str
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | str = 0
    tid: int | str = 0
    args: dict[str, Any] = {}


class Timeline(Value):
    """Spans, and the groups (processes, in Perfetto's words) that their lanes belong to.

    A lane is named `group/lane`, for instance `rank 0/compute`; without a slash it is its own group.
    """

    name: str
    spans: tuple[Span, ...] = ()

    def lanes(self) -> tuple[str, ...]:
        """The lanes in the order in which they first appear."""
        return tuple(dict.fromkeys(span.lane for span in self.spans))

    @property
    def stop_seconds(self) -> float:
        return max((span.stop_seconds for span in self.spans), default=0.0)

    def overlaps(self, *, tolerance_seconds: float = 1e-12) -> list[tuple[Span, Span]]:
        """Pairs of spans on one lane that share more than `tolerance_seconds` of time: a lane that does two things.

        In each pair the first is the one that began first. For every span that begins too early, the pair with the
        span that is in its way; not all the pairs that there are.
        """
        found: list[tuple[Span, Span]] = []
        last: dict[str, Span] = {}
        for span in sorted(self.spans, key=lambda span: (span.start_seconds, span.stop_seconds)):
            before = last.get(span.lane)
            if before is not None:
                shared = min(before.stop_seconds, span.stop_seconds) - span.start_seconds
                # The end of a span is a rounded sum.
                if shared > max(tolerance_seconds, 4 * math.ulp(span.stop_seconds)):
                    found.append((before, span))
            if before is None or span.stop_seconds > before.stop_seconds:
                last[span.lane] = span
        return found

    def disjoint(self) -> Timeline:
        """The same spans with what shares time on a lane moved to further lanes, `LANE (2)`, `LANE (3)` and so on."""
        free: dict[str, list[float]] = {}
        lanes: dict[int, str] = {}
        by_start = sorted(range(len(self.spans)), key=lambda position: self.spans[position].start_seconds)
        for position in by_start:
            span = self.spans[position]
            if not span.duration_seconds:  # a tick takes no time from anybody
                lanes[position] = span.lane
                continue
            ends = free.setdefault(span.lane, [])
            slack = 4 * math.ulp(span.stop_seconds)
            number = next((number for number, end in enumerate(ends) if end <= span.start_seconds + slack), len(ends))
            ends[number : number + 1] = [span.stop_seconds]
            lanes[position] = span.lane if not number else f"{span.lane} ({number + 1})"
        return Timeline(
            name=self.name,
            spans=tuple(
                msgspec.structs.replace(span, lane=lanes[position]) for position, span in enumerate(self.spans)
            ),
        )

    def shifted(self, seconds: float) -> Timeline:
        """The same timeline, `seconds` later."""
        spans = tuple(msgspec.structs.replace(span, start_seconds=span.start_seconds + seconds) for span in self.spans)
        return Timeline(name=self.name, spans=spans)

    def to_chrome(self) -> str:
        """The timeline in the Trace Event Format (JSON object form, complete events, microseconds).

        One thread for each lane, and every span on the thread of its lane. Viewers draw a span that lies within another
        of its thread below it, and spans that cross on top of each other: see `overlaps` and `disjoint`.
        """
        groups: dict[str, int] = {}
        threads: dict[str, int] = {}
        events: list[dict[str, Any]] = []
        for lane in self.lanes():
            group = lane.split("/", 1)[0]
            if group not in groups:
                groups[group] = len(groups)
                events.append(_metadata("process_name", groups[group], 0, group))
            threads[lane] = len(threads)
            events.append(_metadata("thread_name", groups[group], threads[lane], lane.split("/", 1)[-1]))
        for span in self.spans:
            events.append(
                {
                    "name": span.name,
                    "cat": span.kind or "span",
                    "ph": "X",
                    "ts": span.start_seconds * 1e6,
                    "dur": span.duration_seconds * 1e6,
                    "pid": groups[span.lane.split("/", 1)[0]],
                    "tid": threads[span.lane],
                    "args": span.detail,
                }
            )
        return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events}).decode()

    def to_horovod(self) -> str:
        """The timeline as Horovod's Timeline lays it out: a JSON array in which each lane is a process, a tensor's.

        Name the lanes after the tensors. Spans are written as begin and end events ("B" and "E") and nest: a span that
        lies within another is an activity of it. Horovod's names for them are `NEGOTIATE_ALLREDUCE`, then `ALLREDUCE`
        with `QUEUE`, `WAIT_FOR_DATA`, `MEMCPY_IN_FUSION_BUFFER`, `NCCL_ALLREDUCE` (or `MPI_`, `GLOO_`) and
        `MEMCPY_OUT_FUSION_BUFFER` within (docs/timeline.rst of Horovod). A span of no duration is a tick, as for each
        rank that has reported ready. Where two spans on a lane cross, which a stack cannot say, the second goes to a
        lane of its own. Times are whole microseconds in Horovod and fractions of them here.
        """
        rows: dict[str, list[Span]] = {}
        for lane, spans in _by_lane(self.spans).items():
            for number, row in enumerate(_nested(spans)):
                rows[lane if not number else f"{lane} ({number + 1})"] = row
        events: list[dict[str, Any]] = []
        for process, (lane, spans) in enumerate(rows.items(), start=1):  # in Horovod, process 0 is the whole run
            events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": lane}})
            events.append({"name": "process_sort_index", "ph": "M", "pid": process, "args": {"sort_index": process}})
            open_until: list[float] = []
            for span in spans:
                while open_until and open_until[-1] <= span.start_seconds:
                    events.append({"ph": "E", "ts": open_until.pop() * 1e6, "pid": process})
                event: dict[str, Any] = {"name": span.name, "ts": span.start_seconds * 1e6, "pid": process}
                if span.detail:
                    event["args"] = span.detail
                if span.duration_seconds:
                    events.append({"ph": "B", **event})
                    open_until.append(span.stop_seconds)
                else:
                    events.append({"ph": "X", **event, "dur": 0})
            events += [{"ph": "E", "ts": end * 1e6, "pid": process} for end in reversed(open_until)]
        return msgspec.json.encode(events).decode()

    @classmethod
    def from_chrome(cls, text: str | bytes, *, name: str = "", place: str = "") -> Timeline:
        """The timeline that a file in the Trace Event Format holds (object or array form).

        Reads complete events, and the metadata that names processes and threads; a lane is `process/thread`.
        Raises FieldError.
        """
        try:
            data = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise FieldError(f"not JSON: {error}", place=place) from None
        events = data.get("traceEvents") if isinstance(data, dict) else data
        if not isinstance(events, list):
            raise FieldError("no list of traceEvents", place=place, remedy="give a trace in the Trace Event Format")
        try:
            known = [msgspec.convert(event, _Event) for event in events if event.get("ph") in ("M", "X")]
        except (msgspec.ValidationError, AttributeError) as error:
            raise FieldError(f"an event is not understood: {error}", place=place) from None
        processes = {event.pid: str(event.args.get("name")) for event in known if event.name == "process_name"}
        threads = {(event.pid, event.tid): event.args.get("name") for event in known if event.name == "thread_name"}
        spans = []
        for event in known:
            if event.ph != "X":
                continue
            group = processes.get(event.pid, f"process {event.pid}")
            thread = str(threads.get((event.pid, event.tid), event.tid))
            spans.append(
                Span(
                    name=event.name,
                    # `to_chrome` gives a lane without a slash a thread that is named like its process.
                    lane=group if thread == group else f"{group}/{thread}",
                    start_seconds=event.ts * 1e-6,
                    duration_seconds=event.dur * 1e-6,
                    kind="" if event.cat == "span" else event.cat,
                    detail={key: value for key, value in event.args.items() if isinstance(value, str | int | float)},
                )
            )
        return cls(name=name, spans=tuple(spans))

    def save_chrome(self, path: str) -> None:
        """Write `to_chrome` to a file, atomically."""
        write_atomically(path, self.to_chrome())

    def save_horovod(self, path: str) -> None:
        """Write `to_horovod` to a file, atomically."""
        write_atomically(path, self.to_horovod())


def _by_lane(spans: Iterable[Span]) -> dict[str, list[Span]]:
    """Each lane's spans in the order in which they begin, the longer ones first."""
    lanes: dict[str, list[Span]] = {}
    for span in spans:
        lanes.setdefault(span.lane, []).append(span)
    for row in lanes.values():
        row.sort(key=lambda span: (span.start_seconds, -span.duration_seconds))
    return lanes


def _nested(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans in as few rows as come easily, so that in each row any two are apart or one lies within the other."""
    rows: list[list[Span]] = []
    stacks: list[list[float]] = []  # when the spans that are open in each row end
    for span in spans:
        number = 0
        for stack in stacks:
            while stack and stack[-1] <= span.start_seconds:
                stack.pop()
            if not stack or span.stop_seconds <= stack[-1]:
                break
            number += 1
        else:
            rows.append([])
            stacks.append([])
        rows[number].append(span)
        if span.duration_seconds:
            stacks[number].append(span.stop_seconds)
    return rows


def _metadata(name: str, process: int, thread: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": {"name": value}}
