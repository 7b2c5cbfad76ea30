"""Drawn traces have the mix, the load and the seed that were asked for."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule.job import Job
from headway.schedule.traces.read import Trace, read_trace
from headway.schedule.traces.synthetic import PHILLY, JobMix, SizeClass, fit, jitter, resample, shuffle, synthesize

FILE = Path(__file__).parents[4] / "shared" / "data" / "scheduling" / "philly_jobs" / "philly.csv"


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 400), st.integers(1, 64), st.floats(0.05, 3), st.integers(0, 2**32),
    st.sampled_from(["poisson", "diurnal"]), st.floats(0, 1), st.integers(1, 40),
)  # fmt: skip
def test_a_drawn_trace_is_valid_sorted_and_the_same_for_the_same_seed(
    jobs, devices, load, seed, arrivals, recurrence, users
):
    def draw() -> Trace:
        return synthesize(
            jobs, devices=devices, load=load, seed=seed, arrivals=arrivals, recurrence=recurrence, users=users
        )

    trace = draw()
    assert trace == draw()
    assert len(trace.jobs) == jobs
    submitted = [job.submit_seconds for job in trace.jobs]
    assert submitted == sorted(submitted)
    assert submitted[0] == 0
    for job in trace.jobs:
        job.validate()
        assert job.devices <= devices


def test_sizes_run_times_and_load_are_the_mixs():
    trace = synthesize(20_000, devices=512, load=0.8, seed=3)
    counted = Counter(job.devices for job in trace.jobs)
    total = sum(one.jobs for one in PHILLY.sizes)
    for one in PHILLY.sizes:
        assert counted[one.devices] / 20_000 == pytest.approx(one.jobs / total, abs=1e-3)
        drawn = [job.duration_seconds for job in trace.jobs if job.devices == one.devices]
        # Quantiles 25 %, 50 %, 75 %, 90 % of the mix.
        expected = one.quantiles_seconds[4:8]
        assert np.quantile(drawn, [0.25, 0.5, 0.75, 0.9]) == pytest.approx(expected, rel=0.12)
    assert trace.load(512) == pytest.approx(0.8, rel=0.02)
    assert trace.service / 20_000 == pytest.approx(PHILLY.mean_service, rel=0.05)


def test_recurrence_is_how_much_a_users_past_says_about_the_next_job():
    def explained(recurrence: float) -> float:
        trace = synthesize(8000, devices=512, load=1, seed=5, recurrence=recurrence)
        groups = defaultdict(list)
        for job in trace.jobs:
            if job.devices == 1:
                groups[job.user, job.model].append(np.log(job.duration_seconds))
        everything = np.concatenate(list(groups.values()))
        within = sum(np.var(each) * len(each) for each in groups.values()) / len(everything)
        return float(1 - within / np.var(everything))

    none, some, most = explained(0.0), explained(0.5), explained(1.0)
    assert none < 0.06
    assert none + 0.1 < some < most


def test_diurnal_arrivals_follow_the_hours():
    trace = synthesize(20_000, devices=64, load=0.5, seed=1, arrivals="diurnal")
    hours = np.array(fit(trace).hours)
    poisson = np.array(fit(synthesize(20_000, devices=64, load=0.5, seed=1)).hours)
    assert np.corrcoef(hours, PHILLY.hours)[0, 1] > 0.95
    assert np.std(poisson) < 0.1


@pytest.mark.parametrize(
    "wrong", [{"load": 0.0}, {"devices": 0}, {"users": 0}, {"recurrence": 1.5}, {"arrivals": "bursts"}]
)
def test_numbers_without_sense_are_refused_by_name(wrong):
    given_ = {"devices": 8, "load": 0.5, "seed": 0, **wrong}
    with pytest.raises(InputError, match=next(iter(wrong))):
        synthesize(10, **given_)


def test_the_mix_of_philly_is_what_the_trace_gives():
    if not FILE.exists():
        pytest.skip("no philly.csv in ../shared/data")
    assert fit(read_trace(FILE)) == PHILLY


def test_rare_sizes_join_the_next_smaller_one():
    jobs = tuple(
        Job(name=str(at), submit_seconds=float(at), devices=size, duration_seconds=10.0)
        for at, size in enumerate([1] * 5 + [2] * 1 + [4] * 5)
    )
    mix = fit(Trace(name="t", format="headway", jobs=jobs), fewest=3)
    assert [(one.devices, one.jobs) for one in mix.sizes] == [(1, 6), (4, 5)]


def test_a_mix_goes_to_a_file_and_back(tmp_path):
    mix = JobMix(name="one", sizes=(SizeClass(devices=2, jobs=3, quantiles_seconds=(5.0,) * 12),))
    mix.save(tmp_path / "mix.yaml")
    assert JobMix.load(tmp_path / "mix.yaml") == mix
    trace = synthesize(5, devices=4, load=1, seed=0, mix=mix)
    assert [job.service for job in trace.jobs] == pytest.approx([10.0] * 5)
    assert mix.mean_service == pytest.approx(10.0)


BASE = synthesize(500, devices=64, load=0.7, seed=9)


def kinds(trace: Trace) -> Counter:
    return Counter((job.devices, job.duration_seconds) for job in trace.jobs)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_drawing_days_again_keeps_what_is_within_a_day(seed):
    drawn = resample(BASE, seed)
    assert drawn == resample(BASE, seed)
    assert set(kinds(drawn)) <= set(kinds(BASE))
    assert len({job.name for job in drawn.jobs}) == len(drawn.jobs)
    submitted = [job.submit_seconds for job in drawn.jobs]
    assert submitted == sorted(submitted)
    assert submitted[0] == 0
    # Jobs of one block keep their distance, so most gaps of the drawn trace are gaps of the trace.
    gaps = {round(float(gap), 3) for gap in np.diff([job.submit_seconds for job in BASE.jobs])}
    own = [round(float(gap), 3) for gap in np.diff(submitted)]
    assert sum(gap in gaps for gap in own) > 0.8 * len(own)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1e5))
def test_jitter_only_delays(seed, seconds):
    late = {job.name: job for job in jitter(BASE, seed, seconds).jobs}
    for job in BASE.jobs:
        # The sum is rounded once.
        assert job.submit_seconds <= late[job.name].submit_seconds <= (job.submit_seconds + seconds) * (1 + 1e-15)
        assert msgspec.structs.replace(late[job.name], submit_seconds=job.submit_seconds) == job


def test_shuffling_deals_out_users_and_models_but_leaves_the_work():
    mixed = shuffle(BASE, 1)
    assert kinds(mixed) == kinds(BASE)
    assert Counter(job.user for job in mixed.jobs) == Counter(job.user for job in BASE.jobs)
    assert [job.user for job in mixed.jobs] != [job.user for job in BASE.jobs]
