"""A timeline as a picture: spans as bars on the lanes of each rank, on one axis of time.

`timeline_figure` returns a matplotlib `Figure`, `timeline_svg` the same as SVG that a page's script can zoom;
`bubble_share` says how much of the ranks' time is waiting. Frame, colours and output are those of `report.charts`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from headway.report import charts
from headway.report.charts import PALETTE, WIDE
from headway.timeline import Span, Timeline
from headway.units import format_seconds

__all__ = ["bubble_share", "lane_order", "timeline_figure", "timeline_svg"]

# More spans than these are merged where no eye could part them.
_MAX_SPANS = 3000


def timeline_figure(
    timeline: Timeline,
    *,
    start_seconds: float | None = None,
    stop_seconds: float | None = None,
    window_seconds: float | None = None,
    width: float = WIDE,
) -> Figure:
    """Spans as bars on the lanes of each rank, coloured by kind; the empty track behind them is waiting.

    Draws from `start_seconds` (the first span) to `stop_seconds` (the end of the last), on an axis of
    `window_seconds` that begins at zero: give two timelines the same window to compare them.
    """
    return _timeline_figure(timeline, start_seconds, stop_seconds, window_seconds, width)[0]


@charts.styled
def _timeline_figure(
    timeline: Timeline, start: float | None, stop: float | None, window: float | None, width: float
) -> tuple[Figure, list[str]]:
    spans = [span for span in timeline.spans if span.kind != "step"]
    start = min((span.start_seconds for span in spans), default=0.0) if start is None else start
    stop = max((span.stop_seconds for span in spans), default=1.0) if stop is None else stop
    spans = [span for span in spans if span.stop_seconds > start and span.start_seconds < stop]
    window = max(window or 0.0, stop - start) or 1.0
    lanes = sorted({span.lane for span in spans}, key=lane_order)
    spans = _merged(spans, window)

    narrow = width < 600
    groups = list(dict.fromkeys(lane.split("/", 1)[0] for lane in lanes))
    inner = {group: [lane for lane in lanes if lane.split("/", 1)[0] == group] for group in groups}
    show_lanes = not narrow and any(len(lanes) > 1 for lanes in inner.values())
    kinds = [kind for kind in charts.KINDS if any(span.kind == kind for span in spans)]
    legend = dict.fromkeys((PALETTE[charts.KINDS[kind][0]], charts.KINDS[kind][1]) for kind in kinds)
    if any(span.kind not in charts.KINDS for span in spans):
        legend[PALETTE["other"], "other"] = None

    # Top down, in pixels: the first lane of a rank (its compute) is the tallest.
    positions: dict[str, tuple[float, float]] = {}
    label_of: dict[str, float] = {}
    y = 0.0
    for group in groups:
        begin = y
        for position, lane in enumerate(inner[group]):
            tall = 22.0 if position == 0 else 11.0
            positions[lane] = (y, tall)
            y += tall + 3.0
        label_of[group] = (begin + y - 3.0) / 2
        y += 7.0
    extent = max(y - 10.0, 22.0)

    left = 12.0 + 6.9 * max((len(group) for group in groups), default=4) + (92.0 if show_lanes else 0.0)
    left = min(left, 0.4 * width)
    top = 12.0 + 18.0 * charts.legend_rows((text for _, text in legend), width) if legend else 6.0
    bottom = 26.0
    figure, axes = charts.new_canvas(width, extent + top + bottom, left=left, right=14, top=top, bottom=bottom)
    axes.set_xlim(0, window)
    axes.set_ylim(extent, 0)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)

    for lane, (lane_y, tall) in positions.items():
        track = Rectangle((0, lane_y), stop - start, tall, color=PALETTE["track"], linewidth=0)
        track.set_gid(f"track-{len(axes.patches)}")
        axes.add_patch(track)
        if show_lanes and "/" in lane:
            name = charts.shortened(lane.split("/", 1)[1], 14)
            _label(axes, -8, lane_y + tall / 2, name, fontsize=10, color=PALETTE["muted"])
    for group, at in label_of.items():
        shown = charts.shortened(group, 24 if not narrow else 12)
        _label(axes, -8 - (92 if show_lanes else 0), at, shown, fontsize=11.5, color=PALETTE["ink"])

    locator = MaxNLocator(nbins=4 if narrow else 8, steps=[1, 2, 2.5, 5, 10])
    for position, seconds in enumerate(tick for tick in locator.tick_values(0, window) if 0 <= tick <= window * 1.0001):
        axes.axvline(seconds, color=PALETTE["grid"], linewidth=1, zorder=0.5)
        label = axes.annotate(
            format_seconds(float(seconds)), (seconds, 0), xycoords=axes.get_xaxis_transform(), xytext=(0, -16),
            textcoords="offset points", ha="center" if position else "left", fontsize=11, color=PALETTE["muted"],
        )  # fmt: skip
        label.set_gid(f"tick-{position}")

    titles: list[str] = []
    pixels_per_second = (width - left - 14) / window
    for span in spans:
        lane_y, tall = positions[span.lane]
        begin, end = max(span.start_seconds, start), min(span.stop_seconds, stop)
        role = charts.KINDS.get(span.kind, ("other", "other"))[0]
        bar = Rectangle((begin - start, lane_y), end - begin, tall, facecolor=PALETTE[role], linewidth=0, zorder=2)
        bar.set_gid(f"span-{len(titles)}")
        titles.append(_span_title(span, start))
        axes.add_patch(bar)
        short = _short_name(span)
        fits = tall > 20 and (end - begin) * pixels_per_second > 7 * len(short) + 6
        if short and fits and role in ("forward", "backward", "optimizer"):
            text = axes.text(
                (begin + end) / 2 - start, lane_y + tall / 2, charts.plain_text(short), ha="center", va="center",
                fontsize=10, color=PALETTE["on-kind"], zorder=3, clip_on=True, parse_math=False,
            )  # fmt: skip
            text.set_gid(f"spantext-{len(titles)}")
    charts.draw_legend(figure, legend, width)
    return figure, titles


def timeline_svg(
    timeline: Timeline,
    *,
    start_seconds: float | None = None,
    stop_seconds: float | None = None,
    window_seconds: float | None = None,
    width: float = WIDE,
) -> str:
    """`timeline_figure` as SVG, in which every bar has a title that a browser shows when the pointer rests on it.

    The bars stand in one group of class `spans`, and the tick labels have class `tick`, so that a script can zoom:
    the `svg` element says what its axis covers (`data-seconds`) and from where to where it lies (`data-left`,
    `data-right`, in the picture's units).
    """
    figure, titles = _timeline_figure(timeline, start_seconds, stop_seconds, window_seconds, width)
    root = charts.parse_svg(charts.raw_svg(figure))
    axes = figure.axes[0]
    box = axes.get_position()
    root.set("data-seconds", f"{axes.get_xlim()[1]:.9g}")
    root.set("data-left", f"{box.x0 * width:.2f}")
    root.set("data-right", f"{box.x1 * width:.2f}")

    parents = {child: parent for parent in root.iter() for child in parent}
    bars = ElementTree.Element(charts.SVG_NAMESPACE + "g", {"class": "spans"})
    clip = ""
    anchor: tuple[ElementTree.Element, int] | None = None
    for element in [element for element in root.iter() if element.get("id")]:
        kind, _, number = element.get("id", "").partition("-")
        if kind == "tick":
            element.set("class", "tick")
        elif kind in ("track", "span", "spantext"):
            parent = parents[element]
            if anchor is None:
                anchor = (parent, list(parent).index(element))
            parent.remove(element)
            for child in element.iter():
                clip = child.attrib.pop("clip-path", "") or clip
            if kind == "spantext":
                bars.append(element)
                continue
            # One path for each bar, without the group that matplotlib puts around it.
            (path,) = element
            if kind == "span":
                title = ElementTree.SubElement(path, charts.SVG_NAMESPACE + "title")
                title.text = titles[int(number)]
            bars.append(path)
    if anchor is not None:
        # The window that clips must not move with the bars, so it goes on a group around theirs.
        frame = ElementTree.Element(charts.SVG_NAMESPACE + "g", {"clip-path": clip} if clip else {})
        frame.append(bars)
        anchor[0].insert(anchor[1], frame)
    return charts.serialised(root)


def bubble_share(timeline: Timeline, *, start_seconds: float = 0.0, stop_seconds: float | None = None) -> float:
    """Share of the ranks' time, from start to stop, in which nothing but `idle` and `bubble` spans go on; 0 to 1."""
    stop = timeline.stop_seconds if stop_seconds is None else stop_seconds
    busy: dict[str, list[tuple[float, float]]] = {}
    for span in timeline.spans:
        if span.kind == "step":
            continue
        intervals = busy.setdefault(span.lane.split("/", 1)[0], [])
        begin, end = max(span.start_seconds, start_seconds), min(span.stop_seconds, stop)
        if span.kind not in ("idle", "bubble") and end > begin:
            intervals.append((begin, end))
    if not busy or stop <= start_seconds:
        return 0.0
    covered = 0.0
    for intervals in busy.values():
        reached = start_seconds
        for begin, end in sorted(intervals):
            covered += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
    return 1.0 - covered / (len(busy) * (stop - start_seconds))


def _merged(spans: Sequence[Span], window: float) -> list[Span]:
    """The spans; where there are too many to draw, neighbours of one kind that no eye could part become one."""
    if len(spans) <= _MAX_SPANS:
        return list(spans)
    gap = window / 1000
    merged: list[Span] = []
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for span in sorted(spans, key=lambda span: (span.lane, span.start_seconds)):
        key = (span.lane, span.kind)
        position, count = last.get(key, (-1, 0))
        if position == len(merged) - 1 and position >= 0:
            before = merged[position]
            if span.start_seconds - before.stop_seconds < gap and span.duration_seconds < 4 * gap:
                longer = max(span.stop_seconds, before.stop_seconds) - before.start_seconds
                name = f"{count + 1} x {span.kind or 'span'}"
                merged[position] = msgspec.structs.replace(before, name=name, duration_seconds=longer, detail={})
                last[key] = (position, count + 1)
                continue
        last[key] = (len(merged), 1)
        merged.append(span)
    return merged


def lane_order(text: str) -> tuple:
    """A key by which `rank 10` follows `rank 2`, and compute comes before the other lanes of a rank."""
    group, _, lane = text.partition("/")
    numbers = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", group))
    return numbers, lane != "compute", lane


def _span_title(span: Span, origin: float) -> str:
    begin = max(0.0, span.start_seconds - origin)
    lines = [
        span.name or span.kind,
        f"{format_seconds(span.duration_seconds)}, from {format_seconds(begin)}",
        span.lane,
    ]
    lines += [f"{key}: {value}" for key, value in span.detail.items()]
    return "\n".join(charts.plain_text(line) for line in lines)


def _short_name(span: Span) -> str:
    micro_batch = span.detail.get("micro_batch")
    if micro_batch is not None:
        return str(micro_batch)
    match = re.search(r"(\d+)\s*$", span.name)
    return match[1] if match else ""


def _label(axes: Axes, dx: float, y: float, text: str, **style) -> None:
    axes.annotate(
        charts.plain_text(text), (0, y), xycoords=axes.get_yaxis_transform(), xytext=(dx, 0),
        textcoords="offset points", ha="right", va="center", annotation_clip=False, parse_math=False, **style,
    )  # fmt: skip
