"""Clover: clients read and write by one-sided verbs; a metadata server works off their critical path.

Tsai, Shan and Zhang, ATC 2020. The versions of a key are a chain of entries, each in a buffer of its own, linked from
old to new; nothing is ever overwritten. A client remembers where it found the newest entry (its *cursor*), and the
metadata server keeps a word for each key that points near the newest (its *shortcut*).

A **read** reads the entry at the cursor, and in the same round trip the shortcut. If the entry has no link, it is the
newest: one round trip. Else the client chases the chain, from the link and from the shortcut at once. A **write** puts
an entry into a fresh buffer, then links it to the newest by compare-and-swap: two round trips, and some more when
others were faster. With replicas, all get the entry in the first round trip; the link is decided at the first, and
copied to the others in a third.

Buffers come from the server in batches, fetched in advance (`clover_metadata`). A cursor may point to a buffer that has
been recycled since: key, version and checksum tell. Versions come round, so a cursor is trusted for a limited time only
(`CloverLayout.cursor_seconds`): that is what the recycling delay is for.
"""

from __future__ import annotations

from collections import deque

import msgspec

from headway.errors import DoesNotFitError
from headway.memory.disaggregated.clover_layout import CloverLayout, Entry, pointer_parts
from headway.memory.remote import (
    WORD_BYTES,
    Background,
    Batch,
    Call,
    Clock,
    CompareAndSwap,
    Logic,
    Pause,
    Read,
    Write,
)  # fmt: skip

__all__ = ["Clover"]

_PATIENCE = 1000  # times that an empty server is asked again


class _Cursor(msgspec.Struct, frozen=True):
    """A pointer, and when its entry was known to be the newest, or out of the reach of recycling."""

    pointer: int
    seconds: float


