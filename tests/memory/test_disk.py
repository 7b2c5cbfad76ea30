"""Tensors on disk: whole after any crash, told from corrupted ones, and none left behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from headway.errors import DoesNotFitError, FileError, InputError
from headway.memory import disk
from headway.memory.buffers import PAGE_BYTES, AlignedMemory
from headway.memory.disk import Disk, PersistentDisk, ScratchDisk

BLOCK = 2 * PAGE_BYTES
SIZES = [0, 1, 511, PAGE_BYTES - 1, PAGE_BYTES, BLOCK, BLOCK + 1, 5 * BLOCK + 100, 6 * BLOCK]


def numbers(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def wait_for(begin) -> None:
    ended = threading.Event()
    errors: list[Exception | None] = []

    def done(error: Exception | None) -> None:
        errors.append(error)
        ended.set()

    begin(done)
    assert ended.wait(30)
    assert len(errors) == 1
    if errors[0] is not None:
        raise errors[0]


def write(where: Disk, name: str, data: np.ndarray) -> None:
    tensor = where.tensor(name) if name in where.names() else where.create(name, (data.size,), "uint8", data.size)
    wait_for(lambda done: where.write(tensor, data, done))


def read(where: Disk, name: str) -> np.ndarray:
    tensor = where.tensor(name)
    into = np.full(tensor.size, 255, np.uint8)
    wait_for(lambda done: where.read(tensor, into, done))
    return into


@pytest.fixture(params=[ScratchDisk, PersistentDisk])
def kind(request):
    return request.param


# Bytes


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_what_is_written_is_read(kind, direct, aligned, tmp_path):
    with_data = {f"t{size}": numbers(size, size) for size in SIZES}
    where = kind(tmp_path, threads=3, block_bytes=BLOCK, direct=direct)
    for turn in range(2):
        for name, data in with_data.items():
            if aligned:
                memory = AlignedMemory(data.size).tensor.numpy()[: data.size]
                memory[:] = data + turn
            else:
                memory = (data + turn).astype(np.uint8)
            write(where, name, memory)
        for name, data in with_data.items():
            assert np.array_equal(read(where, name), (data + turn).astype(np.uint8))
    where.close()


def test_a_created_tensor_is_zeros_even_in_a_place_used_before(kind, tmp_path):
    where = kind(tmp_path, block_bytes=BLOCK)
    write(where, "old", np.full(3 * BLOCK, 9, np.uint8))
    where.remove(where.tensor("old"))
    where.create("new", (3 * BLOCK,), "uint8", 3 * BLOCK)
    assert not read(where, "new").any()
    where.close()


def test_a_refused_direct_transfer_falls_back_and_says_why(kind, tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    where = kind(tmp_path, block_bytes=BLOCK)
    assert "O_DIRECT" in where.refusal
    write(where, "a", numbers(BLOCK + 5, 1))
    assert np.array_equal(read(where, "a"), numbers(BLOCK + 5, 1))
    where.close()


def test_where_files_must_have_names_the_scratch_file_loses_its_own_and_others_leavings(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *rest, **named):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    (tmp_path / ".headway-scratch-99-1").write_bytes(b"left by a process that was killed between two calls")
    where = ScratchDisk(tmp_path, block_bytes=BLOCK)
    write(where, "a", numbers(100, 1))
    assert list(tmp_path.iterdir()) == []
    assert np.array_equal(read(where, "a"), numbers(100, 1))
    where.close()


# Corruption


def test_a_changed_byte_is_found_and_the_error_names_tensor_file_and_place(tmp_path):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK)
    write(where, "layer.weight", numbers(3 * BLOCK, 1))
    (path,) = tmp_path.glob("*.tensor")
    with path.open("r+b") as file:
        file.seek(-BLOCK - 10, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(FileError, match=rf"{path.name}.*'layer.weight' is corrupted.*bytes {BLOCK} to {2 * BLOCK}"):
        read(where, "layer.weight")
    where.close()


def test_a_changed_byte_in_the_scratch_file_is_found(tmp_path):
    where = ScratchDisk(tmp_path, block_bytes=BLOCK)
    write(where, "a", numbers(BLOCK, 1))
    with open(f"/proc/self/fd/{where._descriptor}", "r+b") as file:
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(FileError, match=r"'a' is corrupted"):
        read(where, "a")
    where.close()


def test_a_file_cut_short_or_with_a_damaged_header_is_found(tmp_path):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK)
    write(where, "a", numbers(3 * BLOCK, 1))
    (path,) = tmp_path.glob("*.tensor")
    os.truncate(path, path.stat().st_size - BLOCK)
    with pytest.raises(FileError, match="file ends before"):
        read(where, "a")
    where.close()
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"??")
    with pytest.raises(FileError, match="header"):
        PersistentDisk(tmp_path)


# A full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_an_error_and_loses_nothing(kind, tmp_path, monkeypatch, number):
    where = kind(tmp_path, block_bytes=BLOCK)
    write(where, "a", numbers(2 * BLOCK, 1))

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DoesNotFitError, match="no room on disk for tensor 'b'"):
        write(where, "b", numbers(9 * BLOCK, 2))
    if kind is PersistentDisk:
        with pytest.raises(DoesNotFitError, match="'a'"):
            write(where, "a", numbers(2 * BLOCK, 3))
    else:
        write(where, "a", numbers(2 * BLOCK, 1))  # its room is its own
    assert np.array_equal(read(where, "a"), numbers(2 * BLOCK, 1))
    assert where.names() == ("a",)
    monkeypatch.undo()
    write(where, "b", numbers(9 * BLOCK, 2))
    assert np.array_equal(read(where, "b"), numbers(9 * BLOCK, 2))
    where.close()


FILE_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
import numpy as np
from headway.errors import DoesNotFitError
from headway.memory.disk import PersistentDisk, ScratchDisk
for kind in (ScratchDisk, PersistentDisk):
    where = kind(sys.argv[1])
    where.create("small", (1000,), "uint8", 1000)
    try:
        where.create("large", (2 << 20,), "uint8", 2 << 20)
    except DoesNotFitError as error:
        print("refused", "large" in str(error), where.names())
    where.close()
"""


