"""Pictures of a run, drawn by matplotlib: as SVG for pages, as PNG for a README; timelines are in `report.timelines`.

Each picture has a function that returns a matplotlib `Figure` (`loss_figure`, …) and one that returns it as SVG
text (`loss_svg`, …). One unit of a picture is one CSS pixel at its natural size, so a page draws every picture
twice, at `WIDE` and at `NARROW`, and shows the one that fits: text stays readable on a phone.

Colours have roles (`PALETTE`): what is blue in one picture means the same in the next. `inline_svg` replaces them by
CSS variables of those names, so that a page can give each role another colour in the dark.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from headway.predict.prediction import Memory, StepTime
from headway.units import format_bytes, format_count, format_seconds
from headway.value import write_atomically

__all__ = [
    "KINDS",
    "MEMORY_KINDS",
    "NARROW",
    "PALETTE",
    "PALETTE_DARK",
    "SVG_NAMESPACE",
    "TIME_PARTS",
    "WIDE",
    "comparison_figure",
    "comparison_svg",
    "draw_head",
    "draw_legend",
    "head_height",
    "inline_svg",
    "legend_rows",
    "loss_figure",
    "loss_svg",
    "memory_figure",
    "memory_svg",
    "new_canvas",
    "parse_svg",
    "plain_text",
    "raw_svg",
    "save_png",
    "serialised",
    "shortened",
    "smoothed",
    "styled",
    "throughput_figure",
    "throughput_svg",
    "to_svg",
]

WIDE, NARROW = 880.0, 380.0

# No two roles may share a colour: `inline_svg` finds the role by it.
PALETTE = {
    "ink": "#20262d",
    "muted": "#69727c",
    "grid": "#e4e2dc",
    "track": "#efede8",
    "on-kind": "#ffffff",
    "forward": "#3d6ea8",
    "backward": "#2b8f86",
    "recompute": "#85bcb4",
    "communication": "#dd9f3c",
    "optimizer": "#8567a8",
    "activations": "#c4666e",
    "workspace": "#a8a59c",
    "idle": "#d3d0c8",
    "other": "#8b939c",
}
PALETTE_DARK = {
    "ink": "#e6e4df",
    "muted": "#9aa2ab",
    "grid": "#30353b",
    "track": "#252a30",
    "on-kind": "#12161a",
    "forward": "#7aa7dd",
    "backward": "#5cbfb2",
    "recompute": "#3d7d76",
    "communication": "#e6b45c",
    "optimizer": "#b398d4",
    "activations": "#e08d94",
    "workspace": "#7d7b74",
    "idle": "#434950",
    "other": "#7c858e",
}

# Kind of a span → (role, what the legend says), in the order of the legend.
KINDS = {
    "forward": ("forward", "forward"),
    "compute": ("forward", "compute"),
    "backward": ("backward", "backward"),
    "recompute": ("recompute", "recompute"),
    "communication": ("communication", "communication"),
    "optimizer": ("optimizer", "optimizer"),
    "idle": ("idle", "bubble"),
    "bubble": ("idle", "bubble"),
}
# Field of StepTime → (role, name of the part).
TIME_PARTS = {
    "compute_seconds": ("forward", "compute"),
    "communication_seconds": ("communication", "exposed communication"),
    "bubble_seconds": ("idle", "bubble"),
    "optimizer_seconds": ("optimizer", "optimizer"),
}
# Field of Memory → (role, name of the kind). Gradients share backward's colour, which makes them.
MEMORY_KINDS = {
    "parameters_bytes": ("forward", "parameters"),
    "gradients_bytes": ("backward", "gradients"),
    "optimizer_bytes": ("optimizer", "optimizer states"),
    "activations_bytes": ("activations", "activations"),
    "communication_bytes": ("communication", "communication buffers"),
    "workspace_bytes": ("workspace", "workspace"),
    "outside_bytes": ("other", "outside the allocator"),
}

_MAX_POINTS = 1200
_STYLE: dict[Any, Any] = {
    "font.size": 12,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "svg.hashsalt": "headway",  # the same picture is the same file
    "text.color": PALETTE["ink"],
    "axes.edgecolor": PALETTE["grid"],
    "axes.labelcolor": PALETTE["muted"],
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 1.0,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "legend.handlelength": 1.0,
    "legend.handleheight": 0.9,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "legend.borderpad": 0.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the frame


def new_canvas(
    width: float, height: float, *, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure of width x height pixels with one pair of axes; margins in pixels."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    return figure, axes


def draw_head(figure: Figure, title: str, entries: Iterable[tuple[str, str]], width: float) -> None:
    """A title, and below it a legend of (colour, text) pairs; `head_height` says what they take."""
    figure_width, figure_height = figure.get_size_inches() * 72
    figure.text(
        2 / figure_width, 1 - 16 / figure_height, plain_text(title), fontsize=13, color=PALETTE["ink"],
        parse_math=False,
    )  # fmt: skip
    draw_legend(figure, entries, width, down=38.0)


def head_height(entries: Iterable[tuple[str, str]], width: float) -> float:
    """Pixels that a title and a legend of (colour, text) pairs take at the top of a picture."""
    return 32.0 + 18.0 * legend_rows((text for _, text in entries), width)


def draw_legend(figure: Figure, entries: Iterable[tuple[str, str]], width: float, *, down: float = 14.0) -> None:
    """A legend along the top: (colour, text) pairs, set in rows from the left; the first row `down` pixels down."""
    figure_width, figure_height = figure.get_size_inches() * 72
    x, y = 2.0, figure_height - down
    for colour, text in entries:
        advance = 16 + 6.6 * len(text) + 18
        if x > 2 and x + advance - 18 > width:
            x, y = 2.0, y - 18
        size = (10 / figure_width, 10 / figure_height)
        figure.add_artist(Rectangle((x / figure_width, y / figure_height), *size, color=colour, linewidth=0))
        figure.text(
            (x + 16) / figure_width, (y + 1) / figure_height, plain_text(text), color=PALETTE["muted"], fontsize=11.5,
            parse_math=False,
        )  # fmt: skip
        x += advance


def legend_rows(texts: Iterable[str], width: float) -> int:
    """Rows that a legend of these texts takes."""
    x, rows = 2.0, 1
    for text in texts:
        advance = 16 + 6.6 * len(text) + 18
        if x > 2 and x + advance - 18 > width:
            x, rows = 2.0, rows + 1
        x += advance
    return rows


def styled(draw):
    """`draw` under our style, which is undone afterwards: matplotlib's settings are global."""

    @functools.wraps(draw)
    def wrapped(*arguments, **keywords):
        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **keywords)

    return wrapped


