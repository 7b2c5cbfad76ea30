"""What came out of a month of a cluster: tables, pictures, and the page of `headway simulate cluster --report`.

Pictures: how completion times are distributed, who had which node when, how long the queue was, how full the machines,
and how much of what was free was of no use to those who waited. Each function returns a matplotlib `Figure` in the
style of `report.charts`; `save` of `report.saving` writes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from headway.errors import InputError
from headway.report import charts
from headway.report.charts import PALETTE, WIDE
from headway.report.picture_page import Drawing, write_picture_page
from headway.report.terminal import new_table
from headway.schedule.study import Case
from headway.schedule.summary import Replay, Summary, Usage, interval, usage
from headway.units import format_seconds

__all__ = [
    "StudyProgress",
    "completion_figure",
    "describe_load",
    "fragmentation_figure",
    "gantt_figure",
    "queue_figure",
    "schedule_tables",
    "utilisation_figure",
    "write_schedule_report",
]

_LINES = ("forward", "backward", "communication", "optimizer", "activations", "muted", "recompute", "other")
_MOST_NODES = 32  # of a Gantt chart; more are a blur
_MOST_BARS = 6000
_GANG_COLOURS = ((1, "idle"), (2, "recompute"), (4, "backward"), (8, "forward"), (16, "optimizer"))
_DAY, _HOUR = 86400.0, 3600.0
_MOMENTS = (
    (1.0, "1 s"), (10.0, "10 s"), (60.0, "1 min"), (600.0, "10 min"), (_HOUR, "1 h"), (10 * _HOUR, "10 h"),
    (4 * _DAY, "4 d"), (40 * _DAY, "40 d"), (400 * _DAY, "400 d"),
)  # fmt: skip


# progress


class StudyProgress:
    """How far a study is: a bar on a terminal, a line for every run in a log. Use it in a `with` statement."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> StudyProgress:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                console=self.console,
            )  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, every: int, case: Case) -> None:
        """A run has ended: `done` of `every` have."""
        what = f"{case.policy}, {case.placement}, seed {case.seed}"
        if self._bar is None:
            self.console.print(f"{done}/{every} {what}", highlight=False)
            return
        if self._task is None:
            self._task = self._bar.add_task(what, total=every)
        self._bar.update(self._task, completed=done, description=what)


# tables


