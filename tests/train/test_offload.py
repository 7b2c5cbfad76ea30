"""An optimizer off the device changes where a model's states are, never what is learned (ZeRO-Offload, ATC 2021)."""

from __future__ import annotations

import copy
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import PlanError
from headway.memory.tiers import Store
from headway.plan.plan import Plan, single_device_plan
from headway.train import offload_lanes, offload_setup
from headway.train.checkpoint import latest, load, load_full, save
from headway.train.offload import OffloadedOptimizer, Share
from headway.train.offload_lanes import Lane, Returning
from headway.train.parallel import Parallel, parallelise
from headway.workload.graph import Graph
from headway.workload.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case, Outcome, cross_entropy, make_batch, make_model, make_optimizer, train_under_plan
from test_parallel import Pools, make_plan


@pytest.fixture(autouse=True)
def _tier_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_TIER_DIRECTORY", str(tmp_path / "tiers"))


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_TIER_DIRECTORY", str(tmp_path_factory.mktemp("tiers")))
        pools = Pools()
        yield pools
        pools.close()


@cache
def graph_of(kind: str) -> Graph:
    inputs, targets = make_batch(kind, 2, 0)
    inputs = inputs.float() if inputs.is_floating_point() else inputs
    return trace(make_model(kind, torch.float32), inputs, name=kind, loss=cross_entropy, target=targets)


def case(fields: dict[str, Any], **others: Any) -> Case:
    return Case("gpt", make_plan("gpt", **fields), graph_of("gpt"), dtype=torch.float32, **others)


def assert_same(outcome: Outcome, reference: Outcome) -> None:
    assert outcome.losses == reference.losses
    assert outcome.parameters.keys() == reference.parameters.keys()
    for name, parameter in reference.parameters.items():
        assert torch.equal(outcome.parameters[name], parameter), name