class Clover:
    """A client of the store, known to the metadata server `server` by `name`.

    `batch`: buffers asked for at once. `retire_after`: writes until the server is told which keys they were.
    `looks_ahead`: a write reads the link at its cursor and the shortcut while it writes the entry, so that an old
    cursor costs no failed compare-and-swap; not in the paper. `checks_crc=False` and `checks_version=False` are for
    showing what these checks are for.
    """

    def __init__(
        self,
        layout: CloverLayout,
        name: str,
        *,
        server: str = "metadata",
        batch: int = 16,
        retire_after: int = 4,
        retry_seconds: float = 2e-5,
        looks_ahead: bool = True,
        checks_crc: bool = True,
        checks_version: bool = True,
    ) -> None:
        self.layout, self.name = layout, name
        self.hops = 0  # entries read beyond the first of each operation
        self._server, self._batch, self._retire_after = server, batch, retire_after
        self._retry, self._looks_ahead = retry_seconds, looks_ahead
        self._checks_crc, self._checks_version = checks_crc, checks_version
        self._cursors: dict[int, _Cursor] = {}
        self._fresh: deque[int] = deque()  # pointers to buffers that are this client's
        self._grants = 0  # how many leases have ended
        self._granted_until: float | None = None  # buffers must be linked before
        self._is_fetching = False
        self._written: list[int] = []

    def open(self) -> Logic[None]:
        """Read all shortcuts, in one round trip, as cursors to begin with. Optional."""
        now = yield Clock()
        keys = range(self.layout.keys)
        words = yield Batch(tuple(Read(*self.layout.shortcut(key), WORD_BYTES) for key in keys))
        for key, word in zip(keys, words, strict=True):
            self._cursors[key] = _Cursor(int.from_bytes(word, "little"), now)

    def read(self, key: int) -> Logic[bytes | None]:
        """The value of `key`, None if it has none. One round trip while the cursor is the newest."""
        _, entry = yield from self._newest(key, self._cursors.get(key))
        return entry.value

    def write(self, key: int, value: bytes) -> Logic[None]:
        """Make `value` the value of `key`. Two round trips while the cursor is the newest, three with replicas."""
        while not (yield from self._append(key, value)):
            pass  # the lease on the buffer ended before it was linked
        self._written.append(key)
        if len(self._written) >= self._retire_after:
            yield Background(self._retire())

    def _append(self, key: int, value: bytes) -> Logic[bool]:
        layout = self.layout
        fresh = yield from self._take()
        grants = self._grants
        data = layout.pack(fresh, key, value)
        writes = tuple(Write(*layout.place(fresh, replica), data) for replica in range(layout.replicas))
        cursor, is_newest = self._cursors.get(key), True
        if self._looks_ahead:
            cursor = yield from self._write_and_look(key, writes, cursor)
        else:
            yield writes[0] if len(writes) == 1 else Batch(writes)
        while True:
            now = yield Clock()
            if not is_newest or cursor is None or now - cursor.seconds >= layout.cursor_seconds:
                cursor, _ = yield from self._newest(key, cursor)
                is_newest = True
                now = yield Clock()
            self._give_up_if_late(now)
            if grants != self._grants:
                return False
            none = layout.no_link(cursor.pointer)
            seen = yield CompareAndSwap(*layout.place(cursor.pointer), none, fresh)
            if seen == none:
                break
            # Somebody was faster. What it linked comes next, if the buffer has not been recycled meanwhile.
            cursor = _Cursor(seen, cursor.seconds) if layout.is_pointer(seen) else None
            is_newest = False
        links = tuple(
            Write(*layout.place(cursor.pointer, replica), fresh.to_bytes(WORD_BYTES, "little"))
            for replica in range(1, layout.replicas)
        )
        if links:
            yield Batch(links)
        self._cursors[key] = _Cursor(fresh, now)
        return True

    def _write_and_look(self, key: int, writes: tuple[Write, ...], cursor: _Cursor | None) -> Logic[_Cursor | None]:
        """Write the entry, and in the same round trip see where it is best linked: what is most likely the newest."""
        layout = self.layout
        now = yield Clock()
        if cursor is not None and now - cursor.seconds >= layout.cursor_seconds:
            cursor = None
        look = Read(*layout.shortcut(key), WORD_BYTES)
        if cursor is None:
            *_, word = yield Batch((*writes, look))
            return _Cursor(int.from_bytes(word, "little"), now)
        *_, word, linked = yield Batch((*writes, look, Read(*layout.place(cursor.pointer), WORD_BYTES)))
        shortcut, link = int.from_bytes(word, "little"), int.from_bytes(linked, "little")
        if link == layout.no_link(cursor.pointer):
            return cursor
        if shortcut != cursor.pointer:
            return _Cursor(shortcut, now)
        # The shortcut is the cursor, so that is not recycled: its link is what it seems to be.
        return _Cursor(link, now) if layout.is_pointer(link) else None

    def _newest(self, key: int, cursor: _Cursor | None) -> Logic[tuple[_Cursor, Entry]]:
        """The newest entry of `key`, looked for from `cursor` on; the client's cursor is on it then."""
        layout = self.layout
        size = layout.entry_bytes
        look = Read(*layout.shortcut(key), WORD_BYTES)
        while True:
            begun = yield Clock()
            if cursor is not None and begun - cursor.seconds < layout.cursor_seconds:
                data, word = yield Batch((Read(*layout.place(cursor.pointer), size), look))
                pointer, since = cursor.pointer, cursor.seconds
                shortcut = int.from_bytes(word, "little")
            else:
                shortcut = pointer = int.from_bytes((yield look), "little")
                since = begun
                data = yield Read(*layout.place(pointer), size)
            posted = begun
            while True:
                entry = self._entry(data, pointer, key)
                if entry is not None and self._is_newest(entry, pointer):
                    self._cursors[key] = found = _Cursor(pointer, posted)
                    return found, entry
                now = yield Clock()
                if now - since >= layout.cursor_seconds:
                    break  # what was learnt at the beginning is too old to rely on
                self.hops += 1
                ahead = entry.link if entry is not None and layout.is_pointer(entry.link) else 0
                jump = shortcut if shortcut not in (0, pointer, ahead) else 0
                posted, shortcut = now, 0
                if ahead and jump:
                    data, other = yield Batch((Read(*layout.place(ahead), size), Read(*layout.place(jump), size)))
                    pointer = ahead
                    beyond = self._entry(other, jump, key)
                    # Which of the two is nearer to the newest? The one that is it, or the one that is still there.
                    if beyond is not None and (self._is_newest(beyond, jump) or self._entry(data, ahead, key) is None):
                        data, pointer, since = other, jump, begun
                elif ahead or jump:
                    pointer = ahead or jump
                    since = since if ahead else begun
                    data = yield Read(*layout.place(pointer), size)
                else:
                    break
            cursor = None
            self._cursors.pop(key, None)

    def _entry(self, data: bytes, pointer: int, key: int) -> Entry | None:
        """What `data` says, if it is an entry of `key` in the incarnation that `pointer` means; None: recycled."""
        entry = self.layout.unpack(data, checks_crc=self._checks_crc)
        is_it = entry.key == key and entry.version == pointer_parts(pointer)[1]
        if not entry.is_whole or (self._checks_version and not is_it):
            return None
        return entry

    def _is_newest(self, entry: Entry, pointer: int) -> bool:
        if not self._checks_version:
            return not self.layout.is_pointer(entry.link)
        return entry.link == self.layout.no_link(pointer)

    # Buffers, and what the server is told.

    def _take(self) -> Logic[int]:
        """A fresh buffer. Costs a round trip only when none is left, or the server may have given this client up."""
        for _ in range(_PATIENCE):
            self._give_up_if_late((yield Clock()))
            if self._fresh:
                if len(self._fresh) <= self._batch // 2 and not self._is_fetching:
                    self._is_fetching = True
                    yield Background(self._fetch())
                return self._fresh.popleft()
            yield from self._fetch()
            if not self._fresh:
                yield Pause(self._retry)
        raise DoesNotFitError(
            "no buffer has become free",
            place=f"client {self.name}",
            remedy="give the store more buffers, or a shorter recycling delay",
        )

    def _fetch(self) -> Logic[None]:
        posted = yield Clock()
        self._give_up_if_late(posted)
        grants = self._grants
        pointers = yield Call(self._server, ("allocate", self._lessee(), self._batch))
        self._is_fetching = False
        if grants == self._grants:
            self._fresh.extend(pointers)
            self._extend_lease(posted)

    def _retire(self) -> Logic[None]:
        posted = yield Clock()
        self._give_up_if_late(posted)
        grants = self._grants
        keys, self._written = self._written, []
        if keys:
            yield Call(self._server, ("retire", self._lessee(), keys))
            if grants == self._grants and self._granted_until is not None:
                self._extend_lease(posted)

    def _lessee(self) -> str:
        """The name that the server gives buffers to: another one after a lease has ended, and so it takes back all."""
        return f"{self.name}/{self._grants}"

    def _extend_lease(self, posted: float) -> None:
        until = posted + self.layout.lease_seconds - 2 * self.layout.guard_seconds
        self._granted_until = until if self._granted_until is None else max(self._granted_until, until)

    def _give_up_if_late(self, now: float) -> None:
        """Forget all buffers, also one that a write is about to link, if the server may have taken them back."""
        if self._granted_until is not None and now >= self._granted_until:
            self._granted_until = None
            self._fresh.clear()
            self._grants += 1
