"""Who has died is known at once to all others, who has left is not mourned, and strangers are nobody."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from headway.errors import StalledError
from headway.exchange.watch import MOST_RANKS, Watch

LONG_SECONDS = 60.0


def start(size: int) -> tuple[list[Watch], list[queue.Queue], Any]:
    store: Any = dist.HashStore()
    deaths: list[queue.Queue] = [queue.Queue() for _ in range(size)]
    made: list[Any] = [None] * size

    def make(rank: int) -> None:
        made[rank] = Watch(rank, size, store, deaths[rank].put, timeout_seconds=LONG_SECONDS)

    threads = [threading.Thread(target=make, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_SECONDS)
    assert all(made)
    end = time.monotonic() + LONG_SECONDS
    while any(sum(line.peer >= 0 for line in watch._lines) < size - 1 for watch in made):
        assert time.monotonic() < end
        time.sleep(0.01)
    return made, deaths, store


def die(watch: Watch) -> None:
    """What the kernel does for a process that is killed."""
    for line in list(watch._lines):
        line.socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("victim", [0, 1])
def test_all_others_hear_of_a_death_and_nobody_of_a_farewell(size, victim):
    watches, deaths, _ = start(size)
    die(watches[victim])
    for rank in range(size):
        if rank != victim:
            assert deaths[rank].get(timeout=LONG_SECONDS) == victim
    for watch in watches:
        watch.close()
        watch.close()
    assert all(heard.empty() for rank, heard in enumerate(deaths) if rank != victim)


def test_whoever_says_nothing_or_knows_no_token_is_turned_away():
    watches, deaths, store = start(2)
    host, _, port = store.get("where/0").decode().rpartition("|")
    strangers = [socket.create_connection((host, int(port)), LONG_SECONDS) for _ in range(3)]
    for stranger in strangers:
        assert len(stranger.recv(16)) == 16
        stranger.sendall(bytes(3) + b"\1" + b"no token, but as long as its proof")
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    for _ in range(30):
        strangers.append(socket.create_connection((host, int(port)), LONG_SECONDS))
        strangers[-1].recv(16)
    assert len(watches[0]._lines) <= 10
    die(watches[1])
    assert deaths[0].get(timeout=LONG_SECONDS) == 1
    for stranger in strangers:
        stranger.close()
    for watch in watches:
        watch.close()
    assert deaths[0].empty()


def test_a_killed_process_is_noticed_though_a_child_of_it_lives_on():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    read, write = os.pipe()
    victim = os.fork()
    if victim == 0:
        Watch(1, 2, dist.TCPStore("127.0.0.1", store.port), lambda rank: None)
        child = os.fork()
        if child == 0:
            time.sleep(LONG_SECONDS)
            os._exit(0)
        os.write(write, child.to_bytes(4, "little"))
        signal.pause()
    deaths: queue.Queue = queue.Queue()
    watch = Watch(0, 2, store, deaths.put)
    child = int.from_bytes(os.read(read, 4), "little")
    try:
        os.kill(victim, signal.SIGKILL)
        assert deaths.get(timeout=LONG_SECONDS / 2) == 1
        os.kill(child, 0)  # it is there still
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(victim, 0)
        watch.close()
        for end in (read, write):
            os.close(end)


def test_a_rank_that_does_not_come_is_named():
    with pytest.raises(StalledError, match="rank 1 did not turn up"):
        Watch(0, 2, dist.HashStore(), print, timeout_seconds=0.1)


def test_beyond_a_size_nobody_watches():
    store = dist.HashStore()
    before = threading.active_count()
    watch = Watch(0, MOST_RANKS + 1, store, print)
    assert store.num_keys() == 0  # nobody is told where to connect to
    assert threading.active_count() == before
    watch.close()