def schedule_tables(summaries: Sequence[Summary], baseline: str = "") -> list[Table]:
    """A line for each policy and placement: completion times with their ratio to `baseline`, and what they cost.

    Summaries of several seeds are averaged, with the 95 % interval of the mean completion time. `baseline`: the policy
    that ratios are to (above 1: better than it), the first by default.
    """
    groups = _groups(summaries)
    reference = _reference(groups, baseline)
    seeds = max(len(each) for each in groups.values())
    left = sum(summary.unfinished for summary in summaries)
    title = f"Job completion time, {summaries[0].jobs:,} jobs" + (f", {seeds} seeds" if seeds > 1 else "")
    times = new_table(
        f"{title}, {left:,} UNFINISHED" if left else title,
        "policy", "average", "median", "p95", "p99", "delay", "makespan", f"vs {reference[0]}",
        right=(1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip
    costs = new_table(
        "Use of the machines", "policy", "utilisation", "preemptions", "migrations", "overhead", "slowdown", "p99",
        "fairness", right=(1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip
    for key, each in groups.items():
        times.add_row(*_times_row(key, each, groups[reference]))
        costs.add_row(*_costs_row(key, each))
    return [times, costs]


def _groups(summaries: Sequence[Summary]) -> dict[tuple[str, str], list[Summary]]:
    if not summaries:
        raise InputError("there are no runs to show", place="schedule")
    groups: dict[tuple[str, str], list[Summary]] = {}
    for summary in summaries:
        groups.setdefault((summary.policy, summary.placement), []).append(summary)
    return groups


def _reference(groups: dict[tuple[str, str], list[Summary]], baseline: str) -> tuple[str, str]:
    if not baseline:
        return next(iter(groups))
    for key in groups:
        if baseline in (key[0], _label(key, groups)):
            return key
    names = ", ".join(key[0] for key in groups)
    raise InputError(f"no run has the policy {baseline!r}", place="baseline", remedy=f"one of {names}")


def _label(key: tuple[str, str], groups: dict[tuple[str, str], list[Summary]]) -> str:
    alike = sum(policy == key[0] for policy, _ in groups) > 1
    return f"{key[0]} ({key[1]})" if alike else key[0]


def _mean(each: Sequence[Summary], field: str) -> float:
    return float(np.mean([getattr(summary, field) for summary in each]))


def _short(seconds: float) -> str:
    """Seconds as a table has room for."""
    if not math.isfinite(seconds):
        return "-"
    if seconds >= 10 * _DAY:
        return f"{seconds / _DAY:.1f} d"
    if seconds >= 10 * _HOUR:
        return f"{seconds / _HOUR:.1f} h"
    if seconds >= 600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.1f} s"


def _times_row(key: tuple[str, str], each: Sequence[Summary], reference: Sequence[Summary]) -> list[str]:
    average = interval([summary.completion_mean for summary in each])
    spread = "" if math.isnan(average.half) else f" ±{average.half / average.mean:.0%}"
    ratio = _mean(reference, "completion_mean") / average.mean if average.mean else math.nan
    return [
        _name(key),
        _short(average.mean) + spread,
        *(_short(_mean(each, f"completion_{name}")) for name in ("median", "p95", "p99")),
        _short(_mean(each, "delay_mean")),
        _short(_mean(each, "makespan")),
        f"{ratio:.2f}x",
    ]


def _costs_row(key: tuple[str, str], each: Sequence[Summary]) -> list[str]:
    return [
        _name(key),
        f"{_mean(each, 'utilisation'):.1%}",
        f"{_mean(each, 'preemptions'):,.0f}",
        f"{_mean(each, 'migrations'):,.0f}",
        f"{_mean(each, 'overhead_share'):.2%}",
        f"{_mean(each, 'slowdown_mean'):,.1f}",
        f"{_mean(each, 'slowdown_p99'):,.1f}",
        f"{_mean(each, 'fairness'):.3f}",
    ]


def _name(key: tuple[str, str]) -> str:
    return f"{key[0]}, {key[1]}"


# pictures


def _named(replays: Sequence[Replay]) -> list[tuple[str, str]]:
    placements = {replay.placement for replay in replays}
    return [
        (
            PALETTE[_LINES[at % len(_LINES)]],
            replay.policy if len(placements) == 1 else f"{replay.policy}, {replay.placement}",
        )
        for at, replay in enumerate(replays)
    ]


def _calendar(axes, stop: float, narrow: bool) -> None:
    """An axis of time in a unit that suits its length."""
    unit, name = (_DAY, "d") if stop > 4 * _DAY else (_HOUR, "h") if stop > 4 * _HOUR else (60.0, "min")
    axes.set_xlim(0, stop or 1.0)
    ticks = MaxNLocator(4 if narrow else 8, integer=True).tick_values(0, stop / unit)
    axes.set_xticks([tick * unit for tick in ticks if 0 <= tick * unit <= stop])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g} {name}" if value else "0"))


def completion_figure(replays: Sequence[Replay], *, width: float = WIDE, height: float = 380.0) -> Figure:
    """Which share of the jobs was done within how long after they were submitted (the CDF of JCT), a line a run."""
    entries = _named(replays)
    top = charts.head_height(entries, width)
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=46, right=16, top=top, bottom=46)
        low, high = math.inf, 0.0
        for replay, (colour, _) in zip(replays, entries, strict=True):
            times = np.sort(replay.completion[~np.isnan(replay.finish)])
            if not len(times):
                continue
            # Enough points for a smooth line, however many jobs there are.
            shares = np.unique(np.concatenate((np.linspace(0, 1, 300), 1 - np.logspace(-5, 0, 60))))
            axes.plot(np.quantile(times, shares), shares, color=colour, linewidth=1.8)
            low, high = min(low, float(np.quantile(times, 0.002))), max(high, float(times[-1]))
        if high:
            axes.set_xscale("log")
            axes.set_xlim(max(low, high * 1e-9), high * 1.1)
            left = axes.get_xlim()[0]
            ticks = [(seconds, text) for seconds, text in _MOMENTS if left <= seconds <= high * 1.1]
            axes.set_xticks([seconds for seconds, _ in ticks], [text for _, text in ticks])
            axes.set_xticks([], minor=True)
        axes.set_ylim(0, 1.005)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_xlabel("completion time")
        charts.draw_head(figure, "Share of the jobs done within", entries, width)
    return figure


def gantt_figure(replay: Replay, *, width: float = WIDE, nodes: int = _MOST_NODES) -> Figure:
    """Who had which node when: a row a node, as many tracks as it has devices, colours by the size of the gang.

    The first `nodes` nodes. Raises InputError for a run that kept no segments.
    """
    if not len(replay.segments):
        raise InputError("the run kept no record of who held what", place="gantt", remedy="ask for segments")
    shown = min(nodes, len(replay.node_devices))
    segments = replay.segments[replay.segments[:, 3] < shown]
    stop = float(np.nanmax(replay.finish))
    row = max(7.0, min(26.0, 560.0 / shown))
    entries = [(PALETTE[role], f"{size}" if size < 16 else "16 and more") for size, role in _GANG_COLOURS]
    top = charts.head_height(entries, width)
    left = 14 + 6.4 * len(f"node {shown - 1}")
    height = top + row * shown + 40
    bars, left_out = _tracks(segments, replay, shown, stop / max(1.0, width - left))
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=left, right=14, top=top, bottom=40)
        axes.grid(False)
        axes.set_ylim(shown, 0)
        for node in range(shown):
            axes.add_patch(Rectangle((0, node + 0.06), stop, 0.88, color=PALETTE["track"], linewidth=0))
        by_colour: dict[str, list[Rectangle]] = {}
        for begin, end, node, low, high, size in bars:
            capacity = replay.node_devices[node]
            shape = Rectangle((begin, node + 0.06 + 0.88 * low / capacity), end - begin, 0.88 * (high - low) / capacity)
            by_colour.setdefault(_gang_colour(size), []).append(shape)
        for colour, shapes in by_colour.items():
            axes.add_collection(PatchCollection(shapes, facecolor=colour, edgecolor="white", linewidth=0.25))
        step = max(1, math.ceil(shown * 13 / (row * shown)))
        axes.set_yticks([node + 0.5 for node in range(0, shown, step)])
        axes.set_yticklabels([f"node {node}" for node in range(0, shown, step)])
        _calendar(axes, stop, width < 600)
        whole = len(replay.node_devices)
        title = f"{replay.policy}: devices of {shown} nodes" + (f" of {whole}" if shown < whole else "")
        charts.draw_head(figure, f"{title}, by size of the gang", entries, width)
        if left_out:
            text = f"{left_out:,} spells too short to be seen are left out"
            figure.text(left / width, 6 / height, text, fontsize=10, color=PALETTE["muted"])
    return figure


