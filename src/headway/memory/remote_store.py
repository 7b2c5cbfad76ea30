"""Named tensors in the region of a passive memory node: the remote tier of the `Store`.

    node = start_memory_node(4 * 2**30)
    region = RemoteStore(SharedVerbs([node.address]), node.address.region_bytes)
    region.write("moments/0", memoryview(bytes))

Everything is done by the clients, with the four verbs. The region holds a lock word, a table of names, and the data:

    word 0        who holds the lock: needed to allocate, never to read or to copy data
    word 1        how many clients have attached so far
    256 ...       the table, 256 bytes a name: state, two places (offset, bytes, checksum), who writes, the name
    after it      data, in extents aligned to 64 bytes

**Replacement is safe against crashes.** New content goes to an extent of its own and into the place that is not
current; then one word, the state, makes it current. A client that is killed at any point leaves the old content or the
new. What it had reserved, and its lock, belong to the next who comes and finds its process gone. This needs room for
old and new at once; `in_place` does without, and then content that is torn by a crash is refused when it is read.

A name has one writer at a time; there may be any number of readers, and of clients with different names.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import numpy as np

from headway.errors import DoesNotFitError, InputError, RunError
from headway.memory.checksum import crc32c
from headway.memory.remote import Verbs
from headway.units import format_bytes

__all__ = ["RemoteStore"]

_ALIGNMENT = 64
_RECORD = 256
_LOCK, _ATTACHED = 0, 8  # offsets
# States: which place is current (1, 2; none: 0), or a name without content; and whether the current one is being
# replaced where it is.
_FREE, _FIRST, _SECOND, _NEW, _TORN = 0, 1, 2, 4, 8
_STATE, _OWNER, _NAME_BYTES = 0, 7, 8  # words of a record; words 1-3 and 4-6 are the places
_NAME = 9 * 8  # where the name begins
_LONGEST_NAME = _RECORD - _NAME
_PAUSE_SECONDS = 0.0001
_MOST_SLOTS, _FEWEST_SLOTS = 16384, 256


class RemoteStore:
    """The tensors of one memory node, by name, as bytes (`headway.memory.tiers.RemoteRegion`). Safe for threads.

    `region_bytes` of `node` belong to it. `checksums`: CRC-32C of all content, written and verified. `in_place`:
    replace content of the same length where it is, instead of safely. `prefix`: put before every name, so that several
    clients can use the same ones. `slots`: how many names there can be, the same for all clients of a region; by
    default one for each 256 KiB.

    Raises DoesNotFitError when the region is full, RunError when the node is gone or content is damaged.
    """

    def __init__(
        self,
        verbs: Verbs,
        region_bytes: int,
        *,
        node: int = 0,
        checksums: bool = True,
        in_place: bool = False,
        prefix: str = "",
        slots: int | None = None,
    ) -> None:
        # By default it depends on nothing but the size, for all clients to agree.
        self._slots = min(max(region_bytes // 2**18, _FEWEST_SLOTS), _MOST_SLOTS) if slots is None else slots
        self._prefix = prefix
        self._data = _RECORD * (1 + self._slots)
        if region_bytes < self._data + _ALIGNMENT:
            raise InputError(
                f"a region of {region_bytes} bytes has no room for its own table",
                place=f"memory node {node}",
                remedy=f"give more than {self._data + _ALIGNMENT} bytes",
            )
        self.capacity_bytes = region_bytes - self._data
        self._verbs, self._node, self._end = verbs, node, region_bytes
        self._checksums, self._in_place = checksums, in_place
        self._mine = threading.RLock()  # the word in the region tells processes apart, not threads
        self._known: dict[str, int] = {}  # name → slot, as far as seen; checked at each use
        self.client = verbs.fetch_and_add(node, _ATTACHED, 1)

    @property
    def used_bytes(self) -> int:
        """Bytes that the region's content takes, rounded up to extents, of all clients together."""
        return sum(_rounded(size) for _, size in self._extents(self._table()))

    def names(self) -> tuple[str, ...]:
        """The names that have content and begin with this client's prefix, without it, in the order of the table."""
        table = self._table()
        found = (_name_of(table[slot]) for slot in np.flatnonzero(table[:, _STATE] & np.uint64(3)))
        return tuple(name.removeprefix(self._prefix) for name in found if name.startswith(self._prefix))

    def size_of(self, name: str) -> int:
        """The bytes of its content. Raises InputError where there is none of that name."""
        _, record = self._find(self._prefix + name)
        return _place(record)[1]

    def read(self, name: str, into: memoryview) -> None:
        """Fill `into` with the content. Raises InputError for another length, RunError for content that is damaged."""
        target, name = memoryview(into).cast("B"), self._prefix + name
        while True:
            slot, record = self._find(name)
            if record[_STATE] & _TORN:
                raise RunError(
                    "was being replaced in place when its writer ended, or still is: it is torn",
                    place=self._where(name),
                    remedy="resume from a checkpoint; without in_place, replacement is safe",
                )
            offset, size, checksum = _place(record)
            if size != target.nbytes:
                raise InputError(
                    f"holds {size} bytes, not {target.nbytes}",
                    place=self._where(name),
                    remedy="read it into a buffer of its own length",
                )
            self._verbs.read_into(self._node, offset, target)
            is_same = bool((self._record(slot) == record).all())  # else replaced meanwhile, its extent used again
            if is_same and self._checksums and _checksum(target) != checksum:
                raise RunError(
                    "does not match its checksum", place=self._where(name), remedy="resume from a checkpoint"
                )
            if is_same:
                return

    def write(self, name: str, data: memoryview) -> None:
        """Make `data` the content of `name`, new or instead of the old; it is there when this returns."""
        source, name = memoryview(data).cast("B"), self._prefix + name
        checksum = _checksum(source) if self._checksums else 0
        if self._in_place and self._overwrite(name, source, checksum):
            return
        with self._locked():
            slot, place, offset = self._reserve(name, source.nbytes)
        self._verbs.write_from(self._node, offset, source)
        self._put(slot, 3 * place, checksum)
        # One word makes it current; the reservation ends after that, so nobody gets the extent in between.
        self._put(slot, _STATE, place)
        self._put(slot, _OWNER, 0)

    def remove(self, name: str) -> None:
        """Forget it; its bytes are free from now on. Nothing happens if it is not there."""
        name = self._prefix + name
        with self._locked():
            slot = self._slot_of(name, self._table())
            if slot is not None:
                self._put(slot, _OWNER, 0)
                self._put(slot, _STATE, _FREE)
                self._known.pop(name, None)

    def _overwrite(self, name: str, source: memoryview, checksum: int) -> bool:
        """Replace content of the same length where it is; False if there is none that this client knows of.

        Without the lock: nobody else writes this name, and nothing is allocated.
        """
        slot = self._known.get(name)
        if slot is None:
            return False
        record = self._record(slot)
        if not record[_STATE] & 3 or record[_OWNER] or _name_of(record) != name or _place(record)[1] != source.nbytes:
            return False
        current = int(record[_STATE] & 3)
        self._put(slot, _STATE, current | _TORN)
        self._verbs.write_from(self._node, _place(record)[0], source)
        self._put(slot, 3 * current, checksum)
        self._put(slot, _STATE, current)
        return True

    # The table. What changes it, but for the end of a write, is under the lock.

    def _reserve(self, name: str, size: int) -> tuple[int, int, int]:
        """The slot of `name`, the place (1 or 2) that its next content goes to, and the offset of that."""
        encoded = name.encode()
        if not 0 < len(encoded) <= _LONGEST_NAME:
            raise InputError(f"a name of {len(encoded)} bytes", place=name, remedy=f"give 1 to {_LONGEST_NAME} bytes")
        table = self._table()
        slot = self._slot_of(name, table)
        if slot is not None and self._in_place and table[slot, _STATE] & 3:
            current = int(table[slot, _STATE] & 3)
            offset, held, _ = _place(table[slot])
            if held == size:
                self._put(slot, _STATE, current | _TORN)
                return slot, current, offset
        offset = self._gap(table, size, name)
        if slot is None:
            slot = self._free_slot(table, name)
            blank = np.zeros(_RECORD // 8, np.uint64)
            blank[_NAME_BYTES] = len(encoded)
            blank.view(np.uint8)[_NAME : _NAME + len(encoded)] = np.frombuffer(encoded, np.uint8)
            self._put(slot, 0, blank)
            self._put(slot, _STATE, _NEW)
            self._known[name] = slot
            state = _NEW
        else:
            state = int(table[slot, _STATE])
        place = 2 if state & 3 == _FIRST else 1
        self._put(slot, 3 * place - 2, [offset, size])
        self._put(slot, _OWNER, _identity())
        return slot, place, offset

    def _free_slot(self, table: np.ndarray, name: str) -> int:
        free = np.flatnonzero(table[:, _STATE] == _FREE)
        if free.size:
            return int(free[0])
        for slot in np.flatnonzero(table[:, _STATE] == _NEW):  # by a writer that died before it had written anything?
            if not _is_alive(int(table[slot, _OWNER])):
                return int(slot)
        raise DoesNotFitError(
            f"{self._slots} names, and no slot for one more",
            place=self._where(name),
            remedy="remove some, or give the node a larger region",
        )

    def _gap(self, table: np.ndarray, size: int, name: str) -> int:
        """The offset of the first gap among the extents that is large enough."""
        needed = _rounded(size)
        taken = np.array(sorted(self._extents(table)), np.int64).reshape(-1, 2)
        begins = np.append(taken[:, 0], self._end - self._end % _ALIGNMENT)
        ends = np.append(self._data, taken[:, 0] + -(-taken[:, 1] // _ALIGNMENT) * _ALIGNMENT)
        # Extents overlap where a writer has made its content current and has not said yet that it is done: what is then
        # taken for its reservation is of long ago.
        ends = np.maximum.accumulate(ends)
        gaps = begins - ends
        fitting = np.flatnonzero(gaps >= needed)
        if fitting.size:
            return int(ends[fitting[0]])
        raise DoesNotFitError(
            f"needs {format_bytes(needed)}, and the largest gap has {format_bytes(max(0, int(gaps.max())))} "
            f"({format_bytes(int(gaps.sum()))} of {format_bytes(self.capacity_bytes)} are free)",
            place=self._where(name),
            remedy="give the node a larger region; replacing a tensor safely takes room for the old and the new",
        )

    def _extents(self, table: np.ndarray) -> list[tuple[int, int]]:
        """(offset, bytes) of all that is current, and all that a living client is writing."""
        current = (table[:, _STATE] & np.uint64(3)).astype(np.int64)
        live = np.flatnonzero(current)
        first = 3 * current[live] - 2
        found = list(zip(table[live, first].tolist(), table[live, first + 1].tolist(), strict=True))
        for slot in np.flatnonzero((table[:, _STATE] != _FREE) & (table[:, _OWNER] != 0)):
            if _is_alive(int(table[slot, _OWNER])):
                other = 2 if current[slot] == _FIRST else 1
                found.append((int(table[slot, 3 * other - 2]), int(table[slot, 3 * other - 1])))
        return found

    def _find(self, name: str) -> tuple[int, np.ndarray]:
        slot = self._known.get(name)
        if slot is not None:
            record = self._record(slot)
            if record[_STATE] & 3 and _name_of(record) == name:
                return slot, record
        table = self._table()
        slot = self._slot_of(name, table)
        if slot is None or not table[slot, _STATE] & 3:
            raise InputError("is not there", place=self._where(name), remedy="write it first")
        return slot, table[slot]

    def _slot_of(self, name: str, table: np.ndarray) -> int | None:
        slot = self._known.get(name)
        if slot is not None and table[slot, _STATE] and _name_of(table[slot]) == name:
            return slot
        lengths = np.flatnonzero((table[:, _STATE] != _FREE) & (table[:, _NAME_BYTES] == len(name.encode())))
        for slot in lengths:
            if _name_of(table[slot]) == name:
                self._known[name] = int(slot)
                return int(slot)
        return None

    def _table(self) -> np.ndarray:
        table = np.empty((self._slots, _RECORD // 8), np.uint64)
        self._verbs.read_into(self._node, _RECORD, table.data.cast("B"))
        return table

    def _record(self, slot: int) -> np.ndarray:
        record = np.empty(_RECORD // 8, np.uint64)
        self._verbs.read_into(self._node, _RECORD * (1 + slot), record.data.cast("B"))
        return record

    def _put(self, slot: int, word: int, what: int | list[int] | np.ndarray) -> None:
        words = np.atleast_1d(np.asarray(what, np.uint64))
        self._verbs.write_from(self._node, _RECORD * (1 + slot) + 8 * word, words.data.cast("B"))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        identity = _identity()
        with self._mine:
            holder = 0
            while True:
                seen = self._verbs.compare_and_swap(self._node, _LOCK, holder, identity)
                if seen == holder:
                    break
                # Whoever died with it has left a table that is right at every word: see the order of writes above.
                holder = seen if seen and not _is_alive(seen) else 0
                if not holder:
                    time.sleep(_PAUSE_SECONDS)
            try:
                yield
            finally:
                self._verbs.compare_and_swap(self._node, _LOCK, identity, 0)

    def _where(self, name: str) -> str:
        return f"{name} in memory node {self._node}"


def _place(record: np.ndarray) -> tuple[int, int, int]:
    """(offset, bytes, checksum) of the current content."""
    first = 3 * int(record[_STATE] & 3) - 2
    return int(record[first]), int(record[first + 1]), int(record[first + 2])


def _name_of(record: np.ndarray) -> str:
    return record.view(np.uint8)[_NAME : _NAME + int(record[_NAME_BYTES])].tobytes().decode(errors="replace")


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _checksum(data: memoryview) -> int:
    return crc32c(np.frombuffer(data, np.uint8))


def _started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0: it is gone, or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def _identity() -> int:
    """This process, in one word: pid and start, so that another one with its pid is told apart."""
    return os.getpid() << 32 | _started(os.getpid()) & 0xFFFFFFFF


def _is_alive(identity: int) -> bool:
    # 0 is nobody: what a kill has left reserved, and without an owner yet.
    return identity != 0 and _started(identity >> 32) & 0xFFFFFFFF == identity & 0xFFFFFFFF
