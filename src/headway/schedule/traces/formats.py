"""The formats that traces of jobs are published in: the columns of each, and how a row becomes the fields of a `Job`.

`headway.schedule.traces` reads files with them; a new format is one function and one entry of `LAYOUTS` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from headway.value import Value

__all__ = [
    "ELASTIC",
    "KNOWN_MODELS",
    "LAYOUTS",
    "OWN_COLUMNS",
    "SIA_DEVICE_HOURS",
    "Context",
    "Format",
    "Line",
    "Problem",
]

# The models that the public traces name; `read_trace(models=...)` takes others.
KNOWN_MODELS = {
    "tiresias": frozenset((
        "vgg19", "vgg16", "vgg11", "alexnet", "resnet152", "resnet101", "resnet50", "inception4", "inception3",
        "googlenet",
    )),
    "muri": frozenset((
        "a2c", "bert", "dqn", "gpt2", "resnet18", "shufflenet_v2_x1_0", "vgg16", "vgg19",
    )),
}  # fmt: skip

# GPU-hours of one job of each application. The paper gives ranges (Pollux, OSDI 2021, table 1: small 0-1, medium 1-10,
# large 10-100, extra large 100-1000 GPU-hours); these are their geometric means (0.3 for the lowest).
SIA_DEVICE_HOURS: dict[str, float] = {
    "cifar10": 0.3, "ncf": 0.3, "bert": 3.16, "deepspeech2": 3.16, "yolov3": 31.6, "imagenet": 316.0, "gpt_pmp": 316.0,
}  # fmt: skip


class Problem(Value):
    """What is wrong with a line of a trace.

    - `kind`: "field" (missing, no number, negative), "duration" (absurd), "model" (unknown), "order" (submitted before
      the row above it), "duplicate" (an id for the second time), "size" (more devices than there are).
    - `effect`: what becomes of the row when problems are flagged: "left out", "kept", "sorted", "renamed".
    """

    line: int
    kind: str
    message: str
    effect: str = "left out"

    def __str__(self) -> str:
        return f"line {self.line}: {self.message} ({self.effect})"


class Line:
    """One row by the names of its columns; what is wrong with it is added to `problems`."""

    def __init__(self, number: int, fields: Mapping[str, str | None], problems: list[Problem]) -> None:
        self.number, self.fields, self.problems = number, fields, problems
        self.is_whole = True

    def text(self, column: str) -> str:
        """The field, without blanks around it; empty where there is none."""
        return (self.fields.get(column) or "").strip()

    def wrong(self, message: str, kind: str = "field") -> float:
        """Something because of which the row is no job; nan."""
        self.is_whole = False
        self.problems.append(Problem(line=self.number, kind=kind, message=message))
        return math.nan

    def remark(self, message: str, kind: str) -> None:
        """Something to flag about a row that is kept."""
        self.problems.append(Problem(line=self.number, kind=kind, message=message, effect="kept"))

    def amount(self, column: str, *, above: float | None = None, least: float | None = None) -> float:
        """A finite number; nan if it is none, or out of bounds."""
        text = self.text(column)
        if not text:
            return self.wrong(f"{column} is missing")
        try:
            value = float(text)
        except ValueError:
            return self.wrong(f"{column} is {text!r}, not a number")
        if not math.isfinite(value):
            return self.wrong(f"{column} is {text}, not finite")
        if above is not None and not value > above:
            return self.wrong(f"{column} is {text}, not above {above:g}")
        if least is not None and value < least:
            return self.wrong(f"{column} is {text}, below {least:g}")
        return value

    def count(self, column: str, *, least: int = 1) -> int:
        """A whole number; `least` if it is none."""
        value = self.amount(column, least=least)
        if math.isnan(value):
            return least
        if value != int(value):
            self.wrong(f"{column} is {self.text(column)}, not a whole number")
            return least
        return int(value)

    def moment(self, column: str) -> float:
        """A calendar time, in seconds since 1970 as if it were UTC."""
        try:
            return (datetime.fromisoformat(self.text(column)) - _EPOCH).total_seconds()
        except (ValueError, TypeError):
            return self.wrong(f"{column} is {self.text(column)!r}, not a time like 2017-10-09 07:01:55")


_EPOCH = datetime(1970, 1, 1)


class Context(NamedTuple):
    """What formats need beside the file: Gavel's throughputs, Sia's GPU-hours, the name of the file."""

    throughputs: Mapping[str, Mapping[tuple[str, int], float]] | None
    device_hours: Mapping[str, float]
    stem: str


# A format reads a line into the fields of a Job, or None for a row that is none by the format's own meaning.
_Reader = Callable[[Line, Context], "dict[str, Any] | None"]


def _tiresias(line: Line, context: Context) -> dict[str, Any]:
    return {
        "name": line.text("job_id"),
        "submit_seconds": line.amount("submit_time", least=0),
        "devices": line.count("num_gpu"),
        "duration_seconds": line.amount("duration", above=0),
        "model": line.text("model_name"),
        "iterations": line.count("iterations", least=0) if line.text("iterations") else 0,
    }


def _muri(line: Line, context: Context) -> dict[str, Any]:
    fields = _tiresias(line, context)
    return {
        **fields,
        "submit_seconds": fields["submit_seconds"] / 1000,
        "duration_seconds": fields["duration_seconds"] / 1000,
    }


def _philly(line: Line, context: Context) -> dict[str, Any]:
    return {
        "name": f"{context.stem}-{line.number}",
        "submit_seconds": line.moment("timestamp"),
        "devices": line.count("num_gpus"),
        "duration_seconds": line.amount("duration", above=0),
        "queue": line.text("cluster"),
    }


def _helios(line: Line, context: Context) -> dict[str, Any] | None:
    if line.text("gpu_num") == "0":
        return None
    return {
        "name": line.text("job_id"),
        "submit_seconds": line.moment("submit_time"),
        "devices": line.count("gpu_num"),
        "duration_seconds": line.amount("duration", above=0),
        "user": line.text("user"),
        "queue": line.text("vc"),
    }


def _alibaba_tasks(line: Line, context: Context) -> dict[str, Any] | None:
    if not line.text("plan_gpu") or line.text("plan_gpu") == "0" or line.text("plan_gpu") == "0.0":
        return None
    start = line.amount("start_time", least=0)
    stop = line.amount("end_time", least=0)
    instances = line.count("inst_num")
    share = line.amount("plan_gpu", above=0) / 100  # the table counts in hundredths of a GPU
    if not (math.isnan(start) or math.isnan(stop)) and stop <= start:
        line.wrong(f"end_time {stop:g} is not after start_time {start:g}")
    return {
        "name": f"{line.text('job_name')}/{line.text('task_name')}",
        "submit_seconds": start,
        "devices": max(1, math.ceil(instances * share)) if share == share else 1,
        "duration_seconds": stop - start,
        "kinds": (line.text("gpu_type"),) if line.text("gpu_type") not in ("", "MISC") else (),
    }


def _alibaba_jobs(line: Line, context: Context) -> dict[str, Any] | None:
    if not line.text("num_gpu") or _float_or_nan(line.text("num_gpu")) == 0:
        return None
    each = line.amount("num_gpu", above=0)
    instances = line.count("num_inst") if line.text("num_inst") else 1
    kind = line.text("gpu_type")
    return {
        "name": line.text("job_id") or line.text("job_name") or f"{context.stem}-{line.number}",
        "submit_seconds": line.amount("submit_time", least=0),
        "devices": max(1, math.ceil(each * instances)) if each == each else 1,
        "duration_seconds": line.amount("duration", above=0),
        "user": line.text("user"),
        "model": line.text("group"),
        "kinds": (kind,) if kind not in ("", "MISC", "CPU") else (),
    }


def _float_or_nan(text: str) -> float:
    """The number that `text` is, or nan."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _sia(line: Line, context: Context) -> dict[str, Any]:
    application = line.text("application")
    devices = line.count("num_replicas")
    hours = context.device_hours.get(application, math.nan)
    if math.isnan(hours):
        line.wrong(f"application {application!r} has no known GPU-hours", "model")
    return {
        "name": line.text("name"),
        "submit_seconds": line.amount("time", least=0),
        "devices": devices,
        "duration_seconds": 3600 * hours / devices,
        "model": application,
        "minimum_devices": 1,
        "maximum_devices": 2 * devices,
    }