def _gang_colour(size: float) -> str:
    role = _GANG_COLOURS[0][1]
    for least, name in _GANG_COLOURS:
        role = name if size >= least else role
    return PALETTE[role]


def _tracks(segments: np.ndarray, replay: Replay, shown: int, pixel: float) -> tuple[list[tuple], int]:
    """Segments as bars (start, stop, node, lowest track, highest, gang), the longest if there are too many."""
    order = np.lexsort((segments[:, 0], segments[:, 1]))
    tracks = [np.full(replay.node_devices[node], -math.inf) for node in range(shown)]
    bars = []
    for job, begin, end, node, count in segments[order]:
        track = tracks[int(node)]
        free = np.flatnonzero(track <= begin + 1e-9)[: int(count)]
        track[free] = end
        # Devices of one job that lie side by side are one bar.
        runs = np.split(free, np.flatnonzero(np.diff(free) != 1) + 1) if len(free) else []
        for run in runs:
            bars.append((begin, end, int(node), int(run[0]), int(run[-1]) + 1, float(replay.devices[int(job)])))
    seen = [bar for bar in bars if bar[1] - bar[0] > 0.2 * pixel]
    if len(seen) > _MOST_BARS:
        seen = sorted(seen, key=lambda bar: bar[0] - bar[1])[:_MOST_BARS]
    return seen, len(bars) - len(seen)


def _usages(replays: Sequence[Replay], width: float) -> list[Usage]:
    """How full the machines were in each run, at as many times as a picture of this width has room for."""
    if not any(len(replay.segments) for replay in replays):
        raise InputError("the runs kept no record of who held what", place="picture", remedy="ask for segments")
    return [usage(replay, 300 if width > 600 else 150) for replay in replays]


def _over_time(
    replays: Sequence[Replay],
    used: Sequence[Usage],
    read: Callable[[Usage, Replay], np.ndarray],
    title: str,
    label: Callable[[float], str],
    *,
    width: float,
    top_value: float | None = None,
    are_counts: bool = False,
    height: float = 300.0,
) -> Figure:
    entries = _named(replays)
    top = charts.head_height(entries, width)
    with matplotlib.rc_context(charts._STYLE):
        figure, axes = charts.new_canvas(width, height, left=62, right=16, top=top, bottom=34)
        stop = 0.0
        for replay, each, (colour, _) in zip(replays, used, entries, strict=True):
            stop = max(stop, float(each.seconds[-1] + (each.seconds[1] - each.seconds[0])))
            axes.step(each.seconds, read(each, replay), where="post", color=colour, linewidth=1.3)
        axes.set_ylim(0, top_value)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=are_counts))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
        _calendar(axes, stop, width < 600)
        charts.draw_head(figure, title, entries, width)
    return figure


