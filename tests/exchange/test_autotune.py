"""Autotuning of fusion, against a made-up machine whose best setting is known by trying all of them."""

from __future__ import annotations

import csv
import math
import random
import sys

import pytest

from headway.errors import FieldError, MissingExtraError
from headway.exchange.autotune import Autotuner, Setting


def machine(setting: Setting) -> float:
    """Bytes per second: best at 16 MiB and 2 ms, and worse the farther from it, by factors."""
    away = (math.log2(setting.threshold_bytes / 2**24) / 4) ** 2 + (math.log2(setting.cycle_seconds / 2e-3) / 4) ** 2
    return 1e9 * math.exp(-away)


def tune(tuner: Autotuner, *, noise: float = 0.0, seed: int = 0) -> int:
    source, calls = random.Random(seed), 0
    while not tuner.is_done:
        tuner.observe(machine(tuner.suggest()) * (1 + noise * source.uniform(-1, 1)))
        calls += 1
    return calls


def test_it_ends_keeps_the_best_it_saw_and_comes_near_the_best_there_is():
    tuner = Autotuner(settings=15, samples_per_setting=1, warm_up_samples=2, seed=1)
    assert tuner.suggest() == Setting()
    assert tune(tuner) == 17
    rates = [machine(sample.setting) for sample in tuner.samples]
    assert machine(tuner.suggest()) == max(rates)
    assert machine(tuner.suggest()) >= 0.9e9  # it began at 0.54e9
    tuner.observe(5e12)
    assert len(tuner.samples) == 15
    assert machine(tuner.suggest()) == max(rates)


def test_the_same_seed_and_observations_give_the_same_suggestions():
    runs = []
    for _ in range(2):
        tuner = Autotuner(settings=6, samples_per_setting=2, seed=7)
        tune(tuner, noise=0.2)
        runs.append([sample.setting for sample in tuner.samples])
    assert runs[0] == runs[1]
    other = Autotuner(settings=6, samples_per_setting=2, seed=8)
    tune(other, noise=0.2)
    assert [sample.setting for sample in other.samples] != runs[0]


def test_warm_up_is_not_counted_and_a_setting_is_judged_by_its_median():
    tuner = Autotuner(settings=2, samples_per_setting=3, warm_up_samples=2)
    for rate in (9e9, 9e9):
        tuner.observe(rate)
    assert tuner.samples == []
    assert tuner.best is None
    first = tuner.suggest()
    for rate in (1.0, 50.0, 3.0):
        assert tuner.suggest() is first
        tuner.observe(rate)
    assert [(sample.setting, sample.bytes_per_second) for sample in tuner.samples] == [(first, 3.0)]
    assert tuner.suggest() != first


def test_settings_stay_in_their_ranges():
    tuner = Autotuner(
        settings=8,
        samples_per_setting=1,
        warm_up_samples=0,
        threshold_range_bytes=(1000, 4000),
        cycle_range_seconds=(1e-3, 2e-3),
        start=Setting(threshold_bytes=0, cycle_seconds=0.0),
    )
    tune_rates = iter([0.0, 1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 1.0])
    while not tuner.is_done:
        tuner.observe(next(tune_rates))
    assert tuner.samples[0].setting == Setting(threshold_bytes=0, cycle_seconds=0.0)
    for sample in tuner.samples[1:]:
        assert 1000 <= sample.setting.threshold_bytes <= 4000
        assert 1e-3 <= sample.setting.cycle_seconds <= 2e-3 * (1 + 1e-9)


def test_the_log_tells_what_was_tried_and_which_was_best(tmp_path):
    log = tmp_path / "tuning.csv"
    tuner = Autotuner(settings=4, samples_per_setting=1, warm_up_samples=1, log=log)
    tuner.observe(1.0)
    assert not log.exists()
    tune(tuner)
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["threshold_bytes"]) for row in rows] == [s.setting.threshold_bytes for s in tuner.samples]
    (best,) = [row for row in rows if row["best"] == "1"]
    assert float(best["bytes_per_second"]) == max(float(row["bytes_per_second"]) for row in rows)


def test_what_cannot_be_is_refused():
    with pytest.raises(FieldError, match="threshold_range_bytes"):
        Autotuner(threshold_range_bytes=(5, 5))
    with pytest.raises(FieldError, match="settings is 0"):
        Autotuner(settings=0)
    with pytest.raises(FieldError, match="nan bytes per second"):
        Autotuner().observe(math.nan)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bayes_opt", None)
    with pytest.raises(MissingExtraError, match=r"headway\[tune\]"):
        Autotuner()
