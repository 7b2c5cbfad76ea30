"""What each operation of the three stores costs, exactly, in round trips (Tsai, Shan and Zhang, ATC 2020)."""

from __future__ import annotations

import pytest

from headway.errors import DoesNotFitError, InputError
from headway.memory.disaggregated.central import Central, CentralLayout, Coordinator
from headway.memory.disaggregated.clover import Clover
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.clover_metadata import MetadataServer
from headway.memory.disaggregated.direct import Direct, DirectLayout
from headway.memory.remote import Pause
from headway.memory.remote_simulated import FabricParameters, SimulatedClient, SimulatedFabric
from headway.simulate.engine import Engine

QUIET = FabricParameters(bursts=1)


def cost(client: SimulatedClient, program, until: float = 1e-4):
    """(round trips, result) of a program that is alone; what it leaves in the background is finished after it."""
    before = client.round_trips
    engine = client.fabric.engine
    process = client.start(program)
    engine.run(process)
    trips = client.round_trips - before
    engine.run(engine.now + until)
    return trips, process.value


class CloverCase:
    """A loaded store without sweeps, on a quiet fabric."""

    def __init__(self, **options) -> None:
        self.layout = CloverLayout(**{"keys": 2, "value_bytes": 64, "buffers": 40, "recycle_seconds": 1e-3, **options})
        self.fabric = SimulatedFabric(Engine(), QUIET, [self.layout.node_bytes] * self.layout.nodes)
        self.metadata = MetadataServer(self.layout)
        self.server = self.fabric.serve("metadata", self.metadata.handle)
        self.fabric.engine.run(self.server.client.start(self.metadata.load()))

    def client(self, name: str, **options) -> tuple[SimulatedClient, Clover]:
        return self.fabric.client(name), Clover(self.layout, name, **{"retire_after": 100, **options})


def test_direct_reads_in_one_and_writes_in_four():
    layout = DirectLayout(keys=2, value_bytes=64)
    fabric = SimulatedFabric(Engine(), QUIET, [layout.node_bytes])
    client, store = fabric.client("c"), Direct(layout, 1)
    assert cost(client, store.read(1)) == (1, None)
    assert cost(client, store.write(1, b"value")) == (4, None)
    assert cost(client, store.read(1)) == (1, b"value")
    assert cost(client, store.read(0)) == (1, None)
    # Lock, two copies, unlock; and the time is that of two writes and two atomic verbs.
    begun = fabric.engine.now
    fabric.engine.run(client.start(store.write(1, b"value")))
    assert fabric.engine.now - begun == pytest.approx(2 * 1.4e-6 + 2 * 2.4e-6, rel=0.02)


def test_direct_waits_for_a_lock_and_takes_it_when_the_lease_has_ended():
    layout = DirectLayout(keys=1, value_bytes=64)
    fabric = SimulatedFabric(Engine(), QUIET, [layout.node_bytes])
    doomed = fabric.client("doomed")
    doomed.killed_before = 4  # it has written both copies and does not release the lock
    doomed.start(Direct(layout, 1, lease_seconds=1e-3).write(0, b"first"))
    fabric.engine.run()
    client, store = fabric.client("c"), Direct(layout, 2, lease_seconds=1e-3)
    assert cost(client, store.read(0), until=0.0) == (1, b"first")  # readers do not mind
    process = client.start(store.write(0, b"second"))
    fabric.engine.run(process)
    assert 1e-3 < fabric.engine.now < 1.1e-3
    assert cost(client, store.read(0)) == (1, b"second")


def test_direct_mends_what_a_writer_left_torn_from_the_uncommitted_copy():
    layout = DirectLayout(keys=1, value_bytes=64)
    fabric = SimulatedFabric(Engine(), QUIET, [layout.node_bytes])
    doomed = fabric.client("doomed")
    doomed.killed_before = 4
    doomed.start(Direct(layout, 1).write(0, b"first"))
    fabric.engine.run()
    fabric.words(0)[3] ^= 1  # a word of the committed copy, as if it had never arrived
    client, store = fabric.client("c"), Direct(layout, 2)
    trips, value = cost(client, store.read(0))
    assert value == b"first"
    assert trips > 1
    assert cost(client, store.read(0)) == (1, b"first")
    assert fabric.words(0)[0] == 0  # and the lock is free


def test_central_takes_one_call_of_the_client_and_one_access_of_the_coordinator():
    layout = CentralLayout(keys=2, value_bytes=64, buffers=4)
    fabric = SimulatedFabric(Engine(), QUIET, [layout.node_bytes])
    server = fabric.serve("coordinator", Coordinator(layout).handle)
    client, store = fabric.client("c"), Central()

    def both(program):
        before = server.client.round_trips
        trips, value = cost(client, program)
        return trips, server.client.round_trips - before, value

    assert both(store.write(1, b"value")) == (1, 1, None)
    assert both(store.read(1)) == (1, 1, b"value")
    assert both(store.read(0)) == (1, 0, None)  # the table says that there is none
    for number in range(10):  # buffers are used again
        assert both(store.write(number % 2, b"more")) == (1, 1, None)


def test_clover_reads_in_one_and_writes_in_two_while_the_cursor_is_current():
    case = CloverCase()
    client, store = case.client("a")
    cost(client, store.open())
    assert cost(client, store.read(0)) == (1, None)  # by the shortcut that `open` read
    assert cost(client, store.write(1, b"first"))[0] == 2 + 1  # the first buffers are fetched on the critical path
    for number in range(20):  # later ones are not
        value = b"value %d" % number
        assert cost(client, store.write(1, value)) == (2, None)
        assert cost(client, store.read(1)) == (1, value)


