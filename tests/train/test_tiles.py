"""Layers in tiles with their optimizer off the device: what ZeRO-Infinity makes them for (SC 2021, section 5.1.3)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.memory.tiling import Tile
from headway.train.checkpoint import load_full
from headway.train.support import check_supported
from headway.train.tiles import RowsOfWhole, place_of
from headway.workload.graph import Graph
from headway.workload.trace import trace

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case, Outcome, cross_entropy, make_batch, make_model, train_under_plan
from test_parallel import Pools, make_plan

TILES = {"blocks.0.up": 3, "blocks.1.down": 2, "blocks.2.attention.out": 5}


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
def graph_of_gpt() -> Graph:
    inputs, targets = make_batch("gpt", 2, 0)
    return trace(make_model("gpt", torch.float32), inputs, name="gpt", loss=cross_entropy, target=targets)


def case(others: dict[str, Any] | None = None, **fields: Any) -> Case:
    plan = check_supported(make_plan("gpt", **fields))
    return Case("gpt", plan, graph_of_gpt(), dtype=torch.float32, **{"steps": 3, **(others or {})})


def train(others: dict[str, Any] | None = None, **fields: Any) -> Outcome:
    return train_under_plan(case(others, **fields))


RESTS = [
    {"optimizer_on": "host"},
    {"optimizer_on": "disk", "optimizer_kept": 0.3},
    {"parameters_on": "host", "optimizer_on": "disk"},
    {"parameters_on": "disk", "optimizer_on": "host"},
]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_tiles_train_bit_for_bit_wherever_the_optimizer_is_and_as_untiled_but_for_rounding(
    clip_norm: float | None,
) -> None:
    untiled = train({"clip_norm": clip_norm})
    here = train({"clip_norm": clip_norm}, tiles=TILES)
    assert here.losses == pytest.approx(untiled.losses, rel=1e-5)
    for rest in RESTS:
        there = train({"clip_norm": clip_norm}, tiles=TILES, **rest)
        assert there.losses == here.losses, rest


@pytest.mark.parametrize("rest", [RESTS[0], RESTS[2]], ids=str)
def test_a_tiles_master_has_the_float32_values_of_its_own_rows(rest: dict[str, Any], tmp_path: Path) -> None:
    # With bfloat16 the device forgets what rounding takes; a checkpoint before the first step shows the masters.
    train({"steps": 0, "save": str(tmp_path)}, tiles=TILES, precision="bfloat16", **rest)
    saved = load_full(tmp_path / "step-0")
    for name, parameter in make_model("gpt", torch.float32).named_parameters():
        assert torch.equal(saved[name], parameter.detach()), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpoints_go_from_tiles_to_no_tiles_and_to_others(precision: str, tmp_path: Path) -> None:
    tolerance = 1e-5 if precision == "float32" else 2e-2
    fields: dict[str, Any] = {"precision": precision, "optimizer_on": "host"}
    truth = train({"steps": 4}, **fields)
    first = train({"steps": 1, "save": str(tmp_path)}, tiles=TILES, **fields)
    resumed = {"load": str(tmp_path / "step-1"), "save": str(tmp_path), "steps": 2, "first_step": 1}
    plain = train(resumed, **fields)
    again = {"load": str(tmp_path / "step-2"), "steps": 4, "first_step": 2}
    other = train(again, tiles={"blocks.0.up": 7}, precision=precision, parameters_on="disk", optimizer_on="disk")
    assert first.losses + plain.losses + other.losses == pytest.approx(truth.losses, rel=tolerance)


@pytest.mark.processes
@pytest.mark.parametrize(
    "fields",
    [
        {"data": 2, "optimizer_on": "host"},
        {"data": 2, "zero_stage": 1, "optimizer_on": "disk"},
        {"data": 2, "zero_stage": 3, "optimizer_on": "host", "parameters_on": "disk"},
    ],
    ids=str,
)
def test_replicas_that_divide_tiles_learn_what_one_process_learns(
    pools: Pools, fields: dict[str, Any], tmp_path: Path
) -> None:
    truth = train({"steps": 4})
    first = pools.run(case({"steps": 2, "save": str(tmp_path)}, tiles=TILES, **fields))
    resumed = {"load": str(tmp_path / "step-2"), "steps": 4, "first_step": 2}
    # On other ranks and in other tiles; moments that were lost or of other rows would show.
    second = train(resumed, tiles={"blocks.1.down": 3}, optimizer_on="host")
    third = pools.run(case(resumed, tiles=TILES, **fields))
    for outcome in first:
        assert outcome.losses == pytest.approx(truth.losses[:2], rel=1e-5)
    for outcome in (second, *third):
        assert outcome.losses == pytest.approx(truth.losses[2:], rel=1e-5)


def test_rows_of_a_tile_begin_where_the_tile_does() -> None:
    values = torch.ones(3, 4)
    tile = Tile("weight", 5, 3, (9, 4))
    assert place_of(tile, values) == (5, 0)
    rows = RowsOfWhole([(tile, values)])
    assert tuple(rows.shape) == (9, 4)
    assert [tuple(chunk.offsets) for chunk in rows.__create_chunk_list__()] == [(5, 0)]
