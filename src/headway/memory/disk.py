"""Tensors on disk, checksummed, and replaced so that a crash loses neither version.

Files are opened with O_DIRECT: the bytes of a step are read once and would only push other things out of the page
cache. Several requests are in flight, from threads (`blocks.py`); nothing is compiled at installation and no library is
needed. A file system that refuses O_DIRECT gets ordinary reads and writes, and `Disk.refusal` says why.

**Scratch** (`ScratchDisk`): one file without a name, in which each tensor has its place for as long as it lives. A
tensor is overwritten in place, at full speed. The kernel frees the file when the process is gone, however it went.

**Persistent** (`PersistentDisk`): a file for each tensor. A new version is written beside the old one: data,
header, `fdatasync`, rename; only then is the old one removed. Whatever moment the process is killed in,
the file that is found later is whole, old or new; opening the directory throws away what was half written.

A few of the files that have been replaced are kept, and the next tensors of their length written over them
(`spares.py`).

A persistent tensor's file: magic, length and CRC-32C of what follows, a `TensorHeader` in JSON, padded to whole pages;
then the bytes of the tensor in order, little end first, padded to pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import struct
import sys
import threading
from abc import ABC, abstractmethod
from pathlib import Path

import msgspec
import numpy as np

from headway.errors import FileError, HeadwayError, InputError
from headway.memory.blocks import BLOCK_BYTES, BlockFile, BlockThreads, Done, direct_refusal, explained, write_fully
from headway.memory.buffers import PAGE_BYTES, AlignedMemory, Extents, padded
from headway.memory.checksum import crc32c
from headway.memory.spares import SPARE_ENDING, SpareFiles
from headway.value import Value

__all__ = ["Disk", "DiskTensor", "DiskWrite", "PersistentDisk", "ScratchDisk", "TensorHeader"]

_MAGIC = b"headway1"
_PREFIX = struct.Struct("<8sII")  # magic, bytes of the JSON, its CRC-32C
_SCRATCH = ".headway-scratch-"
_LOCK = ".headway-lock"
_WHOLE, _HALF = ".tensor", ".writing"
_DIRECT = getattr(os, "O_DIRECT", 0)


class TensorHeader(Value):
    """What the file of a persistent tensor says about it."""

    name: str
    dtype: str
    """As torch calls it, without "torch."."""
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    generation: int
    """Counts the versions of this tensor; of two whole files the later one is right."""
    block_bytes: int
    checksums: tuple[int, ...] | None
    """CRC-32C of each block; None: all zeros, never written."""


class DiskTensor:
    """A tensor's place on disk. `Disk.create` makes it, and only `Disk` changes it."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], size: int, block_bytes: int) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.size = size
        self.block_bytes = block_bytes
        self.start = 0  # in the scratch file
        self.generation = 0
        self.path: Path | None = None  # of a persistent tensor's last whole version
        self.checksums: list[int] | None = None
        self.broken = False  # what is in the scratch file is no version of the tensor

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.block_bytes)

    @property
    def padded_bytes(self) -> int:
        """Bytes that it occupies."""
        return padded(self.size)

    @property
    def header_bytes(self) -> int:
        """Bytes before the tensor's own in a persistent file: known before the checksums are."""
        return padded(_PREFIX.size + 512 + 6 * len(self.name) + 24 * len(self.shape) + 11 * self.blocks)


class DiskWrite:
    """A new version of a tensor: `put` every byte once, then `commit` (or `abort`)."""

    def __init__(self, tensor: DiskTensor, file: BlockFile, temporary: Path | None = None) -> None:
        self.tensor = tensor
        self.file = file
        self.temporary = temporary
        self.checksums = [0] * tensor.blocks