def test_a_limit_of_the_system_on_files_is_a_clear_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILE_LIMIT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["refused True ('small',)"] * 2


def test_a_scratch_write_that_fails_midway_makes_the_tensor_unreadable_until_it_is_written(tmp_path, monkeypatch):
    where = ScratchDisk(tmp_path, block_bytes=BLOCK, threads=1)
    write(where, "a", numbers(4 * BLOCK, 1))
    real, calls = os.pwritev, []

    def failing(descriptor, buffers, offset):
        calls.append(offset)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    with pytest.raises(FileError, match="'a'"):
        write(where, "a", numbers(4 * BLOCK, 2))
    with pytest.raises(FileError, match="'a' is lost"):
        read(where, "a")
    monkeypatch.undo()
    write(where, "a", numbers(4 * BLOCK, 3))
    assert np.array_equal(read(where, "a"), numbers(4 * BLOCK, 3))
    where.close()


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: real(fd, [buffers[0][:PAGE_BYTES]], offset))
    where = ScratchDisk(tmp_path, block_bytes=BLOCK)
    write(where, "a", numbers(4 * BLOCK, 1))
    assert np.array_equal(read(where, "a"), numbers(4 * BLOCK, 1))
    where.close()


# Crashes


class Crash(BaseException):
    """The process is gone: nothing after this reaches the disk."""


OLD, NEW = numbers(3 * BLOCK + 77, 1), numbers(3 * BLOCK + 77, 2)
CALLS = ("open", "posix_fallocate", "pwritev", "fdatasync", "fsync", "rename")