def plain_text(text: str) -> str:
    """Text without the characters that XML has no place for: names are the user's."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str, length: int) -> str:
    """At most `length` characters of it."""
    return text if len(text) <= length else text[: length - 1] + "…"


# -------------------------------------------------------------------------------------------------------------- curves


def smoothed(values: Sequence[float], deviation: float | None = None) -> list[float]:
    """Finite `values` averaged with their neighbours on both sides, weighted by a Gaussian (so that nothing lags).

    `deviation` is the Gaussian's, in points; by default a sixtieth of the curve, between 1.5 and 100.
    """
    if not values:
        return []
    deviation = min(max(1.5, len(values) / 60), 100.0) if deviation is None else deviation
    reach = min(math.ceil(3 * deviation), len(values) - 1)
    kernel = numpy.exp(-0.5 * (numpy.arange(-reach, reach + 1) / deviation) ** 2)
    # At the ends there are neighbours on one side only: divide by the weights of those that are there.
    inside = slice(reach, reach + len(values))
    weights = numpy.convolve(numpy.ones(len(values)), kernel)[inside]
    return (numpy.convolve(numpy.asarray(values, dtype=float), kernel)[inside] / weights).tolist()


@styled
def loss_figure(
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    reference: tuple[str, float] | None = None,
    width: float = WIDE,
) -> Figure:
    """Loss over steps, each step's and smoothed; `reference` (label, loss) is a line to compare it with.

    Losses that are not finite are left out of both curves.
    """
    figure, axes = _curve(steps, losses, "forward", width)
    if reference is not None:
        label, value = reference
        _reference(axes, value, f"{label} {value:.3g}", width)
    draw_legend(figure, _curve_legend("forward", "loss"), width)
    return figure


@styled
def throughput_figure(
    steps: Sequence[int],
    rates: Sequence[float],
    *,
    unit: str = "tokens",
    reference: tuple[str, float] | None = None,
    width: float = WIDE,
) -> Figure:
    """Throughput over steps, in `unit` per second, each step's and smoothed; `reference` (label, rate) is a line."""
    figure, axes = _curve(steps, rates, "backward", width)
    if reference is not None:
        label, value = reference
        _reference(axes, value, f"{label} {format_count(value)}", width)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    draw_legend(figure, _curve_legend("backward", f"{unit} per second"), width)
    return figure


