"""How each operator of a layer is divided among the ranks of a mesh: Alpa's intra-operator choice.

Every operator has a few sharding specs, each with a cost (compute, and the communication that the spec itself needs)
and memory; where neighbours' specs do not agree on the layout of the tensor between them, it is resharded, at a cost.
The choice with the least total under a limit of memory is an integer program (Zheng et al., OSDI 2022, section 4.2),
which HiGHS solves. Nothing here knows of Megatron's rule; on a transformer's blocks it comes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from headway.errors import DoesNotFitError, MissingExtraError
from headway.hardware.cluster import Accelerator
from headway.predict import communication as comm
from headway.predict.communication import Channel
from headway.predict.operators import is_matrix_operator
from headway.workload.graph import Graph, Operator, Workload

__all__ = [
    "Edge",
    "Node",
    "Sharding",
    "ShardingProblem",
    "brute_force_sharding",
    "layer_problem",
    "sharded_blocks",
    "solve_sharding",
]


class Node(NamedTuple):
    """An operator, or several that are divided together: names of its specs, seconds and bytes of each."""

    name: str
    specs: tuple[str, ...]
    seconds: tuple[float, ...]
    bytes: tuple[float, ...]


class Edge(NamedTuple):
    """A tensor from one node to another: `seconds[s, t]` to reshard it from the source's spec s for the target's t."""

    source: int
    target: int
    seconds: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardingProblem:
    """One spec for each node, so that the sum of all seconds is the least and all bytes stay within the capacity."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    capacity_bytes: float = math.inf

    def evaluate(self, choice: Sequence[int]) -> float:
        """Seconds of one choice of specs; infinity where it does not fit, or a layout can't be had."""
        if sum(node.bytes[spec] for node, spec in zip(self.nodes, choice, strict=True)) > self.capacity_bytes:
            return math.inf
        inside = sum(node.seconds[spec] for node, spec in zip(self.nodes, choice, strict=True))
        return inside + sum(float(edge.seconds[choice[edge.source], choice[edge.target]]) for edge in self.edges)


class Sharding(NamedTuple):
    """The spec of each node (its position among the node's specs), and the seconds of all."""

    seconds: float
    choice: tuple[int, ...]

    def named(self, problem: ShardingProblem) -> dict[str, str]:
        """Node to spec, by name."""
        return {node.name: node.specs[spec] for node, spec in zip(problem.nodes, self.choice, strict=True)}


def brute_force_sharding(problem: ShardingProblem) -> Sharding:
    """The best choice by trying all of them: the oracle for small problems."""
    choices = product(*(range(len(node.specs)) for node in problem.nodes))
    seconds, choice = min((problem.evaluate(choice), choice) for choice in choices)
    return Sharding(seconds, choice)


