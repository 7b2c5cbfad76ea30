"""One-sided verbs on the memory of another process: atomic, bounded, and gone with the node, leaving nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError, InputError, RunError
from headway.memory.remote import WORD_MASK, Background, Batch, Blocking, Call, CompareAndSwap, FetchAndAdd, Read, Write
from headway.memory.remote_shared import NodeAddress, SharedVerbs, is_supported, start_memory_node

pytestmark = [pytest.mark.skipif(not is_supported(), reason="memory nodes need Linux"), pytest.mark.processes]

words = st.integers(0, WORD_MASK)


@pytest.fixture(scope="module")
def node():
    with start_memory_node(2**20) as started:
        yield started


@pytest.fixture(scope="module")
def verbs(node):
    verbs = SharedVerbs([node.address])
    yield verbs
    verbs.close()


@given(words, words, words)
@settings(deadline=None)
def test_the_atomic_verbs_do_what_their_names_say_on_unsigned_words(verbs, first, second, third):
    verbs.write_from(0, 64, memoryview(first.to_bytes(8, "little")))
    assert verbs.fetch_and_add(0, 64, second) == first
    held = (first + second) & WORD_MASK
    assert verbs.compare_and_swap(0, 64, third, 7) == held
    held = 7 if third == held else held
    assert verbs.compare_and_swap(0, 64, held, third) == held
    into = bytearray(8)
    verbs.read_into(0, 64, memoryview(into))
    assert int.from_bytes(into, "little") == third


@given(st.integers(0, 2000), st.binary(max_size=20_000))
@settings(deadline=None)
def test_what_was_written_is_read_and_nothing_beside_it_has_changed(verbs, at, data):
    around = os.urandom(40_000)
    verbs.write_from(0, 0, memoryview(around))
    verbs.write_from(0, 8 * at, memoryview(data))
    into = bytearray(40_000)
    verbs.read_into(0, 0, memoryview(into))
    assert into == around[: 8 * at] + data + around[8 * at + len(data) :]


@pytest.mark.parametrize(("offset", "size"), [(4, 8), (-8, 8), (2**20, 8), (2**20 - 8, 16)])
def test_what_lies_outside_or_askew_is_refused(verbs, offset, size):
    with pytest.raises(InputError, match="memory node 0"):
        verbs.read_into(0, offset, memoryview(bytearray(size)))
    with pytest.raises(InputError, match="memory node 0"):
        verbs.write_from(0, offset, memoryview(bytes(size)))


COUNTER = """
import sys
from headway.memory.remote_shared import NodeAddress, SharedVerbs
verbs = SharedVerbs([NodeAddress.from_json(sys.argv[1])])
for _ in range(20_000):
    verbs.fetch_and_add(0, 0, 1)
    while True:  # the same, by the other verb
        seen = verbs.compare_and_swap(0, 8, 0, 0)
        if verbs.compare_and_swap(0, 8, seen, seen + 1) == seen:
            break
"""


def test_no_increment_of_two_processes_is_lost(node, verbs):
    verbs.write_from(0, 0, memoryview(bytes(16)))
    started = [subprocess.Popen([sys.executable, "-c", COUNTER, node.address.to_json()]) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
    assert verbs.fetch_and_add(0, 0, 0) == verbs.fetch_and_add(0, 8, 0) == 40_000


def test_a_word_is_never_torn_and_a_longer_write_may_be(verbs):
    """A writer in another thread alternates between two patterns; the copies release the interpreter."""
    patterns = [bytes([0x11]) * 4096, bytes([0x22]) * 4096]
    over = threading.Event()

    def write() -> None:
        turn = 0
        while not over.is_set():
            verbs.write_from(0, 4096, memoryview(patterns[turn]))
            turn ^= 1

    writer = threading.Thread(target=write)
    verbs.write_from(0, 4096, memoryview(patterns[0]))
    writer.start()
    into = np.zeros(512, np.uint64)
    whole = {int.from_bytes(pattern[:8], "little") for pattern in patterns}
    try:
        for _ in range(3000):
            verbs.read_into(0, 4096, into.data.cast("B"))
            assert set(into.tolist()) <= whole
    finally:
        over.set()
        writer.join()


def shared_memory_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if "headway" in path.name}


def use_until(verbs: SharedVerbs, deadline: float) -> None:
    while time.monotonic() < deadline:
        verbs.fetch_and_add(0, 0, 1)
        time.sleep(0.01)


OWNER = """
import sys, time
from headway.memory.remote_shared import start_memory_node
node = start_memory_node(2**20)
print(node.address.to_json().replace("\\n", " "), flush=True)
time.sleep(600)
"""


def test_a_node_goes_with_the_process_that_started_it_and_its_clients_are_told():
    before = shared_memory_files()
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    address = NodeAddress.from_json(owner.stdout.readline())
    verbs = SharedVerbs([address])
    verbs.fetch_and_add(0, 0, 1)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    with pytest.raises(RunError, match="is gone"):
        use_until(verbs, deadline)
    assert shared_memory_files() == before
    with pytest.raises(RunError, match="is gone"):
        SharedVerbs([address])


def test_kill_9_of_a_node_is_told_at_the_next_verb():
    with start_memory_node(4096) as node:
        verbs = SharedVerbs([node.address])
        os.kill(node.address.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        with pytest.raises(RunError, match=f"process {node.address.pid}"):
            use_until(verbs, deadline)


def test_a_node_that_stays_outlives_a_client_that_was_killed_and_its_content_too():
    with start_memory_node(4096, stays=True) as node:
        code = (
            "import os, sys\n"
            "from headway.memory.remote_shared import NodeAddress, SharedVerbs\n"
            "SharedVerbs([NodeAddress.from_json(sys.argv[1])]).fetch_and_add(0, 0, 42)\n"
            "os.kill(os.getpid(), 9)\n"
        )
        assert subprocess.run([sys.executable, "-c", code, node.address.to_json()], check=False).returncode == -9
        assert SharedVerbs([node.address]).fetch_and_add(0, 0, 0) == 42
    assert not Path(f"/proc/{node.address.pid}").exists()


def test_another_process_with_the_same_number_is_noticed(node):
    with pytest.raises(RunError, match="another process"):
        SharedVerbs([NodeAddress(**{**node.address.to_builtins(), "token": 1})])


def test_a_region_larger_than_the_memory_is_refused_with_what_is_missing():
    with pytest.raises(DoesNotFitError, match="short"):
        start_memory_node(2**50)
    with pytest.raises(InputError):
        start_memory_node(0)


def test_programs_run_with_their_round_trips_counted_and_what_is_in_the_background_after_them(verbs):
    client = Blocking(verbs, lambda server, request: [server, *request])
    verbs.write_from(0, 0, memoryview(bytes(64)))

    def later():
        yield FetchAndAdd(0, 8, 5)

    def program():
        yield Background(later())
        before = yield Read(0, 8, 8)
        yield Write(0, 16, b"abc")
        many = yield Batch((FetchAndAdd(0, 0, 2), CompareAndSwap(0, 24, 0, 9), Read(0, 16, 3)))
        return before, many, (yield Call("server", (1, 2)))

    assert client.carry_out(program()) == (bytes(8), (0, 0, b"abc"), ["server", 1, 2])
    assert client.round_trips == 4
    assert verbs.fetch_and_add(0, 8, 0) == 5


def test_a_program_that_calls_where_no_server_is_known_is_refused(verbs):
    def program():
        yield Call("metadata", ())

    with pytest.raises(InputError, match="metadata"):
        Blocking(verbs).carry_out(program())
