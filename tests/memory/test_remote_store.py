"""Named tensors in a memory node that is a process of its own: contents, space, several clients, and kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError, InputError, RunError
from headway.memory.remote_shared import NodeAddress, SharedVerbs, is_supported, start_memory_node
from headway.memory.remote_store import RemoteStore
from headway.memory.tiers import Store

pytestmark = pytest.mark.skipif(not is_supported(), reason="memory nodes need Linux")

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def node():
    with start_memory_node(4 * MEBIBYTE) as started:
        yield started


@pytest.fixture
def verbs(node):
    verbs = SharedVerbs([node.address])
    verbs.write_from(0, 0, memoryview(bytes(node.address.region_bytes)))
    yield verbs
    verbs.close()


def store_on(verbs: SharedVerbs, **options) -> RemoteStore:
    return RemoteStore(verbs, verbs.region_bytes(0), **options)


def content(store: RemoteStore, name: str) -> bytes:
    into = bytearray(store.size_of(name))
    store.read(name, memoryview(into))
    return bytes(into)


commands = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 700_000))), min_size=1, max_size=25
)


@given(commands, st.booleans(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_it_is_a_dictionary_of_bytes_until_it_is_full(node, commands, in_place, seed):
    verbs = SharedVerbs([node.address])
    verbs.write_from(0, 0, memoryview(bytes(node.address.region_bytes)))
    stores = [store_on(verbs, in_place=in_place) for _ in range(2)]
    random = np.random.default_rng(seed)
    expected: dict[str, bytes] = {}
    for number, (name, size) in enumerate(commands):
        store = stores[number % 2]
        if size is None:
            store.remove(name)
            expected.pop(name, None)
            continue
        data = random.bytes(size)
        try:
            store.write(name, memoryview(data))
        except DoesNotFitError:
            # Only where no gap can be large enough, or they are scattered: the old and the new together.
            assert sum(map(len, expected.values())) + size > store.capacity_bytes / 3
            continue
        expected[name] = data
    for store in stores:
        assert set(store.names()) == set(expected)
        assert {name: content(store, name) for name in expected} == expected
        assert store.used_bytes == sum(-(-len(data) // 64) * 64 for data in expected.values())
    verbs.close()


def test_what_is_missing_or_of_another_length_is_named(verbs):
    store = store_on(verbs)
    with pytest.raises(InputError, match="weight in memory node 0"):
        store.read("weight", memoryview(bytearray(8)))
    store.write("weight", memoryview(b"12345678"))
    with pytest.raises(InputError, match="holds 8 bytes, not 4"):
        store.read("weight", memoryview(bytearray(4)))
    store.remove("weight")
    store.remove("weight")
    with pytest.raises(InputError, match="weight"):
        store.size_of("weight")


def test_what_does_not_fit_is_said_with_what_is_free_and_loses_nothing(verbs):
    store = store_on(verbs)
    half = os.urandom(store.capacity_bytes // 2 + 64)
    store.write("first", memoryview(half))
    with pytest.raises(DoesNotFitError, match="second in memory node 0: needs"):
        store.write("second", memoryview(half))
    with pytest.raises(DoesNotFitError, match="room for the old and the new"):
        store.write("first", memoryview(half[::-1]))
    assert content(store, "first") == half
    in_place = store_on(verbs, in_place=True)
    in_place.write("first", memoryview(half[::-1]))
    assert content(store, "first") == half[::-1]


def test_more_names_than_slots_are_refused_and_slots_are_used_again(verbs):
    store = store_on(verbs)
    slots = store._slots
    for number in range(slots):
        store.write(f"name {number}", memoryview(b"x"))
    with pytest.raises(DoesNotFitError, match="no slot"):
        store.write("one more", memoryview(b"x"))
    store.remove("name 7")
    store.write("one more", memoryview(b"y"))
    assert content(store, "one more") == b"y"


def test_damaged_content_is_refused_by_name(verbs):
    store = store_on(verbs)
    store.write("moments", memoryview(b"\1" * 4096))
    offset = store._data
    verbs.fetch_and_add(0, offset + 1024, 1)
    with pytest.raises(RunError, match=r"moments.*checksum"):
        content(store, "moments")


def test_a_region_without_room_for_its_table_is_refused(verbs):
    with pytest.raises(InputError, match="table"):
        RemoteStore(verbs, 1024)


def test_each_client_gets_a_number_of_its_own(verbs):
    assert [store_on(verbs).client for _ in range(3)] == [0, 1, 2]


WRITER = """
import sys
from headway.memory.remote_shared import NodeAddress, SharedVerbs
from headway.memory.remote_store import RemoteStore
address = NodeAddress.from_json(sys.argv[1])
store = RemoteStore(SharedVerbs([address]), address.region_bytes, in_place=sys.argv[2] == "in place")
number = int(sys.argv[3])
print("ready", flush=True)
while True:
    for name in ("a", "b", "c"):
        number += 1
        store.write(name, memoryview(number.to_bytes(8, "little") * 25_000))
