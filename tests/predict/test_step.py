"""A plan's time: closed forms, parts that add up, and what must never make a step faster or slower."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError
from headway.predict import Predictor, check_fit, predict
from headway.predict.communication import Communication, all_reduce_seconds


@st.composite
def plan_fields(draw):
    data, tensor, pipeline = draw(
        st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)])
    )
    fields = {"data": data, "tensor": tensor, "pipeline": pipeline, "recompute": draw(st.booleans())}
    if data > 1:
        fields["zero_stage"] = draw(st.integers(0, 3))
    if pipeline > 1:
        fields["schedule"] = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"]))
        fields["virtual"] = 2 if fields["schedule"] == "interleaved" else 1
    fields["precision"] = draw(st.sampled_from(["float32", "bfloat16"]))
    fields["overlap"] = draw(st.booleans())
    return fields


@settings(max_examples=60, deadline=None)
@given(plan_fields(), st.sampled_from([1, 2]))
def test_parts_are_not_negative_and_add_up_to_the_step(make, fields, micro_batch):
    graph, cluster = make.graph(), make.cluster(2, 4)
    plan = make.plan(graph, cluster, 16, micro_batch, **fields)
    predictor = Predictor(make.workload(graph), cluster)
    prediction = predictor.predict(plan)
    time = prediction.time
    parts = (time.compute_seconds, time.communication_seconds, time.bubble_seconds, time.optimizer_seconds)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(time.step_seconds)
    assert len(prediction.memory) == plan.world_size
    assert prediction.samples_per_second == pytest.approx(16 / time.step_seconds)
    assert 0 < prediction.mfu <= 1
    assert prediction.bound
    timeline = predictor.timeline(plan)
    assert timeline.stop_seconds == pytest.approx(time.step_seconds, rel=0.02)
    assert {lane.split("/")[0] for lane in timeline.lanes()} == {f"rank {rank}" for rank in range(plan.world_size)}


@settings(max_examples=40, deadline=None)
@given(plan_fields(), st.floats(1, 10), st.floats(1, 10), st.floats(1, 10))
def test_better_hardware_is_never_slower(make, fields, flop, memory, network):
    graph = make.graph()
    plain = make.cluster(2, 4)
    better = make.cluster(
        2,
        4,
        inside=1e10 * network,
        outside=1e9 * network,
        accelerators=(
            make.accelerator(
                flop_per_second={"float32": 1e12 * flop, "bfloat16": 4e12 * flop}, memory_bytes_per_second=1e11 * memory
            ),
        ),
    )
    plan = make.plan(graph, plain, 16, 2, **fields)
    slow = predict(make.workload(graph), plain, plan).time.step_seconds
    fast = predict(make.workload(graph), better, plan).time.step_seconds
    assert fast <= slow * (1 + 1e-9)


def test_one_device_computes_its_flop_at_the_peak_rate(make):
    graph = make.graph(width=1024, tokens=1024)
    cluster = make.cluster(1, 1, accelerators=(make.accelerator(memory_bytes_per_second=1e15),))
    plan = make.plan(graph, cluster, 16, 16)
    prediction = predict(make.workload(graph), cluster, plan)
    flop = graph.forward_flop.at(16) + graph.backward_flop.at(16)
    assert prediction.time.compute_seconds == pytest.approx(flop / 1e12, rel=0.01)
    assert prediction.mfu == pytest.approx(1, rel=0.01)
    assert prediction.energy_joules == pytest.approx(100 * prediction.time.step_seconds)
    assert prediction.dollars == pytest.approx(3.6 / 3600 * prediction.time.step_seconds)


def test_efficiency_scales_what_matrix_products_take(make):
    graph = make.graph(width=1024, tokens=1024)
    plan_seconds = []
    for efficiency in (1.0, 0.5):
        kind = make.accelerator(memory_bytes_per_second=1e15, efficiency=efficiency)
        cluster = make.cluster(1, 1, accelerators=(kind,))
        plan = make.plan(graph, cluster, 16, 16)
        plan_seconds.append(predict(make.workload(graph), cluster, plan).time.compute_seconds)
    assert plan_seconds[1] == pytest.approx(2 * plan_seconds[0], rel=0.01)


def test_tensor_parallelism_divides_the_blocks_and_reduces_twice_for_each(make):
    graph, cluster = make.graph(), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)
    whole = predictor.predict(make.plan(graph, cluster, 4, 4)).time
    split_plan = make.plan(graph, cluster, 4, 4, tensor=4)
    split = predictor.predict(split_plan).time
    assert split.compute_seconds < whole.compute_seconds
    channel = Communication(cluster).channels(split_plan.devices, 1, 1, 4, "tensor")[0]
    size = graph.blocks[0].output.bytes(4)
    reduces = 2 * len(graph.layers) * all_reduce_seconds(size, channel)
    loss = all_reduce_seconds(8, Communication(cluster).group(split_plan.devices))
    assert split.communication_seconds == pytest.approx(reduces + loss)


def test_recomputation_adds_one_forward_pass(make):
    graph, cluster = make.graph(), make.cluster(1, 1)
    predictor = Predictor(make.workload(graph), cluster)
    plain = predictor.predict(make.plan(graph, cluster, 16, 4)).time.compute_seconds
    again = predictor.predict(make.plan(graph, cluster, 16, 4, recompute=True)).time.compute_seconds
    forward, _ = predictor.layer_seconds("unit", 4, crowded=False)
    assert again - plain == pytest.approx(4 * forward[-1])


def test_gradients_reduced_behind_backward_cost_less_than_after_it(make):
    graph, cluster = make.graph(layers=16, width=512), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)
    fields = {"data": 4, "bucket_bytes": 2**24}
    beside = predictor.predict(make.plan(graph, cluster, 16, 4, **fields, overlap=True)).time.communication_seconds
    after = predictor.predict(make.plan(graph, cluster, 16, 4, **fields, overlap=False)).time.communication_seconds
    assert beside < after


def test_on_a_cpu_communication_hides_behind_nothing(make):
    graph = make.graph(layers=16)
    cluster = make.cluster(1, 4, accelerators=(make.accelerator(torch_device="cpu"),))
    predictor = Predictor(make.workload(graph), cluster)
    plan = make.plan(graph, cluster, 16, 4, data=4, bucket_bytes=2**40)
    channel = Communication(cluster).group(plan.devices)
    expected = all_reduce_seconds(graph.parameter_bytes, channel) + all_reduce_seconds(8, channel)
    assert predictor.predict(plan).time.communication_seconds == pytest.approx(expected)


def test_zero_3_gathers_parameters_more_often_than_zero_2(make):
    graph, cluster = make.graph(), make.cluster(1, 4)
    predictor = Predictor(make.workload(graph), cluster)
    two = predictor.predict(make.plan(graph, cluster, 16, 2, data=4, zero_stage=2)).time.communication_seconds
    three = predictor.predict(make.plan(graph, cluster, 16, 2, data=4, zero_stage=3)).time.communication_seconds
    assert three > two


def test_the_slowest_kind_of_device_sets_the_pace(make):
    graph = make.graph()
    slow, fast = make.accelerator("slow"), make.accelerator("fast", flop_per_second={"float32": 1e15})
    mixed = make.cluster(1, 4, accelerators=(fast, slow))
    slow_only = make.cluster(1, 4, accelerators=(slow,))
    plan = make.plan(graph, mixed, 16, 2, data=4)
    workload = make.workload(graph)
    mixed_time, slow_time = predict(workload, mixed, plan).time, predict(workload, slow_only, plan).time
    assert mixed_time.compute_seconds == pytest.approx(slow_time.compute_seconds)


def test_contention_slows_compute_down_only_when_several_devices_work(make):
    graph = make.graph()
    crowded = Predictor(make.workload(graph), make.cluster(1, 2, contention=2.0, memory_contention=2.0))
    quiet = Predictor(make.workload(graph), make.cluster(1, 2))
    alone = make.plan(graph, quiet.cluster, 16, 2)
    both = make.plan(graph, quiet.cluster, 16, 2, data=2)
    assert crowded.predict(alone).time.compute_seconds == pytest.approx(quiet.predict(alone).time.compute_seconds)
    assert crowded.predict(both).time.compute_seconds == pytest.approx(2 * quiet.predict(both).time.compute_seconds)


def test_a_prediction_does_not_depend_on_what_was_predicted_before(make):
    graph, cluster = make.graph(), make.cluster(2, 4)
    shared = Predictor(make.workload(graph), cluster)
    for fields in ({"data": 2}, {"tensor": 2}, {"pipeline": 2}, {"data": 2, "zero_stage": 3}, {"data": 2}):
        for micro_batch in (1, 2):
            plan = make.plan(graph, cluster, 16, micro_batch, **fields)
            assert shared.predict(plan) == predict(make.workload(graph), cluster, plan)


def test_a_plan_that_fits_has_headroom_and_one_that_does_not_is_refused_with_the_reason(make):
    graph = make.graph()
    roomy = make.cluster(1, 1)
    plan = make.plan(graph, roomy, 16, 16)
    prediction = predict(make.workload(graph), roomy, plan)
    assert check_fit(prediction, plan, roomy) == pytest.approx(1e10 - prediction.peak_bytes)
    tight = make.cluster(1, 1, accelerators=(make.accelerator(memory_bytes=prediction.peak_bytes - 1e6),))
    with pytest.raises(
        DoesNotFitError, match=r"rank 0 needs .* 1.00 MB too little; most of it is activations"
    ) as caught:
        check_fit(prediction, plan, tight)
    assert "recompute" in caught.value.remedy
