"""Reads what a run left behind, whole or in part.

A run may have been stopped at any point, so every file may be missing or end in the middle. `read_directory` reads what
is there and keeps a list of what is not, for the page to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from headway.errors import FieldError, FileError, HeadwayError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.prediction import Prediction, StepTime
from headway.search.ranking import Ranking
from headway.timeline import Span, Timeline
from headway.value import read_text
from headway.workload.graph import Affine, OptimizerKind

__all__ = [
    "Gap",
    "Measured",
    "Metrics",
    "ModelGraph",
    "ModelLayer",
    "ModelParameter",
    "ModelSummary",
    "Reference",
    "RunDirectory",
    "RunRecord",
    "read_directory",
    "steps_to_show",
]

T = TypeVar("T")


class Gap(msgspec.Struct, frozen=True):
    """A file that cannot be shown: its name and why, and what the page lacks for it."""

    file: str
    reason: str
    lost: str


class RunRecord(msgspec.Struct, frozen=True):
    """How the run was started and how it ended (`run.json`). Fields it does not know are skipped."""

    script: str = ""
    arguments: tuple[str, ...] = ()
    engine: str = ""
    cluster: str = ""
    started: str = ""  # ISO 8601
    finished: str = ""
    outcome: str = ""
    message: str = ""
    resumed_from: str = ""
    reference_loss: Reference | None = None


class Reference(msgspec.Struct, frozen=True):
    """A loss to compare with: the entropy of the tokens, say."""

    label: str
    value: float


class Measured(msgspec.Struct, frozen=True):
    """What the ranks measured (`measured.json`): mean time of a step, peak bytes of each rank."""

    time: StepTime | None = None
    peak_bytes: tuple[float | None, ...] = ()
    steps: int = 0
    samples_per_second: float = 0.0


# A workload's operators may be many megabytes: these are the parts of it that a page shows, and the rest is skipped.


class ModelLayer(msgspec.Struct, frozen=True):
    """The parts of a `Layer` that a page shows."""

    name: str
    parameters: tuple[str, ...] = ()
    forward_flop: Affine = Affine()
    backward_flop: Affine = Affine()
    saved: Affine = Affine()
    signature: str = ""


class ModelParameter(msgspec.Struct, frozen=True):
    """The parts of a `Parameter` that a page shows."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    trainable: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class ModelGraph(msgspec.Struct, frozen=True):
    """The parts of a `Graph` that a page shows."""

    name: str
    layers: tuple[ModelLayer, ...]
    parameters: tuple[ModelParameter, ...]
    tokens_per_sample: int = 0
    notes: tuple[str, ...] = ()


class ModelSummary(msgspec.Struct, frozen=True):
    """The parts of a `Workload` that a page shows (`workload.json`)."""

    graph: ModelGraph
    optimizer: OptimizerKind = OptimizerKind()
    global_batch: int = 1
    precision: str = "float32"


@dataclass(frozen=True)
class Metrics:
    """One entry for each step that was taken (`metrics.jsonl`), in the order of steps; NaN where a line lacks it.

    A run that went on from a checkpoint takes some steps twice: the later one counts.
    """

    steps: list[int]
    loss: list[float]
    seconds: list[float]
    tokens_per_second: list[float]
    samples: list[float]
    reference_loss: Reference | None = None  # the last that a line gave

    @property
    def samples_per_second(self) -> list[float]:
        return [
            samples / seconds if seconds > 0 else math.nan
            for samples, seconds in zip(self.samples, self.seconds, strict=True)
        ]


@dataclass
class RunDirectory:
    """Everything that a run directory says, as far as it can be read; `gaps` names the rest."""

    path: Path
    record: RunRecord | None = None
    model: ModelSummary | None = None
    cluster: Cluster | None = None
    plan: Plan | None = None
    prediction: Prediction | None = None
    ranking: Ranking | None = None
    metrics: Metrics | None = None
    measured: Measured | None = None
    timeline: Timeline | None = None
    predicted_timeline: Timeline | None = None
    gaps: list[Gap] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_directory(path: str | Path) -> RunDirectory:
    """What the run in a directory left. Raises FileError if it is not a run directory, or nothing in it can be used."""
    path = Path(path)
    if not path.is_dir():
        raise FileError(
            "not a folder" if path.exists() else "no such folder",
            place=str(path),
            remedy="give a folder that `headway run` wrote, such as runs/NAME",
        )
    run = RunDirectory(path)
    run.record = _read(run, ("run.json",), _decoder(RunRecord), "", optional=True)
    run.plan = _read(run, ("plan.json",), _value(Plan), "the plan")
    run.prediction = _read(run, ("prediction.json",), _value(Prediction), "what was predicted")
    run.metrics = _read(run, ("metrics.jsonl",), lambda text, place: _metrics(run, text, place), "loss and throughput")
    run.measured = _read(run, ("measured.json",), _decoder(Measured), "what was measured")
    run.timeline = _read(run, ("timeline.json",), _timeline("measured"), "the measured timeline")
    run.predicted_timeline = _read(
        run,
        ("predicted_timeline.json", "predicted-timeline.json"),
        _timeline("predicted"),
        "the predicted timeline",
        optional=True,
    )
    run.ranking = _read(run, ("ranking.json",), _value(Ranking), "the plans considered", optional=True)
    run.model = _read(run, ("workload.json",), _decoder(ModelSummary), "the model")
    run.cluster = _read(run, ("cluster.json",), _value(Cluster), "the machine")
    usable = (run.record, run.plan, run.prediction, run.metrics, run.measured, run.timeline, run.model, run.cluster)
    if all(piece is None for piece in usable):
        broken = [gap for gap in run.gaps if gap.reason != _MISSING]
        if broken:
            reasons = "; ".join(f"{gap.file}: {gap.reason}" for gap in broken)
            raise FileError(
                f"none of its files can be used ({reasons})", place=str(path), remedy="run it again with `headway run`"
            )
        raise FileError(
            "not a run directory: no plan.json, metrics.jsonl or any other file of a run",
            place=str(path),
            remedy="give a folder that `headway run` wrote, such as runs/NAME",
        )
    return run