def _reference(axes: Axes, value: float, text: str, width: float) -> None:
    """A dashed line across, with what it is at its right end."""
    axes.axhline(value, color=PALETTE["activations"], linewidth=1.2, linestyle=(0, (5, 4)), zorder=2.5)
    low, high = axes.get_ylim()
    pad = 0.08 * (max(high, value) - min(low, value))
    axes.set_ylim(min(low, value - pad), max(high, value + pad))
    axes.annotate(
        plain_text(shortened(text, 60 if width > 600 else 34)), (1, value), xycoords=axes.get_yaxis_transform(),
        xytext=(-2, 5), textcoords="offset points", ha="right", va="bottom", fontsize=11, zorder=5,
        color=PALETTE["activations"], parse_math=False,
    )  # fmt: skip


def _curve_legend(role: str, name: str) -> list[tuple[str, str]]:
    return [(PALETTE["idle"], f"{name}, every step"), (PALETTE[role], "smoothed")]


def _curve(steps: Sequence[int], values: Sequence[float], role: str, width: float) -> tuple[Figure, Axes]:
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    figure, axes = new_canvas(width, 300 if width > 600 else 230, left=52, right=14, top=34, bottom=44)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if width > 600 else 4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.margins(x=0.01)
    if not points:
        return figure, axes
    x = [step for step, _ in points]
    raw = [value for _, value in points]
    smooth = smoothed(raw)
    size = math.ceil(len(points) / _MAX_POINTS)
    if size == 1:
        axes.plot(x, raw, color=PALETTE["idle"], linewidth=1.0, zorder=2)
    else:
        # More steps than pixels: the band between the smallest and the largest of each handful says the same.
        bins = [raw[position : position + size] for position in range(0, len(raw), size)]
        axes.fill_between(
            x[::size], [min(part) for part in bins], [max(part) for part in bins], color=PALETTE["idle"], linewidth=0
        )
    marker = "o" if len(points) == 1 else None
    axes.plot(x[::size], smooth[::size], color=PALETTE[role], linewidth=2.2, zorder=3, marker=marker)
    return figure, axes


# ---------------------------------------------------------------------------------------------------------------- bars


