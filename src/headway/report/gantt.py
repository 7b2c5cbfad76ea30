"""Pictures of one step and of what was asked about it: the pipeline's Gantt chart, memory over time, the roofline of
the operators, and how searches came to their best plan.

Each returns a matplotlib `Figure` in the style and the colours of `report.charts`; `save` of `report.saving` writes it
as SVG or PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from headway.errors import InputError
from headway.predict.latency import Latency
from headway.predict.operators import WHOLE, Shards, operator_bytes, operator_name
from headway.predict.prediction import Memory
from headway.report import charts
from headway.report.charts import MEMORY_KINDS, PALETTE, WIDE
from headway.simulate.played import StepSimulation
from headway.timeline import Span
from headway.units import format_bytes, format_flop, format_seconds

__all__ = ["MOST_ROWS", "Series", "gantt_figure", "memory_figure", "roofline_figure", "search_figure"]

_ROW = 22.0  # pixels of one lane
MOST_ROWS = 64  # more are a blur
_LINES = ("forward", "backward", "communication", "optimizer", "activations", "muted", "recompute", "other")


class Series(NamedTuple):
    """How a search went: `points` are (seconds since it began, the best value found so far), in order."""

    name: str
    points: tuple[tuple[float, float], ...]


# ---------------------------------------------------------------------------------------------------------------- Gantt


def gantt_figure(simulation: StepSimulation, *, width: float = WIDE) -> Figure:
    """The compute lane of one rank of each kind, micro-batch by micro-batch, and communication below it.

    The numbers are those of the micro-batches; the head says how long a step takes and which share of it is bubble.
    Raises InputError if there are more kinds of ranks than can be told apart.
    """
    ranks = [kind.one.ranks[0] for kind in simulation.kinds]
    if len(ranks) > MOST_ROWS:
        raise InputError(
            f"{len(ranks)} kinds of ranks are too many to draw",
            place="gantt",
            remedy=f"draw at most {MOST_ROWS}: without jitter, ranks that are alike share a row",
        )
    timeline = simulation.timeline_of(ranks)
    rows = {f"rank {rank}": position for position, rank in enumerate(ranks)}
    labels = [_row_label(simulation, position) for position in range(len(ranks))]
    split = any(span.detail.get("part") == "weight" for span in timeline.spans)
    entries = [(PALETTE["forward"], "forward"), (PALETTE["backward"], "input gradients" if split else "backward")]
    entries += [(PALETTE["recompute"], "gradients of parameters")] if split else []
    entries += [(PALETTE["communication"], "communication"), (PALETTE["optimizer"], "optimizer")]
    left, right, top, bottom = 8 + 6.4 * max(map(len, labels)), 10.0, 12 + charts.head_height(entries, width), 46.0
    height = top + bottom + _ROW * len(ranks)
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=left, right=right, top=top, bottom=bottom)
        axes.set_xlim(0, simulation.seconds or 1.0)
        axes.set_ylim(len(ranks), 0)
        scale = (width - left - right) / (simulation.seconds or 1.0)
        axes.grid(False)
        for position in range(len(ranks)):
            axes.add_patch(
                Rectangle((0, position + 0.08), simulation.seconds, 0.84, color=PALETTE["track"], linewidth=0)
            )
        for span in timeline.spans:
            group, _, lane = span.lane.partition("/")
            if group in rows:
                _draw_span(axes, rows[group], lane, span, scale)
            elif group == "job":
                ends = (span.start_seconds, span.stop_seconds)
                axes.axvspan(*ends, color=PALETTE["activations"], alpha=0.25, linewidth=0)
        for position, label in enumerate(labels):
            axes.text(-6 / scale, position + 0.5, label, ha="right", va="center", fontsize=11, color=PALETTE["muted"])
        axes.set_yticks([])
        _time_axis(axes)
        share = simulation.bubble_share
        title = f"{format_seconds(simulation.step_seconds)} a step, {share:.1%} of it bubble"
        charts.draw_head(figure, title, entries, width)
    return figure


def _row_label(simulation: StepSimulation, position: int) -> str:
    kind = simulation.kinds[position]
    count = len(kind.teams) * len(kind.one.ranks)
    alike = f" and {count - 1} alike" if count > 1 else ""
    return f"stage {kind.one.pipeline}: rank {kind.one.ranks[0]}{alike}"


def _draw_span(axes, row: int, lane: str, span: Span, scale: float) -> None:
    compute = lane == "compute"
    if lane.startswith("send"):
        return
    low, high = (row + 0.08, row + 0.72) if compute else (row + 0.74, row + 0.92)
    role = {"forward": "forward", "backward": "backward", "optimizer": "optimizer"}.get(span.kind, "communication")
    if span.detail.get("part") == "weight":
        role = "recompute"
    pixels = span.duration_seconds * scale
    axes.add_patch(
        Rectangle(
            (span.start_seconds, low),
            span.duration_seconds,
            high - low,
            facecolor=PALETTE[role],
            edgecolor="white",
            linewidth=0.4 if compute and pixels > 3 else 0,
        )
    )
    if compute and "micro_batch" in span.detail and pixels > 15 and "layer" not in span.detail:
        axes.text(
            span.start_seconds + span.duration_seconds / 2, (low + high) / 2, str(span.detail["micro_batch"]),
            ha="center", va="center", fontsize=9, color=PALETTE["on-kind"], clip_on=True,
        )  # fmt: skip


def _time_axis(axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value) if value else "0"))


# --------------------------------------------------------------------------------------------------------------- memory


def memory_figure(
    simulation: StepSimulation,
    memory: Sequence[Memory],
    capacity_bytes: float = 0.0,
    *,
    width: float = WIDE,
) -> Figure:
    """Bytes in use over time, one panel for each pipeline rank, its peak divided by kind beside it.

    `memory`: the prediction of each rank (`Prediction.memory`). What a rank keeps all the time lies at the bottom;
    activations above it rise and fall with the micro-batches that the simulation holds, their most being what was
    predicted. `capacity_bytes`: a line for what the device has; 0: none.
    """
    ranks: list[int] = []
    for kind in simulation.kinds:
        if all(simulation.plan.coordinates(rank)[0] != kind.one.pipeline for rank in ranks):
            ranks.append(kind.one.ranks[0])
    ranks.sort()
    panel, gap, top, bottom, left, right = 84.0, 22.0, 44.0, 40.0, 92.0, 180.0
    height = top + bottom + len(ranks) * (panel + gap)
    highest = max(memory[rank].total_bytes for rank in ranks)
    limit = max(highest, capacity_bytes if capacity_bytes < 2 * highest else 0.0) * 1.08
    with matplotlib.rc_context(charts._STYLE):
        figure, first = charts.new_canvas(width, height, left=left, right=right, top=top, bottom=bottom)
        first.remove()
        for position, rank in enumerate(ranks):
            low = height - top - (position + 1) * (panel + gap) + gap
            axes = figure.add_axes((left / width, low / height, (width - left - right) / width, panel / height))
            _memory_panel(axes, simulation, rank, memory[rank], limit, capacity_bytes)
            axes.tick_params(labelbottom=position == len(ranks) - 1)
            own = memory[rank]
            stage = simulation.plan.coordinates(rank)[0]
            text = f"stage {stage} (rank {rank})"
            figure.text(left / width, (low + panel + 5) / height, text, fontsize=11.5, color=PALETTE["muted"])
            figure.text(
                (width - right + 14) / width, (low + panel + 5) / height,
                f"peak {format_bytes(own.total_bytes)}", fontsize=11.5, color=PALETTE["ink"],
            )  # fmt: skip
            parts = sorted(own.__struct_fields__, key=lambda field: -getattr(own, field))
            for line, field in enumerate(parts[:6]):
                size = getattr(own, field)
                if size <= 0:
                    continue
                y = (low + panel - 11 - 14.5 * line) / height
                figure.add_artist(
                    Rectangle(
                        ((width - right + 14) / width, y), 9 / width, 9 / height,
                        color=PALETTE[_kind(field)[0]], linewidth=0,
                    )
                )  # fmt: skip
                name = _kind(field)[1].replace("communication buffers", "buffers")
                figure.text(
                    (width - right + 28) / width, y, f"{name} {size / own.total_bytes:.0%}",
                    fontsize=10.5, color=PALETTE["muted"],
                )  # fmt: skip
        title = f"Memory over {format_seconds(simulation.seconds)}"
        figure.text(2 / width, 1 - 16 / height, title, fontsize=13, color=PALETTE["ink"])
    return figure


def _kind(field: str) -> tuple[str, str]:
    """The colour's role and the name of a kind of memory."""
    return MEMORY_KINDS.get(field, ("other", field.removesuffix("_bytes").replace("_", " ")))


