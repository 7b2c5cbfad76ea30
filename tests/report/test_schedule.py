"""Tables, pictures and the page of a cluster simulation say what the runs say."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from headway.errors import InputError
from headway.report import charts
from headway.report.saving import save
from headway.report.schedule import (
    StudyProgress,
    completion_figure,
    describe_load,
    fragmentation_figure,
    gantt_figure,
    queue_figure,
    schedule_tables,
    utilisation_figure,
    write_schedule_report,
)
from headway.schedule import fast
from headway.schedule.fleet import parse_fleet
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.study import Case
from headway.schedule.summary import summarise
from headway.schedule.traces.synthetic import synthesize

TRACE = synthesize(60, devices=16, load=1.5, seed=2)


def replay(policy: str, keep: bool = True):
    fleet = parse_fleet("n4g4")
    return fast.run(TRACE, fleet, make_policy(policy), make_placement("consolidated"), keep_segments=keep)


RUNS = [replay("fifo"), replay("srtf")]


def shown(tables) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()


def test_the_tables_have_a_line_a_policy_a_ratio_to_the_baseline_and_at_most_100_columns():
    summaries = [summarise(run) for run in RUNS]
    text = shown(schedule_tables(summaries))
    ratio = summaries[0].completion_mean / summaries[1].completion_mean
    assert f"{ratio:.2f}x" in text
    assert "1.00x" in text
    assert max(map(len, text.splitlines())) <= 100
    assert f"{1 / ratio:.2f}x" in shown(schedule_tables(summaries, "srtf"))
    with pytest.raises(InputError, match="las"):
        schedule_tables(summaries, "las")
    with pytest.raises(InputError):
        schedule_tables([])


def test_seeds_are_averaged_and_their_spread_is_shown():
    summaries = [summarise(RUNS[0]._replace(submitted=RUNS[0].submitted - shift), seed=seed)
                 for seed, shift in enumerate((0.0, 5000.0, 9000.0))]  # fmt: skip
    text = shown(schedule_tables(summaries))
    assert "3 seeds" in text
    assert re.search(r"±\d+%", text)


def test_unfinished_jobs_stand_in_the_title():
    finish = RUNS[0].finish.copy()
    finish[:2] = np.nan
    summary = summarise(RUNS[0]._replace(finish=finish))
    assert "2 UNFINISHED" in shown(schedule_tables([summary]))


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_pictures_are_drawn_at_every_width(tmp_path, width):
    figures = {
        "completion": completion_figure(RUNS, width=width),
        "queue": queue_figure(RUNS, width=width),
        "utilisation": utilisation_figure(RUNS, width=width),
        "fragmentation": fragmentation_figure(RUNS, width=width),
        "gantt": gantt_figure(RUNS[1], width=width, nodes=3),
    }
    for name, figure in figures.items():
        assert save(figure, tmp_path / f"{name}.svg").stat().st_size > 2000
        assert figure.get_size_inches()[0] * 72 == pytest.approx(width)


def test_the_distribution_of_completion_times_is_that_of_the_jobs():
    figure = completion_figure(RUNS)
    line = figure.axes[0].lines[0]
    xs, ys = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert ys[0] == 0
    assert ys[-1] == 1
    assert xs[-1] == pytest.approx(RUNS[0].completion.max())
    middle = min(range(len(ys)), key=lambda at: abs(ys[at] - 0.5))
    below = (RUNS[0].completion <= xs[middle]).mean()
    assert below == pytest.approx(0.5, abs=0.03)


def test_bars_of_a_gantt_chart_stay_within_their_node_and_never_overlap():
    figure = gantt_figure(RUNS[0], nodes=4)
    boxes = [path.get_extents() for group in figure.axes[0].collections for path in group.get_paths()]
    assert boxes
    for box in boxes:
        assert int(box.y0 + 0.05) == int(box.y1 - 0.05)
    for at, one in enumerate(boxes):
        for other in boxes[:at]:
            apart_in_time = one.x1 <= other.x0 + 1e-3 or other.x1 <= one.x0 + 1e-3
            assert apart_in_time or one.y1 <= other.y0 + 1e-9 or other.y1 <= one.y0 + 1e-9


def test_pictures_of_who_held_what_need_a_run_that_kept_it():
    bare = replay("fifo", keep=False)
    for draw in (gantt_figure, lambda run: queue_figure([run]), lambda run: utilisation_figure([run])):
        with pytest.raises(InputError, match="kept no record"):
            draw(bare)


def test_the_page_is_self_contained_and_escapes_what_users_named(tmp_path):
    named = [run._replace(trace="<script>alert(1)</script>") for run in RUNS]
    path = write_schedule_report(
        tmp_path / "page.html", [summarise(run) for run in named], named, machines="n4g4", facts=["60 jobs"],
        problems=["line 3: <b>wrong</b>"],
    )  # fmt: skip
    page = path.read_text()
    assert "<script>alert" not in page
    assert "<b>wrong" not in page
    assert not re.search(r"(?:src|href)=[\"']https?://", page)
    assert page.count("<svg") == 2 * 6
    assert "srtf has the shortest average completion time" in page
    bare = [replay("fifo", keep=False)]
    page = write_schedule_report(tmp_path / "bare.html", [summarise(bare[0])], bare, machines="n4g4").read_text()
    assert "kept no record" in page


@pytest.mark.parametrize(("terminal", "says"), [(False, "1/2 srtf, skew, seed 3"), (True, "1/2")])
def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(terminal, says):
    out = io.StringIO()
    with StudyProgress(Console(file=out, force_terminal=terminal, width=100)) as progress:
        progress.step(1, 2, Case(policy="srtf", placement="skew", seed=3))
    assert says in out.getvalue()


def test_a_trace_all_at_once_has_no_load():
    assert describe_load(float("inf"), 0.0) == "all at once"
    assert describe_load(0.5, 7200.0) == "load 0.50 over 2 h 0 min"