@styled
def comparison_figure(
    predicted: StepTime | None,
    measured: StepTime | None,
    *,
    width: float = WIDE,
) -> Figure:
    """The parts of a step, predicted above measured, on one axis of seconds."""
    rows = [(name, time) for name, time in (("predicted", predicted), ("measured", measured)) if time is not None]
    narrow = width < 600
    legend = [(PALETTE[role], text) for role, text in TIME_PARTS.values()]
    top = 12.0 + 18.0 * legend_rows((text for _, text in legend), width)
    left, right = 78, 74 if not narrow else 66
    figure, axes = new_canvas(width, top + 28 + 44 * len(rows), left=left, right=right, top=top, bottom=28)
    longest = max((_parts_total(time) for _, time in rows), default=1.0) or 1.0
    axes.set_xlim(0, longest)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if narrow else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_seconds(value)))
    for position, (_, time) in enumerate(rows):
        offset = 0.0
        for field, (role, _) in TIME_PARTS.items():
            seconds = getattr(time, field)
            bar = Rectangle((offset, position - 0.3), seconds, 0.6, facecolor=PALETTE[role], linewidth=0, zorder=2)
            axes.add_patch(bar)
            offset += seconds
        axes.annotate(
            format_seconds(time.step_seconds), (offset, position), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=11.5, color=PALETTE["ink"], annotation_clip=False,
        )  # fmt: skip
    draw_legend(figure, legend, width)
    return figure


def _parts_total(time: StepTime) -> float:
    return sum(getattr(time, field) for field in TIME_PARTS)


