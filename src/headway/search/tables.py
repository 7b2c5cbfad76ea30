"""From a workload and a cluster to a `StageProblem`, and from its solution back to a `Plan`.

A micro-batch here is what goes through the whole pipeline at once: a stage with `data` replicas divides its samples
among them, as in Alpa (Zheng et al., OSDI 2022, section 5.2). Sub-meshes are parts of a node, or whole nodes. The
entries are sums over layers of the predictor's own figures, and two predictions for each option set their scale, so
that what the sums leave out (overlap, fragmentation) is in them on average. What a search picks from the tables, the
predictor judges.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from headway.errors import PlanError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.predict import communication as comm
from headway.predict.communication import Channel
from headway.predict.operators import WHOLE, Shards
from headway.predict.replicas import gradient_reduction
from headway.predict.step import Predictor
from headway.search.problem import Assignment, Option, StageProblem
from headway.workload.graph import Graph, Workload

__all__ = ["Pool", "options_of", "plan_of", "pools_of", "sharding_of", "shards_of", "stage_problem"]

# The dynamic programme has a state for each number of devices left in each pool: sub-meshes get coarser beyond.
_MOST_STATES = 1100
_BUCKET_BYTES = 25 * 2**20  # Plan's default


class Pool(NamedTuple):
    """Nodes that are alike in their devices and in the links that leave these: names of the devices of each node."""

    accelerator: str
    nodes: tuple[tuple[str, ...], ...]

    @property
    def devices(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sub-meshes: parts of a node, each a part of the next larger, and numbers of whole nodes."""
        parts = [len(self.nodes[0])]
        while parts[-1] > 1:
            size = parts[-1]
            parts.append(size // next(factor for factor in range(2, size + 1) if size % factor == 0))
        count = len(self.nodes)
        wholes = (
            {2**at for at in range(count.bit_length())} | {count} | (set(range(1, count + 1)) if count < 9 else set())
        )
        return tuple(sorted({*parts, *(parts[0] * whole for whole in wholes)}))


def pools_of(cluster: Cluster) -> tuple[Pool, ...]:
    """The devices by kind and links, in the order of the cluster; a node with two kinds of device is in two pools."""
    rates: dict[str, Counter[float]] = {}
    for link in cluster.links:
        rates.setdefault(link.source, Counter())[link.bytes_per_second] += 1
    leaving: dict[str, float] = {}  # what a node has to the outside
    node_of = {thing.name: thing.node for thing in (*cluster.devices, *cluster.switches)}
    for link in cluster.links:
        if node_of[link.source] and node_of[link.source] != node_of[link.target]:
            leaving[node_of[link.source]] = leaving.get(node_of[link.source], 0.0) + link.bytes_per_second
    found: dict[tuple, list[tuple[str, ...]]] = {}
    for node, positions in cluster.nodes.items():
        for kind in dict.fromkeys(cluster.devices[at].accelerator for at in positions):
            names = tuple(cluster.devices[at].name for at in positions if cluster.devices[at].accelerator == kind)
            links = tuple(sorted((rate, count) for name in names for rate, count in rates.get(name, Counter()).items()))
            found.setdefault((kind, len(names), links, leaving.get(node, 0.0)), []).append(names)
    return tuple(Pool(key[0], tuple(nodes)) for key, nodes in found.items())


def _coarse_sizes(pools: Sequence[Pool]) -> list[tuple[int, ...]]:
    """The sub-meshes of each pool, without the smallest ones where there would be too many states."""
    most = max(2, round(_MOST_STATES ** (1 / len(pools)))) if len(pools) > 1 else 128
    found = []
    for pool in pools:
        sizes = pool.sizes
        while len(sizes) > 1 and pool.devices // math.gcd(*sizes) > most and pool.devices % math.gcd(*sizes[1:]) == 0:
            sizes = sizes[1:]
        found.append(sizes)
    return found


def options_of(
    graph: Graph, pools: Sequence[Pool], micro_batch: int, *, zero_stage: int = 0, recompute: Sequence[float] = (0, 1)
) -> tuple[Option, ...]:
    """Every sub-mesh with every degree that it allows: tensor parallelism within a node, the rest replicas.

    Replicas must divide the samples of the `micro_batch`. A stage without replicas has ZeRO stage 0. Where a pool is so
    large that the states of its devices are too many, its smallest sub-meshes are left out.
    """
    found = []
    for position, (pool, sizes) in enumerate(zip(pools, _coarse_sizes(pools), strict=True)):
        node = len(pool.nodes[0])
        for size in sizes:
            for tensor in (degree for degree in pool.sizes if degree <= node and size % degree == 0):
                data = size // tensor
                if micro_batch % data or (tensor > 1 and not shards_of(graph, tensor).blocks):
                    continue
                for again in recompute:
                    zero = zero_stage if data > 1 else 0
                    label = f"{size} x {pool.accelerator}: data {data} x tensor {tensor}"
                    found.append(Option(position, size, data, tensor, zero, float(again), label))
    return tuple(found)


def sharding_of(
    graph: Graph, tensor: int, start: int = 0, stop: int | None = None
) -> dict[str, Literal["column", "row"]]:
    """`Plan.tensor_sharding` of all blocks of layers `start` to `stop` that the degree divides."""
    found: dict[str, Literal["column", "row"]] = {}
    for block in graph.blocks if tensor > 1 else ():
        if start <= block.layer < (len(graph.layers) if stop is None else stop) and block.divisor % tensor == 0:
            found.update(dict.fromkeys(block.columns, "column"))
            found.update(dict.fromkeys(block.rows, "row"))
    return found


def shards_of(graph: Graph, tensor: int) -> Shards:
    """The predictor's word for all blocks that the degree divides."""
    if tensor == 1:
        return WHOLE
    return Shards(tensor, frozenset(at for at, block in enumerate(graph.blocks) if block.divisor % tensor == 0))


def stage_problem(
    workload: Workload,
    cluster: Cluster,
    predictor: Predictor,
    *,
    micro_batch: int,
    options: Sequence[Option] | None = None,
    zero_stage: int = 0,
    memory_fraction: float = 0.95,
    most_stages: int = 0,
    pools: Sequence[Pool] | None = None,
) -> StageProblem:
    """The tables for micro-batches of `micro_batch` samples, which must divide the global batch; options: `options_of`.

    All devices of them are used. No more stages are allowed than there are micro-batches, so that 1F1B can fill them.
    `pools`: those to use; None: all of the cluster. Raises PlanError if the micro-batch does not divide the batch.
    """
    if micro_batch < 1 or workload.global_batch % micro_batch:
        raise PlanError(
            f"micro-batches of {micro_batch} do not divide a batch of {workload.global_batch}", place="micro_batch"
        )
    pools = pools or pools_of(cluster)
    if options is None:
        options = options_of(workload.graph, pools, micro_batch, zero_stage=zero_stage)
    layers = len(workload.graph.layers)
    count = workload.global_batch // micro_batch
    tables = _Tables(workload, cluster, predictor, pools, micro_batch)
    shape = (len(options), layers + 1, layers + 1)
    seconds, fixed, kept = np.empty(shape), np.empty(shape), np.empty(shape)
    for at, option in enumerate(options):
        seconds[at], fixed[at], kept[at] = tables.of(option)
    kinds = [cluster.accelerators[pools[option.pool].accelerator] for option in options]
    return StageProblem(
        layers=layers,
        options=tuple(options),
        pools=tuple(pool.devices for pool in pools),
        micro_batches=count,
        seconds=seconds,
        fixed_bytes=fixed,
        kept_bytes=kept,
        capacity_bytes=np.array([kind.memory_bytes * memory_fraction for kind in kinds]),
        send_seconds=tables.sends(options),
        most_stages=min(count, most_stages or layers),
    )


class _Layers(NamedTuple):
    """Figures of each layer on one rank of an option, for one micro-batch; arrays of shape (layers,)."""

    forward: np.ndarray  # seconds
    backward: np.ndarray
    reduce_forward: np.ndarray  # seconds of tensor-parallel all-reduces
    reduce_backward: np.ndarray
    again: np.ndarray  # seconds that recomputation adds
    trainable_bytes: np.ndarray
    parameter_bytes: np.ndarray
    units: np.ndarray
    kept: np.ndarray  # bytes
    kept_recomputed: np.ndarray
    extra: np.ndarray  # bytes of temporaries
    extra_recomputed: np.ndarray
    crossing: np.ndarray  # bytes received: the layer's input and its output's gradient, were it a stage by itself


class _Tables:
    """Entries of all options of one problem; what options share is computed once."""

    def __init__(
        self, workload: Workload, cluster: Cluster, predictor: Predictor, pools: Sequence[Pool], micro_batch: int
    ) -> None:
        self.workload = workload
        self.graph = workload.graph
        self.cluster = cluster
        self.predictor = predictor
        self.pools = pools
        self.devices = [tuple(name for nodes in pool.nodes for name in nodes) for pool in pools]
        self.micro_batch = micro_batch
        self.micro_batches = workload.global_batch // micro_batch
        self.count = len(self.graph.layers)
        self.total = sum(map(len, self.devices))
        self.crowded = self.total > 1
        self._layers: dict[tuple, _Layers] = {}
        self.trainable_tensors = max(1, sum(parameter.trainable for parameter in self.graph.parameters))
        self.never = np.tril(np.ones((self.count + 1, self.count + 1), dtype=bool))
        # Where a stage holds several readers of one parameter, it holds that once.
        self.tied = [
            (parameter, pair)
            for parameter, readers in predictor.sizes.shared
            for pair in zip(sorted(readers), sorted(readers)[1:])
        ]

    def of(self, option: Option) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(seconds, fixed bytes, kept bytes) of one option."""
        shards = shards_of(self.graph, option.tensor)
        layers = self._figures(option, shards)
        seconds = self._seconds(option, layers, shards)
        fixed, kept = self._bytes(option, layers, shards)
        self._scale(option, seconds, fixed, kept)
        seconds[self.never] = np.inf
        return seconds, fixed, kept

    def sends(self, options: Sequence[Option]) -> np.ndarray:
        """Handing a micro-batch on at each cut, and its gradient back, with as many replicas as the median option has.

        The tables have one figure for a cut, whatever stands on its two sides.
        """
        devices = tuple(name for names in self.devices for name in names)
        found = np.zeros(self.count + 1)
        if len(devices) == 1:
            return found
        node = max(len(nodes) for pool in self.pools for nodes in pool.nodes)
        width = min(node, len(devices) // 2)
        channel = self.predictor.communication.channels(devices[: 2 * width], 2, width, 1, "pipeline")[0]
        degrees = sorted(option.data for option in options)
        replicas = degrees[len(degrees) // 2] if degrees else 1
        for at in range(1, self.count):
            size = self.graph.layers[at - 1].output.bytes(self.micro_batch // replicas)
            found[at] = 2 * comm.send_seconds(size, channel)
        return found

    def _figures(self, option: Option, shards: Shards) -> _Layers:
        key = (option.pool, option.devices, option.data, option.tensor)
        found = self._layers.get(key)
        if found is not None:
            return found
        samples = self.micro_batch // option.data
        kind = self.pools[option.pool].accelerator
        precision = self.workload.precision
        before = self.predictor.layer_seconds(kind, samples, shards, precision, crowded=self.crowded)
        forward, backward = (np.diff(each) for each in before)
        there, back, again = (np.zeros(self.count) for _ in range(3))
        if option.tensor > 1:
            channel = self._channel(option, "tensor")
            share = 0.5 if precision != "float32" else 1.0
            cost: dict[int, float] = {}
            for position in shards.blocks:
                block = self.graph.blocks[position]
                for tensor, where in ((block.output, there), (block.input, back), (block.output, again)):
                    size = tensor.bytes(samples)
                    if size not in cost:
                        cost[size] = comm.all_reduce_seconds(size * share, channel)
                    where[block.layer] += cost[size]
        sizes = self.predictor.sizes
        parameters = [sizes.parameters(at, at + 1, shards) for at in range(self.count)]
        plain = [sizes.activations(at, at + 1, (), samples, shards, precision) for at in range(self.count)]
        redone = [sizes.activations(at, at + 1, (at,), samples, shards, precision) for at in range(self.count)]
        found = self._layers[key] = _Layers(
            forward=forward,
            backward=backward,
            reduce_forward=there,
            reduce_backward=back,
            again=forward + again,
            trainable_bytes=np.array([one.trainable_bytes for one in parameters], dtype=float),
            parameter_bytes=np.array([one.bytes for one in parameters], dtype=float),
            units=np.array(sizes.units, dtype=float),
            kept=np.array([one.kept for one in plain]),
            kept_recomputed=np.array([one.kept for one in redone]),
            extra=np.array([one.peak - one.kept for one in plain]),
            extra_recomputed=np.array([one.peak - one.kept for one in redone]),
            crossing=np.array([one.input for one in plain]),
        )
        return found

    def _channel(self, option: Option, axis: comm.Axis) -> Channel:
        """The channel of a sub-mesh, with its neighbours on the node doing the same at the same time."""
        devices = self.devices[option.pool]
        node = len(self.pools[option.pool].nodes[0])
        beside = max(1, node // option.devices)
        chosen = devices[: beside * option.devices]
        return self.predictor.communication.channels(chosen, beside, option.data, option.tensor, axis)[0]

    def _ranges(self, each: np.ndarray) -> np.ndarray:
        before = np.concatenate(([0.0], np.cumsum(each)))
        return before[None, :] - before[:, None]

    def _held(self, each: np.ndarray, shards: Shards) -> np.ndarray:
        """Bytes of the parameters of each range, those of several layers once."""
        found = self._ranges(each)
        for parameter, (first, second) in self.tied:
            found[: first + 1, second + 1 :] -= self.predictor.sizes.local_bytes(parameter, shards)
        return found

    def _seconds(self, option: Option, layers: _Layers, shards: Shards) -> np.ndarray:
        m = self.micro_batches
        kind = self.cluster.accelerators[self.pools[option.pool].accelerator]
        forward = self._ranges(layers.forward)
        backward = self._ranges(layers.backward + (layers.again if option.recompute else 0.0))
        trainable = self._held(layers.trainable_bytes, shards)
        seconds = forward + backward + self._ranges(layers.reduce_forward + layers.reduce_backward)
        rate = kind.memory_bytes_per_second * kind.memory_efficiency / self.cluster.memory_contention
        seconds += 3 * trainable * (m - 1) / m / rate  # adding up gradients: two reads, one write
        updated = trainable / 4
        once = np.zeros_like(seconds)
        if option.data > 1:
            channel = self._channel(option, "data")
            overlaps = kind.torch_device != "cpu"
            if option.zero_stage < 2:
                bucket = min(float(_BUCKET_BYTES), max(float(trainable.max()), 1.0))
                reduce = gradient_reduction(
                    option.zero_stage, self.workload.recipe.framework, optimizer_on="device",
                    tensor_bytes=float(layers.trainable_bytes.sum()) / self.trainable_tensors,
                )  # fmt: skip
                whole = trainable * (reduce(bucket, channel) / bucket)
                hidden = np.minimum(whole, backward) * (1 - np.minimum(1, bucket / np.maximum(trainable, 1)))
                once += whole - (hidden if overlaps else 0.0)
                if option.zero_stage:
                    part = _curve(comm.broadcast_seconds, trainable / option.data, channel)
                    once += option.data * part
                    updated = updated / option.data
            else:
                updated = updated / option.data
                seconds += self._sharding_seconds(option, layers, channel, rate, overlaps, forward, backward)
        traffic = self.workload.optimizer.traffic_bytes_per_element
        once += updated * traffic / rate
        return seconds + once / m

    def _sharding_seconds(
        self, option: Option, layers: _Layers, channel: Channel, rate: float, overlaps: bool, forward: np.ndarray,
        backward: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """ZeRO 2 and 3 in a pipeline: parameters gathered layer by layer, gradients scattered once in a step."""
        m, units = self.micro_batches, layers.units
        gather = units * _curve(comm.all_gather_seconds, layers.parameter_bytes / units, channel)
        gather = self._ranges(gather + 2 * layers.parameter_bytes / rate)
        scatter = units * _curve(comm.reduce_scatter_seconds, layers.trainable_bytes / units, channel)
        scatter = self._ranges(scatter + 2 * layers.trainable_bytes / rate) / m
        there = gather if option.zero_stage == 3 else gather / m
        back = scatter + (gather if option.zero_stage == 3 else 0.0)
        if not overlaps:
            return there + back
        count = np.maximum(self._ranges(units), 1)
        shown = there / count + np.maximum(0.0, there * (1 - 1 / count) - forward)
        return shown + back / count + np.maximum(0.0, back * (1 - 1 / count) - backward)

    def _bytes(self, option: Option, layers: _Layers, shards: Shards) -> tuple[np.ndarray, np.ndarray]:
        m, optimizer, recipe = self.micro_batches, self.workload.optimizer, self.workload.recipe
        parameters = self._held(layers.parameter_bytes, shards) * recipe.parameter_bytes / 4
        gradients = self._held(layers.trainable_bytes, shards) * recipe.gradient_bytes / 4
        elements = self._held(layers.trainable_bytes, shards) / 4
        fixed = parameters + gradients
        if option.data > 1:
            if option.zero_stage >= 1:
                elements = elements / option.data
            if option.zero_stage >= 2:
                fixed += parameters / option.data
            elif m > 1:
                fixed += gradients
        fixed += elements * (optimizer.state_bytes_per_element + recipe.master_bytes)
        kept = np.maximum(self._ranges(layers.kept_recomputed if option.recompute else layers.kept), 0.0)
        came = layers.crossing[np.minimum(np.arange(self.count + 1), self.count - 1)][:, None]
        left = np.concatenate(([0.0], layers.crossing[1:], [0.0]))[None, :]
        if recipe.framework in ("megatron", "megatron-deepspeed"):
            # The inputs of the micro-batches in flight, and one gradient; what was sent on is released.
            fixed += came + left
            kept = np.maximum(kept + came - left, 0.0)
        else:
            # torch.distributed.pipelining receives every micro-batch into a buffer of its own, both ways.
            fixed += m * (came + left)
        samples = self.micro_batch * (1 if recipe.framework.startswith("megatron") else m) // option.data
        fixed += sum(kind.bytes(samples) for kind in self.graph.inputs) + self.graph.buffer_bytes
        extra = layers.extra_recomputed if option.recompute else layers.extra
        fixed += _largest(extra)
        return fixed, kept

    def _scale(self, option: Option, seconds: np.ndarray, fixed: np.ndarray, kept: np.ndarray) -> None:
        """Bring the entries to the predictor's figures for this option in one stage, and in two.

        One stage with all devices is what it is predicted to be. Others are scaled as a pipeline of two such stages
        (or one, where there are no devices for two) is predicted to differ from their sums.
        """
        devices = self.devices[option.pool]
        count, m = self.count, self.micro_batches
        half = count // 2
        two = count > 1 and m > 1 and len(devices) >= 2 * option.devices
        if two and (plan := self._uniform(option, devices[: 2 * option.devices], (0, half, count))) is not None:
            found = self.predictor.predict(plan)
            both = np.array([seconds[0, half], seconds[half, count]])
            seconds *= found.time.step_seconds / (both.sum() + (m - 1) * both.max())
            needs = [fixed[0, half] + 2 * kept[0, half], fixed[half, count] + kept[half, count]]
            has = [found.memory[0].total_bytes, found.memory[-1].total_bytes]
            # The larger of both: what the tables let through should fit.
            factor = max(mine / sum_here for mine, sum_here in zip(has, needs, strict=True))
            fixed *= factor
            kept *= factor
        if two and option.devices < self.total:
            return
        if (plan := self._uniform(option, devices[: option.devices], (0, count))) is not None:
            found = self.predictor.predict(plan)
            whole = found.time.step_seconds / m
            if option.zero_stage < 2:
                seconds *= whole / seconds[0, count]
            seconds[0, count] = whole
            fixed[0, count], kept[0, count] = max(one.total_bytes for one in found.memory), 0.0

    def _uniform(self, option: Option, devices: tuple[str, ...], cuts: tuple[int, ...]) -> Plan | None:
        stages = [Assignment(start, stop, 0) for start, stop in pairwise(cuts)]
        return _plan(self.workload, [option] * len(stages), stages, devices, self.micro_batch)


def _curve(seconds: Callable[[float, Channel], float], sizes: np.ndarray, channel: Channel) -> np.ndarray:
    """A collective's seconds for many sizes in bytes: exact at 48 of them, which are dense where it bends."""
    most = max(float(np.max(sizes)), 1.0)
    points = np.concatenate(([0.0], np.geomspace(min(1024.0, most), most, 47)))
    return np.interp(np.maximum(sizes, 0.0), points, [seconds(float(at), channel) for at in points])


def _largest(each: np.ndarray) -> np.ndarray:
    """[j, i]: the largest of layers j to i (exclusive)."""
    count = len(each)
    found = np.zeros((count + 1, count + 1))
    for start in range(count):
        found[start, start + 1 :] = np.maximum.accumulate(each[start:])
    return found


# ------------------------------------------------------------------------------------------------------------- plans


def plan_of(
    problem: StageProblem,
    solution: Sequence[Assignment],
    workload: Workload,
    cluster: Cluster,
    *,
    pools: Sequence[Pool] | None = None,
    place: str = "stages",
) -> Plan:
    """The plan that a solution stands for, with devices: parts of nodes together, in the order of the pipeline.

    Sub-meshes of one size follow each other through the nodes; of the ways to begin with them that one is taken which
    has the cheaper cuts between nodes. A plan of equal stages is uniform. Raises PlanError for a solution that the
    problem does not allow, or whose stages have different ZeRO stages.
    """
    if not math.isfinite(problem.evaluate(solution)):
        raise PlanError("no solution of the problem", place=place, remedy="solve it again with more memory or devices")
    options = [problem.options[stage.option] for stage in solution]
    pools = pools or pools_of(cluster)
    placed = min(
        (_place(pools, options, turn) for turn in (0, 1)),
        key=lambda way: _crossing(problem, solution, way, cluster),
    )
    micro_batch = workload.global_batch // problem.micro_batches
    devices = tuple(name for names in placed for name in names)
    plan = _plan(workload, options, solution, devices, micro_batch)
    if plan is None:
        raise PlanError("stages with replicas have different ZeRO stages", place=place, remedy="offer one of them")
    return plan.validate(workload.graph, cluster)


def _place(pools: Sequence[Pool], options: Sequence[Option], turn: int) -> list[tuple[str, ...]]:
    """The devices of each stage. Larger sub-meshes first: each size divides the next, so that none is torn apart."""
    found: list[tuple[str, ...]] = [()] * len(options)
    for number, pool in enumerate(pools):
        mine = [at for at, option in enumerate(options) if option.pool == number]
        free = [name for nodes in pool.nodes for name in nodes]
        for size in sorted({options[at].devices for at in mine}, reverse=True):
            same = [at for at in mine if options[at].devices == size]
            for at in (*same[turn:], *same[:turn]):
                found[at], free = tuple(free[:size]), free[size:]
    return found


def _crossing(
    problem: StageProblem, solution: Sequence[Assignment], placed: Sequence[tuple[str, ...]], cluster: Cluster
) -> float:
    """Seconds of the sends that leave a node."""
    node_of = {device.name: device.node for device in cluster.devices}
    return sum(
        float(problem.send_seconds[stage.start])
        for stage, here, before in zip(solution[1:], placed[1:], placed, strict=False)
        if node_of[here[0]] != node_of[before[-1]]
    )


def _plan(
    workload: Workload, options: Sequence[Option], stages: Sequence[Assignment], devices: tuple[str, ...],
    micro_batch: int,
) -> Plan | None:  # fmt: skip
    """The plan of these stages on `devices`, or None where their ZeRO stages differ."""
    graph = workload.graph
    zero = {option.zero_stage for option in options if option.data > 1}
    if len(zero) > 1:
        return None
    data, tensor = math.gcd(*(option.data for option in options)), min(option.tensor for option in options)
    sharding: dict[str, Literal["column", "row"]] = {}
    made = []
    for option, (start, stop, _) in zip(options, stages, strict=True):
        sharding.update(sharding_of(graph, option.tensor, start, stop))
        made.append(
            Stage(
                start=start,
                stop=stop,
                recompute=tuple(range(start, stop)) if option.recompute else (),
                data=option.data if option.data != data else 0,
                tensor=option.tensor if option.tensor != tensor else 0,
            )
        )
    plan = Plan(
        model=graph.name,
        devices=devices,
        global_batch=workload.global_batch,
        micro_batch=micro_batch // data,
        stages=tuple(made),
        data=data,
        tensor=tensor,
        pipeline=len(made),
        schedule="none" if len(made) == 1 else "1f1b",
        zero_stage=zero.pop() if zero else 0,  # type: ignore[arg-type]
        tensor_sharding=sharding,
        precision=workload.precision,  # type: ignore[arg-type]
    )
    if plan.schedule == "1f1b" and plan.micro_batches < plan.pipeline:
        return msgspec.structs.replace(plan, schedule="gpipe")
    return plan
