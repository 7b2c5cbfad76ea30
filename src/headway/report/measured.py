"""A picture of one curve of the database of measured times: the points, and what each way of timing says."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from headway.predict.inspection import MeasuredCurve
from headway.report.saving import picture_path, save

__all__ = ["measured_figure", "write_measured_picture"]


def measured_figure(curve: MeasuredCurve) -> Figure:
    """Seconds over size on logarithmic axes: points as measured, a line for each fit, the learned bounds shaded."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [at for at, size in enumerate(curve.sizes) if size > 0]
    sizes = [curve.sizes[at] for at in shown]
    if curve.low_seconds:
        axes.fill_between(
            sizes, [curve.low_seconds[at] for at in shown], [curve.high_seconds[at] for at in shown], alpha=0.2,
            label="bounds, nine in ten",
        )  # fmt: skip
    for name, seconds in curve.fitted.items():
        # A straight line may go below zero, which a logarithmic axis cannot show.
        points = [(curve.sizes[at], seconds[at]) for at in shown if seconds[at] > 0]
        error = f", {curve.error[name]:.1%} off" if name in curve.error else ""
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{name}{error}", linewidth=1.2)
    measured = [(curve.sizes[at], seconds) for at in shown if (seconds := curve.seconds[at])]
    if measured:
        axes.plot(*zip(*measured, strict=True), "k.", label="measured")
    axes.set(xscale="log", yscale="log", xlabel=curve.entry.unit, ylabel="seconds")
    entry = curve.entry
    place = f" on {entry.mesh}, {entry.groups} x {entry.group_size}, stride {entry.stride}" if entry.mesh else ""
    axes.set_title(f"{entry.operation} {entry.dtype}{place} ({entry.device})", fontsize=10)
    axes.legend(fontsize=8)
    return figure


def write_measured_picture(curve: MeasuredCurve, path: str | Path) -> None:
    """Draw `curve` as PNG or SVG, by the file's ending. Raises InputError for another ending."""
    path = picture_path(path)
    figure = measured_figure(curve)
    save(figure, path)
