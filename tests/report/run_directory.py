"""A run directory made of small synthetic values: four ranks in two pipeline stages of two replicas."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import msgspec

from headway.hardware.cluster import Accelerator, Cluster, Device, Link
from headway.plan.plan import Plan, Stage
from headway.predict.prediction import Memory, Prediction, StepTime
from headway.search.ranking import Candidate, Ranking, Rejected
from headway.timeline import Span, Timeline
from headway.workload.graph import Affine, Graph, Layer, Parameter, TensorKind, Workload

RANKS, STEPS, MICRO_BATCHES = 4, 240, 4

PREDICTED = StepTime(
    step_seconds=0.412,
    compute_seconds=0.301,
    communication_seconds=0.035,
    bubble_seconds=0.058,
    optimizer_seconds=0.018,
)
MEASURED = StepTime(
    step_seconds=0.438,
    compute_seconds=0.312,
    communication_seconds=0.041,
    bubble_seconds=0.064,
    optimizer_seconds=0.021,
)


def synthetic_memory(rank: int) -> Memory:
    first = rank < 2
    return Memory(
        parameters_bytes=3.6e7 if first else 3.4e7,
        gradients_bytes=3.6e7 if first else 3.4e7,
        optimizer_bytes=3.6e7 if first else 3.4e7,
        activations_bytes=9.1e7 if first else 5.2e7,
        communication_bytes=1.2e7,
        workspace_bytes=8e6,
    )


def synthetic_peaks() -> list[float]:
    return [synthetic_memory(rank).total_bytes * (1.02 + 0.01 * rank) for rank in range(RANKS)]


def synthetic_plan() -> Plan:
    return Plan(
        model="Synthetic GPT",
        devices=tuple(f"core {rank}" for rank in range(RANKS)),
        global_batch=32,
        micro_batch=4,
        stages=(Stage(start=0, stop=4, recompute=(1, 2)), Stage(start=4, stop=8)),
        data=2,
        pipeline=2,
        schedule="1f1b",
        zero_stage=1,
    )


def synthetic_prediction(slower: float = 1.0) -> Prediction:
    time = StepTime(
        step_seconds=PREDICTED.step_seconds * slower,
        compute_seconds=PREDICTED.compute_seconds * slower,
        communication_seconds=PREDICTED.communication_seconds * slower,
        bubble_seconds=PREDICTED.bubble_seconds * slower,
        optimizer_seconds=PREDICTED.optimizer_seconds * slower,
    )
    return Prediction(
        time=time,
        memory=tuple(synthetic_memory(rank) for rank in range(RANKS)),
        samples_per_second=32 / time.step_seconds,
        tokens_per_second=32 * 128 / time.step_seconds,
        mfu=0.43,
        bound="compute of stage 0",
    )


def synthetic_cluster() -> Cluster:
    links = tuple(
        Link(
            source=f"core {a}",
            target=f"core {b}",
            bytes_per_second=2.1e9,
            latency_seconds=35e-6,
            kind="shared memory",
        )
        for a in range(RANKS)
        for b in range(RANKS)
        if a != b
    )
    core = Accelerator(
        name="synthetic core",
        flop_per_second={"float32": 5.6e10, "bfloat16": 2.4e10},
        memory_bytes=3.2e8,
        memory_bytes_per_second=1.1e10,
        torch_device="cpu",
        threads=1,
        source="made up for a test",
    )
    return Cluster(
        name="synthetic machine",
        accelerators={core.name: core},
        devices=tuple(Device(name=f"core {rank}", accelerator=core.name, node="node 0") for rank in range(RANKS)),
        links=links,
        fingerprint="synthetic",
        collective_latency_seconds=60e-6,
        contention=1.1,
    )


def synthetic_workload(name: str = "Synthetic GPT") -> Workload:
    hidden = TensorKind(fixed=(0, 128, 256), per_sample=(1, 0, 0), dtype="float32")
    names = ["embedding", *(f"blocks.{block}" for block in range(6)), "head"]
    parameters, layers = [], []
    for position, layer in enumerate(names):
        block = layer.startswith("blocks")
        shape = (256, 3072) if block else (256, 256)
        parameters.append(Parameter(name=f"{layer}.weight", shape=shape, dtype="float32", layer=position))
        layers.append(
            Layer(
                name=layer,
                entry_module=layer if position else "",
                entry_argument=0,
                forward=(),
                backward=(),
                parameters=(f"{layer}.weight",),
                forward_flop=Affine(per_sample=2.0e8 if block else 1.7e7),
                backward_flop=Affine(per_sample=4.0e8 if block else 3.4e7),
                saved=Affine(per_sample=1.9e6 if block else 3.0e5),
                saved_sharded=Affine(),
                output=hidden,
                input=hidden if position else None,
                signature="block" if block else layer,
            )
        )
    graph = Graph(
        name=name,
        operators=(),
        layers=tuple(layers),
        parameters=tuple(parameters),
        units=(),
        inputs=(TensorKind(fixed=(0, 128), per_sample=(1, 0), dtype="int64"),),
        tokens_per_sample=128,
    )
    return Workload(graph=graph, global_batch=32)


def synthetic_timeline(
    name: str, *, first_step: int = 0, steps: int = 1, scale: float = 1.0, seed: int = 0
) -> Timeline:
    """1F1B on two stages and two replicas, with durations drawn around 20 ms forward and 40 ms backward."""
    rng = random.Random(seed)
    spans: list[Span] = []
    begin = 0.0
    for step in range(first_step, first_step + steps):
        end = begin
        for replica in range(2):
            lanes = [f"rank {replica}", f"rank {2 + replica}"]
            clock = [begin, begin]
            forward_done: dict[int, float] = {}
            backward_done: dict[int, float] = {}
            order = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]

            def put(stage: int, kind: str, micro: int, ready: float, duration: float, at=clock, on=lanes, step=step):
                start = max(at[stage], ready)
                duration *= scale * rng.uniform(0.96, 1.05)
                at[stage] = start + duration
                detail: dict[str, str | int | float] = {"step": step, "micro_batch": micro}
                spans.append(
                    Span(
                        name=f"{kind} {micro}",
                        lane=f"{on[stage]}/compute",
                        start_seconds=start,
                        duration_seconds=duration,
                        kind=kind,
                        detail=detail,
                    )
                )
                spans.append(
                    Span(
                        name=f"send {kind} {micro}",
                        lane=f"{on[stage]}/communication",
                        start_seconds=start + duration,
                        duration_seconds=0.003 * scale,
                        kind="communication",
                        detail=detail,
                    )
                )
                return start + duration + 0.003 * scale

            for micro in (0, 1):
                forward_done[micro] = put(0, "forward", micro, 0.0, 0.02)
            for micro in range(MICRO_BATCHES):
                ready = put(1, "forward", micro, forward_done[micro], 0.02)
                backward_done[micro] = put(1, "backward", micro, ready, 0.04)
                put(0, "backward", micro, backward_done[micro], 0.045)
                if micro + 2 < MICRO_BATCHES:
                    forward_done[micro + 2] = put(0, "forward", micro + 2, 0.0, 0.02)
            assert len(order) == 2 * MICRO_BATCHES
            finished = max(clock)
            for stage in (0, 1):
                for kind, duration, lane in (
                    ("communication", 0.03, "communication"),
                    ("optimizer", 0.02, "compute"),
                ):
                    spans.append(
                        Span(
                            name="all-reduce gradients" if kind == "communication" else "optimizer step",
                            lane=f"{lanes[stage]}/{lane}",
                            start_seconds=finished + (0.0 if kind == "communication" else 0.03 * scale),
                            duration_seconds=duration * scale,
                            kind=kind,
                            detail={"step": step},
                        )
                    )
            end = max(end, finished + 0.05 * scale)
        begin = end
    return Timeline(name=name, spans=tuple(spans))


def synthetic_metrics(steps: int = STEPS, seed: int = 1) -> list[dict[str, float | int]]:
    rng = random.Random(seed)
    lines, elapsed = [], 0.0
    for step in range(1, steps + 1):
        seconds = MEASURED.step_seconds * rng.uniform(0.95, 1.08) * (1.6 if step == 1 else 1.0)
        elapsed += seconds
        loss = 2.1 + 3.4 * math.exp(-step / 40) + rng.gauss(0, 0.06)
        lines.append(
            {
                "step": step,
                "loss": loss,
                "seconds": seconds,
                "samples": 32,
                "tokens_per_second": 32 * 128 / seconds,
                "time": elapsed,
            }
        )
    return lines


def write_synthetic_run(directory: Path, *, model: str = "Synthetic GPT") -> Path:
    """Fill a directory with all that a finished run leaves (but for the checkpoint)."""
    directory.mkdir(parents=True, exist_ok=True)
    plan, prediction = synthetic_plan(), synthetic_prediction()
    plan.save(directory / "plan.json")
    prediction.save(directory / "prediction.json")
    synthetic_cluster().save(directory / "cluster.json")
    synthetic_workload(model).save(directory / "workload.json")
    synthetic_timeline("measured", first_step=100, steps=3, scale=1.06).save_chrome(str(directory / "timeline.json"))
    synthetic_timeline("predicted", seed=2).save_chrome(str(directory / "predicted_timeline.json"))
    lines = synthetic_metrics()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    measured = {
        "time": MEASURED.to_builtins(),
        "peak_bytes": synthetic_peaks(),
        "steps": STEPS,
        "samples_per_second": 32 / MEASURED.step_seconds,
    }
    (directory / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    ranking = Ranking(
        goal="time",
        best=tuple(
            Candidate(plan=other, prediction=synthetic_prediction(slower))
            for other, slower in (
                (plan, 1.0),
                (msgspec.structs.replace(plan, zero_stage=0), 1.12),
                (msgspec.structs.replace(plan, schedule="gpipe"), 1.31),
            )
        ),
        rejected=(
            Rejected(
                summary="one device, 1 x 32",
                data=1,
                tensor=1,
                pipeline=1,
                kind="does not fit",
                reason="needs 512 MB on a device of 320 MB",
                excess_bytes=1.92e8,
            ),
            Rejected(
                summary="data 4, 2 x 4",
                data=4,
                tensor=1,
                pipeline=1,
                kind="slower",
                reason="1.8 times slower: communication takes 0.3 s a step",
                factor=1.8,
            ),
        ),
        totals={"does not fit": 41, "slower": 52},
        considered=96,
        evaluated=31,
        seconds=0.21,
    )
    ranking.save(directory / "ranking.json")
    record = {
        "script": "examples/gpt.py",
        "arguments": ["--steps", str(STEPS)],
        "engine": "local",
        "cluster": "local",
        "started": "2026-01-05T10:00:00+00:00",
        "finished": "2026-01-05T10:02:04+00:00",
        "outcome": "finished",
        "reference_loss": {"label": "byte-unigram entropy", "value": 3.05},
    }
    (directory / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return directory
