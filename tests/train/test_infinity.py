"""Parameters off the device (ZeRO-Infinity, SC 2021, sections 5 and 6): the same training, bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headway.errors import InputError, PlanError, RunError
from headway.memory.tiers import Store
from headway.plan.plan import Plan, Stage
from headway.train.checkpoint import load, load_full, save
from headway.train.data import split_batch
from headway.train.parallel import Parallel, parallelise
from headway.train.support import check_supported
from headway.workload.graph import Graph
from headway.workload.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case, Outcome, Pool, cross_entropy, make_batch, make_model, make_optimizer, train_under_plan


@cache
def graph_of(kind: str) -> Graph:
    inputs, targets = make_batch(kind, 2, 0)
    return trace(make_model(kind), inputs, name=kind, loss=cross_entropy, target=targets)


def make_plan(kind: str, *, recompute: Any = (), **fields: Any) -> Plan:
    graph = graph_of(kind)
    count = fields.get("pipeline", 1) * (2 if fields.get("schedule") == "interleaved" else 1)
    edges = [round(number * len(graph.layers) / count) for number in range(count + 1)]
    if fields.get("tensor", 1) > 1:
        fields["tensor_sharding"] = {
            name: style
            for block in graph.blocks
            for style, names in (("column", block.columns), ("row", block.rows))
            for name in names
        }
    ranks = fields.get("data", 1) * fields.get("tensor", 1) * fields.get("pipeline", 1)
    return Plan(
        model=kind,
        devices=tuple(f"device {rank}" for rank in range(ranks)),
        stages=tuple(
            Stage(start=a, stop=b, recompute=tuple(at for at in recompute if a <= at < b))
            for a, b in itertools.pairwise(edges)
        ),
        **{"global_batch": 8, "micro_batch": 2, **fields},
    ).validate(graph)


@pytest.fixture(autouse=True)
def directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_TIER_DIRECTORY", str(tmp_path_factory.getbasetemp() / "tiers"))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    found: dict[int, Pool] = {}
    yield found
    for pool in found.values():
        pool.close()


def outcomes(case: Case, pools: dict[int, Pool] | None = None) -> list[Outcome]:
    assert case.plan is not None
    size = case.plan.world_size
    if size == 1:
        return [train_under_plan(case)]
    assert pools is not None
    if size not in pools:
        pools[size] = Pool(size)
    return pools[size].run(case)


def assert_same(found: list[Outcome], expected: list[Outcome], tolerance: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=tolerance, abs=0.0)
        assert one.parameters.keys() == other.parameters.keys()
        for name, parameter in one.parameters.items():
            torch.testing.assert_close(parameter, other.parameters[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("kind", "tier"), [("mlp", "host"), ("shared", "disk"), ("cnn", "host"), ("gpt", "disk"), ("llama", "host")]
)
def test_one_rank_trains_bit_for_bit_as_with_parameters_on_the_device(kind: str, tier: str) -> None:
    # Tied, frozen and unread parameters, buffers, several micro-batches, clipping, and units that are recomputed.
    graph = graph_of(kind)
    there, here = (
        outcomes(Case(kind, make_plan(kind, parameters_on=where, recompute=(1, 2)), graph))
        for where in (tier, "device")
    )
    assert_same(there, here)


SLICED = {
    "data": {"data": 2, "zero_stage": 3},
    "data x tensor": {"data": 2, "tensor": 2, "zero_stage": 3},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "schedule": "1f1b"},
}


@pytest.mark.processes
@pytest.mark.parametrize("fields", SLICED.values(), ids=SLICED.keys())
def test_slices_over_real_ranks_train_bit_for_bit_as_zero_3(pools: dict[int, Pool], fields: dict[str, Any]) -> None:
    graph = graph_of("gpt")
    there, here = (
        outcomes(Case("gpt", make_plan("gpt", parameters_on=where, **fields), graph, steps=2), pools)
        for where in ("disk", "device")
    )
    assert_same(there, here)


@pytest.mark.processes
def test_slices_in_a_pipeline_differ_from_zero_3_by_the_order_of_sums_alone(pools: dict[int, Pool]) -> None:
    # `fully_shard` reduces once, after the last micro-batch; here every micro-batch's gradients are reduced.
    fields: dict[str, Any] = {"data": 2, "pipeline": 2, "schedule": "interleaved", "zero_stage": 3}
    graph = graph_of("shared")
    there, here = (
        outcomes(Case("shared", make_plan("shared", parameters_on=where, **fields), graph, steps=2), pools)
        for where in ("host", "device")
    )
    assert_same(there, here, tolerance=1e-12)


def prepare(kind: str, store: Store | None = None, model: nn.Module | None = None, **fields: Any) -> Parallel:
    model = model or make_model(kind)
    return parallelise(
        model,
        make_optimizer("adamw", model),
        make_plan(kind, **fields),
        graph_of(kind),
        loss=cross_entropy,
        store=store,
    )


def train(parallel: Parallel, kind: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = parallel.step(split_batch(make_batch(kind, 8, step), parallel.plan.micro_batches))
        assert loss is not None
        losses.append(loss.item())
    return losses


def test_between_steps_nothing_is_on_the_device_and_during_one_no_more_than_three_groups() -> None:
    parallel = prepare("gpt", parameters_on="host")
    (infinity,) = parallel.infinities
    block = max(group.whole.numel() * 8 for group in infinity.groups)
    most = 0

    def look(_module: nn.Module, _args: Any) -> None:
        nonlocal most
        most = max(most, infinity.held_bytes())

    for module in parallel.pieces[0].module.modules():
        module.register_forward_pre_hook(look)
    train(parallel, "gpt", range(2))
    assert infinity.held_bytes() == 0
    tied = next(group.whole.numel() * 8 for group in infinity.groups if len(group.places) > 1)
    assert block <= most <= 3 * block + tied
    parallel.close()


def test_from_the_second_step_on_fetches_begin_before_they_are_asked_for() -> None:
    parallel = prepare("gpt", parameters_on="disk")
    (infinity,) = parallel.infinities
    train(parallel, "gpt", range(1))
    first, infinity.traffic.late, infinity.traffic.ahead = infinity.traffic.late, 0, 0
    assert first > 0
    train(parallel, "gpt", range(1, 3))
    assert infinity.traffic.late <= 2 * 2  # what a step begins with
    assert infinity.traffic.ahead > 10 * infinity.traffic.late
    parallel.close()


class Turning(nn.Module):
    """Runs its blocks in another order from step to step, and leaves one out now and then."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.order = [0, 1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in self.order:
            x = torch.tanh(self.blocks[number](x))
        return x


