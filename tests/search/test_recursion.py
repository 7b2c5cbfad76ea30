"""Runs, prices and tables of the stage programme, each against trying everything."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_problems import all_stages, problems

from headway.search.problem import Assignment, Option, StageProblem
from headway.search.recursion import Recursion

limits = st.sampled_from([0.3, 0.6, 1.0, 2.0, 5.0])


def within(problem: StageProblem, limit: float) -> list[tuple[tuple[Assignment, ...], float]]:
    """All solutions of which no stage takes longer than the limit, with their sums."""
    found = []
    for stages in all_stages(problem):
        seconds = [float(problem.seconds[one.option, one.start, one.stop]) for one in stages]
        if math.isfinite(problem.evaluate(stages)) and max(seconds) <= limit:
            found.append((stages, sum(seconds) + sum(float(problem.send_seconds[one.start]) for one in stages[1:])))
    return found


def prepared(problem: StageProblem, limit: float):
    """The recursion, its runs and their bound; None: the devices cannot be taken at all."""
    recursion = Recursion(problem)
    if not recursion.possible:
        return None
    runs = recursion.runs(limit)
    prices = recursion.prices(1000.0)
    return recursion, runs, prices, prices.bound(runs, limit, math.inf, 0.0)


@given(problems())
@settings(deadline=None, max_examples=60)
def test_a_run_reaches_as_many_stages_as_fit_behind_it(problem):
    recursion = Recursion(problem)
    if not recursion.possible:
        return
    for option, start, stop in np.argwhere(np.isfinite(problem.seconds)):
        stage = Assignment(int(start), int(stop), int(option))
        for level in range(1, recursion.machines.most + 1):
            assert (recursion.reach[option, start, stop] >= level) == problem.stage_fits(stage, level - 1)


@given(problems(), limits)
@settings(deadline=None, max_examples=80)
def test_as_few_stages_as_can_be(problem, limit):
    wanted = min((len(stages) for stages, _ in within(problem, limit)), default=0)
    recursion = Recursion(problem)
    found = recursion.fewest(limit) if recursion.possible else ()
    assert len(found) == wanted
    if found:
        assert math.isfinite(problem.evaluate(found))
        assert max(problem.seconds[one.option, one.start, one.stop] for one in found) <= limit


@given(problems(), limits)
@settings(deadline=None, max_examples=80)
def test_no_sum_of_stages_beats_the_bound_of_prices(problem, limit):
    solutions = within(problem, limit)
    there = prepared(problem, limit)
    if there is None:
        assert not solutions
        return
    bound = there[-1]
    assert bound.seconds <= min((total for _, total in solutions), default=math.inf)


def test_prices_say_exactly_what_a_pipeline_of_equal_layers_takes():
    # Eight layers of one second on eight devices: all devices are taken, and every second of every one is needed.
    layers = 8
    before = np.arange(layers + 1.0)
    one = before[None, :] - before[:, None]
    one[np.tril_indices(layers + 1)] = math.inf
    none = np.zeros((1, layers + 1, layers + 1))
    problem = StageProblem(
        layers=layers, options=(Option(0, 1),), pools=(8,), micro_batches=4,
        seconds=one[None], fixed_bytes=none, kept_bytes=none, capacity_bytes=np.ones(1),
        send_seconds=np.zeros(layers + 1),
    )  # fmt: skip
    there = prepared(problem, 1.0)
    assert there is not None
    assert there[-1].seconds == pytest.approx(8.0)


@given(problems(), limits, st.sampled_from([0.2, 1.0, 3.0]), st.sampled_from([0.0, 1.0, 7.0]))
@settings(deadline=None, max_examples=80)
def test_runs_are_left_out_only_if_no_good_solution_has_them(problem, limit, more, behind):
    there = prepared(problem, limit)
    solutions = within(problem, limit)
    if there is None or not solutions:
        return
    recursion, runs, prices, bound = there
    below = min(total for _, total in solutions) + more
    kept = runs.some(prices.kept(runs, limit, bound, prices.before(runs, limit, bound), 0.0, behind, below))
    names = {
        (int(level), int(start), int(stop), int(size))
        for level, start, stop, size in zip(kept.level, kept.start, kept.stop, kept.size, strict=True)
    }
    size_of = recursion.machines.size_of
    for stages, total in solutions:
        slowest = max(float(problem.seconds[one.option, one.start, one.stop]) for one in stages)
        if total + behind * slowest < below * (1 - 1e-9):
            for at, one in enumerate(stages):
                level = min(len(stages) - at, runs.levels)
                assert (level, one.start, one.stop, int(size_of[one.option])) in names


@given(problems(), limits, st.sampled_from([0.5, 1.0, 1.5]))
@settings(deadline=None, max_examples=80)
def test_the_least_sum_below_a_bar(problem, limit, factor):
    there = prepared(problem, limit)
    least = min((total for _, total in within(problem, limit)), default=math.inf)
    if there is None:
        assert least == math.inf
        return
    recursion, runs, prices, bound = there
    most = factor * least if math.isfinite(least) else 100.0
    if not math.isfinite(bound.seconds):
        assert least == math.inf
        return
    found = recursion.least(runs, limit, bound, prices.before(runs, limit, bound), most * (1 + 1e-9))
    if least <= most:
        assert found.sum == pytest.approx(least)
        assert math.isfinite(problem.evaluate(found.stages))
        assert [pair[0].stop for pair in pairwise(found.stages)] == [pair[1].start for pair in pairwise(found.stages)]
    else:
        assert not found.stages