def _memory_panel(
    axes, simulation: StepSimulation, rank: int, memory: Memory, limit: float, capacity_bytes: float
) -> None:
    held = simulation.held(rank)
    # Stages of one rank are taken to hold as much for a micro-batch each.
    now: dict[int, int] = {}
    times, counts = [0.0], [0]
    for change in held:
        now[change.stage] = change.micro_batches
        times.append(change.seconds)
        counts.append(sum(now.values()))
    times.append(simulation.seconds)
    counts.append(counts[-1])
    most = max(counts) or 1
    base = 0.0
    for field in memory.__struct_fields__:
        if field != "activations_bytes":
            size, colour = getattr(memory, field), PALETTE[_kind(field)[0]]
            axes.fill_between((0, simulation.seconds), base, base + size, color=colour, linewidth=0, alpha=0.9)
            base += size
    tops = [base + memory.activations_bytes * count / most for count in counts]
    axes.fill_between(times, base, tops, step="post", color=PALETTE["activations"], linewidth=0, alpha=0.9)
    if capacity_bytes and capacity_bytes <= limit:
        axes.axhline(capacity_bytes, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, simulation.seconds or 1.0)
    axes.set_ylim(0, limit)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value) if value else "0"))
    _time_axis(axes)


# ------------------------------------------------------------------------------------------------------------- roofline