_MISSING = "missing"


def _read(
    run: RunDirectory, names: tuple[str, ...], decode: Callable[[str, str], T], lost: str, *, optional: bool = False
) -> T | None:
    """The content of the first of these files that is there; otherwise None, and a gap in the run."""
    path = next((run.path / name for name in names if (run.path / name).exists()), None)
    if path is None:
        if not optional:
            run.gaps.append(Gap(names[0], _MISSING, lost))
        return None
    try:
        return decode(read_text(path), path.name)
    except HeadwayError as error:
        run.gaps.append(Gap(path.name, error.message, lost))
        return None


def _value(kind: type[T]) -> Callable[[str, str], T]:
    return lambda text, place: kind.from_json(text, place=place)  # type: ignore[attr-defined]


def _decoder(kind: type[T]) -> Callable[[str, str], T]:
    decoder = msgspec.json.Decoder(kind)

    def decode(text: str, place: str) -> T:
        try:
            return decoder.decode(text)
        except msgspec.ValidationError as error:
            raise FieldError(str(error), place=place) from None
        except msgspec.DecodeError as error:
            raise FieldError(f"not JSON: {error}", place=place) from None

    return decode


def _timeline(name: str) -> Callable[[str, str], Timeline]:
    return lambda text, place: Timeline.from_chrome(text, name=name, place=place)


def _metrics(run: RunDirectory, text: str, place: str) -> Metrics:
    lines: dict[int, dict[str, Any]] = {}
    bad: list[int] = []
    reference: Reference | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            # The standard parser, because a loss may be NaN, which JSON proper does not know.
            item = json.loads(line)
            lines[int(item["step"])] = item
            if item.get("reference_loss") is not None:
                reference = msgspec.convert(item["reference_loss"], Reference)
        except (ValueError, TypeError, KeyError):  # msgspec's ValidationError is a ValueError
            bad.append(number)
    if not lines:
        raise FieldError("no line of it can be read" if bad else "empty", place=place)
    if bad:
        where = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first of them {bad[0]},"
        run.gaps.append(Gap(place, f"{where} cannot be read", "these steps"))

    def column(name: str) -> list[float]:
        values = (lines[step].get(name) for step in sorted(lines))
        return [
            float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
            for value in values
        ]

    return Metrics(
        steps=sorted(lines),
        loss=column("loss"),
        seconds=column("seconds"),
        tokens_per_second=column("tokens_per_second"),
        samples=column("samples"),
        reference_loss=reference,
    )


def steps_to_show(timeline: Timeline, *, step_seconds: float = 0.0, steps: int = 1) -> tuple[str, float, float] | None:
    """(what it is, start, stop in seconds) of the last `steps` whole steps in a timeline; None if it has no spans.

    A span says which step it belongs to in its detail (`step`), or a span of kind `step` covers it. Where no span says
    so, this is the whole timeline, or its end if that is much longer than `step_seconds`.
    """
    if not timeline.spans:
        return None
    bounds: dict[int, tuple[float, float]] = {}
    for span in timeline.spans:
        number = _step_of(span)
        if number is not None:
            begin, end = bounds.get(number, (math.inf, -math.inf))
            bounds[number] = (min(begin, span.start_seconds), max(end, span.stop_seconds))
    if bounds:
        chosen = sorted(bounds)[-steps:]
        what = f"step {chosen[0]}" if len(chosen) == 1 else f"steps {chosen[0]} to {chosen[-1]}"
        return what, min(bounds[step][0] for step in chosen), max(bounds[step][1] for step in chosen)
    first, last = min(span.start_seconds for span in timeline.spans), timeline.stop_seconds
    if step_seconds > 0 and last - first > (steps + 1) * step_seconds:
        return "the end of the recording", last - steps * step_seconds, last
    return "the recording", first, last


def _step_of(span: Span) -> int | None:
    number = span.detail.get("step")
    if number is None and span.kind == "step":
        match = re.search(r"\d+", span.name)
        number = int(match[0]) if match else None
    return number if isinstance(number, int) else None
