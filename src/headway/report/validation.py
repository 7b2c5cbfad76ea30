"""Predictions beside published measurements: tables for the terminal, and a scatter of predicted against measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from headway.errors import InputError
from headway.predict.validation import By, Comparison, Errors, Quantity, Validation
from headway.report import charts
from headway.report.charts import PALETTE, WIDE
from headway.report.saving import picture_path, save
from headway.report.terminal import new_table
from headway.units import format_bytes, format_seconds

__all__ = ["scatter_figure", "validation_tables", "write_scatter"]

_PARTS = (("fitted", True), ("held out", False))
_NAMES = {"step": "step time", "memory": "peak memory"}
# Roles of the palette, in the order in which kinds of hardware take them.
_ROLES = ("forward", "communication", "backward", "optimizer", "activations", "recompute", "workspace", "other")
_MARKERS = "osD^vPX"


def validation_tables(validation: Validation, *, worst: int = 10) -> list[Table]:
    """What there is to know about a validation, in tables of at most 100 columns: totals for fitted and held-out rows,
    errors by hardware, source and kind of plan, the `worst` rows, groups of plans, and rows that were not used.
    """
    tables = [_totals(validation)]
    for quantity in ("step", "memory"):
        if validation.errors(quantity):
            tables.append(_errors_table(validation, quantity))
            tables.append(_worst_table(validation, quantity, worst))
    if validation.groups:
        tables.append(_groups_table(validation))
    if any(row.failed for row in validation.rows) or validation.skipped:
        tables.append(_unused_table(validation))
    return tables


def _percent(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.1%}" if signed else f"{value:.1%}"


def _totals(validation: Validation) -> Table:
    table = new_table("Predicted and published", "", "fitted", "held out", right=(1, 2))

    def line(name: str, values: Sequence[str]) -> None:
        if any(values):
            table.add_row(name, *values)

    line("rows", [str(len(validation.part(fitted))) for _, fitted in _PARTS])
    for quantity in ("step", "memory"):
        found = [validation.errors(quantity, "all", fitted) for _, fitted in _PARTS]
        for word in ("mean", "median", "worst"):
            line(
                f"{_NAMES[quantity]}: {word} error",
                [_percent(getattr(one[0], word)) if one else "" for one in found],
            )
        if quantity == "step":
            for scope in ("one node", "several nodes"):
                scopes = [
                    {one.name: one for one in validation.errors(quantity, "scope", fitted)} for _, fitted in _PARTS
                ]
                line(
                    f"step time: mean error, {scope}",
                    [f"{_percent(one[scope].mean)} of {one[scope].rows}" if scope in one else "" for one in scopes],
                )
    memory = [validation.out_of_memory(fitted) for _, fitted in _PARTS]
    line("out of memory: recognised", [f"{one[1]} of {one[0]}" if one[0] else "" for one in memory])
    line("ran, and predicted not to fit", [f"{one[3]} of {one[2]}" if one[2] else "" for one in memory])
    line("regret, mean", [_percent(validation.mean_regret(fitted)) for _, fitted in _PARTS])
    correlations = [validation.mean_rank_correlation(fitted) for _, fitted in _PARTS]
    line("rank correlation, mean", ["" if one is None else f"{one:.2f}" for one in correlations])
    return table


def _errors_table(validation: Validation, quantity: Quantity) -> Table:
    table = new_table(
        f"Error of {_NAMES[quantity]}", "", "rows", "mean", "median", "worst", "bias", "held out", "mean",
        right=range(1, 8),
    )  # fmt: skip
    by: tuple[By, ...] = ("hardware", "source", "kind")
    for which in by:
        held = {one.name: one for one in validation.errors(quantity, which, fitted=False)}
        for one in validation.errors(quantity, which):
            table.add_row(*_error_cells(one), *_held_cells(held.get(one.name)))
        table.add_section()
    return table


def _error_cells(one: Errors) -> tuple[str, ...]:
    return (
        _short(one.name, 40), str(one.rows), _percent(one.mean), _percent(one.median), _percent(one.worst),
        _percent(one.bias, signed=True),
    )  # fmt: skip


def _held_cells(one: Errors | None) -> tuple[str, str]:
    return (str(one.rows), _percent(one.mean)) if one else ("", "")


def _short(text: str, length: int) -> str:
    """The beginning and the end of a text too long, which tell more than its middle."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"


