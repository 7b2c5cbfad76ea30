"""How much useful work a job does on so many devices: measured step times times statistical efficiency.

Pollux (Qiao et al., OSDI 2021, section 3): goodput = throughput x efficiency, and the efficiency of a total batch M for
a job that was meant for M0 is (noise + M0) / (noise + M), `noise` being its gradient noise scale in samples. The batch
of each device is chosen for the most goodput.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

from headway.errors import FieldError, FileError
from headway.schedule.pace import Scaling
from headway.value import read_text

__all__ = ["MeasuredScaling", "read_scaling"]


class MeasuredScaling(Scaling):
    """Goodput of one model from measured steps.

    `steps`: number of devices to {samples of each device: seconds of a step}. Between measured numbers of devices, and
    beyond the last, the goodput for each device is interpolated, and extended as the last one falling with the number;
    so it never grows by more than what was measured. `noise_samples`: the gradient noise scale; `batch_samples`: M0, by
    default the smallest batch measured.
    """

    def __init__(
        self,
        steps: Mapping[int, Mapping[float, float]],
        *,
        noise_samples: float = math.inf,
        batch_samples: float = 0.0,
    ) -> None:
        self.steps = {devices: dict(sizes) for devices, sizes in sorted(steps.items())}
        self.noise_samples = noise_samples
        self.batch_samples = batch_samples or min(
            devices * size for devices, sizes in self.steps.items() for size in sizes
        )
        self._known = {devices: self._best(devices) for devices in self.steps}

    def _best(self, devices: int) -> float:
        best = 0.0
        for size, seconds in self.steps[devices].items():
            total = devices * size
            best = max(best, total / seconds * self.efficiency(total))
        return best

    def efficiency(self, samples: float) -> float:
        """Progress of a sample in a batch of so many, relative to one in M0; 1 for batches that are smaller."""
        if self.noise_samples == math.inf or samples <= self.batch_samples:
            return 1.0
        return (self.noise_samples + self.batch_samples) / (self.noise_samples + samples)

    def goodput(self, devices: int) -> float:
        """Useful samples per second on so many devices, as few nodes as possible."""
        known = self._known.get(devices)
        if known is not None:
            return known
        measured = list(self._known)
        lower = max((count for count in measured if count < devices), default=None)
        upper = min((count for count in measured if count > devices), default=None)
        if lower is None:
            assert upper is not None
            return self._known[upper] * devices / upper
        if upper is None:
            return self._known[lower]
        part = (devices - lower) / (upper - lower)
        return self._known[lower] + part * (self._known[upper] - self._known[lower])


def read_scaling(
    folder: str | Path, model: str, *, noise_samples: float = math.inf, batch_samples: float = 0.0
) -> MeasuredScaling:
    """From `<model>-placements.csv` (and `<model>-scalability.csv`, if it is there) of Pollux's artifact.

    Columns `placement` (a digit for each node: how many devices of it), `local_bsz` (samples of each device),
    `step_time` (seconds); and `num_nodes`, `num_replicas`, `local_bsz`, `step_time`. Of several placements of the same
    number of devices, the one on the fewest nodes counts. Raises FileError, and FieldError naming the line.
    """
    best: dict[int, tuple[int, dict[float, float]]] = {}

    def note(devices: int, nodes: int, size: float, seconds: float) -> None:
        known = best.get(devices)
        if known is None or nodes < known[0]:
            best[devices] = (nodes, {size: seconds})
        elif nodes == known[0]:
            known[1][size] = min(seconds, known[1].get(size, math.inf))

    path = Path(folder) / f"{model}-placements.csv"
    for line, row in _rows(path):
        digits = row.get("placement") or ""
        if not digits.isdigit() or "0" in digits:
            raise FieldError(f"{digits!r} is no placement", place=f"{path}:{line}", remedy="a digit for each node")
        size, seconds = _number(row, "local_bsz", path, line), _number(row, "step_time", path, line)
        note(sum(map(int, digits)), len(digits), size, seconds)
    path = Path(folder) / f"{model}-scalability.csv"
    for line, row in _rows(path) if path.exists() else ():
        nodes, devices = int(_number(row, "num_nodes", path, line)), int(_number(row, "num_replicas", path, line))
        note(devices, nodes, _number(row, "local_bsz", path, line), _number(row, "step_time", path, line))
    if not best:
        raise FileError("has no rows", place=str(path), remedy="give measured steps")
    steps = {devices: sizes for devices, (_, sizes) in best.items()}
    return MeasuredScaling(steps, noise_samples=noise_samples, batch_samples=batch_samples)


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    return list(enumerate(csv.DictReader(io.StringIO(read_text(path))), 2))


def _number(row: Mapping[str, str | None], field: str, path: Path, line: int) -> float:
    try:
        number = float(row.get(field) or "")
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise FieldError(f"{row.get(field)!r} is no {field}", place=f"{path}:{line}", remedy="a number above 0")
    return number
