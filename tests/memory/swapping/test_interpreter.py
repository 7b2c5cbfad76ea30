"""The interpreter refuses what is wrong, and agrees with the simulator on what is right."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from swapping_problems import drawn

from headway.errors import DoesNotFitError, PlanError
from headway.memory.swapping.decisions import Decision, program
from headway.memory.swapping.interpreter import check
from headway.memory.swapping.planning import solve
from headway.memory.swapping.pricing import memory_by_step, price
from headway.memory.swapping.problem import Operation, Path, Problem, Schedule, Step, Tensor

INFINITE = float("inf")


@st.composite
def decided(draw) -> tuple[Problem, list[Decision], float]:
    """A drawn problem, a decision for any of its saved tensors, and a budget that need not suffice."""
    problem = drawn(draw(st.integers(0, 10**6)), draw(st.integers(2, 9)), encodings=draw(st.booleans()))
    problem = msgspec.structs.replace(problem, streams=draw(st.sampled_from([1, 2, 3])))
    decisions: list[Decision] = []
    for at in problem.saved:
        action = draw(st.sampled_from(["", "keep", "swap", "recompute", "encode"]))
        if not action or (action == "encode" and problem.tensors[at].encoding is None):
            continue
        decisions.append(
            Decision(
                tensor=at,
                action=action,
                in_at=draw(st.integers(-1, len(problem.operations) - 1)),
                out_at=draw(st.integers(-1, problem.forward_stop - 1)),
                retain=draw(st.booleans()),
                encoded=problem.tensors[at].encoding is not None and draw(st.booleans()),
            )
        )
    return problem, decisions, draw(st.floats(0.0, 30.0))


@given(decided())
@settings(max_examples=150, deadline=None)
def test_every_program_of_any_decisions_is_right_and_costs_what_the_simulator_says(case):
    problem, decisions, budget = case
    schedule = program(problem, decisions, budget)
    cost = price(problem, schedule)
    found = check(problem, schedule, cost.peak_bytes, cost)
    assert found.peak_bytes == pytest.approx(max(memory_by_step(problem, schedule)))
    assert cost.seconds >= problem.compute_seconds - 1e-9


@given(decided(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_program_that_lost_a_computation_or_a_transfer_back_is_refused(case, data):
    problem, decisions, _ = case
    steps = program(problem, decisions).steps
    vital = [at for at, step in enumerate(steps) if step.action in ("compute", "compute_in_place", "fetch", "decode")]
    lost = data.draw(st.sampled_from(vital))
    with pytest.raises(PlanError):
        check(problem, Schedule(steps=(*steps[:lost], *steps[lost + 1 :])), INFINITE)


@given(decided())
@settings(max_examples=60, deadline=None)
def test_a_byte_too_much_is_refused(case):
    problem, decisions, _ = case
    schedule = program(problem, decisions)
    peak = price(problem, schedule).peak_bytes
    with pytest.raises(PlanError, match="budget"):
        check(problem, schedule, peak * 0.99 - 1e-3)


@pytest.mark.parametrize("field", ["seconds", "peak_bytes", "waiting_seconds", "moved_bytes", "repeated"])
def test_a_price_that_is_not_what_happened_is_refused(field):
    problem = drawn(3, 6)
    decisions = [Decision(tensor=at, action="swap") for at in problem.saved]
    schedule = program(problem, decisions, 0.0)
    cost = price(problem, schedule)
    with pytest.raises(PlanError, match=field):
        check(problem, schedule, INFINITE, msgspec.structs.replace(cost, **{field: getattr(cost, field) + 1}))


def test_backward_is_not_computed_again():
    problem = drawn(1, 3)
    steps = program(problem, []).steps
    last = Step(action="compute", index=problem.forward_stop)
    at = next(at for at, step in enumerate(steps) if step.index == problem.forward_stop and step.action == "compute")
    with pytest.raises(PlanError, match="repeated"):
        check(problem, Schedule(steps=(*steps[: at + 1], last, *steps[at + 1 :])), INFINITE)


def test_a_tier_over_its_capacity_is_refused():
    problem = drawn(5, 6)
    path = msgspec.structs.replace(problem.paths[0], capacity_bytes=0.5)
    problem = msgspec.structs.replace(problem, paths=(path,))
    schedule = program(problem, [Decision(tensor=problem.saved[0], action="swap")], 0.0)
    with pytest.raises(PlanError, match="holds"):
        check(problem, schedule, INFINITE)


def test_transfers_overlap_with_computation_only_as_far_as_streams_allow():
    problem = drawn(8, 7)
    decisions = [Decision(tensor=at, action="swap", in_at=problem.forward_stop) for at in problem.saved]
    seconds = []
    for streams in (1, 2, 3):
        asked = msgspec.structs.replace(problem, streams=streams)
        seconds.append(price(asked, program(asked, decisions, 0.0)).seconds)
    assert seconds[0] >= seconds[1] >= seconds[2]
    assert seconds[0] > seconds[2]


@pytest.mark.parametrize("policy", ["sqrt", "vdnn-all", "superneurons", "capuchin", "dtr", "gist", "flashneuron"])
def test_no_policy_goes_over_its_budget_whatever_the_problem(policy):
    solved = 0
    for seed in range(12):
        problem = drawn(seed, 8, encodings=True)
        whole = price(problem, program(problem, [])).peak_bytes
        for share in (1.0, 0.8, 0.6):
            try:
                answer = solve(problem, share * whole, policy)
            except DoesNotFitError:
                continue
            assert answer.price.peak_bytes <= share * whole * (1 + 1e-9)
            solved += 1
    assert solved >= 12  # with the whole budget, all of them


def test_an_operation_that_works_in_place_waits_until_what_it_overwrites_has_gone_out():
    operations = (
        Operation(name="make", seconds=1.0, inputs=(0,), outputs=(1,)),
        Operation(name="overwrite", seconds=1.0, inputs=(1,), outputs=(2,), overwrites=1),
        Operation(name="back", seconds=1.0, inputs=(1, 2), outputs=(3,), backward=True, repeatable=False),
    )
    sizes = (0.0, 4.0, 4.0, 1.0)
    tensors = tuple(Tensor(name=str(at), bytes=size, maker=at - 1) for at, size in enumerate(sizes))
    way = Path(write_bytes_per_second=1.0, read_bytes_per_second=2.0, latency_seconds=0.0)
    problem = Problem(name="in place", operations=operations, tensors=tensors, paths=(way,)).validate()
    steps = (
        Step(action="compute", index=0),
        Step(action="offload", index=1),
        Step(action="compute_in_place", index=1),
        Step(action="fetch", index=1),
        Step(action="compute", index=2),
    )
    cost = price(problem, Schedule(steps=steps))
    # Made at 1, out at 5, overwritten until 6, back at 8.
    assert cost.seconds == pytest.approx(9.0)
    assert cost.waiting_seconds == pytest.approx(6.0)
    check(problem, Schedule(steps=steps), cost.peak_bytes, cost)
    with pytest.raises(PlanError, match="seconds"):
        check(problem, Schedule(steps=steps), INFINITE, msgspec.structs.replace(cost, seconds=5.0))
