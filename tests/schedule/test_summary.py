"""Figures against what can be counted by hand, and intervals against their textbook."""

from __future__ import annotations

import csv
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule import fast
from headway.schedule.fleet import parse_fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.summary import COLUMNS, FIGURES, interval, paired_ratio, summarise, usage, write_csv
from headway.schedule.traces.read import Trace
from headway.schedule.traces.synthetic import synthesize

# Head of line: 4 devices; 2 x 10 s at 0, 4 x 10 s at 1, 1 x 1 s at 2; FIFO ends at 10, 20, 21.
HEAD = Trace(
    name="head",
    format="headway",
    jobs=(
        Job(name="a", submit_seconds=0.0, devices=2, duration_seconds=10.0, user="ann"),
        Job(name="b", submit_seconds=1.0, devices=4, duration_seconds=10.0, user="ben"),
        Job(name="c", submit_seconds=2.0, devices=1, duration_seconds=1.0),
    ),
)


def played(trace=HEAD, fleet="n1g4", policy="fifo", **rules):
    return fast.run(trace, parse_fleet(fleet), make_policy(policy), make_placement("first-fit"), **rules)


def test_figures_of_three_jobs_are_those_counted_by_hand():
    summary = summarise(played())
    assert summary.completion_mean == pytest.approx((10 + 19 + 19) / 3)
    assert summary.completion_median == 19
    assert summary.delay_mean == pytest.approx((0 + 9 + 18) / 3)
    assert summary.makespan == 21
    assert summary.utilisation == pytest.approx((20 + 40 + 1) / (4 * 21))
    assert (summary.preemptions, summary.unfinished, summary.jobs) == (0, 0, 3)
    slowdowns = np.array([1.0, 1.9, 19.0])
    assert summary.slowdown_mean == pytest.approx(slowdowns.mean())
    assert summary.fairness == pytest.approx(slowdowns.sum() ** 2 / (3 * (slowdowns**2).sum()))


def test_overhead_is_the_share_of_device_time_without_work():
    summary = summarise(played(overhead=Overhead(first_start_seconds=5.0)))
    assert summary.overhead_share == pytest.approx(5 * 7 / (5 * 7 + 61))


def test_jobs_that_did_not_finish_are_counted_and_no_part_of_the_mean():
    replay = played()
    finish = replay.finish.copy()
    finish[2] = math.nan
    summary = summarise(replay._replace(finish=finish))
    assert summary.unfinished == 1
    assert summary.completion_mean == pytest.approx((10 + 19) / 2)


def test_a_refused_job_is_counted_once_as_unfinished():
    huge = Job(name="huge", submit_seconds=0.0, devices=5, duration_seconds=1.0)
    replay = played(msgspec.structs.replace(HEAD, jobs=(*HEAD.jobs, huge)))
    assert replay.refused == ("huge",)
    assert summarise(replay).unfinished == 1


def test_the_interval_of_five_runs_is_students():
    values = [10.0, 12.0, 9.0, 11.0, 13.0]
    found = interval(values)
    assert found.mean == 11.0
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert math.isnan(interval([3.0]).half)
    with pytest.raises(InputError):
        interval([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=2, max_size=8), st.floats(0.1, 10))
def test_a_ratio_does_not_mind_units_and_turns_over(pairs, scale):
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ratio = paired_ratio(ours, theirs)
    scaled = paired_ratio([scale * value for value in ours], [scale * value for value in theirs])
    assert scaled.mean == pytest.approx(ratio.mean)
    assert paired_ratio(theirs, ours).mean == pytest.approx(1 / ratio.mean)


def test_what_all_seeds_have_in_common_cancels_in_a_ratio():
    assert paired_ratio([1.0, 10.0, 100.0], [2.0, 20.0, 200.0]).half == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="3 runs beside 2"):
        paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from(["fifo", "srtf", "2d-las"]))
def test_use_over_time_adds_up_to_the_device_seconds_held(seed, points, policy):
    trace = synthesize(30, devices=12, load=1.5, seed=seed)
    replay = played(trace, "n3g4", policy, keep_segments=True)
    used = usage(replay, points)
    span = used.seconds[1] - used.seconds[0] if points > 1 else float(replay.finish.max())
    assert float(used.busy.sum() * span) == pytest.approx(float(replay.useful.sum()), rel=1e-6)
    assert (used.busy <= 12 * (1 + 1e-9)).all()


def test_the_queue_and_what_is_stranded_are_those_at_each_instant():
    replay = played(keep_segments=True)
    used = usage(replay, 21)  # spans of a second, looked at in their middles
    assert list(used.waiting[:4]) == [0, 1, 2, 2]
    # From 1 s on, two devices are free and nobody who waits at the head needs so few; from 2 s on, c would fit.
    assert list(used.stranded[:4]) == [0, 0, 2, 2]
    assert list(used.waiting[10:21]) == [1] * 10 + [0]
    assert used.scattered[0] == 1.0


def test_a_row_for_every_job_of_every_run(tmp_path):
    replay = played()
    write_csv([(0, replay), (7, replay)], tmp_path / "jobs.csv")
    with (tmp_path / "jobs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 6
    assert [row["finish_seconds"] for row in rows[:3]] == ["10.0", "20.0", "21.0"]
    assert [row["user"] for row in rows[:3]] == ["ann", "ben", ""]
    assert {row["seed"] for row in rows[3:]} == {"7"}
    for row in rows:
        parts = sum(float(row[name]) for name in ("run_seconds", "wait_seconds", "overhead_seconds"))
        assert parts == pytest.approx(float(row["completion_seconds"]))


def test_every_figure_is_a_field_of_the_summary():
    summary = summarise(played())
    assert all(isinstance(getattr(summary, name), int | float) for name in FIGURES)
