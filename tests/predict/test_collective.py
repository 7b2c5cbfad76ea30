"""The closed form of a program's time, against the formulas of the literature and against its own limits."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.program import Builder, Chunk, Program, even_chunks
from headway.errors import ClusterError
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.predict.collective import link_loads, predict_program

KIND = Accelerator(name="x", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


def circle(size: int, rate: float = 1e9, latency: float = 0.0, slow: float | None = None) -> Cluster:
    """Devices d0 … joined in a circle, both ways; the link from the last to the first may be slower."""
    names = [f"d{rank}" for rank in range(size)]
    links = []
    for rank in range(size):
        other = (rank + 1) % size
        for source, target in ((rank, other), (other, rank)):
            width = slow if slow is not None and {source, target} == {0, size - 1} else rate
            links.append(
                Link(source=names[source], target=names[target], bytes_per_second=width, latency_seconds=latency)
            )
    return Cluster(
        name="circle",
        accelerators={"x": KIND},
        devices=tuple(Device(name=name, accelerator="x", node="n") for name in names),
        links=tuple(dict.fromkeys(links)),
    ).validate()


def ring(cluster: Cluster) -> Program:
    size = len(cluster)
    builder = Builder("ring", "all_reduce", [device.name for device in cluster.devices], even_chunks(size))
    for step in range(size - 1):
        for rank in range(size):
            builder.transfer((rank - step) % size, rank, (rank + 1) % size, reduce=True)
    for step in range(size - 1):
        for rank in range(size):
            builder.transfer((rank + 1 - step) % size, rank, (rank + 1) % size)
    return builder.build()


def chain(cluster: Cluster) -> Program:
    devices = [device.name for device in cluster.devices]
    builder = Builder("chain", "broadcast", devices, even_chunks(1))
    for rank in range(len(devices) - 1):
        builder.transfer(0, rank, rank + 1)
    return builder.build()


@settings(deadline=None)
@given(st.integers(3, 12), st.floats(1e3, 1e9), st.floats(0, 1e-4), st.sampled_from([1, 2, 8]), st.floats(1e8, 1e11))
def test_a_ring_takes_what_patarasuk_and_yuan_say_in_any_number_of_pieces(size, size_bytes, latency, pieces, rate):
    cluster = circle(size, rate, latency)
    found = predict_program(ring(cluster), cluster, size_bytes, pieces=pieces)
    assert found.seconds == pytest.approx(2 * (size - 1) * latency + 2 * (size - 1) / size * size_bytes / rate)


@settings(deadline=None)
@given(st.integers(3, 9), st.floats(1e6, 1e9), st.integers(1, 64))
def test_a_chain_is_a_pipeline_of_pieces(size, size_bytes, pieces):
    cluster = circle(size, 1e9, 1e-6)
    found = predict_program(chain(cluster), cluster, size_bytes, pieces=pieces)
    piece_seconds = size_bytes / pieces / 1e9
    assert found.seconds == pytest.approx((size - 1) * (1e-6 + piece_seconds) + (pieces - 1) * piece_seconds)


def test_the_number_of_pieces_chosen_is_the_best_of_the_powers_of_two():
    cluster = circle(6, 1e9, 1e-5)
    program = chain(cluster)
    best = predict_program(program, cluster, 1e7)
    assert best.pieces > 1
    for pieces in (1, 2, 4, 8, 16, 32, 64):
        assert best.seconds <= predict_program(program, cluster, 1e7, pieces=pieces).seconds * (1 + 1e-9)


def test_the_slowest_link_bounds_a_ring_and_is_named():
    cluster = circle(5, 1e10, 0.0, slow=1e9)
    found = predict_program(ring(cluster), cluster, 1e8)
    assert found.bandwidth_seconds == pytest.approx(2 * 4 / 5 * 1e8 / 1e9)
    assert found.seconds == pytest.approx(found.bandwidth_seconds)
    assert found.bottleneck == ("d4", "d0")
    assert found.bus_bytes_per_second == pytest.approx(1e9)


def test_all_that_passes_one_link_is_counted():
    star = Cluster(
        name="star",
        accelerators={"x": KIND},
        devices=tuple(Device(name=f"d{rank}", accelerator="x", node="n") for rank in range(4)),
        switches=(Switch(name="hub", node="n"),),
        links=tuple(
            Link(source=source, target=target, bytes_per_second=1e9)
            for rank in range(4)
            for source, target in ((f"d{rank}", "hub"), ("hub", f"d{rank}"))
        ),
    ).validate()
    builder = Builder(
        "direct", "gather", [f"d{rank}" for rank in range(4)], [Chunk(owner=rank) for rank in range(4)], cluster=star
    )
    for rank in (1, 2, 3):
        builder.transfer(rank, rank, 0)
    program = builder.build()
    assert link_loads(program, star)["hub", "d0"] == pytest.approx(0.75)
    assert predict_program(program, star, 4e9).seconds == pytest.approx(3.0)


def test_a_program_in_another_order_costs_the_same():
    cluster = circle(5, 1e9, 1e-6)
    program = ring(cluster)
    count = len(program.transfers)
    turned = msgspec.structs.replace(
        program,
        transfers=tuple(
            msgspec.structs.replace(transfer, after=tuple(count - 1 - other for other in transfer.after))
            for transfer in reversed(program.transfers)
        ),
    )
    assert not turned.is_in_order
    assert turned.in_order().is_in_order
    assert predict_program(turned, cluster, 1e7) == predict_program(program, cluster, 1e7)


def test_a_program_for_another_cluster_is_refused():
    with pytest.raises(ClusterError, match="no link leads from d3 to d0"):
        predict_program(ring(circle(4)), circle(5), 1e6)


def test_nothing_to_do_takes_no_time():
    cluster = circle(3)
    alone = Builder("none", "all_reduce", ["d0"], even_chunks(1)).build()
    assert predict_program(alone, cluster, 1e6).seconds == 0