class Disk(ABC):
    """Named tensors in `directory`, see the module for the two kinds.

    `threads`: requests in flight. Besides the callers' memory, each holds one block of `block_bytes`. `direct` False:
    through the page cache.

    Whoever calls sees to it that a tensor is not read or written while it is being written or removed. Raises FileError
    where the directory cannot be used.
    """

    def __init__(
        self, directory: str | Path, *, threads: int = 4, block_bytes: int = BLOCK_BYTES, direct: bool = True
    ) -> None:
        if block_bytes <= 0 or block_bytes % PAGE_BYTES or threads < 1:
            raise InputError(
                f"block_bytes={block_bytes}, threads={threads}",
                remedy=f"blocks are a multiple of {PAGE_BYTES} bytes, and there is at least one thread",
            )
        if sys.byteorder != "little":
            raise InputError("tensors on disk have the little end first, and this machine has not")
        self.directory = Path(directory)
        self.block_bytes = block_bytes
        self._tensors: dict[str, DiskTensor] = {}
        self._closed = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.refusal = direct_refusal(self.directory) if direct else "asked not to"
            self._direct = 0 if self.refusal else _DIRECT
            self._open()
        except OSError as error:
            raise FileError(
                f"cannot hold tensors: {error.strerror}", place=str(self.directory), remedy="choose another directory"
            ) from error
        self._threads = BlockThreads(threads, block_bytes)

    def names(self) -> tuple[str, ...]:
        """The tensors that are there."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> DiskTensor:
        """The place of a tensor. Raises KeyError."""
        return self._tensors[name]

    @abstractmethod
    def create(self, name: str, shape: tuple[int, ...], dtype: str, size: int, *, announce: bool = True) -> DiskTensor:
        """Make room for a tensor of zeros. `announce`: a persistent one is found again even if it is never written.

        Raises DoesNotFitError where the disk is full; nothing else changes then.
        """

    @abstractmethod
    def remove(self, tensor: DiskTensor) -> None:
        """Forget a tensor and free its place."""

    @abstractmethod
    def begin_write(self, tensor: DiskTensor) -> DiskWrite:
        """Begin a new version. Raises DoesNotFitError where the disk is full: the old version stays."""

    @abstractmethod
    def commit(self, write: DiskWrite, done: Done) -> None:
        """Begin to make the new version the tensor, once every `put` is done."""

    @abstractmethod
    def abort(self, write: DiskWrite) -> None:
        """Give the new version up. A persistent tensor stays as it was; a scratch one is broken if bytes were put."""

    @abstractmethod
    def synchronise(self) -> None:
        """Make sure that what is committed outlasts a loss of power (persistent tensors; scratch is not meant to)."""

    @abstractmethod
    def place(self, tensor: DiskTensor) -> str:
        """Where the tensor is, for messages."""

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _open_tensor(self, tensor: DiskTensor) -> BlockFile: ...

    @abstractmethod
    def _close_tensor(self, file: BlockFile) -> None: ...

    def read(self, tensor: DiskTensor, into: np.ndarray, done: Done, offset: int = 0) -> None:
        """Begin to read `into.size` bytes (uint8) from `offset`, and compare checksums.

        `offset` is at the start of a block, and the last byte is the last of a block or of the tensor. `done` gets a
        FileError naming the tensor and the file where a block is not what was written.
        """
        if tensor.broken:
            done(
                FileError(
                    f"tensor {tensor.name!r} is lost: overwriting it failed",
                    place=self.place(tensor),
                    remedy="see the error of that write; write the tensor again",
                )
            )
            return
        if tensor.checksums is None or not into.size:
            into[:] = 0
            done(None)
            return
        try:
            file = self._open_tensor(tensor)
        except OSError as error:
            done(explained(error, tensor.name, self.place(tensor)))
            return

        def finished(error: Exception | None) -> None:
            self._close_tensor(file)
            done(error)

        self._threads.read(file, offset // tensor.block_bytes, into, tensor.checksums, finished)

    def put(self, write: DiskWrite, offset: int, data: np.ndarray, done: Done) -> None:
        """Begin to write a piece. `offset` and its end lie between blocks, unless it is the tensor's last piece."""
        self._threads.write(write.file, offset // write.tensor.block_bytes, data, write.checksums, done)

    def write(self, tensor: DiskTensor, data: np.ndarray, done: Done) -> None:
        """Begin to write all of a tensor (uint8): `begin_write`, `put` and `commit` in one."""
        try:
            write = self.begin_write(tensor)
        except HeadwayError as error:
            done(error)
            return

        def end(error: Exception | None) -> None:
            if error is not None:
                self.abort(write)
            done(error)

        def commit(error: Exception | None) -> None:
            if error is not None:
                end(error)
            else:
                self.commit(write, end)

        self.put(write, 0, data, commit)

    def close(self) -> None:
        """Stop the threads, once they have done what was begun, and let go of the files. Idempotent."""
        if not self._closed:
            self._closed = True
            self._threads.close()
            self._let_go()

    @abstractmethod
    def _let_go(self) -> None: ...


class ScratchDisk(Disk):
    """Tensors that live as long as the process at most, in one file without a name."""

    def _open(self) -> None:
        self._lock = threading.Lock()
        self._extents = Extents()
        flags = os.O_RDWR | os.O_CLOEXEC | self._direct
        try:
            self._descriptor = os.open(self.directory, flags | os.O_TMPFILE, 0o600)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            # No file without a name here: one that loses its name at once. Who was killed in between left it behind,
            # and who is alive does not need it, so all that are found can go.
            path = self.directory / f"{_SCRATCH}{os.getpid()}-{id(self)}"
            self._descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            for left in (path, *self.directory.glob(f"{_SCRATCH}*")):
                left.unlink(missing_ok=True)

    def _let_go(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        self._tensors.clear()

    def place(self, tensor: DiskTensor) -> str:
        return f"{self.directory} (scratch file of process {os.getpid()}, from byte {tensor.start})"

    def create(self, name: str, shape: tuple[int, ...], dtype: str, size: int, *, announce: bool = True) -> DiskTensor:
        tensor = DiskTensor(name, dtype, shape, size, self.block_bytes)
        with self._lock:
            before = self._extents.end
            start = self._extents.take(tensor.padded_bytes)
            assert start is not None  # it grows
            tensor.start = start
            if self._extents.end > before:
                try:
                    _reserve(self._descriptor, before, self._extents.end - before)
                except OSError as error:
                    self._extents.give(start, tensor.padded_bytes)
                    with contextlib.suppress(OSError):
                        os.ftruncate(self._descriptor, before)
                    raise explained(error, name, self.place(tensor)) from error
        self._tensors[name] = tensor
        return tensor

    def remove(self, tensor: DiskTensor) -> None:
        self._tensors.pop(tensor.name, None)
        with self._lock:
            before = self._extents.end
            self._extents.give(tensor.start, tensor.padded_bytes)
            if self._extents.end < before:
                os.ftruncate(self._descriptor, self._extents.end)

    def begin_write(self, tensor: DiskTensor) -> DiskWrite:
        tensor.broken = True  # until the commit
        return DiskWrite(tensor, self._open_tensor(tensor))

    def commit(self, write: DiskWrite, done: Done) -> None:
        write.tensor.checksums = write.checksums
        write.tensor.broken = False
        done(None)

    def abort(self, write: DiskWrite) -> None:
        pass  # it stays broken

    def synchronise(self) -> None:
        pass

    def _open_tensor(self, tensor: DiskTensor) -> BlockFile:
        return BlockFile(self._descriptor, self.place(tensor), tensor.start, tensor.name, tensor.block_bytes)

    def _close_tensor(self, file: BlockFile) -> None:
        pass  # it is everybody's


class PersistentDisk(Disk):
    """Tensors that outlast the process, a file for each. One process at a time: raises FileError for a second one.

    Beside them lie up to 8 files that were replaced, to be used again: until `close`, or until the disk is full.
    """

    def _open(self) -> None:
        self._spares = SpareFiles(self.directory)
        self._lock_descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_descriptor)
            raise FileError(
                "another process has these tensors open", place=str(self.directory), remedy="a directory for each rank"
            ) from None
        try:
            self._find()
        except BaseException:
            os.close(self._lock_descriptor)
            raise

    def _let_go(self) -> None:
        self._spares.drop()
        os.close(self._lock_descriptor)

    def place(self, tensor: DiskTensor) -> str:
        return str(tensor.path or self._path(tensor.name, tensor.generation, _HALF))

    def create(self, name: str, shape: tuple[int, ...], dtype: str, size: int, *, announce: bool = True) -> DiskTensor:
        tensor = DiskTensor(name, dtype, shape, size, self.block_bytes)
        if announce:
            write = self.begin_write(tensor)
            try:
                self._finish(write, None)
            except OSError as error:
                raise explained(error, name, self.place(tensor)) from error
            finally:
                self.abort(write)
        self._tensors[name] = tensor
        return tensor

    def remove(self, tensor: DiskTensor) -> None:
        self._tensors.pop(tensor.name, None)
        if tensor.path is not None:
            tensor.path.unlink(missing_ok=True)

    def begin_write(self, tensor: DiskTensor) -> DiskWrite:
        temporary = self._path(tensor.name, tensor.generation + 1, _HALF)
        size = tensor.header_bytes + tensor.padded_bytes
        is_reused = self._spares.take(size, temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | self._direct | (0 if is_reused else os.O_TRUNC)
        try:
            descriptor = os.open(temporary, flags, 0o644)
        except OSError as error:
            raise explained(error, tensor.name, str(temporary)) from error
        file = BlockFile(descriptor, str(temporary), tensor.header_bytes, tensor.name, tensor.block_bytes)
        write = DiskWrite(tensor, file, temporary)
        if is_reused:
            return write
        try:
            try:
                _reserve(descriptor, 0, size)
            except OSError:
                if not self._spares.drop():
                    raise
                _reserve(descriptor, 0, size)
        except OSError as error:
            self.abort(write)
            raise explained(error, tensor.name, str(temporary)) from error
        return write

    def commit(self, write: DiskWrite, done: Done) -> None:
        def finished(error: Exception | None) -> None:
            done(error)
            if error is None and self._spares.is_short:  # nobody waits for it
                self._threads.run(write.file, self._secure_spares, lambda _: None)

        self._threads.run(write.file, lambda: self._finish(write, write.checksums), finished)

    def _secure_spares(self) -> None:
        if self._spares.is_short:  # somebody else may have done it for this write too
            self._spares.secure()

    def abort(self, write: DiskWrite) -> None:
        write.file.close()
        if write.temporary is not None:
            with contextlib.suppress(OSError):
                write.temporary.unlink(missing_ok=True)

    def synchronise(self) -> None:
        self._spares.secure()

    def _finish(self, write: DiskWrite, checksums: list[int] | None) -> None:
        """Header, rename, and away with the old version. `fdatasync` between, so that no name precedes its bytes."""
        tensor, file = write.tensor, write.file
        assert write.temporary is not None
        generation = tensor.generation + 1
        header = TensorHeader(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            size=tensor.size,
            generation=generation,
            block_bytes=tensor.block_bytes,
            checksums=None if checksums is None else tuple(checksums),
        )
        write_fully(file.descriptor, _packed(header, tensor.header_bytes), 0)
        os.fdatasync(file.descriptor)
        path = self._path(tensor.name, generation, _WHOLE)
        os.rename(write.temporary, path)
        write.temporary = None
        file.close()
        old, tensor.path = tensor.path, path
        tensor.generation = generation
        tensor.checksums = checksums
        if old is not None and not self._spares.keep(old, tensor.header_bytes + tensor.padded_bytes):
            # File systems with a journal keep the order of the rename and this.
            old.unlink(missing_ok=True)

    def _path(self, name: str, generation: int, ending: str) -> Path:
        readable = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:80]
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()  # names may differ where files may not
        return self.directory / f"{readable}.{digest}.{generation}{ending}"

    def _find(self) -> None:
        """Read the headers of what is there, and remove what a crash left half written or not yet removed."""
        for left in (*self.directory.glob(f"*{_HALF}"), *self.directory.glob(f"*{SPARE_ENDING}")):
            left.unlink(missing_ok=True)
        for path in sorted(self.directory.glob(f"*{_WHOLE}")):
            header = _unpacked(path)
            found = DiskTensor(header.name, header.dtype, header.shape, header.size, header.block_bytes)
            found.generation = header.generation
            found.checksums = None if header.checksums is None else list(header.checksums)
            found.path = path
            known = self._tensors.get(header.name)
            if known is None or known.generation < found.generation:
                self._tensors[header.name] = found
                found, known = known, found
            if found is not None and found.path is not None:
                found.path.unlink(missing_ok=True)

    def _open_tensor(self, tensor: DiskTensor) -> BlockFile:
        assert tensor.path is not None
        descriptor = os.open(tensor.path, os.O_RDONLY | os.O_CLOEXEC | self._direct)
        return BlockFile(descriptor, str(tensor.path), tensor.header_bytes, tensor.name, tensor.block_bytes)

    def _close_tensor(self, file: BlockFile) -> None:
        file.close()


def _reserve(descriptor: int, start: int, size: int) -> None:
    """Give a file room, so that the disk cannot be full later. Raises OSError."""
    try:
        os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.ftruncate(descriptor, start + size)  # it cannot promise room: the write will tell


def _packed(header: TensorHeader, size: int) -> np.ndarray:
    text = np.frombuffer(msgspec.json.encode(header), np.uint8)  # not indented: a line for each checksum is too much
    prefix = _PREFIX.pack(_MAGIC, text.size, crc32c(text))
    page = AlignedMemory(size).tensor.numpy()[:size]
    page[: len(prefix)] = np.frombuffer(prefix, np.uint8)
    page[len(prefix) : len(prefix) + text.size] = text
    return page


def _unpacked(path: Path) -> TensorHeader:
    """The header of a whole tensor's file. Raises FileError where it has been damaged."""
    with path.open("rb") as file:
        prefix = file.read(_PREFIX.size)
        magic, length, checksum = _PREFIX.unpack(prefix) if len(prefix) == _PREFIX.size else (b"", 0, 0)
        text = np.frombuffer(file.read(length), np.uint8) if magic == _MAGIC else np.zeros(0, np.uint8)
    if magic != _MAGIC or text.size != length or crc32c(text) != checksum:
        raise FileError(
            "the header of this tensor is corrupted", place=str(path), remedy="remove the file to do without the tensor"
        )
    return TensorHeader.from_json(text.tobytes(), place=str(path))
