"""Shared memory among processes: found without a name, gone with the last process, and waited on without spinning."""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import StalledError
from headway.exchange.shared import Segment, advance, is_alive, is_supported, name_ranks, wait_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not is_supported(), reason="ranks share memory on Linux alone"),
]


def pair() -> list[Segment]:
    """Two ranks' views of one segment, in this process."""
    store = dist.HashStore()
    found: list[Any] = [None, None]

    def make(rank: int) -> None:
        found[rank] = Segment(rank=rank, members=(4, 7), window_bytes=8192, store=store, timeout_seconds=20)

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in found
    return found


def window(segment: Segment, rank: int) -> np.ndarray:
    offset = int(segment.windows[rank]) - segment.header
    return np.frombuffer(segment._memory, np.uint8, 8192, offset)


def test_what_one_rank_writes_the_other_reads_and_windows_do_not_overlap():
    first, second = pair()
    window(first, 0)[:] = 1
    window(second, 1)[:] = 2
    assert (window(second, 0) == 1).all()
    assert (window(first, 1) == 2).all()
    assert first.header != second.header  # two mappings
    first.close()
    second.close()


def test_the_memory_has_no_name_and_no_descriptor_stays_open():
    before, open_before = set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    first, second = pair()
    assert set(os.listdir("/dev/shm")) == before
    first.close()
    second.close()
    del first, second
    assert len(os.listdir("/proc/self/fd")) <= open_before


def test_a_wait_ends_when_the_counter_gets_there_however_far_it_steps():
    first, second = pair()
    assert wait_for(second.header, 1, 0, 0, 10, 0) == 0
    threading.Timer(0.1, lambda: [advance(first.header, 0, 2, progress) for progress in (3, 9)]).start()
    reached, deadline = 0, time.monotonic() + 20
    while reached < 5 and time.monotonic() < deadline:
        reached = wait_for(second.header, 1, 0, 5, 10, 2)
    assert reached == 9
    first.close()
    second.close()


def test_a_wait_in_vain_gives_control_back_and_costs_hardly_any_processor_time():
    first, second = pair()
    wait_for(second.header, 1, 0, 1, 10, 2)  # compiled
    processor, elapsed = time.process_time(), time.monotonic()
    for _ in range(10):
        assert wait_for(second.header, 1, 0, 1, 10, 2) == 0
    assert time.process_time() - processor < (time.monotonic() - elapsed) / 2
    first.close()
    second.close()


def test_nobody_misses_a_wake_up_over_many_hand_overs():
    first, second = pair()
    rounds = 3000

    def play(segment: Segment, rank: int) -> None:
        for turn in range(1, rounds + 1):
            if rank == 0:
                advance(segment.header, 0, 2, turn)
            while wait_for(segment.header, rank, 1 - rank, turn, 3, 1) < turn:
                pass
            if rank == 1:
                advance(segment.header, 1, 2, turn)

    threads = [threading.Thread(target=play, args=(segment, rank)) for rank, segment in enumerate((first, second))]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    # A missed wake-up is made up for only after 50 ms; if that happened at every turn, it would take minutes.
    assert time.monotonic() - start < rounds * 0.05 / 4
    first.close()
    second.close()


def test_who_does_not_come_is_named():
    store = dist.HashStore()
    with pytest.raises(StalledError, match="ranks 3, 5 did not come"):
        Segment(rank=0, members=(1, 3, 5), window_bytes=4096, store=store, timeout_seconds=0.3)
    with pytest.raises(StalledError, match="rank 1"):
        Segment(rank=1, members=(1, 3), window_bytes=4096, store=dist.HashStore(), timeout_seconds=0.3)


def test_an_abort_keeps_the_first_reason_and_ends_waits_at_once():
    first, second = pair()
    second.abort(3, "a long story " * 100)
    first.abort(1, "too late")
    assert first.is_aborted
    kind, reason = first.aborted()
    assert kind == 3
    assert reason.startswith("a long story")
    assert wait_for(first.header, 0, 1, 5, 0, 0) == 0
    first.close()
    second.close()


@settings(deadline=None, max_examples=50)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_ranks_that_run_different_programs_are_found_out_and_others_are_not(one, other):
    first, second = _pair_once()
    sequence = next(_sequences)
    first.begin(sequence, one, b"one")
    second.begin(sequence, other, b"other")
    differ = (one ^ other) & ~0xFFFF != 0
    assert first.disagreeing(sequence) == ([1] if differ else [])
    assert second.disagreeing(sequence) == ([0] if differ else [])
    assert first.describe(1) == "other"
    # A rank that is not there yet, or is ahead, has nothing to disagree about.
    second.begin(sequence + 1, other, None)
    first.begin(sequence + 2, one, None)
    assert first.disagreeing(sequence + 2) == []
    assert first.behind(sequence + 2) == [1]


_kept: list[Segment] = []
_sequences = itertools.count(65530, 3)  # past the 16 bits that are kept of it


def _pair_once() -> list[Segment]:
    if not _kept:
        _kept.extend(pair())
    return _kept


def _sleep() -> None:
    time.sleep(60)


def test_a_process_is_alive_until_it_ends_even_as_a_zombie():
    process = mp.get_context("spawn").Process(target=_sleep)
    process.start()
    assert process.pid is not None
    with open(f"/proc/{process.pid}/stat", "rb") as file:
        started = int(file.read().rpartition(b") ")[2].split()[19])
    assert is_alive(process.pid, started)
    assert not is_alive(process.pid, started + 1)  # somebody else, with the same number
    os.kill(process.pid, 9)
    deadline = time.monotonic() + 20
    while is_alive(process.pid, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(process.pid, started)  # not waited for yet: a zombie
    process.join(20)


def test_ranks_are_named_in_words():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([1, 3]) == "ranks 1, 3"
