"""pDPM-Central: a coordinator between the clients and the memory nodes.

Tsai, Shan and Zhang, ATC 2020: the coordinator has the mapping table (key → where its value is) and a lock for each
entry of it; all reads and writes go through it. Either is a call to the coordinator and one access of its to a memory
node: two round trips, of which the client sees one. Values are never overwritten: a write goes to a free buffer, then
the table is changed, then the old buffer is free; readers hold the lock (shared) while they read.

Whoever asks for a write may die: the coordinator finishes what it has begun. It is itself the single point of failure.
"""

from __future__ import annotations

from typing import Any

from headway.errors import InputError
from headway.memory.disaggregated.entries import entry_bytes, pack, unpack
from headway.memory.remote import Call, Logic, Pause, Read, Write
from headway.value import Value

__all__ = ["Central", "CentralLayout", "Coordinator"]

_LINE = 64


class CentralLayout(Value):
    """What the coordinator has of the nodes: `buffers` buffers, round robin on `nodes` nodes, from `offset` on."""

    keys: int
    value_bytes: int
    buffers: int
    nodes: int = 1
    offset: int = 0

    @property
    def buffer_bytes(self) -> int:
        """The bytes of a buffer."""
        return -(-entry_bytes(self.value_bytes) // _LINE) * _LINE

    @property
    def node_bytes(self) -> int:
        """The bytes that each node must have."""
        return self.offset + -(-self.buffers // self.nodes) * self.buffer_bytes

    def place(self, buffer: int) -> tuple[int, int]:
        """(node, offset) of a buffer."""
        return buffer % self.nodes, self.offset + buffer // self.nodes * self.buffer_bytes


class _Entry:
    """A line of the mapping table, with its lock: shared by readers, a writer alone."""

    __slots__ = ("buffer", "is_written", "readers", "writers_waiting")

    def __init__(self) -> None:
        self.buffer = -1
        self.readers = 0
        self.is_written = False
        self.writers_waiting = 0


class Coordinator:
    """The server's side. `poll_seconds`: how often a request that waits for a lock looks again."""

    def __init__(self, layout: CentralLayout, *, poll_seconds: float = 2e-7) -> None:
        self.layout = layout
        self._poll = poll_seconds
        self._table = [_Entry() for _ in range(layout.keys)]
        self._free = list(range(layout.buffers))[::-1]
        self._size = entry_bytes(layout.value_bytes)

    def handle(self, client: str, request: list[Any]) -> Logic[Any]:
        """Answer ["read", key] with its value or None, and ["write", key, value] with None when it is done."""
        kind, key = request[0], request[1]
        entry = self._table[key]
        if kind == "read":
            while entry.is_written or entry.writers_waiting:
                yield Pause(self._poll)
            if entry.buffer < 0:
                return None
            entry.readers += 1
            data = yield Read(*self.layout.place(entry.buffer), self._size)
            entry.readers -= 1
            return unpack(data)[2]
        if kind == "write":
            return (yield from self._write(key, entry, request[2]))
        raise InputError(f"a request {kind!r}", place="coordinator", remedy="ask to read or to write")

    def _write(self, key: int, entry: _Entry, value: bytes) -> Logic[None]:
        packed = pack(key, value, self.layout.value_bytes)
        entry.writers_waiting += 1
        while entry.is_written or entry.readers:
            yield Pause(self._poll)
        entry.writers_waiting -= 1
        entry.is_written = True
        if not self._free:
            entry.is_written = False
            raise InputError("no buffer is free", place="coordinator", remedy="give it more buffers than keys")
        buffer = self._free.pop()
        yield Write(*self.layout.place(buffer), packed)
        if entry.buffer >= 0:
            self._free.append(entry.buffer)
        entry.buffer = buffer
        entry.is_written = False


class Central:
    """A client of the store: it only calls the coordinator, `server`."""

    def __init__(self, server: str = "coordinator") -> None:
        self._server = server

    def read(self, key: int) -> Logic[bytes | None]:
        """The value of `key`, None if it has none. One call, in which the coordinator makes one access."""
        return (yield Call(self._server, ("read", key)))

    def write(self, key: int, value: bytes) -> Logic[None]:
        """Make `value` the value of `key`. One call, in which the coordinator makes one access."""
        yield Call(self._server, ("write", key, value))