"""


def start_writer(address: NodeAddress, mode: str, number: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, address.to_json(), mode, str(number)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.processes
def test_kill_9_of_a_writer_leaves_the_old_or_the_new_content_and_its_space_is_free_again(verbs, node):
    store = store_on(verbs)
    random = np.random.default_rng(0)
    for life in range(3):
        process = start_writer(node.address, "safely", life * 1_000_000)
        time.sleep(0.02 + 0.01 * random.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        for name in store.names():
            words = np.frombuffer(content(store, name), np.uint64)
            assert len(set(words.tolist())) == 1
        # What the dead one had reserved or locked is the next one's.
        assert store.used_bytes == 200_000 // 64 * 64 * len(store.names())
        store.write("mine", memoryview(os.urandom(200_000)))
        store.remove("mine")


def test_kill_9_in_the_middle_of_a_replacement_in_place_is_noticed(verbs):
    """The moment in question is made by hand: after the record says that the content is being replaced."""
    store = store_on(verbs, in_place=True)
    store.write("moments", memoryview(b"\1" * 4096))
    store._reserve("moments", 4096)
    with pytest.raises(RunError, match=r"moments.*torn"):
        content(store, "moments")
    store.write("moments", memoryview(b"\2" * 4096))
    assert content(store, "moments") == b"\2" * 4096


def test_a_lock_whose_holder_is_dead_is_taken(verbs):
    store = store_on(verbs)
    gone = subprocess.Popen(["true"])
    gone.wait()
    verbs.write_from(0, 0, memoryview((gone.pid << 32 | 12345).to_bytes(8, "little")))
    store.write("weight", memoryview(b"1"))
    assert content(store, "weight") == b"1"


@pytest.mark.processes
def test_it_serves_as_the_remote_tier_of_a_store(verbs):
    remote = store_on(verbs)
    tensor = torch.arange(50_000, dtype=torch.float32)
    with Store(remote=remote) as store:
        store.write("moments", tensor, "remote").wait()
        assert remote.used_bytes >= tensor.nbytes
        back = store.read("moments").wait()
        assert torch.equal(back, tensor)
        store.release(back)
        store.remove("moments")
        store.flush()
    assert remote.names() == ()


@pytest.mark.parametrize("stop", range(1, 30, 2))
def test_a_writer_that_dies_between_any_two_verbs_leaves_the_old_or_the_new(verbs, stop):
    """Two replacements and a new name, cut before each of their verbs that change the region."""

    class Cut(Exception):
        pass

    left = stop + 1  # the first is that the client attaches

    class Dying:
        region_bytes = verbs.region_bytes
        read_into = verbs.read_into

        def __getattr__(self, name):
            def call(*arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Cut
                return getattr(verbs, name)(*arguments)

            return call

    store = store_on(verbs)
    store.write("old", memoryview(b"1" * 640))
    dying = store_on(Dying())

    def replace_twice() -> None:
        for letter in (b"2", b"3"):
            dying.write("old", memoryview(letter * 640))
            dying.write("new", memoryview(letter * 320))

    with pytest.raises(Cut):
        replace_twice()
    verbs.write_from(0, 0, memoryview(bytes(8)))  # its lock: this process lives, so nobody would take it
    names = set(store.names())
    assert "old" in names
    assert content(store, "old") in (b"1" * 640, b"2" * 640, b"3" * 640)
    if "new" in names:
        assert content(store, "new") in (b"2" * 320, b"3" * 320)
    store.write("new", memoryview(b"4" * 320))
    assert content(store, "new") == b"4" * 320


def test_a_writer_that_has_not_said_yet_that_it_is_done_costs_no_other_name_its_content(verbs, monkeypatch):
    """Its record still has an owner, and its other place is blank: offset 0, where the lock and the table are."""
    store, put = store_on(verbs), RemoteStore._put

    def stop_before_the_end(self, slot, word, what):
        if not (word == 7 and np.array_equal(what, 0)):
            put(self, slot, word, what)

    monkeypatch.setattr(RemoteStore, "_put", stop_before_the_end)
    store.write("first", memoryview(b"1" * 1000))
    store.write("second", memoryview(b"2" * 1000))
    store.write("third", memoryview(b"3" * 40))
    assert content(store, "first") == b"1" * 1000
    assert content(store, "second") == b"2" * 1000
    assert content(store, "third") == b"3" * 40


def test_clients_with_prefixes_use_the_same_names_for_themselves(verbs):
    one, other = (store_on(verbs, prefix=prefix, slots=32, in_place=True) for prefix in ("0/", "1/"))
    for store, letter in ((one, b"a"), (other, b"b")):
        store.write("x", memoryview(letter * 100))
        store.write("x", memoryview(letter * 100))  # in place
    assert (content(one, "x"), content(other, "x")) == (b"a" * 100, b"b" * 100)
    assert one.names() == other.names() == ("x",)
    one.remove("x")
    assert content(other, "x") == b"b" * 100
    for number in range(31):
        one.write(str(number), memoryview(b"c" * 8))
    with pytest.raises(DoesNotFitError, match="32 names"):
        one.write("one more", memoryview(b"c"))


def test_a_slot_that_a_kill_left_new_and_without_an_owner_is_taken_again(verbs, monkeypatch):
    killed, other = (store_on(verbs, slots=1) for _ in range(2))
    put = killed._put

    def die(slot, word, what):
        if word == 7:  # the owner
            raise KeyboardInterrupt
        put(slot, word, what)

    monkeypatch.setattr(killed, "_put", die)
    with pytest.raises(KeyboardInterrupt):
        killed.write("a", memoryview(b"old"))
    other.write("b", memoryview(b"new"))
    assert content(other, "b") == b"new"
