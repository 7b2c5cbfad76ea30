"""Learned times: of worlds whose law is known, and of Alpa's profile with parts of it left out."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.predict.alpa import read_measurements
from headway.predict.boosting import boost
from headway.predict.database import Measurement
from headway.predict.learned import Learned
from headway.predict.timing import Linear

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "planning" / "alpa_prof_database.csv"
V100 = "V100-SXM2-16GB"


def law(kind: str, size: float, nodes: int, n: int, stride: int) -> float:
    """Rings on nodes of 8: 20 µs, 5 µs for each member, 100 GB/s inside, 3 GB/s for each node that groups share."""
    times = 2 if kind == "all_reduce" else 1
    members = max(1, min(n, 8 // stride))
    start = 20e-6 + 5e-6 * n
    if members == n:
        return start + times * (n - 1) / n * size / 100e9
    spans = n // members
    moved = 1.0 if kind == "all_reduce" and spans == 2 else times * (n - 1) / n
    return start + 50e-6 * math.log2(spans) + moved * (8 // members) * size / 3e9


def world(meshes=((1, 8), (2, 8)), kinds=("all_reduce", "all_gather"), sizes=range(2, 32)) -> list[Measurement]:
    rows = []
    for (nodes, per_node), kind in itertools.product(meshes, kinds):
        for n, stride in itertools.product((2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
            if n * stride > nodes * per_node or (stride > 1 and n * stride != nodes * per_node):
                continue
            for power in sizes:
                rows.append(
                    Measurement(
                        device=V100, operation=kind, dtype="float32", nodes=nodes, devices_per_node=per_node,
                        group_size=n, groups=nodes * per_node // n, stride=stride, size=2.0**power, unit="bytes",
                        seconds=law(kind, 2.0**power, nodes, n, stride),
                    )
                )  # fmt: skip
    return rows


def ask(way, row: Measurement, size: float | None = None):
    return way.collective(
        row.operation, row.size if size is None else size, mesh=(row.nodes, row.devices_per_node),
        group_size=row.group_size, groups=row.groups, stride=row.stride, dtype=row.dtype,
    )  # fmt: skip


def errors(way, rows) -> np.ndarray:
    return np.array([abs(ask(way, row).seconds / row.seconds - 1) for row in rows])


@pytest.fixture(scope="module")
def learned() -> Learned:
    return Learned(world(), bounds=False)


def test_a_mesh_that_nobody_measured_follows_the_law_of_the_smaller_ones(learned):
    larger = world(meshes=((4, 8),))
    found = errors(learned, larger)
    assert found.mean() < 0.05
    assert found.max() < 0.25


def test_what_was_measured_is_answered_as_measured(learned):
    assert errors(learned, world()).max() < 1e-6


def test_another_dtype_of_the_same_bytes_takes_as_long(learned):
    row = world()[40]
    other = learned.collective(
        row.operation, row.size, mesh=(row.nodes, row.devices_per_node), group_size=row.group_size, groups=row.groups,
        stride=row.stride, dtype="float16",
    )  # fmt: skip
    assert other.seconds == pytest.approx(row.seconds, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(world(meshes=((1, 8), (2, 8), (4, 8)), sizes=[10])), st.floats(1, 2**40), st.floats(1, 1e3))
def test_more_never_takes_less_time_and_bounds_enclose(learned, row, size, factor):
    less, more = ask(learned, row, size), ask(learned, row, size * factor)
    assert less.seconds <= more.seconds * (1 + 1e-9)
    assert 0 < less.low_seconds <= less.seconds <= less.high_seconds


def test_sizes_left_out_are_found_again_and_small_ones_above_all():
    rows = world()
    left = [row for row in rows if math.log2(row.size) % 3 == 1]
    kept = [row for row in rows if math.log2(row.size) % 3 != 1]
    way = Learned(kept, bounds=False)
    assert errors(way, left).mean() < 0.02
    noisy = [
        Measurement(
            **{field: getattr(row, field) for field in row.__struct_fields__} | {"seconds": row.seconds * factor}
        )
        for row, factor in zip(kept, itertools.cycle((0.97, 1.0, 1.03)))
    ]
    small = [row for row in left if row.size < 2**16]
    assert errors(Learned(noisy, bounds=False), small).mean() < errors(Linear(noisy), small).mean() / 3


def test_bounds_from_cross_validation_hold_about_nine_times_in_ten():
    rng = np.random.default_rng(0)
    rows = [
        Measurement(
            **{field: getattr(row, field) for field in row.__struct_fields__}
            | {"seconds": row.seconds * math.exp(rng.normal(0, 0.1))}
        )
        for row in world()
    ]
    chosen = rng.random(len(rows)) < 0.25
    way = Learned([row for row, left in zip(rows, chosen) if not left])
    left = [row for row, out in zip(rows, chosen) if out]
    inside = np.mean([ask(way, row).low_seconds <= row.seconds <= ask(way, row).high_seconds for row in left])
    assert 0.8 <= inside <= 0.98


def test_what_nothing_is_known_of_is_refused():
    inside = Learned(world(meshes=((1, 8),)), bounds=False)
    with pytest.raises(InputError, match="no all_to_all"):
        inside.collective("all_to_all", 1e6, mesh=(1, 8), group_size=8)
    with pytest.raises(InputError, match="between nodes"):
        inside.collective("all_reduce", 1e6, mesh=(2, 8), group_size=16)
    with pytest.raises(InputError, match="anything like it"):
        inside.operator("gelu", "float32", flop=1e6)


def test_a_few_measurements_are_enough_to_answer():
    rows = [row for row in world(meshes=((1, 8),), kinds=("all_reduce",)) if row.group_size == 8][::6]
    way = Learned(rows)
    middle = math.sqrt(rows[1].size * rows[2].size)
    found = ask(way, rows[0], middle)
    assert rows[1].seconds <= found.seconds <= rows[2].seconds
    assert ask(way, rows[0]).seconds == pytest.approx(rows[0].seconds)


def test_a_product_in_another_dtype_is_found_by_the_ratio_of_peak_rates():
    rows = [
        Measurement(device=V100, operation="dot", dtype="float32", size=flop, unit="flop", seconds=1e-5 + flop / 15e12)
        for flop in np.geomspace(1e6, 1e13, 20)
    ]
    way = Learned(rows)
    # On this device float16 has 125 / 15.7 of float32's peak.
    expected = 1e-5 + 1e12 / 15e12 / (125 / 15.7)
    found = way.operator("mm", "float16", flop=1e12)
    assert found.seconds == pytest.approx(expected, rel=0.05)
    assert "float32" in found.how


def test_shapes_of_an_operator_that_were_not_measured_follow_those_that_were():
    rows = [
        Measurement(
            device=V100, operation="gelu", dtype="float32", shape=f"shape{width}", size=samples, unit="samples",
            seconds=4e-6 + samples * width * 8 / 8e11, flop=samples * width, moved_bytes=samples * width * 8,
        )
        for width in (2**12, 2**16, 2**20) for samples in (1, 4, 16)
    ]  # fmt: skip
    way = Learned(rows)
    assert way.operator("gelu", "float32", flop=0, shape="shape65536", samples=4).seconds == pytest.approx(
        rows[4].seconds
    )
    size = 8 * 2**18
    found = way.operator("gelu", "float32", flop=size, moved_bytes=size * 8, shape="unseen", samples=8)
    assert found.seconds == pytest.approx(4e-6 + size * 8 / 8e11, rel=0.02)


# ------------------------------------------------------------------------------------------------------- boosted trees


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(40, 200))
def test_trees_find_a_step_and_are_the_same_every_time(seed, rows):
    rng = np.random.default_rng(seed)
    x = rng.random((rows, 3))
    y = np.where(x[:, 1] > 0.5, 0.2, -0.1)
    trees = boost(x, y, trees=200, depth=2, smallest_leaf=2)
    away = np.abs(x[:, 1] - 0.5) > 0.1
    assert np.abs(trees.predict(x) - y)[away].max() < 0.1
    again = boost(x, y, trees=200, depth=2, smallest_leaf=2)
    assert all(np.array_equal(one, other) for one, other in zip(trees, again))


def test_trees_split_only_where_enough_rows_stand_on_both_sides():
    x = np.arange(20.0)[:, None]
    y = np.where(x[:, 0] == 0, 0.3, 0.0)
    trees = boost(x, y, trees=1, depth=3, smallest_leaf=5)
    sides = x[:, 0] <= trees.threshold[0, 0]
    assert trees.feature[0, 0] == 0
    assert min(sides.sum(), (~sides).sum()) >= 5


def test_one_odd_row_does_not_bend_the_others():
    x = np.repeat(np.arange(10.0), 10)[:, None]
    y = np.zeros(100)
    y[0] = 100.0
    assert np.abs(boost(x, y, clip=0.1).predict(x)[10:]).max() < 0.02


# ------------------------------------------------------------------------------------------------------- Alpa's profile

alpa = pytest.mark.skipif(not DATA.exists(), reason="Alpa's profile is not here: it is no part of the repository")


@pytest.fixture(scope="module")
def profile() -> list[Measurement]:
    rows = read_measurements(DATA, device=V100)
    return [row for row in rows if row.seconds is not None and row.size > 0 and row.unit == "bytes"]


@alpa
def test_a_mesh_of_alpas_that_is_left_out_is_predicted_within_15_percent(profile):
    way = Learned([row for row in profile if row.nodes < 4], bounds=False)
    left = [row for row in profile if row.nodes == 4]
    assert way.as_profiled
    assert errors(way, left).mean() < 0.15
    assert errors(way, [row for row in left if row.group.spans == 4]).mean() < 0.15


@alpa
def test_sizes_of_alpas_that_are_left_out_are_predicted_within_5_percent(profile):
    def out(row):
        return math.log2(row.size) % 4 == 2

    way = Learned([row for row in profile if not out(row)], bounds=False)
    assert errors(way, [row for row in profile if out(row)]).mean() < 0.05


@alpa
def test_without_what_alpa_does_to_small_sizes_they_take_longer(profile):
    kept = [row for row in profile if row.nodes == 1 and row.operation == "all_gather"]
    as_profiled, real = Learned(kept, bounds=False), Learned(kept, as_profiled=False, bounds=False)
    # 64 bytes on 8 devices: the profile says four times what sending nothing takes, because rates may not fall.
    tiny = {"mesh": (1, 8), "group_size": 8, "dtype": "float32"}
    assert (
        real.collective("all_gather", 64, **tiny).seconds > 2 * as_profiled.collective("all_gather", 64, **tiny).seconds
    )
    large = [way.collective("all_gather", 2**28, **tiny).seconds for way in (real, as_profiled)]
    assert large[0] == pytest.approx(large[1], rel=0.05)