@styled
def memory_figure(
    predicted: Mapping[int, Memory],
    measured: Mapping[int, float],
    *,
    capacity_bytes: float | None = None,
    width: float = WIDE,
) -> Figure:
    """Predicted memory of each rank by kind, in bytes, with a mark where the measured peak lies.

    `capacity_bytes`, what a device has, is drawn if it is not far beyond the bars.
    """
    ranks = sorted({*predicted, *measured})
    narrow = width < 600
    kinds = [
        (field, role, text)
        for field, (role, text) in MEMORY_KINDS.items()
        if any(getattr(memory, field) > 0 for memory in predicted.values())
    ]
    legend = [(PALETTE[role], text) for _, role, text in kinds]
    if measured:
        legend.append((PALETTE["ink"], "measured peak"))
    top = 12.0 + 18.0 * legend_rows((text for _, text in legend), width)
    thick = 30 if len(ranks) <= 12 else 16
    left, right = 64, 74 if not narrow else 66
    figure, axes = new_canvas(width, top + 28 + thick * max(1, len(ranks)), left=left, right=right, top=top, bottom=28)
    largest = max([memory.total_bytes for memory in predicted.values()] + list(measured.values()), default=0.0) or 1.0
    limit = largest
    if capacity_bytes is not None and capacity_bytes < 1.6 * largest:
        limit = max(largest, capacity_bytes)
        axes.axvline(capacity_bytes, color=PALETTE["activations"], linewidth=1.2, linestyle=(0, (5, 4)))
    axes.set_xlim(0, limit * 1.005)
    axes.set_ylim(max(1, len(ranks)) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if narrow else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    for position, rank in enumerate(ranks):
        memory, offset = predicted.get(rank), 0.0
        if memory is not None:
            for field, role, _ in kinds:
                size = getattr(memory, field)
                bar = Rectangle((offset, position - 0.32), size, 0.64, facecolor=PALETTE[role], linewidth=0, zorder=2)
                axes.add_patch(bar)
                offset += size
        peak = measured.get(rank)
        if peak is not None:
            axes.plot([peak, peak], [position - 0.44, position + 0.44], color=PALETTE["ink"], linewidth=2.5, zorder=4)
        axes.annotate(
            format_bytes(offset or peak or 0.0), (max(offset, peak or 0.0), position), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=11.5, color=PALETTE["ink"], annotation_clip=False,
        )  # fmt: skip
    draw_legend(figure, legend, width)
    return figure


def loss_svg(
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    reference: tuple[str, float] | None = None,
    width: float = WIDE,
) -> str:
    """`loss_figure` as SVG."""
    return to_svg(loss_figure(steps, losses, reference=reference, width=width))


def throughput_svg(
    steps: Sequence[int],
    rates: Sequence[float],
    *,
    unit: str = "tokens",
    reference: tuple[str, float] | None = None,
    width: float = WIDE,
) -> str:
    """`throughput_figure` as SVG."""
    return to_svg(throughput_figure(steps, rates, unit=unit, reference=reference, width=width))


def comparison_svg(predicted: StepTime | None, measured: StepTime | None, *, width: float = WIDE) -> str:
    """`comparison_figure` as SVG."""
    return to_svg(comparison_figure(predicted, measured, width=width))


def memory_svg(
    predicted: Mapping[int, Memory],
    measured: Mapping[int, float],
    *,
    capacity_bytes: float | None = None,
    width: float = WIDE,
) -> str:
    """`memory_figure` as SVG."""
    return to_svg(memory_figure(predicted, measured, capacity_bytes=capacity_bytes, width=width))


# -------------------------------------------------------------------------------------------------------------- output

SVG_NAMESPACE = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_ROLE_OF = {colour: role for role, colour in PALETTE.items()}


def save_png(figure: Figure, path: str | Path, *, scale: float = 2.0, background: str = "#ffffff") -> None:
    """Write a picture as PNG, `scale` device pixels to the CSS pixel. Raises FileError."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=72 * scale, facecolor=background)
    write_atomically(path, buffer.getvalue())


def to_svg(figure: Figure) -> str:
    """A picture as a standalone SVG document, in the colours of `PALETTE`, without references to anything outside."""
    return serialised(parse_svg(raw_svg(figure)))


def inline_svg(svg: str, *, label: str, prefix: str) -> str:
    """An SVG of this module made fit to stand inside an HTML page.

    Colours become CSS variables by their role (`var(--forward, #3d6ea8)`), identifiers get `prefix`, so that several
    pictures live on one page, and `label` is what a screen reader says.
    """
    root = parse_svg(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's own rules are for every element, which here would be every element of the page.
            if child.tag == SVG_NAMESPACE + "style":
                parent.remove(child)
    text = ElementTree.tostring(root, encoding="unicode")
    referenced = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name is not None and name in referenced:
            element.set("id", prefix + name)
        for key, value in list(element.attrib.items()):
            if key in (_XLINK + "href", "href") and value.startswith("#"):
                del element.attrib[key]
                element.set("href", f"#{prefix}{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))
            if key == "style":
                # The page's own font.
                style = re.sub(r"font-family:[^;]*;\s*", "", element.attrib[key])
                element.set(key, re.sub(r"#[0-9a-f]{6}", _variable, style))
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace(f' xmlns="{SVG_NAMESPACE[1:-1]}"', "", 1)  # HTML knows what an svg element is


def _variable(match: re.Match[str]) -> str:
    role = _ROLE_OF.get(match[0])
    return f"var(--{role}, {match[0]})" if role else match[0]


def raw_svg(figure: Figure) -> str:
    """As matplotlib writes it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text is drawn by the browser in its own fonts; that matplotlib's has no such character doesn't matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return buffer.getvalue()


def parse_svg(svg: str) -> ElementTree.Element:
    """A picture of matplotlib's as elements, without its metadata; a unit is a pixel."""
    root = ElementTree.fromstring(svg)
    for child in list(root):
        if child.tag == SVG_NAMESPACE + "metadata":
            root.remove(child)
    for side in ("width", "height"):
        # One unit is one pixel, where matplotlib says that it is a point.
        root.set(side, root.get(side, "").removesuffix("pt"))
    for text in root.iter(SVG_NAMESPACE + "text"):
        if text.get("transform", "").startswith("rotate(-0 "):
            del text.attrib["transform"]
    return root


def serialised(root: ElementTree.Element) -> str:
    """The text of an element."""
    return ElementTree.tostring(root, encoding="unicode")


ElementTree.register_namespace("", SVG_NAMESPACE[1:-1])
ElementTree.register_namespace("xlink", _XLINK[1:-1])
