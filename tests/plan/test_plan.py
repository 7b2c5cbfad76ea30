"""A plan is valid or refused with the field and the reason, and it survives JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import FieldError, PlanError
from headway.hardware.cluster import Accelerator, Cluster, Device
from headway.plan.plan import Plan, Stage, single_device_plan
from headway.workload.graph import Affine, Graph, Layer, TensorBlock, TensorKind

SEQUENCE = TensorKind(fixed=(0, 16, 32), per_sample=(1, 0, 0), dtype="float32")


def layer(name: str) -> Layer:
    zero = Affine()
    return Layer(
        name=name,
        entry_module=name,
        entry_argument=0,
        forward=(),
        backward=(),
        parameters=(),
        forward_flop=zero,
        backward_flop=zero,
        saved=zero,
        saved_sharded=zero,
        output=SEQUENCE,
    )


def block(position: int) -> TensorBlock:
    return TensorBlock(
        layer=position,
        columns=(f"{position}.up", f"{position}.gate"),
        rows=(f"{position}.down",),
        divisor=12,
        input=SEQUENCE,
        output=SEQUENCE,
        parameters={},
    )


def graph(layers: int) -> Graph:
    return Graph(
        name="toy",
        operators=(),
        layers=tuple(layer(str(position)) for position in range(layers)),
        parameters=(),
        units=(),
        inputs=(SEQUENCE,),
        blocks=tuple(block(position) for position in range(layers)),
    )


def cluster(devices: int) -> Cluster:
    kind = Accelerator(name="cpu", flop_per_second={"float32": 1e9}, memory_bytes=1e9, memory_bytes_per_second=1e9)
    return Cluster(
        name="toy",
        accelerators={"cpu": kind},
        devices=tuple(Device(name=f"d{position}", accelerator="cpu", node="n0") for position in range(devices)),
    )


@st.composite
def plans(draw) -> Plan:
    data, tensor, pipeline = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 4))
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved"])) if pipeline > 1 else "none"
    virtual = draw(st.integers(2, 3)) if schedule == "interleaved" else 1
    lengths = draw(st.lists(st.integers(1, 3), min_size=pipeline * virtual, max_size=pipeline * virtual))
    stages, start = [], 0
    for length in lengths:
        again = draw(st.sets(st.integers(start, start + length - 1)))
        stages.append(Stage(start=start, stop=start + length, recompute=tuple(sorted(again))))
        start += length
    micro_batches = pipeline * draw(st.integers(1, 3))
    micro_batch = draw(st.integers(1, 4))
    chosen = [position for position in range(start) if draw(st.booleans())] or [0] if tensor > 1 else []
    sharding = {}
    for position in chosen:
        sharding |= {f"{position}.up": "column", f"{position}.gate": "column", f"{position}.down": "row"}
    return Plan(
        model="toy",
        devices=tuple(f"d{rank}" for rank in range(data * tensor * pipeline)),
        global_batch=micro_batches * micro_batch * data,
        micro_batch=micro_batch,
        stages=tuple(stages),
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        schedule=schedule,
        zero_stage=draw(st.sampled_from([0, 1, 2, 3])) if data > 1 else 0,
        tensor_sharding=sharding,
        precision=draw(st.sampled_from(["float32", "bfloat16"])),
        overlap=draw(st.booleans()),
    )


@given(plans())
def test_a_valid_plan_is_accepted_and_survives_json_and_yaml(plan):
    assert plan.validate(graph(plan.stages[-1].stop), cluster(plan.world_size)) is plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_yaml(plan.to_yaml()) == plan


@given(plans())
def test_ranks_form_a_mesh_with_tensor_fastest(plan):
    ranks = range(plan.world_size)
    assert [plan.rank_of(*plan.coordinates(rank)) for rank in ranks] == list(ranks)
    for rank in ranks:
        pipeline, data, tensor = plan.coordinates(rank)
        assert plan.tensor_group(rank)[tensor] == rank
        assert plan.data_group(rank)[data] == rank
        assert plan.pipeline_group(rank)[pipeline] == rank
        assert plan.tensor_group(rank) == tuple(range(rank - tensor, rank - tensor + plan.tensor))


@given(plans())
def test_every_stage_is_held_by_exactly_one_pipeline_rank(plan):
    held = [stage for pipeline_rank in range(plan.pipeline) for stage in plan.stages_of(pipeline_rank)]
    assert sorted(held) == list(range(len(plan.stages)))
    assert all(len(plan.stages_of(rank)) == plan.virtual_stages for rank in range(plan.pipeline))


@given(plans())
def test_micro_batches_of_all_replicas_make_the_global_batch(plan):
    assert plan.micro_batches * plan.micro_batch * plan.data == plan.global_batch


def valid(**fields) -> Plan:
    values = {
        "model": "toy",
        "devices": ("d0", "d1", "d2", "d3"),
        "global_batch": 32,
        "micro_batch": 4,
        "stages": (Stage(start=0, stop=2), Stage(start=2, stop=4)),
        "data": 2,
        "pipeline": 2,
        "schedule": "1f1b",
    }
    return Plan(**{**values, **fields})


SHARDED = {"0.up": "column", "0.gate": "column", "0.down": "row"}


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"data": 0}, "data", "at least 1"),
        ({"micro_batch": -1}, "micro_batch", "at least 1"),
        ({"data": 3}, "devices", "3 x tensor 1 x pipeline 2 = 6 ranks, and 4 devices"),
        ({"devices": ("d0", "d1", "d2", "d2")}, "devices", "listed twice"),
        ({"devices": ("d0", "d1", "d2", "nowhere")}, "devices[3]", "no device 'nowhere'"),
        ({"global_batch": 33}, "micro_batch", "does not divide"),
        ({"stages": ()}, "stages", "0 stages"),
        ({"stages": (Stage(start=0, stop=4),)}, "stages", "1 stages for 2 pipeline ranks"),
        ({"stages": (Stage(start=0, stop=2), Stage(start=3, stop=4))}, "stages[1]", "beginning at 2"),
        ({"stages": (Stage(start=0, stop=0), Stage(start=0, stop=4))}, "stages[0]", "none is empty"),
        ({"stages": (Stage(start=0, stop=1), Stage(start=1, stop=3))}, "stages", "cover 3 layers"),
        (
            {"stages": (Stage(start=0, stop=2, recompute=(2,)), Stage(start=2, stop=4))},
            "stages[0].recompute",
            "layer 2",
        ),
        ({"schedule": "none"}, "schedule", "'none' with 2"),
        ({"schedule": "interleaved"}, "stages", "several stages on each rank"),
        ({"micro_batch": 16}, "micro_batch", "cannot fill 2 pipeline ranks"),
        ({"data": 1, "pipeline": 4, "zero_stage": 1}, "stages", "2 stages for 4"),
        ({"tensor_sharding": SHARDED}, "tensor_sharding", "tensor is 1"),
        ({"data": 1, "tensor": 2}, "tensor_sharding", "no module is split"),
        ({"data": 1, "tensor": 2, "tensor_sharding": {"head": "column"}}, "tensor_sharding.head", "not prove"),
        ({"data": 1, "tensor": 2, "tensor_sharding": {**SHARDED, "0.up": "row"}}, "tensor_sharding.0.up", "'column'"),
        ({"data": 1, "tensor": 2, "tensor_sharding": {"0.up": "column"}}, "tensor_sharding", "0.down, 0.gate"),
        ({"bucket_bytes": 0}, "bucket_bytes", "positive"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused_with_the_field(fields, place, message):
    with pytest.raises(PlanError) as caught:
        valid(**fields).validate(graph(4), cluster(4), place="plan.json")
    assert caught.value.place == f"plan.json: {place}"
    assert message in str(caught.value)


def test_one_replica_has_nothing_to_divide_states_over():
    plan = single_device_plan("toy", 4, 8, zero_stage=1)
    with pytest.raises(PlanError, match="only one replica"):
        plan.validate()


def test_a_tensor_degree_must_divide_the_heads():
    plan = single_device_plan(
        "toy", 4, 8, tensor=5, devices=tuple(f"d{rank}" for rank in range(5)), tensor_sharding=SHARDED
    )
    with pytest.raises(PlanError, match="cannot be split 5 ways: 12 does not divide"):
        plan.validate(graph(4))


def test_interleaving_needs_micro_batches_in_multiples_of_the_pipeline():
    stages = tuple(Stage(start=position, stop=position + 1) for position in range(4))
    plan = valid(stages=stages, schedule="interleaved", global_batch=24)
    with pytest.raises(PlanError, match="3 micro-batches do not divide among 2"):
        plan.validate(graph(4))
    valid(stages=stages, schedule="interleaved").validate(graph(4))


def test_a_misspelt_field_of_a_plan_file_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(valid().to_json().replace('"micro_batch"', '"microbatch"'))
    with pytest.raises(FieldError, match=r"micro_?batch") as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_schedule_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FieldError, match="schedule"):
        Plan.from_json(valid().to_json().replace('"1f1b"', '"zigzag"'))


def test_the_description_names_what_departs_from_the_ordinary():
    assert single_device_plan("toy", 4, 8).describe() == "one device, 1 x 8"
    stages = (Stage(start=0, stop=2, recompute=(0,)), Stage(start=2, stop=4))
    plan = valid(stages=stages, zero_stage=1, precision="bfloat16")
    assert plan.describe() == "data 2 x pipeline 2, ZeRO-1, 4 x 4 (1f1b), recompute 1/4, bfloat16"
    assert msgspec.structs.replace(plan, zero_stage=0) != plan


def test_the_documentation_has_a_valid_example_and_every_field():
    text = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    plan = Plan.from_json(example, place="docs/plan.md").validate()
    assert set(json.loads(example)) == set(Plan.__struct_fields__)
    assert all(f"`{field}`" in text for field in Plan.__struct_fields__)
    table = re.findall(r"^\| (pipeline p|data d|tensor t) \|(.*)\|$", text, flags=re.MULTILINE)
    stages = tuple(Stage(start=at, stop=at + 1) for at in range(2))
    mesh = msgspec.structs.replace(plan, data=2, tensor=2, pipeline=2, stages=stages)
    columns = zip(*([int(cell) for cell in row.split("|")] for _, row in table), strict=True)
    assert [mesh.coordinates(rank) for rank in range(8)] == list(columns)
