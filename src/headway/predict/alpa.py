"""Others' measurements, and our own taken elsewhere: reading and writing files of measured times.

Three kinds of CSV are understood, told apart by their columns, and JSON as `write_measurements` writes it:

- Headway's own, one line per `Measurement`;
- Alpa's profile (Zheng et al., OSDI 2022), one line per sample: collectives by bytes, square products by FLOP;
- vTrain's tables of NCCL all-reduces within one node (Bang et al., MICRO 2024).

What is read is checked line by line; a line that cannot be right is refused with its number and its column.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from headway.errors import FieldError, HeadwayError, InputError
from headway.hardware.catalog import ACCELERATORS, find_accelerator
from headway.predict.database import COLLECTIVES, Database, Measurement
from headway.value import Value, convert, read_text, write_atomically

__all__ = ["ImportReport", "import_profile", "read_measurements", "write_measurements"]

_DTYPES = {
    "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "s8": "int8", "u8": "uint8",
    "s32": "int32",
}  # fmt: skip

_ALPA = (
    "cluster_key", "mesh", "op", "dtype", "group_size", "n_groups", "stride", "crosses_node", "size", "unit", "bytes",
    "time_s",
)  # fmt: skip
_VTRAIN = ("gpu", "n_gpus", "bytes", "oop_time_us")
_OWN = Measurement.__struct_fields__
_OWN_NEEDED = ("device", "operation", "size", "unit", "seconds")


class ImportReport(Value, kw_only=True):
    """What an import did: lines read, measurements that were new, and those that had failed where they were taken."""

    path: str
    kind: str
    devices: tuple[str, ...]
    read: int
    added: int
    failed: tuple[str, ...] = ()
    fixed_costs: int = 0


def import_profile(
    path: str | Path, *, device: str | None = None, database: Database | None = None, source: str | None = None
) -> ImportReport:
    """Take the measurements of a file into the database; what is there already is not counted again.

    `device`: whose times they are, where the file does not say: a name of the catalog or any other. `source`: said of
    each measurement (None: the name of the file). Nothing is taken in if one line is wrong. Raises FileError,
    FieldError or InputError naming the line and the column.
    """
    kind, measurements = _read(path, device, source)
    added = (database or Database()).add(measurements)
    return ImportReport(
        path=str(path),
        kind=kind,
        devices=tuple(sorted({measurement.device for measurement in measurements})),
        read=len(measurements),
        added=added,
        failed=tuple(_described(measurement) for measurement in measurements if measurement.seconds is None),
        fixed_costs=sum(measurement.size == 0 for measurement in measurements),
    )


def read_measurements(path: str | Path, *, device: str | None = None, source: str | None = None) -> list[Measurement]:
    """The measurements in a file, each checked (see `import_profile`)."""
    return _read(path, device, source)[1]


def write_measurements(measurements: Sequence[Measurement], path: str | Path) -> None:
    """Write measurements to a `.csv` or `.json` file that `read_measurements` reads back as they are."""
    if str(path).endswith(".json"):
        rows = [msgspec.to_builtins(measurement) for measurement in measurements]
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
        return
    if not str(path).endswith(".csv"):
        raise InputError(
            "is neither .csv nor .json", place=str(path), remedy="name the file PROFILE.csv or PROFILE.json"
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_OWN)
    for measurement in measurements:
        # repr keeps every digit of a float; None (it failed) is an empty cell.
        values = msgspec.structs.astuple(measurement)
        writer.writerow(
            ["" if value is None else repr(value) if isinstance(value, float) else value for value in values]
        )
    write_atomically(path, text.getvalue())


def _described(measurement: Measurement) -> str:
    text = f"{measurement.operation} of {measurement.size:g} {measurement.unit} {measurement.dtype}"
    if measurement.unit != "bytes":
        return text
    return (
        f"{text} on {measurement.nodes}x{measurement.devices_per_node}, {measurement.groups} groups of "
        f"{measurement.group_size}, stride {measurement.stride}"
    )


def _read(path: str | Path, device: str | None, source: str | None) -> tuple[str, list[Measurement]]:
    text = read_text(path)
    source = source if source is not None else Path(path).name
    device = _known_name(device)
    if str(path).endswith(".json") or text.lstrip()[:1] in ("[", "{"):
        return "headway", _read_json(text, str(path), device)
    lines = csv.reader(io.StringIO(text))
    columns = tuple(name.strip() for name in next(lines, ()))
    if len(set(columns)) < len(columns):
        raise FieldError("names a column twice", place=f"{path}, line 1")
    kind, needed, parse = _kind_of(columns, str(path))
    missing = [name for name in needed if name not in columns]
    if missing:
        raise FieldError(
            f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            place=f"{path}, line 1",
            remedy=f"a profile of this kind ({kind}) has the columns: {', '.join(needed)}",
        )
    if kind == "alpa" and device is None:
        raise InputError(
            "does not say which device was measured",
            place=str(path),
            remedy="say so, with a name of the catalog where it is in there: Alpa's own file is of V100-SXM2-16GB",
        )
    found: dict[Measurement, None] = {}
    for cells in lines:
        if not cells:
            continue
        place = f"{path}, line {lines.line_num}"
        if len(cells) != len(columns):
            raise FieldError(f"has {len(cells)} cells, and there are {len(columns)} columns", place=place)
        row = _Row(dict(zip(columns, cells, strict=True)), place)
        # Alpa repeats the products, which know no mesh, for every mesh: one is enough.
        found[parse(row, device or "", source).check(place=place)] = None
    return kind, list(found)


def _kind_of(columns: Sequence[str], path: str) -> tuple[str, Sequence[str], Callable[[_Row, str, str], Measurement]]:
    kinds = {
        "headway": (_OWN_NEEDED, _OWN, _from_own),
        "alpa": (_ALPA, _ALPA, _from_alpa),
        "vtrain": (_VTRAIN, _VTRAIN, _from_vtrain),
    }
    likeness = {name: sum(column in known for column in columns) for name, (_, known, _) in kinds.items()}
    best = max(likeness, key=lambda name: likeness[name])
    if likeness[best] < 2:
        raise FieldError(
            f"is no profile: its columns are {', '.join(columns[:8]) or 'missing'}",
            place=f"{path}, line 1",
            remedy=f"give a file that `headway profile export` wrote, or one with the columns: {', '.join(_ALPA)}",
        )
    needed, known, parse = kinds[best]
    unknown = [column for column in columns if column not in known]
    if best == "headway" and unknown:
        raise FieldError(
            f"has the unknown column {unknown[0]!r}", place=f"{path}, line 1", remedy=f"known are: {', '.join(known)}"
        )
    return best, needed, parse


def _known_name(device: str | None) -> str | None:
    """The catalog's name of a device that it knows under another (`v100`), or the name as it is."""
    if device is None or device in ACCELERATORS:
        return device
    try:
        return find_accelerator(device).name
    except HeadwayError:
        return device


