"""The mesh: frames in order, strangers refused and counted, and prompt news of whoever fails."""

from __future__ import annotations

import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import InputError, MismatchError, RankFailedError, StalledError
from headway.exchange.mailbox import Mailbox
from headway.exchange.tcp import Mesh, wait_for_key

Meshes = Callable[..., list[Mesh]]


def _array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint8)


@pytest.fixture
def meshes() -> Iterator[Meshes]:
    """Makes the meshes of all ranks of a group, in this process, and closes them."""
    made: list[Mesh] = []

    def make(size: int = 2, **options: Any) -> list[Mesh]:
        store = dist.HashStore()
        options = {"timeout_seconds": 10.0, "token": "secret"} | options
        found = [Mesh(rank, size, store, [f"m{rank}" for rank in range(size)], **options) for rank in range(size)]
        made.extend(found)
        return found

    yield make
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(Mesh.close, made))
    deadline = time.monotonic() + 5
    while any(thread.name.startswith("headway-mesh") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread was left behind"
        time.sleep(0.01)


def _port_of(mesh: Mesh) -> int:
    return mesh._listener.getsockname()[1]


def _later(action: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_frames_arrive_in_order_whatever_their_sizes(meshes: Meshes):
    one, other = meshes()

    @settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.binary(max_size=300_000), max_size=6))
    def check(frames: list[bytes]) -> None:
        thread = _later(lambda: [one.send(1, np.frombuffer(frame, dtype=np.uint8)) for frame in frames])
        for frame in frames:
            place = np.zeros(len(frame), dtype=np.uint8)
            other.receive(0, place)
            assert place.tobytes() == frame
        thread.join(10)

    check()


def test_both_directions_and_all_pairs_at_once(meshes: Meshes):
    ranks = meshes(4)
    length = 3 << 20  # more than the sockets hold

    def send(mesh: Mesh, target: int) -> None:
        for number in range(3):
            mesh.send(target, np.full(length, 16 * mesh.rank + number, dtype=np.uint8))

    def receive(mesh: Mesh, source: int) -> bool:
        place = np.zeros(length, dtype=np.uint8)
        right = True
        for number in range(3):
            mesh.receive(source, place)
            right = right and bool((place == 16 * source + number).all())
        return right

    with ThreadPoolExecutor(24) as pool:
        pairs = [(mesh, peer) for mesh in ranks for peer in range(4) if peer != mesh.rank]
        sends = [pool.submit(send, *pair) for pair in pairs]
        receives = [pool.submit(receive, *pair) for pair in pairs]
        assert all(job.result(20) for job in receives)
        assert [job.result(20) for job in sends] == [None] * 12


def test_a_frame_of_another_length_or_stamp_is_a_mismatch(meshes: Meshes):
    one, other = meshes()
    one.send(1, _array(1, 2, 3))
    with pytest.raises(MismatchError, match="3 bytes where rank 1 expects 4"):
        other.receive(0, np.zeros(4, dtype=np.uint8))
    place = np.zeros(3, dtype=np.uint8)
    other.receive(0, place)  # it is still there
    assert place.tolist() == [1, 2, 3]
    one.send(1, _array(1), stamp=5)
    assert other.next_frame(0) == (5, 1)
    with pytest.raises(MismatchError, match="not in the same operation"):
        other.receive(0, _array(0), stamp=6)


def test_strangers_are_refused_and_counted_and_peers_are_not_delayed(meshes: Meshes):
    one, other = meshes()
    port = _port_of(other)
    hello = struct.pack("<4sBII16s", b"HWM1", 1, 0, 1, secrets.token_bytes(16))
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
    for opening in (b"GET / HTTP/1.1\r\n\r\n" * 9, secrets.token_bytes(29), b"\0" * 29, hello[:20]):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(opening)
    wrong_rank = struct.pack("<4sBII16s", b"HWM1", 1, 77, 1, secrets.token_bytes(16))
    for greeting in (hello, wrong_rank):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(5)
            stranger.sendall(greeting)
            if greeting is hello:
                assert len(stranger.recv(48)) == 48  # a challenge, and a proof that is of no use to others
                stranger.sendall(secrets.token_bytes(32))
            assert stranger.recv(1) in (b"",)
    began = time.monotonic()
    one.send(1, _array(9))
    place = _array(0)
    other.receive(0, place)
    assert place.tolist() == [9]
    assert time.monotonic() - began < 4  # the silent ones hold their places for longer
    for stranger in silent:
        stranger.close()
    deadline = time.monotonic() + 10
    while other.refused < 16 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert other.refused == 16
    assert other.failure is None


