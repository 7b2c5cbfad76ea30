"""The metadata server of Clover: space in batches, garbage collection, shortcuts; all of it off the critical path.

It never touches a value. For each key it knows the oldest entry that is still in use, its *head*, which is also where
the shortcut points. To **retire** a key's old versions it walks the chain from the head by reading links, writes the
new head to the shortcut, and puts what it passed on the queue of free buffers; there each waits for the recycling
delay, and gets the next version.

Clients tell it which keys they wrote; that is a hint. `sweep` walks all chains, so what a dead client wrote and did not
report is retired all the same; links that it did not copy to the replicas are copied; and buffers that it had been
given and never linked are free again when its lease has ended.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from headway.errors import InputError
from headway.memory.disaggregated.clover_layout import CloverLayout, pointer_parts
from headway.memory.remote import WORD_BYTES, Clock, Logic, Pause, Read, Write

__all__ = ["MetadataServer"]


class MetadataServer:
    """The server's side of the store. `recycle_seconds`: the delay that it really keeps, for showing what it is for."""

    def __init__(self, layout: CloverLayout, *, recycle_seconds: float | None = None) -> None:
        self.layout = layout
        self.retired = 0  # entries retired so far
        self._delay = layout.recycle_seconds if recycle_seconds is None else recycle_seconds
        self._heads = [layout.pointer(key, 0) for key in range(layout.keys)]
        self._versions = [0] * layout.buffers
        self._free: deque[tuple[float, int]] = deque((0.0, buffer) for buffer in range(layout.keys, layout.buffers))
        self._given: dict[str, set[int]] = {}  # client → buffers that nobody has seen linked
        self._heard: dict[str, float] = {}
        self._walking: dict[int, bool] = {}  # key → whether to walk it again

    @property
    def free_buffers(self) -> int:
        """How many buffers are free, or will be after the recycling delay."""
        return len(self._free)

    def load(self) -> Logic[None]:
        """Write an entry without a value for each key, in buffer `key`, and its shortcut. Once, before all else."""
        layout = self.layout
        for key, head in enumerate(self._heads):
            data = layout.pack(head, key, None)
            for replica in range(layout.replicas):
                yield Write(*layout.place(head, replica), data)
            yield Write(*layout.shortcut(key), head.to_bytes(WORD_BYTES, "little"))

    def handle(self, client: str, request: list[Any]) -> Logic[Any]:
        """Answer ["allocate", name, how many] with pointers, and ["retire", name, keys] with None."""
        kind, name, what = request
        now = yield Clock()
        self._heard[name] = max(self._heard.get(name, now), now)
        given = self._given.setdefault(name, set())
        if kind == "allocate":
            pointers = []
            while len(pointers) < what and self._free and self._free[0][0] <= now:
                _, buffer = self._free.popleft()
                given.add(buffer)
                pointers.append(self.layout.pointer(buffer, self._versions[buffer]))
            return pointers
        if kind == "retire":
            for key in dict.fromkeys(what):
                yield from self._walk(key)
            return None
        raise InputError(f"a request {kind!r}", place="metadata server", remedy="ask to allocate or to retire")

    def sweep(self) -> Logic[None]:
        """Walk all chains, then take back what clients held whose leases had ended before."""
        now = yield Clock()
        gone = [
            name
            for name, heard in self._heard.items()
            if now > heard + self.layout.lease_seconds + self.layout.guard_seconds
        ]
        for key in range(self.layout.keys):
            yield from self._walk(key)
        now = yield Clock()
        for name in gone:
            if now > self._heard[name] + self.layout.lease_seconds + self.layout.guard_seconds:
                self._recycle(sorted(self._given.pop(name)), now)
                del self._heard[name]

    def sweep_for_ever(self, every_seconds: float) -> Logic[None]:
        """Sweep, pause, and again."""
        while True:
            yield Pause(every_seconds)
            yield from self.sweep()

    def _walk(self, key: int) -> Logic[None]:
        """Bring the head of `key` to its newest entry, and retire what lies before it."""
        if key in self._walking:
            self._walking[key] = True
            return
        self._walking[key] = True
        while self._walking[key]:
            self._walking[key] = False
            yield from self._advance(key)
        del self._walking[key]

    def _advance(self, key: int) -> Logic[None]:
        layout = self.layout
        head, passed = self._heads[key], []
        while True:
            link = int.from_bytes((yield Read(*layout.place(head), WORD_BYTES)), "little")
            if not layout.is_pointer(link):
                break
            for replica in range(1, layout.replicas):  # its writer may have died before it did
                yield Write(*layout.place(head, replica), link.to_bytes(WORD_BYTES, "little"))
            passed.append(head)
            head = link
        if not passed:
            return
        # First the shortcut, then the recycling: so whoever reads the shortcut has the delay to follow it.
        yield Write(*layout.shortcut(key), head.to_bytes(WORD_BYTES, "little"))
        self._heads[key] = head
        linked = {pointer_parts(pointer)[0] for pointer in (*passed, head)}
        for given in self._given.values():
            given -= linked
        self.retired += len(passed)
        self._recycle([pointer_parts(pointer)[0] for pointer in passed], (yield Clock()))

    def _recycle(self, buffers: list[int], now: float) -> None:
        for buffer in buffers:
            self._versions[buffer] = (self._versions[buffer] + 1) % self.layout.versions
            self._free.append((now + self._delay, buffer))
