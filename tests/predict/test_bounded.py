"""Profiles whose rates never fall: recognised, and never answered against their own rule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.predict.bounded import PER_DOUBLING, at_a_bound, between_rates, never_falling_rates, sends_nothing
from headway.predict.database import Group, Measurement
from headway.predict.learned import Learned
from headway.predict.timing import Curve

SIZES = 2.0 ** np.arange(2, 30)


def monotone(seconds: np.ndarray, sizes: np.ndarray = SIZES) -> np.ndarray:
    """What Alpa does to a profile, said another way: the best rate so far."""
    return sizes / np.maximum.accumulate(sizes / seconds)


def noisy(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (20e-6 + SIZES / 5e9) * np.exp(rng.normal(0, 0.2, len(SIZES)))


def profile(seed: int = 0, groups: int = 6) -> list[Measurement]:
    """One collective over 8 devices of one node, as often as there are meshes, each with its own noise."""
    return [
        Measurement(
            device="V100-SXM2-16GB", operation="all_reduce", dtype="float32", nodes=mesh, devices_per_node=8,
            group_size=8, groups=mesh, stride=1, size=float(size), unit="bytes", seconds=float(seconds),
        )
        for mesh in range(1, groups + 1)
        for size, seconds in zip(SIZES, monotone(noisy(seed * 100 + mesh)), strict=True)
    ]  # fmt: skip


def ask(way: Learned, row: Measurement, size: float) -> float:
    return way.collective(
        row.operation, size, mesh=(row.nodes, row.devices_per_node), group_size=row.group_size, groups=row.groups,
        stride=row.stride, dtype=row.dtype,
    ).seconds  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
def test_a_size_left_out_is_answered_between_what_its_neighbours_rates_allow(seed):
    rows = profile(seed)
    kept = [row for row in rows if math.log2(row.size) % 3 != 1]
    way = Learned(kept, bounds=False)
    assert way.as_profiled
    checked = 0
    for mesh in range(1, 7):
        own = sorted((row for row in kept if row.nodes == mesh), key=lambda row: row.size)
        for before, after in itertools.pairwise(own):
            for size in np.geomspace(before.size, after.size, 5):
                found = ask(way, before, float(size))
                assert before.seconds is not None
                assert after.seconds is not None
                # Between places of the grid a curve is a chord, which may leave the limits by a trifle.
                assert found <= before.seconds * size / before.size * 1.02
                assert found >= after.seconds * size / after.size / 1.02
                checked += 1
    assert checked > 100


def test_what_was_measured_is_still_answered_as_measured():
    rows = profile(3)
    way = Learned(rows, bounds=False)
    assert max(abs(ask(way, row, row.size) / (row.seconds or 0) - 1) for row in rows) < 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_the_limits_hold_whatever_was_drawn(seed):
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(SIZES), 6, replace=False))
    curve = Curve(SIZES[chosen], monotone(noisy(seed))[chosen])
    drawn = rng.normal(-9, 3, 30 * PER_DOUBLING)
    found = between_rates(drawn, drawn + rng.normal(0, 1, len(drawn)), curve)
    size = 2.0 ** (np.arange(len(drawn)) / PER_DOUBLING)
    for before, after in itertools.pairwise(range(len(chosen))):
        inside = (size > curve.sizes[before]) & (size < curve.sizes[after])
        seconds = np.exp(found[inside])
        assert np.all(seconds <= curve.seconds[before] / curve.sizes[before] * size[inside] * (1 + 1e-9))
        assert np.all(seconds >= curve.seconds[after] / curve.sizes[after] * size[inside] * (1 - 1e-9))
    outside = (size < curve.sizes[0]) | (size > curve.sizes[-1])
    assert np.array_equal(found[outside], drawn[outside])


def test_a_time_beyond_the_smaller_sizes_rate_is_given_that_rate():
    curve = Curve(np.array([4.0, 16.0]), np.array([1e-5, 3e-5]))
    longer = np.full(5 * PER_DOUBLING, math.log(1e-3))
    found = between_rates(np.full(len(longer), math.log(1.6e-5)), longer, curve)
    assert math.exp(found[3 * PER_DOUBLING]) == pytest.approx(2e-5)  # 8 bytes at the rate of 4


def test_measured_noise_is_not_taken_for_such_a_profile():
    group = Group("all_reduce", "float32", 1, 8, 8, 1, 1)
    many = {group._replace(groups=at): Curve(SIZES, noisy(at)) for at in range(5)}
    assert not never_falling_rates(many)
    made = {key: Curve(curve.sizes, monotone(curve.seconds)) for key, curve in many.items()}
    assert never_falling_rates(made)
    for curve in made.values():
        bound = at_a_bound(curve)
        assert 0 < bound.sum() < len(bound)
        assert not bound[0]


@pytest.mark.parametrize(
    ("kind", "size", "nothing"),
    [("all_gather", 28, True), ("all_gather", 32, False), ("all_to_all", 252, True), ("all_reduce", 4, False)],
)
def test_a_tensor_with_fewer_elements_than_parts_sends_nothing(kind, size, nothing):
    assert sends_nothing(Group(kind, "float32", 1, 8, 8, 1, 1), size) == nothing