def test_a_rank_with_another_token_is_told_so(meshes: Meshes):
    store = dist.HashStore()
    one = Mesh(0, 2, store, ["a", "b"], token="right", timeout_seconds=5)
    other = Mesh(1, 2, store, ["a", "b"], token="wrong", timeout_seconds=5)
    try:
        with pytest.raises(RankFailedError, match="does not know the token"):
            one.send(1, _array(1))
    finally:
        one.close()
        other.close()


def test_a_stranger_at_a_ranks_address_gets_no_proof_that_it_could_use(meshes: Meshes):
    """Who only replays what it is sent is not taken for a peer: the two sides prove different things."""
    store = dist.HashStore()
    one = Mesh(0, 2, store, ["a", "b"], token="secret", timeout_seconds=2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def echo() -> None:
            connection, _ = server.accept()
            with connection:
                hello = connection.recv(64)
                connection.sendall((hello + b"\0" * 64)[:48])
                connection.recv(64)

        _later(echo)
        store.set("mesh/tcp/1", f"127.0.0.1|{server.getsockname()[1]}")
        with pytest.raises(RankFailedError, match="does not know the token"):
            one.send(1, _array(1))
    one.close()


def test_the_token_comes_from_rank_0_unless_given():
    store = dist.HashStore()
    ranks = [Mesh(rank, 2, store, ["a", "b"], timeout_seconds=5) for rank in range(2)]
    assert len(store.get("mesh/tcp/token")) == 64
    ranks[0].send(1, _array(4))
    place = _array(0)
    ranks[1].receive(0, place)
    assert place.tolist() == [4]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Mesh.close, ranks))


def test_it_listens_on_the_loopback_or_on_the_address_that_the_machine_is_named_by(meshes: Meshes):
    store = dist.HashStore()
    for machines, host in ((["a", "b"], "127.0.0.1"), (["127.0.0.2", "b"], "127.0.0.2")):
        mesh = Mesh(0, 2, store, machines, token="x", timeout_seconds=1)
        assert mesh._listener.getsockname()[0] == host
        mesh.close()
    with pytest.raises(InputError, match="cannot listen"):
        Mesh(0, 2, store, ["192.0.2.1", "b"], token="x")


def test_whoever_waits_gives_up_in_time(meshes: Meshes):
    one, _ = meshes(timeout_seconds=0.4)
    with pytest.raises(StalledError, match=r"waited 0\.4 s for rank 1"):
        one.receive(1, _array(0))
    with pytest.raises(StalledError):
        one.next_frame(1, timeout_seconds=0.05)
    # A rank that does not read: the sockets' buffers fill up.
    with pytest.raises(StalledError, match="rank 1"):
        one.send(1, np.zeros(64 << 20, dtype=np.uint8))


def test_a_connection_that_breaks_fails_whoever_waits_for_anybody(meshes: Meshes):
    ranks = meshes(3)
    for mesh in ranks:
        for peer in range(3):
            if peer != mesh.rank:
                mesh.send(peer, _array(mesh.rank))
    for mesh in ranks:
        for peer in range(3):
            if peer != mesh.rank:
                mesh.receive(peer, _array(0))

    def die() -> None:
        time.sleep(0.2)
        for way in (*ranks[2]._inbound.values(), *ranks[2]._outbound.values()):
            if way.socket is not None:
                way.socket.shutdown(socket.SHUT_RDWR)  # what the kernel does for a process that is killed

    _later(die)
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 2"):
        ranks[0].receive(1, _array(0))  # rank 1 is well, but the group is not
    assert time.monotonic() - began < 5
    with pytest.raises(RankFailedError, match="rank 2"):
        ranks[0].receive(1, _array(0))


@pytest.mark.parametrize("kind", [RankFailedError, MismatchError, StalledError])
def test_who_gives_up_says_why(meshes: Meshes, kind: type[Exception]):
    one, other = meshes()
    one.send(1, _array(1))
    other.receive(0, _array(0))
    _later(lambda: (time.sleep(0.2), one.close(kind("rank 5 is gone"))))  # type: ignore[arg-type]
    with pytest.raises(kind, match="rank 5 is gone"):
        other.receive(0, _array(0))