def crash_at(count: int, torn_bytes: int, monkeypatch) -> list[str]:
    """From the `count`th call on nothing is done any more; a write at that moment leaves `torn_bytes` of it."""
    made: list[str] = []

    def wrapped(name: str, real):
        def call(*arguments, **named):
            if name != "unlink" or made:
                made.append(name)
            if len(made) > count:
                if name == "pwritev" and len(made) == count + 1 and torn_bytes:
                    part = arguments[1][0][: torn_bytes // 512 * 512]
                    real(arguments[0], [part.copy() if part.ctypes.data % 512 else part], arguments[2])
                raise OSError(errno.EIO, "crashed")
            return real(*arguments, **named)

        return call

    for name in (*CALLS, "unlink"):
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return made


@pytest.mark.parametrize("torn_bytes", [0, 512, PAGE_BYTES + 512])
@pytest.mark.parametrize("count", range(18))
@pytest.mark.parametrize("replaced", [0, 2])
def test_a_crash_at_any_call_leaves_the_old_tensor_or_the_new_one(replaced, count, torn_bytes, tmp_path, monkeypatch):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK, threads=1, direct=False)
    write(where, "a", OLD)
    for turn in range(replaced):  # leaves files that the next version is written over
        write(where, "b", numbers(OLD.size, 10 + turn))
    with monkeypatch.context() as patch:
        made = crash_at(count, torn_bytes, patch)
        try:
            write(where, "a", NEW)
            was_committed = True
        except FileError:
            was_committed = False
    calls = len(made)
    where.close()
    again = PersistentDisk(tmp_path, block_bytes=BLOCK)
    found = read(again, "a")
    assert np.array_equal(found, NEW) or np.array_equal(found, OLD)
    if was_committed:
        assert np.array_equal(found, NEW)
    if replaced:
        assert np.array_equal(read(again, "b"), numbers(OLD.size, 9 + replaced))
    assert len(list(tmp_path.glob("*.tensor"))) == 1 + bool(replaced)
    assert not list(tmp_path.glob("*.writing"))
    assert not list(tmp_path.glob("*.spare"))
    # The last counts let the whole replacement happen, so all its calls were covered.
    assert count < 17 or calls <= count
    again.close()


def test_a_replaced_file_is_written_over_only_when_the_directory_on_disk_no_longer_needs_it(tmp_path, monkeypatch):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK, threads=2)
    said: list[tuple[str, str]] = []
    rename, fsync = os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda old, new: (said.append((str(old), str(new))), rename(old, new))[1])
    monkeypatch.setattr(os, "fsync", lambda file: (said.append(("fsync", "")), fsync(file))[1])
    for turn in range(6):
        for name in ("a", "b"):
            write(where, name, numbers(OLD.size, turn))
    reused = [(i, old) for i, (old, new) in enumerate(said) if new.endswith(".writing")]
    assert len(reused) > 4
    for at, spare in reused:
        retired = max(i for i, (_, new) in enumerate(said[:at]) if new == spare)
        assert ("fsync", "") in said[retired:at]
    where.close()
    assert not list(tmp_path.glob("*.spare"))


def test_replaced_files_are_few_and_give_way_when_the_disk_is_full(tmp_path, monkeypatch):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK, threads=2)
    for turn in range(2):
        for number in range(12):
            write(where, f"{number}", numbers(BLOCK, turn))
    kept = len(list(tmp_path.glob("*.spare")))
    assert 0 < kept <= 8
    real = os.posix_fallocate

    def refuse(*arguments):
        if list(tmp_path.glob("*.spare")):
            raise OSError(errno.ENOSPC, "full")
        real(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(where, "larger", numbers(3 * BLOCK, 5))
    assert np.array_equal(read(where, "larger"), numbers(3 * BLOCK, 5))
    # All gave way but what "larger" has replaced itself.
    assert all(path.stat().st_size > 3 * BLOCK for path in tmp_path.glob("*.spare"))
    where.close()


WRITER = """
import sys
import numpy as np
from headway.memory.disk import PersistentDisk
import threading
where = PersistentDisk(sys.argv[1], block_bytes=1 << 16)
tensor = where.tensor("a")
data = np.empty(tensor.size, np.uint8)
print("ready", flush=True)
value = 1
while True:
    data[:] = value % 251
    ended = threading.Event()
    where.write(tensor, data, lambda error: ended.set())
    ended.wait()
    value += 1
"""


def test_a_process_killed_while_it_replaces_a_tensor_leaves_a_whole_one(tmp_path):
    size = 1 << 20
    where = PersistentDisk(tmp_path, block_bytes=1 << 16)
    write(where, "a", np.zeros(size, np.uint8))
    where.close()
    for turn in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.013 * turn)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        where = PersistentDisk(tmp_path, block_bytes=1 << 16)
        found = read(where, "a")
        assert (found == found[0]).all()
        assert len(list(tmp_path.glob("*.tensor"))) == 1
        assert not list(tmp_path.glob("*.writing"))
        where.close()