def solve_sharding(problem: ShardingProblem) -> Sharding:
    """The best choice, by HiGHS.

    One binary variable for each spec of each node; for each edge and pair of specs one that is 1 where both are chosen
    (it need not be declared integer: with the specs settled it can be nothing else).

    Raises DoesNotFitError if no choice is allowed, and MissingExtraError without highspy (extra `solve`).
    """
    try:
        import highspy
    except ImportError:
        raise MissingExtraError(library="highspy", extra="solve") from None
    # Seconds are far below the solver's tolerances: it works in shares of the largest cost.
    costs = [value for node in problem.nodes for value in node.seconds if math.isfinite(value)]
    costs += [float(value) for edge in problem.edges for value in edge.seconds.ravel() if math.isfinite(value)]
    unit = max((abs(value) for value in costs), default=0.0) or 1.0
    room = problem.capacity_bytes if math.isfinite(problem.capacity_bytes) else 0.0
    largest = max((value for node in problem.nodes for value in node.bytes), default=0.0) or 1.0
    columns: list[tuple[float, float]] = []  # cost and upper bound
    rows: list[tuple[float, float, list[int], list[float]]] = []
    first = []
    for node in problem.nodes:
        first.append(len(columns))
        columns += [(value / unit, 1.0) if math.isfinite(value) else (0.0, 0.0) for value in node.seconds]
        chosen = list(range(first[-1], len(columns)))
        rows.append((1.0, 1.0, chosen, [1.0] * len(chosen)))
    binaries = len(columns)
    for edge in problem.edges:
        start = len(columns)
        count, across = edge.seconds.shape
        columns += [(float(v) / unit, 1.0) if math.isfinite(v) else (0.0, 0.0) for v in edge.seconds.ravel()]
        for spec in range(count):
            pairs = [start + spec * across + other for other in range(across)]
            rows.append((0.0, 0.0, [*pairs, first[edge.source] + spec], [1.0] * across + [-1.0]))
        for spec in range(across):
            pairs = [start + other * across + spec for other in range(count)]
            rows.append((0.0, 0.0, [*pairs, first[edge.target] + spec], [1.0] * count + [-1.0]))
    if math.isfinite(problem.capacity_bytes):
        weights = [value / largest for node in problem.nodes for value in node.bytes]
        rows.append((-math.inf, room / largest, list(range(binaries)), weights))
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(columns), len(rows)
    program.col_cost_ = [cost for cost, _ in columns]
    program.col_lower_ = [0.0] * len(columns)
    program.col_upper_ = [upper for _, upper in columns]
    program.row_lower_ = [lower for lower, *_ in rows]
    program.row_upper_ = [upper for _, upper, *_ in rows]
    matrix = program.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.start_ = np.concatenate(([0], np.cumsum([len(row[2]) for row in rows]))).astype(int).tolist()
    matrix.index_ = [column for row in rows for column in row[2]]
    matrix.value_ = [value for row in rows for value in row[3]]
    whole, real = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
    program.integrality_ = [whole] * binaries + [real] * (len(columns) - binaries)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", 0.0)
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        least = sum(min(node.bytes) for node in problem.nodes)
        raise DoesNotFitError(
            f"no choice of specs fits {problem.capacity_bytes:.4g} bytes; the smallest needs {least:.4g}",
            place="sharding",
            remedy="divide among more ranks, or use fewer layers on each",
        )
    values = solver.getSolution().col_value
    choice = tuple(
        max(range(len(node.specs)), key=lambda spec: values[start + spec])
        for node, start in zip(problem.nodes, first, strict=True)
    )
    return Sharding(problem.evaluate(choice), choice)


# ------------------------------------------------------------------------------------------------- layers of a graph

# What a spec takes and what it makes: each rank the whole tensor, its part of the samples, or of the features.
_WHOLE, _SAMPLES, _FEATURES = 0, 1, 2
_LINEAR = {
    "replicated": (_WHOLE, _WHOLE),
    "batch": (_SAMPLES, _SAMPLES),
    "column": (_WHOLE, _FEATURES),
    "row": (_FEATURES, _WHOLE),
}
_OTHER = {"replicated": (_WHOLE, _WHOLE), "batch": (_SAMPLES, _SAMPLES)}


class _Part(NamedTuple):
    """Operators that become one node. `block`: the tensor-parallel block of its linears, or -1."""

    name: str
    linear: bool
    block: int
    operators: tuple[int, ...]
    between: tuple[int, ...]  # operators inside of a block that run in the layout that this node takes