def test_who_leaves_in_good_order_fails_only_those_who_want_something_of_it(meshes: Meshes):
    ranks = meshes(3)
    for peer in (1, 2):
        ranks[0].send(peer, _array(7, peer))
    ranks[1].send(2, _array(8))
    place = _array(0)
    ranks[2].receive(1, place)
    ranks[0].close()
    late = _array(0, 0)
    ranks[1].receive(0, late)  # what was sent before still arrives
    assert late.tolist() == [7, 1]
    with pytest.raises(RankFailedError, match="rank 0 has left"):
        ranks[1].receive(0, late)
    ranks[1].send(2, _array(6))
    ranks[2].receive(1, place)
    assert place.tolist() == [6]
    assert ranks[1].failure is ranks[2].failure is None


def test_a_key_that_nobody_sets_is_waited_for_in_vain():
    with pytest.raises(StalledError, match="rank 3 did not turn up"):
        wait_for_key(dist.HashStore(), "key", 0.05, who="rank 3")


def test_a_rank_does_not_talk_to_itself_or_to_nobody(meshes: Meshes):
    (one, _) = meshes()
    for peer in (0, 2, -1):
        with pytest.raises(InputError):
            one.send(peer, _array(1))


# The mailbox, which stands on the mesh


def test_a_mailbox_hands_each_frame_to_who_asked_for_its_stamp(meshes: Meshes):
    ranks = meshes(3)
    boxes = [Mailbox(mesh) for mesh in ranks]

    @settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5000)), max_size=12), st.integers(0, 99)
    )
    def check(frames: list[tuple[int, int, int]], seed: int) -> None:
        random = Random(seed)
        # Each rank sends to rank 0, itself included; receives of one source and stamp keep their order.
        wanted: dict[tuple[int, int], list[np.ndarray]] = {}
        for source, stamp, length in frames:
            data = np.full(length, len(wanted.get((source, stamp), [])) + 1, dtype=np.uint8)
            wanted.setdefault((source, stamp), []).append(data)
        places: list[tuple[np.ndarray, np.ndarray, Any]] = []

        def ask() -> None:
            keys = list(wanted)
            random.shuffle(keys)
            for source, stamp in keys:
                for data in wanted[source, stamp]:
                    place = np.zeros_like(data)
                    places.append((data, place, boxes[0].receive(source, place, stamp, timeout_seconds=10)))

        def tell() -> list[Any]:
            return [boxes[key[0]].send(0, data, key[1]) for key, frames in wanted.items() for data in frames]

        first, second = (ask, tell) if random.random() < 0.5 else (tell, ask)
        tickets = first()
        tickets = second() or tickets
        for data, place, ticket in places:
            assert ticket.done.wait(10)
            assert ticket.error is None
            assert (place == data).all()
        for ticket in tickets or ():
            assert ticket.done.wait(10)

    check()
    for mesh in ranks:
        mesh.close()
    for box in boxes:
        box.close()


def test_a_mailbox_fails_what_is_waiting_when_it_is_closed_and_what_comes_later(meshes: Meshes):
    one, _ = meshes()
    box = Mailbox(one)
    waiting = box.receive(1, _array(0), 1, timeout_seconds=30)
    one.close()
    box.close()
    assert waiting.done.wait(5)
    assert isinstance(waiting.error, RankFailedError)
    for ticket in (box.send(1, _array(1), 1), box.receive(None, _array(1), 1, timeout_seconds=30)):
        assert ticket.done.wait(5)
        assert isinstance(ticket.error, RankFailedError)


def test_a_mailbox_names_the_sender_and_refuses_another_length(meshes: Meshes):
    ranks = meshes()
    boxes = [Mailbox(mesh) for mesh in ranks]
    boxes[1].send(0, _array(1, 2), 3)
    ticket = boxes[0].receive(None, _array(0, 0, 0), 3, timeout_seconds=10)
    assert ticket.done.wait(10)
    assert isinstance(ticket.error, MismatchError)
    assert "rank 1 sent 2 bytes where rank 0 expects 3" in str(ticket.error)
    boxes[1].send(0, _array(1, 2), 3)
    place = _array(0, 0)
    ticket = boxes[0].receive(None, place, 3, timeout_seconds=10)
    assert ticket.done.wait(10)
    assert ticket.error is None
    assert ticket.source == 1
    assert place.tolist() == [1, 2]
    for mesh in ranks:
        mesh.close()
    for box in boxes:
        box.close()
