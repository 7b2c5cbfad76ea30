"""What the clients and the metadata server of Clover agree on: where buffers are, what pointers and entries say.

A **pointer** is one word: which buffer, and which incarnation of it (its version, of `version_bits` bits, which grows
each time the buffer is recycled and begins again at 0 after the last). The buffer of number 0 is "none".

An **entry** fills a buffer: the link to the next version of the key, then header, identity (key and version) and value
as `entries` lays them out. The link of the newest entry is "none" *with the version of the buffer itself*, so that a
compare-and-swap that expects it fails when the buffer has been recycled in between.
"""

from __future__ import annotations

import msgspec

from headway.errors import InputError
from headway.memory.disaggregated.entries import entry_bytes, pack, unpack
from headway.memory.remote import WORD_BYTES
from headway.value import Value

__all__ = ["CloverLayout", "Entry", "pointer_parts"]

_LINE = 64
_NUMBER_BITS = 40
_NUMBER = 2**_NUMBER_BITS - 1
_KEY_SHIFT = 24  # of the identity; the version is below


class Entry(msgspec.Struct, frozen=True):
    """What was read from a buffer. `is_whole`: the checksum is right; `link`: the pointer to the next version."""

    link: int
    is_whole: bool
    key: int
    version: int
    value: bytes | None


class CloverLayout(Value):
    """Keys 0 to `keys` - 1 and `buffers` buffers, on `nodes` nodes, each buffer on `replicas` of them.

    `recycle_seconds`: at least so long lies between the moment when a buffer leaves the chain of its key and its next
    use. `lease_seconds`: a client that the metadata server has not heard of for so long may lose the buffers that it
    was given. `guard_seconds`: an upper bound of what a verb or call may take, and of the distance of two clocks.
    """

    keys: int
    value_bytes: int
    buffers: int
    nodes: int = 1
    replicas: int = 1
    version_bits: int = 16
    recycle_seconds: float = 1e-3
    lease_seconds: float = 1e-2
    guard_seconds: float = 2e-4

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= self.nodes:
            raise InputError(
                f"{self.replicas} replicas on {self.nodes} nodes",
                place="Clover",
                remedy="give 1 to the number of nodes",
            )
        if self.buffers <= self.keys:
            raise InputError(
                f"{self.buffers} buffers for {self.keys} keys", place="Clover", remedy="give more buffers than keys"
            )
        if not 1 <= self.version_bits <= _KEY_SHIFT:
            raise InputError(f"{self.version_bits} bits of version", place="Clover", remedy="give 1 to 24")

    @property
    def buffer_bytes(self) -> int:
        """The bytes of a buffer."""
        return -(-(WORD_BYTES + entry_bytes(self.value_bytes)) // _LINE) * _LINE

    @property
    def entry_bytes(self) -> int:
        """The bytes of an entry, with its link."""
        return WORD_BYTES + entry_bytes(self.value_bytes)

    @property
    def node_bytes(self) -> int:
        """The bytes that each node must have: shortcuts, and a share of the buffers for each replica."""
        return self._shortcut_bytes + self.replicas * self._share_bytes

    @property
    def versions(self) -> int:
        """How many versions there are."""
        return 2**self.version_bits

    @property
    def cursor_seconds(self) -> float:
        """How long after it was known to be the newest a pointer tells an entry from all that its buffer holds later.

        The version of a buffer comes round after `versions` uses. Only the first may follow at once.
        """
        return (self.versions - 1) * self.recycle_seconds - self.guard_seconds

    @property
    def _shortcut_bytes(self) -> int:
        return -(-(-(-self.keys // self.nodes) * WORD_BYTES) // _LINE) * _LINE

    @property
    def _share_bytes(self) -> int:
        return -(-self.buffers // self.nodes) * self.buffer_bytes

    def shortcut(self, key: int) -> tuple[int, int]:
        """(node, offset) of the word that points to an entry near the newest of `key`."""
        return key % self.nodes, key // self.nodes * WORD_BYTES

    def place(self, pointer: int, replica: int = 0) -> tuple[int, int]:
        """(node, offset) of the entry that `pointer` points to. Replica 0 decides, the others follow it."""
        buffer = (pointer & _NUMBER) - 1
        offset = self._shortcut_bytes + replica * self._share_bytes + buffer // self.nodes * self.buffer_bytes
        return (buffer + replica) % self.nodes, offset

    def is_pointer(self, word: int) -> bool:
        """Whether the word points to a buffer that exists."""
        return 1 <= word & _NUMBER <= self.buffers

    def pointer(self, buffer: int, version: int) -> int:
        """The pointer to incarnation `version` of `buffer`."""
        return version << _NUMBER_BITS | (buffer + 1)

    def no_link(self, pointer: int) -> int:
        """The link of the entry at `pointer` while it is the newest."""
        return pointer & ~_NUMBER

    def pack(self, pointer: int, key: int, value: bytes | None) -> bytes:
        """The entry that a client writes into a fresh buffer."""
        identity = key << _KEY_SHIFT | pointer >> _NUMBER_BITS
        return self.no_link(pointer).to_bytes(WORD_BYTES, "little") + pack(identity, value, self.value_bytes)

    def unpack(self, data: bytes, *, checks_crc: bool = True) -> Entry:
        """What `data`, read from a buffer, says."""
        whole, identity, value = unpack(data[WORD_BYTES:], checks=checks_crc)
        return Entry(
            link=int.from_bytes(data[:WORD_BYTES], "little"),
            is_whole=whole,
            key=identity >> _KEY_SHIFT,
            version=identity & 2**_KEY_SHIFT - 1,
            value=value,
        )


def pointer_parts(pointer: int) -> tuple[int, int]:
    """(buffer, version) of a pointer; the buffer is -1 for "none"."""
    return (pointer & _NUMBER) - 1, pointer >> _NUMBER_BITS
