"""Tables of measured times for the terminal: what there is, one curve with its fits, what an import took in."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from headway.predict.alpa import ImportReport
from headway.predict.inspection import MeasuredCurve, ProfileEntry
from headway.report.terminal import new_table
from headway.units import format_bytes, format_count, format_flop, format_seconds

__all__ = ["curve_table", "import_table", "profile_tables"]

_SHOWN_FAILURES = 5


def _size(value: float, unit: str) -> str:
    if unit == "bytes":
        return format_bytes(value)
    return format_flop(value) if unit == "flop" else format_count(value)


def profile_tables(entries: Sequence[ProfileEntry]) -> list[Table]:
    """A table for each device and source, one line for each curve."""
    tables = []
    for device, source in dict.fromkeys((entry.device, entry.source) for entry in entries):
        mine = [entry for entry in entries if (entry.device, entry.source) == (device, source)]
        table = new_table(
            f"{device}: {len(mine)} curves from {source or 'this machine'}",
            "operation", "dtype", "mesh", "groups", "points", "sizes", right=(4,),
        )  # fmt: skip
        for entry in mine:
            group = f"{entry.groups} x {entry.group_size}" + (f" by {entry.stride}" if entry.stride > 1 else "")
            failed = f" ({entry.failed} failed)" if entry.failed else ""
            sizes = f"{_size(entry.smallest, entry.unit)} to {_size(entry.largest, entry.unit)}"
            shown = group if entry.unit == "bytes" else ""
            table.add_row(entry.operation, entry.dtype, entry.mesh, shown, f"{entry.points}{failed}", sizes)
        tables.append(table)
    return tables


def curve_table(curve: MeasuredCurve) -> Table:
    """The points of one curve, and what each way of timing says there; the title names their mean errors."""
    entry = curve.entry
    errors = ", ".join(f"{way} {error:.1%}" for way, error in curve.error.items())
    title = f"{entry.operation} on {entry.device}, {entry.dtype}: mean error {errors}"
    table = new_table(title, "size", "measured", *curve.fitted, right=range(2 + len(curve.fitted)))
    for at, size in enumerate(curve.sizes):
        measured = curve.seconds[at]
        fits = [format_seconds(seconds[at]) for seconds in curve.fitted.values()]
        table.add_row(_size(size, entry.unit), "failed" if measured is None else format_seconds(measured), *fits)
    return table


def import_table(report: ImportReport) -> Table:
    """What was taken in from a file."""
    table = new_table(report.path, "", "")
    table.add_row("kind of file", report.kind)
    table.add_row("devices", ", ".join(report.devices))
    table.add_row("measurements", f"{report.read:,} read, {report.added:,} of them new")
    table.add_row("fixed costs", f"{report.fixed_costs:,} of size 0")
    for text in report.failed[:_SHOWN_FAILURES]:
        table.add_row("failed", text)
    if len(report.failed) > _SHOWN_FAILURES:
        table.add_row("failed", f"and {len(report.failed) - _SHOWN_FAILURES} more")
    return table
