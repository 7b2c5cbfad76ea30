"""The integer program against every oracle: Revolve's closed form, and a search of all states."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swapping_problems import drawn, least_seconds

from headway.errors import DoesNotFitError
from headway.memory.swapping.chains import as_chain, chain_problem, chain_schedule, revolve_evaluations
from headway.memory.swapping.decisions import program
from headway.memory.swapping.interpreter import check
from headway.memory.swapping.planning import POLICIES, solve
from headway.memory.swapping.policies import optimal as module
from headway.memory.swapping.policies.grouping import expanded, grouped
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Schedule

pytest.importorskip("highspy")


# Griewank and Walther 2000: a chain of 10 steps with 3 checkpoints takes 15 evaluations, and so on.
@pytest.mark.parametrize(("steps", "checkpoints", "evaluations"), [(10, 3, 15), (32, 4, 75), (100, 5, 316)])
def test_a_unit_chain_takes_what_revolve_takes(steps, checkpoints, evaluations):
    problem = chain_problem(steps)
    answer = solve(problem, checkpoints, "optimal")
    assert answer.price.seconds == evaluations == revolve_evaluations(steps, checkpoints)
    assert answer.optimal
    assert answer.price.peak_bytes <= checkpoints


@given(st.integers(2, 40), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_dynamic_programming_agrees_with_revolves_closed_form(steps, checkpoints):
    schedule, seconds = chain_schedule(chain_problem(steps), checkpoints)
    assert seconds == revolve_evaluations(steps, checkpoints)
    check(chain_problem(steps), schedule, checkpoints)


@pytest.mark.parametrize(("steps", "checkpoints"), [(5, 2), (7, 2), (8, 3), (10, 3)])
def test_the_integer_program_finds_the_same_without_knowing_that_it_is_a_chain(steps, checkpoints, monkeypatch):
    monkeypatch.setattr(module, "as_chain", lambda problem: 0)
    monkeypatch.setattr(module, "square_root", _nothing)
    monkeypatch.setattr(module, "dtr", _nothing)
    monkeypatch.setattr(module, "superneurons", _nothing)
    monkeypatch.setattr(module, "capuchin", _nothing)
    monkeypatch.setattr(module, "annealed", lambda *given, **options: None)
    schedule, bound, proven = module.optimal(chain_problem(steps), checkpoints, seconds=30)
    cost = price(chain_problem(steps), schedule)
    assert cost.seconds == pytest.approx(revolve_evaluations(steps, checkpoints))
    assert bound == pytest.approx(cost.seconds)
    assert proven


def _nothing(problem, budget_bytes):
    raise DoesNotFitError("not asked")


@pytest.mark.parametrize("seed", range(14))
def test_the_integer_program_finds_the_optimum_of_small_graphs(seed):
    problem = drawn(seed, 3 + seed % 3, paths=False)  # up to 10 operations
    whole = price(problem, program(problem, [])).peak_bytes
    for share in (0.9, 0.75, 0.6):
        least = least_seconds(problem, share * whole)
        if math.isinf(least):
            with pytest.raises(DoesNotFitError):
                solve(problem, share * whole, "optimal")
            continue
        answer = solve(problem, share * whole, "optimal")
        assert answer.price.seconds == pytest.approx(least)
        assert answer.optimal
        assert answer.bound_seconds == pytest.approx(least)


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_is_faster_than_the_bound_and_none_better_than_optimal(seed):
    problem = drawn(100 + seed, 5)
    whole = price(problem, program(problem, [])).peak_bytes
    for share in (0.85, 0.7):
        try:
            best = solve(problem, share * whole, "optimal", seconds=6)
        except DoesNotFitError:
            continue
        for policy in POLICIES:
            if policy in ("gist", "flashneuron", "optimal"):
                continue
            try:
                answer = solve(problem, share * whole, policy, seconds=0.2)
            except DoesNotFitError:
                continue
            assert answer.price.seconds >= best.bound_seconds * (1 - 1e-6)


def test_what_is_not_a_chain_is_not_taken_for_one():
    assert as_chain(chain_problem(6)) == 6
    assert not any(as_chain(drawn(seed, 5)) for seed in range(5))


def test_a_step_too_large_for_all_stages_gets_a_schedule_and_a_bound_below_it():
    problem = drawn(4, 60, paths=False)
    whole = price(problem, program(problem, ()))
    answer = solve(problem, 0.7 * whole.peak_bytes, "optimal", seconds=4)
    assert problem.compute_seconds < answer.bound_seconds <= answer.price.seconds
    assert answer.price.seconds <= solve(problem, 0.7 * whole.peak_bytes, "dtr").price.seconds


def test_groups_of_operations_are_a_problem_of_fewer():
    problem = drawn(4, 60, paths=False)
    coarse, members = grouped(problem, 12)
    assert len(coarse.operations) == len(members) <= 12
    assert coarse.compute_seconds == pytest.approx(problem.compute_seconds)
    whole = program(coarse, [])
    steps = [(s.action, s.index, s.tier) for s in whole.steps if s.action.startswith("compute")]
    fine = expanded([("compute", index, tier) for _, index, tier in steps], members)
    assert [index for _, index, _ in fine] == list(range(len(problem.operations)))
    check(coarse, Schedule(steps=whole.steps), price(coarse, whole).peak_bytes)
