"""One record for what was predicted, simulated and measured: named spans on named lanes.

A lane is one thing that does one thing at a time: the compute stream of a rank, its communication stream, a link.
`Timeline.to_chrome` writes the Trace Event Format that Perfetto and chrome://tracing open.
"""

from __future__ import annotations

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

    def shifted(self, seconds: float) -> Timeline:
        """The same timeline, `seconds` later."""
        spans = tuple(msgspec.structs.replace(span, start_seconds=span.start_seconds + seconds) for span in self.spans)
        return Timeline(name=self.name, spans=spans)

    def to_chrome(self) -> str:
        """The timeline in the Trace Event Format (JSON object form, complete events, microseconds)."""
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


def _metadata(name: str, process: int, thread: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": {"name": value}}