def _worst_table(validation: Validation, quantity: Quantity, count: int) -> Table:
    table = new_table(
        f"Worst rows: {_NAMES[quantity]}", "line", "model, plan", "measured", "predicted", "error", right=(0, 2, 3, 4)
    )
    for row in validation.worst(count, quantity):
        show, measured, predicted, error = _values(row, quantity)
        mark = "" if row.fitted else "*"
        table.add_row(
            f"{row.line}{mark}", f"{_short(row.model, 58)}, {row.hardware}\n{_short(row.plan, 58)}",
            show(measured), show(predicted), _percent(error, signed=True),
        )  # fmt: skip
    table.caption = "* held out"
    table.caption_justify = "left"
    return table


def _values(row: Comparison, quantity: Quantity):
    if quantity == "step":
        return format_seconds, row.measured_seconds or 0.0, row.predicted_seconds or 0.0, row.step_error
    return format_bytes, row.measured_bytes or 0.0, row.predicted_bytes or 0.0, row.memory_error


def _groups_table(validation: Validation) -> Table:
    table = new_table(
        "Choosing among plans of one job", "model", "hardware", "devices", "plans", "rank correlation", "regret",
        right=(2, 3, 4, 5),
    )  # fmt: skip
    for group in validation.groups:
        table.add_row(
            _short(group.model, 34) + ("" if group.fitted else "*"),
            group.hardware,
            str(group.devices),
            str(group.plans),
            "" if group.rank_correlation is None else f"{group.rank_correlation:.2f}",
            "out of memory" if group.regret is None else _percent(group.regret),
        )
    table.caption = "* held out"
    table.caption_justify = "left"
    return table


def _unused_table(validation: Validation) -> Table:
    table = new_table("Rows not used", "line", "why", right=(0,))
    for line, _, reasons in validation.skipped:
        table.add_row(str(line), "; ".join(reasons))
    for row in validation.rows:
        if row.failed:
            table.add_row(str(row.line), _short(row.failed.splitlines()[0], 86))
    return table


def scatter_figure(validation: Validation, quantity: Quantity = "step", *, width: float = WIDE) -> Figure:
    """Predicted against measured, both logarithmic, a colour for each kind of hardware; filled: held-out rows.

    The line is where both are equal, the band where they differ by at most 10 %.
    """
    return _drawn(validation, quantity, width)


@charts.styled
def _drawn(validation: Validation, quantity: Quantity, width: float) -> Figure:
    points = []
    for row in validation.rows:
        _, measured, predicted, error = _values(row, quantity)
        if error is not None and predicted > 0:
            points.append((row.hardware, row.fitted, measured, predicted))
    if not points:
        raise InputError(f"there is no row with a measured and a predicted {_NAMES[quantity]}", place="validation")
    kinds = sorted({kind for kind, *_ in points})
    legend = [(_colour(at), kind) for at, kind in enumerate(kinds)]
    top = 18.0 * charts.legend_rows([text for _, text in legend], width) + 26
    side = min(width - 112, 560.0)
    figure, axes = charts.new_canvas(width, side + top + 48, left=100, right=width - 100 - side, top=top, bottom=48)
    low = min(min(measured, predicted) for *_, measured, predicted in points) / 1.3
    high = max(max(measured, predicted) for *_, measured, predicted in points) * 1.3
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.fill_between([low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color=PALETTE["track"], zorder=0.5)
    axes.plot([low, high], [low, high], color=PALETTE["muted"], linewidth=1, zorder=1)
    for at, kind in enumerate(kinds):
        for fitted in (True, False):
            mine = [(measured, predicted) for name, side_, measured, predicted in points
                    if name == kind and side_ == fitted]  # fmt: skip
            if mine:
                axes.scatter(
                    [measured for measured, _ in mine], [predicted for _, predicted in mine], s=20, linewidths=1.1,
                    marker=_MARKERS[at // len(_ROLES)], facecolors="none" if fitted else _colour(at),
                    edgecolors=_colour(at), alpha=0.85, zorder=2,
                )  # fmt: skip
    show = format_seconds if quantity == "step" else format_bytes
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"measured {_NAMES[quantity]}")
    axes.set_ylabel(f"predicted {_NAMES[quantity]}")
    charts.draw_legend(figure, legend, width)
    axes.text(
        0.98, 0.02, "filled: held out, open: fitted; band: within 10 %", transform=axes.transAxes, ha="right",
        va="bottom", fontsize=10.5, color=PALETTE["muted"],
    )  # fmt: skip
    return figure


def _colour(at: int) -> str:
    return PALETTE[_ROLES[at % len(_ROLES)]]


def write_scatter(validation: Validation, path: str | Path, quantity: Quantity = "step") -> Path:
    """Draw `scatter_figure` to a file, PNG or SVG by its ending.

    Raises InputError for another kind of file or if there is nothing to draw, FileError if it cannot be written.
    """
    path = picture_path(path)
    figure = scatter_figure(validation, quantity)
    return save(figure, path)
