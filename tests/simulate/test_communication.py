"""Programs played on links: closed forms, an oracle made of processes, broken links and dead ranks."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.algorithms import generate
from headway.collective.program import Builder, Chunk, Program, blocks, even_chunks
from headway.errors import ClusterError, InputError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link
from headway.predict.collective import predict_program
from headway.simulate.communication import simulate
from headway.simulate.engine import Engine
from headway.simulate.network import Conditions, LinkChange, Network

KIND = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


def cluster_of(size, links, start=0.0):
    """Devices "0" to `size` - 1 and directed links (source, target, bytes per second, latency)."""
    return Cluster(
        name="drawn",
        accelerators={"a": KIND},
        devices=tuple(Device(name=str(rank), accelerator="a", node="n") for rank in range(size)),
        links=tuple(
            Link(source=str(source), target=str(target), bytes_per_second=rate, latency_seconds=latency)
            for source, target, rate, latency in links
        ),
        collective_latency_seconds=start,
    ).validate()


def ring_cluster(rates, latency=0.0, start=0.0):
    size = len(rates)
    return cluster_of(size, [(rank, (rank + 1) % size, rate, latency) for rank, rate in enumerate(rates)], start)


def ring(size, cluster=None):
    """All-reduce around a ring: each rank's block is added up on its way round, then copied on a second one."""
    builder = Builder("ring", "all_reduce", [str(rank) for rank in range(size)], even_chunks(size), cluster=cluster)
    for step in range(2 * (size - 1)):
        for rank in range(size):
            builder.transfer((rank - step) % size, rank, (rank + 1) % size, reduce=step < size - 1)
    return builder.build()


def by_processes(program, cluster, size_bytes, pieces, conditions, changes=()):
    """The same semantics with one process for each transfer: (end, when each piece was leaving)."""
    engine = Engine()
    network = Network(engine, cluster, conditions=conditions)
    network.schedule(changes)
    arrived = [[engine.event(f"{at}.{piece}") for piece in range(pieces)] for at in range(len(program.transfers))]
    spans = {}

    def carry(position):
        transfer = program.transfers[position]
        for piece in range(pieces):
            for other in transfer.after:
                yield arrived[other][piece]
            size = program.fraction(transfer.chunk) * size_bytes / pieces
            start = engine.now
            flow = network.send(program.paths[transfer.path], size)
            flow.then(lambda _, piece=piece: arrived[position][piece].succeed())
            yield flow.sent
            spans[position, piece] = (start, engine.now)

    for position in range(len(program.transfers)):
        engine.process(carry(position), name=str(position), daemon=True)
    engine.run()
    return engine.now, spans


@given(
    st.integers(2, 9),
    st.lists(st.sampled_from([1e9, 2.5e9, 5e10]), min_size=9, max_size=9),
    st.sampled_from([0.0, 1e-6, 3e-5]),
    st.sampled_from([0.0, 1e3, 1e8]),
)
@settings(deadline=None, max_examples=50)
def test_a_ring_takes_the_time_of_its_closed_form_at_the_pace_of_its_slowest_link(size, rates, latency, size_bytes):
    # With a latency, the slowest of unequal links hides that of the others.
    rates = rates[:size] if not latency else rates[:1] * size
    cluster = ring_cluster(rates, latency, start=5e-6)
    played = simulate(ring(size, cluster), cluster, size_bytes, pieces=1)
    hops = 2 * (size - 1)
    assert played.seconds == pytest.approx(5e-6 + hops * (latency + size_bytes / size / min(rates)), rel=1e-9)
    assert played.is_finished
    assert played.waiting == ()


