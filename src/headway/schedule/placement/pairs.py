"""How fast two jobs run that share devices, as measured: Gavel's table (Narayanan et al., OSDI 2020, section 3.1).

The table has steps per second of each job type alone, and of each pair of types together, by kind of GPU and size of
the gang. What matters here is the speed in the pair over the speed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from headway.schedule.traces.read import read_rates

__all__ = ["PairSpeeds", "read_pairs"]

_DEFAULT_KIND = "v100"  # what run times of Gavel's traces are for (traces/formats.py), and so what a nameless kind is


class PairSpeeds:
    """`speeds[kind][model, devices][other]`: of `model` beside `other`, over its speed alone; 0: they can't share.

    A kind is known by its first word (`P100-SXM2-16GB` is a `p100`). One that was not measured counts as a V100, which
    Gavel's run times are for.
    """

    def __init__(self, speeds: Mapping[str, Mapping[tuple[str, int], Mapping[str, float]]]) -> None:
        self.speeds = speeds
        self.models = frozenset(model for table in speeds.values() for model, _ in table)

    def speed(self, model: str, other: str, devices: int, kind: str = "") -> float | None:
        """Of a job of `model` that shares its devices with one of `other`, over alone; None: never measured."""
        table = self.speeds.get(kind.lower().partition("-")[0]) or self.speeds.get(_DEFAULT_KIND) or {}
        return table.get((model, devices), {}).get(other)


def read_pairs(path: str | Path) -> PairSpeeds:
    """The pairs of Gavel's `simulation_throughputs.json`. Raises FileError, FieldError."""
    return _read_pairs(str(path))


@functools.lru_cache(maxsize=4)
def _read_pairs(path: str) -> PairSpeeds:
    found: dict[str, dict[tuple[str, int], dict[str, float]]] = {}
    for kind, table in read_rates(path).items():
        found[kind] = {}
        for (model, devices), rates in table.items():
            alone = rates[None]
            found[kind][model, devices] = {
                other[0]: rate / alone
                for other, rate in rates.items()
                if other is not None and alone > 0 and other[1] == devices
            }
    return PairSpeeds(found)
