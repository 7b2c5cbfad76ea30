"""Fits the constants of `headway.predict.efficiency` and the catalogue's `efficiency` figures to published step times.

    python bench/fit_efficiency.py [--data FOLDER] [--rounds 3]

Only rows that `published.is_fitted` names are read for fitting; the others are reported beside them at the end.
Coordinate descent, generation by generation: every constant is multiplied up and down by a shrinking factor, and kept
within what is physically possible; the objective is the mean over sources of the mean |log(predicted / measured)|, so
that no source weighs by the number of its rows, plus a small pull towards where the search began, which keeps
constants that the rows say nothing about. Nothing is random.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import msgspec

from headway.predict import efficiency
from headway.predict.communication import Communication
from headway.predict.efficiency import Efficiency, generation_of
from headway.predict.published import PublishedRow, is_fitted, read_rows
from headway.predict.step import Predictor

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "planning"
FILES = ("published_throughput.csv", "vtrain_single_node.csv")
# What cannot be: shares above 1, and so on.
BOUNDS = {
    "depth": (16.0, 2048.0), "unaligned": (0.02, 1.0), "attention": (0.3, 1.6), "attention_backward": (0.2, 1.4),
    "attention_tokens": (1.0, 4096.0), "attention_vendor": (1.0, 2.0), "low_precision": (0.4, 1.05),
    "memory": (0.5, 0.88),
    "host_seconds": (2e-6, 150e-6), "host_micro_batch_seconds": (1e-4, 2e-2),
    "host_collective_seconds": (1e-6, 200e-6), "nvlink": (0.4, 0.92),
    "network": (0.2, 0.92), "slowdown": (0.0, 0.6),
}  # fmt: skip
# Measured by themselves (vTrain's table of all-reduces within a node), so not fitted to steps.
MEASURED = {"V100": {"nvlink"}, "A100": {"nvlink"}}
PULL = 0.003  # of the objective, for a constant that moved by a factor of e


class Fit:
    """The rows of one generation, and the constants at hand."""

    def __init__(self, generation: str, rows: list[PublishedRow], thin: int) -> None:
        self.generation = generation
        single = [row for row in rows if "single node" in row.source]
        # A source says of some days that its network was slow, and of some runs that activations went to the host, but
        # not how: these are reported, and nothing is fitted to them.
        known = [row for row in rows if "slow" not in row.notes and row.plan.activations_on == "device"]
        self.rows = [row for row in known if row not in single] + single[::thin]
        self.constants = efficiency.GENERATIONS[generation]
        # Parts of one peak are one piece of silicon with more or less memory, and have one figure.
        self.parts = {self.peak(row): next(iter(row.cluster.accelerators.values())).efficiency for row in self.rows}
        self.first = (self.constants, dict(self.parts))
        self._links: dict[tuple, Communication] = {}
        self._predictors: dict[tuple, Predictor] = {}

    @staticmethod
    def peak(row: PublishedRow) -> str:
        """What tells one piece of silicon from another: its peak and its power."""
        kind = next(iter(row.cluster.accelerators.values()))
        return f"{row.hardware.split('-')[0]} {kind.flop_rate('float16') / 1e12:g} TFLOP/s {kind.power_watts:g} W"

    def seconds(self, row: PublishedRow) -> float:
        """The predicted step time of a row with the constants at hand."""
        key = (id(row), self.constants.nvlink, self.constants.network)
        predictor = self._predictors.get(key)
        if predictor is None:
            link = (id(row.cluster), *key[1:])
            links = self._links.get(link) or Communication(row.cluster)
            self._links[link] = links
            cluster = msgspec.structs.replace(row.cluster, accelerators=dict(row.cluster.accelerators))
            predictor = self._predictors[key] = Predictor(row.workload, cluster, communication=links)
        kinds = predictor.cluster.accelerators
        for name, kind in kinds.items():
            kinds[name] = msgspec.structs.replace(kind, efficiency=self.parts.get(self.peak(row), kind.efficiency))
        predictor.stages.forget()
        predictor.replicas.forget()
        return predictor.step_time(row.plan).step_seconds

    def objective(self) -> float:
        efficiency.GENERATIONS[self.generation] = self.constants
        errors: dict[str, list[float]] = defaultdict(list)
        for row in self.rows:
            assert row.step_seconds is not None
            errors[source_of(row)].append(abs(math.log(self.seconds(row) / row.step_seconds)))
        # A row counts as no worse than 35 %: a slow day of a shared network must not decide.
        found = sum(sum(min(e, 0.35) for e in one) / len(one) for one in errors.values()) / len(errors)
        first, parts = self.first
        moved = [
            abs(math.log(max(getattr(self.constants, name), 1e-3 if low == 0 else low)
                         / max(getattr(first, name), 1e-3 if low == 0 else low)))
            for name, (low, _) in BOUNDS.items()
        ] + [abs(math.log(self.parts[name] / parts[name])) for name in parts]  # fmt: skip
        return found + PULL * sum(moved) / len(moved)

    def run(self, rounds: int) -> None:
        best = self.objective()
        print(f"{self.generation}: {len(self.rows)} rows, objective {best:.4f}", flush=True)
        step = 0.25
        for turn in range(rounds):
            for name, (low, high) in BOUNDS.items():
                if name in MEASURED.get(self.generation, ()):
                    continue
                for factor in (math.exp(step), math.exp(-step)):
                    before = self.constants
                    value = min(high, max(low, getattr(before, name) * factor))
                    if value == getattr(before, name):
                        continue
                    self.constants = before._replace(**{name: value})
                    found = self.objective()
                    if found < best - 1e-6:
                        best = found
                        break
                    self.constants = before
            for name in self.parts:
                for factor in (math.exp(step / 3), math.exp(-step / 3)):
                    value = self.parts[name]
                    self.parts[name] = min(0.95, value * factor)
                    found = self.objective()
                    if found < best - 1e-6:
                        best = found
                        break
                    self.parts[name] = value
            print(f"  round {turn + 1}: {best:.4f}", flush=True)
            step *= 0.6
        efficiency.GENERATIONS[self.generation] = self.constants


def source_of(row: PublishedRow) -> str:
    """Rows of one table of one source."""
    return row.source.split("[")[0].split(":")[0][:40]


def rounded(constants: Efficiency) -> Efficiency:
    """Two significant digits: more would pretend to know."""
    digits = {name: float(f"{value:.2g}") for name, value in constants._asdict().items() if name != "processors"}
    return constants._replace(**digits)


def main() -> None:
    """Fit, print the table, and report errors on both parts."""
    parser = argparse.ArgumentParser(description="Fit the efficiency constants of GPUs to published step times.")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--thin", type=int, default=4, help="every so many of vTrain's single-node rows")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    rows = [row for name in FILES for row in read_rows(arguments.data / name)[0] if row.step_seconds]
    by_generation: dict[str, list[PublishedRow]] = defaultdict(list)
    for row in rows:
        by_generation[generation_of(next(iter(row.cluster.accelerators.values())))].append(row)
    for generation, members in by_generation.items():
        if arguments.only and generation not in arguments.only.split(","):
            continue
        start = time.perf_counter()
        fit = Fit(generation, [row for row in members if is_fitted(row)], arguments.thin)
        fit.run(arguments.rounds)
        print(f"  {rounded(fit.constants)}")
        print(f"  efficiency: { {name: float(f'{value:.2g}') for name, value in fit.parts.items()} }")
        for part in (True, False):
            errors: dict[str, list[float]] = defaultdict(list)
            for row in members:
                if is_fitted(row) == part and row.step_seconds:
                    errors[source_of(row)].append(fit.seconds(row) / row.step_seconds - 1)
            for source, found in sorted(errors.items()):
                mean = sum(map(abs, found)) / len(found)
                print(f"  {'fitted' if part else 'held out':8s} {source:40s} {len(found):4d} rows {mean:6.1%}")
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