def layer_problem(
    workload: Workload,
    accelerator: Accelerator,
    layer: int,
    *,
    samples: int,
    tensor: Channel,
    data: Channel | None = None,
    micro_batches: int = 1,
    capacity_bytes: float = math.inf,
) -> ShardingProblem:
    """The choice for one layer on a mesh of data x tensor ranks, `samples` of a micro-batch on each data rank.

    Nodes are the linear modules (those of a block that read the same tensor as one, since their gradients are added
    up before they are reduced) and what stands between blocks; what stands inside of a block runs in the layout that
    the next linear takes. The linears' specs along the tensor axis: "replicated", "batch" (samples divided; gradients
    are all-reduced), "column" (the input's gradient is), "row" (the output is). Tensors are resharded by all-gather,
    all-to-all, or for nothing by taking a slice; what backward does is counted too. The layer takes its input in the
    layout in which it leaves its output, so that layers follow each other. Once-in-a-step costs are divided by
    `micro_batches`. Times are those of a roofline; `capacity_bytes` is for weights with their states, and activations.
    """
    graph = workload.graph
    parts, links = _parts(graph, layer)
    low = workload.precision != "float32"
    count = tensor.size
    element = 0.5 if low else 1.0  # activations are traced in float32
    rate = accelerator.flop_rate(workload.precision) * accelerator.efficiency
    streaming = accelerator.memory_bytes_per_second * accelerator.memory_efficiency
    divisible = samples % count == 0
    nodes = [Node("input", *_stream(divisible))]
    layouts: list[tuple[tuple[int, int], ...]] = [tuple(_OTHER.values())[: len(nodes[0].specs)]]
    state_share = 2 + workload.optimizer.state_bytes_per_element / 4  # weights, gradients, optimizer, in weights
    for part in parts:
        operators = [graph.operators[at] for at in part.operators]
        weights = _weight_bytes(graph, operators)
        made = sum(kind.bytes(samples) for operator in operators for kind in operator.outputs[:1]) * element
        # Backward does twice the work.
        work = [graph.operators[at] for at in (*part.operators, *part.between)]
        flop = 3 * sum(operator.flop.at(samples) for operator in work)
        moved = 3 * (made + sum(k.bytes(samples) for one in work if not one.is_view for k in one.inputs[:1]) * element)
        specs, seconds, sizes = [], [], []
        for spec in _LINEAR if part.linear else _OTHER:
            if spec == "batch" and not divisible:
                continue
            if spec in ("column", "row") and not _divides(graph, part, operators, spec, count):
                continue
            share = 1 if spec == "replicated" else count
            held = weights / (count if spec in ("column", "row") else 1)
            # Each pass reads the weights, however few the samples are.
            time = max(flop / share / rate, (moved / share + 3 * held * element) / streaming)
            once = 0.0
            if spec == "batch":
                once += comm.all_reduce_seconds(weights, tensor)
            elif spec == "column":
                entered = max((kind.bytes(samples) for kind in _activations(graph, operators)), default=0) * element
                time += comm.all_reduce_seconds(entered, tensor)
            elif spec == "row":
                time += comm.all_reduce_seconds(made, tensor)
            if data is not None:
                once += comm.all_reduce_seconds(held, data)
            specs.append(spec)
            seconds.append(time + once / micro_batches)
            divided = count if spec in ("batch", "column") else 1
            sizes.append(held * state_share + made / divided)
        nodes.append(Node(part.name, tuple(specs), tuple(seconds), tuple(sizes)))
        table = _LINEAR if part.linear else _OTHER
        layouts.append(tuple(table[spec] for spec in specs))
    edges = []
    for source, target, size, inside in links:
        cost = _resharding(size(samples) * element, tensor, inside)
        edges.append(
            Edge(
                source,
                target,
                np.array([[cost[made][takes] for takes, _ in layouts[target]] for _, made in layouts[source]]),
            )
        )
    last = len(nodes) - 1
    same = np.array([[0.0 if made == own else math.inf for _, own in layouts[0]] for _, made in layouts[last]])
    edges.append(Edge(last, 0, same))
    return ShardingProblem(tuple(nodes), tuple(edges), capacity_bytes)


def sharded_blocks(
    workload: Workload,
    accelerator: Accelerator,
    *,
    samples: int,
    tensor: Channel,
    data: Channel | None = None,
    micro_batches: int = 1,
) -> frozenset[int]:
    """Positions in `Graph.blocks` of those for which the best choice is tensor parallelism: columns, then rows.

    Layers that compute the same are decided once.
    """
    graph = workload.graph
    known: dict[str, tuple[bool, ...]] = {}
    chosen = set()
    for layer, one in enumerate(graph.layers):
        blocks = [at for at, block in enumerate(graph.blocks) if block.layer == layer]
        if not blocks:
            continue
        key = one.signature or str(layer)
        if key not in known:
            problem = layer_problem(
                workload, accelerator, layer, samples=samples, tensor=tensor, data=data, micro_batches=micro_batches
            )
            specs = solve_sharding(problem).named(problem)
            known[key] = tuple(
                specs.get(_name(graph.blocks[at].columns)) == "column"
                and specs.get(_name(graph.blocks[at].rows)) == "row"
                for at in blocks
            )
        chosen |= {at for at, wanted in zip(blocks, known[key], strict=True) if wanted}
    return frozenset(chosen)


def _stream(divisible: bool) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    count = 2 if divisible else 1
    return ("replicated", "batch")[:count], (0.0,) * count, (0.0,) * count


def _name(modules: Sequence[str]) -> str:
    return " + ".join(modules)


def _is_linear(operator: Operator) -> bool:
    return is_matrix_operator(operator) and bool(operator.reads_parameters)