def roofline_figure(
    latency: Latency,
    samples: int,
    *,
    shards: Shards = WHOLE,
    precision: str = "float32",
    width: float = WIDE,
    height: float = 420.0,
) -> Figure:
    """The operators of a graph in the roofline of a device: FLOP per byte moved against FLOP per second reached.

    Williams, Waterman, Patterson (CACM 2009). A point's area is the operator's share of the time; equal operators are
    one point. The roof is the device's nominal rates; how far below it a point lies is what it is predicted to lose to
    the launch, and to efficiency. Raises InputError if no operator computes anything.
    """
    kind = latency.accelerator
    points: dict[tuple[str, float, float], float] = {}
    total = 0.0
    for operator in latency.graph.operators:
        seconds = latency.operator_seconds(operator, samples, shards, precision)
        total += seconds
        degree = shards.of(operator)
        flop = operator.flop.at(samples) / (degree if operator.is_sharded else 1)
        moved = operator_bytes(operator, samples, degree, precision)
        if flop > 0 and moved > 0 and seconds > 0:
            # The CPU's variant of an operator is what was traced, and stands for the device's own.
            name = operator_name(operator).strip("_").replace("_for_cpu", "")
            key = (name, flop / moved, flop / seconds)
            points[key] = points.get(key, 0.0) + seconds
    if not points:
        raise InputError("no operator computes anything", place=latency.graph.name, remedy="give a model with layers")
    peak, memory_rate = kind.flop_rate(precision), kind.memory_bytes_per_second
    ridge = peak / memory_rate
    low = min(min(x for _, x, _ in points), ridge) / 2
    high = max(max(x for _, x, _ in points), ridge) * 2
    names = list(dict.fromkeys(sorted((name for name, _, _ in points), key=lambda name: -_time_of(points, name))))
    shown = names[: len(_LINES) - 1]
    entries = [(PALETTE[_LINES[at]], name) for at, name in enumerate(shown)]
    top = 12 + charts.head_height(entries, width)
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=92, right=14, top=top, bottom=48)
        axes.loglog((low, ridge, high), (low * memory_rate, peak, peak), color=PALETTE["ink"], linewidth=1.6, zorder=2)
        for (name, x, y), seconds in points.items():
            role = _LINES[shown.index(name)] if name in shown else "other"
            area = max(14.0, 1600 * seconds / total)
            axes.scatter(x, y, s=area, color=PALETTE[role], alpha=0.75, linewidths=0, zorder=3)
        axes.set_xlim(low, high)
        axes.set_ylim(min(y for _, _, y in points) / 2, peak * 2)
        axes.set_xlabel("FLOP per byte moved")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_flop(value, per_second=True)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.text(
            high / 1.1, peak * 1.12, f"{format_flop(peak, per_second=True)} in {precision}",
            ha="right", fontsize=11, color=PALETTE["muted"],
        )  # fmt: skip
        covered = sum(points.values()) / total
        title = (
            f"{latency.graph.name} on {kind.name}, {samples} samples: {covered:.0%} of the time is in these operators"
        )
        charts.draw_head(figure, title, entries, width)
    return figure