@given(st.sampled_from([1.0, 1e6, 1e9]), st.sampled_from([0.0, 2e-6]), st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_two_ranks_exchange_halves_in_two_latencies_and_one_vectors_time_however_finely_it_is_cut(
    size, latency, pieces
):
    cluster = ring_cluster([2e9, 2e9], latency)
    played = simulate(ring(2, cluster), cluster, size, pieces=pieces)
    half, piece = size / 2 / 2e9, size / 2 / pieces / 2e9
    if pieces == 1:
        assert played.seconds == pytest.approx(2 * (latency + half), rel=1e-9)
    # Each link carries two halves, and the last piece of the second follows the last piece of the first by a latency.
    assert played.seconds >= (max(2 * half, half + latency + piece) + latency) * (1 - 1e-9)
    assert played.seconds <= 2 * (latency + half) * (1 + 1e-9)


def test_the_slowest_of_unequal_links_hides_the_latency_of_the_others():
    cluster = ring_cluster([1.0, 10.0, 10.0, 10.0], latency=0.1)
    # Its six transfers follow each other without a gap; then the last one arrives.
    assert simulate(ring(4, cluster), cluster, 4.0, pieces=1).seconds == pytest.approx(6 * 1.0 + 0.1)


@given(st.integers(2, 6), st.integers(1, 64), st.sampled_from([0.0, 1e-6, 1e-4]))
@settings(deadline=None, max_examples=50)
def test_a_chain_is_a_pipeline_whose_pieces_follow_each_other_at_the_pace_of_a_link(size, pieces, latency):
    links = [(rank, rank + 1, 1e9, latency) for rank in range(size - 1)]
    cluster = cluster_of(size, links)
    builder = Builder("chain", "broadcast", [str(rank) for rank in range(size)], [Chunk()], cluster=cluster)
    for rank in range(size - 1):
        builder.transfer(0, rank, rank + 1)
    played = simulate(builder.build(), cluster, 1e6, pieces=pieces)
    piece = 1e6 / pieces / 1e9
    assert played.seconds == pytest.approx((size - 1) * (latency + piece) + (pieces - 1) * piece, rel=1e-9)
    assert played.events == 3 * (size - 1) * pieces


@st.composite
def programs(draw):
    """A program whose transfers are drawn at random (it need not do anything sensible), and its cluster."""
    size = draw(st.integers(2, 5))
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    links = [
        (a, b, draw(st.sampled_from([1.0, 2.0, 3.5])), draw(st.sampled_from([0.0, 0.25, 1.0])))
        for a, b in pairs
    ]  # fmt: skip
    cluster = cluster_of(size, links)
    chunks = [Chunk(weight=draw(st.integers(1, 3))) for _ in range(draw(st.integers(1, 3)))]
    builder = Builder("drawn", "all_reduce", [str(rank) for rank in range(size)], chunks, cluster=cluster)
    for _ in range(draw(st.integers(1, 12))):
        path = draw(st.permutations(range(size)))[: draw(st.integers(2, min(3, size)))]
        builder.transfer(
            draw(st.integers(0, len(chunks) - 1)), path[0], path[-1], reduce=True, path=[str(name) for name in path]
        )
    return builder.build(), cluster


@st.composite
def disturbances(draw):
    """Changes of the link from 0 to 1 that leave it up in the end."""
    times = sorted(draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]), max_size=3, unique=True)))
    scales = [draw(st.sampled_from([0.0, 0.5, 2.0])) for _ in times]
    changes = [LinkChange(seconds=at, source="0", target="1", scale=scale) for at, scale in zip(times, scales)]
    return [*changes, LinkChange(seconds=9.0, source="0", target="1", scale=1.0)]


@given(programs(), st.integers(1, 4), disturbances(), st.sampled_from([0.0, 0.125]), st.sampled_from([0.0, 0.25]))
@settings(deadline=None, max_examples=80)
def test_the_compiled_loop_does_what_one_process_for_each_transfer_does(drawn, pieces, changes, message, congestion):
    program, cluster = drawn
    conditions = Conditions(hop_seconds=message / 2, message_seconds=message, congestion_share=congestion)
    end, spans = by_processes(program, cluster, 6.0, pieces, conditions, changes)
    played = simulate(program, cluster, 6.0, pieces=pieces, in_order=False, conditions=conditions, changes=changes)
    assert played.is_finished
    found = {
        (span.detail["transfer"], span.detail["piece"]): (span.start_seconds, span.stop_seconds)
        for span in played.timeline.spans
    }
    assert set(found) == set(spans)
    for key, expected in spans.items():
        assert found[key] == pytest.approx(expected, rel=1e-9, abs=1e-9)
    if end > 9.0:  # the processes' clock also shows the last change
        assert played.seconds == pytest.approx(end, rel=1e-9)


