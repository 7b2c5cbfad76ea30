"""Small models and machines built by hand, so that every expected number can be worked out on paper."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.plan.plan import Plan, Stage
from headway.workload.graph import (
    Affine,
    Graph,
    Layer,
    Operator,
    OptimizerKind,
    Parameter,
    TensorBlock,
    TensorKind,
    Unit,
    Workload,
)

WIDTH = 64


def per_sample(*shape: int, dtype: str = "float32") -> TensorKind:
    return TensorKind(fixed=(0, *shape[1:]), per_sample=(shape[0], *(0 for _ in shape[1:])), dtype=dtype)


def constant(*shape: int, dtype: str = "float32") -> TensorKind:
    return TensorKind(fixed=shape, per_sample=tuple(0 for _ in shape), dtype=dtype)


def make_graph(layers: int = 4, width: int = WIDTH, tokens: int = 16) -> Graph:
    """A stack of two-Linear blocks (width → 4 width → width); every block can be split by tensor parallelism."""
    operators: list[Operator] = []
    made: list[Layer] = []
    parameters: list[Parameter] = []
    blocks: list[TensorBlock] = []
    narrow, wide = per_sample(tokens, width), per_sample(tokens, 4 * width)
    one, two = constant(width, 4 * width), constant(4 * width, width)
    flop = Affine(per_sample=2.0 * tokens * width * 4 * width)

    def add(backward: bool, layer: int, inputs, outputs, in_dims, out_dims, target="aten.mm.default", cost=flop):
        operators.append(
            Operator(
                target=target,
                module=f"layers.{layer}",
                layer=layer,
                backward=backward,
                inputs=inputs,
                outputs=outputs,
                flop=cost,
                block=layer,
                sharded_inputs=in_dims,
                sharded_outputs=out_dims,
                arguments=(*({"tensor": at} for at in range(len(inputs))), *([0] if "threshold" in target else [])),
            )
        )
        return len(operators) - 1

    forward_positions: list[tuple[int, ...]] = []
    for layer in range(layers):
        first = add(False, layer, (narrow, one), (wide,), (-1, 1), (1,))
        active = add(False, layer, (wide,), (wide,), (1,), (1,), "aten.relu.default", Affine())
        second = add(False, layer, (wide, two), (narrow,), (1, 0), (-1,))
        forward_positions.append((first, active, second))
    backward_positions: dict[int, tuple[int, ...]] = {}
    for layer in reversed(range(layers)):
        backward_positions[layer] = (
            add(True, layer, (narrow, constant(width, 4 * width)), (wide,), (-1, 1), (1,)),
            add(True, layer, (wide, wide), (wide,), (1, 1), (1,), "aten.threshold_backward.default", Affine()),
            add(True, layer, (wide, constant(4 * width, width)), (narrow,), (1, 0), (-1,)),
        )
    for layer in range(layers):
        names = (f"layers.{layer}.one.weight", f"layers.{layer}.two.weight")
        parameters.append(Parameter(name=names[0], shape=(4 * width, width), dtype="float32", layer=layer))
        parameters.append(Parameter(name=names[1], shape=(width, 4 * width), dtype="float32", layer=layer))
        made.append(
            Layer(
                name=f"layers.{layer}",
                entry_module=f"layers.{layer}" if layer else "",
                entry_argument=0,
                forward=forward_positions[layer],
                backward=backward_positions[layer],
                parameters=names,
                forward_flop=flop + flop,
                backward_flop=flop + flop,
                saved=Affine(per_sample=2.0 * tokens * 4 * width * 4),
                saved_sharded=Affine(per_sample=2.0 * tokens * 4 * width * 4),
                output=narrow,
                input=narrow if layer else None,
                backward_peak_extra=Affine(per_sample=float(tokens * 4 * width * 4)),
                signature="block" if layer else "first block",
            )
        )
        blocks.append(
            TensorBlock(
                layer=layer,
                columns=(f"layers.{layer}.one",),
                rows=(f"layers.{layer}.two",),
                divisor=width,
                input=narrow,
                output=narrow,
                parameters={names[0]: 0, names[1]: 1},
            )
        )
    units = tuple(
        Unit(module=f"layers.{layer}", layer=layer, produces=(narrow,), structure="") for layer in range(layers)
    )
    return Graph(
        name="blocks",
        operators=tuple(operators),
        layers=tuple(made),
        parameters=tuple(parameters),
        units=units,
        inputs=(narrow,),
        blocks=tuple(blocks),
        tokens_per_sample=tokens,
    )


def make_accelerator(name: str = "unit", **fields) -> Accelerator:
    values = {
        "flop_per_second": {"float32": 1e12, "bfloat16": 4e12},
        "memory_bytes": 1e10,
        "memory_bytes_per_second": 1e11,
        "power_watts": 100.0,
        "dollars_per_hour": 3.6,
    }
    return Accelerator(name=name, **{**values, **fields})


def make_cluster(
    nodes: int = 1,
    per_node: int = 4,
    *,
    inside: float = 1e10,
    outside: float = 1e9,
    latency: float = 1e-6,
    interfaces: int = 1,
    accelerators: tuple[Accelerator, ...] = (),
    **fields,
) -> Cluster:
    """Nodes whose devices meet in a switch; `interfaces` NICs join each node to one network switch."""
    kinds = accelerators or (make_accelerator(),)
    devices, switches, links = [], [], []

    def both(one: str, two: str, rate: float, kind: str) -> None:
        for source, target in ((one, two), (two, one)):
            links.append(Link(source=source, target=target, bytes_per_second=rate, latency_seconds=latency, kind=kind))

    for node in range(nodes):
        switches.append(Switch(name=f"n{node}/switch", node=f"n{node}"))
        for at in range(per_node):
            kind = kinds[(node * per_node + at) % len(kinds)]
            devices.append(Device(name=f"n{node}/{at}", accelerator=kind.name, node=f"n{node}"))
            both(f"n{node}/{at}", f"n{node}/switch", inside, "nvlink")
        for nic in range(interfaces if nodes > 1 else 0):
            switches.append(Switch(name=f"n{node}/nic{nic}", node=f"n{node}"))
            both(f"n{node}/nic{nic}", "network", outside, "network")
            if interfaces == 1:
                both(f"n{node}/switch", f"n{node}/nic{nic}", inside * per_node, "pcie")
            else:
                for at in range(nic, per_node, interfaces):
                    both(f"n{node}/{at}", f"n{node}/nic{nic}", inside, "pcie")
    if nodes > 1:
        switches.append(Switch(name="network"))
    return Cluster(
        name="hand-built",
        accelerators={kind.name: kind for kind in kinds},
        devices=tuple(devices),
        switches=tuple(switches),
        links=tuple(links),
        **fields,
    ).validate()


def make_plan(graph: Graph, cluster: Cluster, global_batch: int, micro_batch: int, **fields) -> Plan:
    data, tensor, pipeline = fields.get("data", 1), fields.get("tensor", 1), fields.get("pipeline", 1)
    chunks = pipeline * fields.pop("virtual", 1)
    again = fields.pop("recompute", False)
    cuts = [round(at * len(graph.layers) / chunks) for at in range(chunks + 1)]
    stages = tuple(
        Stage(start=start, stop=stop, recompute=tuple(range(start, stop)) if again else ())
        for start, stop in itertools.pairwise(cuts)
    )
    sharding = {}
    if tensor > 1:
        for block in graph.blocks:
            sharding |= dict.fromkeys(block.columns, "column") | dict.fromkeys(block.rows, "row")
    fields.setdefault("stages", stages)
    fields.setdefault("schedule", "1f1b" if pipeline > 1 else "none")
    names = tuple(device.name for device in cluster.devices[: data * tensor * pipeline])
    return Plan(
        model=graph.name,
        devices=names,
        global_batch=global_batch,
        micro_batch=micro_batch,
        tensor_sharding=sharding,
        **fields,
    ).validate(graph, cluster)


def make_workload(graph: Graph | None = None, global_batch: int = 16, **fields) -> Workload:
    return Workload(
        graph=graph or make_graph(), optimizer=fields.pop("optimizer", OptimizerKind()), global_batch=global_batch
    )


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Constructors: `make.graph(...)`, `make.cluster(...)`, `make.plan(...)`, `make.workload(...)`, …"""
    return SimpleNamespace(
        graph=make_graph,
        accelerator=make_accelerator,
        cluster=make_cluster,
        plan=make_plan,
        workload=make_workload,
        per_sample=per_sample,
        constant=constant,
        width=WIDTH,
    )