def _gavel(line: Line, context: Context) -> dict[str, Any]:
    assert context.throughputs is not None
    model, devices, steps = line.text("job_type"), line.count("scale_factor"), line.amount("total_steps", above=0)
    rates = {kind: table[model, devices] for kind, table in context.throughputs.items() if table.get((model, devices))}
    if "v100" not in rates:
        alone = {kind: table.get((model, 1), 0.0) * devices for kind, table in context.throughputs.items()}
        rates = {kind: rate for kind, rate in alone.items() if rate} if alone.get("v100") else {}
        message = f"no throughput was measured for {model!r} on {devices} v100"
        if rates:
            line.remark(f"{message}: taken as {devices} times that of one", "model")
        else:
            line.wrong(message, "model")
    rate = rates.get("v100", math.nan)
    weight = line.text("priority_weight")
    return {
        "name": f"{context.stem}-{line.number}",
        "submit_seconds": line.amount("arrival_time", least=0),
        "devices": devices,
        "duration_seconds": steps / rate,
        "model": model,
        "iterations": int(steps) if steps == steps else 0,
        "weight": line.amount("priority_weight", above=0) if weight else 1.0,
        "throughputs": {kind: value / rate for kind, value in rates.items()},
    }


def _headway(line: Line, context: Context) -> dict[str, Any]:
    elastic = {name: line.count(name, least=0) for name in ELASTIC if line.text(name)}
    return {
        "name": line.text("name"),
        "submit_seconds": line.amount("submit_seconds", least=0),
        "devices": line.count("devices"),
        "duration_seconds": line.amount("duration_seconds", above=0),
        **{name: line.text(name) for name in ("model", "user", "queue")},
        **elastic,
    }