@given(programs(), st.integers(1, 4), st.sampled_from([0.0, 0.125]))
@settings(deadline=None, max_examples=80)
def test_a_path_carries_one_piece_at_a_time_in_the_order_in_which_they_got_ready(drawn, pieces, message):
    program, cluster = drawn
    played = simulate(program, cluster, 6.0, pieces=pieces, conditions=Conditions(message_seconds=message))
    latency = {(link.source, link.target): link.latency_seconds for link in cluster.links}
    span = {
        (int(span.detail["transfer"]), int(span.detail["piece"])): (span.start_seconds, span.stop_seconds)
        for span in played.timeline.spans
    }
    on_path: dict[int, list[tuple[float, float, float]]] = {}
    for (position, piece), (start, stop) in span.items():
        transfer = program.transfers[position]
        ready = span[position, piece - 1][1] if piece else 0.0
        for other in transfer.after:
            hops = itertools.pairwise(program.paths[program.transfers[other].path])
            ready = max(ready, span[other, piece][1] + sum(latency[hop] for hop in hops))
        on_path.setdefault(transfer.path, []).append((start, stop, ready))
    for carried in on_path.values():
        carried.sort()
        free, last_ready = 0.0, 0.0
        for start, stop, ready in carried:
            # It begins when it is ready and the path is free, not later, and nobody overtakes.
            assert start == pytest.approx(max(free, ready), rel=1e-9, abs=1e-9)
            assert ready >= last_ready - 1e-9
            free, last_ready = stop, ready


