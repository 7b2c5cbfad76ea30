"""Worked examples of the papers, and Tiresias's public simulator on its own trace."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

import pytest

from headway.errors import InputError
from headway.schedule.fleet import uniform_fleet
from headway.schedule.job import Job
from headway.schedule.placement.rules import FirstFit
from headway.schedule.policies.fifo import Fifo, FirstFitFifo
from headway.schedule.policies.gittins import GittinsIndex
from headway.schedule.policies.shortest import ShortestRemainingServiceFirst, ShortestRemainingTimeFirst
from headway.schedule.policies.tiresias import (
    DiscretisedGittins,
    DiscretisedLas,
    TwoDimensionalGittins,
    TwoDimensionalLas,
)
from headway.schedule.replay import Outcome, play
from headway.schedule.tiresias_compatible import SCHEDULES, play_compatible, play_policy

TRACE = Path(__file__).parents[3] / "shared" / "data" / "scheduling" / "tiresias" / "60_job.csv"

FIGURE_7 = [
    Job(name="J1", submit_seconds=0, devices=2, duration_seconds=2),
    Job(name="J2", submit_seconds=0, devices=1, duration_seconds=8),
    Job(name="J3", submit_seconds=0, devices=2, duration_seconds=6),
]
# Most jobs of such a kind need 4 GPU-slots, a few 8 or 12: a job that has had 4 is likely to be one of the longer.
FIGURE_7_SIZES = GittinsIndex([4.0, 8.0, 12.0], [0.8, 0.1, 0.1])


def slots(outcome: Outcome, count: int) -> str:
    """Who ran in each unit slot, where only one job runs at a time."""
    found = []
    for slot in range(count):
        (name,) = {segment.job for segment in outcome.segments if segment.begin <= slot < segment.end}
        found.append(name[1:])
    return " ".join(found)


@pytest.mark.parametrize(
    ("policy", "completions", "average"),
    [
        (ShortestRemainingServiceFirst(), [2, 10, 16], 28 / 3),
        (TwoDimensionalLas(quantum_seconds=1), [5, 14, 16], 35 / 3),
        (TwoDimensionalGittins(FIGURE_7_SIZES, quantum_seconds=1), [2, 12, 16], 10.0),
        (DiscretisedGittins(FIGURE_7_SIZES, (4.0,)), [2, 12, 16], 10.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_tiresias_figure_7_completion_times(policy, completions, average):
    outcome = play(FIGURE_7, uniform_fleet(1, 2), policy, FirstFit())
    assert outcome.completions == completions
    assert outcome.average_completion_seconds == pytest.approx(average, rel=1e-12)


def test_tiresias_figure_7_slots_of_2d_las():
    outcome = play(FIGURE_7, uniform_fleet(1, 2), TwoDimensionalLas(quantum_seconds=1), FirstFit(), keep_segments=True)
    assert slots(outcome, 16) == "1 2 3 2 1 2 3 2 2 3 2 2 3 2 3 3"


def test_tiresias_figure_7_slots_of_srsf_and_gittins():
    for policy, expected in (
        (ShortestRemainingServiceFirst(), "1 1 2 2 2 2 2 2 2 2 3 3 3 3 3 3"),
        (TwoDimensionalGittins(FIGURE_7_SIZES, quantum_seconds=1), "1 1 2 2 2 2 3 3 2 2 2 2 3 3 3 3"),
        (DiscretisedGittins(FIGURE_7_SIZES, (4.0,)), "1 1 2 2 2 2 3 3 2 2 2 2 3 3 3 3"),
    ):
        outcome = play(FIGURE_7, uniform_fleet(1, 2), policy, FirstFit(), keep_segments=True)
        assert slots(outcome, 16) == expected


HEAD_OF_LINE = [
    Job(name="first", submit_seconds=0, devices=2, duration_seconds=10),
    Job(name="large", submit_seconds=1, devices=4, duration_seconds=10),
    Job(name="small", submit_seconds=2, devices=1, duration_seconds=1),
]


def test_fifo_blocks_behind_the_head_of_the_line():
    outcome = play(HEAD_OF_LINE, uniform_fleet(1, 4), Fifo(), FirstFit())
    assert [job.finish_seconds for job in outcome.jobs] == [10, 20, 21]
    assert outcome.completions == [10, 19, 19]


def test_first_fit_lets_the_small_job_overtake_the_head_of_the_line():
    outcome = play(HEAD_OF_LINE, uniform_fleet(1, 4), FirstFitFifo(), FirstFit())
    assert [job.finish_seconds for job in outcome.jobs] == [10, 20, 3]


# ------------------------------------------------------------------------------ Tiresias's simulator on its own trace


@pytest.fixture(scope="module")
def sixty() -> list[Job]:
    if not TRACE.exists():
        pytest.skip("Tiresias's trace is not at hand")
    with TRACE.open() as lines:
        return [
            Job(
                name=row["job_id"], devices=int(row["num_gpu"]), submit_seconds=float(row["submit_time"]),
                duration_seconds=float(row["duration"]), model=row["model_name"],
            )
            for row in csv.DictReader(lines)
        ]  # fmt: skip


def figures(outcome: Outcome) -> tuple[float, float, float, float]:
    """Average, median, 95th percentile (nearest rank) of completion times, and makespan."""
    times = sorted(outcome.completions)
    assert len(times) == len(outcome.jobs)
    rank = math.ceil(0.95 * len(times)) - 1
    return (
        round(statistics.mean(times), 2),
        statistics.median(times),
        times[rank],
        outcome.makespan_seconds,
    )


@pytest.mark.parametrize(
    ("policy", "published"),
    [
        (Fifo(), (200.82, 149.5, 366, 3335)),
        (FirstFitFifo(), (190.68, 130, 366, 3271)),
        (ShortestRemainingTimeFirst(), (192.12, 126.5, 383, 3271)),
    ],
    ids=["fifo", "first-fit-fifo", "srtf"],
)
def test_the_exact_machine_gives_the_figures_of_tiresias_simulator(sixty, policy, published):
    assert figures(play(sixty, uniform_fleet(4, 4), policy, FirstFit())) == published


def test_srsf_differs_from_theirs_by_ties_alone(sixty):
    exact = play(sixty, uniform_fleet(4, 4), ShortestRemainingServiceFirst(), FirstFit())
    theirs = play_compatible(sixty, 16, "shortest-gpu")
    assert figures(exact) == (194.98, 126.5, 460, 3315)
    assert figures(theirs) == (195.90, 126.5, 460, 3315)
    # With durations that never tie, there is no tie to break, and no difference.
    apart = [
        Job(
            name=job.name, devices=job.devices, submit_seconds=1000 * job.submit_seconds,
            duration_seconds=1000 * job.duration_seconds + number * 7 % 61,
        )
        for number, job in enumerate(sixty)
    ]  # fmt: skip
    exact = play(apart, uniform_fleet(4, 4), ShortestRemainingServiceFirst(), FirstFit())
    assert exact.completions == play_compatible(apart, 16, "shortest-gpu").completions


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        ("fifo", (200.82, 149.5, 366, 3335)),
        ("fjf", (190.68, 130, 366, 3271)),
        ("shortest", (192.12, 126.5, 383, 3271)),
        ("shortest-gpu", (195.90, 126.5, 460, 3315)),
    ],
)
def test_the_compatible_mode_gives_the_figures_of_tiresias_simulator(sixty, schedule, published):
    assert figures(play_compatible(sixty, 16, schedule)) == published


def test_with_its_own_thresholds_hardly_a_job_of_sixty_is_demoted_and_both_agree(sixty):
    exact = play(sixty, uniform_fleet(4, 4), DiscretisedLas(), FirstFit())
    assert figures(exact) == figures(play_compatible(sixty, 16, "dlas-gpu"))


# 4 devices; A runs alone for 3 s, is demoted by nobody, then gives way to nobody: see each test for the arithmetic.
LATE = [
    Job(name="A", submit_seconds=0, devices=4, duration_seconds=100),
    Job(name="B", submit_seconds=10, devices=4, duration_seconds=100),
]


def test_a_job_that_runs_for_the_first_time_is_demoted_in_time_by_both():
    exact = play(LATE, uniform_fleet(1, 4), DiscretisedLas((80.0,)), FirstFit(), keep_segments=True)
    theirs = play_compatible(LATE, 4, "dlas-gpu", limits=[80])
    # A reaches 80 device-seconds at 20 s; B runs from then to its own threshold at 40 s, and so on.
    assert exact.segments[0].end == 20
    assert exact.completions == theirs.completions


def test_a_job_that_comes_back_is_demoted_late_by_theirs():
    """A reaches the second threshold, 160 device-seconds, having run 20 s before: at 40 s of its own in all. Theirs
    looks again after (160 - 20) / 4 = 35 s instead of 20 s, because it takes 20 s for 20 device-seconds."""
    exact = play(LATE, uniform_fleet(1, 4), DiscretisedLas((80.0, 160.0)), FirstFit(), keep_segments=True)
    theirs = play_compatible(LATE, 4, "dlas-gpu", limits=[80, 160])
    runs = [(segment.job, segment.begin, segment.end) for segment in exact.segments]
    assert runs == [("A", 0, 20), ("B", 20, 40), ("A", 40, 60), ("B", 60, 80), ("A", 80, 140), ("B", 140, 200)]
    assert exact.completions == [140, 190]
    # Late by 20 s x 3 / 4 = 15 s each: A until 75, B from 75 until 75 + 35 = 110, A ends at 110 + 100 - 55 = 155.
    assert theirs.completions == [155, 190]


def test_the_compatible_mode_plays_our_policies_by_their_names(sixty):
    for policy, schedule in (
        (Fifo(), "fifo"), (FirstFitFifo(), "fjf"), (ShortestRemainingTimeFirst(), "shortest"),
        (ShortestRemainingServiceFirst(), "shortest-gpu"),
    ):  # fmt: skip
        assert play_policy(sixty, 16, policy).jobs == play_compatible(sixty, 16, schedule).jobs
    queues = DiscretisedLas((80.0, 160.0), promote_knob=0.5)
    theirs = play_compatible(LATE, 4, "dlas-gpu", limits=[80, 160], promote_knob=0.5)
    assert play_policy(LATE, 4, queues).jobs == theirs.jobs != play_compatible(LATE, 4, "dlas-gpu").jobs


def test_the_compatible_mode_refuses_what_it_cannot_play():
    with pytest.raises(InputError, match="no 2d-gittins"):
        play_policy(LATE, 4, DiscretisedGittins(FIGURE_7_SIZES, (4.0,)))
    with pytest.raises(InputError, match="less than a second"):
        play_compatible([Job(name="short", submit_seconds=0, devices=1, duration_seconds=0.5)], 4, SCHEDULES[0])
    with pytest.raises(InputError, match="no schedule"):
        play_compatible(LATE, 4, "gittins")
    with pytest.raises(InputError, match="asks for 4 of 2"):
        play_compatible(LATE, 2, SCHEDULES[0])
