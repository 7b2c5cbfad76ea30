"""A plan in other frameworks' words: what it says comes back, and what cannot be said is refused by name."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, PlanError
from headway.plan.export import export, say_first, transformer_blocks
from headway.plan.imports import read_deepspeed, read_megatron
from headway.plan.plan import Plan, Stage
from headway.workload.transformer import TransformerShape, transformer

LAYERS = 8
SHAPE = TransformerShape(
    layers=LAYERS, hidden=256, heads=8, vocabulary=1024, sequence=128, fused=True, packed=True, dropout=True, tied=True
)
GRAPH = transformer(SHAPE)
MODEL_FLAGS = (
    "pretrain_gpt.py --num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 128 --vocab-size 1024 "
    "--make-vocab-size-divisible-by 1 --lr 1e-4"
)


def sharding(tensor: int) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for block in GRAPH.blocks if tensor > 1 else ():
        chosen.update(dict.fromkeys(block.columns, "column") | dict.fromkeys(block.rows, "row"))
    return chosen


def stages_of(counts: list[int], recompute: str) -> tuple[Stage, ...]:
    blocks = transformer_blocks(GRAPH)
    made = []
    start = taken = 0
    for position, count in enumerate(counts):
        taken += count
        stop = len(GRAPH.layers) if position == len(counts) - 1 else blocks[taken]
        own = tuple(block for block in blocks if start <= block < stop)
        full = own if recompute == "full" else own[:1] if recompute == "first" else ()
        made.append(Stage(start=start, stop=stop, recompute=full,
                          recompute_attention=own if recompute == "selective" else ()))  # fmt: skip
        start = stop
    return tuple(made)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    pipeline = draw(st.sampled_from([1, 2, 4]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    tensor, data, context = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    count = pipeline * virtual
    if draw(st.booleans()):
        counts = [LAYERS // count] * count
    else:
        cuts = sorted(draw(st.sets(st.integers(1, LAYERS - 1), min_size=count - 1, max_size=count - 1)))
        counts = [stop - start for start, stop in zip([0, *cuts], [*cuts, LAYERS], strict=True)]
    micro, micros = draw(st.integers(1, 4)), draw(st.integers(1, 3)) * pipeline
    plan = Plan(
        model=GRAPH.name,
        devices=tuple(f"gpu{at}" for at in range(pipeline * tensor * data * context)),
        global_batch=micro * micros * data,
        micro_batch=micro,
        stages=stages_of(counts, draw(st.sampled_from(["none", "full", "first", "selective"]))),
        data=data, tensor=tensor, pipeline=pipeline, context=context,
        schedule="none" if pipeline == 1 else "interleaved" if virtual > 1 else "1f1b",
        zero_stage=draw(st.sampled_from([0, 1, 2, 3])) if data * context > 1 else 0,
        tensor_sharding=sharding(tensor),
        sequence_parallel=tensor > 1 and draw(st.booleans()),
        precision=draw(st.sampled_from(["float32", "bfloat16", "float16", "float8", "float4"])),
        optimizer_on=draw(st.sampled_from(["device", "host"])),
        overlap=draw(st.booleans()),
    )  # fmt: skip
    return plan.validate(GRAPH)


@settings(max_examples=150, deadline=None)
@given(plans())
def test_what_megatron_is_told_reads_back_as_the_same_plan(plan: Plan) -> None:
    flags = export(plan, GRAPH, "megatron").flags
    read = read_megatron(f"{MODEL_FLAGS} {' '.join(flags)}")
    assert read.shape == msgspec.structs.replace(SHAPE.completed(), ffn=1024)
    back = read.plan(GRAPH, plan.devices)
    # The bucket only matters, and is only said, where gradients are reduced beside backward without ZeRO.
    same = {"bucket_bytes": plan.bucket_bytes}
    if plan.data * plan.context == 1:
        same["overlap"] = plan.overlap
    assert msgspec.structs.replace(back, **same) == plan


@settings(max_examples=100, deadline=None)
@given(plans())
def test_deepspeed_says_a_plan_or_refuses_the_field_that_it_cannot(plan: Plan) -> None:
    try:
        text = export(plan, GRAPH, "deepspeed").files["deepspeed.json"]
    except PlanError as error:
        field = error.place.removeprefix("plan: ").split(".")[0]
        assert getattr(plan, field) != getattr(
            Plan(model="", devices=(), global_batch=1, micro_batch=1, stages=()), field
        )
        return
    back = read_deepspeed(text).plan(GRAPH, plan.devices)
    assert msgspec.structs.replace(back, bucket_bytes=plan.bucket_bytes) == plan


def test_uneven_stages_become_a_layout_that_counts_every_layer() -> None:
    plan = Plan(
        model=GRAPH.name, devices=("a", "b", "c"), global_batch=3, micro_batch=1, pipeline=3, schedule="1f1b",
        stages=stages_of([2, 4, 2], "none"),
    )  # fmt: skip
    flags = export(plan, GRAPH, "megatron").flags
    assert flags[flags.index("--pipeline-model-parallel-layout") + 1] == "Ett|tttt|ttL"


BASE = Plan(
    model=GRAPH.name, devices=tuple("abcd"), global_batch=8, micro_batch=1, data=2, tensor=2,
    stages=stages_of([LAYERS], "none"), tensor_sharding=sharding(2), zero_stage=3, precision="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("framework", "field", "changes"),
    [
        ("megatron", "collectives", {"collectives": {"data": "ring"}}),
        ("megatron", "exchange", {"exchange": "headway"}),
        ("megatron", "shares", {"shares": (5, 3)}),
        ("megatron", "stages", {"stages": (Stage(start=0, stop=10, data=1, tensor=4),)}),
        ("torchtitan", "zero_stage", {"zero_stage": 1}),
        ("torchtitan", "precision", {"precision": "float16"}),
        ("fsdp", "zero_stage", {"zero_stage": 1}),
        ("fsdp", "optimizer_on", {"optimizer_on": "host"}),
        ("accelerate", "tensor", {"zero_stage": 2}),
        ("deepspeed", "precision", {"precision": "float8"}),
        ("deepspeed", "stages.recompute", {"stages": stages_of([LAYERS], "full")}),
        ("torchtitan", "stages.recompute", {"stages": stages_of([LAYERS], "first")}),
    ],
)
def test_what_cannot_be_said_is_refused_by_framework_and_field(framework: str, field: str, changes: Any) -> None:
    with pytest.raises(PlanError, match=f"{framework} cannot say") as caught:
        export(msgspec.structs.replace(BASE, **changes), GRAPH, framework)
    assert caught.value.place == f"plan: {field}"


def test_the_best_plan_that_can_be_said_is_said_and_those_before_it_are_named() -> None:
    unsayable = msgspec.structs.replace(BASE, zero_stage=1)
    said = say_first([unsayable, BASE], GRAPH, "torchtitan")
    assert said.files == export(BASE, GRAPH, "torchtitan").files
    assert said.notes[0].startswith("this is plan 2 of the table")
    assert "ZeRO-1" in said.notes[1]
    with pytest.raises(PlanError, match="ZeRO-1"):
        say_first([unsayable, unsayable], GRAPH, "torchtitan")


def test_an_unknown_framework_is_refused_with_those_there_are() -> None:
    with pytest.raises(FieldError, match="megatron"):
        export(BASE, GRAPH, "horovod")


# ------------------------------------------------------------------------------------------ frameworks that are here


def peer(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed, so its own reader cannot be asked")


def test_accelerate_reads_its_own_file(tmp_path: Path) -> None:
    peer("accelerate")
    reader = importlib.import_module("accelerate.commands.config.config_args")
    for zero, tensor in ((0, 1), (1, 1), (2, 1), (3, 1), (3, 2)):
        plan = msgspec.structs.replace(
            BASE, zero_stage=zero, tensor=tensor, data=4 // tensor, tensor_sharding=sharding(tensor)
        )
        path = tmp_path / "accelerate.yaml"
        path.write_text(export(plan, GRAPH, "accelerate").files["accelerate.yaml"])
        read = reader.ClusterConfig.from_yaml_file(str(path))
        assert read.num_processes == 4
        launch = importlib.import_module("accelerate.commands.launch").launch_command_parser()
        known = {option for action in launch._actions for option in action.option_strings}
        for section in (read.fsdp_config, read.parallelism_config):
            assert {f"--{name}" for name in section} <= known


def test_deepspeed_accepts_its_own_section() -> None:
    peer("deepspeed")
    zero = importlib.import_module("deepspeed.runtime.zero.config")
    plan = msgspec.structs.replace(BASE, optimizer_on="host", parameters_on="host")
    section = json.loads(export(plan, GRAPH, "deepspeed").files["deepspeed.json"])["zero_optimization"]
    read = zero.DeepSpeedZeroConfig(**section)
    assert read.stage == 3
    assert read.offload_param.device == "cpu"


def test_torchtitan_has_every_field_that_is_set() -> None:
    peer("torchtitan")
    configs = importlib.import_module("torchtitan.config.configs")
    text = export(BASE, GRAPH, "torchtitan").files["headway_plan.py"]
    space: dict[str, Any] = {}
    exec(text, space)

    class Config:
        training = configs.TrainingConfig()
        parallelism = configs.ParallelismConfig()
        activation_checkpoint = None

    made = space["apply"](Config())  # dataclasses with slots refuse what they do not have
    assert made.parallelism.data_parallel_shard_degree == 2
    assert made.training.local_batch_size == 1


def test_megatron_reads_the_layout() -> None:
    peer("megatron.core")
    layout = importlib.import_module("megatron.core.transformer.pipeline_parallel_layer_layout")
    plan = Plan(
        model=GRAPH.name, devices=("a", "b", "c"), global_batch=3, micro_batch=1, pipeline=3, schedule="1f1b",
        stages=stages_of([2, 4, 2], "none"),
    )  # fmt: skip
    flags = export(plan, GRAPH, "megatron").flags
    said = flags[flags.index("--pipeline-model-parallel-layout") + 1]
    read = layout.PipelineParallelLayerLayout(said, 3)
    read.validate_layer_layout(LAYERS, 0)
    kinds = [[kind.name for (stage,) in (row,) for kind in stage] for row in read.layout]
    assert [row.count("decoder") for row in kinds] == [2, 4, 2]


FSDP_RANK = textwrap.dedent("""
    import sys, importlib.util
    import torch, torch.distributed as dist
    from torch import nn

    rank, store, plan = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    specification = importlib.util.spec_from_file_location("headway_plan", plan)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    def loss_of(model):
        return model(torch.ones(2, 8)).square().sum()

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    alone = loss_of(model); alone.backward()
    expected = model[0].up.weight.grad.clone()
    model.zero_grad()
    model = module.parallelise(model, device_type="cpu")
    loss = loss_of(model); loss.backward()
    gradient = next(p for n, p in model.named_parameters() if n.startswith("0.") and n.endswith("up.weight")).grad
    assert abs(float(loss) - float(alone)) < 1e-4, (float(loss), float(alone))
    assert torch.allclose(gradient.full_tensor(), expected, atol=1e-4)
    dist.barrier()
    import os; os._exit(0)
""")


@pytest.mark.processes
def test_the_file_for_plain_pytorch_trains_as_one_process_does(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from headway.workload.trace import trace

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    graph = trace(nn.Sequential(Block(), Block()), torch.ones(2, 8), name="blocks", loss=lambda out: out.square().sum())
    names: dict[str, Any] = {}
    for block in graph.blocks:
        names.update(dict.fromkeys(block.columns, "column") | dict.fromkeys(block.rows, "row"))
    plan = Plan(
        model=graph.name, devices=tuple("abcd"), global_batch=4, micro_batch=2, data=2, tensor=2, zero_stage=3,
        stages=(Stage(start=0, stop=len(graph.layers), recompute=(0,)),), tensor_sharding=names,
    ).validate(graph)  # fmt: skip
    ((name, text),) = export(plan, graph, "fsdp").files.items()
    (tmp_path / name).write_text(text)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FSDP_RANK, str(rank), str(tmp_path / "store"), str(tmp_path / name)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
