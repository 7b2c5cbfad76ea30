"""Memory of a plan against the closed forms of the papers that introduced what saves it."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.predict import Predictor
from headway.predict.memory import Sizes, zero1_partition
from headway.predict.operators import WHOLE, Shards
from headway.workload.graph import Affine, OptimizerKind


def state_bytes(memory) -> float:
    return memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes


def test_adam_in_float32_takes_sixteen_bytes_for_each_parameter(make):
    graph, cluster = make.graph(), make.cluster(1, 1)
    memory = Predictor(make.workload(graph), cluster).predict(make.plan(graph, cluster, 16, 2)).memory[0]
    assert state_bytes(memory) == 16 * graph.parameter_count


@pytest.mark.parametrize(("stage", "per_parameter"), [(0, 16), (1, 8 + 8 / 4), (2, 4 / 4 + 4 / 4 + 8 / 4), (3, 16 / 4)])
def test_zero_divides_states_then_gradients_then_parameters(make, stage, per_parameter):
    """Rajbhandari et al., SC 2020, figure 1; stage 2's gathered parameters are counted as communication."""
    graph, cluster = make.graph(), make.cluster(1, 4)
    plan = make.plan(graph, cluster, 16, 4, data=4, zero_stage=stage)
    memory = Predictor(make.workload(graph), cluster).predict(plan).memory
    assert len(memory) == 4
    for rank in memory:
        assert state_bytes(rank) == pytest.approx(per_parameter * graph.parameter_count)


def test_zero_2_keeps_whole_parameters_through_a_step_and_zero_3_those_of_two_layers(make):
    graph, cluster = make.graph(layers=8), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)
    layer = graph.parameter_bytes / 8
    two = predictor.predict(make.plan(graph, cluster, 16, 4, data=4, zero_stage=2)).memory[0]
    three = predictor.predict(make.plan(graph, cluster, 16, 4, data=4, zero_stage=3)).memory[0]
    assert two.communication_bytes == pytest.approx(graph.parameter_bytes + layer)
    assert three.communication_bytes == pytest.approx(2 * layer + layer)


def test_tensor_parallelism_divides_parameters_and_the_activations_inside_blocks(make):
    graph, cluster = make.graph(), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)
    whole = predictor.predict(make.plan(graph, cluster, 16, 4)).memory[0]
    split = predictor.predict(make.plan(graph, cluster, 16, 4, tensor=4)).memory[0]
    assert state_bytes(split) == pytest.approx(state_bytes(whole) / 4)
    inputs = graph.inputs[0].bytes(16)
    assert split.activations_bytes - inputs == pytest.approx((whole.activations_bytes - inputs) / 4)


def test_recomputation_keeps_what_layers_begin_with_and_one_layer(make):
    graph, cluster = make.graph(layers=8), make.cluster(1, 1)
    predictor = Predictor(make.workload(graph), cluster)
    plain = predictor.predict(make.plan(graph, cluster, 16, 4)).memory[0]
    again = predictor.predict(make.plan(graph, cluster, 16, 4, recompute=True)).memory[0]
    saved = graph.layers[1].saved.at(4)
    crossing = graph.layers[1].output.bytes(4)
    inputs = graph.inputs[0].bytes(16)
    assert plain.activations_bytes == pytest.approx(8 * saved + inputs)
    assert again.activations_bytes == pytest.approx(7 * crossing + inputs)
    assert again.workspace_bytes >= saved


def test_1f1b_keeps_fewer_activations_than_gpipe_and_the_last_rank_fewest(make):
    graph, cluster = make.graph(layers=8), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)

    def activations(schedule: str) -> list[float]:
        plan = make.plan(graph, cluster, 16, 1, pipeline=4, schedule=schedule)
        inputs = graph.inputs[0].bytes(16)
        return [memory.activations_bytes - inputs for memory in predictor.predict(plan).memory]

    one, all_at_once = activations("1f1b"), activations("gpipe")
    saved = 2 * graph.layers[1].saved.at(1)
    assert one == pytest.approx([4 * saved, 3 * saved, 2 * saved, saved])
    assert all_at_once == pytest.approx([16 * saved] * 4)


def test_the_loss_is_kept_by_the_last_stage_only(make):
    graph = make.graph(layers=8)
    with_loss = msgspec.structs.replace(graph, loss_saved=Affine(per_sample=1e6))
    cluster = make.cluster(1, 2)
    plan = make.plan(graph, cluster, 16, 1, pipeline=2)
    before = Predictor(make.workload(graph), cluster).predict(plan).memory
    after = Predictor(make.workload(with_loss), cluster).predict(plan).memory
    assert after[0] == before[0]
    assert after[1].activations_bytes == pytest.approx(before[1].activations_bytes + 1e6)


