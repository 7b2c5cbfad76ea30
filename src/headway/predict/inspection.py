"""Looking into the database of measured times: what is there, one curve with what is fitted to it, and a file of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from headway.errors import InputError
from headway.predict.alpa import write_measurements
from headway.predict.database import Database, Measurement, Unit
from headway.predict.learned import Learned
from headway.predict.timing import Interpolated, Linear, Timing
from headway.value import Value

__all__ = ["MeasuredCurve", "ProfileEntry", "export_profile", "list_profile", "show_profile"]


class ProfileEntry(Value, kw_only=True):
    """One line of the list: what was measured at several sizes, on one device, by one source.

    `shapes`: operators of a traced model that differ in their shapes alone are counted together.
    """

    device: str
    operation: str
    dtype: str
    mesh: str = ""
    group_size: int = 1
    groups: int = 1
    stride: int = 1
    unit: Unit
    shapes: int = 1
    points: int
    failed: int
    smallest: float
    largest: float
    source: str


class MeasuredCurve(Value, kw_only=True):
    """Measured points of one key, and what each way of timing says at them when it has seen the whole profile.

    `sizes` in `unit`, `seconds` None where the measurement failed; `fitted`: way → seconds at each size; `error`: way →
    mean relative error, of the points with a size above 0. `low_seconds` and `high_seconds` bound the learned times.
    """

    entry: ProfileEntry
    sizes: tuple[float, ...]
    seconds: tuple[float | None, ...]
    fitted: dict[str, tuple[float, ...]]
    error: dict[str, float]
    low_seconds: tuple[float, ...] = ()
    high_seconds: tuple[float, ...] = ()


def list_profile(database: Database | None = None, *, device: str | None = None) -> list[ProfileEntry]:
    """What is in the database, of one device or of all. Constants of this machine (dtype "") are left out."""
    grouped: dict[tuple, list[Measurement]] = defaultdict(list)
    for measurement in (database or Database()).measurements(device):
        if measurement.dtype:
            grouped[_identity(measurement)].append(measurement)
    return [_entry(rows) for _, rows in sorted(grouped.items())]


def show_profile(
    operation: str,
    *,
    device: str,
    dtype: str,
    mesh: tuple[int, int] = (1, 1),
    group_size: int = 1,
    groups: int = 1,
    stride: int = 1,
    source: str | None = None,
    database: Database | None = None,
) -> MeasuredCurve:
    """The measured points of a collective or of products by FLOP, and what is fitted to them.

    Raises InputError, with what there is instead, if nothing of that key was measured, or by several sources and
    `source` names none.
    """
    rows = [row for row in (database or Database()).measurements(device, source=source) if row.dtype and not row.shape]
    wanted = (operation, dtype, mesh, group_size, groups, stride)
    chosen = [row for row in rows if _wanted(row) == wanted]
    if not chosen:
        near = sorted({str(_wanted(row)[1:]) for row in rows if row.operation == operation})
        known = near[:6] or sorted({row.operation for row in rows})
        raise InputError(
            f"nothing was measured of {operation} {wanted[1:]} on {device}",
            place="profile",
            remedy=f"there is: {', '.join(known) or 'nothing of this device'}",
        )
    sources = sorted({row.source for row in chosen})
    if len(sources) > 1:
        # Two sources measured two machines, or two ways of measuring: one curve through both would be neither's.
        raise InputError(
            f"{len(sources)} sources measured that: {', '.join(sources)}", place="profile", remedy="choose one of them"
        )
    chosen.sort(key=lambda row: row.size)
    sized = [row for row in rows if row.size > 0 and row.source == sources[0]]
    ways: dict[str, Timing] = {"linear": Linear(sized), "interpolated": Interpolated(sized), "learned": Learned(sized)}
    fitted: dict[str, tuple[float, ...]] = {}
    error: dict[str, float] = {}
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    known_points = [(at, row) for at, row in enumerate(chosen) if row.seconds and row.size > 0]
    for name, way in ways.items():
        if not known_points and name != "learned":
            continue  # everything failed: only what was learned from others can say something
        estimates = [_ask(way, row) for row in chosen]
        fitted[name] = tuple(estimate.seconds for estimate in estimates)
        if name == "learned":
            low = tuple(estimate.low_seconds for estimate in estimates)
            high = tuple(estimate.high_seconds for estimate in estimates)
        if known_points:
            errors = [abs(estimates[at].seconds / row.seconds - 1) for at, row in known_points if row.seconds]
            error[name] = math.fsum(errors) / len(errors)
    return MeasuredCurve(
        entry=_entry(chosen),
        sizes=tuple(row.size for row in chosen),
        seconds=tuple(row.seconds for row in chosen),
        fitted=fitted,
        error=error,
        low_seconds=low,
        high_seconds=high,
    )


def export_profile(
    path: str | Path, *, device: str | None = None, source: str | None = None, database: Database | None = None
) -> int:
    """Write the measurements of a device (of all) to a `.csv` or `.json` file; how many. Raises InputError if none."""
    measurements = (database or Database()).measurements(device, source=source)
    if not measurements:
        raise InputError(
            f"nothing was measured{f' on {device}' if device else ''}",
            remedy="`headway profile list` says what is there",
        )
    write_measurements(measurements, path)
    return len(measurements)


def _identity(row: Measurement) -> tuple:
    return (
        row.device, row.operation, row.dtype, row.nodes, row.devices_per_node, row.group_size, row.groups, row.stride,
        row.unit, row.source,
    )  # fmt: skip


def _wanted(row: Measurement) -> tuple:
    return row.operation, row.dtype, (row.nodes, row.devices_per_node), row.group_size, row.groups, row.stride


def _entry(rows: Sequence[Measurement]) -> ProfileEntry:
    first = rows[0]
    return ProfileEntry(
        device=first.device,
        operation=first.operation,
        dtype=first.dtype,
        mesh=f"{first.nodes}x{first.devices_per_node}" if first.unit == "bytes" else "",
        group_size=first.group_size,
        groups=first.groups,
        stride=first.stride,
        unit=first.unit,
        shapes=len({row.shape for row in rows}),
        points=len(rows),
        failed=sum(row.seconds is None for row in rows),
        smallest=min(row.size for row in rows),
        largest=max(row.size for row in rows),
        source=first.source,
    )


def _ask(way: Timing, row: Measurement):
    if row.unit == "bytes":
        return way.collective(
            row.operation,
            row.size,
            mesh=(row.nodes, row.devices_per_node),
            group_size=row.group_size,
            groups=row.groups,
            stride=row.stride,
            dtype=row.dtype,
        )
    return way.operator(row.operation, row.dtype, flop=row.flop or row.size)