@given(programs(), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_links_carry_what_the_program_says_and_none_is_busy_for_longer_than_it_takes(drawn, pieces):
    program, cluster = drawn
    played = simulate(program, cluster, 6.0, pieces=pieces)
    expected: dict[tuple[str, str], float] = {}
    for transfer in program.transfers:
        for ends in itertools.pairwise(program.paths[transfer.path]):
            expected[ends] = expected.get(ends, 0.0) + program.fraction(transfer.chunk) * 6.0
    assert {(link.source, link.target): link.bytes for link in played.links} == pytest.approx(expected)
    assert all(0 < link.utilisation <= 1 + 1e-9 for link in played.links)
    assert played.bottleneck is not None
    assert played.bottleneck.busy_seconds == max(link.busy_seconds for link in played.links)
    assert played.seconds >= played.bottleneck.busy_seconds * (1 - 1e-9)


@given(programs(), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=50)
def test_no_two_spans_share_time_on_a_lane_of_the_timeline(drawn, pieces, in_order):
    program, cluster = drawn
    played = simulate(program, cluster, 6.0, pieces=pieces, in_order=in_order)
    assert played.timeline.overlaps() == []
    assert len(played.timeline.spans) == len(program.transfers) * pieces
    for span in played.timeline.spans:
        transfer = program.transfers[int(span.detail["transfer"])]
        assert span.lane.split(" (")[0] == f"rank {transfer.source}/to {transfer.target}"


def test_transfers_that_share_a_lane_go_to_further_lanes():
    cluster = cluster_of(2, [(0, 1, 2.0, 0.0)])
    builder = Builder("both", "broadcast", ["0", "1"], even_chunks(2), cluster=cluster)
    builder.transfer(0, 0, 1)
    builder.transfer(1, 0, 1)
    played = simulate(builder.build(), cluster, 4.0, pieces=1, in_order=False)
    assert played.timeline.lanes() == ("rank 0/to 1", "rank 0/to 1 (2)")
    assert [span.duration_seconds for span in played.timeline.spans] == [2.0, 2.0]
    assert played.timeline.spans[0].detail == {"transfer": 0, "chunk": 0, "piece": 0, "bytes": 2.0}


def test_the_timeline_begins_after_the_collectives_own_start():
    cluster = ring_cluster([1.0, 1.0], start=3.0)
    played = simulate(ring(2, cluster), cluster, 2.0, pieces=1)
    assert min(span.start_seconds for span in played.timeline.spans) == 3.0
    assert played.timeline.stop_seconds == played.seconds == 5.0


def test_a_timeline_of_very_many_pieces_shows_transfers():
    cluster = ring_cluster([1e9] * 4)
    program = ring(4, cluster)
    played = simulate(program, cluster, 1e9, pieces=1000)
    assert len(played.timeline.spans) == len(program.transfers) == 24
    assert played.timeline.overlaps() == []
    assert all(span.detail["pieces"] == 1000 for span in played.timeline.spans)
    assert sum(float(span.detail["bytes"]) for span in played.timeline.spans) == pytest.approx(6e9)


def test_bandwidths_follow_the_conventions():
    cluster = ring_cluster([1e9] * 4)
    played = simulate(ring(4, cluster), cluster, 4e9, pieces=1)
    assert played.seconds == pytest.approx(6.0)
    assert played.bytes_per_second == pytest.approx(4e9 / 6)
    assert played.bus_bytes_per_second == pytest.approx(1e9)
    assert [link.utilisation for link in played.links] == pytest.approx([1.0] * 4)


def test_pieces_are_chosen_as_the_prediction_chooses_them():
    cluster = ring_cluster([1e9] * 4, latency=1e-6)
    builder = Builder("chain", "broadcast", [str(rank) for rank in range(4)], [Chunk()], cluster=cluster)
    for rank in range(3):
        builder.transfer(0, rank, rank + 1)
    chosen = simulate(builder.build(), cluster, 1e8)
    assert chosen.pieces > 1
    assert chosen.seconds < simulate(builder.build(), cluster, 1e8, pieces=1).seconds / 2


def test_a_slower_link_slows_the_ring_to_its_pace_from_then_on():
    cluster = ring_cluster([1.0] * 4)
    program = ring(4, cluster)
    slow = [LinkChange(seconds=0.0, source="1", target="2", scale=0.5)]
    assert simulate(program, cluster, 4.0, pieces=1, changes=slow).seconds == pytest.approx(12.0)
    # In the middle of the second of six steps: half a byte more takes a second, and four steps take two seconds each.
    slow = [LinkChange(seconds=1.5, source="1", target="2", scale=0.5)]
    assert simulate(program, cluster, 4.0, pieces=1, changes=slow).seconds == pytest.approx(1.5 + 1.0 + 4 * 2.0)


def test_a_link_that_stays_down_is_named_with_those_who_wait():
    cluster = ring_cluster([1.0] * 3)
    down = [LinkChange(seconds=1.5, source="1", target="2", scale=0.0)]
    played = simulate(ring(3, cluster), cluster, 3.0, pieces=1, changes=down)
    assert not played.is_finished
    assert played.bytes_per_second == played.bus_bytes_per_second == 0.0
    cause = played.waiting[0]
    assert (cause.rank, cause.source, cause.pieces_arrived) == (2, 1, 0)
    assert cause.reason == "the link from 1 to 2 is down"
    assert {waiting.rank for waiting in played.waiting} == {0, 1, 2}
    assert played.timeline.stop_seconds == played.seconds


@pytest.mark.parametrize("when", [0.0, 0.5, 1.0, 3.7])
def test_when_a_rank_dies_all_others_come_to_wait_and_the_dead_one_is_named(when):
    cluster = ring_cluster([1.0] * 4)
    played = simulate(ring(4, cluster), cluster, 4.0, pieces=1, deaths={2: when})
    assert not played.is_finished
    assert {waiting.rank for waiting in played.waiting} == {0, 1, 3}
    assert (played.waiting[0].rank, played.waiting[0].source) == (3, 2)
    assert played.waiting[0].reason == "rank 2 is dead"
    # The others go on with what they have, and no rank gets further than its neighbour has let it.
    assert played.seconds <= when + 4.0


def test_a_rank_that_dies_after_the_end_does_no_harm():
    cluster = ring_cluster([1.0] * 3)
    played = simulate(ring(3, cluster), cluster, 3.0, pieces=1, deaths={1: 4.0})
    assert played.is_finished
    assert played.seconds == 4.0


def test_a_death_also_stops_what_passes_through_the_device():
    cluster = cluster_of(3, [(0, 1, 1.0, 0.0), (1, 2, 1.0, 0.0)])
    builder = Builder("through", "broadcast", ["0", "2", "1"], [Chunk()], cluster=cluster)
    builder.transfer(0, 0, 1, path=["0", "1", "2"])
    played = simulate(builder.build(), cluster, 2.0, pieces=1, deaths={2: 1.0})
    assert not played.is_finished
    assert [(waiting.rank, waiting.reason) for waiting in played.waiting] == [(1, "rank 2 is dead")]


def test_a_program_that_waits_in_a_circle_never_begins():
    cluster = ring_cluster([1.0] * 3)
    program = ring(3, cluster)
    circle = msgspec.structs.replace(
        program, transfers=tuple(msgspec.structs.replace(each, after=((at + 1) % 12,)) for at, each in
                                 enumerate(program.transfers))
    )  # fmt: skip
    played = simulate(circle, cluster, 3.0, pieces=1)
    assert not played.is_finished
    assert played.seconds == 0.0
    assert {waiting.rank for waiting in played.waiting} == {0, 1, 2}


def test_a_rank_alone_has_nothing_to_do():
    cluster = ring_cluster([1.0, 1.0], start=1.0)
    program = Program(
        name="alone", collective="all_gather", devices=("0",), chunks=blocks(1), transfers=(), paths=()
    ).validate()
    played = simulate(program, cluster, 1e6, pieces=4)
    assert played.is_finished
    assert played.seconds == 0.0
    assert played.links == ()
    assert played.bottleneck is None
    assert played.timeline.spans == ()


def test_what_cannot_be_is_refused():
    cluster = ring_cluster([1.0] * 3)
    program = ring(3, cluster)
    other = cluster_of(3, [(0, 1, 1.0, 0.0), (1, 0, 1.0, 0.0), (2, 0, 1.0, 0.0)])
    with pytest.raises(ClusterError, match="no link leads from 1 to 2"):
        simulate(program, other, 1.0, pieces=1)
    for size in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="bytes"):
            simulate(program, cluster, size, pieces=1)
    with pytest.raises(InputError, match="0 pieces"):
        simulate(program, cluster, 1.0, pieces=0)
    with pytest.raises(InputError, match="no rank 3"):
        simulate(program, cluster, 1.0, pieces=1, deaths={3: 0.0})
    with pytest.raises(InputError, match="dies at"):
        simulate(program, cluster, 1.0, pieces=1, deaths={0: -1.0})
    with pytest.raises(ClusterError, match="no link"):
        simulate(program, cluster, 1.0, pieces=1, changes=[LinkChange(seconds=0, source="2", target="1", scale=1)])


