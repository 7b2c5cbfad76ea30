"""Saved activations off the device between forward and backward: the same gradients, bit for bit."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import headway.train.activations as activations_module
from headway.memory.tiers import Store
from headway.plan.plan import Plan, Stage
from headway.train.activations import ActivationSwap
from headway.train.data import split_batch
from headway.train.parallel import Parallel, parallelise
from headway.workload.graph import Graph
from headway.workload.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case, Pool, cross_entropy, make_batch, make_model, make_optimizer


@cache
def graph_of(kind: str) -> Graph:
    inputs, targets = make_batch(kind, 2, 0)
    return trace(make_model(kind), inputs, name=kind, loss=cross_entropy, target=targets)


def make_plan(kind: str, *, recompute: Any = (), swap: Any = (), **fields: Any) -> Plan:
    graph = graph_of(kind)
    count = fields.get("pipeline", 1)
    edges = [round(number * len(graph.layers) / count) for number in range(count + 1)]
    if fields.get("tensor", 1) > 1:
        fields["tensor_sharding"] = {
            name: style
            for block in graph.blocks
            for style, names in (("column", block.columns), ("row", block.rows))
            for name in names
        }
    ranks = fields.get("data", 1) * fields.get("tensor", 1) * count
    return Plan(
        model=kind,
        devices=tuple(f"device {rank}" for rank in range(ranks)),
        stages=tuple(
            Stage(
                start=a, stop=b, recompute=tuple(at for at in recompute if a <= at < b),
                swap=tuple(at for at in swap if a <= at < b),
            )
            for a, b in itertools.pairwise(edges)
        ),
        **{"global_batch": 8, "micro_batch": 2, **fields},
    ).validate(graph)  # fmt: skip


@pytest.fixture(autouse=True)
def everything_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_TIER_DIRECTORY", str(tmp_path))

    class Smallest(ActivationSwap):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, smallest_bytes=1, **options)

    monkeypatch.setattr(activations_module, "ActivationSwap", Smallest)


def prepare(kind: str, **fields: Any) -> Parallel:
    model = make_model(kind)
    optimizer = make_optimizer("adamw", model)
    return parallelise(model, optimizer, make_plan(kind, **fields), graph_of(kind), loss=cross_entropy, clip_norm=0.5)


def train(parallel: Parallel, kind: str, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(steps):
        loss = parallel.step(split_batch(make_batch(kind, 8, step), parallel.plan.micro_batches))
        assert loss is not None
        losses.append(loss.item())
    with parallel.present():
        return losses, {name: parameter.detach().clone() for name, parameter in parallel.parameters()}


WAYS: dict[str, dict[str, Any]] = {
    "host": {"activations_on": "host"},
    "disk": {"activations_on": "disk"},
    "checkpoints": {"activations_on": "disk", "recompute": (1, 2)},
    "some layers": {"activations_on": "host", "swap": (1,), "recompute": (2,)},
    "parameters too": {"activations_on": "disk", "parameters_on": "disk", "recompute": (1,)},
}


@pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt"])
def test_training_is_bit_for_bit_that_with_activations_on_the_device(kind: str, fields: dict[str, Any]) -> None:
    swapped = prepare(kind, **fields)
    losses, parameters = train(swapped, kind)
    same = {key: value for key, value in fields.items() if key == "recompute"}
    expected, truth = train(prepare(kind, **same), kind)
    assert losses == expected
    assert all(torch.equal(parameter, truth[name]) for name, parameter in parameters.items())
    swap = swapped.pieces[0].swap
    assert swap is not None
    assert swap.traffic.out_bytes > 0
    swapped.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.processes
@pytest.mark.parametrize(
    "fields",
    [{"pipeline": 2, "schedule": "1f1b"}, {"tensor": 2}, {"data": 2, "zero_stage": 3, "recompute": (1, 2)}],
    ids=["pipeline", "tensor", "ZeRO-3"],
)
def test_divided_models_train_the_same_too(pool: Pool, fields: dict[str, Any]) -> None:
    graph = graph_of("gpt")
    there = pool.run(Case("gpt", make_plan("gpt", activations_on="host", **fields), graph, steps=2))
    here = pool.run(Case("gpt", make_plan("gpt", **fields), graph, steps=2))
    for one, other in zip(there, here, strict=True):
        assert one.losses == other.losses
        assert all(torch.equal(parameter, other.parameters[name]) for name, parameter in one.parameters.items())


def test_parameters_are_never_copied_not_even_their_casts() -> None:
    graph = graph_of("gpt")
    model = make_model("gpt", torch.float32)
    written: list[int] = []

    class Watching(Store):
        def write(self, name: str, tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            written.append(tensor.numel())
            return super().write(name, tensor, *arguments, **options)

    plan = make_plan("gpt", activations_on="host", precision="bfloat16")
    parallel = parallelise(model, make_optimizer("sgd", model), plan, graph, loss=cross_entropy, store=Watching())
    parallel.step(split_batch(make_batch("gpt", 8, 0), 4))
    # In bfloat16: 16 x 16 of attention, 16 x 64 of the two layers after it. No activation is of these sizes.
    assert written
    assert not set(written) & {2 * 16 * 16, 2 * 16 * 64}
    parallel.close()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_device_holds_a_few_layers_in_place_of_all() -> None:
    graph = trace(Wide(), torch.randn(2, 64), name="wide", loss=nn.functional.mse_loss, target=torch.randn(2, 64))
    stages = (Stage(start=0, stop=len(graph.layers)),)
    samples, held = 4096, {}
    for tier in ("device", "disk"):
        model = Wide()
        plan = Plan(model="wide", devices=("d",), global_batch=samples, micro_batch=samples, stages=stages,
                    activations_on=tier)  # type: ignore[arg-type]  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parallel = parallelise(model, optimizer, plan, graph, loss=nn.functional.mse_loss)
        for piece in parallel.pieces:
            if piece.swap is not None:
                piece.swap.in_flight_bytes = 4 * 2**20
        batch = [(torch.randn(samples, 64), torch.randn(samples, 64))]
        made: list[StorageWeakRef] = []
        alive: list[int] = []
        for module in model.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(
                    lambda _module, _inputs, output, made=made: made.append(StorageWeakRef(output.untyped_storage()))
                )
        model.blocks[-1].register_forward_hook(
            lambda *_, made=made, alive=alive: alive.append(sum(not each.expired() for each in made))
        )
        parallel.step(batch)
        held[tier] = alive[0]
        parallel.close()
    # A storage is 1 MiB: of each block, what tanh and the second layer return is saved.
    assert held["device"] == 24
    assert held["disk"] <= 4 + 4


def test_what_a_forward_pass_without_backward_saved_is_forgotten() -> None:
    parallel = prepare("mlp", activations_on="host")
    store = parallel.store
    assert store is not None
    module = parallel.pieces[0].module
    counts = []
    for _ in range(3):
        module.micro_batches = [make_batch("mlp", 8, 0)]
        module(index=torch.tensor([0]))
        gc.collect()
        counts.append(len(store.names()))
    assert counts[0] == counts[1] == counts[2]
    parallel.close()


def test_backward_twice_through_the_same_graph_reads_twice() -> None:
    parallel = prepare("mlp", activations_on="disk")
    module = parallel.pieces[0].module
    module.micro_batches = [make_batch("mlp", 8, 0)]
    loss = module(index=torch.tensor([0]))
    loss.backward(retain_graph=True)
    once = {name: parameter.grad.clone() for name, parameter in parallel.parameters() if parameter.grad is not None}
    loss.backward()
    assert once
    assert all(
        torch.equal(parameter.grad, 2 * once[name])
        for name, parameter in parallel.parameters()
        if parameter.grad is not None
    )
    parallel.close()


def test_all_layers_are_swapped_where_none_is_named() -> None:
    everything = make_plan("gpt", activations_on="host")
    assert everything.swapped_layers(everything.stages[0]) == tuple(range(len(graph_of("gpt").layers)))
    some = make_plan("gpt", activations_on="host", swap=(1, 3))
    assert some.swapped_layers(some.stages[0]) == (1, 3)
    none = make_plan("gpt")
    assert none.swapped_layers(none.stages[0]) == ()
