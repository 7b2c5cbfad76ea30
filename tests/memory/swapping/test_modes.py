"""What the compiled code says that a vector of modes costs, against the simulator and the interpreter."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from swapping_problems import drawn
from torch.nn import functional

from headway.hardware.cluster import Accelerator
from headway.memory.swapping.building import graph_problem
from headway.memory.swapping.decisions import program
from headway.memory.swapping.interpreter import check
from headway.memory.swapping.policies.dtr import dtr
from headway.memory.swapping.policies.modes import AGAIN, AWAY, EACH, KEEP, cost_of, modes_of, net_of, schedule_of
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Path, Problem
from headway.workload.trace import trace
from headway.workload.zoo.vision import ResNet

KIND = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


@pytest.fixture(scope="module")
def traced() -> Problem:
    """Operations that work in place, and some with several outputs."""
    with torch.device("meta"):
        model = ResNet(blocks=(1, 1), bottleneck=False, width=8, classes=10)
        images, labels = torch.empty(2, 3, 64, 64), torch.empty(2, dtype=torch.int64)
    graph = trace(model, (images,), name="resnet", loss=functional.cross_entropy, target=labels)
    way = Path(write_bytes_per_second=2e10, read_bytes_per_second=3e10)
    return graph_problem(graph, 4, KIND, paths=(way,))


def _modes(problem: Problem, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    modes = np.zeros(len(problem.tensors), np.int8)
    share = generator.dirichlet([1.0] * (4 if problem.paths else 3))
    for at, tensor in enumerate(problem.tensors):
        if 0 <= tensor.maker < problem.forward_stop and tensor.bytes > 0:
            modes[at] = generator.choice(len(share), p=share)
    return modes


def _costs_what_its_schedule_costs(problem: Problem, modes: np.ndarray, share: float) -> None:
    budget = share * price(problem, program(problem, ())).peak_bytes
    net = net_of(problem)
    seconds, peak, over = cost_of(net, modes, budget)
    schedule = schedule_of(problem, net, modes, budget)
    cost = price(problem, schedule)
    check(problem, schedule, math.inf, cost)
    assert seconds == pytest.approx(cost.seconds, rel=1e-9)
    assert peak == pytest.approx(cost.peak_bytes, rel=1e-9)
    if over > 0:
        assert cost.peak_bytes > budget


@given(
    seed=st.integers(0, 10_000), forward=st.integers(2, 14), streams=st.integers(1, 3),
    share=st.sampled_from([1.0, 0.7, 0.4]), paths=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_modes_cost_what_the_simulator_says_of_their_schedule(seed, forward, streams, share, paths):
    problem = msgspec.structs.replace(drawn(seed, forward, paths=paths), streams=streams)
    _costs_what_its_schedule_costs(problem, _modes(problem, seed), share)


@given(seed=st.integers(0, 10_000), share=st.sampled_from([1.0, 0.7, 0.5, 0.3]))
@settings(max_examples=60, deadline=None)
def test_so_they_do_with_writes_in_place_and_several_outputs(traced, seed, share):
    _costs_what_its_schedule_costs(traced, _modes(traced, seed), share)


def test_keeping_everything_is_the_step_without_a_budget_and_being_over_the_budget_shows(traced):
    whole = price(traced, program(traced, ()))
    modes = modes_of(traced, program(traced, ()))
    assert all(modes[at] == KEEP for at in traced.saved)
    net = net_of(traced)
    assert cost_of(net, modes, math.inf) == pytest.approx((whole.seconds, whole.peak_bytes, 0.0))
    little, much = (cost_of(net, modes, share * whole.peak_bytes)[2] for share in (0.9, 0.5))
    assert 0 < little < much < whole.peak_bytes


def test_made_again_once_takes_less_time_than_for_each_use_and_not_less_memory(traced):
    net = net_of(traced)
    costs = []
    for mode in (AGAIN, EACH):
        modes = np.zeros(len(traced.tensors), np.int8)
        for at, tensor in enumerate(traced.tensors):
            maker = traced.operations[tensor.maker] if tensor.maker >= 0 else None
            if maker is not None and not maker.backward and maker.kind != "convolution" and tensor.bytes > 1e4:
                modes[at] = mode
        costs.append(cost_of(net, modes, math.inf))
    once, each = costs
    assert traced.compute_seconds < once[0] < each[0]
    assert each[1] <= once[1]


def test_the_modes_of_another_policys_schedule_are_what_it_makes_again_and_moves(traced):
    whole = price(traced, program(traced, ())).peak_bytes
    schedule = dtr(traced, 0.7 * whole)
    modes = modes_of(traced, schedule)
    computed = [step.index for step in schedule.steps if step.action.startswith("compute")]
    for at in traced.saved:
        assert (modes[at] == KEEP) == (computed.count(traced.tensors[at].maker) == 1)
    modes = np.zeros(len(traced.tensors), np.int8)
    moved = max(traced.saved, key=lambda at: traced.tensors[at].bytes)
    modes[moved] = AWAY
    found = modes_of(traced, schedule_of(traced, net_of(traced), modes, 0.5 * whole))
    assert [at for at in range(len(found)) if found[at] == AWAY] == [moved]