def test_a_model_that_changes_its_order_between_steps_stays_correct() -> None:
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3], [2, 2, 0, 1], [0, 1, 2, 3]]
    graph = trace(Turning(), torch.randn(2, 8), name="turning", loss=nn.functional.mse_loss, target=torch.randn(2, 8))
    stages = (Stage(start=0, stop=len(graph.layers)),)
    found = []
    for tier in ("device", "disk"):
        model = Turning()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        plan = Plan(model="turning", devices=("d",), global_batch=4, micro_batch=2, stages=stages, parameters_on=tier)  # type: ignore[arg-type]
        parallel = parallelise(model, optimizer, plan, graph, loss=nn.functional.mse_loss)
        losses = []
        for step, order in enumerate(orders):
            model.order = order
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            loss = parallel.step(split_batch((x, -x), 2))
            assert loss is not None
            losses.append(loss.item())
        found.append(losses)
        parallel.close()
    assert found[0] == found[1]


def test_a_checkpoint_goes_from_the_device_to_the_disk_and_back(tmp_path: Path) -> None:
    truth = train(prepare("gpt"), "gpt", range(4))
    first = prepare("gpt")
    train(first, "gpt", range(1))
    save(tmp_path / "a", first, step=1)
    second = prepare("gpt", parameters_on="disk")
    load(tmp_path / "a" / "step-1", second)
    assert train(second, "gpt", range(1, 3)) == truth[1:3]
    save(tmp_path / "b", second, step=3)
    second.close()
    third = prepare("gpt")
    load(tmp_path / "b" / "step-3", third)
    assert train(third, "gpt", range(3, 4)) == truth[3:]