def test_clover_chases_the_chain_one_round_trip_a_version_when_the_shortcut_is_old_too():
    case = CloverCase()
    writer, store = case.client("writer", batch=20)
    reader, other = case.client("reader")
    cost(reader, other.open())
    for behind in range(1, 5):
        assert cost(reader, other.read(0))[0] == 1
        for number in range(behind):
            cost(writer, store.write(0, b"version %d" % number))
        trips, value = cost(reader, other.read(0))
        assert (trips, value) == (1 + behind, b"version %d" % (behind - 1))


def test_clover_jumps_by_the_shortcut_where_that_is_current():
    case = CloverCase()
    writer, store = case.client("writer", batch=20)
    reader, other = case.client("reader")
    cost(reader, other.open())
    assert cost(reader, other.read(0))[0] == 1
    for number in range(10):
        cost(writer, store.write(0, b"version %d" % number))
    case.fabric.engine.run(case.server.client.start(case.metadata.sweep()))
    assert cost(reader, other.read(0)) == (2, b"version 9")
    assert cost(*_fresh(case)) == (2, b"version 9")  # without a cursor: the shortcut, then the entry


def _fresh(case: CloverCase):
    client, store = case.client("fresh")
    return client, store.read(0)


@pytest.mark.parametrize(("looks_ahead", "trips"), [(False, 4), (True, 2)])
def test_clover_finds_the_new_end_of_the_chain_when_another_writer_was_faster(looks_ahead, trips):
    case = CloverCase()
    first, store = case.client("first", looks_ahead=looks_ahead)
    second, other = case.client("second", looks_ahead=looks_ahead)
    for client, each in ((first, store), (second, other)):
        cost(client, each.open())
        cost(client, each.write(1, b"so that it has buffers"))
    assert cost(first, store.write(0, b"1")) == (2, None)
    # Write, a compare-and-swap that fails and says what comes next; that entry; and the swap again. Or: it has looked.
    assert cost(second, other.write(0, b"2")) == (trips, None)
    assert cost(first, store.read(0)) == (2, b"2")


@pytest.mark.parametrize("replicas", [2, 3])
def test_clover_writes_all_replicas_at_once_and_copies_the_link_in_a_third_round_trip(replicas):
    case = CloverCase(nodes=3, replicas=replicas)
    client, store = case.client("a")
    cost(client, store.write(0, b"so that it has buffers"))
    assert cost(client, store.write(0, b"value")) == (3, None)
    # The chain can be followed, from its first entry, on each replica alone.
    for replica in range(replicas):
        pointer = case.layout.pointer(0, 0)
        values = []
        while case.layout.is_pointer(pointer):
            node, offset = case.layout.place(pointer, replica)
            data = case.fabric.words(node)[offset // 8 : offset // 8 + case.layout.entry_bytes // 8].tobytes()
            entry = case.layout.unpack(data)
            assert (entry.is_whole, entry.key) == (True, 0)
            values.append(entry.value)
            pointer = entry.link
        assert values == [None, b"so that it has buffers", b"value"]


def test_clover_recycles_after_the_delay_and_not_before():
    case = CloverCase(buffers=8, recycle_seconds=1e-3)
    client, store = case.client("a", batch=2, retire_after=1)
    begun = case.fabric.engine.now
    for number in range(20):
        cost(client, store.write(0, b"%d" % number), until=1e-5)
    # 6 spare buffers: twenty writes take at least two waits.
    assert case.fabric.engine.now - begun > 2e-3
    assert case.metadata.retired >= 19


def test_clover_takes_back_the_buffers_of_a_client_that_died():
    case = CloverCase(buffers=10, recycle_seconds=1e-4, lease_seconds=1e-3)
    engine = case.fabric.engine
    for number in range(12):  # each dies with its batch of 4: without taking back, the third would find none
        client, store = case.client(f"c{number}", batch=4, retire_after=1)
        trips, _ = cost(client, store.write(0, b"%d" % number))
        assert trips >= 3
        client.kill()
        engine.run(engine.now + 2e-3)
        engine.run(case.server.client.start(case.metadata.sweep()))
        engine.run(engine.now + 1e-3)
    assert case.metadata.free_buffers == 8


def test_clover_without_buffers_says_so():
    case = CloverCase(keys=2, buffers=3)
    client, store = case.client("a", batch=1)
    cost(client, store.write(0, b"1"))
    process = client.start(store.write(0, b"2"))
    with pytest.raises(DoesNotFitError, match="no buffer"):
        case.fabric.engine.run(process)


def test_values_that_are_too_long_and_layouts_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="agreed"):
        next(Direct(DirectLayout(keys=1, value_bytes=8), 1).write(0, b"123456789"))
    with pytest.raises(InputError, match="replicas"):
        CloverLayout(keys=1, value_bytes=8, buffers=4, nodes=1, replicas=2)
    with pytest.raises(InputError, match="buffers"):
        CloverLayout(keys=4, value_bytes=8, buffers=4)
    with pytest.raises(InputError, match="bits"):
        CloverLayout(keys=1, value_bytes=8, buffers=4, version_bits=0)


def test_a_pause_is_no_round_trip():
    def program():
        yield Pause(1e-6)

    fabric = SimulatedFabric(Engine(), QUIET, [64])
    assert cost(fabric.client("c"), program()) == (0, None)
