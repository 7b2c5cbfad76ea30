"""Measured times in the hands of a predictor: of the operators of a graph and of the collectives of a plan's axes.

A `Timing` answers by names, sizes and meshes. `MeasuredTimes` asks it about traced operators and about channels, notes
how each answer is known, and says None where nothing of the kind was measured: then the predictor's own formulas
stand. `measured_times` makes one from a file, for the devices of a cluster.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from headway.errors import FieldError, InputError
from headway.hardware.cluster import Cluster
from headway.predict.communication import Axis
from headway.predict.database import Database, Measurement
from headway.predict.timing import Interpolated, Linear, Place, Timing, axis_place, for_cluster, time_operator
from headway.value import Value
from headway.workload.graph import Operator

__all__ = ["MeasuredTimes", "TimesUsed", "Way", "measured_times"]

Way = Literal["catalog", "interpolated", "linear", "learned"]

# Collectives move bytes: one dtype answers for another, the first that was measured.
_COLLECTIVE_DTYPES = ("float32", "float16", "bfloat16")
# Units for one 16-bit format are as fast in the other, where a device has both.
_TWIN = {"bfloat16": "float16", "float16": "bfloat16"}


class TimesUsed(Value):
    """Where the times of a prediction come from.

    `device`: that was measured. `scaled`: whether its times were taken for another device's. `operators` and
    `collectives`: how each was known → how many different ones; what was not known at all follows the catalogue's
    formulas, and is counted under "catalogue".
    """

    way: str
    device: str
    source: str = ""
    scaled: bool = False
    operators: dict[str, int] = {}
    collectives: dict[str, int] = {}

    def describe(self) -> str:
        """One or two sentences for the terminal."""
        origin = f"{self.way} times of {self.device}" + (f" ({self.source})" if self.source else "")
        scaled = ", scaled to another device by peak rates: half and double are within its bounds" * self.scaled
        counts = (
            f"{name}: " + ", ".join(f"{count:,} {how}" for how, count in sorted(found.items()))
            for name, found in (("Operators", self.operators), ("Collectives", self.collectives))
            if found
        )
        return ". ".join((f"By {origin}{scaled}", *counts)) + "."


class MeasuredTimes:
    """What `timing` knows of a cluster's devices, memoised; every answer is noted (`used`).

    `source`: where the times are from, for the reader. Raises nothing: what is not known is None.
    """

    def __init__(self, timing: Timing, cluster: Cluster, *, way: str = "learned", source: str = "") -> None:
        self.timing = timing
        self.cluster = cluster
        self.way = way
        self.source = source
        self.scaled_from = getattr(getattr(timing, "timing", None), "device", "")
        self._operators: dict[tuple, tuple[float | None, str]] = {}
        self._places: dict[tuple[object, ...], MeasuredPlace] = {}

    def operator_seconds(self, operator: Operator, samples: float, degree: int, precision: str) -> float | None:
        """Seconds of a traced operator whose sharded tensors are divided by `degree`; None: nothing like it is known.

        `samples` need not be whole (a part of each sample's tokens).
        """
        key = (id(operator), samples, degree, precision)
        found = self._operators.get(key)
        if found is None:
            found = self._operators[key] = self._time(operator, samples, degree, precision)
        return found[0]

    def _time(self, operator: Operator, samples: float, degree: int, precision: str) -> tuple[float | None, str]:
        for dtype in (precision, _TWIN.get(precision)):
            if dtype is None:
                continue
            try:
                answer = time_operator(self.timing, operator, samples, degree, dtype)
            except InputError:
                continue
            return answer.seconds, answer.how
        return None, "catalogue"

    def place(
        self, devices: tuple[str, ...], pipeline: int, data: int, tensor: int, axis: Axis, context: int, expert: int
    ) -> MeasuredPlace | None:
        """Times of the collectives of an axis of a mesh (see `Communication.channels`); None: no profile can say."""
        found = axis_place(self.cluster, devices, pipeline, data, tensor, axis, context=context, expert=expert)
        if found is None:
            return None
        # Channels in the same place are equal, and are worked out once.
        key = (found["mesh"], found["group_size"], found["groups"], found["stride"])
        if key not in self._places:
            self._places[key] = MeasuredPlace(self.timing, found)
        return self._places[key]

    def used(self) -> TimesUsed:
        """How everything asked for so far was known."""
        collectives = Counter(how for place in self._places.values() for _, how in place.answers.values())
        return TimesUsed(
            way=self.way,
            device=self.scaled_from or self.timing.device,
            source=self.source,
            scaled=bool(self.scaled_from),
            operators=dict(Counter(_short(how) for _, how in self._operators.values())),
            collectives=_added(collectives),
        )


class MeasuredPlace:
    """Seconds of collectives where one channel runs, memoised by kind and size."""

    def __init__(self, timing: Timing, place: Place) -> None:
        self.timing = timing
        self.location = place
        self.answers: dict[tuple[str, float], tuple[float | None, str]] = {}

    def seconds(self, kind: str, size_bytes: float) -> float | None:
        """Seconds of a collective over `size_bytes` (the whole tensor); None: nothing of the kind was measured."""
        key = (kind, size_bytes)
        found = self.answers.get(key)
        if found is None:
            found = self.answers[key] = self._ask(kind, size_bytes)
        return found[0]

    def _ask(self, kind: str, size_bytes: float) -> tuple[float | None, str]:
        for dtype in _COLLECTIVE_DTYPES:
            try:
                answer = self.timing.collective(kind, size_bytes, dtype=dtype, **self.location)
            except InputError:
                continue
            return answer.seconds, answer.how
        return None, "catalogue"


def _short(how: str) -> str:
    # "scaled from V100 by 2.5: interpolated" differs in the ratio from operator to operator.
    return f"scaled, {how.partition(': ')[2]}" if how.startswith("scaled from") else how


def _added(counts: Counter[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for how, count in counts.items():
        found[_short(how)] += count
    return dict(found)


# ---------------------------------------------------------------------------------------------------------- from a file


def measured_times(
    path: str | Path | None,
    cluster: Cluster,
    *,
    way: Way = "learned",
    device: str | None = None,
    source: str | None = None,
    scale: bool = False,
    origin: Cluster | None = None,
) -> MeasuredTimes | None:
    """The times in a file (the user's own database with None), for the devices of `cluster`; None for "catalog".

    `path`: a database of measured times, or a .csv or .json of them. `device`: whose times, where there are several;
    by default the cluster's own, or the only one there. `source`: who measured them, where several did. Times of
    another device are refused, or with `scale` divided by the ratio of what both can do (`timing.Scaled`), collectives
    where `origin`, the cluster that was measured, is given. Raises InputError, FieldError or FileError.
    """
    if way not in get_args(Way):
        raise FieldError(f"{way!r} is no way of timing", place="--timing", remedy=f"one of: {', '.join(get_args(Way))}")
    if way == "catalog":
        return None
    # Without a dtype stand constants of a machine: what autograd adds to an operator, and such.
    rows = [row for row in _rows(path, device, source) if row.dtype]
    where = str(path) if path is not None else "the database of measured times"
    kinds = {kind.accelerator for kind in cluster.devices}
    devices = {row.device for row in rows}
    chosen = devices & kinds or devices
    if len(chosen) != 1:
        raise InputError(
            f"has times of {', '.join(sorted(chosen))}" if chosen else "has no times" + f" of {device}" * bool(device),
            place=where,
            remedy="name one with --profile-device" if chosen else "headway profile list says what was measured",
        )
    rows = [row for row in rows if row.device in chosen]
    if not any(row.unit == "bytes" or row.seconds for row in rows):
        raise InputError("every measurement failed", place=where, remedy="measure again")
    # Tables of collectives that two sources took are of two machines, or of two ways of measuring.
    sources = sorted({row.source for row in rows if row.unit != "samples"})
    if len(sources) > 1:
        raise InputError(
            f"{len(sources)} sources measured {next(iter(chosen))}: {', '.join(sources)}",
            place=where,
            remedy="choose one with --profile-source",
        )
    made: Timing
    if way == "learned":
        from headway.predict.learned import Learned  # imported where used: its compiler takes half a second to start

        made = Learned(rows, bounds=False)  # a search needs no bounds, and they take most of the fit
    else:
        made = (Interpolated if way == "interpolated" else Linear)(rows)
    timing = for_cluster(made, cluster, scale=scale, origin=origin)
    return MeasuredTimes(timing, cluster, way=way, source=", ".join(sources))


def _rows(path: str | Path | None, device: str | None, source: str | None) -> list[Measurement]:
    if path is not None and Path(path).suffix in (".csv", ".json"):
        from headway.predict.alpa import read_measurements

        rows = read_measurements(path, device=device)
        return [row for row in rows if source in (None, row.source) and device in (None, row.device)]
    if path is not None and not Path(path).is_file():
        raise InputError(
            "no such file", place=str(path), remedy="headway profile import or headway probe --profile makes one"
        )
    return Database(path).measurements(device, source=source)
