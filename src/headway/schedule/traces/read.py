"""Traces of jobs as others publish them, read into `Job`s: eight formats, told apart by their columns.

| format | whose | times | what is added to it |
|---|---|---|---|
| `tiresias` | Tiresias's simulator (NSDI 2019) | s | |
| `philly` | a table derived from Microsoft's Philly (Jeon et al., ATC 2019) | local time, s | names are line numbers |
| `gavel` | Gavel's traces (OSDI 2020), tab separated | s | run times: steps over measured steps per second |
| `muri` | Muri's traces (SIGCOMM 2022) | ms | |
| `helios` | SenseTime's Helios (SC 2021), `cluster_log.csv` | local time, s | |
| `alibaba` | Alibaba's PAI (NSDI 2022): task table, or its simulator's | s | fractions of a GPU are rounded up |
| `sia` | Pollux's and Sia's workloads (OSDI 2021, SOSP 2023) | s | run times: GPU-hours of each application |
| `headway` | our own: the fields of `Job` as columns | s | |

Nothing is dropped in silence. Whatever is wrong with a row is a `Problem` with the line it stands on. All are found
before anything is returned, and then either all refused at once (`bad="refuse"`) or kept beside the jobs
(`bad="flag"`), each with what became of its row.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from headway.errors import FieldError, FileError, InputError
from headway.schedule.job import Job
from headway.schedule.traces.formats import (
    ELASTIC,
    KNOWN_MODELS,
    LAYOUTS,
    OWN_COLUMNS,
    SIA_DEVICE_HOURS,
    Context,
    Format,
    Line,
    Problem,
)
from headway.value import Value, read_text, write_atomically

__all__ = [
    "FORMATS",
    "SIA_DEVICE_HOURS",
    "Problem",
    "Rates",
    "Trace",
    "detect",
    "read_rates",
    "read_throughputs",
    "read_trace",
    "unfit",
    "write_trace",
]

Rates = dict[str, dict[tuple[str, int], dict[tuple[str, int] | None, float]]]
"""Gavel's table: kind of device, job type and devices, and beside whom (None: alone) to steps per second."""

LONGEST_SECONDS = 366 * 86400.0
_SHOWN = 50  # problems that an error's text lists; its count is of all