def train(fields: dict[str, Any], *, staged: bool | None = None, **others: Any) -> Outcome:
    """On this rank; `staged` as on a device with memory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        rest = functools.partial(offload_setup.rest_optimizer, staged=staged)
        patch.setattr(offload_setup, "rest_optimizer", rest)
        return train_under_plan(case(fields, **others))


TIERS: list[dict[str, Any]] = [
    {"optimizer_on": "host"},
    {"optimizer_on": "host", "optimizer_kept": 0.3},
    {"optimizer_on": "host", "optimizer_kept": 1.0},
    {"optimizer_on": "disk"},
]


@pytest.mark.parametrize(
    ("micro_batch", "clip_norm", "optimizer", "staged"),
    [(8, None, "adamw", False), (8, None, "sgd", True), (8, 0.5, "adamw", True), (2, 0.5, "sgd", True)],
)
def test_training_is_bit_for_bit_that_of_an_optimizer_on_the_device(
    micro_batch: int, clip_norm: float | None, optimizer: str, staged: bool
) -> None:
    others: dict[str, Any] = {"clip_norm": clip_norm, "optimizer": optimizer}
    reference = train({"micro_batch": micro_batch}, **others)
    for tier in TIERS:
        assert_same(train({"micro_batch": micro_batch, **tier}, staged=staged, **others), reference)


@pytest.mark.parametrize(
    ("micro_batch", "clip_norm", "staged"), [(8, None, True), (8, 0.5, False), (2, 0.5, False), (2, 0.5, True)]
)
def test_bfloat16_on_the_device_with_float32_masters_is_the_same_wherever_they_are(
    micro_batch: int, clip_norm: float | None, staged: bool
) -> None:
    fields = {"micro_batch": micro_batch, "precision": "bfloat16"}
    # The same scheme with nothing off the device, updated by torch's own optimizer.
    reference = train({**fields, "optimizer_on": "host", "optimizer_kept": 1.0}, staged=staged, clip_norm=clip_norm)
    assert all(parameter.dtype == torch.bfloat16 for parameter in reference.parameters.values())
    for tier in (TIERS[0], TIERS[1], TIERS[3]):
        assert_same(train({**fields, **tier}, staged=staged, clip_norm=clip_norm), reference)


def test_bfloat16_learns_what_autocast_over_float32_parameters_learns() -> None:
    fields = {"precision": "bfloat16"}
    autocast, ours = train(fields, clip_norm=None), train({**fields, "optimizer_on": "host"}, clip_norm=None)
    assert ours.losses != autocast.losses
    torch.testing.assert_close(ours.losses, autocast.losses, rtol=5e-3, atol=0)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_short_moments_learn_nearly_the_same(moments: str) -> None:
    reference = train({}, clip_norm=None)
    for tier in ("host", "disk"):
        outcome = train({"optimizer_on": tier, "moments": moments}, clip_norm=None)
        assert outcome.losses != reference.losses
        torch.testing.assert_close(outcome.losses, reference.losses, rtol=1e-2, atol=0)


COMBINATIONS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"data": 2},
    "ZeRO-1": {"data": 2, "zero_stage": 1, "micro_batch": 4},
    "ZeRO-2": {"data": 2, "zero_stage": 2, "micro_batch": 4},
    "ZeRO-3": {"data": 2, "zero_stage": 3, "bucket_bytes": 600},
    "pipeline with tied weights": {"pipeline": 2, "schedule": "1f1b"},
    "data x tensor": {"data": 2, "tensor": 2, "bucket_bytes": 600},
    "data x tensor, ZeRO-3": {"data": 2, "tensor": 2, "zero_stage": 3, "micro_batch": 4},
    "data x pipeline, ZeRO-1": {"data": 2, "pipeline": 2, "schedule": "1f1b", "zero_stage": 1},
    "tensor x interleaved": {"tensor": 2, "pipeline": 2, "schedule": "interleaved"},
    "ZeRO-0, Headway's exchange": {"data": 2, "exchange": "headway", "bucket_bytes": 600},
}


@pytest.mark.processes
@pytest.mark.parametrize("fields", COMBINATIONS.values(), ids=COMBINATIONS.keys())
def test_every_way_to_divide_learns_bit_for_bit_the_same(pools: Pools, fields: dict[str, Any]) -> None:
    for clip_norm, tier in ((None, TIERS[1]), (0.5, TIERS[3])):
        references = pools.run(case(fields, clip_norm=clip_norm, steps=2))
        outcomes = pools.run(case({**fields, **tier}, clip_norm=clip_norm, steps=2))
        for outcome, reference in zip(outcomes, references, strict=True):
            assert_same(outcome, reference)


@pytest.mark.processes
def test_four_replicas_learn_what_an_all_reduce_teaches_but_for_the_order_of_its_sums(pools: Pools) -> None:
    # Two summands commute, more do not associate: a ring adds up each element beginning at another replica.
    fields = {"data": 4, "bucket_bytes": 600}
    references = pools.run(case(fields, clip_norm=0.5, optimizer="sgd"))
    outcomes = pools.run(case({**fields, **TIERS[1]}, clip_norm=0.5, optimizer="sgd"))
    for outcome, reference in zip(outcomes, references, strict=True):
        torch.testing.assert_close(outcome.losses, reference.losses, rtol=1e-6, atol=0)
        for name, parameter in reference.parameters.items():
            torch.testing.assert_close(outcome.parameters[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
            assert torch.equal(outcome.parameters[name], outcomes[0].parameters[name]), name


@pytest.mark.processes
@pytest.mark.parametrize("micro_batch", [4, 2])
def test_replicas_in_bfloat16_learn_the_same_whether_ddp_or_fully_shard_reduces_gradients(
    pools: Pools, micro_batch: int
) -> None:
    fields = {"data": 2, "micro_batch": micro_batch, "precision": "bfloat16", "optimizer_on": "host"}
    (first, *_), outcomes = (pools.run(case({**fields, "zero_stage": stage}, clip_norm=None)) for stage in (2, 0))
    if micro_batch == 4:
        assert_same(outcomes[0], first)
    for outcome in outcomes:
        assert_same(outcome, outcomes[0])
        # Several micro-batches are added up in bfloat16 by autograd, and in float32 by the host under ZeRO-2.
        torch.testing.assert_close(outcome.losses, first.losses, rtol=1e-3, atol=0)


@pytest.mark.processes
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_replicas_of_a_model_that_was_not_traced_learn_bit_for_bit_the_same(
    pools: Pools, clip_norm: float | None
) -> None:
    # DDP wraps it after the first backward pass, which reduces by hand.
    references, outcomes = (
        pools.run(Case("gpt", make_plan("gpt", data=2, **tier), dtype=torch.float32, clip_norm=clip_norm))
        for tier in ({}, TIERS[1])
    )
    for outcome, reference in zip(outcomes, references, strict=True):
        assert_same(outcome, reference)


def test_parameters_that_do_not_lie_row_after_row_are_updated_too() -> None:
    def losses(tier: str) -> list[float]:
        plan = make_plan("mlp", micro_batch=8, optimizer_on=tier)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(36, 2))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        parallel = parallelise(model, optimizer, plan, None, loss=torch.nn.functional.mse_loss)
        images = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
        found = [parallel.step([(images, torch.zeros(8, 2))]) for _ in range(3)]
        parallel.close()
        return [loss.item() for loss in found if loss is not None]

    torch.testing.assert_close(losses("host"), losses("device"), rtol=1e-5, atol=0)


# The one-step-delayed update (ZeRO-Offload, section 5.2)


def delayed_by_hand(steps: int, warmup: int, clip_norm: float | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Plain PyTorch: gradients from `model`, updates of `ahead`, which the model follows one step later."""
    model = make_model("gpt", torch.float32)
    ahead = copy.deepcopy(model)
    optimizer = make_optimizer("adamw", ahead)
    losses = []
    for step in range(steps):
        inputs, targets = make_batch("gpt", 8, step)
        loss = cross_entropy(model(inputs), targets)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if clip_norm is not None:
            square = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
            factor = torch.clamp(clip_norm / (square**0.5 + 1e-6), max=1.0)
            for parameter in model.parameters():
                parameter.grad.mul_(factor.float())  # type: ignore[union-attr]
        if step >= warmup:
            model.load_state_dict(ahead.state_dict())
        for theirs, mine in zip(model.parameters(), ahead.parameters(), strict=True):
            mine.grad = theirs.grad
        optimizer.step()
        if step < warmup:
            model.load_state_dict(ahead.state_dict())
    return losses, {name: parameter.detach() for name, parameter in ahead.named_parameters()}


