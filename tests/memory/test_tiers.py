"""One store over the tiers: order, budgets, waiting, prefetch, failure; against a plain dict as the oracle."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch.multiprocessing.reductions import StorageWeakRef

from headway.errors import DoesNotFitError, FileError, InputError, StalledError
from headway.memory.tiers import UNLIMITED_BYTES, Store, held_bytes
from headway.memory.transfers import SEGMENT_BYTES

BLOCK = 8192
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU in this machine")),
]
TIERS = ["device", "host", "remote", "disk"]


class Region:
    """Remote memory as a dict; `gate`, if closed, holds every access up; `error`, if set, is what they raise."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    @property
    def used_bytes(self) -> int:
        return sum(map(len, self.held.values()))

    def read(self, name: str, into: memoryview) -> None:
        self._pass()
        into[:] = self.held[name]

    def write(self, name: str, data: memoryview) -> None:
        self._pass()
        self.held[name] = bytes(data)

    def remove(self, name: str) -> None:
        self.held.pop(name, None)

    def _pass(self) -> None:
        assert self.gate.wait(20)
        if self.error is not None:
            raise self.error


@pytest.fixture
def region():
    return Region()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def store(tmp_path, region, device):
    made = Store(
        device=device, directory=tmp_path, remote=region, block_bytes=BLOCK, buffer_bytes=16 << 20, wait_seconds=20
    )
    yield made
    region.gate.set()
    made.close()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Every tier


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_written_is_read_into_buffers_and_into_tensors(store, device, tier):
    shapes = [(), (7,), (0, 3), (100, 1000), (3 * SEGMENT_BYTES // 4 // 1000 + 1, 1000)]
    for i, shape in enumerate(shapes):
        for source in {"cpu", device}:
            name = f"{i} from {source}"
            tensor = numbers(*shape, seed=i).to(source)
            assert torch.equal(store.write(name, tensor, tier).wait(), tensor)
            buffer = store.read(name).wait()
            assert buffer.device.type == "cpu"
            assert torch.equal(buffer, tensor.cpu())
            store.release(buffer)
            for target in {"cpu", device}:
                into = torch.empty(shape, device=target)
                assert store.read(name, into).wait() is into
                assert torch.equal(into.cpu(), tensor.cpu())
            assert store.tier_of(name) == tier
            assert store.describe(name) == (shape, torch.float32)
    assert store.pool.used_bytes == 0


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_a_created_tensor_is_zeros_of_its_dtype(store, tier, dtype):
    store.create("zeros", (3, 333), dtype, tier)
    read = store.read("zeros").wait()
    assert read.dtype == dtype
    assert not read.any()
    store.release(read)


@pytest.mark.parametrize("source", TIERS)
@pytest.mark.parametrize("target", TIERS)
def test_a_tensor_moves_between_any_two_tiers(store, region, source, target):
    tensor = numbers(2 * SEGMENT_BYTES // 4 + 100)
    store.write("x", tensor, source).wait()
    moved = store.move("x", target).wait()
    assert moved.shape == tensor.shape
    assert moved.device.type == (
        "meta" if target in ("remote", "disk") else store.device.type if target == "device" else "cpu"
    )
    assert store.tier_of("x") == target
    into = torch.empty_like(tensor)
    assert torch.equal(store.read("x", into).wait(), tensor)
    for tier, use in store.use().items():
        assert use.used_bytes == (held_bytes(tensor.nbytes, tier) if tier == target else 0)
    assert region.used_bytes == (tensor.nbytes if target == "remote" else 0)


@pytest.mark.parametrize("tier", TIERS)
def test_strided_tensors_are_written_in_order(store, tier):
    tensor = numbers(300, 200).t()
    store.write("x", tensor, tier).wait()
    read = store.read("x").wait()
    assert torch.equal(read, tensor)
    store.release(read)


def test_a_resident_tensor_is_the_tensor_itself(store):
    for tier in ("device", "host"):
        store.write(tier, numbers(50_000), tier)
        resident = store.resident(tier)  # waits for the write
        assert torch.equal(resident.cpu(), numbers(50_000))
        resident.zero_()
        buffer = store.read(tier).wait()
        assert not buffer.any()
        store.release(buffer)
    store.write("far", numbers(5), "disk")
    with pytest.raises(InputError, match="no tensor can look at"):
        store.resident("far")


def test_parameters_that_require_gradients_are_read_into_and_written(store):
    parameter = torch.nn.Parameter(numbers(100))
    store.write("p", parameter, "disk").wait()
    other = torch.nn.Parameter(torch.zeros(100))
    store.read("p", other).wait()
    assert torch.equal(other, parameter)


# Order


def test_operations_on_one_name_take_effect_in_the_order_they_were_begun(store, region):
    region.gate.clear()
    store.create("x", (1000,), torch.float32, "remote")
    reads, into = [], [torch.empty(1000) for _ in range(6)]
    for i in range(6):
        store.write("x", torch.full((1000,), float(i)))
        reads.append(store.read("x", into[i]))
    assert not any(read.done for read in reads)
    region.gate.set()
    for i, read in enumerate(reads):
        assert (read.wait() == i).all()


def test_a_name_is_not_free_before_its_tensor_is_gone(store, region, monkeypatch):
    region.gate.clear()
    write = store.write("x", torch.ones(8), "remote")
    settle = write.settle

    def meanwhile() -> None:  # what another thread may do
        with pytest.raises(InputError, match="already"):
            store.create("x", (8,), torch.float32, "remote")
        region.gate.set()
        settle()

    monkeypatch.setattr(write, "settle", meanwhile)
    store.remove("x")
    assert not region.held
    store.write("x", torch.full((8,), 2.0), "remote").wait()
    assert torch.equal(store.read("x", into=torch.empty(8)).wait(), torch.full((8,), 2.0))


def test_others_go_on_while_one_is_held_up(store, region):
    region.gate.clear()
    held = store.write("slow", numbers(10), "remote")
    store.write("fast", numbers(10), "disk")
    assert torch.equal(store.read("fast", torch.empty(10)).wait(), numbers(10))
    assert not held.done
    with pytest.raises(StalledError, match=r"the write of 'slow' is not done after 0\.05 s"):
        held.wait(0.05)
    region.gate.set()
    held.wait()


def test_a_tensor_is_removed_after_what_is_under_way_and_its_name_is_free_again(store, region):
    region.gate.clear()
    store.write("x", numbers(10), "remote")
    threading.Timer(0.05, region.gate.set).start()
    store.remove("x")
    assert region.used_bytes == 0
    assert store.names() == ()
    store.create("x", (3,), torch.int32, "disk")
    assert store.describe("x") == ((3,), torch.int32)


class AgainstADict(RuleBasedStateMachine):
    """Any sequence of operations, many under way at once: every read sees what a dict would have held."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(
            directory=self.folder.name, remote=Region(), block_bytes=BLOCK, buffer_bytes=12 * BLOCK, wait_seconds=10
        )
        self.model: dict[str, torch.Tensor] = {}
        self.reads: list = []
        self.count = 0

    names = st.sampled_from("abcd")
    tiers = st.sampled_from(TIERS)

    @rule(name=names, tier=tiers, size=st.integers(0, 6000))
    def write(self, name: str, tier, size: int) -> None:
        self.count += 1
        if name in self.model:
            tensor = torch.full_like(self.model[name], self.count)
            self.store.write(name, tensor)
        else:
            tensor = torch.full((size,), float(self.count))
            self.store.write(name, tensor, tier)
        self.model[name] = tensor

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def prefetch(self, data) -> None:
        self.store.prefetch(data.draw(st.sampled_from(sorted(self.model))))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), into=st.booleans())
    def read(self, data, into: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        target = torch.empty_like(self.model[name]) if into else None
        self.reads.append((self.store.read(name, target), self.model[name].clone(), into))
        if len([read for read in self.reads if not read[2]]) > 2:  # more might not fit into the pool
            self.check_reads()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tier=tiers)
    def move(self, data, tier) -> None:
        self.check_reads()
        self.store.move(data.draw(st.sampled_from(sorted(self.model))), tier)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data) -> None:
        self.check_reads()
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.store.remove(name)
        del self.model[name]

    @rule()
    def check_reads(self) -> None:
        for pending, expected, into in self.reads:
            found = pending.wait()
            assert torch.equal(found, expected)
            if not into:
                self.store.release(found)
        self.reads = []

    @invariant()
    def the_pool_stays_within_its_budget(self) -> None:
        assert self.store.pool.peak_bytes <= self.store.pool.budget_bytes
        assert set(self.store.names()) == set(self.model)

    def teardown(self) -> None:
        self.check_reads()
        self.store.flush()
        self.store.close()
        self.folder.cleanup()


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


# Budgets


@pytest.mark.parametrize("tier", TIERS)
def test_a_budget_is_kept_and_the_error_names_the_shortfall(tmp_path, tier):
    size = 4 * 65536
    with Store(directory=tmp_path, remote=Region(), budgets={tier: 2 * size}) as store:
        store.create("a", (65536,), torch.float32, tier)
        store.create("b", (65536,), torch.float32, tier)
        with pytest.raises(
            DoesNotFitError, match=rf"'c'.* {tier} tier: .*\(4 bytes\)|'c'.* {tier} tier: .*\(4096 bytes\)"
        ):
            store.create("c", (1,), torch.float32, tier)
        with pytest.raises(DoesNotFitError):
            store.write("c", torch.zeros(1), tier)
        assert store.names() == ("a", "b")
        store.remove("a")
        store.create("c", (65536,), torch.float32, tier)
        assert store.use()[tier].used_bytes == store.use()[tier].peak_bytes == store.use()[tier].budget_bytes
        other = "host" if tier != "host" else "disk"
        assert store.use()[other].budget_bytes == UNLIMITED_BYTES


def test_a_move_that_does_not_fit_leaves_the_tensor_where_it_is(tmp_path):
    with Store(directory=tmp_path, budgets={"host": 100}) as store:
        store.write("x", numbers(50_000), "disk").wait()
        with pytest.raises(DoesNotFitError):
            store.move("x", "host")
        assert torch.equal(store.read("x", torch.empty(50_000)).wait(), numbers(50_000))


def test_a_full_disk_refuses_a_move_and_loses_nothing(tmp_path, monkeypatch):
    with Store(directory=tmp_path) as store:
        store.write("x", numbers(50_000), "host").wait()

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(DoesNotFitError, match="no room on disk for tensor 'x'"):
                store.move("x", "disk")
        assert store.use()["disk"].used_bytes == 0
        assert torch.equal(store.resident("x"), numbers(50_000))


# Buffers


def test_a_read_beyond_the_pool_waits_for_a_release(tmp_path):
    with Store(directory=tmp_path, buffer_bytes=2 * BLOCK) as store:
        for i in range(3):
            store.write(f"{i}", numbers(BLOCK // 4, seed=i), "disk")
        first, second, third = (store.read(f"{i}") for i in range(3))
        held = first.wait()
        second.wait()
        assert not third.done
        store.release(held)
        assert torch.equal(third.wait(), numbers(BLOCK // 4, seed=2))
        assert store.pool.peak_bytes == 2 * BLOCK


def test_a_read_behind_a_write_is_not_overtaken_at_the_last_buffer():
    region = Region()
    with Store(remote=region, buffer_bytes=BLOCK, wait_seconds=1) as store:
        store.write("early", numbers(BLOCK // 4, seed=1), "host").wait()
        region.gate.clear()
        store.write("late", numbers(BLOCK // 4, seed=2), "remote")
        reads = [store.read("late"), store.read("early")]
        assert store.pool.used_bytes == 0
        region.gate.set()
        for read, seed in zip(reads, (2, 1), strict=True):
            tensor = read.wait()
            assert torch.equal(tensor, numbers(BLOCK // 4, seed=seed))
            store.release(tensor)


def test_a_read_that_waits_in_vain_names_who_holds_the_buffers(tmp_path):
    with Store(directory=tmp_path, buffer_bytes=BLOCK, wait_seconds=0.1) as store:
        for name in "ab":
            store.write(name, numbers(BLOCK // 4), "disk").wait()
        store.read("a").wait()
        with pytest.raises(StalledError, match=r"the read of 'b' waited 0.1 s.*held by: the read of 'a'"):
            store.read("b").wait()


def test_a_tensor_larger_than_the_pool_is_read_into_memory_but_not_into_a_buffer(tmp_path):
    with Store(directory=tmp_path, buffer_bytes=BLOCK) as store:
        store.write("x", numbers(BLOCK), "disk").wait()
        with pytest.raises(DoesNotFitError, match="the read of 'x'"):
            store.read("x").wait()
        assert torch.equal(store.read("x", torch.empty(BLOCK)).wait(), numbers(BLOCK))


def test_a_buffer_is_released_once_and_can_be_written_back_from(store):
    store.write("x", numbers(1000), "disk").wait()
    buffer = store.read("x").wait()
    buffer += 1
    store.write("x", buffer, release=True).wait()
    assert store.pool.used_bytes == 0
    with pytest.raises(InputError, match="no buffer of the pool"):
        store.release(buffer)
    assert torch.equal(store.read("x", torch.empty(1000)).wait(), numbers(1000) + 1)


# Prefetch


def test_a_prefetched_tensor_is_there_without_another_access(store, region):
    store.write("x", numbers(1000), "remote").wait()
    store.prefetch("x")
    store.prefetch("x")
    store.flush()
    region.gate.clear()  # nothing comes from there any more
    buffer = store.read("x").wait(5)
    assert torch.equal(buffer, numbers(1000))
    store.release(buffer)
    region.gate.set()
    store.prefetch("x")
    store.flush()
    region.gate.clear()
    assert torch.equal(store.read("x", torch.empty(1000)).wait(5), numbers(1000))
    assert store.pool.used_bytes == 0


def test_a_write_makes_what_was_prefetched_stale(store):
    store.write("x", torch.zeros(1000), "disk")
    store.prefetch("x")
    store.write("x", torch.ones(1000))
    assert (store.read("x", torch.empty(1000)).wait() == 1).all()
    store.flush()
    assert store.pool.used_bytes == 0


def test_prefetching_takes_no_more_than_what_is_free_and_gives_way_to_reads(tmp_path):
    with Store(directory=tmp_path, buffer_bytes=3 * BLOCK, wait_seconds=5) as store:
        for i in range(6):
            store.write(f"{i}", numbers(BLOCK // 4, seed=i), "disk").wait()
        for i in range(5):
            store.prefetch(f"{i}")  # the last two find no room
        store.flush()
        assert store.pool.used_bytes == 3 * BLOCK
        buffer = store.read("5").wait()  # would wait for ever, did the prefetched not give way
        assert torch.equal(buffer, numbers(BLOCK // 4, seed=5))
        assert torch.equal(store.read("0", torch.empty(BLOCK // 4)).wait(), numbers(BLOCK // 4, seed=0))


def test_what_was_still_on_its_way_when_somebody_began_to_wait_gives_way_when_it_is_there(region):
    with Store(remote=region, buffer_bytes=2 * BLOCK, wait_seconds=5) as store:
        for i in range(2):
            store.write(f"{i}", numbers(BLOCK // 4, seed=i), "remote").wait()
        region.gate.clear()
        for i in range(2):
            store.prefetch(f"{i}")
        found = []
        waiting = threading.Thread(target=lambda: found.append(store.pool.acquire(BLOCK, "a test")))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        region.gate.set()
        waiting.join(4)
        assert len(found) == 1
        store.pool.release(found[0])
        assert torch.equal(store.read("1", torch.empty(BLOCK // 4)).wait(), numbers(BLOCK // 4, seed=1))


@pytest.mark.parametrize("tier", ["host", "remote", "disk"])
def test_what_has_been_carried_is_let_go_although_the_threads_have_nothing_else_to_do(store, tier):
    tensor = numbers(BLOCK)
    storage = StorageWeakRef(tensor.untyped_storage())
    store.write("x", tensor, tier).wait()
    store.flush()
    del tensor
    end = time.monotonic() + 5  # the thread that carried it may still be on its last line
    while not storage.expired() and time.monotonic() < end:
        time.sleep(0.01)
    assert storage.expired()


# What outlasts a store


def test_a_persistent_store_leaves_its_tensors_in_remote_memory_and_another_takes_them_over(region):
    with Store(remote=region, persistent=True) as store:
        store.write("x", numbers(10), "remote").wait()
    with Store(remote=region) as store:
        store.adopt("x", (10,), torch.float32)
        assert torch.equal(store.read("x", torch.empty(10)).wait(), numbers(10))
        with pytest.raises(InputError, match="already"):
            store.adopt("x", (10,), torch.float32)
    assert region.held == {}  # this one was not persistent
    with pytest.raises(InputError, match="directory"):
        Store(persistent=True)


# Failure


def test_an_error_is_raised_where_it_is_waited_for_and_the_tensor_stays_usable(store, region):
    store.write("x", numbers(10), "remote").wait()
    region.error = DoesNotFitError("the node is full")
    with pytest.raises(DoesNotFitError, match="the node is full"):
        store.write("x", numbers(10, seed=1)).wait()
    region.error = None
    store.flush()  # it has been reported
    assert torch.equal(store.read("x", torch.empty(10)).wait(), numbers(10))


def test_flush_raises_what_nobody_waited_for_once(store, region):
    region.error = FileError("the node is gone")
    store.write("x", numbers(10), "remote")
    with pytest.raises(FileError, match="gone"):
        store.flush()
    store.flush()
    region.error = None


def test_a_failed_move_leaves_the_tensor_where_it_was(store, region):
    store.write("x", numbers(1000), "disk").wait()
    region.error = FileError("the node is gone")
    with pytest.raises(FileError):
        store.move("x", "remote").wait()
    region.error = None
    assert store.tier_of("x") == "disk"
    assert store.use()["remote"].used_bytes == 0
    assert torch.equal(store.read("x", torch.empty(1000)).wait(), numbers(1000))


def test_a_corrupted_tensor_is_named(tmp_path):
    with Store(directory=tmp_path, persistent=True) as store:
        store.write("layer.weight", numbers(5000), "disk").wait()
        (path,) = tmp_path.glob("*.tensor")
        data = bytearray(path.read_bytes())
        data[-9000] ^= 1
        path.write_bytes(data)
        with pytest.raises(FileError, match=f"{path.name}.*'layer.weight' is corrupted"):
            store.read("layer.weight").wait()
        assert store.pool.used_bytes == 0


@pytest.mark.parametrize(
    "mistake",
    [
        lambda store: store.create("x", (3,), torch.float32, "host"),
        lambda store: store.create("y", (3,), torch.float32, "moon"),
        lambda store: store.write("y", torch.zeros(3)),
        lambda store: store.write("x", torch.zeros(4)),
        lambda store: store.write("x", torch.zeros(3, dtype=torch.float64)),
        lambda store: store.write("x", torch.zeros(3), "disk"),
        lambda store: store.read("y"),
        lambda store: store.read("x", torch.zeros(4)),
        lambda store: store.prefetch("y"),
        lambda store: store.move("y", "host"),
        lambda store: store.remove("y"),
        lambda store: store.tier_of("y"),
        lambda store: store.resident("y"),
        lambda store: store.release(torch.zeros(3)),
    ],
)
def test_mistakes_are_refused_and_change_nothing(store, mistake):
    store.write("x", torch.ones(3), "host").wait()
    with pytest.raises(InputError):
        mistake(store)
    assert store.names() == ("x",)
    assert (store.resident("x") == 1).all()
    assert store.use()["host"].used_bytes == 12


def test_tiers_that_were_not_given_are_refused():
    with Store() as store:
        for tier in ("disk", "remote"):
            with pytest.raises(InputError, match=f"no {tier} tier"):
                store.create("x", (3,), torch.float32, tier)
            assert store.use()[tier].used_bytes == 0
    with pytest.raises(InputError):
        Store(budgets={"moon": 3})
    with pytest.raises(InputError):
        Store(persistent=True)


# The end


def test_closing_removes_what_is_ones_own_and_nothing_works_afterwards(tmp_path, region):
    store = Store(directory=tmp_path, remote=region)
    for tier in TIERS:
        store.write(tier, numbers(1000), tier)
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []
    assert region.used_bytes == 0
    with pytest.raises(InputError, match="closed"):
        store.create("x", (3,), torch.float32, "host")


def test_closing_waits_for_what_was_begun_and_reports_what_failed(tmp_path, region):
    store = Store(directory=tmp_path, persistent=True)
    store.write("x", numbers(1_000_000), "disk")
    store.close()
    with Store(directory=tmp_path, persistent=True) as again:
        assert again.names() == ("x",)
        assert again.tier_of("x") == "disk"
        assert torch.equal(again.read("x", torch.empty(1_000_000)).wait(), numbers(1_000_000))
    region.error = FileError("gone")
    failing = Store(remote=region)
    failing.write("x", numbers(3), "remote")
    with pytest.raises(FileError, match="gone"):
        failing.close()


def test_a_persistent_store_counts_what_it_finds(tmp_path):
    with Store(directory=tmp_path, persistent=True) as store:
        store.create("zeros", (5, 5), torch.bfloat16, "disk")
        store.write("x", numbers(50_000), "disk")
    with Store(directory=tmp_path, persistent=True) as store:
        assert sorted(store.names()) == ["x", "zeros"]
        assert store.describe("zeros") == ((5, 5), torch.bfloat16)
        assert store.use()["disk"].used_bytes == held_bytes(200_000, "disk") + held_bytes(50, "disk")
    with pytest.raises(DoesNotFitError):
        Store(directory=tmp_path, persistent=True, budgets={"disk": 1000})


HOST_LIMIT = """
import resource, sys, torch
from headway.errors import DoesNotFitError
from headway.memory.tiers import Store
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (200 << 20), used + (200 << 20)))
with Store(directory=sys.argv[1], buffer_bytes=16 << 20) as store:
    for i in range(6):
        store.create(f"{i}", (16 << 20,), torch.float32, "disk")
    for i in range(6):
        store.prefetch(f"{i}")
    try:
        store.create("host", (100 << 20,), torch.float32, "host")
    except DoesNotFitError as error:
        print("refused", "419 MB" in str(error), store.use()["host"].used_bytes)
"""


def test_an_enforced_limit_of_memory_is_a_clear_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", HOST_LIMIT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "refused True 0\n"
