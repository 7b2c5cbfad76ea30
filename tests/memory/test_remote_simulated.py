"""Verbs in virtual time: what they cost, how they tear, what is left of those whose client is killed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, InputError
from headway.memory.remote import Batch, Call, Clock, CompareAndSwap, FetchAndAdd, Pause, Read, Write
from headway.memory.remote_simulated import FabricParameters, SimulatedFabric
from headway.simulate.engine import Engine

WHOLE = FabricParameters(bursts=1)


def run(fabric: SimulatedFabric, *programs):
    clients = [fabric.client(f"c{number}") for number in range(len(programs))]
    processes = [client.start(program) for client, program in zip(clients, programs, strict=True)]
    fabric.engine.run(fabric.engine.all_of(*processes))
    return [process.value for process in processes], clients


@pytest.mark.parametrize(
    ("verb", "seconds"),
    [
        (Write(0, 0, bytes(8)), 1.4e-6),
        (Read(0, 0, 8), 2.0e-6),
        (CompareAndSwap(0, 0, 0, 1), 2.4e-6),
        (FetchAndAdd(0, 0, 1), 2.4e-6),
        (Write(0, 0, bytes(12_000)), 1.4e-6 + 1e-6),
        (Read(0, 0, 12_000), 2.0e-6 + 1e-6),
    ],
)
def test_a_verb_on_idle_cards_takes_its_latency_and_its_bytes(verb, seconds):
    def program():
        yield verb

    fabric = SimulatedFabric(Engine(), WHOLE, [16_000])
    run(fabric, program())
    assert fabric.engine.now == pytest.approx(seconds, abs=2e-9)  # 8 bytes take some time too


def test_a_batch_is_one_round_trip_as_long_as_its_longest_verb():
    def program():
        return (yield Batch((Write(0, 0, bytes(8)), FetchAndAdd(0, 8, 3), Read(0, 16, 8))))

    fabric = SimulatedFabric(Engine(), WHOLE, [64])
    (value,), (client,) = run(fabric, program())
    assert value == (None, 0, bytes(8))
    assert (client.round_trips, client.verbs) == (1, 3)
    assert fabric.engine.now == pytest.approx(2.4e-6, abs=2e-9)


def test_atomic_verbs_of_all_clients_share_what_the_card_of_the_node_can_do():
    def program():
        for _ in range(50):
            yield FetchAndAdd(0, 0, 1)

    fabric = SimulatedFabric(Engine(), WHOLE, [64])
    run(fabric, *[program() for _ in range(20)])
    assert fabric.words(0)[0] == 1000
    assert fabric.engine.now == pytest.approx(1000 / WHOLE.atomics_per_second, rel=0.02)


def test_bytes_of_all_clients_share_the_bandwidth_of_the_node():
    def program():
        for _ in range(10):
            yield Read(0, 0, 120_000)

    fabric = SimulatedFabric(Engine(), WHOLE, [120_000])
    run(fabric, *[program() for _ in range(8)])
    assert fabric.engine.now == pytest.approx(80 * 120_000 / WHOLE.bytes_per_second, rel=0.02)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_what_a_read_sees_of_a_write_is_any_mixture_of_whole_words_in_any_order(seed):
    engine = Engine(seed)
    fabric = SimulatedFabric(engine, FabricParameters(bursts=8, tearing_seconds=4e-6), [64])
    fabric.words(0)[:] = 1
    seen = []

    def writer():
        yield Write(0, 0, (2).to_bytes(8, "little") * 8)

    def reader():
        for _ in range(12):
            seen.append(np.frombuffer((yield Read(0, 0, 64)), np.uint64))

    run(fabric, writer(), *[reader() for _ in range(2)])
    assert all(set(words.tolist()) <= {1, 2} for words in seen)
    assert (fabric.words(0) == 2).all()


def test_over_many_seeds_a_later_word_is_seen_before_an_earlier_one_and_after_it():
    orders = set()
    for seed in range(60):
        fabric = SimulatedFabric(Engine(seed), FabricParameters(bursts=2, tearing_seconds=4e-6), [16])

        def writer():
            yield Write(0, 0, (2).to_bytes(8, "little") * 2)

        def reader():
            for _ in range(4):
                words = np.frombuffer((yield Read(0, 0, 16)), np.uint64)
                orders.add(tuple(words.tolist()))

        run(fabric, writer(), reader())
    assert orders == set(itertools.product((0, 2), repeat=2))


def test_a_killed_client_posts_no_more_and_what_was_under_way_arrives_in_part():
    left = set()
    for seed in range(60):
        engine = Engine(seed)
        fabric = SimulatedFabric(engine, FabricParameters(bursts=4, tearing_seconds=4e-6), [64])
        client = fabric.client("doomed")

        def program():
            yield Write(0, 0, (2).to_bytes(8, "little") * 4)
            yield Write(0, 32, (3).to_bytes(8, "little") * 4)

        client.start(program())
        engine.call_later(1e-7, client.kill)
        engine.run()
        left.add(int((fabric.words(0)[:4] == 2).sum()))
        assert (fabric.words(0)[4:] == 0).all()
    assert left == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_a_client_can_be_killed_before_any_of_its_verbs(before):
    engine = Engine()
    fabric = SimulatedFabric(engine, WHOLE, [64])
    client = fabric.client("doomed")
    client.killed_before = before

    def program():
        for _ in range(3):
            yield FetchAndAdd(0, 0, 1)

    client.start(program())
    engine.run()
    assert fabric.words(0)[0] == min(before - 1, 3)
    assert client.is_alive == (before > 3)


def test_a_server_answers_on_its_own_cores_with_verbs_of_its_own():
    parameters = FabricParameters(bursts=1, server_cores=1, server_seconds=1e-6)
    fabric = SimulatedFabric(Engine(), parameters, [64])

    def handle(client, request):
        before = yield FetchAndAdd(0, 0, request[0])
        return [client, before]

    server = fabric.serve("adder", handle)

    def program():
        return (yield Call("adder", (5,)))

    values, clients = run(fabric, *[program() for _ in range(10)])
    assert sorted(before for _, before in values) == list(range(0, 50, 5))
    assert {name for name, _ in values} == {client.name for client in clients}
    assert server.requests == 10
    # Each request: one turn to begin it and one for its verb, on the only core.
    assert server.busy_seconds == pytest.approx(20e-6)
    assert fabric.engine.now >= 20e-6
    assert server.load(fabric.engine.now) <= 1.0


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    def history(seed):
        fabric = SimulatedFabric(Engine(seed), FabricParameters(jitter=1.0), [64])
        times = []

        def program():
            for _ in range(5):
                yield FetchAndAdd(0, 0, 1)
                yield Pause(1e-7)
                times.append((yield Clock()))

        run(fabric, program(), program())
        return times

    assert history(3) == history(3)
    assert history(3) != history(4)


def test_parameters_are_a_file_and_nonsense_is_refused(tmp_path):
    parameters = FabricParameters(read_seconds=3e-6)
    parameters.save(tmp_path / "fabric.yaml")
    assert FabricParameters.load(tmp_path / "fabric.yaml") == parameters
    with pytest.raises(FieldError, match="latency"):
        FabricParameters.from_yaml("latency: 3")
    with pytest.raises(InputError, match="bytes_per_second"):
        FabricParameters(bytes_per_second=0)
    with pytest.raises(InputError, match="jitter"):
        FabricParameters(jitter=-1)


def test_what_no_node_or_server_could_do_is_refused():
    fabric = SimulatedFabric(Engine(), WHOLE, [64])
    for step, match in [
        (Read(0, 60, 8), "memory node 0"),
        (Write(0, 0, b"abc"), "whole words"),
        (Call("nobody", ()), "nobody"),
        ("jump", "not a step"),
    ]:

        def program(step=step):
            yield step

        with pytest.raises(InputError, match=match):
            run(fabric, program())