def test_a_model_on_the_meta_device_gets_its_values_group_by_group() -> None:
    with torch.device("meta"):
        model = make_model("gpt")
    store = Store(budgets={"device": 0})
    made: list[nn.Module] = []

    def initialise(module: nn.Module) -> None:
        made.append(module)
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 0.01 * len(made))

    optimizer = make_optimizer("adamw", model)
    parallel = parallelise(
        model, optimizer, make_plan("gpt", parameters_on="host"), graph_of("gpt"), loss=cross_entropy, store=store,
        initialise=initialise,
    )  # fmt: skip
    assert len(made) >= 20
    assert all(parameter.device.type == "cpu" for _, parameter in parallel.parameters())
    losses = train(parallel, "gpt", range(2))
    assert losses[1] < losses[0]
    parallel.close()


def test_taking_the_state_dict_of_a_model_without_memory_is_refused_and_not_a_crash() -> None:
    parallel = prepare("mlp", parameters_on="host")
    with pytest.raises(InputError, match="rest off the device"):
        parallel.pieces[0].module.model.state_dict()
    parallel.close()


def test_parameters_off_the_device_need_the_traced_model_and_zero_3() -> None:
    model = make_model("mlp")
    with pytest.raises(PlanError, match="needs the traced model"):
        parallelise(model, make_optimizer("sgd", model), make_plan("mlp", parameters_on="host"), loss=cross_entropy)
    plan = make_plan("mlp", data=2, zero_stage=1, parameters_on="host")
    with pytest.raises(PlanError, match="slices of its own"):
        check_supported(plan)


TILES = {"blocks.0.up": 3, "blocks.1.down": 2}


def test_layers_in_tiles_learn_the_same_and_each_tile_is_fetched_alone() -> None:
    plain = train(prepare("gpt"), "gpt", range(3))
    tiled = prepare("gpt", tiles=TILES, parameters_on="disk", recompute=(1,))
    assert train(tiled, "gpt", range(3)) == pytest.approx(plain, rel=1e-12)
    places = [group.places for group in tiled.infinities[0].groups if "tiles" in group.places[0]]
    assert len(places) == sum(TILES.values())
    tiled.close()


def test_a_checkpoint_of_a_tiled_model_is_that_of_the_untiled_one(tmp_path: Path) -> None:
    truth = train(prepare("gpt"), "gpt", range(4))
    tiled = prepare("gpt", tiles=TILES)
    train(tiled, "gpt", range(1))
    save(tmp_path / "a", tiled, step=1)
    names = {name: tuple(tensor.shape) for name, tensor in load_full(tmp_path / "a" / "step-1").items()}
    assert names.items() >= {name: tuple(p.shape) for name, p in make_model("gpt").named_parameters()}.items()
    plain = prepare("gpt")
    load(tmp_path / "a" / "step-1", plain)
    assert train(plain, "gpt", range(1, 2)) == pytest.approx(truth[1:2], rel=1e-12)
    save(tmp_path / "b", plain, step=2)
    again = prepare("gpt", tiles={"blocks.2.up": 5}, parameters_on="host")
    load(tmp_path / "b" / "step-2", again)
    assert train(again, "gpt", range(2, 4)) == pytest.approx(truth[2:], rel=1e-12)
    again.close()


