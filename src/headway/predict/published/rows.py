"""Tables of published measurements, row by row: what ran, and what was measured."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from headway.errors import FieldError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.published.cells import Line, Unusable, precision_of
from headway.predict.published.frameworks import framework_of
from headway.predict.published.machines import cluster_of
from headway.predict.published.models import graph_of, shape_of
from headway.predict.published.plans import kind_of, plan_of
from headway.value import read_text
from headway.workload.graph import Workload
from headway.workload.transformer import TransformerShape

__all__ = ["COLUMNS", "VTRAIN_COLUMNS", "PublishedRow", "SkippedRow", "is_fitted", "read_rows"]

COLUMNS = (
    "source", "model", "params_b", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "global_batch",
    "micro_batch", "gpu", "n_gpus", "gpus_per_node", "interconnect", "tp", "pp", "dp", "cp", "ep", "virtual_stages",
    "zero_stage", "recompute", "precision", "tokens_per_s_per_gpu", "iter_time_s", "tflops_per_gpu", "mfu",
    "memory_gb", "status", "notes",
)  # fmt: skip
_NEEDED = ("source", "model", "layers", "hidden", "seq", "global_batch", "micro_batch", "gpu", "n_gpus", "precision")
VTRAIN_COLUMNS = (
    "# GPUs", "global batch", "micro batch", "hidden size", "attention heads", "# layers", "sequence length",
    "tensor parallelism", "data parallelism", "pipeline parallelism", "iteration time (ms)",
)  # fmt: skip
_VTRAIN_NAMES = ("n_gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq", "tp", "dp", "pp")

_GIB = 2.0**30
# Cells derived from each other are rounded; beyond this they are two measurements.
_CONSISTENT = 0.03


@dataclass(frozen=True, eq=False)
class PublishedRow:
    """One published training run: what ran (`workload`, `cluster`, `plan`), and what was measured.

    `step_seconds` and `memory_bytes` (on the fullest GPU) are None where they were not published; `out_of_memory` says
    that the run failed for lack of memory. `memory_of` is what was read: "allocator" (torch's reserved memory) or
    "device" (nvidia-smi: with the CUDA context and whatever else is there). `hardware` is the accelerator's name,
    `kind` the kind of plan ("ZeRO-3", "tensor+pipeline+data"), `line` the line of the file.
    """

    workload: Workload
    cluster: Cluster
    plan: Plan
    shape: TransformerShape
    step_seconds: float | None
    memory_bytes: float | None
    out_of_memory: bool
    memory_of: Literal["allocator", "device"]
    source: str
    model: str
    hardware: str
    kind: str
    line: int
    assumed: tuple[str, ...] = ()
    notes: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Measured tokens per second of all devices together."""
        if self.step_seconds is None:
            return None
        return self.plan.global_batch * self.shape.sequence / self.step_seconds


class SkippedRow(NamedTuple):
    """A row that cannot be predicted, and why: one reason for each column that is missing or wrong."""

    line: int
    source: str
    reasons: tuple[str, ...]


# The first of "headway 1", "headway 2", ... under which every kind of GPU that has rows of several models has some of
# them on both sides, with a share of 35 to 45 % of the published runs. Chosen before any error was looked at.
_SALT = "headway 140"
_FITTED_SHARE = 0.4


def is_fitted(row: PublishedRow) -> bool:
    """Whether constants may be fitted on this row; all others are for checking alone.

    About 40 % of the models (layers, hidden, feed-forward width), chosen by a hash of these sizes: rows of one model
    are all on one side, whatever their hardware, plan, sequence length or file.
    """
    shape = row.shape
    digest = hashlib.sha256(f"{_SALT}: {shape.layers} {shape.hidden} {shape.ffn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _FITTED_SHARE * 2**64


def read_rows(path: str | Path) -> tuple[list[PublishedRow], list[SkippedRow]]:
    """The rows of a table of published measurements, and those that cannot be predicted.

    Raises FileError for a file that cannot be read, and FieldError naming line and column for one that is no such
    table: empty, with unknown or missing columns, or with lines of another length than its header.
    """
    text = read_text(path)
    place = str(path)
    try:
        lines = list(csv.reader(text.splitlines(), strict=True))
    except csv.Error as error:
        raise FieldError(f"not a CSV file: {error}", place=place, remedy=_remedy()) from None
    if not lines or not any(cell.strip() for cell in lines[0]):
        raise FieldError("the file is empty", place=f"{place}: line 1", remedy=_remedy())
    header = [cell.strip() for cell in lines[0]]
    is_vtrain = "# GPUs" in header
    _check_header(header, is_vtrain, place)
    rows: list[PublishedRow] = []
    skipped: list[SkippedRow] = []
    for number, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise FieldError(
                f"{len(cells)} cells, and the header has {len(header)}", place=f"{place}: line {number}",
                remedy="quote cells that hold commas",
            )  # fmt: skip
        named = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        line = Line(_from_vtrain(named) if is_vtrain else named)
        try:
            rows.append(_row(line, number))
        except Unusable:
            skipped.append(SkippedRow(number, line.text("source"), tuple(line.reasons)))
    return rows, skipped


def _remedy() -> str:
    return f"the first line names the columns, at least: {', '.join(_NEEDED)}; or vTrain's: {', '.join(VTRAIN_COLUMNS)}"


def _check_header(header: list[str], is_vtrain: bool, place: str) -> None:
    known, needed = (VTRAIN_COLUMNS, VTRAIN_COLUMNS) if is_vtrain else (COLUMNS, _NEEDED)
    where = f"{place}: line 1"
    if not set(header) & set(known):
        raise FieldError("not a table of published measurements", place=where, remedy=_remedy())
    for column, name in enumerate(header, start=1):
        if name not in known:
            raise FieldError(
                f"unknown column {name!r}", place=f"{where}, column {column}", remedy=f"known are: {', '.join(known)}"
            )
        if header.index(name) != column - 1:
            raise FieldError(f"column {name!r} is there twice", place=f"{where}, column {column}")
    missing = [name for name in needed if name not in header]
    if missing:
        raise FieldError(f"no column {missing[0]!r}", place=where, remedy=_remedy())


def _from_vtrain(cells: dict[str, str]) -> dict[str, str]:
    """A line of vTrain's single-node table in the columns of the other form."""
    named = dict(zip(_VTRAIN_NAMES, (cells[name] for name in VTRAIN_COLUMNS[:-1]), strict=True))
    milliseconds = cells["iteration time (ms)"]
    try:
        seconds = str(float(milliseconds) / 1e3)
    except ValueError:
        seconds = milliseconds
    return {
        **named,
        "source": "VIA-Research/vTrain, single node",
        "model": "GPT",
        "gpu": "A100-SXM",
        "gpus_per_node": "8",
        "interconnect": "one node",
        "recompute": "full",
        "precision": "fp16",
        "zero_stage": "0",
        "iter_time_s": seconds,
        "status": "ok",
    }


def _row(line: Line, number: int) -> PublishedRow:
    """Raises Unusable when the reasons of `line` are complete."""
    framework = framework_of(line)
    degrees = {name: line.number(name, 1) for name in ("tp", "pp", "cp", "ep")}
    tp, pp, cp = degrees["tp"], degrees["pp"], degrees["cp"]
    devices = line.number("n_gpus")
    dp = line.number("dp", devices // (tp * pp * cp) or 1)
    virtual = line.number("virtual_stages", 1)
    zero = line.number("zero_stage", 0, "not stated", least=0)
    batch, micro = line.number("global_batch"), line.number("micro_batch")
    precision = precision_of(line.text("precision"))
    if precision is None:
        line.refuse(f"precision: {line.text('precision')!r} is not known" if line.text("precision") else
                    "precision: missing")  # fmt: skip
    if zero > 3:
        line.refuse(f"zero_stage: {zero} is not 0, 1, 2 or 3")
    if tp * pp * cp * dp != devices:
        line.refuse(f"n_gpus: {devices}, and tp x pp x dp x cp = {tp * pp * dp * cp}")
    if batch % (micro * dp):
        line.refuse(f"micro_batch: {micro} on {dp} replicas does not divide global_batch = {batch}")
    shape = shape_of(line, framework, tp)
    found = cluster_of(line, devices)
    step_seconds, memory, failed = _measured(line, batch, devices)
    line.finish()
    assert shape is not None
    assert found is not None
    assert precision is not None
    hardware, cluster = found
    graph = graph_of(shape, line.text("model"))
    plan = plan_of(line, framework, shape, graph, cluster, precision, (tp, pp, dp, cp, degrees["ep"], virtual, zero))
    line.finish()
    assert plan is not None
    recipe = framework.recipe
    notes = line.text("notes")
    return PublishedRow(
        workload=Workload(
            graph=graph, optimizer=framework.optimizer, global_batch=batch, precision=precision, recipe=recipe
        ),
        cluster=cluster,
        plan=plan,
        shape=shape,
        step_seconds=step_seconds,
        memory_bytes=memory,
        out_of_memory=failed,
        memory_of="allocator" if recipe.framework in ("torchtitan", "fsdp") else "device",
        source=line.text("source"),
        model=line.text("model"),
        hardware=hardware,
        kind=kind_of(plan),
        line=number,
        assumed=tuple(dict.fromkeys(line.assumed)),
        notes=notes,
    )


def _measured(line: Line, batch: int, devices: int) -> tuple[float | None, float | None, bool]:
    """(seconds of a step, bytes, whether memory ran out)."""
    status = line.text("status").lower()
    if status not in ("", "ok", "oom"):
        line.refuse(f"status: {status!r} is neither ok nor OOM")
    seconds, rate, memory = line.real("iter_time_s"), line.real("tokens_per_s_per_gpu"), line.real("memory_gb")
    if rate:
        derived = batch * line.number("seq") / (rate * devices)
        if seconds and abs(derived / seconds - 1) > _CONSISTENT:
            line.refuse(f"iter_time_s: {seconds:g} s, and tokens_per_s_per_gpu makes {derived:g} s")
        seconds = seconds or derived
    if not seconds and not memory and status != "oom":
        line.refuse("iter_time_s: missing, and there is no other measurement")
    return seconds or None, memory * _GIB if memory else None, status == "oom"