def test_an_optimizer_that_makes_large_copies_can_need_more_than_backward(make):
    graph, cluster = make.graph(), make.cluster(1, 1)
    plan = make.plan(graph, cluster, 16, 1)
    greedy = OptimizerKind(temporary_bytes_per_element=100.0)
    memory = Predictor(make.workload(graph, optimizer=greedy), cluster).predict(plan).memory[0]
    assert memory.total_bytes == pytest.approx((16 + 100) * graph.parameter_count)


@given(st.integers(1, 8), st.integers(1, 4))
def test_gradients_made_anew_take_the_place_of_activations(make, layers, samples):
    """One replica, one micro-batch: at no moment are all activations and all gradients there together."""
    graph, cluster = make.graph(layers=layers), make.cluster(1, 1)
    plan = make.plan(graph, cluster, samples, samples)
    quiet = OptimizerKind(temporary_bytes_per_element=0.0)
    memory = Predictor(make.workload(graph, samples, optimizer=quiet), cluster).predict(plan).memory[0]
    saved = [layer.saved.at(samples) for layer in graph.layers]
    gradient = graph.parameter_bytes / layers
    extra = graph.layers[0].backward_peak_extra.at(samples)
    inputs = graph.inputs[0].bytes(samples)
    moments = [sum(saved[: at + 1]) + extra + (layers - at) * gradient for at in range(layers)]
    expected = max(*moments, sum(saved), 0) + inputs
    expected = max(expected, graph.parameter_bytes)
    assert memory.total_bytes == pytest.approx(12 * graph.parameter_count + expected)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 6))
def test_zero_1_hands_out_every_tensor_once_and_evenly(sizes, ranks):
    parts = zero1_partition(sizes, ranks)
    assert sorted(at for part in parts for at in part) == list(range(len(sizes)))
    totals = [sum(sizes[at] for at in part) for part in parts]
    # Largest first to the least loaded: within 4/3 of the best possible (Graham 1969).
    assert max(totals) <= max(sum(sizes) / ranks + max(sizes), max(sizes))


def test_zero_1_partitions_as_torch_does():
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed.optim compiles TorchScript, which is deprecated
        from torch.distributed.optim import ZeroRedundancyOptimizer

    sizes = [7, 3, 9, 9, 1, 4, 12, 5, 5, 2]
    tensors = [torch.zeros(size) for size in sizes]
    numbers = {id(tensor): at for at, tensor in enumerate(tensors)}
    # Only what `_partition_parameters` looks at: the real one needs a process group.
    optimizer = SimpleNamespace(
        world_size=3,
        param_groups=[{"params": tensors}],
        _partition_parameters_cache=[],
        _get_min_index=lambda values, disallowed=None: min(range(len(values)), key=values.__getitem__),
    )
    optimizer._partition_param_group = partial(ZeroRedundancyOptimizer._partition_param_group, optimizer)
    theirs = [
        [numbers[id(tensor)] for group in groups for tensor in group["params"]]
        for groups in ZeroRedundancyOptimizer._partition_parameters(optimizer)
    ]
    assert zero1_partition(sizes, 3) == theirs


def test_a_tied_parameter_is_held_once_in_a_stage_and_by_every_stage_that_reads_it(make):
    graph = make.graph(layers=4)
    first, last = graph.layers[0], graph.layers[-1]
    tied = msgspec.structs.replace(last, parameters=(*last.parameters, first.parameters[0]))
    graph = msgspec.structs.replace(graph, layers=(*graph.layers[:-1], tied))
    sizes = Sizes(graph)
    assert sizes.parameters(0, 4, WHOLE).elements == graph.parameter_count
    shared = graph.parameter_by_name[first.parameters[0]].elements
    halves = sizes.parameters(0, 2, WHOLE).elements + sizes.parameters(2, 4, WHOLE).elements
    assert halves == graph.parameter_count + shared


def test_sharding_rounds_rows_up_as_fully_shard_does(make):
    graph = make.graph(layers=1, width=6)  # weights of 24 x 6 and 6 x 24
    held = Sizes(graph).sharded(0, 1, WHOLE, 4)
    assert held.elements == held.trainable_elements == 6 * 6 + 2 * 24
    assert held.bytes == 4 * held.elements


def test_a_split_parameter_is_divided_along_its_dimension(make):
    graph = make.graph(layers=1)
    sizes = Sizes(graph)
    shards = Shards(4, frozenset({0}))
    assert sizes.local_shape(graph.parameters[0], shards) == (make.width, make.width)
    assert sizes.local_shape(graph.parameters[0], Shards(4, frozenset())) == (4 * make.width, make.width)
