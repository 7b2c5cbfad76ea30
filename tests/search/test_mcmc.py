"""Walks over stages: what they propose, and what they find on problems small enough to try everything."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, PlanError
from headway.search.mcmc import mcmc, random_search
from headway.search.problem import Option, StageProblem, brute_force
from headway.search.proposals import Walk, ordered_cuts
from headway.search.synthetic import synthetic_problem

SMALL = [
    {"layers": 4, "pools": (4,)},
    {"layers": 5, "pools": (3,), "memory": 1.0},
    {"layers": 4, "pools": (2, 2)},
    {"layers": 4, "pools": (2, 1), "memory": 0.9, "exactly": False},
    {"layers": 4, "pools": (4,), "rugged": 0.5, "micro_batches": 2},
]

problems = st.builds(
    synthetic_problem,
    st.integers(0, 1000),
    layers=st.integers(1, 12),
    pools=st.sampled_from([(1,), (3,), (8,), (16,), (4, 4), (8, 2), (2, 3, 1)]),
    micro_batches=st.sampled_from([1, 2, 16]),
    memory=st.sampled_from([0.6, 1.0, 2.0]),
    exactly=st.booleans(),
).filter(lambda problem: problem.layers >= sum(pool.bit_count() for pool in problem.pools))  # powers of two fill them


def used(problem, stages):
    counts = [0] * len(problem.pools)
    for stage in stages:
        option = problem.options[stage.option]
        counts[option.pool] += option.devices
    return counts


@given(problems, st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_what_a_walk_computes_after_each_proposal_is_what_the_problem_says_of_the_whole(problem, seed):
    walk = Walk(problem, seed=seed, rows=2)
    walk.begin(0)
    walk.begin(1)
    best = math.inf
    for _ in range(60):
        for row in (0, 1):
            stages, energy = walk.current(row)
            assert [stage.stop for stage in stages[:-1]] == [stage.start for stage in stages[1:]]
            assert stages[0].start == 0
            assert stages[-1].stop == problem.layers
            assert all(stage.start < stage.stop for stage in stages)
            devices = used(problem, stages)
            assert all(
                mine == there if problem.exactly else mine <= there
                for mine, there in zip(devices, problem.pools, strict=True)
            )
            seconds = problem.evaluate(stages)
            best = min(best, seconds)
            if math.isfinite(seconds):
                assert energy == pytest.approx(math.log(seconds), abs=1e-12)
            else:  # lacking memory has a price
                total = sum(problem.seconds[stage.option, stage.start, stage.stop] for stage in stages)
                assert energy > math.log(total) + 0.1
        walk.run(1, 0.3)
    for row in (0, 1):
        best = min(best, problem.evaluate(walk.current(row)[0]))
    # A proposal that is better than all before is always taken: it passed before our eyes.
    assert walk.seconds == best
    assert (problem.evaluate(walk.stages) if walk.stages else math.inf) == best


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_the_walk_comes_within_two_percent_of_trying_everything(sizes):
    for seed in range(6):
        problem = synthetic_problem(seed, **sizes)
        best = brute_force(problem).seconds
        found = mcmc(problem, seed=seed, evaluations=4000)
        assert found.seconds >= best * (1 - 1e-12)
        assert found.seconds <= best * 1.02 or math.isinf(best)
        assert found.seconds == problem.evaluate(found.stages) or math.isinf(best)


@given(problems, st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_answers_fit_histories_fall_and_seeds_repeat(problem, seed):
    for search in (mcmc, random_search):
        heard = []
        found = search(problem, seed=seed, evaluations=300, progress=heard.append)
        again = search(problem, seed=seed, evaluations=300)
        assert (found.seconds, found.stages, found.evaluated) == (again.seconds, again.stages, again.evaluated)
        assert list(found.history) == heard
        seconds = [entry.seconds for entry in found.history]
        assert seconds == sorted(seconds, reverse=True)
        counts = [entry.evaluated for entry in found.history]
        assert counts == sorted(counts)
        assert found.evaluated <= 300
        if found.stages:
            assert problem.evaluate(found.stages) == found.seconds == seconds[-1]
        else:
            assert math.isinf(found.seconds)


def test_a_given_start_is_never_lost():
    problem = synthetic_problem(5, layers=10, pools=(8,))
    good = mcmc(problem, evaluations=3000)
    later = mcmc(problem, seed=9, evaluations=20, restarts=1, start=good.stages)
    assert later.seconds <= good.seconds
    assert later.history[0].seconds <= good.seconds


def test_where_nothing_has_room_nothing_is_found():
    problem = synthetic_problem(0, layers=5, pools=(4,), memory=1e-3)
    problem.capacity_bytes[:] = 1e-6
    found = mcmc(problem, evaluations=500)
    assert found.stages == ()
    assert math.isinf(found.seconds)
    assert math.isinf(brute_force(problem).seconds)


def test_devices_that_no_options_make_up_are_named():
    size = 3
    table = np.where(np.triu(np.ones((size, size)), 1) > 0, 1.0, np.inf)[None]
    problem = StageProblem(
        layers=2, options=(Option(0, 2),), pools=(3,), micro_batches=1, seconds=table, fixed_bytes=np.zeros_like(table),
        kept_bytes=np.zeros_like(table), capacity_bytes=np.ones(1), send_seconds=np.zeros(2),
    )  # fmt: skip
    with pytest.raises(PlanError, match="exactly 3 devices"):
        mcmc(problem, evaluations=10)


def test_a_start_that_is_no_solution_is_refused():
    problem = synthetic_problem(5, layers=10, pools=(8,))
    good = mcmc(problem, evaluations=1000).stages
    with pytest.raises(PlanError, match="no solution"):
        mcmc(problem, evaluations=10, start=[*good, good[-1]])


@pytest.mark.parametrize(
    "budget", [{}, {"evaluations": 5, "budget_seconds": 1.0}, {"evaluations": 0}, {"budget_seconds": 0.0}]
)
def test_one_positive_budget_is_needed(budget):
    with pytest.raises(FieldError):
        mcmc(synthetic_problem(0), **budget)


def test_a_budget_of_seconds_ends():
    found = mcmc(synthetic_problem(0, layers=8, pools=(8,)), budget_seconds=0.05)
    assert found.stages
    assert found.evaluated > 16


@given(st.lists(st.integers(-3, 20), max_size=6), st.integers(7, 15))
def test_ordered_cuts_leave_every_stage_a_layer_and_keep_cuts_that_do(cuts, layers):
    found = ordered_cuts(np.sort(np.asarray(cuts, int)), layers)
    ends = [0, *found.tolist(), layers]
    assert all(one < other for one, other in pairwise(ends))
    assert ordered_cuts(found, layers).tolist() == found.tolist()
