"""Collectives on links: closed forms, what shares links, and symmetry against counting every pair."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DisconnectedError
from headway.hardware.cluster import Cluster, Device, Link
from headway.predict.communication import (
    Channel,
    Communication,
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    broadcast_seconds,
    reduce_scatter_seconds,
    reduce_seconds,
    send_seconds,
)

SIZES = st.floats(1, 1e10)
CHANNELS = st.builds(
    Channel,
    size=st.integers(1, 512),
    latency_seconds=st.floats(0, 1e-3),
    bytes_per_second=st.floats(1e6, 1e12),
    start_seconds=st.floats(0, 1e-3),
    backend=st.sampled_from(["nccl", "gloo"]),
    between_nodes=st.floats(0, 1),
    protocols=st.booleans(),
    scale_gather=st.floats(0.1, 10),
    scale_scatter=st.floats(0, 10),
    scale_send=st.floats(0.1, 10),
    known=st.none(),
)
ALL = [
    all_reduce_seconds,
    all_gather_seconds,
    reduce_scatter_seconds,
    reduce_seconds,
    broadcast_seconds,
    send_seconds,
]


def names(cluster: Cluster) -> tuple[str, ...]:
    return tuple(device.name for device in cluster.devices)


class Asked:
    """Knows all-gathers and all-to-alls alone, and what it was asked."""

    def __init__(self) -> None:
        self.questions: list[tuple[str, float]] = []

    def seconds(self, kind: str, size_bytes: float) -> float | None:
        self.questions.append((kind, size_bytes))
        return 7.0 if kind in ("all_gather", "all_to_all") else None


@pytest.mark.parametrize("formula", [*ALL, all_to_all_seconds])
def test_what_is_known_of_a_collective_goes_before_its_formula(formula):
    kind = formula.__name__.removesuffix("_seconds")
    plain = Channel(size=4, latency_seconds=1e-5, bytes_per_second=1e9)
    known = Asked()
    found = formula(1e6, plain._replace(known=known))
    # All of the tensor: an all-to-all is asked for with what one member has.
    assert known.questions == [(kind, 4e6 if kind == "all_to_all" else 1e6)]
    assert found == (7.0 if kind in ("all_gather", "all_to_all") else formula(1e6, plain))
    alone = Asked()
    assert formula(1e6, plain._replace(size=1, known=alone)) == 0.0
    assert not alone.questions


def test_a_ring_all_reduce_sends_twice_n_minus_one_over_n_of_the_bytes():
    channel = Channel(size=4, latency_seconds=1e-5, bytes_per_second=1e9, backend="gloo")
    assert all_reduce_seconds(1e8, channel) == pytest.approx(2 * 3 * 1e-5 + 2 * 3 / 4 * 1e8 / 1e9)


def test_all_gather_and_reduce_scatter_are_halves_of_a_ring_all_reduce():
    channel = Channel(size=8, latency_seconds=1e-5, bytes_per_second=1e9)
    halves = all_gather_seconds(1e9, channel) + reduce_scatter_seconds(1e9, channel)
    assert halves == pytest.approx(all_reduce_seconds(1e9, channel))


def test_reducing_to_one_member_is_a_broadcast_backwards_and_in_gloo_a_reduce_scatter_and_a_gather():
    channel = Channel(size=8, latency_seconds=1e-5, bytes_per_second=1e9)
    assert reduce_seconds(1e8, channel) == broadcast_seconds(1e8, channel)
    gloo = channel._replace(backend="gloo")
    assert reduce_seconds(1e8, gloo) == pytest.approx(8e-5 + 2 * 7 / 8 * 1e8 / 1e9)


def test_a_large_group_reduces_small_messages_along_trees():
    channel = Channel(size=1024, latency_seconds=1e-5, bytes_per_second=1e10)
    assert all_reduce_seconds(4, channel) == pytest.approx(2 * 10 * 1e-5, rel=1e-3)
    assert all_reduce_seconds(4, channel._replace(backend="gloo")) == pytest.approx(2 * 1023 * 1e-5, rel=1e-3)


@given(CHANNELS, SIZES)
def test_one_member_alone_communicates_nothing(channel, size):
    assert all(seconds(size, channel._replace(size=1)) == 0 for seconds in ALL)


@given(CHANNELS, SIZES, st.floats(1, 100))
def test_more_bandwidth_or_fewer_bytes_are_never_slower(channel, size, factor):
    faster = channel._replace(bytes_per_second=channel.bytes_per_second * factor)
    for seconds in ALL:
        assert seconds(size, faster) <= seconds(size, channel) * (1 + 1e-9)
        assert seconds(size / factor, channel) <= seconds(size, channel) * (1 + 1e-9)


def test_measured_scales_correct_the_formulas(make):
    cluster = make.cluster(1, 4, operation_scale={"all_gather": 2.0, "send": 3.0})
    plain = Communication(make.cluster(1, 4))
    scaled = Communication(cluster)
    for seconds, factor in ((all_gather_seconds, 2), (send_seconds, 3), (all_reduce_seconds, 1)):
        assert seconds(1e6, scaled.group(names(cluster))) == pytest.approx(
            factor * seconds(1e6, plain.group(names(cluster)))
        )


def test_devices_behind_a_switch_each_use_their_own_link(make):
    cluster = make.cluster(1, 4, inside=1e10, accelerators=(make.accelerator(torch_device="cpu"),))
    channel = Communication(cluster).group(names(cluster))
    assert channel.bytes_per_second == pytest.approx(1e10)
    assert channel.latency_seconds == pytest.approx(2e-6)  # up to the switch, and down


def test_groups_that_leave_a_node_together_share_its_network_interface(make):
    cluster = make.cluster(2, 4, inside=1e11, outside=1e9, accelerators=(make.accelerator(torch_device="cpu"),))
    communication = Communication(cluster)
    alone = communication.group((cluster.devices[0].name, cluster.devices[4].name))
    together = communication.channels(names(cluster), 1, 2, 4, "data")[0]
    assert alone.bytes_per_second == pytest.approx(1e9)
    assert together.bytes_per_second == pytest.approx(1e9 / 4)


def test_a_group_with_several_devices_in_each_node_uses_all_network_interfaces(make):
    cpu = (make.accelerator(torch_device="cpu"),)
    one = make.cluster(2, 4, inside=1e11, outside=1e9, interfaces=1, accelerators=cpu)
    four = make.cluster(2, 4, inside=1e11, outside=1e9, interfaces=4, accelerators=cpu)
    assert Communication(one).group(names(one)).bytes_per_second == pytest.approx(1e9)
    assert Communication(four).group(names(four)).bytes_per_second == pytest.approx(4e9)


def directly_wired(count: int, lanes: dict[tuple[int, int], int], make, rate: float = 25e9) -> Cluster:
    links = []
    for (a, b), times in lanes.items():
        for source, target in ((a, b), (b, a)):
            links.append(
                Link(source=f"gpu{source}", target=f"gpu{target}", bytes_per_second=rate * times, kind="direct")
            )
    kind = make.accelerator(torch_device="cpu")
    devices = tuple(Device(name=f"gpu{at}", accelerator=kind.name, node="n") for at in range(count))
    return Cluster(name="wired", accelerators={kind.name: kind}, devices=devices, links=tuple(links)).validate()


def test_rings_are_packed_until_the_links_of_a_fully_wired_node_are_used(make):
    # Four devices, every pair joined by one lane each way: three lanes leave each, and three rings fill them.
    cluster = directly_wired(4, {(a, b): 1 for a in range(4) for b in range(a)}, make)
    assert Communication(cluster).group(names(cluster)).bytes_per_second == pytest.approx(2 * 25e9)
    ring = directly_wired(4, {(0, 1): 1, (1, 2): 1, (2, 3): 1, (3, 0): 1}, make)
    # Both directions of one ring.
    assert Communication(ring).group(names(ring)).bytes_per_second == pytest.approx(2 * 25e9)


# NVLinks between the GPUs of a DGX-1 with V100 (NVIDIA DGX-1 system architecture white paper, figure 4).
DGX_1V = {
    (0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 2, (2, 6): 1, (3, 7): 1,
    (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 2,
}  # fmt: skip


def test_the_rings_of_a_dgx_1_fill_all_six_nvlinks_of_each_gpu(make):
    cluster = directly_wired(8, DGX_1V, make)
    assert Communication(cluster).group(names(cluster)).bytes_per_second == pytest.approx(6 * 25e9)
    four = tuple(names(cluster)[:4])
    assert Communication(cluster).group(four).bytes_per_second == pytest.approx(4 * 25e9)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.data(),
)
def test_symmetric_routing_counts_what_routing_every_pair_counts(make, nodes, per_node, interfaces, data):
    cluster = make.cluster(nodes, per_node, interfaces=min(interfaces, per_node))
    count = nodes * per_node
    tensor = data.draw(st.sampled_from([size for size in (1, 2, 4) if count % size == 0]))
    pipeline = data.draw(st.sampled_from([size for size in (1, 2, 3) if (count // tensor) % size == 0]))
    order = tuple(data.draw(st.permutations(names(cluster))))
    fast, exact = Communication(cluster), Communication(cluster, symmetric=False)
    for axis in ("tensor", "data", "pipeline"):
        shape = (order, pipeline, count // tensor // pipeline, tensor, axis)
        for one, other in zip(fast.channels(*shape), exact.channels(*shape), strict=True):
            assert one.size == other.size
            assert one.bytes_per_second == pytest.approx(other.bytes_per_second)
            assert one.latency_seconds == pytest.approx(other.latency_seconds)
            assert one.between_nodes == pytest.approx(other.between_nodes)


def test_sixteen_thousand_devices_are_routed_by_a_handful_of_routes(make):
    cluster = make.cluster(2048, 8, interfaces=8)
    communication = Communication(cluster)
    channel = communication.channels(names(cluster), 8, 256, 8, "data")[3]
    assert channel.size == 256
    assert math.isfinite(channel.bytes_per_second)
    assert len(communication._wiring._templates) <= 64


def test_devices_without_a_path_are_refused(make):
    kind = make.accelerator()
    devices = (Device(name="a", accelerator=kind.name, node="x"), Device(name="b", accelerator=kind.name, node="y"))
    cluster = Cluster(name="islands", accelerators={kind.name: kind}, devices=devices)
    with pytest.raises(DisconnectedError):
        Communication(cluster).group(("a", "b"))


def test_nccl_times_published_for_nvlink_nodes_are_met_within_a_quarter():
    """vTrain (MICRO 2024) measured all-reduces of 1 MiB to 1 GiB over 2 to 8 GPUs of one node."""
    catalog = pytest.importorskip("headway.hardware.catalog")
    table = Path(__file__).parents[3] / "shared/data/planning/vtrain_allreduce_lut.csv"
    if not table.exists():
        pytest.skip("the table of measured all-reduces is not here")
    nodes = {"a100": "dgx-a100", "v100": "dgx-1v"}
    communications = {gpu: Communication(catalog.load_cluster(name)) for gpu, name in nodes.items()}
    errors: dict[tuple[str, int], list[float]] = {}
    for row in csv.DictReader(table.read_text().splitlines()):
        communication, count = communications[row["gpu"]], int(row["n_gpus"])
        group = communication.group(names(communication.cluster)[:count])
        predicted = all_reduce_seconds(float(row["bytes"]), group) * 1e6
        errors.setdefault((row["gpu"], count), []).append(abs(predicted / float(row["oop_time_us"]) - 1))
    for case, found in errors.items():
        assert statistics.median(found) < 0.25, case
