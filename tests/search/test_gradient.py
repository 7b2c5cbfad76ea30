"""Differentiable search: the smooth model against the tables, and what it finds against trying everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError
from headway.search.gradient import SmoothModel, gradient
from headway.search.problem import brute_force
from headway.search.proposals import Walk
from headway.search.synthetic import synthetic_problem

SMALL = [
    {"layers": 4, "pools": (4,)},
    {"layers": 5, "pools": (3,), "memory": 1.0},
    {"layers": 4, "pools": (2, 2)},
    {"layers": 4, "pools": (2, 1), "memory": 0.9, "exactly": False},
]


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_descent_comes_within_two_percent_of_trying_everything(sizes):
    for seed in range(4):
        problem = synthetic_problem(seed, **sizes)
        best = brute_force(problem).seconds
        found = gradient(problem, seed=seed, iterations=60)
        assert found.seconds >= best * (1 - 1e-12)
        assert found.seconds <= best * 1.02 or math.isinf(best)


@given(st.integers(0, 50), st.sampled_from([(4,), (8,), (4, 2)]), st.sampled_from([0.6, 0.9, 1.5]), st.booleans())
@settings(deadline=None, max_examples=8)
def test_memory_and_devices_are_never_overshot(seed, pools, memory, exactly):
    """A soft knapsack's answer overshoots its capacity; this one is judged by the problem, rounding alone included."""
    problem = synthetic_problem(seed, layers=7, pools=pools, memory=memory, exactly=exactly)
    for polish in (0, 30):
        found = gradient(problem, seed=seed, iterations=12, candidates=6, polish=polish)
        assert bool(found.stages) == math.isfinite(found.seconds)
        for at, stage in enumerate(found.stages):
            assert problem.stage_fits(stage, len(found.stages) - at - 1)
        if found.stages:
            assert problem.evaluate(found.stages) == found.seconds
            seconds = [entry.seconds for entry in found.history]
            assert seconds == sorted(seconds, reverse=True)
            assert seconds[-1] == found.seconds


def test_the_same_seed_gives_the_same_answer():
    problem = synthetic_problem(3, layers=12, pools=(8, 4))
    one, other = (gradient(problem, seed=5, iterations=20, candidates=4) for _ in range(2))
    assert (one.seconds, one.stages, one.evaluated) == (other.seconds, other.stages, other.evaluated)


@given(st.integers(0, 50), st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6), st.floats(0.05, 3.0))
@settings(deadline=None, max_examples=25)
def test_the_rows_of_a_sum_to_one_and_later_layers_belong_to_later_stages(seed, widths, temperature):
    model = SmoothModel(Walk(synthetic_problem(seed, layers=9, pools=(4,))).tables)
    shares = np.asarray(widths) / sum(widths) * 9
    cuts = torch.tensor(np.cumsum(shares) - shares, dtype=torch.float32)[None]
    assignment = model.assignment(cuts, torch.ones_like(cuts, dtype=torch.bool), temperature)[0]
    torch.testing.assert_close(assignment.sum(1), torch.ones(9))
    stage = (assignment * torch.arange(len(widths))).sum(1)
    assert (stage.diff() >= -1e-5).all()


def test_at_a_whole_solution_the_smooth_model_is_the_table():
    problem = synthetic_problem(1, layers=9, pools=(4,), rugged=0.4)
    walk = Walk(problem)
    model = SmoothModel(walk.tables)
    starts, stops = torch.tensor([[0, 2, 7]]), torch.tensor([[2, 7, 9]])
    exists = torch.ones_like(starts, dtype=torch.bool)
    assignment = model.assignment(starts.float(), exists, 1e-3)
    flights = torch.tensor([[3.0, 2.0, 1.0]])
    costs = model.costs(assignment, starts, stops, flights)
    for at, (start, stop) in enumerate([(0, 2), (2, 7), (7, 9)]):
        option = walk.order
        expected = problem.seconds[option, start, stop]
        np.testing.assert_allclose(costs.seconds[0, at].numpy() * model.scale, expected, rtol=1e-4)
        needs = problem.fixed_bytes[option, start, stop] + (3 - at) * problem.kept_bytes[option, start, stop]
        lacking = np.clip(needs / np.maximum(problem.capacity_bytes[option], 1.0) - 1, 0, 3)
        np.testing.assert_allclose(costs.lacking[0, at].numpy(), lacking, atol=1e-4)


def test_the_gradient_moves_a_cut_towards_balance():
    """One large stage and one small: less work for the large one must be downhill."""
    problem = synthetic_problem(2, layers=10, pools=(2,), rugged=0.0)
    walk = Walk(problem)
    model = SmoothModel(walk.tables)
    option = int(np.flatnonzero(walk.tables.group_devices[walk.tables.group] == 1)[0])
    cut = torch.tensor(8.0, requires_grad=True)
    cuts = torch.stack([torch.zeros(()), cut])[None]
    assignment = model.assignment(cuts, torch.ones(1, 2, dtype=torch.bool), 0.5)
    costs = model.costs(assignment, torch.tensor([[0, 8]]), torch.tensor([[8, 10]]), torch.tensor([[2.0, 1.0]]))
    costs.seconds[0, :, option].max().backward()
    assert cut.grad is not None
    assert cut.grad > 0


@pytest.mark.parametrize(
    "wrong", [{}, {"iterations": 0}, {"iterations": 1, "candidates": 0}, {"iterations": 1, "polish": -1}]
)
def test_senseless_budgets_are_refused(wrong):
    with pytest.raises(FieldError):
        gradient(synthetic_problem(0), **wrong)


@given(st.integers(1, 700), st.integers(0, 20))
@settings(deadline=None, max_examples=10)
def test_evaluations_are_a_bound(evaluations, seed):
    problem = synthetic_problem(seed, layers=6, pools=(4,))
    assert gradient(problem, evaluations=evaluations, seed=seed).evaluated <= evaluations + 1
