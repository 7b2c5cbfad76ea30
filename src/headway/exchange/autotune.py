"""Finds the fusion threshold and cycle time that exchange the most bytes per second, while training goes on.

As Horovod's autotuner does (Sergeev and Del Balso 2018; `parameter_manager.cc`): after some samples to warm up, each
setting is tried for a few samples, a Gaussian process over the settings says which to try next (Bayesian optimisation,
expected improvement), and after a given number of settings the best one stays. `Autotuner` has no clock: whoever
measures calls `observe`. One rank tunes; its setting has to be sent to the others before they use it.

Needs the library bayesian-optimization: the extra "tune".
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

import msgspec

from headway.collective.fusion import CYCLE_SECONDS, THRESHOLD_BYTES
from headway.errors import FieldError, MissingExtraError
from headway.value import write_atomically

__all__ = ["Autotuner", "Sample", "Setting"]


class Setting(msgspec.Struct, frozen=True):
    """What is tuned."""

    threshold_bytes: int = THRESHOLD_BYTES
    cycle_seconds: float = CYCLE_SECONDS


class Sample(msgspec.Struct, frozen=True):
    """A setting that was tried: the median of what was observed under it."""

    setting: Setting
    bytes_per_second: float


class Autotuner:
    """Says which setting to use next (`suggest`) and learns how good it was (`observe`).

    The first setting is `start`, so that the outcome is never one that was seen to be worse. The others lie in the
    ranges, on logarithmic scales. The same seed and the same observations give the same suggestions.
    """

    def __init__(
        self,
        *,
        start: Setting | None = None,
        threshold_range_bytes: tuple[float, float] = (2**20, 2**28),
        cycle_range_seconds: tuple[float, float] = (1e-4, 0.1),
        warm_up_samples: int = 3,
        samples_per_setting: int = 5,
        settings: int = 20,
        seed: int = 0,
        log: str | Path | None = None,
    ) -> None:
        """`log`: a CSV file for what was tried, written anew after each setting, like HOROVOD_AUTOTUNE_LOG's.

        Raises MissingExtraError without bayesian-optimization, FieldError for ranges or numbers that cannot be.
        """
        try:
            from bayes_opt import BayesianOptimization
            from bayes_opt.acquisition import ExpectedImprovement
        except ImportError:
            raise MissingExtraError(library="bayesian-optimization", extra="tune", place="autotuning") from None
        for place, (low, high) in (
            ("threshold_range_bytes", threshold_range_bytes),
            ("cycle_range_seconds", cycle_range_seconds),
        ):
            if not 0 < low < high < math.inf:
                raise FieldError(f"a range from {low} to {high}", place=place, remedy="two numbers above 0, rising")
        for place, number, least in (
            ("warm_up_samples", warm_up_samples, 0),
            ("samples_per_setting", samples_per_setting, 1),
            ("settings", settings, 1),
        ):
            if number < least:
                raise FieldError(f"{place} is {number}", place="autotuning", remedy=f"give {least} or more")
        self.samples: list[Sample] = []
        self._start = start or Setting()
        self._warm_up_left = warm_up_samples
        self._samples_per_setting = samples_per_setting
        self._settings = settings
        self._log = log
        self._observed: list[float] = []
        self._ranges = {
            "threshold": (math.log2(threshold_range_bytes[0]), math.log2(threshold_range_bytes[1])),
            "cycle": (math.log2(cycle_range_seconds[0]), math.log2(cycle_range_seconds[1])),
        }
        # Both from 0 to 1, as one length scale serves both in the Gaussian process.
        self._optimizer: Any = BayesianOptimization(
            f=None,
            pbounds=dict.fromkeys(self._ranges, (0.0, 1.0)),
            acquisition_function=ExpectedImprovement(xi=0.01),
            random_state=seed,
            verbose=0,
            allow_duplicate_points=True,
        )
        # What is measured is noisy, so the process must not be made to pass through every point.
        self._optimizer.set_gp_params(alpha=1e-2, normalize_y=True)
        self._current = self._start

    @property
    def is_done(self) -> bool:
        """Whether the search is over; `suggest` then gives the best setting for good."""
        return len(self.samples) >= self._settings

    @property
    def best(self) -> Sample | None:
        """The best setting so far, the earliest among equals; None before the first is complete."""
        return max(self.samples, key=lambda sample: sample.bytes_per_second, default=None)

    def suggest(self) -> Setting:
        """The setting to use now. Stays the same until enough was observed under it."""
        return self._current

    def observe(self, bytes_per_second: float) -> None:
        """What was exchanged under the suggested setting. Raises FieldError for what is not a rate."""
        if not 0 <= bytes_per_second < math.inf:
            raise FieldError(
                f"{bytes_per_second} bytes per second", place="autotuning", remedy="give a finite rate, 0 or more"
            )
        if self.is_done:
            return
        if self._warm_up_left:
            self._warm_up_left -= 1
            return
        self._observed.append(bytes_per_second)
        if len(self._observed) < self._samples_per_setting:
            return
        sample = Sample(setting=self._current, bytes_per_second=statistics.median(self._observed))
        self._observed = []
        self.samples.append(sample)
        self._optimizer.register(params=self._point(sample.setting), target=self._score(sample))
        self._write_log()
        best = self.best
        if self.is_done and best is not None:
            self._current = best.setting
        else:
            self._current = self._setting(self._optimizer.suggest())

    def _score(self, sample: Sample) -> float:
        # Relative to the first: what the acquisition function takes for a small improvement must not depend on units.
        return sample.bytes_per_second / (self.samples[0].bytes_per_second or 1.0)

    def _point(self, setting: Setting) -> dict[str, float]:
        values = {"threshold": max(setting.threshold_bytes, 1), "cycle": max(setting.cycle_seconds, 1e-9)}
        point = {}
        for name, (low, high) in self._ranges.items():
            point[name] = min(max((math.log2(values[name]) - low) / (high - low), 0.0), 1.0)
        return point

    def _setting(self, point: dict[str, float]) -> Setting:
        values = {name: 2 ** (low + float(point[name]) * (high - low)) for name, (low, high) in self._ranges.items()}
        return Setting(threshold_bytes=round(values["threshold"]), cycle_seconds=values["cycle"])

    def _write_log(self) -> None:
        if self._log is None:
            return
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("sample", "threshold_bytes", "cycle_seconds", "bytes_per_second", "best"))
        best = self.best
        for number, sample in enumerate(self.samples):
            setting = sample.setting
            rows.writerow(
                (
                    number,
                    setting.threshold_bytes,
                    f"{setting.cycle_seconds:.6g}",
                    f"{sample.bytes_per_second:.6g}",
                    int(sample is best),
                )
            )
        write_atomically(self._log, text.getvalue())
