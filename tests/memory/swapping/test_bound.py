"""The bound for steps of any size, against a search of all states and against what every policy does."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swapping_problems import drawn, least_seconds

from headway.errors import DoesNotFitError
from headway.memory.swapping.decisions import program
from headway.memory.swapping.planning import POLICIES, solve
from headway.memory.swapping.policies.bound import lower_bound
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Operation, Path, Problem, Tensor

pytest.importorskip("highspy")


@given(seed=st.integers(0, 10_000), forward=st.integers(2, 5), share=st.sampled_from([0.9, 0.75, 0.6]))
@settings(max_examples=40, deadline=None)
def test_it_is_below_the_least_time_of_small_graphs(seed, forward, share):
    problem = drawn(seed, forward, paths=False)
    budget = share * price(problem, program(problem, ())).peak_bytes
    least, bound = least_seconds(problem, budget), lower_bound(problem, budget, seconds=5)
    assert problem.compute_seconds <= bound <= least * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_a_known_time_is_never_exceeded_and_leaves_the_bound_below_what_is_least(seed):
    problem = drawn(seed, 4, paths=False)
    budget = 0.75 * price(problem, program(problem, ())).peak_bytes
    least = least_seconds(problem, budget)
    if math.isfinite(least):
        for known in (least, 1.2 * least):
            bound = lower_bound(problem, budget, seconds=5, known_seconds=known)
            assert problem.compute_seconds <= bound <= least * (1 + 1e-6)


def test_it_is_most_of_what_a_budget_costs():
    """Two thirds of it over 40 small graphs: a bound that says nothing would be below, too."""
    cost, found = 0.0, 0.0
    for seed in range(40):
        problem = drawn(seed, 4, paths=False)
        budget = 0.75 * price(problem, program(problem, ())).peak_bytes
        least = least_seconds(problem, budget)
        if math.isfinite(least):
            cost += least - problem.compute_seconds
            found += lower_bound(problem, budget, seconds=5) - problem.compute_seconds
    assert found >= 2 / 3 * cost > 0


@pytest.mark.parametrize("seed", range(6))
def test_no_policy_is_faster_also_with_transfers(seed):
    problem = drawn(200 + seed, 4 + 2 * (seed % 4))
    whole = price(problem, program(problem, ())).peak_bytes
    for share in (0.85, 0.65):
        bound = lower_bound(problem, share * whole, seconds=4)
        for policy in POLICIES:
            if policy in ("gist", "flashneuron"):
                continue
            try:
                answer = solve(problem, share * whole, policy, seconds=0.3)
            except DoesNotFitError:
                continue
            assert answer.price.seconds >= bound * (1 - 1e-9), policy


def test_nothing_costs_anything_where_everything_fits_and_no_time_is_enough_where_nothing_does():
    problem = drawn(3, 5)
    whole = price(problem, program(problem, ())).peak_bytes
    assert lower_bound(problem, whole) == problem.compute_seconds
    assert lower_bound(problem, 0.99 * problem.bytes_needed) == math.inf


@pytest.mark.parametrize("rate", [0.25, 1.0, 4.0])
def test_what_is_made_right_before_the_peak_and_read_right_after_it_does_not_travel_for_nothing(rate):
    """A tensor of 4 bytes that nothing may make again is away while one operation of a second needs its room."""

    def operation(name: str, inputs: tuple[int, ...], output: int, *, backward: bool = False) -> Operation:
        return Operation(name=name, seconds=1.0, inputs=inputs, outputs=(output,), backward=backward, repeatable=False)

    problem = Problem(
        name="peak",
        operations=(
            operation("make", (), 0),
            operation("other", (), 1),
            operation("peak", (1,), 2),
            operation("read", (0, 2), 3, backward=True),
        ),
        tensors=tuple(Tensor(name=str(at), bytes=size, maker=at) for at, size in enumerate((4.0, 2.0, 4.0, 0.0))),
        paths=(Path(write_bytes_per_second=rate, read_bytes_per_second=rate, latency_seconds=0.0),),
    ).validate()
    # Out after "make" beside "other" (1 s), back in after "peak" beside nothing.
    expected = 1.0 + max(1.0, 4.0 / rate) + 1.0 + 4.0 / rate + 1.0
    budget = 8.0
    answer = solve(problem, budget, "optimal", seconds=4)
    assert answer.price.seconds == pytest.approx(expected)
    assert lower_bound(problem, budget) == pytest.approx(expected)
