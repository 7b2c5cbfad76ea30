"""A cluster drawn with what a collective puts on its links: the busier a link, the wider and darker its line.

Devices of a node stand on a circle, its switches inside or outside of it by what they join, nodes side by side, and
network switches between them. The two directions of a cable are two lines, each to the right of its own direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.report import charts
from headway.report.charts import PALETTE, WIDE
from headway.report.saving import picture_path, save
from headway.units import format_rate

__all__ = ["MOST_DEVICES", "topology_figure", "write_topology"]

MOST_DEVICES = 64  # more are a blur

_HEAT = LinearSegmentedColormap.from_list("load", ["#f3dcb6", PALETTE["communication"], PALETTE["activations"]])
_RADIUS = 1.0
_Point = tuple[float, float]


def topology_figure(
    cluster: Cluster,
    devices: Sequence[str],
    busy: Mapping[tuple[str, str], float],
    *,
    title: str = "",
    width: float = WIDE,
) -> Figure:
    """`devices` of the cluster, what joins them, and how busy each link is: its share of the time, 0 to 1.

    `busy` maps (source, target) of a link; links that are not in it are drawn faintly where both ends are shown.
    Raises InputError for more than `MOST_DEVICES` devices.
    """
    if len(devices) > MOST_DEVICES:
        raise InputError(
            f"{len(devices)} devices are too many to draw",
            place=cluster.name,
            remedy=f"choose at most {MOST_DEVICES} with --devices",
        )
    shown = set(devices) | {end for link in busy for end in link}
    place = _places(cluster, [device.name for device in cluster.devices if device.name in shown], shown)
    left, right = min(x for x, _ in place.values()) - 0.45, max(x for x, _ in place.values()) + 0.45
    low, high = min(y for _, y in place.values()) - 0.45, max(y for _, y in place.values()) + 0.45
    head, foot = (26.0 if title else 4.0), 30.0
    scale = min((width - 8) / (right - left), 150.0)
    with matplotlib.rc_context(charts._STYLE):
        height = (high - low) * scale + head + foot
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, foot / height, 1, (height - head - foot) / height))
        middle, span = (left + right) / 2, width / scale / 2
        axes.set_xlim(middle - span, middle + span)
        axes.set_ylim(low, high)
        axes.set_axis_off()
        rate: dict[tuple[str, str], float] = {}
        for link in cluster.links:
            if link.source in place and link.target in place:
                key = (link.source, link.target)
                rate[key] = rate.get(key, 0.0) + link.bytes_per_second
        is_device = {device.name for device in cluster.devices}
        for key in sorted(rate, key=lambda key: busy.get(key, 0.0)):
            _draw_link(axes, place, key, busy.get(key), scale, devices=is_device)
        fast = max(rate.values(), default=1.0)
        ranks = {name: rank for rank, name in enumerate(devices)}
        for name, at in place.items():
            _draw_thing(axes, name, at, ranks.get(name), name in is_device)
        if title:
            figure.text(
                4 / width,
                1 - 16 / height,
                charts.plain_text(title),
                fontsize=12.5,
                color=PALETTE["ink"],
                parse_math=False,
            )
        _draw_scale(figure, width, height, f"a line: one direction of a link, up to {format_rate(fast)}")
    return figure


def write_topology(
    path: str | Path,
    cluster: Cluster,
    devices: Sequence[str],
    busy: Mapping[tuple[str, str], float],
    *,
    title: str = "",
) -> Path:
    """Draw `topology_figure` into a .png or .svg file. Raises InputError for another kind of file, FileError."""
    path = picture_path(path)
    figure = topology_figure(cluster, devices, busy, title=title)
    return save(figure, path)


def _places(cluster: Cluster, devices: Sequence[str], shown: set[str]) -> dict[str, _Point]:
    node_of = {device.name: device.node for device in cluster.devices}
    switches = {switch.name: switch.node for switch in cluster.switches if switch.name in shown}
    nodes = list(dict.fromkeys(node_of[name] for name in devices))
    columns = max(1, min(len(nodes), 4, math.ceil(math.sqrt(len(nodes) * 2))))
    crowded = max((sum(node_of[name] == node for name in devices) for node in nodes), default=1)
    # The more devices on a circle, the wider it must be for their labels.
    radius = _RADIUS * max(1.0, crowded / 9)
    pitch = 2 * radius + (2.4 if any(switches.values()) else 1.2)
    place: dict[str, _Point] = {}
    centre: dict[str, _Point] = {}
    for position, node in enumerate(nodes):
        x, y = (position % columns) * pitch, -(position // columns) * pitch
        centre[node] = (x, y)
        members = [name for name in devices if node_of[name] == node]
        for turn, name in enumerate(members):
            if len(members) == 1:
                place[name] = (x, y)
                continue
            angle = math.pi / 2 - 2 * math.pi * (turn + 0.5) / len(members) + math.pi / len(members)
            place[name] = (x + radius * math.cos(angle), y + radius * math.sin(angle))
    neighbours: dict[str, list[str]] = {name: [] for name in switches}
    for link in cluster.links:
        if link.source in neighbours and link.target in shown:
            neighbours[link.source].append(link.target)
    waiting = dict(switches)
    ring = 0
    while waiting:
        # Outwards from the devices: first what touches one, then what touches that.
        ready = [name for name in waiting if any(other in place for other in neighbours[name])] or list(waiting)
        ring += 1
        found: dict[str, _Point] = {}
        for name in ready:
            known = [place[other] for other in neighbours[name] if other in place] or list(place.values())
            x, y = (sum(at[axis] for at in known) / len(known) for axis in (0, 1))
            node = waiting.pop(name)
            if node in centre:
                cx, cy = centre[node]
                away = math.hypot(x - cx, y - cy)
                if away > 0.3 * radius:
                    # It serves one side of the circle: outside of it, in that direction.
                    reach = radius + 0.42 * ring
                    x, y = cx + (x - cx) / away * reach, cy + (y - cy) / away * reach
            found[name] = (x, y)
        place.update(_apart(found, place))
    return place


def _apart(found: dict[str, _Point], place: dict[str, _Point]) -> dict[str, _Point]:
    """The same points, moved to the right where one would hide another."""
    taken = list(place.values())
    moved: dict[str, _Point] = {}
    for name, (x, y) in found.items():
        shift = 0.0
        while any(math.hypot(x + shift - ox, y - oy) < 0.34 for ox, oy in taken):
            shift += 0.36
        moved[name] = (x + shift, y)
        taken.append(moved[name])
    return moved


def _draw_link(
    axes, place: dict[str, _Point], key: tuple[str, str], busy: float | None, scale: float, *, devices: set[str]
) -> None:
    source, target = place[key[0]], place[key[1]]
    # Lines end at the rim of what they join: circles, and boxes that are wider than high.
    before, behind = (scale * (0.14 if name in devices else 0.16) for name in key)
    if busy is None:
        line = FancyArrowPatch(
            source, target, arrowstyle="-", color=PALETTE["grid"], linewidth=1.0, shrinkA=before, shrinkB=behind
        )
        axes.add_patch(line)
        return
    share = min(max(busy, 0.0), 1.0)
    axes.add_patch(
        FancyArrowPatch(
            source,
            target,
            connectionstyle="arc3,rad=0.09",
            arrowstyle="-|>,head_width=2.4,head_length=4.2",
            mutation_scale=1.0 + share,
            color=to_hex(_HEAT(share)),
            linewidth=1.2 + 3.2 * share,
            shrinkA=before,
            shrinkB=behind,
            zorder=1 + share,
        )
    )


def _draw_thing(axes, name: str, at: _Point, rank: int | None, is_device: bool) -> None:
    short = name.rsplit("/", 1)[-1]
    if is_device:
        used = rank is not None
        axes.add_patch(
            Circle(at, 0.125, facecolor=PALETTE["forward"] if used else PALETTE["idle"], linewidth=0, zorder=4)
        )
        label = str(rank) if used else ""
        axes.text(*at, label, ha="center", va="center", color=PALETTE["on-kind"], fontsize=11, zorder=5)
        axes.text(at[0], at[1] - 0.2, charts.plain_text(short), ha="center", va="center", color=PALETTE["muted"],
                  fontsize=9, zorder=5, parse_math=False)  # fmt: skip
        return
    box = FancyBboxPatch(
        (at[0] - 0.17, at[1] - 0.065), 0.34, 0.13, boxstyle="round,pad=0.02", facecolor=PALETTE["track"],
        edgecolor=PALETTE["muted"], linewidth=0.8, zorder=4,
    )  # fmt: skip
    axes.add_patch(box)
    axes.text(*at, charts.plain_text(short), ha="center", va="center", color=PALETTE["ink"], fontsize=8.5, zorder=5,
              parse_math=False)  # fmt: skip


def _draw_scale(figure: Figure, width: float, height: float, note: str) -> None:
    bar = figure.add_axes((8 / width, 10 / height, 90 / width, 8 / height))
    bar.imshow([[step / 60 for step in range(61)]], aspect="auto", cmap=_HEAT, extent=(0, 1, 0, 1))
    bar.set_axis_off()
    figure.text(106 / width, 9 / height, f"idle to always busy; {note}", color=PALETTE["muted"], fontsize=11)