@pytest.mark.processes
@pytest.mark.parametrize("where", ["device", "disk"])
def test_tiles_under_zero_3_learn_the_same(pools: dict[int, Pool], where: str, tmp_path: Path) -> None:
    graph = graph_of("gpt")
    plan = make_plan("gpt", data=2, zero_stage=3, tiles=TILES, parameters_on=where)
    found = outcomes(Case("gpt", plan, graph, steps=2, save=str(tmp_path / "c")), pools)
    expected = outcomes(Case("gpt", make_plan("gpt"), graph, steps=2))
    for outcome in found:
        assert outcome.losses == pytest.approx(expected[0].losses, rel=1e-12)
    whole = load_full(tmp_path / "c" / "step-2")
    for name, parameter in expected[0].parameters.items():
        torch.testing.assert_close(whole[name], parameter, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_reading_a_parameter_that_has_no_memory_is_an_error_that_names_it_and_not_a_crash(tier: str) -> None:
    parallel = prepare("mlp", parameters_on=tier)
    train(parallel, "mlp", range(1))
    head = parallel.pieces[0].module.model.head.weight
    for read in (
        lambda: head.sum(),
        lambda: torch.ones(8, dtype=head.dtype) @ head.T,
        lambda: head + 1,
        lambda: head.data.norm(),
    ):
        with pytest.raises(RunError, match=r"is read \(\w+\) where the traced model does not read it") as caught:
            read()
        assert caught.value.place == "parameter head.weight"
        assert "present()" in caught.value.remedy
    assert (head.shape, head.dtype, head.requires_grad, head.numel()) == ((4, 8), torch.float64, True, 32)
    with parallel.present():
        assert head.sum().isfinite()
    with pytest.raises(RunError):
        head.sum()
    parallel.close()


DIVIDED = """
import faulthandler, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {folder!r})
from headway.errors import RunError
from headway.train.infinity_groups import ReleasedDTensor, ReleasedParameter, local_of
from ranks import cross_entropy, make_batch, make_model, make_optimizer
from test_infinity import graph_of, make_plan
from headway.train.data import split_batch
from headway.train.parallel import parallelise

faulthandler.enable()
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method={meeting!r}, rank=rank, world_size=2)
plan = make_plan("gpt", parameters_on="disk", **{fields!r})
model = make_model("gpt")
parallel = parallelise(model, make_optimizer("adamw", model), plan, graph_of("gpt"), rank=rank, loss=cross_entropy)
parallel.step(split_batch(make_batch("gpt", 8, 0), plan.micro_batches))
slices = {{p: n for n, p in parallel.parameters()}}
parameter = max((p for group in parallel.optimizer.param_groups for p in group["params"]), key=torch.Tensor.numel)
name = slices[parameter]
kind = ReleasedDTensor if plan.data > 1 else ReleasedParameter
assert type(parameter) is kind
reads = [lambda: parameter.sum(), lambda: parameter + 1, lambda: torch.ones(3, parameter.shape[0]) @ parameter]
if plan.data > 1:
    reads += [lambda: parameter.to_local().sum(), lambda: parameter.full_tensor(), lambda: parameter.redistribute()]
for read in reads:
    try:
        read()
    except RunError as error:
        assert error.place == "parameter " + name, error
        assert "rests off the device" in error.message and "present()" in error.remedy
        continue
    raise SystemExit("was read")
assert (parameter.ndim, parameter.requires_grad, parameter.numel() > 0) == (2, True, True)
with parallel.present():
    assert local_of(parameter).isfinite().all()
assert name in repr(parameter)
parallel.close()
print("all refused:", len(reads), flush=True)
os._exit(0)  # gloo's threads and torch's destructors race at exit
"""


@pytest.mark.processes
@pytest.mark.parametrize("fields", [{"data": 2, "zero_stage": 3}, {"tensor": 2}], ids=["data", "tensor"])
def test_reading_one_that_is_divided_over_ranks_is_the_same_error_and_not_a_crash(tmp_path: Path, fields) -> None:
    code = DIVIDED.format(folder=str(Path(__file__).parent), meeting=f"file://{tmp_path}/store", fields=fields)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "HEADWAY_TIER_DIRECTORY": str(tmp_path / "tiers")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]  # -11 would be the crash
    assert printed == [f"all refused: {6 if 'data' in fields else 3}\n"] * 2


