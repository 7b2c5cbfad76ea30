"""A traced graph as a problem: the same bytes as torch's own count, in-place writes as new versions, encodings."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from headway.hardware.cluster import Accelerator
from headway.memory.swapping.building import graph_problem, kind_of
from headway.memory.swapping.decisions import program
from headway.memory.swapping.planning import swap_table
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Path
from headway.predict.latency import Latency
from headway.workload.graph import Graph
from headway.workload.trace import trace
from headway.workload.zoo.vision import ResNet

KIND = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


@pytest.fixture(scope="module")
def graph() -> Graph:
    with torch.device("meta"):
        model = ResNet(blocks=(1, 1), bottleneck=False, width=8, classes=10)
        images, labels = torch.empty(2, 3, 64, 64), torch.empty(2, dtype=torch.int64)
    return trace(model, (images,), name="resnet", loss=functional.cross_entropy, target=labels)


def test_saved_bytes_are_those_that_the_tracer_saw_autograd_keep(graph):
    problem = graph_problem(graph, 4, KIND).validate()
    saved = sum(problem.tensors[at].bytes for at in problem.saved)
    # The tracer counts the model's output and the loss too, which backward need not read.
    assert saved == pytest.approx(graph.saved.at(4) + graph.loss_saved.at(4), rel=0.02)


def test_time_is_that_of_the_operators(graph):
    latency = Latency(graph, KIND)
    problem = graph_problem(graph, 4, KIND)
    for operation in problem.operations:
        assert operation.seconds == latency.operator_seconds(graph.operators[operation.source], 4)


def test_a_write_in_place_makes_a_new_version_in_the_old_ones_place(graph):
    problem = graph_problem(graph, 4, KIND)
    writers = [operation for operation in problem.operations if operation.name.endswith(":relu_")]
    assert writers
    assert all(operation.overwrites in operation.inputs for operation in writers)
    steps = program(problem, []).steps
    in_place = [step.index for step in steps if step.action == "compute_in_place"]
    assert {problem.operations[at].name.rpartition(":")[2] for at in in_place} == {"relu_"}
    assert len(in_place) == len(writers)


def test_buffers_and_gradients_of_parameters_take_no_bytes(graph):
    problem = graph_problem(graph, 4, KIND)
    assert not any(operation.name.endswith(":add_") for operation in problem.operations)
    last = problem.operations[-1]
    assert last.name.endswith("convolution_backward")
    assert all(problem.tensors[at].bytes == 0 for at in last.outputs)


def test_encodings_follow_from_what_backward_reads(graph):
    problem = graph_problem(graph, 4, KIND)
    found = {problem.tensors[at].encoding.name for at in problem.saved if problem.tensors[at].encoding is not None}
    assert found == {"window", "sign", "sparse"}
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8), nn.Tanh())
    traced = trace(plain, (torch.empty(2, 8, device="meta"),), name="plain", loss=lambda output: output.sum())
    names = [tensor.encoding.name for tensor in graph_problem(traced, 2, KIND).tensors if tensor.encoding is not None]
    assert names == ["sparse"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("addmm", "matmul"), ("convolution", "convolution"), ("relu_", "activation"),
     ("native_layer_norm", "normalization"), ("max_pool2d_with_indices", "pool"),
     ("native_dropout", "dropout"), ("add", "other")],
)  # fmt: skip
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_table_has_every_policy_at_every_budget_and_says_which_fail(graph):
    rows = swap_table(graph, KIND, (1.0, 0.5, 0.01), ("keep-all", "dtr", "vdnn-all"), samples=8, paths=(Path(),))
    assert [(row.policy, row.budget_share) for row in rows[:3]] == [
        ("keep-all", 1.0), ("dtr", 1.0), ("vdnn-all", 1.0),
    ]  # fmt: skip
    assert all(row.overhead == 0 for row in rows[:3])
    assert rows[3].failure
    assert all(row.failure and row.price is None for row in rows[6:])
    problem = graph_problem(graph, 8, KIND, paths=(Path(),))
    assert rows[0].budget_bytes == price(problem, program(problem, [])).peak_bytes
