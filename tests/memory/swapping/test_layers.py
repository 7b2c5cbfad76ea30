"""Choices for whole layers, against trying every one, and in the fields of a plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator
from headway.memory.swapping.layers import LayerChoice, _least, layer_choices, plan_layers
from headway.memory.swapping.problem import Path
from headway.plan.plan import Plan, Stage
from headway.predict.latency import Latency
from headway.workload.graph import Graph
from headway.workload.trace import trace

KIND = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)
NUMBERS = st.integers(0, 9)


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 30)
)
@settings(deadline=None)
def test_the_least_seconds_are_those_of_trying_everything(layers, budget):
    choices = [tuple(LayerChoice(str(at), *pair) for at, pair in enumerate(layer)) for layer in layers]
    fitting = [
        sum(choice.seconds for choice in combination)
        for combination in itertools.product(*choices)
        if sum(choice.bytes for choice in combination) <= budget
    ]
    found = _least(choices, budget)
    assert (found is None) == (not fitting)
    if found is not None:
        chosen = [layer[int(kind)] for layer, kind in zip(choices, found, strict=True)]
        assert sum(choice.seconds for choice in chosen) == min(fitting)
        assert sum(choice.bytes for choice in chosen) <= budget


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.device("meta"):
        layers = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)]
        inputs = torch.empty(2, 64)
    return trace(nn.Sequential(*layers), (inputs,), name="stack", loss=lambda output: output.sum())


def plan(graph: Graph, **fields) -> Plan:
    stage = Stage(start=0, stop=len(graph.layers))
    return Plan(model="stack", devices=("d",), global_batch=32, micro_batch=32, stages=(stage,), **fields)


def test_fewer_bytes_mean_more_layers_recomputed(graph):
    latency = Latency(graph, KIND)
    saved = sum(layer.saved.at(32) for layer in graph.layers)
    inputs = sum(layer.input.bytes(32) for layer in graph.layers if layer.input is not None)
    counts = []
    for share in (1.0, 0.6, 0.3, 0.0):
        (stage,) = plan_layers(graph, plan(graph), inputs + share * saved, latency)
        left = sum(layer.saved.at(32) for at, layer in enumerate(graph.layers) if at not in stage.recompute)
        assert left <= share * saved
        assert not stage.swap
        counts.append(len(stage.recompute))
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == sum(1 for layer in graph.layers if layer.saved.at(32) > 0)


def test_a_fast_way_is_used_and_a_slow_one_is_not(graph):
    latency = Latency(graph, KIND)
    offered = plan(graph, activations_on="host")
    inputs = sum(layer.input.bytes(32) for layer in graph.layers if layer.input is not None)
    fast = Path(write_bytes_per_second=1e15, read_bytes_per_second=1e15, latency_seconds=0.0)
    (stage,) = plan_layers(graph, offered, inputs, latency, path=fast)
    assert stage.swap
    assert not stage.recompute
    slow = Path(write_bytes_per_second=1e3, read_bytes_per_second=1e3)
    (stage,) = plan_layers(graph, offered, inputs, latency, path=slow)
    assert stage.recompute
    assert not stage.swap


def test_a_budget_below_the_layers_inputs_is_refused(graph):
    with pytest.raises(DoesNotFitError, match="every layer recomputed"):
        plan_layers(graph, plan(graph), 1.0, Latency(graph, KIND))


def test_keeping_costs_nothing_and_recomputing_costs_a_forward_pass(graph):
    latency = Latency(graph, KIND)
    choices = {choice.kind: choice for choice in layer_choices(graph, 1, plan(graph), latency)}
    assert choices["keep"].seconds == 0
    assert choices["recompute"].seconds == latency.layer_time(1, 32).forward_seconds
    assert choices["recompute"].bytes == 0
