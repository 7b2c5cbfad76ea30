"""Checkpoints: what one plan writes any other reads, and what is written stays whole."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.errors import CheckpointError
from headway.train.checkpoint import latest, load, load_full, save, step_of
from headway.train.parallel import Parallel, parallelise

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case, cross_entropy, make_batch, make_model, make_optimizer, train_plainly
from test_parallel import Pools, graph_of, make_plan

PLANS: dict[str, dict[str, Any]] = {
    "one device": {},
    "ZeRO-1": {"data": 2, "zero_stage": 1},
    "ZeRO-3": {"data": 2, "zero_stage": 3},
    "tensor, ZeRO-3": {"data": 2, "tensor": 2, "zero_stage": 3},
    "tensor x pipeline": {"tensor": 2, "pipeline": 2, "schedule": "interleaved"},
    "pipeline, ZeRO-1": {"data": 2, "pipeline": 2, "schedule": "1f1b", "zero_stage": 1},
}


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.mark.processes
@pytest.mark.parametrize(("writer", "reader"), list(zip(PLANS, [*list(PLANS)[3:], *list(PLANS)[:3]], strict=True)))
def test_training_goes_on_under_another_plan_as_if_never_stopped(
    pools: Pools, tmp_path: Path, writer: str, reader: str
) -> None:
    graph = graph_of("gpt")
    pools.run(Case("gpt", make_plan("gpt", **PLANS[writer]), graph, steps=2, save=str(tmp_path)))
    path = latest(tmp_path)
    assert path == tmp_path / "step-2"
    assert step_of(path) == 2
    halfway = train_plainly(Case("gpt", None, steps=2)).parameters
    whole = load_full(path)
    for name, parameter in halfway.items():
        torch.testing.assert_close(whole[name], parameter, rtol=1e-9, atol=1e-9, msg=name)

    truth = train_plainly(Case("gpt", None, steps=4))
    plan = make_plan("gpt", **PLANS[reader])
    for outcome in pools.run(Case("gpt", plan, graph, steps=4, first_step=2, load=str(path))):
        torch.testing.assert_close(outcome.losses, truth.losses[2:], rtol=1e-9, atol=1e-9)
        for name, parameter in outcome.parameters.items():
            torch.testing.assert_close(parameter, truth.parameters[name], rtol=1e-9, atol=1e-9, msg=name)


def one_device(kind: str = "mlp", steps: int = 1) -> Parallel:
    model = make_model(kind)
    parallel = parallelise(model, make_optimizer("adamw", model), make_plan(kind), graph_of(kind), loss=cross_entropy)
    for step in range(steps):
        parallel.step([make_batch(kind, 2, step)] * 4)
    return parallel


def test_a_full_disk_leaves_the_checkpoints_before_it_whole(tmp_path: Path) -> None:
    parallel = one_device()
    before = save(tmp_path, parallel, step=1)
    content = {file.name: file.read_bytes() for file in before.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 4 kB: as on a full disk, a write fails in the middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            save(tmp_path, parallel, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-2" in caught.value.place
    assert latest(tmp_path) == before
    assert {file.name: file.read_bytes() for file in before.iterdir()} == content
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest"}


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, one_device(), step=1)
    path = save(tmp_path, one_device(steps=2), step=1)
    assert {each.name for each in tmp_path.iterdir()} == {"step-1", "latest"}
    assert step_of(path) == 1


def test_the_scheduler_and_its_learning_rate_come_back(tmp_path: Path) -> None:
    parallel = one_device()
    scheduler = torch.optim.lr_scheduler.StepLR(parallel.optimizer, step_size=1, gamma=0.5)
    parallel.optimizer.step()
    scheduler.step()
    path = save(tmp_path, parallel, step=1, scheduler=scheduler)
    again = one_device(steps=0)
    other = torch.optim.lr_scheduler.StepLR(again.optimizer, step_size=1, gamma=0.5)
    assert load(path, again, scheduler=other) == 1
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.005, 0.005]
    assert other.last_epoch == 1


def test_another_model_is_refused_with_the_name_of_what_differs(tmp_path: Path) -> None:
    path = save(tmp_path, one_device("mlp"), step=1)
    with pytest.raises(CheckpointError, match=r"holds no stem\.weight"):
        load(path, one_device("cnn"))


@pytest.mark.parametrize("damage", ["missing", "no metadata", "torn"])
def test_a_broken_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, one_device(), step=1)
    if damage == "missing":
        path = tmp_path / "step-9"
    elif damage == "no metadata":
        (path / ".metadata").unlink()
    else:
        (data,) = path.glob("*.distcp")
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError) as caught:
        load(path, one_device())
    assert str(path) in str(caught.value)
    assert caught.value.remedy