SCRATCH = """
import sys, time
import numpy as np
import threading
from headway.memory.disk import ScratchDisk
where = ScratchDisk(sys.argv[1])
ended = threading.Event()
where.write(where.create("a", (8 << 20,), "uint8", 8 << 20), np.ones(8 << 20, np.uint8), lambda error: ended.set())
ended.wait()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_no_scratch_file(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", SCRATCH, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert list(tmp_path.iterdir()) == []


# Directories


def test_a_persistent_directory_lists_its_tensors_when_it_is_opened_again(tmp_path):
    where = PersistentDisk(tmp_path, block_bytes=BLOCK)
    names = ["a/b", "a_b", "ä" * 120, "x" * 300, "never written"]
    for i, name in enumerate(names[:-1]):
        write(where, name, numbers(BLOCK + i, i))
    where.create(names[-1], (3, 5), "float32", 60)
    where.synchronise()
    where.close()
    again = PersistentDisk(tmp_path)  # with another block: files know their own
    assert set(again.names()) == set(names)
    for i, name in enumerate(names[:-1]):
        assert np.array_equal(read(again, name), numbers(BLOCK + i, i))
    assert again.tensor(names[-1]).shape == (3, 5)
    assert not read(again, names[-1]).any()
    again.remove(again.tensor("a/b"))
    again.close()
    assert "a/b" not in PersistentDisk(tmp_path).names()


def test_a_persistent_directory_belongs_to_one_process_at_a_time(tmp_path):
    where = PersistentDisk(tmp_path)
    with pytest.raises(FileError, match="another process"):
        PersistentDisk(tmp_path)
    where.close()
    PersistentDisk(tmp_path).close()


def test_unusable_arguments_are_refused(kind, tmp_path):
    for named in ({"block_bytes": 5000}, {"threads": 0}):
        with pytest.raises(InputError):
            kind(tmp_path, **named)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError):
        kind(tmp_path / "file" / "below")


def test_the_scratch_file_shrinks_when_tensors_go(tmp_path):
    where = ScratchDisk(tmp_path, block_bytes=BLOCK)
    tensors = [where.create(f"{i}", (BLOCK,), "uint8", BLOCK) for i in range(4)]
    assert os.fstat(where._descriptor).st_size == 4 * BLOCK
    where.remove(tensors[1])
    where.remove(tensors[3])
    assert os.fstat(where._descriptor).st_size == 3 * BLOCK
    where.remove(tensors[2])
    assert os.fstat(where._descriptor).st_size == BLOCK
    where.close()


def test_limits_of_this_process_are_as_they_were():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert disk.BLOCK_BYTES % PAGE_BYTES == 0
    assert Path("/proc/self/fd").exists()


def test_no_more_requests_are_in_flight_than_asked_for_though_more_threads_carry_blocks(tmp_path, monkeypatch):
    """The others compute checksums meanwhile; `threads` is what the disk sees."""
    block, count = 4096, 2
    in_flight, most, lock = 0, 0, threading.Lock()
    write = os.pwritev

    def counted(*arguments):
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(0.002)
        try:
            return write(*arguments)
        finally:
            with lock:
                in_flight -= 1

    disk = ScratchDisk(tmp_path, threads=count, block_bytes=block)
    tensor = disk.create("x", (32 * block,), "uint8", 32 * block)
    monkeypatch.setattr(os, "pwritev", counted)
    done = threading.Event()
    disk.write(tensor, AlignedMemory(32 * block).tensor.numpy(), lambda error: done.set())
    assert done.wait(20)
    disk.close()
    assert most == count