class Trace(Value):
    """Jobs in the order of submission, from `format`; `notes` state units and whatever was derived or passed over."""

    name: str
    format: str
    jobs: tuple[Job, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def left_out(self) -> int:
        """Rows that are no job of `jobs` because of a problem."""
        return len({problem.line for problem in self.problems if problem.effect == "left out"})

    @property
    def span_seconds(self) -> float:
        """From the first submission to the last."""
        return self.jobs[-1].submit_seconds - self.jobs[0].submit_seconds if self.jobs else 0.0

    @property
    def service(self) -> float:
        """Device-seconds that all jobs need."""
        return math.fsum(job.service for job in self.jobs)

    def load(self, devices: int) -> float:
        """Device-seconds asked for over those that `devices` offer while jobs are submitted; inf for one instant."""
        return self.service / (devices * self.span_seconds) if self.span_seconds > 0 else math.inf


FORMATS: tuple[str, ...] = tuple(LAYOUTS)
"""The names of the formats that are read."""


def detect(text: str, *, place: str = "trace") -> str:
    """Which of `FORMATS` a file's text is in. Raises FieldError that says which columns it lacks for each."""
    return _find(text, None, place)[0]


def _find(text: str, name: str | None, place: str) -> tuple[str, Format]:
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise InputError("the trace is empty", place=place, remedy=f"formats that are read: {', '.join(FORMATS)}")
    candidates = LAYOUTS if name is None else {name: LAYOUTS[name]}
    columns = {part.strip() for part in first.split(",")}
    lacking = []
    for own, variants in candidates.items():
        for form in variants:
            parts = [part.strip() for part in first.split(form.separator)]
            bare = form.header and len(parts) == len(form.header) and not set(form.header) <= set(parts)
            # A file without a header is told by its separator and how many columns it has.
            if bare and (
                form.separator == "\t" or (parts[2].replace(".", "", 1).isdigit() and columns.isdisjoint(form.columns))
            ):
                return own, form
            if set(form.columns) <= columns:
                return own, form
            if form.separator == ",":
                lacking.append(f"{own} lacks {', '.join(c for c in form.columns if c not in columns)}")
    raise FieldError(
        f"the columns {first[:80]!r} are of no known format" + (f" ({'; '.join(lacking)})" if name else ""),
        place=f"{place}: line 1",
        remedy=f"formats that are read: {', '.join(FORMATS)} (docs/schedule.md lists their columns)",
    )


def read_throughputs(path: str | Path) -> dict[str, dict[tuple[str, int], float]]:
    """Gavel's table of measured steps per second: device kind to (job type, devices) to rate, for jobs that run alone.

    Raises FileError, FieldError.
    """
    return {kind: {key: rates[None] for key, rates in table.items()} for kind, table in read_rates(path).items()}


def read_rates(path: str | Path) -> Rates:
    """Gavel's whole table: device kind to (job type, devices) to steps per second, beside each other (job type,
    devices) on the same devices, and alone (None). Raises FileError, FieldError."""
    return _read_rates(str(path))


@functools.lru_cache(maxsize=4)
def _read_rates(path: str) -> Rates:
    try:
        found: Rates = {}
        for kind, table in json.loads(read_text(path)).items():
            found[kind] = {}
            for key, rates in table.items():
                own = found[kind][_job_type(key)] = {None: float(rates["null"])}
                for other, pair in rates.items():
                    if other != "null":
                        first, _ = pair
                        own[_job_type(other)] = float(first)
                if not all(math.isfinite(rate) and rate >= 0 for rate in own.values()):
                    raise ValueError(f"a rate of {key} on {kind} is below 0 or not finite")
        return found
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FieldError(f"not Gavel's table of throughputs: {error!r}", place=path) from None


def _job_type(key: str) -> tuple[str, int]:
    """A key is written as Python writes ('ResNet-18 (batch size 16)', 1)."""
    model, _, devices = key.strip("()").rpartition(",")
    return model.strip().strip("'\""), int(devices)


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    bad: str = "refuse",
    devices: int | None = None,
    throughputs: str | Path | None = None,
    device_hours: Mapping[str, float] | None = None,
    models: Collection[str] | None = None,
    longest_seconds: float = LONGEST_SECONDS,
    limit: int | None = None,
) -> Trace:
    """The jobs of a trace file, sorted by submission (equal ones as they stand), the first submitted at 0.

    - `format`: one of `FORMATS`; None: told by the columns. `limit`: only so many jobs, the first submitted.
    - `bad`: "refuse" raises InputError with every problem and its line; "flag" keeps them in `Trace.problems` and does
      what their `effect` says.
    - `devices`: how many the cluster has: a job that asks for more can never run. None: not checked.
    - `throughputs`: Gavel's table, for its traces; None: `simulation_throughputs.json` beside the trace.
    - `device_hours`: of Sia's applications, over `SIA_DEVICE_HOURS`. `models`: the known ones, where the format names
      models; None: those of the public traces. `longest_seconds`: what lasts longer is taken for an error.
    """
    place = str(path)
    if bad not in ("refuse", "flag"):
        raise InputError(f"bad rows: {bad!r}", place=place, remedy="refuse or flag")
    if format is not None and format not in LAYOUTS:
        raise InputError(f"no trace format {format!r}", place=place, remedy=f"one of {', '.join(FORMATS)}")
    text = read_text(path)
    name, form = _find(text, format, place)
    rates = None
    if name == "gavel":
        table = Path(throughputs) if throughputs else Path(path).parent / "simulation_throughputs.json"
        if not table.exists():
            raise FileError(
                "a trace of Gavel's gives steps, not run times, and its table of throughputs is not here",
                place=str(table), remedy="give Gavel's simulation_throughputs.json as --throughputs",
            )  # fmt: skip
        rates = read_throughputs(table)
    context = Context(rates, {**SIA_DEVICE_HOURS, **(device_hours or {})}, Path(path).stem)
    known = models if models is not None else KNOWN_MODELS.get(name)
    problems: list[Problem] = []
    found: list[tuple[float, int, dict[str, Any]]] = []
    passed_over = 0
    for line in _lines(text, form, problems):
        fields = form.read(line, context)
        if fields is None:
            passed_over += 1
            continue
        if not fields["name"]:
            line.wrong("the id is missing")
        if fields["duration_seconds"] > longest_seconds:
            days = fields["duration_seconds"] / 86400
            line.wrong(f"lasts {days:,.0f} days, more than {longest_seconds / 86400:g}", "duration")
        if devices is not None and fields["devices"] > devices:
            line.wrong(f"asks for {fields['devices']} devices of {devices}: it can never start", "size")
        if known is not None and fields.get("model", "") not in known:
            problems.append(
                Problem(line=line.number, kind="model", message=f"unknown model {fields['model']!r}", effect="kept")
            )
        if line.is_whole:
            found.append((fields["submit_seconds"], line.number, fields))
    problems += _disorder(found) if form.is_ordered else []
    problems += _renamed(found)
    if bad == "refuse":
        _refuse(problems, place)
    found.sort(key=lambda item: item[:2])
    notes = [f"{name}: {form.unit}"]
    if passed_over:
        notes.append(f"{passed_over:,} rows ask for no GPU and are no jobs here")
    if not form.is_ordered and any(later[1] < earlier[1] for earlier, later in itertools.pairwise(found)):
        notes.append("rows stood in another order and were sorted by submission")
    if limit is not None and len(found) > limit:
        notes.append(f"the first {limit:,} of {len(found):,} jobs")
        found = found[:limit]
    first = found[0][0] if found else 0.0
    jobs = tuple(Job(**{**fields, "submit_seconds": submitted - first}) for submitted, _, fields in found)
    ordered = tuple(sorted(problems, key=lambda problem: problem.line))
    return Trace(name=Path(path).stem, format=name, jobs=jobs, problems=ordered, notes=tuple(notes))