def queue_figure(replays: Sequence[Replay], *, width: float = WIDE, used: Sequence[Usage] | None = None) -> Figure:
    """How many jobs wait over time, a line a run. Raises InputError for runs that kept no segments.

    `used`: the usage of each run over time, if it is known already; the next two pictures show more of the same.
    """
    return _over_time(
        replays, used or _usages(replays, width), lambda used, _: used.waiting, "Jobs that wait",
        lambda value: f"{value:,.0f}", width=width, are_counts=True,
    )  # fmt: skip


def utilisation_figure(
    replays: Sequence[Replay], *, width: float = WIDE, used: Sequence[Usage] | None = None
) -> Figure:
    """Which share of the devices is held over time, a line a run. Raises InputError for runs without segments."""
    return _over_time(
        replays, used or _usages(replays, width), lambda used, replay: used.busy / replay.capacity,
        "Share of the devices that is held", lambda value: f"{value:.0%}", width=width, top_value=1.02,
    )  # fmt: skip


def fragmentation_figure(
    replays: Sequence[Replay], *, width: float = WIDE, used: Sequence[Usage] | None = None
) -> Figure:
    """Which share of the devices is free while a job waits that asks for no more than are free, a line a run.

    Raises InputError for runs that kept no segments.
    """
    return _over_time(
        replays, used or _usages(replays, width), lambda used, replay: used.stranded / replay.capacity,
        "Share of the devices that is free while a job waits that asks for no more", lambda value: f"{value:.0%}",
        width=width,
    )  # fmt: skip


# page


def write_schedule_report(
    path: str | Path,
    summaries: Sequence[Summary],
    replays: Sequence[Replay],
    *,
    machines: str,
    facts: Sequence[str] = (),
    problems: Sequence[str] = (),
    baseline: str = "",
) -> Path:
    """Write one self-contained HTML page: the table, and the pictures of `replays` (one run for each policy).

    `facts`: about the trace, for its head. Pictures that cannot be drawn are named on the page. Raises FileError.
    """
    groups = _groups(summaries)
    reference = _reference(groups, baseline)
    best = min(groups, key=lambda key: _mean(groups[key], "completion_mean"))
    lead = f"{best[0]} has the shortest average completion time: {_short(_mean(groups[best], 'completion_mean'))}"
    if best != reference:
        ratio = _mean(groups[reference], "completion_mean") / _mean(groups[best], "completion_mean")
        lead += f", {ratio:.2f} times better than {reference[0]}"
    rows = [[*_times_row(key, each, groups[reference]), *_costs_row(key, each)[1:]] for key, each in groups.items()]
    return write_picture_page(
        path,
        "schedule.html",
        _drawings(replays),
        title=f"{summaries[0].trace} on {machines}",
        kicker="Headway simulate cluster",
        lead=f"{lead}.",
        facts=list(facts),
        head=[
            "policy", "average", "median", "p95", "p99", "delay", "makespan", f"vs {reference[0]}", "utilisation",
            "preemptions", "migrations", "overhead", "slowdown", "its p99", "fairness",
        ],
        rows=[[cell.replace(" ", "\u00a0") for cell in row] for row in rows],
        legend=(
            "Completion time from submission to the end; delay until the first start; slowdown is completion time over "
            "run time; fairness is Jain's index of the slowdowns; overhead is the share of device time without work."
        ),
        problems=list(problems),
    )  # fmt: skip


def _drawings(replays: Sequence[Replay]) -> list[Drawing]:
    used = functools.cache(functools.partial(_usages, replays))
    drawings: list[Drawing] = [
        (
            "Completion times",
            "The further to the left, the sooner; where lines cross, one policy favours short jobs over long ones.",
            lambda width: completion_figure(replays, width=width),
        ),
        (
            "The queue",
            "Jobs submitted and not running.",
            lambda width: queue_figure(replays, width=width, used=used(width)),
        ),
        (
            "Use of the machines",
            "Devices held by jobs, averaged over each step of the line.",
            lambda width: utilisation_figure(replays, width=width, used=used(width)),
        ),
        (
            "Free, and of no use",
            "Kept apart by placement, held back for a gang, or passed over by the policy.",
            lambda width: fragmentation_figure(replays, width=width, used=used(width)),
        ),
    ]
    for replay in replays:
        drawings.append(
            (
                f"Who had which node: {replay.policy}",
                "A row a node, a track a device.",
                lambda width, replay=replay: gantt_figure(replay, width=width, nodes=32 if width > 600 else 16),
            )
        )
    return drawings


def describe_load(load: float, span_seconds: float) -> str:
    """A trace's demand in words, for the head of a page."""
    return f"load {load:.2f} over {format_seconds(span_seconds)}" if math.isfinite(load) else "all at once"
