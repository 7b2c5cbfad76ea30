"""A small model and small machines, made by hand so that a search takes milliseconds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.workload.graph import Affine, Graph, Layer, Operator, Parameter, TensorBlock, TensorKind, Workload

# pytest's importlib mode gives test modules no package to import their neighbours from.
sys.path.insert(0, str(Path(__file__).parent))

WIDTH = 768
SEQUENCE = 128
FLOAT = "float32"


def _operator(layer: int, backward: bool, inputs, outputs, flop: float, block: int) -> Operator:
    sharded = {"sharded_inputs": (-1, 0)[: len(inputs)], "sharded_outputs": (2,) * len(outputs)} if block >= 0 else {}
    return Operator(
        target="aten.mm.default",
        module=f"layers.{layer}",
        layer=layer,
        backward=backward,
        inputs=inputs,
        outputs=outputs,
        flop=Affine(per_sample=flop),
        block=block,
        **sharded,
    )


def make_graph(layers: int = 4, *, heads: int = 12, vocabulary: int = 0) -> Graph:
    """`layers` equal feed-forward layers; with a `vocabulary`, an embedding before them that only weighs."""
    stream = TensorKind(fixed=(0, SEQUENCE, WIDTH), per_sample=(1, 0, 0), dtype=FLOAT)
    wide = TensorKind(fixed=(0, SEQUENCE, 4 * WIDTH), per_sample=(1, 0, 0), dtype=FLOAT)
    weight = TensorKind(fixed=(4 * WIDTH, WIDTH), per_sample=(0, 0), dtype=FLOAT)
    operators, found, parameters, blocks = [], [], [], []
    flop = 2.0 * SEQUENCE * WIDTH * 4 * WIDTH
    total = layers + (1 if vocabulary else 0)
    for at in range(total):
        embedding = bool(vocabulary) and at == 0
        work = 0.0 if embedding else flop
        block = -1 if embedding else len(blocks)
        forward = (len(operators), len(operators) + 1)
        operators += [
            _operator(at, False, (stream, weight), (wide,), work, block),
            _operator(at, False, (wide, weight), (stream,), work, block),
        ]
        backward = tuple(range(len(operators), len(operators) + 2))
        operators += [
            _operator(at, True, (stream, weight), (wide,), 2 * work, block),
            _operator(at, True, (wide, weight), (stream,), 2 * work, block),
        ]
        names = [f"layers.{at}.up.weight", f"layers.{at}.down.weight"]
        if embedding:
            names = ["embedding.weight"]
            parameters.append(Parameter(name=names[0], shape=(vocabulary, WIDTH), dtype=FLOAT, layer=at))
        else:
            parameters.append(Parameter(name=names[0], shape=(4 * WIDTH, WIDTH), dtype=FLOAT, layer=at))
            parameters.append(Parameter(name=names[1], shape=(WIDTH, 4 * WIDTH), dtype=FLOAT, layer=at))
            blocks.append(
                TensorBlock(
                    layer=at,
                    columns=(f"layers.{at}.up",),
                    rows=(f"layers.{at}.down",),
                    divisor=heads,
                    input=stream,
                    output=stream,
                    parameters={names[0]: 0, names[1]: 1},
                )
            )
        saved = Affine(per_sample=float(wide.bytes(1)))
        found.append(
            Layer(
                name=f"layers.{at}",
                entry_module=f"layers.{at}" if at else "",
                entry_argument=0,
                forward=forward,
                backward=backward,
                parameters=tuple(names),
                forward_flop=Affine(per_sample=2 * work),
                backward_flop=Affine(per_sample=4 * work),
                saved=saved,
                saved_sharded=saved,
                output=stream,
                input=stream if at else None,
                signature="embedding" if embedding else "layer",
            )
        )
    return Graph(
        name="toy",
        operators=tuple(operators),
        layers=tuple(found),
        parameters=tuple(parameters),
        units=(),
        inputs=(stream,),
        blocks=tuple(blocks),
    )


def make_accelerator(name: str, *, rate: float = 1e13, memory: float = 1e10, dollars: float = 0.0) -> Accelerator:
    return Accelerator(
        name=name,
        flop_per_second={FLOAT: rate},
        memory_bytes=memory,
        memory_bytes_per_second=rate / 20,
        launch_seconds=5e-6,
        dollars_per_hour=dollars,
    )


def make_cluster(kinds: list[list[Accelerator]], *, bandwidth: float = 1e11, network: float = 1e10) -> Cluster:
    """One node for each list: its devices at one switch, the nodes' switches at another."""
    devices, switches, links = [], [Switch(name="network")], []
    for node, inside in enumerate(kinds):
        switches.append(Switch(name=f"n{node} switch", node=f"n{node}"))
        ends = [(f"n{node} switch", "network", network)]
        for at, kind in enumerate(inside):
            devices.append(Device(name=f"n{node}d{at}", accelerator=kind.name, node=f"n{node}"))
            ends.append((devices[-1].name, f"n{node} switch", bandwidth))
        for one, other, rate in ends:
            for source, target in ((one, other), (other, one)):
                links.append(Link(source=source, target=target, bytes_per_second=rate, latency_seconds=5e-6))
    return Cluster(
        name="toy machines",
        accelerators={kind.name: kind for inside in kinds for kind in inside},
        devices=tuple(devices),
        switches=tuple(switches),
        links=tuple(links),
    ).validate()


@pytest.fixture
def graph() -> Graph:
    return make_graph()


@pytest.fixture
def workload(graph) -> Workload:
    return Workload(graph=graph, global_batch=16)


@pytest.fixture
def node() -> Cluster:
    return make_cluster([[make_accelerator("gpu")] * 4])


@pytest.fixture
def toy():
    """The makers, for tests that need another size."""

    class Toy:
        graph = staticmethod(make_graph)
        accelerator = staticmethod(make_accelerator)
        cluster = staticmethod(make_cluster)

    return Toy