def _lines(text: str, form: Format, problems: list[Problem]) -> Iterable[Line]:
    rows = csv.reader(io.StringIO(text), delimiter=form.separator, quoting=csv.QUOTE_MINIMAL)
    header: list[str] | None = None
    for row in rows:
        number = rows.line_num
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if header is None:
            stripped = [column.strip() for column in row]
            header = stripped if set(form.columns) <= set(stripped) else list(form.header)
            if header == stripped:
                continue
        if len(row) != len(header):
            message = f"{len(row)} columns where there should be {len(header)}"
            problems.append(Problem(line=number, kind="field", message=message))
            continue
        yield Line(number, dict(zip(header, row, strict=True)), problems)


def _disorder(found: list[tuple[float, int, dict[str, Any]]]) -> list[Problem]:
    latest, problems = -math.inf, []
    for submitted, number, _ in found:
        if submitted < latest:
            message = f"submitted at {submitted:g} s, before a row above it ({latest:g} s)"
            problems.append(Problem(line=number, kind="order", message=message, effect="sorted"))
        latest = max(latest, submitted)
    return problems


def _renamed(found: list[tuple[float, int, dict[str, Any]]]) -> list[Problem]:
    """Ids that stand twice: the later ones get another, which is none of the others'."""
    names: dict[str, int] = {}
    problems = []
    taken = {fields["name"] for _, _, fields in found}
    for _, number, fields in found:
        name = fields["name"]
        if name not in names:
            names[name] = number
            continue
        again = 2
        while f"{name}#{again}" in taken:
            again += 1
        fields["name"] = f"{name}#{again}"
        taken.add(fields["name"])
        message = f"id {name!r} stands on line {names[name]} already; this one is {fields['name']!r}"
        problems.append(Problem(line=number, kind="duplicate", message=message, effect="renamed"))
    return problems


def _refuse(problems: Collection[Problem], place: str) -> None:
    """InputError that lists `problems` with their lines, if there are any."""
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: problem.line)
    listed = "\n".join(f"  line {problem.line}: {problem.message}" for problem in ordered[:_SHOWN])
    more = f"\n  and {len(ordered) - _SHOWN:,} more" if len(ordered) > _SHOWN else ""
    raise InputError(
        f"{len(ordered):,} problem{'s' if len(ordered) > 1 else ''}\n{listed}{more}",
        place=place,
        remedy="mend the rows, or say --bad flag to go on without them (each is listed, and the exit code says so)",
    )


def unfit(trace: Trace, devices: int, *, bad: str = "refuse") -> Trace:
    """The trace without the jobs that ask for more than `devices`: refused (InputError) or flagged, as in `read_trace`.

    For traces that were not read for a cluster; `Problem.line` is the job's position, from 1.
    """
    problems = [
        Problem(line=at, kind="size", message=f"{job.name} asks for {job.devices} devices of {devices}")
        for at, job in enumerate(trace.jobs, start=1)
        if job.devices > devices
    ]
    if bad == "refuse":
        _refuse(problems, trace.name)
    jobs = tuple(job for job in trace.jobs if job.devices <= devices)
    return Trace(
        name=trace.name, format=trace.format, jobs=jobs, problems=(*trace.problems, *problems), notes=trace.notes
    )


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace in our own format, which `read_trace` reads back. Raises FileError."""
    columns = (*OWN_COLUMNS, "model", "user", "queue", *ELASTIC)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for job in trace.jobs:
        values = [getattr(job, column) for column in columns]
        writer.writerow([repr(value) if isinstance(value, float) else value for value in values])
    write_atomically(path, out.getvalue())