class _Row:
    """Cells of one line by column, read as what they must be."""

    def __init__(self, cells: dict[str, str], place: str) -> None:
        self.cells = cells
        self.place = place

    def text(self, column: str) -> str:
        return self.cells.get(column, "").strip()

    def number(self, column: str, *, default: float | None = None) -> float:
        text = self.text(column)
        if not text and default is not None:
            return default
        try:
            return float(text)
        except ValueError:
            raise self.wrong(column, "a number") from None

    def integer(self, column: str, *, default: int | None = None) -> int:
        number = self.number(column, default=default)
        if not math.isfinite(number) or number != int(number):
            raise self.wrong(column, "a whole number")
        return int(number)

    def wrong(self, column: str, wanted: str) -> FieldError:
        return FieldError(f"{column} is {self.text(column)!r}, and should be {wanted}", place=self.place)


def _from_alpa(row: _Row, device: str, source: str) -> Measurement:
    operation, kind = row.text("op"), row.text("unit")
    dtype = _DTYPES.get(row.text("dtype"), row.text("dtype"))
    seconds = row.number("time_s")
    if seconds < 0 or math.isnan(seconds):
        raise row.wrong("time_s", "a time in seconds, or inf where it failed")
    measured = seconds if math.isfinite(seconds) else None
    if kind == "flop":
        return Measurement(
            device=device, operation=operation, dtype=dtype, size=row.number("size"), unit="flop", seconds=measured,
            flop=row.number("size"), source=source,
        )  # fmt: skip
    if kind != "elements":
        raise row.wrong("unit", "elements or flop")
    if operation not in COLLECTIVES:
        raise row.wrong("op", f"one of {', '.join(COLLECTIVES)}, or counted in flop")
    nodes, cross, per_node = row.text("mesh").partition("x")
    if not (cross and nodes.isdecimal() and per_node.isdecimal()):
        raise row.wrong("mesh", "a mesh like 2x8")
    return Measurement(
        device=device, operation=operation, dtype=dtype, nodes=int(nodes), devices_per_node=int(per_node),
        group_size=row.integer("group_size"), groups=row.integer("n_groups"), stride=row.integer("stride"),
        size=row.number("bytes"), unit="bytes", seconds=measured, source=source,
    )  # fmt: skip


def _from_vtrain(row: _Row, device: str, source: str) -> Measurement:
    members = row.integer("n_gpus")
    kinds = {"a100": "A100-SXM-80GB", "v100": "V100-SXM2-16GB"}
    if members < 1:
        raise row.wrong("n_gpus", "a number of GPUs")
    return Measurement(
        device=device or kinds.get(row.text("gpu"), row.text("gpu")), operation="all_reduce",
        dtype="float32",  # what nccl-tests sends by default; only the bytes matter
        nodes=1, devices_per_node=8, group_size=members, size=row.number("bytes"), unit="bytes",
        seconds=row.number("oop_time_us") * 1e-6, source=source,
    )  # fmt: skip


def _from_own(row: _Row, device: str, source: str) -> Measurement:
    unit = row.text("unit")
    if unit not in ("bytes", "flop", "samples"):
        raise row.wrong("unit", "bytes, flop or samples")
    return Measurement(
        device=device or row.text("device"),
        operation=row.text("operation"),
        dtype=row.text("dtype"),
        shape=row.text("shape"),
        nodes=row.integer("nodes", default=1),
        devices_per_node=row.integer("devices_per_node", default=1),
        group_size=row.integer("group_size", default=1),
        groups=row.integer("groups", default=1),
        stride=row.integer("stride", default=1),
        size=row.number("size"),
        unit=unit,
        seconds=row.number("seconds") if row.text("seconds") else None,
        count=row.integer("count", default=1),
        flop=row.number("flop", default=0.0),
        moved_bytes=row.number("moved_bytes", default=0.0),
        source=row.text("source") or source,
        date=row.text("date"),
    )


def _read_json(text: str, path: str, device: str | None) -> list[Measurement]:
    try:
        rows = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise FieldError(f"not JSON: {error}", place=path) from None
    if not isinstance(rows, list):
        raise FieldError("is no list of measurements", place=path, remedy="give what `headway profile export` wrote")
    found = []
    for number, row in enumerate(rows, start=1):
        place = f"{path}, measurement {number}"
        measurement = convert(row, Measurement, place=place).check(place=place)
        found.append(measurement if device is None else msgspec.structs.replace(measurement, device=device))
    return found
