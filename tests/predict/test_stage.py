"""What each degree of a plan does to a stage's work and communication: conservation, closed forms, and directions."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.hardware.catalog import preset
from headway.plan.plan import Plan, Stage
from headway.predict import Predictor
from headway.predict import communication as comm
from headway.predict.parts import Exchange, StageParts
from headway.predict.replicas import to_owners_seconds, to_rows_seconds
from headway.predict.stage import hidden_behind
from headway.workload.graph import Recipe, Workload
from headway.workload.transformer import TransformerShape, transformer

SHAPE = TransformerShape(layers=4, hidden=1024, heads=16, vocabulary=32000, sequence=2048, fused=True, packed=True)
DENSE = transformer(SHAPE, "dense")
MIXTURE = transformer(msgspec.structs.replace(SHAPE, experts=8, experts_chosen=2), "mixture")


def plan_for(graph, cluster, *, batch=16, micro_batch=1, cuts=None, **fields) -> Plan:
    data, tensor, pipeline = fields.get("data", 1), fields.get("tensor", 1), fields.get("pipeline", 1)
    count = len(graph.layers)
    cuts = cuts or [round(at * count / pipeline) for at in range(pipeline + 1)]
    stages = fields.pop("stages", None) or tuple(
        Stage(start=start, stop=stop) for start, stop in itertools.pairwise(cuts)
    )
    widest = max(tensor, *(stage.tensor for stage in stages))
    sharding = {}
    if widest > 1:
        for block in graph.blocks:
            sharding |= dict.fromkeys(block.columns, "column") | dict.fromkeys(block.rows, "row")
    fields.setdefault("schedule", "1f1b" if pipeline > 1 else "none")
    world = fields.pop("world", data * tensor * pipeline * fields.get("context", 1))
    return Plan(
        model=graph.name,
        devices=tuple(device.name for device in cluster.devices[:world]),
        global_batch=batch,
        micro_batch=micro_batch,
        stages=stages,
        tensor_sharding=sharding,
        precision=fields.pop("precision", "bfloat16"),
        **fields,
    ).validate(graph, cluster)


def predictor(graph, cluster, batch=16, **recipe) -> Predictor:
    workload = Workload(graph=graph, global_batch=batch, precision="bfloat16", recipe=Recipe(**recipe))
    return Predictor(workload, cluster)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_hidden_communication_never_costs_more_than_waiting_for_it(seconds, cover, slowdown):
    shown = hidden_behind(seconds, cover, slowdown)
    assert max(0.0, seconds - cover) <= shown + 1e-12
    assert shown <= seconds + 1e-12


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 1))
def test_more_communication_never_takes_less_time(seconds, more, cover, slowdown):
    assert hidden_behind(seconds, cover, slowdown) <= hidden_behind(seconds + more, cover, slowdown) + 1e-12


def test_passes_of_a_stage_add_up_from_their_parts():
    parts = StageParts(1.0, 2.0, 3.0, 4.0, 5.0, tensor=Exchange(9, 9, 0.25, 0.5), scatter=Exchange(9, 9, 0, 0.125))
    assert parts.backward == 14.0
    assert parts.forward_seconds == 1.25
    assert parts.backward_seconds == 14.625


@pytest.mark.parametrize("context", [2, 4])
def test_context_ranks_share_the_work_of_every_sample_and_reduce_gradients_together(context):
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    whole = own.parts(plan_for(DENSE, cluster, data=1, micro_batch=8, zero_stage=0)).stages[0]
    plan = plan_for(DENSE, cluster, context=context, micro_batch=8)
    parts = own.parts(plan)
    shared = parts.stages[0]
    # Smaller products are less efficient: at least the fair share, and well below twice of it.
    assert whole.forward / context <= shared.forward * 1.001 <= 1.6 * whole.forward / context
    channel = own.stages.layouts.channels_of(plan)[0]
    assert channel.replicas.size == context
    assert parts.ranks[0].exchanged > 0
    size = 0.5 * sum(layer.attention.keys_values.at(8) for layer in DENSE.layers if layer.attention is not None)
    count = sum(layer.attention is not None for layer in DENSE.layers)
    assert shared.context.forward == pytest.approx(count * comm.all_gather_seconds(size / count, channel.context))
    assert shared.context.backward == pytest.approx(2 * shared.context.forward)
    assert shared.context.exposed_forward <= shared.context.forward


def test_experts_are_divided_and_their_tokens_cross_twice_each_way():
    cluster = preset("dgx-a100")
    own = predictor(MIXTURE, cluster)
    whole, divided = (own.parts(plan_for(MIXTURE, cluster, data=8, expert=expert)) for expert in (1, 8))
    plan = plan_for(MIXTURE, cluster, data=8, expert=8)
    channel = own.stages.layouts.channels_of(plan)[0].expert
    sizes = [0.5 * layer.experts.dispatched.at(1) for layer in MIXTURE.layers if layer.experts is not None]
    expected = 2 * sum(comm.all_to_all_seconds(size, channel) for size in sizes)
    assert divided.stages[0].expert.forward == pytest.approx(expected)
    assert divided.stages[0].expert.backward == pytest.approx(expected)
    assert whole.stages[0].expert == Exchange()
    # Fewer parameters on each rank: less to update, less to reduce.
    assert divided.ranks[0].update < whole.ranks[0].update
    assert divided.ranks[0].exchanged < whole.ranks[0].exchanged


def test_sequence_parallelism_divides_what_streams_outside_of_the_blocks():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    without, with_it = (
        own.parts(plan_for(DENSE, cluster, tensor=4, sequence_parallel=chosen, micro_batch=8)).stages[0]
        for chosen in (False, True)
    )
    assert with_it.forward < without.forward
    # A ring's all-gather and reduce-scatter move what its all-reduce does.
    assert with_it.tensor.forward == pytest.approx(without.tensor.forward, rel=0.35)


def test_recomputing_attention_costs_its_core_and_recomputing_layers_costs_all_of_them():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    blocks = tuple(at for at, layer in enumerate(DENSE.layers) if layer.attention is not None)
    whole = Stage(start=0, stop=len(DENSE.layers))
    plain, core, all_of_it = (
        own.parts(plan_for(DENSE, cluster, stages=(stage,), micro_batch=8)).stages[0]
        for stage in (
            whole,
            msgspec.structs.replace(whole, recompute_attention=blocks),
            msgspec.structs.replace(whole, recompute=blocks),
        )
    )
    assert plain.recompute == 0
    assert 0 < core.recompute < all_of_it.recompute < plain.forward
    assert core.backward_input == pytest.approx(plain.backward_input)


def test_weight_gradients_are_about_half_of_backward_in_a_transformer():
    cluster = preset("dgx-a100")
    parts = predictor(DENSE, cluster).parts(plan_for(DENSE, cluster, micro_batch=8)).stages[0]
    assert 0.2 < parts.backward_weight / (parts.backward_weight + parts.backward_input) < 0.5


def test_zero_bubble_is_faster_than_1f1b_and_no_faster_than_its_compute():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    fields = {"pipeline": 4, "micro_batch": 1, "batch": 8, "cuts": [0, 2, 3, 4, 6]}
    plain, split = (
        own.parts(plan_for(DENSE, cluster, schedule=schedule, **fields)) for schedule in ("1f1b", "zero_bubble")
    )
    assert max(split.finish) < max(plain.finish)
    slowest = max(stage.forward_seconds + stage.backward_seconds for stage in split.stages)
    assert max(split.finish) >= 8 * slowest


@pytest.mark.parametrize("degrees", [((4, 1), (1, 4)), ((2, 1), (4, 1)), ((1, 2), (2, 2))])
def test_stages_with_degrees_of_their_own_share_out_the_same_samples(degrees):
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster, batch=64)
    first, second = degrees
    stages = (
        Stage(start=0, stop=3, data=first[0], tensor=first[1]),
        Stage(start=3, stop=6, data=second[0], tensor=second[1]),
    )
    world = sum(data * tensor for data, tensor in degrees)
    data = degrees[0][0]
    plan = plan_for(DENSE, cluster, stages=stages, data=data, pipeline=2, world=world, micro_batch=4, batch=64)
    parts = own.parts(plan)
    assert parts.sends[0] > 0
    for rank, (_, tensor) in enumerate(degrees):
        assert (parts.stages[rank].tensor.forward > 0) == (tensor > 1)
    assert own.predict(plan).time.step_seconds > 0


def test_equal_stage_degrees_written_out_predict_the_same_as_the_plans_own():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    implied = plan_for(DENSE, cluster, data=2, tensor=2, pipeline=2, cuts=[0, 3, 6])
    stages = tuple(msgspec.structs.replace(stage, data=2, tensor=2) for stage in implied.stages)
    written = msgspec.structs.replace(implied, stages=stages)
    one, two = own.step_time(implied), own.step_time(written)
    assert two.compute_seconds == pytest.approx(one.compute_seconds)
    assert two.step_seconds == pytest.approx(one.step_seconds, rel=0.02)


def test_shares_in_proportion_to_speed_beat_equal_ones_on_unequal_devices():
    cluster = preset("dgx-a100+dgx-1v")
    fast, slow = cluster.devices[0].name, cluster.devices[8].name
    own = predictor(DENSE, cluster)
    base = plan_for(DENSE, cluster, data=2, micro_batch=1, batch=16, precision="float16")
    base = msgspec.structs.replace(base, devices=(fast, slow))
    equal = own.step_time(base).step_seconds
    written_out = own.step_time(msgspec.structs.replace(base, shares=(8, 8)).validate(DENSE, cluster)).step_seconds
    better = own.step_time(msgspec.structs.replace(base, shares=(11, 5)).validate(DENSE, cluster)).step_seconds
    worse = own.step_time(msgspec.structs.replace(base, shares=(5, 11)).validate(DENSE, cluster)).step_seconds
    assert written_out == pytest.approx(equal, rel=0.01)
    assert better < equal < worse


@pytest.mark.parametrize("field", ["parameters_on", "optimizer_on", "activations_on"])
def test_farther_tiers_take_longer(field):
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    seconds = [
        own.step_time(msgspec.structs.replace(plan_for(DENSE, cluster), **{field: tier})).step_seconds
        for tier in ("device", "host", "disk")
    ]
    assert seconds[0] < seconds[1] < seconds[2]


def test_neighbours_on_a_pcie_switch_share_its_way_to_the_host():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    slot = next(link.bytes_per_second for link in cluster.links if link.kind == "pcie")
    assert 0.3 * slot < own.stages.tiers.copy_rate("host", cluster.devices[0].name) <= 0.5 * slot
    assert own.stages.tiers.copy_rate("disk", cluster.devices[0].name) < own.stages.tiers.copy_rate(
        "host", cluster.devices[0].name
    )


@pytest.mark.parametrize("pair", [("float32", "bfloat16"), ("bfloat16", "float8"), ("float8", "float4")])
def test_fewer_bits_compute_faster_where_the_device_has_units_for_them(pair):
    cluster = preset("dgx-b200")
    shape = msgspec.structs.replace(SHAPE, hidden=8192, heads=64, layers=2)
    graph = transformer(shape, "wide")
    own = predictor(graph, cluster)
    wide, narrow = (own.step_time(plan_for(graph, cluster, precision=bits)).compute_seconds for bits in pair)
    assert narrow < wide
    old = preset("dgx-a100")
    own = predictor(graph, old)
    eight, sixteen = (
        own.step_time(plan_for(graph, old, precision=bits)).compute_seconds for bits in ("float8", "bfloat16")
    )
    assert eight == pytest.approx(sixteen)


def test_the_distributed_optimizer_scatters_gradients_and_gathers_parameters():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster, framework="megatron", parameter_bytes=2.0, gradient_bytes=4.0, master_bytes=4.0)
    plain, divided = (
        own.parts(plan_for(DENSE, cluster, data=8, zero_stage=zero, overlap=False)).ranks[0] for zero in (0, 1)
    )
    elements = DENSE.parameter_count
    channel = own.stages.layouts.channels_of(plan_for(DENSE, cluster, data=8))[0].replicas
    assert divided.gradients == pytest.approx(comm.reduce_scatter_seconds(4 * elements, channel))
    assert divided.after == pytest.approx(comm.all_gather_seconds(2 * elements, channel))
    assert plain.gradients == pytest.approx(comm.all_reduce_seconds(4 * elements, channel))
    assert divided.update < plain.update


@pytest.mark.parametrize("data", [2, 8])
def test_zero_1_moves_each_gradient_to_its_owner_once_and_each_parameter_back_once(data):
    # Rajbhandari et al. (SC 2020), section 7: 2P elements, as many as an all-reduce of the gradients.
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    plan = plan_for(DENSE, cluster, data=data, zero_stage=1, overlap=False)
    found = own.parts(plan).ranks[0]
    channel = own.stages.layouts.channels_of(plan)[0].replicas
    moved = 4 * DENSE.parameter_count
    owners = data * comm.reduce_seconds(moved / data, channel)
    assert found.gradients == pytest.approx(owners)
    assert found.after == pytest.approx(data * comm.broadcast_seconds(moved / data, channel))


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("zero", [0, 1])
def test_with_the_optimizer_off_the_device_rows_are_reduced_to_who_updates_them_and_gathered_from_there(
    zero: int, precision: str
):
    # ZeRO-Offload (Ren et al., ATC 2021), section 4.2: 2P elements under ZeRO-0 and 1, in the plan's precision.
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    fields = {"data": 8, "zero_stage": zero, "optimizer_on": "host", "precision": precision}
    plan = plan_for(DENSE, cluster, overlap=False, bucket_bytes=2**40, **fields)
    found = own.parts(plan).ranks[0]
    channel = own.stages.layouts.channels_of(plan)[0].replicas
    moved = (2 if precision == "bfloat16" else 4) * DENSE.parameter_count
    assert found.gradients == pytest.approx(comm.reduce_scatter_seconds(moved, channel))
    assert found.after == pytest.approx(comm.all_gather_seconds(moved, channel))
    # Each updates an eighth.
    alone = own.parts(plan_for(DENSE, cluster, batch=2, optimizer_on="host", precision=precision)).ranks[0]
    assert found.offload.update == pytest.approx(alone.offload.update / 8, rel=0.02)


def test_gloo_exchanges_what_it_would_have_reduced_twice():
    channel = comm.Channel(size=4, latency_seconds=1e-5, bytes_per_second=1e9, backend="gloo")
    assert to_rows_seconds(1e8, channel) == pytest.approx(3e-5 + 0.75e8 / 1e9)
    assert comm.reduce_scatter_seconds(1e8, channel) == pytest.approx(comm.all_reduce_seconds(1e8, channel))


def test_a_bucket_of_few_tensors_is_reduced_to_few_owners():
    cluster = preset("dgx-a100")
    own = predictor(DENSE, cluster)
    plan = plan_for(DENSE, cluster, data=8, zero_stage=1, overlap=False)
    channel = own.stages.layouts.channels_of(plan)[0].replicas
    assert to_owners_seconds(1e6, channel, tensor_bytes=4e5) == pytest.approx(3 * comm.reduce_seconds(1e6 / 3, channel))
    assert to_owners_seconds(1e6, channel, tensor_bytes=1e7) == pytest.approx(comm.reduce_seconds(1e6, channel))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]))
def test_parts_are_never_negative_and_the_step_is_their_sum(data, tensor, context, micro_batch):
    cluster = preset("dgx-a100:2")
    own = predictor(MIXTURE, cluster)
    plan = plan_for(
        MIXTURE, cluster, data=data, tensor=tensor, context=context, micro_batch=micro_batch, expert=data * context,
        sequence_parallel=tensor > 1,
    )  # fmt: skip
    parts = own.parts(plan)
    stage = parts.stages[0]
    assert min(stage.forward, stage.backward_input, stage.backward_weight, stage.recompute, stage.accumulate) >= 0
    assert all(min(exchange) >= 0 for exchange in stage.exchanges)
    time = own.step_time(plan)
    total = plan.micro_batches * (stage.forward_seconds + stage.backward_seconds)
    own_rank = parts.ranks[0]
    assert time.step_seconds == pytest.approx(
        total + own_rank.gradients + own_rank.update + own_rank.after + parts.loss
    )
