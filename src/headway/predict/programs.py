"""What the collectives of an axis take when a named algorithm carries them out (`Plan.collectives`).

The program that `collective.algorithms` makes for one group of the axis is predicted on the links that it names. All
groups of an axis are at work together: the part of the time that the most loaded link determines is stretched by what
that leaves of a group's rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from headway.collective.algorithms import ALGORITHMS, generate, names
from headway.errors import HeadwayError, PlanError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.collective import predict_program
from headway.predict.communication import Channel, Communication, KnownTimes

__all__ = ["ProgramTimes", "Programs", "choices"]

# Programs have a transfer for each pair that speaks: those of larger groups take longer to make than to run.
_MOST_MEMBERS = 64
# Those that are generated in milliseconds, without a solver, and that no rank is the bottleneck of.
_CANDIDATES = ("ring", "tree", "binomial", "halving-doubling", "hierarchical", "torus", "direct", "packed")
# Sizes at which a program is predicted: four for each power of ten, between them on a line in the logarithms of both.
_PER_DECADE = 4


class ProgramTimes:
    """Seconds of one algorithm in one group, while all groups of its axis are at work.

    `crowding`: how many times slower a group's links are while the others work too. `fallback`: times of what the
    algorithm does not do.
    """

    def __init__(
        self,
        cluster: Cluster,
        algorithm: str,
        devices: tuple[str, ...],
        crowding: float,
        fallback: KnownTimes | None = None,
    ) -> None:
        self.cluster, self.algorithm, self.devices = cluster, algorithm, devices
        self.crowding, self.fallback = crowding, fallback
        self._programs: dict[str, object] = {}
        self._points: dict[tuple[str, int], float] = {}

    def seconds(self, kind: str, size_bytes: float) -> float | None:
        """Seconds of a collective over `size_bytes` (the whole tensor); None: the formula stands."""
        found = self._own(kind, size_bytes)
        if found is None and self.fallback is not None:
            found = self.fallback.seconds(kind, size_bytes)
        return found

    def _own(self, kind: str, size_bytes: float) -> float | None:
        """None: the algorithm does not do it."""
        if kind not in ALGORITHMS[self.algorithm].collectives or size_bytes <= 0:
            return None
        place = math.log10(max(size_bytes, 1.0)) * _PER_DECADE
        below = math.floor(place)
        first, second = self._point(kind, below), self._point(kind, below + 1)
        if math.isnan(first) or math.isnan(second):
            return None
        return math.exp(math.log(first) + (math.log(second) - math.log(first)) * (place - below))

    def _point(self, kind: str, place: int) -> float:
        key = (kind, place)
        found = self._points.get(key)
        if found is None:
            found = self._points[key] = self._predict(kind, 10.0 ** (place / _PER_DECADE))
        return found

    def _predict(self, kind: str, size_bytes: float) -> float:
        program = self._programs.get(kind)
        if program is None:
            try:
                program = generate(self.algorithm, self.cluster, kind, self.devices)  # type: ignore[arg-type]
            except HeadwayError:
                program = math.nan  # a program cannot be made for so many, or on these links
            self._programs[kind] = program
        if isinstance(program, float):
            return program
        found = predict_program(program, self.cluster, size_bytes)  # type: ignore[arg-type]
        return found.latency_seconds + found.bandwidth_seconds * self.crowding


class Programs:
    """Channels whose collectives a plan names an algorithm for, memoised."""

    def __init__(self, communication: Communication) -> None:
        self.communication = communication
        self._times: dict[tuple, KnownTimes | None] = {}

    def channel(self, plan: Plan, axis: str, rank: int, channel: Channel) -> Channel:
        """The channel of an axis of a pipeline rank, with the times of the algorithm that the plan names for it."""
        algorithm = plan.collectives.get(axis, "")
        if not algorithm or channel.size <= 1 or channel.size > _MOST_MEMBERS:
            return channel
        if algorithm not in ALGORITHMS:
            raise PlanError(
                f"no algorithm is named {algorithm!r}",
                place=f"plan: collectives.{axis}",
                remedy=f"one of: {', '.join(ALGORITHMS)}",
            )
        devices = _group(plan, axis, rank)
        key = (algorithm, devices, channel.bytes_per_second, channel.known)
        if key not in self._times:
            alone = self.communication.group(devices).bytes_per_second
            crowding = max(1.0, alone / channel.bytes_per_second) if math.isfinite(alone) else 1.0
            self._times[key] = ProgramTimes(
                self.communication.cluster, algorithm, devices, crowding, fallback=channel.known
            )
        return channel._replace(known=self._times[key])


def _group(plan: Plan, axis: str, rank: int) -> tuple[str, ...]:
    """The devices of the first group of an axis on a pipeline rank."""
    first = plan.first_rank(rank)
    if axis == "tensor":
        ranks = plan.tensor_group(first)
    elif axis == "context":
        ranks = plan.context_group(first)
    elif axis == "expert":
        ranks = plan.expert_group(first)
    else:
        data, tensor = plan.degrees(rank)
        ranks = tuple(first + at * tensor for at in range(data * plan.context))
    return tuple(plan.devices[at] for at in ranks)


def choices(plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For each axis of a plan that Headway's exchange carries out, the algorithms worth comparing; "": its own choice.

    Of an axis whose collectives are all-reduces those that do them, of ZeRO-1 those that reduce to one and broadcast
    from there, of ZeRO 2 and 3, and of an optimizer off the device, those that gather and scatter.
    """
    if plan.exchange != "headway" or not plan.is_uniform:
        return
    sizes = {"data": plan.data * plan.context, "tensor": plan.tensor}
    for axis, size in sizes.items():
        if not 1 < size <= _MOST_MEMBERS:
            continue
        divided = plan.sequence_parallel
        if axis == "data":
            divided = plan.zero_stage >= 2 or plan.optimizer_on != "device"
        able = set(names("all_gather")) & set(names("reduce_scatter")) if divided else set(names("all_reduce"))
        if axis == "data" and plan.zero_stage == 1 and plan.optimizer_on == "device":
            able = set(names("reduce")) & set(names("broadcast"))
        yield axis, ("", *(name for name in _CANDIDATES if name in able))
