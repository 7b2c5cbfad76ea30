"""pDPM-Direct: clients alone, with a lock word and two copies for each key.

Tsai, Shan and Zhang, ATC 2020: nobody coordinates. All clients know where the slot of a key is::

    lock | committed copy | uncommitted copy            each copy with a checksum

A **read** is one read of the committed copy, again when it is torn. A **write** is four round trips when nobody else
wants the key: take the lock, write the uncommitted copy, write the committed copy, release the lock.

At every moment one of the copies is whole, and the lock is a lease (who holds it, until when). So when a client dies
while it holds a lock, the next writer, or a reader that keeps finding a torn copy, takes the lock after its end and
mends the committed copy from the other one.

Leases need clocks that agree up to `guard_seconds`, and verbs that take effect within that time: a client posts no
write when less than that is left of its lease.
"""

from __future__ import annotations

from headway.memory.disaggregated.entries import entry_bytes, pack, unpack
from headway.memory.remote import WORD_BYTES, Batch, Clock, CompareAndSwap, Logic, Pause, Read, Write
from headway.value import Value

__all__ = ["Direct", "DirectLayout"]

_LINE = 64
_EXPIRY_BITS = 48  # microseconds: nine years
_EXPIRY = 2**_EXPIRY_BITS - 1
_TORN_READS = 4  # in a row, before a reader looks whether the writer is dead


class DirectLayout(Value):
    """Where the slots are: keys 0 to `keys` - 1 lie round robin on `nodes` nodes, from `offset` on."""

    keys: int
    value_bytes: int
    nodes: int = 1
    offset: int = 0

    @property
    def slot_bytes(self) -> int:
        """The bytes of a slot: lock and both copies."""
        return -(-(WORD_BYTES + 2 * entry_bytes(self.value_bytes)) // _LINE) * _LINE

    @property
    def node_bytes(self) -> int:
        """The bytes that each node must have."""
        return self.offset + -(-self.keys // self.nodes) * self.slot_bytes

    def slot(self, key: int) -> tuple[int, int]:
        """(node, offset) of the lock of `key`."""
        return key % self.nodes, self.offset + key // self.nodes * self.slot_bytes


class Direct:
    """A client of the store; `number` (1 to 65535) tells it from all others. Nothing to load: empty keys read None.

    `lease_seconds`: how long a lock is held at most. `checks_crc=False` is for showing what the checksum is for.
    """

    def __init__(
        self,
        layout: DirectLayout,
        number: int,
        *,
        lease_seconds: float = 1e-3,
        guard_seconds: float = 2e-4,
        backoff_seconds: float = 2e-6,
        checks_crc: bool = True,
    ) -> None:
        self.layout, self.number = layout, number
        self._lease, self._guard, self._backoff = lease_seconds, guard_seconds, backoff_seconds
        self._checks = checks_crc
        self._size = entry_bytes(layout.value_bytes)

    def read(self, key: int) -> Logic[bytes | None]:
        """The value of `key`, None if it has none. One round trip, and one more each time the copy was torn."""
        node, lock = self.layout.slot(key)
        torn = 0
        while True:
            whole, _, value = unpack((yield Read(node, lock + WORD_BYTES, self._size)), checks=self._checks)
            if whole:
                return value
            torn += 1
            if torn % _TORN_READS == 0:
                yield from self._mend_if_abandoned(node, lock)

    def write(self, key: int, value: bytes) -> Logic[None]:
        """Make `value` the value of `key`. Four round trips, if nobody holds its lock."""
        node, lock = self.layout.slot(key)
        entry = pack(key, value, self.layout.value_bytes)
        committed = lock + WORD_BYTES
        while True:
            mine = yield from self._take(node, lock)
            # If the lease is about to end before the committed copy is begun, nothing has happened: begin again.
            if (yield from self._has_time(mine)):
                yield Write(node, committed + self._size, entry)
                if (yield from self._has_time(mine)):
                    yield Write(node, committed, entry)
                    yield CompareAndSwap(node, lock, mine, 0)
                    return
            yield CompareAndSwap(node, lock, mine, 0)

    def _take(self, node: int, lock: int) -> Logic[int]:
        """Take the lock; mend what a dead holder left. Returns the word that stands for this holding."""
        expected = 0
        while True:
            now = yield Clock()
            mine = self.number << _EXPIRY_BITS | (int((now + self._lease) * 1e6) & _EXPIRY)
            seen = yield CompareAndSwap(node, lock, expected, mine)
            if seen == expected:
                if expected:
                    yield from self._mend(node, lock, mine)
                return mine
            expected = 0
            if seen and (yield from self._has_ended(seen)):
                expected = seen
            elif seen:
                yield Pause(self._backoff)

    def _has_ended(self, word: int) -> Logic[bool]:
        now = yield Clock()
        return now * 1e6 > (word & _EXPIRY) + 1  # the expiry was rounded down

    def _has_time(self, mine: int) -> Logic[bool]:
        now = yield Clock()
        return (now + self._guard) * 1e6 < mine & _EXPIRY

    def _mend_if_abandoned(self, node: int, lock: int) -> Logic[None]:
        word = int.from_bytes((yield Read(node, lock, WORD_BYTES)), "little")
        if word and (yield from self._has_ended(word)):
            mine = yield from self._take(node, lock)
            yield CompareAndSwap(node, lock, mine, 0)
        else:
            yield Pause(self._backoff)

    def _mend(self, node: int, lock: int, mine: int) -> Logic[None]:
        """The last holder died. If it was in the middle of the committed copy, the uncommitted one is whole."""
        committed = lock + WORD_BYTES
        first, second = yield Batch((Read(node, committed, self._size), Read(node, committed + self._size, self._size)))
        if unpack(first)[0] or not unpack(second)[0]:
            return
        if (yield from self._has_time(mine)):
            yield Write(node, committed, second)