def _weight_bytes(graph: Graph, operators: Sequence[Operator]) -> float:
    names = {graph.parameter_by_name[name].name for operator in operators for name in operator.reads_parameters}
    return float(sum(graph.parameter_by_name[name].bytes for name in names))


def _activations(graph: Graph, operators: Sequence[Operator]):
    """Inputs of linears that grow with the samples."""
    return [kind for operator in operators for kind in operator.inputs if any(kind.per_sample)]


def _divides(graph: Graph, part: _Part, operators: Sequence[Operator], spec: str, count: int) -> bool:
    if part.block >= 0:
        # Inside of a block only what was proven goes by features: its columns and its rows.
        block = graph.blocks[part.block]
        return block.divisor % count == 0 and part.name == _name(block.columns if spec == "column" else block.rows)
    shapes = [
        graph.parameter_by_name[name].shape
        for operator in operators
        for name in operator.reads_parameters
        if len(graph.parameter_by_name[name].shape) == 2
    ]
    return bool(shapes) and all(shape[0 if spec == "column" else 1] % count == 0 for shape in shapes)


def _parts(graph: Graph, layer: int):
    """(parts, links) of a layer's forward pass; link: (source node, target node, bytes at samples, within a block)."""
    forward = graph.layers[layer].forward
    producers: dict[int, tuple[set[int], set[int]]] = {}  # tensor → nodes that it is from, operators on the way
    parts: list[_Part] = []
    inside: list[set[int]] = []
    links: dict[tuple[int, int], tuple] = {}
    node_of: dict[str, int] = {}
    entered = graph.layers[layer].input or graph.layers[layer].output
    outputs = [entered.bytes]
    for at in forward:
        operator = graph.operators[at]
        sources: set[int] = set()
        passed: set[int] = set()
        for tensor, kind in zip(operator.input_tensors, operator.inputs, strict=False):
            if not any(kind.per_sample):
                continue
            found = producers.get(tensor, ({0}, set()))
            sources |= found[0]
            passed |= found[1]
        linear = _is_linear(operator)
        alone = not linear and not operator.is_view and operator.block < 0 and any(operator.outputs[0].per_sample)
        if not linear and not alone:
            for tensor in operator.output_tensors:
                producers[tensor] = (sources or {0}, passed | ({at} if not operator.is_view else set()))
            continue
        name = operator.module if linear else f"{operator.module or graph.layers[layer].name}#{at}"
        block = -1
        if linear and operator.block >= 0:
            block = operator.block
            modules = graph.blocks[block]
            name = _name(modules.columns if operator.module in modules.columns else modules.rows)
        if name in node_of and linear and block >= 0:
            number = node_of[name]
            old = parts[number - 1]
            parts[number - 1] = old._replace(operators=(*old.operators, at))
            inside[number - 1] |= passed
        else:
            number = node_of[name] = len(parts) + 1
            parts.append(_Part(name, linear, block, (at,), ()))
            inside.append(set(passed))
            outputs.append(lambda samples: 0)
        for source in sources:
            within = source > 0 and block >= 0 and parts[source - 1].block == block
            links[source, number] = (source, number, outputs[source], within)
        members = parts[number - 1].operators
        outputs[number] = _total_of([graph.operators[one].outputs[0] for one in members])
        for tensor in operator.output_tensors:
            producers[tensor] = ({number}, set())
    parts = [part._replace(between=tuple(sorted(ways))) for part, ways in zip(parts, inside, strict=True)]
    sized = [(source, target, outputs[source], within) for source, target, _, within in links.values()]
    return parts, sized


def _total_of(kinds):
    return lambda samples: sum(kind.bytes(samples) for kind in kinds)


def _resharding(size: float, channel: Channel, within: bool) -> list[list[float]]:
    """[layout made][layout taken]: seconds forward and backward to reshard a tensor of `size` bytes.

    By features a tensor may only pass what a block was proven to allow: elsewhere it is gathered first.
    """
    gather = comm.all_gather_seconds(size, channel)
    n = channel.size  # each holds 1/n, and keeps 1/n of that
    every = channel.seconds(n - 1, size * (n - 1) / n / n) if n > 1 else 0.0
    by_features = 0.0 if within else 2 * gather
    # Taking a slice is free; its gradient is gathered. Gathering is not; its gradient is a slice.
    return [
        [0.0, gather, gather],
        [gather, 0.0, 2 * every],
        [gather, 2 * every, by_features],
    ]
