"""Groups counted on a few nodes load links as all of them do when every pair is routed by itself."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.hardware.catalog import Network, preset
from headway.hardware.cluster import Cluster, Device, Link, Switch
from headway.predict.communication import Axis, Communication

Shape = tuple[tuple[str, ...], int, int, int]  # devices, pipeline, data, tensor
AXES: tuple[Axis, ...] = ("tensor", "data", "context", "expert", "expert_data", "pipeline")
# Machines, how much narrower the spine is: one network switch, few NICs, wires between devices, two kinds, a spine.
CLUSTERS = (
    ("dgx-a100:6", 1.0), ("gcp-a2:4", 1.0), ("dgx-1v:5", 1.0), ("dgx-2:3", 1.0), ("dgx-a100:2+dgx-1v:2", 1.0),
    ("dgx-h100:6", 2.0), ("gb200:9", 1.0),
)  # fmt: skip


@cache
def both(machines: str, oversubscription: float) -> tuple[Communication, Communication]:
    network = Network(oversubscription=oversubscription, nodes_per_switch=2)
    cluster = preset(machines, network=network)
    return Communication(cluster), Communication(cluster, symmetric=False)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(CLUSTERS), st.booleans(), st.sampled_from([1, 2, 3]), st.data())
def test_channels_are_those_of_counting_every_group_and_routing_every_pair(cluster, backwards, every, data):
    folded, exact = both(*cluster)
    order = tuple(device.name for device in folded.cluster.devices)
    # Some devices of each node, or the whole order backwards: still one pattern in all nodes.
    order = order[::every][:: -1 if backwards else 1]
    left = len(order)
    sizes = {}
    for axis in ("pipeline", "tensor", "context"):
        sizes[axis] = data.draw(st.sampled_from(divisors(left)), label=axis)
        left //= sizes[axis]
    expert = data.draw(st.sampled_from(divisors(left * sizes["context"])), label="expert")
    agree(folded, exact, (order, sizes["pipeline"], left, sizes["tensor"]), sizes["context"], expert)


def agree(folded: Communication, exact: Communication, shape: Shape, context: int = 1, expert: int = 1) -> None:
    for axis in AXES:
        found, wanted = (one.channels(*shape, axis, context=context, expert=expert) for one in (folded, exact))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert (one.size, one.backend) == (other.size, other.backend)
            for figure in ("latency_seconds", "bytes_per_second", "between_nodes", "start_seconds"):
                assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=1e-12), (axis, figure)


@pytest.mark.parametrize(
    ("pipeline", "data", "tensor", "context", "expert"),
    [(1, 6, 8, 1, 6), (1, 3, 16, 1, 3), (2, 3, 8, 1, 3), (1, 24, 2, 1, 12), (24, 1, 2, 1, 1), (6, 4, 1, 2, 4)],
)
def test_groups_of_a_member_in_each_of_many_nodes_too(pipeline, data, tensor, context, expert):
    folded, exact = both("gcp-a2:6", 1.0)
    order = tuple(device.name for device in folded.cluster.devices)
    agree(folded, exact, (order, pipeline, data // context, tensor), context, expert)


def test_nodes_wired_alike_to_rails_that_meet_in_a_narrow_spine_are_not_told_by_two_of_them(make):
    """Device i of each node is on rail i; from rail to rail all go through the same link, however many nodes."""
    devices, switches, links = [], [Switch(name="spine")], []

    def join(one: str, other: str, rate: float) -> None:
        links.extend(Link(source=a, target=b, bytes_per_second=rate) for a, b in ((one, other), (other, one)))

    for rail in range(2):
        switches.append(Switch(name=f"rail {rail}"))
        join(f"rail {rail}", "spine", 4e9)
    for node, rail in itertools.product(range(6), range(2)):
        devices.append(Device(name=f"{node}/{rail}", accelerator="gpu", node=f"node {node}"))
        join(f"{node}/{rail}", f"rail {rail}", 1e10)
    kinds = {"gpu": make.accelerator(name="gpu")}
    cluster = Cluster(
        name="rails", accelerators=kinds, devices=tuple(devices), switches=tuple(switches), links=tuple(links)
    ).validate()
    order = tuple(device.name for device in devices)
    for shape in ((1, 12, 1), (6, 1, 2), (3, 4, 1), (1, 6, 2), (12, 1, 1)):
        agree(Communication(cluster), Communication(cluster, symmetric=False), (order, *shape))


@pytest.mark.parametrize(("shape", "most"), [((8, 64, 4), 16), ((1, 16, 128), 16), ((128, 16, 1), 24)])
def test_a_thousand_devices_are_counted_on_two_nodes_and_a_pipeline_on_three(make, monkeypatch, shape, most):
    cluster = make.cluster(256, 8, interfaces=8)
    communication = Communication(cluster)
    hops: list[int] = []
    count = communication._wiring.loads

    def watched(source: np.ndarray, *rest):
        hops.append(len(source))
        return count(source, *rest)

    monkeypatch.setattr(communication._wiring, "loads", watched)
    order = tuple(device.name for device in cluster.devices)
    for axis in AXES:
        communication.channels(order, shape[0], shape[1], shape[2], axis)
    # A ring for each device of a node at most, each through all devices.
    assert max(hops) <= most * 8


def test_links_that_belong_to_no_node_are_counted_for_all_groups_that_pass_them():
    """Two nodes behind each switch: of six, the pairs are far apart, and all meet on the way to the spine."""
    narrow = Communication(preset("dgx-h100:6", network=Network(oversubscription=16.0, nodes_per_switch=2)))
    order = tuple(device.name for device in narrow.cluster.devices)
    near = narrow.channels(order, 3, 2, 8, "data")
    far = narrow.channels(order, 1, 6, 8, "data")
    assert far[0].bytes_per_second < near[0].bytes_per_second / 4