def _time_of(points: Mapping[tuple[str, float, float], float], name: str) -> float:
    return sum(seconds for (each, _, _), seconds in points.items() if each == name)


# --------------------------------------------------------------------------------------------------------------- search


def search_figure(
    series: Sequence[Series],
    *,
    bound: float = 0.0,
    what: str = "step time",
    width: float = WIDE,
    height: float = 360.0,
) -> Figure:
    """The best value so far against the time searched, for several methods; time on a logarithmic axis.

    `bound`: a value that nothing can be below, or the optimum, drawn as a line; 0: none. Raises InputError for a series
    without points, or with points out of order.
    """
    for each in series:
        times = [time for time, _ in each.points]
        if not times or times != sorted(times) or not all(math.isfinite(value) for _, value in each.points):
            raise InputError(
                "a series needs points in order of time, with finite values", place=each.name, remedy="leave it out"
            )
    if not series:
        raise InputError("no series to draw", place="search")
    ends = [time for each in series for time, _ in each.points]
    first = max(min((time for time in ends if time > 0), default=1e-3), 1e-6)
    last = max(max(ends), first) * 1.4  # a little beyond, so that the last find is seen
    values = [value for each in series for _, value in each.points]
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=84, right=150, top=36, bottom=48)
        labels = []
        for position, each in enumerate(series):
            colour = PALETTE[_LINES[position % len(_LINES)]]
            xs = [max(time, first / 1.5) for time, _ in each.points] + [last]
            ys = [value for _, value in each.points] + [each.points[-1][1]]
            axes.step(xs, ys, where="post", color=colour, linewidth=1.8)
            axes.scatter(xs[-2], ys[-2], s=18, color=colour, zorder=3)
            labels.append((ys[-1], each.name, colour))
        if bound > 0:
            axes.axhline(bound, color=PALETTE["muted"], linewidth=1, linestyle=(0, (4, 3)))
            labels.append((bound, "bound", PALETTE["muted"]))
        axes.set_xscale("log")
        axes.set_xlim(first / 1.5, last)
        floor, ceiling = min([*values, bound or math.inf]), max(values)
        margin = 0.06 * (ceiling - floor or ceiling or 1.0)
        axes.set_ylim(floor - margin, ceiling + margin)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
        axes.set_xlabel("searched for")
        # Names at the ends of their lines, moved apart where they would lie on each other.
        scale = (height - 36 - 48) / (ceiling - floor + 2 * margin)
        at = -math.inf
        for value, name, colour in sorted(labels):
            y = max(48 + (value - floor + margin) * scale, at + 15)
            at = y
            figure.text((width - 144) / width, (y - 4) / height, charts.plain_text(name), fontsize=11.5, color=colour)
        title = f"Best {what} found so far"
        figure.text(2 / width, 1 - 16 / height, title, fontsize=13, color=PALETTE["ink"])
    return figure