ELASTIC = ("minimum_devices", "maximum_devices")


class Format(NamedTuple):
    """One layout of a format: its columns and how a row is read."""

    columns: tuple[str, ...]  # that must be there
    read: _Reader
    unit: str
    is_ordered: bool  # rows stand in the order of submission by the format's own promise
    separator: str = ","
    header: tuple[str, ...] = ()  # of a file without one


_PAI = (
    "job_name", "task_name", "inst_num", "status", "start_time", "end_time", "plan_cpu", "plan_mem", "plan_gpu",
    "gpu_type",
)  # fmt: skip
_GAVEL_PHYSICAL = (
    "job_type", "command", "working_dir", "num_steps_arg", "needs_data_dir", "total_steps", "scale_factor",
    "priority_weight", "SLO", "arrival_time",
)  # fmt: skip
_GAVEL_MSR = ("job_type", "command", "num_steps_arg", "needs_data_dir", "total_steps", "arrival_time", "scale_factor")
OWN_COLUMNS = ("name", "submit_seconds", "devices", "duration_seconds")

# The first whose columns are all there is it, so the more particular stand first.
LAYOUTS: dict[str, tuple[Format, ...]] = {
    "headway": (Format(OWN_COLUMNS, _headway, "times in seconds", True),),
    "muri": (
        Format(
            ("job_id", "num_gpu", "submit_time", "model_name", "duration", "iteration_time"),
            _muri, "times in milliseconds", True,
        ),
    ),
    "tiresias": (
        Format(
            ("job_id", "num_gpu", "submit_time", "iterations", "model_name", "duration"),
            _tiresias, "times in seconds", True,
        ),
    ),
    "philly": (
        Format(
            ("timestamp", "duration", "num_gpus", "cluster"),
            _philly, "submission in local time, durations in seconds; the virtual cluster is the queue", False,
        ),
    ),
    "helios": (
        Format(
            ("job_id", "user", "vc", "gpu_num", "state", "submit_time", "duration"),
            _helios, "submission in local time, durations in seconds; the virtual cluster is the queue", False,
        ),
    ),
    "alibaba": (
        Format(
            ("submit_time", "duration", "num_gpu", "num_inst"),
            _alibaba_jobs, "times in seconds, GPUs of one instance (fractions are rounded up to whole devices)", False,
        ),
        Format(
            _PAI, _alibaba_tasks,
            "times in seconds, hundredths of a GPU (rounded up to whole devices); a task is a job, submitted when it "
            "began", False, header=_PAI,
        ),
    ),
    "sia": (
        Format(
            ("name", "time", "application", "num_replicas", "batch_size"),
            _sia, "times in seconds; run times from GPU-hours of each application", True,
        ),
    ),
    "gavel": (
        Format(
            _GAVEL_PHYSICAL, _gavel, "times in seconds; run times from measured steps per second on v100", True,
            "\t", _GAVEL_PHYSICAL,
        ),
        Format(
            _GAVEL_MSR, _gavel, "times in seconds; run times from measured steps per second on v100", True,
            "\t", _GAVEL_MSR,
        ),
    ),
}  # fmt: skip
