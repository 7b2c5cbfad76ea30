"""How long something takes, with what is known of it: one interface, and the ways of answering that learn nothing.

`Timing` is what a predictor may be given: it times an operator or a collective and says within which bounds, and how
it knows. `Catalogued` answers from the figures of a cluster, `Interpolated` from measurements of the very thing,
`Linear` by one straight line for each; `learned.Learned` also knows what was never measured. `for_cluster` keeps the
times of one device from being taken for those of another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from headway.errors import HeadwayError, InputError
from headway.hardware.catalog import find_accelerator
from headway.hardware.cluster import Accelerator, Cluster
from headway.predict.communication import (
    Axis,
    Channel,
    Communication,
    all_gather_seconds,
    all_reduce_seconds,
    broadcast_seconds,
    reduce_scatter_seconds,
    send_seconds,
)
from headway.predict.database import Group, Measurement
from headway.predict.operators import computed_dtype, operator_bytes, operator_key, operator_name
from headway.workload.graph import Operator

__all__ = [
    "Catalogued",
    "Curve",
    "Estimate",
    "Interpolated",
    "Linear",
    "Place",
    "Query",
    "Scaled",
    "Timing",
    "axis_place",
    "curves",
    "for_cluster",
    "group_rate",
    "time_operator",
]

# Bounds are meant to hold nine times out of ten.
_COVERAGE = 0.9
# Of what nothing is known about the error: half and double.
_UNKNOWN = math.log(2.0)


class Estimate(NamedTuple):
    """Seconds, the bounds within which they lie nine times out of ten, and in a few words how that is known."""

    seconds: float
    low_seconds: float
    high_seconds: float
    how: str


class Query(NamedTuple):
    """What is asked about an operator: it computes `flop` and moves `moved_bytes`.

    `shape` names it among others of its name; `samples` (not always whole: a part of each sample's tokens) at which.
    """

    operation: str
    dtype: str
    flop: float
    moved_bytes: float = 0.0
    shape: str = ""
    samples: float = 1


class Timing(ABC):
    """Times of one kind of device. Every method raises InputError for what it cannot know."""

    device: str

    def operator(
        self,
        operation: str,
        dtype: str,
        *,
        flop: float,
        moved_bytes: float = 0.0,
        shape: str = "",
        samples: float = 1,
    ) -> Estimate:
        """Time of an operator (see `Query`)."""
        return self.answer(Query(operation, dtype, flop, moved_bytes, shape, samples))

    def collective(
        self,
        kind: str,
        size_bytes: float,
        *,
        mesh: tuple[int, int],
        group_size: int,
        groups: int = 1,
        stride: int = 1,
        dtype: str = "float32",
    ) -> Estimate:
        """A collective over `size_bytes` (the whole tensor) in groups as `database.Group` describes them."""
        return self.answer_collective(Group(kind, dtype, *mesh, group_size, groups, stride), size_bytes)

    @abstractmethod
    def answer(self, query: Query) -> Estimate:
        """Time of an operator."""

    @abstractmethod
    def answer_collective(self, group: Group, size_bytes: float) -> Estimate:
        """Time of a collective over `size_bytes` (the whole tensor)."""


def time_operator(timing: Timing, operator: Operator, samples: float, degree: int, precision: str) -> Estimate:
    """What `timing` says of a traced operator at `samples`, its sharded tensors divided by `degree`.

    The one call that a predictor needs for operators: it finds the name, FLOP, bytes and dtype that it runs in.
    """
    split = degree if operator.is_sharded else 1
    return timing.operator(
        operator_name(operator),
        computed_dtype(operator, precision),
        flop=operator.flop.at(samples) / split,
        moved_bytes=operator_bytes(operator, samples, split, precision),
        shape=operator_key(operator, split, precision).partition(" ")[2],
        samples=samples,
    )


class Place(TypedDict):
    """Where a collective runs, as `Timing.collective` takes it (see `database.Group`)."""

    mesh: tuple[int, int]
    group_size: int
    groups: int
    stride: int


def axis_place(
    cluster: Cluster,
    devices: Sequence[str],
    pipeline: int,
    data: int,
    tensor: int,
    axis: Axis,
    *,
    context: int = 1,
    expert: int = 1,
) -> Place | None:
    """Where the collectives of a mesh axis run: with it `Timing.collective` answers for that axis.

    `devices` as `Communication.channels` takes them. All groups of the axis are at work; where each pipeline rank has
    nodes of its own, those of one pipeline rank, which then share no link with the others. None if the devices do not
    lie node by node with equally many in each, which a profile cannot say.
    """
    node_of = {device.name: device.node for device in cluster.devices}
    nodes = [node_of[name] for name in devices]
    counts = Counter(nodes)
    per_node = len(devices) // len(counts)
    runs = [node for at, node in enumerate(nodes) if at % per_node == 0]
    if set(counts.values()) != {per_node} or any(node != runs[at // per_node] for at, node in enumerate(nodes)):
        return None
    replicas = data * context
    width = replicas * tensor
    size, stride = {
        "tensor": (tensor, 1),
        "data": (replicas, tensor),
        "context": (context, tensor),
        "expert": (expert, tensor),
        "expert_data": (replicas // expert, tensor * expert),
        "pipeline": (2 if pipeline > 1 else 1, width),
    }[axis]
    count = len(counts)
    if axis != "pipeline" and width % per_node == 0:
        count = width // per_node
    elif axis != "pipeline" and per_node % width == 0:
        count = 1
    return {
        "mesh": (count, per_node),
        "group_size": size,
        "groups": count * per_node // size,
        "stride": stride,
    }


# ------------------------------------------------------------------------------------------------------ the catalogue


class Catalogued(Timing):
    """Roofline and alpha-beta from the figures of a cluster: nothing measured, so the bounds are half and double."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.accelerator: Accelerator = cluster.accelerator_of(0)
        self.device = self.accelerator.name
        self._communication = Communication(cluster)

    def answer(self, query: Query) -> Estimate:
        """The longer of computing and moving, and the launch (Williams, Waterman, Patterson, CACM 2009)."""
        kind = self.accelerator
        compute = query.flop / (kind.flop_rate(query.dtype) * kind.efficiency) if query.flop else 0.0
        transfer = query.moved_bytes / (kind.memory_bytes_per_second * kind.memory_efficiency)
        return _within(max(compute, transfer) + kind.launch_seconds, _UNKNOWN, "roofline of the catalogue")

    def answer_collective(self, group: Group, size_bytes: float) -> Estimate:
        """The formulas of `communication` on the cluster's links, all groups at work together."""
        if group.group_size == 1:
            rate = self.accelerator.memory_bytes_per_second * self.accelerator.memory_efficiency
            seconds = self.accelerator.launch_seconds + 2 * size_bytes / rate  # read and written
        else:
            seconds = _formula(group.kind, size_bytes, _channel(self._communication, group))
        return _within(seconds, _UNKNOWN, "alpha-beta of the catalogue")


def _formula(kind: str, size_bytes: float, channel: Channel) -> float:
    formulas = {
        "all_reduce": all_reduce_seconds,
        "all_gather": all_gather_seconds,
        "reduce_scatter": reduce_scatter_seconds,
        "broadcast": broadcast_seconds,
        "send": send_seconds,
    }
    if kind == "all_to_all":
        # Every member keeps 1/n of what it has, and it has 1/n of all.
        n = channel.size
        return channel.seconds(n - 1, size_bytes * (n - 1) / n**2)
    if kind not in formulas:
        raise InputError(
            f"no formula for a collective {kind!r}", remedy=f"one of: {', '.join([*formulas, 'all_to_all'])}"
        )
    return formulas[kind](size_bytes, channel)


def _channel(communication: Communication, group: Group) -> Channel:
    cluster = communication.cluster
    nodes = list(cluster.nodes.values())[: group.nodes]
    members = [position for node in nodes for position in list(node)[: group.devices_per_node]]
    world = group.nodes * group.devices_per_node
    if len(members) < world:
        raise InputError(
            f"{cluster.name} has no {group.nodes}x{group.devices_per_node} mesh",
            remedy="name a cluster with as many nodes and devices, or a smaller mesh",
        )
    names = tuple(cluster.devices[position].name for position in members)
    stride = max(1, group.stride)
    if group.group_size * stride > world or world % (group.group_size * stride):
        return communication.group(names[: group.group_size * stride : stride][: group.group_size])
    if group.groups * group.group_size < world:  # one of the groups, alone
        return communication.group(names[: group.group_size * stride : stride])
    pipeline = world // (group.group_size * stride)
    axes = communication.channels(names, pipeline, group.group_size, stride, "data")
    return min(axes, key=lambda channel: channel.bytes_per_second)


def group_rate(communication: Communication, group: Group) -> float:
    """Bytes per second of one group's rings on a cluster's links, while all its groups are at work."""
    return _channel(communication, group).bytes_per_second


def _within(seconds: float, spread: float, how: str) -> Estimate:
    return Estimate(seconds, seconds * math.exp(-spread), seconds * math.exp(spread), how)


# --------------------------------------------------------------------------------------------------- what was measured


class Curve(NamedTuple):
    """Measured seconds by size, ascending, above 0; `fixed_seconds` is what a size of 0 took (0: not measured)."""

    sizes: np.ndarray
    seconds: np.ndarray
    fixed_seconds: float = 0.0

    def at(self, size: float) -> float:
        """Seconds between the measured sizes on straight lines in the logarithms of both.

        Below the smallest, time stays what it is there (a message that small is all latency); above the largest the
        rate does.
        """
        if size <= 0 and self.fixed_seconds:
            return self.fixed_seconds
        if size <= self.sizes[0]:
            return float(self.seconds[0])
        if size >= self.sizes[-1]:
            return float(self.seconds[-1] * size / self.sizes[-1])
        return math.exp(np.interp(math.log(size), np.log(self.sizes), np.log(self.seconds)))

    def without(self, position: int) -> Curve:
        """This curve without one of its points."""
        return Curve(np.delete(self.sizes, position), np.delete(self.seconds, position), self.fixed_seconds)

    def spread(self) -> float:
        """How far `at` is off a point that is left out, as a logarithm, nine times out of ten."""
        if len(self.sizes) < 4:
            return _UNKNOWN
        errors = [
            abs(math.log(self.without(position).at(float(size)) / seconds))
            for position, (size, seconds) in enumerate(zip(self.sizes, self.seconds, strict=True))
        ]
        # The largest of so many must count, or a handful of points would promise too much.
        rank = min(len(errors) - 1, math.ceil(_COVERAGE * (len(errors) + 1)) - 1)
        return sorted(errors)[rank]


def curves(measurements: Iterable[Measurement]) -> dict[Group | tuple[str, str, str], Curve]:
    """A curve for each collective (`Group`) and each operator (name, dtype, shape); failed measurements do not count.

    Of several times of one thing (from several sources) the median is taken.
    """
    found: dict[Group | tuple[str, str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for measurement in measurements:
        if measurement.seconds:
            found[_key(measurement)][measurement.size].append(measurement.seconds)
    made = {}
    for key, points in found.items():
        sizes = sorted(size for size in points if size > 0)
        if sizes:
            seconds = np.array([np.median(points[size]) for size in sizes])
            fixed = float(np.median(points[0.0])) if 0.0 in points else 0.0
            made[key] = Curve(np.array(sizes, dtype=float), seconds, fixed)
    return made


def _key(measurement: Measurement) -> Group | tuple[str, str, str]:
    if measurement.unit == "bytes":
        return measurement.group
    return (measurement.operation, measurement.dtype, measurement.shape)


class Interpolated(Timing):
    """Answers from measurements of the very operator or collective; between sizes on lines, log against log."""

    how = "interpolated"

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.device = one_device(measurements)
        self.curves = curves(measurements)
        self._spreads: dict[Group | tuple[str, str, str], float] = {}

    def answer(self, query: Query) -> Estimate:
        """By samples where an operator of that shape was measured, by FLOP where its name was measured alone."""
        own = (query.operation, query.dtype, query.shape)
        if query.shape and own in self.curves:
            return self._estimate(own, query.samples)
        key = self.product(query.operation, query.dtype)
        if key is None:
            raise InputError(
                f"{query.operation} in {query.dtype} was not measured on {self.device}",
                remedy="measure it (headway probe --profile), or use the roofline or the learned times",
            )
        return self._estimate(key, query.flop)

    def product(self, operation: str, dtype: str) -> tuple[str, str, str] | None:
        """The curve over FLOP that answers for an operation: its own, or of square products for every other product."""
        for name in (operation, *(("dot",) if operation in PRODUCTS else ())):
            if (name, dtype, "") in self.curves:
                return (name, dtype, "")
        return None

    def answer_collective(self, group: Group, size_bytes: float) -> Estimate:
        """Of a group that was measured; InputError of any other."""
        if group not in self.curves:
            raise InputError(
                f"{group.kind} in {group.dtype} of {group.groups} groups of {group.group_size} (stride {group.stride}) "
                f"on {group.nodes}x{group.devices_per_node} was not measured on {self.device}",
                remedy="use the learned times, which know unmeasured groups, or those of the catalogue",
            )
        return self._estimate(group, size_bytes)

    def _estimate(self, key: Group | tuple[str, str, str], size: float) -> Estimate:
        if key not in self._spreads:
            self._spreads[key] = self._spread(key)
        inside = self.curves[key].sizes[0] <= size <= self.curves[key].sizes[-1]
        return _within(
            self._at(key, size), self._spreads[key], self.how if inside else f"{self.how}, beyond what was measured"
        )

    def _spread(self, key: Group | tuple[str, str, str]) -> float:
        return self.curves[key].spread()

    def _at(self, key: Group | tuple[str, str, str], size: float) -> float:
        return self.curves[key].at(size)


# Products that the profile of square ones answers for, by FLOP.
PRODUCTS = frozenset({"dot", "mm", "addmm", "bmm", "baddbmm", "matmul", "linear"})


class Linear(Interpolated):
    """pipeDejavu's fit: for each key one straight line of seconds over size, by least squares.

    Its R² is above 0.975 and its error at small sizes is without bounds: large sizes outweigh them. It is here to be
    compared with.
    """

    how = "linear fit"

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        super().__init__(measurements)
        self.lines = {key: _line(curve) for key, curve in self.curves.items()}

    def _at(self, key: Group | tuple[str, str, str], size: float) -> float:
        start, slope = self.lines[key]
        return max(start + slope * size, 0.0)

    def _spread(self, key: Group | tuple[str, str, str]) -> float:
        curve = self.curves[key]
        start, slope = self.lines[key]
        errors = np.abs(np.log(np.maximum(start + slope * curve.sizes, 1e-12) / curve.seconds))
        return float(np.quantile(errors, _COVERAGE))


def _line(curve: Curve) -> tuple[float, float]:
    sizes, seconds = curve.sizes, curve.seconds
    if len(sizes) == 1:
        return float(seconds[0]), 0.0
    slope = float(np.sum((sizes - sizes.mean()) * (seconds - seconds.mean())) / np.sum((sizes - sizes.mean()) ** 2))
    return float(seconds.mean() - slope * sizes.mean()), slope


def one_device(measurements: Sequence[Measurement]) -> str:
    """The device that all these measurements are of. Raises InputError if there are none, or several."""
    devices = sorted({measurement.device for measurement in measurements})
    if len(devices) != 1:
        raise InputError(
            f"measurements of {', '.join(devices)} together" if devices else "there are no measurements",
            remedy="choose one device" if devices else "measure some (headway probe --profile) or import some",
        )
    return devices[0]


# ------------------------------------------------------------------------------------------------------ other devices


def for_cluster(timing: Timing, cluster: Cluster, *, scale: bool = False, origin: Cluster | None = None) -> Timing:
    """`timing`, if it is of the cluster's devices. Of others it is refused, or scaled where `scale` asks for that.

    `origin`: the cluster that was measured, whose links say how collectives are to be scaled. Raises InputError.
    """
    kinds = {device.accelerator for device in cluster.devices}
    if kinds == {timing.device}:
        return timing
    if not scale or len(kinds) != 1:
        raise InputError(
            f"times of {timing.device}, and the cluster has {', '.join(sorted(kinds))}",
            place=cluster.name,
            remedy="measure there, plan without a profile, or have them scaled by peak rates (--scale-profile)",
        )
    return Scaled(timing, cluster, origin=origin)


class Scaled(Timing):
    """The times of one device taken for those of another, divided by the ratio of what both can do at most.

    What does not grow with the size (starting an operator, latency) is kept as it is. Operators go by the ratio of peak
    rates in their dtype, or of memory bandwidth if they are bound by it; collectives by the ratio of what their rings
    get out of the links of both clusters. `how` says that they are scaled, and the bounds are at least half and double.
    """

    def __init__(self, timing: Timing, cluster: Cluster, *, origin: Cluster | None = None) -> None:
        self.timing = timing
        self.target: Accelerator = cluster.accelerator_of(0)
        self.device = self.target.name
        self._communication = Communication(cluster)
        self._origin = None if origin is None else Communication(origin)
        self._measured: Accelerator | None = None
        if origin is not None:
            self._measured = origin.accelerator_of(0)
        else:
            try:
                self._measured = find_accelerator(timing.device)
            except HeadwayError:
                self._measured = None

    def answer(self, query: Query) -> Estimate:
        """The other device's time, beyond its launch divided by the ratio of peak rates or of memory bandwidth."""
        if self._measured is None:
            raise InputError(
                f"the peak rates of {self.timing.device} are not known", remedy="give the cluster measured"
            )
        source, target = self._measured, self.target
        found = self.timing.answer(query)
        compute = query.flop / source.flop_rate(query.dtype) if query.flop else 0.0
        if compute >= query.moved_bytes / source.memory_bytes_per_second and compute > 0:
            ratio = target.flop_rate(query.dtype) / source.flop_rate(query.dtype)
        else:
            ratio = target.memory_bytes_per_second / source.memory_bytes_per_second
        return self._scaled(found, min(source.launch_seconds, found.seconds), ratio)

    def answer_collective(self, group: Group, size_bytes: float) -> Estimate:
        """The other cluster's time, beyond its latency divided by the ratio of what the links give to the group."""
        if self._origin is None:
            raise InputError(
                f"collectives of {self.timing.device} cannot be scaled without the links that they ran on",
                remedy="give the cluster that was measured",
            )
        found = self.timing.answer_collective(group, size_bytes)
        if group.group_size == 1:
            assert self._measured is not None
            ratio = self.target.memory_bytes_per_second / self._measured.memory_bytes_per_second
        else:
            ratio = group_rate(self._communication, group) / group_rate(self._origin, group)
        latency = self.timing.answer_collective(group, 1.0).seconds
        return self._scaled(found, min(latency, found.seconds), ratio)

    def _scaled(self, found: Estimate, kept: float, ratio: float) -> Estimate:
        seconds = kept + (found.seconds - kept) / ratio
        spread = max(_UNKNOWN, math.log(found.high_seconds / found.seconds))
        return _within(seconds, spread, f"scaled from {self.timing.device} by {ratio:.3g}: {found.how}")
