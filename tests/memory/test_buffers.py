"""Aligned memory, free parts of a line, and a pool that makes its callers wait rather than exceed its budget."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError, StalledError
from headway.memory.buffers import PAGE_BYTES, AlignedMemory, BufferPool, Extents, as_bytes, as_tensor, padded


@pytest.mark.parametrize(
    "pinned",
    [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs a GPU"))],
)
def test_aligned_memory_is_zero_aligned_and_writable(pinned):
    memory = AlignedMemory(10_000, pinned=pinned)
    assert memory.tensor.data_ptr() % PAGE_BYTES == 0
    assert memory.tensor.numel() == padded(10_000) == 3 * PAGE_BYTES
    assert not memory.tensor.any()
    assert memory.tensor.is_pinned() == pinned
    memory.tensor.fill_(7)
    memory.close()
    memory.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (4, 0)])
def test_bytes_and_tensors_share_memory(dtype, shape):
    memory = AlignedMemory(4096)
    tensor = as_tensor(memory.tensor, shape, dtype)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert as_bytes(tensor).size == tensor.nbytes
    if tensor.numel():
        tensor.fill_(1)
        assert as_bytes(tensor).tobytes() == memory.tensor[: tensor.nbytes].numpy().tobytes()


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.one_of(st.none(), st.integers(1, 40)),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 100)), max_size=60),
)
def test_extents_never_overlap_and_refuse_only_what_no_free_part_holds(capacity, steps):
    extents = Extents(None if capacity is None else capacity * PAGE_BYTES)
    held: list[tuple[int, int]] = []
    for takes, pages, which in steps:
        if takes or not held:
            size = pages * PAGE_BYTES
            gaps = []
            at = 0
            for start, length in [*sorted(held), (extents.end, 0)]:
                gaps.append(start - at)
                at = start + length
            start = extents.take(size)
            if start is None:
                assert capacity is not None
                assert max(gaps) < size
                continue
            assert all(start + size <= other or other + length <= start for other, length in held)
            # Best fit: no part that was large enough was smaller than the one that it came from.
            assert capacity is None or start + size <= capacity * PAGE_BYTES
            held.append((start, size))
        else:
            extents.give(*held.pop(which % len(held)))
    for part in held:
        extents.give(*part)
    assert extents.end == (0 if capacity is None else capacity * PAGE_BYTES)
    assert extents.take((capacity or 1) * PAGE_BYTES) == 0  # one free part again, not several


def test_requests_beyond_the_budget_wait_their_turn():
    pool = BufferPool(4 * PAGE_BYTES)
    granted: list[str] = []
    buffers = {}

    def ask(name: str, pages: int) -> None:
        def take(buffer) -> None:
            granted.append(name)
            buffers[name] = buffer

        pool.request(pages * PAGE_BYTES, name, take)

    ask("a", 3)
    ask("b", 2)
    ask("c", 1)  # would fit, but b came first
    assert granted == ["a"]
    assert pool.try_acquire(PAGE_BYTES, "d") is None
    pool.release(buffers["a"])
    assert granted == ["a", "b", "c"]
    assert pool.used_bytes == 3 * PAGE_BYTES
    assert pool.peak_bytes == 3 * PAGE_BYTES


def test_a_wait_in_vain_ends_and_says_who_holds_what():
    pool = BufferPool(2 * PAGE_BYTES, wait_seconds=0.1)
    held = pool.acquire(2 * PAGE_BYTES, "the read of 'weights'")
    with pytest.raises(StalledError, match=r"'gradients'.*8.19 kB.*'weights' \(8.19 kB\)"):
        pool.acquire(2 * PAGE_BYTES, "the read of 'gradients'")
    pool.release(held)
    assert pool.try_acquire(2 * PAGE_BYTES, "x") is not None  # the request in vain is forgotten


def test_more_than_the_whole_pool_is_refused_at_once():
    pool = BufferPool(2 * PAGE_BYTES)
    with pytest.raises(DoesNotFitError, match=r"4\.10 kB more"):
        pool.acquire(3 * PAGE_BYTES, "x")


def test_what_can_be_had_again_is_given_up_for_who_waits():
    given_up = []

    def make_room() -> bool:
        if not given_up and spare is not None:
            given_up.append(spare)
            pool.release(spare)
            return True
        return False

    spare = None
    pool = BufferPool(2 * PAGE_BYTES, wait_seconds=0.1, make_room=make_room)
    spare = pool.acquire(PAGE_BYTES, "prefetched")
    pool.acquire(2 * PAGE_BYTES, "needed")
    assert given_up


def test_many_threads_share_a_small_pool_without_exceeding_or_losing_it():
    pool = BufferPool(5 * PAGE_BYTES)
    overlaps = []

    def work(mark: int) -> None:
        for turn in range(60):
            buffer = pool.acquire((1 + (turn * mark) % 5) * PAGE_BYTES, f"{mark}")
            buffer.memory.fill_(mark)
            overlaps.append(bool((buffer.memory != mark).any()))
            pool.release(buffer)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(overlaps)
    assert pool.used_bytes == 0
    assert pool.peak_bytes <= pool.budget_bytes
