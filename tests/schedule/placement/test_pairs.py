"""Measured pairs: the table that Gavel publishes, and Gandiva's packing by it, worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError
from headway.schedule import fast
from headway.schedule.fleet import Fleet, FleetNode, uniform_fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.pairs import PairSpeeds, read_pairs
from headway.schedule.placement.rules import FirstFit
from headway.schedule.policies.gandiva import Gandiva
from headway.schedule.replay import play

TABLE = Path(__file__).parents[4] / "shared" / "data" / "scheduling" / "gavel" / "simulation_throughputs.json"


def job(name: str, seconds: float, model: str) -> Job:
    return Job(name=name, submit_seconds=0.0, devices=1, duration_seconds=seconds, model=model)


def pairs(**speeds: tuple[float, float]) -> PairSpeeds:
    """`ab=(0.8, 0.6)`: a runs at 0.8 beside b, and b at 0.6 beside a."""
    table: dict[tuple[str, int], dict[str, float]] = {}
    for (one, other), (first, second) in speeds.items():
        table.setdefault((one, 1), {})[other] = first
        table.setdefault((other, 1), {})[one] = second
    return PairSpeeds({"v100": table})


def played(jobs, devices, measured, **overhead):
    fleet = uniform_fleet(1, devices)
    pace = Pace(fleet, pairs=measured)
    return play(jobs, fleet, Gandiva(5), FirstFit(), pace=pace, overhead=Overhead(**overhead))


def test_a_pair_that_gains_shares_a_device_at_its_measured_speeds():
    # b does its 24 s at 0.6 in 40 s; by then a has done 32 s of its 40, and does the rest alone.
    assert played([job("a", 40, "a"), job("b", 24, "b")], 1, pairs(ab=(0.8, 0.6))).completions == [48, 40]


@pytest.mark.parametrize("speeds", [(0.5, 0.5), (0.7, 0.2), (1.5, 0.0)])
def test_a_pair_that_gains_nothing_or_cannot_share_takes_turns(speeds):
    apart = played([job("a", 30, "a"), job("b", 30, "b")], 1, None).completions
    assert played([job("a", 30, "a"), job("b", 30, "b")], 1, pairs(ab=speeds)).completions == apart
    assert sorted(apart) == [55, 60]


def test_who_waits_shares_with_whom_most_is_gained():
    measured = pairs(ac=(0.6, 0.6), bc=(0.9, 0.9))
    jobs = [job("a", 9, "a"), job("b", 9, "b"), job("c", 9, "c")]
    assert played(jobs, 2, measured).completions == pytest.approx(
        [9, 9.9, 9.9]
    )  # 9 s at 0.9 take 10, but for 1 s alone


def test_packed_jobs_part_when_devices_are_free_and_the_move_is_paid_for():
    """At 20 the third job ends. b has done 12 of its 24 s, and moves for 3 s; a has done 16 of its 40."""
    jobs = [job("a", 40, "a"), job("other", 20, ""), job("b", 24, "b")]
    found = played(jobs, 2, pairs(ab=(0.8, 0.6)), fixed_seconds=3.0)
    assert found.completions == [44, 20, 35]
    assert found.jobs[2].migrations == 1
    # A move that lasts longer than b has worked is not made: b ends after 40 s, a as above.
    assert played(jobs, 2, pairs(ab=(0.8, 0.6)), fixed_seconds=21.0).completions == [48, 20, 40]


def test_a_packed_job_stays_when_only_devices_that_it_cannot_use_are_free():
    """The p100 is free from 20 on; both others can use the v100 only, and nobody stops them there."""
    nodes = [FleetNode(name=kind, devices=1, kind=kind) for kind in ("v100", "p100")]
    kinds = {"a": ("v100",), "other": ("p100",), "b": ("v100",)}
    rows = [job("a", 40, "a"), job("other", 20, ""), job("b", 24, "b")]
    jobs = [msgspec.structs.replace(row, kinds=kinds[row.name]) for row in rows]
    fleet = Fleet(name="two kinds", nodes=tuple(nodes))
    found = play(jobs, fleet, Gandiva(5), FirstFit(), pace=Pace(fleet, pairs=pairs(ab=(0.8, 0.6))))
    assert found.completions == [48, 20, 40]
    assert [each.preemptions for each in found.jobs] == [0, 0, 0]


def test_the_twin_steps_aside_where_jobs_may_share():
    fleet = uniform_fleet(1, 1)
    jobs = [job("a", 40, "a")]
    assert "may move or pack a" in fast.why_not(
        jobs, fleet, Gandiva(5), FirstFit(), pace=Pace(fleet, pairs=pairs(ab=(1, 1)))
    )
    assert not fast.why_not(jobs, fleet, Gandiva(5), FirstFit(), pace=Pace(fleet, pairs=pairs(bc=(1, 1))))


def test_speeds_are_rates_in_the_pair_over_the_rate_alone(tmp_path):
    path = tmp_path / "rates.json"
    rates = {
        "('ResNet-18 (batch size 16)', 2)": {"null": 4.0, "('A3C', 2)": [3.0, 1.0], "('A3C', 1)": [9.0, 9.0]},
        "('A3C', 2)": {"null": 2.0, "('ResNet-18 (batch size 16)', 2)": [1.0, 3.0]},
        "('LM (batch size 5)', 2)": {"null": 0.0, "('A3C', 2)": [0.0, 0.0]},
    }
    path.write_text(json.dumps({"v100": rates, "k80": {}}))
    found = read_pairs(path)
    assert found.speed("ResNet-18 (batch size 16)", "A3C", 2) == 0.75
    assert found.speed("A3C", "ResNet-18 (batch size 16)", 2, "V100") == 0.5
    assert found.speed("A3C", "ResNet-18 (batch size 16)", 1) is None
    assert found.speed("LM (batch size 5)", "A3C", 2) is None
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"v100": {"('A3C', 1)": {"null": 1.0, "('A3C', 1)": [-1.0, 1.0]}}}))
    with pytest.raises(FieldError, match="below 0"):
        read_pairs(path)


def test_gavels_own_table_is_read_and_most_pairs_on_a_v100_gain():
    if not TABLE.exists():
        pytest.skip("no simulation_throughputs.json in ../shared/data")
    found = read_pairs(TABLE)
    # 4.795 steps/s alone on a K80, 2.540 beside batches of 32 (the file's first lines).
    one, other = "ResNet-18 (batch size 16)", "ResNet-18 (batch size 32)"
    assert found.speed(one, other, 1, "k80") == pytest.approx(2.539979567443098 / 4.795294551566172)
    assert found.speed(one, other, 1, "K80-12GB") == found.speed(one, other, 1, "k80") != found.speed(one, other, 1)
    alone = [(model, other) for model, size in found.speeds["v100"] if size == 1 for other in found.models]
    gains = [
        speed + back
        for model, other in alone
        if (speed := found.speed(model, other, 1)) is not None and (back := found.speed(other, model, 1)) is not None
    ]
    assert len(gains) == 26 * 26
    assert 0.7 < sum(gain > 1 for gain in gains) / len(gains) < 0.8


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 2), st.integers(1, 40), st.sampled_from("abc-")),
        min_size=1, max_size=14,
    ),
    speeds=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]), min_size=9, max_size=9),
    cost=st.sampled_from([0.0, 3.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_whatever_pairs_were_measured_all_jobs_end_and_no_device_has_three(rows, speeds, cost):
    fleet = uniform_fleet(2, 2)
    values = iter(speeds)
    table = {(model, size): {} for model in "abc" for size in (1, 2)}
    for model in "abc":
        for other in "abc":
            table[model, 1][other] = table[model, 2][other] = next(values)
    jobs = [
        Job(name=f"j{at}", submit_seconds=submit, devices=devices, duration_seconds=lasts, model=model)
        for at, (submit, devices, lasts, model) in enumerate(rows)
    ]

    def check(now, decisions, scheduler) -> None:
        owners: dict[int, int] = {}
        for entry in scheduler.entries.values():
            if entry.running:
                assert entry.rate > 0
                owners[entry.host if entry.host >= 0 else entry.number] = entry.devices
        assert sum(owners.values()) + sum(scheduler.seating.counts) == fleet.devices

    pace = Pace(fleet, pairs=PairSpeeds({"v100": table}))
    outcome = play(
        jobs, fleet, Gandiva(5), FirstFit(), pace=pace, overhead=Overhead(fixed_seconds=cost), watch=check,
    )  # fmt: skip
    for found in outcome.jobs:
        assert found.finished
        held = found.run_seconds + found.wait_seconds + found.overhead_seconds
        assert held == pytest.approx(found.completion_seconds)