@pytest.mark.parametrize(
    ("warmup", "clip_norm", "staged"), [(0, None, False), (0, None, True), (2, 0.5, False), (2, 0.5, True)]
)
def test_the_delayed_update_is_one_step_late_after_its_warm_up(
    warmup: int, clip_norm: float | None, staged: bool
) -> None:
    losses, parameters = delayed_by_hand(6, warmup, clip_norm)
    assert losses != train({"micro_batch": 8}, steps=6, clip_norm=clip_norm).losses
    for tier in ("host", "disk"):
        fields = {"micro_batch": 8, "optimizer_on": tier, "delayed_update": True, "delay_warmup": warmup}
        assert_same(train(fields, staged=staged, steps=6, clip_norm=clip_norm), Outcome(losses, parameters))


@pytest.mark.processes
def test_delayed_updates_of_several_replicas_are_those_of_one(pools: Pools) -> None:
    losses, _ = delayed_by_hand(5, 1, None)
    delay = {"delayed_update": True, "delay_warmup": 1, "optimizer_on": "host"}
    for fields in ({"data": 2, "micro_batch": 4}, {"data": 2, "micro_batch": 4, "zero_stage": 3}):
        for outcome in pools.run(case({**fields, **delay}, steps=5, clip_norm=None)):
            torch.testing.assert_close(outcome.losses, losses, rtol=1e-5, atol=0)


