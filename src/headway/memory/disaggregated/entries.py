"""How a value lies in a memory node: a header word with length and checksum, an identity word, then the value.

The checksum (CRC-32C) covers identity and value, so a copy that is torn, or belongs to something else, is noticed by
whoever reads it. A header of zero says that nothing was ever written.
"""

from __future__ import annotations

import struct

import numpy as np

from headway.errors import InputError
from headway.memory.checksum import crc32c
from headway.memory.remote import WORD_BYTES

__all__ = ["HEADER_BYTES", "entry_bytes", "pack", "unpack"]

HEADER_BYTES = 2 * WORD_BYTES
_PRESENT = 1 << 63
_WORDS = struct.Struct("<QQ")


def entry_bytes(value_bytes: int) -> int:
    """The bytes of an entry for values of up to `value_bytes`, in whole words."""
    return HEADER_BYTES + -(-value_bytes // WORD_BYTES) * WORD_BYTES


def pack(identity: int, value: bytes | None, value_bytes: int) -> bytes:
    """The entry of `value`, filled up to `entry_bytes(value_bytes)`; None: there is none yet.

    Raises InputError for a value that is longer.
    """
    if value is None:
        return _WORDS.pack(0, identity).ljust(entry_bytes(value_bytes), b"\0")
    if len(value) > value_bytes:
        raise InputError(
            f"a value of {len(value)} bytes where {value_bytes} were agreed on",
            place=f"entry {identity}",
            remedy="make the store for longer values",
        )
    header = _PRESENT | len(value) << 32 | _checksum(identity, value)
    return (_WORDS.pack(header, identity) + value).ljust(entry_bytes(value_bytes), b"\0")


def unpack(entry: bytes, *, checks: bool = True) -> tuple[bool, int, bytes | None]:
    """(is whole, identity, value); the value is None where nothing was ever written. `checks`: the checksum, too."""
    header, identity = _WORDS.unpack_from(entry)
    if not header & _PRESENT:
        return True, identity, None
    length = header >> 32 & 0x7FFFFFFF
    value = entry[HEADER_BYTES : HEADER_BYTES + length]
    is_whole = not checks or (len(value) == length and _checksum(identity, value) == header & 0xFFFFFFFF)
    return is_whole, identity, value


def _checksum(identity: int, value: bytes) -> int:
    return crc32c(np.frombuffer(identity.to_bytes(WORD_BYTES, "little") + value, np.uint8))