def test_updated_parts_are_put_together_in_the_stores_own_buffers_and_given_back(tmp_path: Path) -> None:
    """On disk a group is one tensor: what is updated of it piece by piece takes room of the pool, not more memory."""
    with Store(directory=tmp_path, buffer_bytes=2**20) as store:
        parallel = prepare("mlp", store, parameters_on="disk")
        homes = dict(parallel.infinities[0].homes())
        parameter, home = next((p, h) for p, h in homes.items() if p.numel() > 8)
        before = home.read(0, parameter.numel())
        assert store.pool.used_bytes == 0
        assert home.write(0, 3, before[:3] + 1) is None or parameter.numel() == 3
        assert 0 < store.pool.used_bytes <= store.pool.budget_bytes
        home._home.finish()
        store.flush()
        assert store.pool.used_bytes == 0
        after = home.read(0, parameter.numel())
        assert torch.equal(after[:3], before[:3] + 1)
        assert torch.equal(after[3:], before[3:])
        parallel.close()


def test_without_a_free_buffer_an_update_waits_for_one_and_takes_no_other_memory(tmp_path: Path) -> None:
    with Store(directory=tmp_path, buffer_bytes=2**16, wait_seconds=20.0) as store:
        parallel = prepare("mlp", store, parameters_on="disk")
        home = next(h for p, h in parallel.infinities[0].homes() if p.numel() > 8)
        taken = store.pool.acquire(store.pool.budget_bytes, "a test")
        update = threading.Thread(target=home.write, args=(0, 3, torch.ones(3, dtype=torch.float64)))
        update.start()
        update.join(0.3)
        assert update.is_alive()
        store.pool.release(taken)
        update.join(20.0)
        assert not update.is_alive()
        home._home.finish()
        store.flush()
        assert torch.equal(home.read(0, 3), torch.ones(3, dtype=torch.float64))
        assert store.pool.used_bytes == 0
        parallel.close()


def test_a_piece_that_cannot_be_completed_gives_its_buffer_back(tmp_path: Path, monkeypatch) -> None:
    with Store(directory=tmp_path, buffer_bytes=2**16) as store:
        parallel = prepare("mlp", store, parameters_on="disk")
        home = next(h for p, h in parallel.infinities[0].homes() if p.numel() > 8)
        home.write(0, 3, torch.ones(3))
        monkeypatch.setattr(store, "read", lambda name: (_ for _ in ()).throw(RunError("the disk is gone")))
        with pytest.raises(RunError, match="the disk is gone"):
            home._home.finish()
        assert store.pool.used_bytes == 0
        parallel.close()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_whatever_is_updated_in_whatever_order_the_tier_holds_it_and_the_pool_is_never_exceeded(data: Any) -> None:
    """A pool that is smaller than the model; groups in several pieces, updates of any parts of any slices."""
    with tempfile.TemporaryDirectory() as folder, Store(directory=folder, buffer_bytes=2**17) as store:
        parallel = prepare("gpt", store, parameters_on="disk")
        (infinity,) = parallel.infinities
        assert any(len(group.pieces) > 1 for group in infinity.groups)
        homes = list(infinity.homes())
        truth = [home.read(0, slice.numel()) for slice, home in homes]
        for value in range(data.draw(st.integers(1, 12))):
            at = data.draw(st.integers(0, len(homes) - 1))
            size = homes[at][0].numel()
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.sampled_from([size, min(size, start + 1 + value)]))
            truth[at][start:stop] = value
            homes[at][1].write(start, stop, truth[at][start:stop].clone())
            staged = infinity._staging._open.values()
            assert all(store.pool.holder_of(piece.values) is not None for piece in staged)
            assert sum(piece.values.nbytes for piece in staged) <= store.pool.budget_bytes // 8
        for _, home in homes:
            home._home.finish()
        store.flush()
        assert store.pool.used_bytes == 0
        for (slice, home), values in zip(homes, truth, strict=True):
            assert torch.equal(home.read(0, slice.numel()), values)
        parallel.close()