# Whole and part of a parameter


@settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4),
    kept=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    tier=st.sampled_from(["host", "disk"]),
    chunk=st.sampled_from([256, 1024]),
    staged=st.booleans(),
    kind=st.sampled_from(["adamw", "adam", "sgd", "nesterov"]),
)
def test_any_sizes_cut_anyhow_are_updated_as_by_torch(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    kept: float,
    tier: str,
    chunk: int,
    staged: bool,
    kind: str,
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    theirs = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    mine = [torch.nn.Parameter(each.detach().clone()) for each in theirs]
    reference, optimizer = make(kind, theirs), make(kind, mine)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    others = torch.optim.lr_scheduler.ExponentialLR(reference, 0.9)
    plan = single_device_plan("m", 1, 1, optimizer_on=tier, optimizer_kept=kept)
    shares = [Share(f"p{at}", each, 0, each.numel()) for at, each in enumerate(mine)]
    directory = tmp_path_factory.mktemp("store")
    with Store(directory=directory, buffer_bytes=2**20) as store:
        offload = OffloadedOptimizer(optimizer, shares, plan, store, device="cpu", staged=staged, chunk_elements=chunk)
        assert sum(each.kept for each in shares) <= kept * sum(sizes) + 0.5
        offload.watch()
        for _ in range(3):
            weights = [torch.randn(size, generator=generator) for size in sizes]
            reference.zero_grad()
            for parameters in (theirs, mine):
                sum((w * p).square().sum() for w, p in zip(weights, parameters)).backward()  # type: ignore[union-attr]
                if parameters is theirs:
                    offload.begin(1, hooked=True)
            offload.step()
            reference.step()
            optimizer._opt_called = True  # type: ignore[attr-defined]  # as `Parallel` does for schedulers
            for each in (scheduler, others):
                each.step()
        offload.settle()
        for share, expected in zip(shares, theirs):
            assert torch.equal(share.parameter, expected)
            assert torch.equal(offload.master_of(share), expected)
            for name in offload.moment_names(share):
                assert torch.equal(offload.moment_of(share, name), reference.state[expected][name])
        offload.close()


def make(kind: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if kind in ("adam", "adamw"):
        maker = torch.optim.Adam if kind == "adam" else torch.optim.AdamW
        return maker(parameters, lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=kind == "nesterov", weight_decay=0.1)


def test_an_optimizer_that_the_host_cannot_update_is_refused() -> None:
    model = make_model("gpt", torch.float32)
    optimizer = torch.optim.RMSprop(model.parameters())
    with pytest.raises(PlanError, match="RMSprop") as caught:
        parallelise(model, optimizer, make_plan("gpt", optimizer_on="host"), graph_of("gpt"), loss=cross_entropy)
    assert "optimizer_on" in caught.value.place


def test_a_parameter_in_double_precision_is_refused_before_training() -> None:
    model = make_model("gpt", torch.float64)
    plan = make_plan("gpt", optimizer_on="host")
    with pytest.raises(PlanError, match="float64"):
        parallelise(model, make_optimizer("adamw", model), plan, graph_of("gpt"), loss=cross_entropy)


def test_what_is_streamed_from_disk_never_takes_more_than_the_buffers(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(400_000))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    plan = single_device_plan("m", 1, 1, optimizer_on="disk")
    with Store(directory=tmp_path, buffer_bytes=2**20, budgets={"host": 0}) as store:
        offload = OffloadedOptimizer(
            optimizer, [Share("p", parameter, 0, parameter.numel())], plan, store, device="cpu"
        )
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter)
            offload.begin(1, hooked=False)
            offload.step()
        offload.settle()
        assert store.use()["disk"].used_bytes >= 8 * parameter.numel()
        assert 0 < store.pool.peak_bytes <= 2**20
        offload.close()


# Checkpoints

PLANS: dict[str, dict[str, Any]] = {
    "one device": {},
    "host, a part kept": {"optimizer_on": "host", "optimizer_kept": 0.3},
    "disk": {"optimizer_on": "disk"},
    "ZeRO-1": {"data": 2, "zero_stage": 1},
    "replicas, host": {"data": 2, "optimizer_on": "host", "optimizer_kept": 0.3},
    "ZeRO-3, disk": {"data": 2, "zero_stage": 3, "optimizer_on": "disk"},
    "data x tensor, host": {"data": 2, "tensor": 2, "optimizer_on": "host"},
    "tensor x pipeline, disk": {"tensor": 2, "pipeline": 2, "schedule": "gpipe", "optimizer_on": "disk"},
}


@pytest.mark.processes
@pytest.mark.parametrize(("writer", "reader"), list(zip(PLANS, [*list(PLANS)[3:], *list(PLANS)[:3]], strict=True)))
def test_training_goes_on_under_another_plan_as_if_never_stopped(
    pools: Pools, tmp_path: Path, writer: str, reader: str
) -> None:
    others: dict[str, Any] = {"optimizer": "sgd", "clip_norm": None}
    truth = train({}, steps=4, **others)
    pools.run(case(PLANS[writer], steps=2, save=str(tmp_path), **others))
    path = latest(tmp_path)
    assert path is not None
    for outcome in pools.run(case(PLANS[reader], steps=4, first_step=2, load=str(path), **others)):
        torch.testing.assert_close(outcome.losses, truth.losses[2:], rtol=1e-5, atol=1e-5)
        for name, parameter in outcome.parameters.items():
            torch.testing.assert_close(parameter, truth.parameters[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("writer", "reader", "precision"),
    [(0, 3, "bfloat16"), (3, 1, "float32"), (1, 2, "bfloat16"), (2, 0, "float32")],
)
def test_a_resumed_run_is_bit_for_bit_the_one_that_went_on(
    tmp_path: Path, writer: int, reader: int, precision: str
) -> None:
    fields = {"precision": precision}
    truth = train({**fields, **TIERS[0]}, steps=4)
    train({**fields, **TIERS[writer]}, steps=2, save=str(tmp_path))
    outcome = train({**fields, **TIERS[reader]}, steps=4, first_step=2, load=str(latest(tmp_path)))
    truth.losses = truth.losses[2:]
    assert_same(outcome, truth)


def test_a_checkpoint_of_bfloat16_holds_the_float32_masters(tmp_path: Path) -> None:
    train({"precision": "bfloat16", "optimizer_on": "disk"}, steps=1, save=str(tmp_path))
    path = latest(tmp_path)
    assert path is not None
    whole = load_full(path)
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    weight = whole["blocks.0.up.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def one_rank(fields: dict[str, Any]) -> Parallel:
    model = make_model("gpt", torch.float32)
    plan = make_plan("gpt", micro_batch=8, **fields)
    return parallelise(model, make_optimizer("adamw", model), plan, graph_of("gpt"), loss=cross_entropy)


def test_a_checkpoint_puts_a_delayed_update_in_force_so_that_a_resumed_run_is_the_one_that_went_on(
    tmp_path: Path,
) -> None:
    fields = {"optimizer_on": "host", "delayed_update": True, "delay_warmup": 0}
    going_on, resumed = one_rank(fields), one_rank(fields)
    for step in range(3):
        going_on.step([make_batch("gpt", 8, step)])
    path = save(tmp_path, going_on, step=3)
    load(path, resumed)
    for step in range(3, 6):
        batch = [make_batch("gpt", 8, step)]
        ours, theirs = going_on.step(batch), resumed.step(batch)
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    for each in (going_on, resumed):
        each.close()


# What goes wrong


class Impatient(queue.SimpleQueue):
    """Free buffers of a lane that raises queue.Empty where it would wait for ever."""

    def get(self, block: bool = True, timeout: float | None = None) -> int:
        return super().get(timeout=5)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("failing", ["the states", "the rule", "an arrival", "a return"])
def test_an_update_that_fails_gives_its_buffers_back_and_step_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, clips: bool
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the disk is gone")

    lanes: list[Lane] = []
    parameters = [torch.nn.Parameter(torch.ones(8)) for _ in range(10)]  # more than a lane has buffers
    shares = [Share(f"p{at}", each, 0, each.numel()) for at, each in enumerate(parameters)]
    optimizer, plan = make("adamw", parameters), single_device_plan("m", 1, 1, optimizer_on="host")
    with Store(directory=tmp_path, buffer_bytes=2**20) as store:
        offload = OffloadedOptimizer(optimizer, shares, plan, store, device="cpu", staged=True, clips=clips)
        offload.watch()
        for lane in (offload._out, offload._back):
            assert lane is not None
            slots, lane._free = lane._free, Impatient()
            while not slots.empty():
                lane._free.put(slots.get())
            lanes.append(lane)
        if failing == "the states":
            monkeypatch.setattr(offload._states, "open", fail)
        elif failing == "the rule":
            monkeypatch.setattr(offload._rules[0], "step", fail)
        elif failing == "an arrival":
            monkeypatch.setattr(offload_lanes.Transfer, "wait", fail)
        else:
            monkeypatch.setattr(lanes[1], "_copy", fail)
        offload.begin(1, hooked=True)
        torch.stack([each.sum() for each in parameters]).sum().backward()
        with pytest.raises(OSError, match="the disk is gone"):
            offload.step()
        offload.close()  # once what was begun after that has failed as well
    assert [lane._free.qsize() for lane in lanes] == [lane.count for lane in lanes]


class Slow:
    """A write that ends when it is told to."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.awaited, self.ends = events, threading.Event(), threading.Event()

    @property
    def done(self) -> bool:
        return self.ends.is_set()

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor:
        self.awaited.set()
        assert self.ends.wait(10)
        self.events.append("written")
        return torch.empty(0)


def test_what_another_thread_waits_for_is_waited_for_too() -> None:
    events: list[str] = []
    returning, slow = Returning(), Slow(events)
    returning.add(None, slow)
    other = threading.Thread(target=returning.wait)
    other.start()
    assert slow.awaited.wait(10)
    threading.Timer(0.2, slow.ends.set).start()
    returning.wait()  # as before parameters are gathered: the update's thread has taken the last, and waits
    events.append("gathered")
    other.join(10)
    assert events == ["written", "gathered"]
    returning.wait()


def test_the_store_is_closed_even_if_the_optimizer_cannot_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = one_rank({"optimizer_on": "host"})
    assert parallel.offload is not None
    assert parallel.store is not None
    closed: list[bool] = []
    close = parallel.store.close

    def fail() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(parallel.offload, "settle", fail)
    monkeypatch.setattr(parallel.store, "close", lambda: (close(), closed.append(True)))
    with pytest.raises(OSError, match="the disk is gone"):
        parallel.close()
    assert closed


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from test_offload import one_rank, make_batch
parallel = one_rank({{"optimizer_on": "disk"}})
parallel.step([make_batch("gpt", 8, 0)])
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.processes
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_what_an_ended_run_left_on_disk_is_gone_after_the_next(tmp_path: Path, by: signal.Signals) -> None:
    tiers = tmp_path / "tiers"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(here=str(Path(__file__).parent))],
        env={**os.environ, "HEADWAY_TIER_DIRECTORY": str(tiers)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(by)
    process.wait()
    process.stdout.close()
    parallel = one_rank({"optimizer_on": "disk"})
    parallel.close()
    assert not [path for path in tiers.rglob("*") if path.is_file() and path.stat().st_size > 4096]


def test_the_plan_of_this_module_is_one_that_the_runtime_carries_out() -> None:
    from headway.train.support import check_supported

    for fields in (*TIERS, *PLANS.values()):
        assert isinstance(check_supported(make_plan("gpt", **fields)), Plan)