def test_rings_on_a_preset_run_at_the_speed_of_the_links():
    cluster = load_cluster("dgx-1v")
    devices = [f"node0/gpu{number}" for number in (0, 3, 2, 1, 5, 6, 7, 4)]
    builder = Builder("ring", "all_reduce", devices, even_chunks(8), cluster=cluster)
    for step in range(14):
        for rank in range(8):
            builder.transfer((rank - step) % 8, rank, (rank + 1) % 8, reduce=step < 7)
    program = builder.build()
    assert {len(path) for path in program.paths} == {2}
    played = simulate(program, cluster, 1e9, pieces=1)
    # Ring A has two NVLinks of 25 GB/s on each edge; 1 microsecond each hop.
    expected = cluster.collective_latency_seconds + 14 * (1e-6 + 1e9 / 8 / 50e9)
    assert played.seconds == pytest.approx(expected, rel=1e-9)


def test_a_crowd_of_pieces_ends_when_the_closed_form_says():
    cluster = load_cluster("dgx-h100:4")
    program = generate("direct", cluster, "all_reduce")
    played = simulate(program, cluster, 1e8, pieces=128)
    assert played.is_finished
    assert played.seconds == pytest.approx(predict_program(program, cluster, 1e8, pieces=128).seconds, rel=0.03)
