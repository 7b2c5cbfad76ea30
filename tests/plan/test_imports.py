"""Configurations of other frameworks read as plans; what is missing or unclear is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway.errors import FieldError, FileError, PlanError
from headway.plan.imports import read_configuration, read_deepspeed, read_megatron
from headway.workload.transformer import transformer

SCRIPT = """#!/bin/bash
# A script as people write them: variables, arrays, continued lines.
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=4
TP=4 # within a node
HIDDEN="2048"

MODEL_ARGS=(
    --num-layers 16
    --hidden-size $HIDDEN
    --num-attention-heads 16
    --group-query-attention --num-query-groups 4
    --seq-length=4096
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --normalization RMSNorm
    --attention-dropout 0.0 --hidden-dropout 0.0
)
torchrun --nproc-per-node $GPUS_PER_NODE --nnodes ${NNODES} pretrain_gpt.py ${MODEL_ARGS[@]} \\
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size 2 --sequence-parallel \\
    --num-layers-per-virtual-pipeline-stage 4 \\
    --micro-batch-size 1 --global-batch-size 128 --vocab-size 32000 \\
    --bf16 --use-distributed-optimizer --overlap-grad-reduce \\
    --recompute-activations --lr 3e-4 --tokenizer-type Llama2Tokenizer
"""


def test_a_megatron_script_with_variables_and_arrays_becomes_model_and_plan() -> None:
    read = read_megatron(SCRIPT)
    assert read.shape is not None
    assert (read.shape.layers, read.shape.hidden, read.shape.kv_heads, read.shape.sequence) == (16, 2048, 4, 4096)
    # Two thirds of 8192, down to a multiple of 64; the vocabulary up to a multiple of 128 x 4.
    assert (read.shape.ffn, read.shape.vocabulary) == (5440, 32256)
    assert (read.shape.gated, read.shape.biases, read.shape.tied, read.shape.dropout) == (True, False, False, False)
    assert (read.shape.positions, read.shape.norm, read.shape.attention) == ("rotary", "rms", "flash")
    assert read.world_size == 32
    plan = read.plan(transformer(read.shape), [f"gpu{at}" for at in range(64)])
    assert (plan.data, plan.tensor, plan.pipeline, plan.virtual_stages) == (4, 4, 2, 2)
    assert (plan.schedule, plan.zero_stage, plan.precision) == ("interleaved", 1, "bfloat16")
    assert plan.world_size == 32
    assert [len(stage.recompute_attention) for stage in plan.stages] == [4, 4, 4, 4]
    assert read.recipe.parameter_bytes == 2
    assert read.recipe.gradient_bytes == 4
    assert set(read.ignored) == {"--lr", "--tokenizer-type"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--num-layers 16", ""), "--num-layers"),
        (("--vocab-size 32000", ""), "vocabulary"),
        (("HIDDEN=", "HIDDEN_SIZE="), r"\$HIDDEN"),
        (("--micro-batch-size 1", "--micro-batch-size"), "--micro-batch-size"),
        (("--micro-batch-size 1", "--micro-batch-size one"), "'one'"),
        (("--swiglu", "--multi-latent-attention"), "latent attention"),
        (("--num-attention-heads 16", "--num-attention-heads 17"), "17 heads"),
        (("--bf16", "--bf16 '"), "quot"),
    ],
)
def test_what_is_missing_or_unreadable_in_a_command_is_named(change: tuple[str, str], said: str) -> None:
    assert change[0] in SCRIPT
    with pytest.raises(FieldError, match=said):
        read_megatron(SCRIPT.replace(*change), place="train.sh")


def test_the_vocabulary_can_be_given_beside_the_command() -> None:
    read = read_megatron(SCRIPT.replace("--vocab-size 32000", ""), vocabulary=50257)
    assert read.shape is not None
    assert read.shape.vocabulary == 50688


@pytest.mark.parametrize(
    ("layout", "blocks"),
    [("Ettt|tt|ttL", (3, 2, 2)), ("Et*3|(tt|)*1ttL", (3, 2, 2)), ("E|t*7|L", (0, 7, 0))],
)
def test_layouts_are_written_out(layout: str, blocks: tuple[int, ...]) -> None:
    command = (
        "--num-layers 7 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --vocab-size 128 "
        f"--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout '{layout}' --global-batch-size 4"
    )
    read = read_megatron(command)
    assert read.layout == blocks
    assert read.shape is not None
    plan = read.plan(transformer(read.shape), ["a", "b", "c"])
    assert plan.stages[-1].stop == 9


def test_uneven_ends_share_the_rest_evenly() -> None:
    command = (
        "--num-layers 10 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
        "--vocab-size 128 --pipeline-model-parallel-size 4 "
        "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3"
    )
    assert read_megatron(command).layout == (1, 3, 3, 3)
    with pytest.raises(FieldError, match="not even"):
        read_megatron(command.replace("first-pipeline-num-layers 1", "first-pipeline-num-layers 2"))


def test_too_few_devices_and_degrees_that_do_not_divide_are_refused() -> None:
    read = read_megatron(SCRIPT)
    assert read.shape is not None
    graph = transformer(read.shape)
    with pytest.raises(PlanError, match="32 ranks"):
        read.plan(graph, ["a"] * 8)
    eleven = read_megatron(SCRIPT.replace("NNODES=4", "NNODES=").replace("GPUS_PER_NODE=8", "GPUS_PER_NODE=11")
                           .replace("--nnodes ${NNODES}", ""))  # fmt: skip
    with pytest.raises(PlanError, match="does not divide 11"):
        eleven.plan(graph, [f"gpu{at}" for at in range(64)])


CONFIG = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}, "reduce_bucket_size": 1000},
    "bf16": {"enabled": True},
    "steps_per_print": 10,
}


def test_a_deepspeed_file_is_read_without_its_model(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    read = read_configuration(path)
    assert (read.source, read.shape, read.zero_stage) == ("deepspeed", None, 3)
    assert (read.optimizer_on, read.parameters_on, read.bucket_bytes) == ("disk", "device", 2000)
    assert read.ignored == ("steps_per_print",)
    graph = transformer(read_megatron(SCRIPT).shape)  # type: ignore[arg-type]
    plan = read.plan(graph, [f"gpu{at}" for at in range(8)])
    assert (plan.data, plan.micro_batches, plan.micro_batch) == (8, 2, 4)
    with pytest.raises(PlanError, match="64 samples are not 2 micro-batches of 4 on 16"):
        read.plan(graph, [f"gpu{at}" for at in range(16)])


@pytest.mark.parametrize(("steps", "micro_batch"), [(0, 8), (2, 4)])
def test_a_micro_batch_that_deepspeed_would_derive_is_derived(steps: int, micro_batch: int) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "train_micro_batch_size_per_gpu"}
    text = json.dumps({**config, "train_batch_size": 32, "gradient_accumulation_steps": steps})
    graph = transformer(read_megatron(SCRIPT).shape)  # type: ignore[arg-type]
    plan = read_deepspeed(text).plan(graph, [f"gpu{number}" for number in range(4)])
    assert (plan.micro_batch, plan.data, plan.global_batch) == (micro_batch, 4, 32)
    with pytest.raises(PlanError, match="32 samples are not"):
        read_deepspeed(text).plan(graph, [f"gpu{number}" for number in range(3)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu"),
        ({"train_batch_size": "many"}, "train_batch_size"),
        ({"train_batch_size": True}, "train_batch_size"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"zero_optimization": {"stage": 4}}, "stage"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}, "tape"),
        ({"bf16": {"enabled": "auto"}}, "bf16.enabled"),
    ],
)
def test_keys_that_mean_nothing_are_named(change: dict, said: str) -> None:
    with pytest.raises(FieldError) as caught:
        read_deepspeed(json.dumps({**CONFIG, **change}))
    assert said in f"{caught.value.place} {caught.value.message}"


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_files_that_are_no_configuration_are_refused(text: str) -> None:
    with pytest.raises(FieldError):
        read_deepspeed(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        read_configuration(tmp_path / "nowhere.sh")
