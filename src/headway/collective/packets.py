"""The packets of in-network aggregation, and their form on the wire.

iSwitch (Li et al., ISCA 2019, table 2) has data packets and the control messages Join, Leave, Reset, SetH, FBcast,
Help, Halt and Ack; it marks them by values of the IP type-of-service field that are not published, so here a byte of
our own says what a packet is. All numbers are in network order::

    bytes  field      what it says
    2      magic      0x4857
    1      version    1
    1      kind       see `Kind`
    4      job        which training job
    4      epoch      the job's incarnation: Reset begins another, and what belongs to an earlier one is refused
    2      worker     who sends it, or whom the aggregator answers
    2      flags      bits 0 to 3 the operation of data (see `Operation`), 4 partial, 5 overflow
    8      segment    which part of the stream of vectors: counted through all rounds of an epoch
    8      round_end  data, result: one past the last segment of what belongs together; requests: see below
    4      count      data: 0; result: how many workers are in the sum; SetH: the threshold; Ack: see `Status`
    4      length     of the payload, in bytes
    8      checksum   over the header without itself, and the payload

The payload of data is an array in the byte order of the machines, little-endian; the overflow flag on it says that the
worker had to clip its values. A Join's payload is the worker's nonce (8 bytes), how many workers found the job
(4 bytes), and the job's token; a Leave's is the nonce. Reset, SetH, FBcast and Halt carry in round_end a number that
grows with each of a worker's requests, so that one that comes late or twice is not obeyed again; the Ack repeats it.

An Ack's payload is the kind that it answers (1 byte); to a Join it is followed by the number of founders (4 bytes), and
has the first segment to take part in as its segment and the aggregator's slots as its round_end. The round_end of an
Ack to Help or data has a bit for each of the first 64 workers that the segment waits for, or who are at odds with the
others.
"""

from __future__ import annotations

import enum
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from headway.compiled import compiled

__all__ = [
    "COUNT_AT",
    "EPOCH_AT",
    "FLAGS_AT",
    "HEADER_BYTES",
    "JOB_AT",
    "KIND_AT",
    "LARGEST_PAYLOAD_BYTES",
    "LENGTH_AT",
    "MAGIC_AT",
    "ROUND_END_AT",
    "SEGMENT_AT",
    "WORKER_AT",
    "Kind",
    "Operation",
    "Packet",
    "Status",
    "checksum",
    "decode",
    "encode",
    "encode_header",
    "is_intact",
    "payload_checksum",
    "read_field",
    "seal",
    "write_field",
]

_MAGIC = 0x4857
_VERSION = 1
_HEADER = struct.Struct("!HBBIIHHQQII")
_CHECKSUM = struct.Struct("!Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
# The largest payload of a UDP datagram over IPv4 is 65,507 bytes.
LARGEST_PAYLOAD_BYTES = (65_507 - HEADER_BYTES) // 8 * 8
_PARTIAL, _OVERFLOW, _OPERATION = 1 << 4, 1 << 5, 0xF
_MASK = (1 << 64) - 1


class Kind(enum.IntEnum):
    """What a packet is."""

    DATA = 0x01  # a worker's contribution to a segment
    RESULT = 0x02  # the sum of a segment
    JOIN = 0x10  # a worker enters the job
    LEAVE = 0x11  # a worker leaves it
    RESET = 0x12  # clear the aggregator's slots; another epoch begins
    SETH = 0x13  # set the aggregation threshold H: how many contributions make a sum
    FBCAST = 0x14  # send the sum of a segment as it is, though contributions are missing
    HELP = 0x15  # ask for the result of a segment that was lost
    HALT = 0x16  # suspend the job on all workers, until Reset
    ACK = 0x17  # how it went


class Operation(enum.IntEnum):
    """How contributions to a segment are put together, and of what type they are."""

    SUM_INT32 = 0  # as they come; exact, with a flag where a sum leaves the range
    SUM_FLOAT32 = 1  # in the order of the workers, once all are there
    MAX_UINT8 = 2  # the largest: how workers agree on block exponents


class Status(enum.IntEnum):
    """What an Ack says."""

    DONE = 0
    WAITING = 1  # Join: until the job is complete; Help: for other workers' contributions
    RESEND = 2  # Help: your own contribution is not there
    GONE = 3  # Help: the segment's slot has been used for a later one; FBcast: or its sum is out already
    REFUSED = 4  # Join: no room for another job, or another number of founders, or the worker has left
    EPOCH = 5  # what you sent belongs to an earlier epoch than this packet's
    UNKNOWN = 6  # Help: you are no member of the job
    MISMATCH = 7  # workers sent contributions of different types or lengths to the segment


class Packet(NamedTuple):
    """A packet, decoded; `payload` may look into the buffer that it was received in."""

    kind: Kind
    job: int
    epoch: int = 0
    worker: int = 0
    segment: int = 0
    round_end: int = 0
    count: int = 0
    operation: Operation = Operation.SUM_INT32
    partial: bool = False
    overflow: bool = False
    payload: bytes | memoryview = b""


# What packets are, by the number on the wire: a dictionary is several times faster than calling the enumeration.
_KINDS = {int(kind): kind for kind in Kind}
_OPERATIONS = {int(operation): operation for operation in Operation}


@compiled(nogil=True)
def _mix_words(words: np.ndarray) -> np.uint64:
    total = np.uint64(0)
    place = np.uint64(0x9E3779B97F4A7C15)
    for index in range(len(words)):
        word = words[index]
        # The place tells equal words apart. Products of halves: processors have them for many words at a time.
        keyed = word ^ place
        total += word + (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
        place += np.uint64(0xC2B2AE3D27D4EB4F)
    return total


def payload_checksum(payload: bytes | memoryview) -> int:
    """64 bits that change when bits or words of the payload do; not a defence against forgery."""
    view = memoryview(payload).cast("B") if len(payload) else b""
    whole = len(view) // 8 * 8
    total = len(view) * 0xD6E8FEB86659FD93
    if whole:
        total += int(_mix_words(np.frombuffer(view, dtype=np.uint64, count=whole // 8)))
    if len(view) > whole:
        total += int.from_bytes(bytes(view[whole:]), "little") * 0xC2B2AE3D27D4EB4F
    return total & _MASK


def _checksum(header: bytes, of_payload: int) -> int:
    return (zlib.crc32(header) * 0x9E3779B97F4A7C15 + of_payload) & _MASK


def encode_header(packet: Packet, of_payload: int | None = None) -> bytes:
    """The packet without its payload, as it goes on the wire before it; `of_payload` is its checksum, if known."""
    flags = int(packet.operation) | (_PARTIAL if packet.partial else 0) | (_OVERFLOW if packet.overflow else 0)
    header = _HEADER.pack(
        _MAGIC, _VERSION, packet.kind, packet.job, packet.epoch, packet.worker, flags,
        packet.segment, packet.round_end, packet.count, len(packet.payload),
    )  # fmt: skip
    if of_payload is None:
        of_payload = payload_checksum(packet.payload)
    return header + _CHECKSUM.pack(_checksum(header, of_payload))


def encode(packet: Packet) -> bytes:
    """The packet as it goes on the wire."""
    return encode_header(packet) + bytes(packet.payload)


def decode(data: bytes | memoryview) -> Packet | None:
    """The packet that a datagram holds; None if it is none of ours, is of another version, or was corrupted."""
    if len(data) < HEADER_BYTES:
        return None
    view = memoryview(data)
    header = bytes(view[: _HEADER.size])
    magic, version, kind, job, epoch, worker, flags, segment, round_end, count, length = _HEADER.unpack(header)
    if magic != _MAGIC or version != _VERSION or length != len(data) - HEADER_BYTES:
        return None
    payload = view[HEADER_BYTES:]
    if _CHECKSUM.unpack_from(data, _HEADER.size)[0] != _checksum(header, payload_checksum(payload)):
        return None
    what, operation = _KINDS.get(kind), _OPERATIONS.get(flags & _OPERATION)
    if what is None or operation is None:
        return None
    return Packet(
        what, job, epoch, worker, segment, round_end, count, operation,
        bool(flags & _PARTIAL), bool(flags & _OVERFLOW), payload,
    )  # fmt: skip


# For compiled code, a packet is an array of bytes (uint8). Where a field is, and how many bytes it has:
MAGIC_AT, KIND_AT, JOB_AT, EPOCH_AT, WORKER_AT, FLAGS_AT = (0, 3), (3, 1), (4, 4), (8, 4), (12, 2), (14, 2)
SEGMENT_AT, ROUND_END_AT, COUNT_AT, LENGTH_AT, _CHECKSUM_AT = (16, 8), (24, 8), (32, 4), (36, 4), (40, 8)
_BEGINNING = _MAGIC << 8 | _VERSION


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ np.where(table & np.uint32(1), np.uint32(0xEDB88320), np.uint32(0))
    return table


_CRC = _crc_table()


@compiled(nogil=True)
def read_field(data: np.ndarray, place: tuple[int, int]) -> Any:
    """A field of the header. One of 64 bits is negative if the first of them is set."""
    value = np.int64(0)
    for index in range(place[0], place[0] + place[1]):
        value = value << np.int64(8) | np.int64(data[index])
    return value


@compiled(nogil=True)
def write_field(data: np.ndarray, place: tuple[int, int], value: Any) -> None:
    """Set a field of the header; the checksum is right only after `seal`."""
    for index in range(place[1]):
        data[place[0] + index] = np.uint8((value >> np.int64(8 * (place[1] - 1 - index))) & 0xFF)


@compiled(nogil=True)
def checksum(payload: np.ndarray) -> np.uint64:
    """`payload_checksum` of an array of bytes."""
    whole = len(payload) // 8 * 8
    total = np.uint64(len(payload)) * np.uint64(0xD6E8FEB86659FD93) + _mix_words(payload[:whole].view(np.uint64))
    rest = np.uint64(0)
    for index in range(len(payload) - 1, whole - 1, -1):
        rest = rest << np.uint64(8) | np.uint64(payload[index])
    return total + rest * np.uint64(0xC2B2AE3D27D4EB4F)


@compiled(nogil=True)
def _sealed(header: np.ndarray, of_payload: np.uint64) -> np.uint64:
    crc = np.uint32(0xFFFFFFFF)
    for index in range(_CHECKSUM_AT[0]):
        crc = _CRC[(crc ^ np.uint32(header[index])) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
    return np.uint64(crc ^ np.uint32(0xFFFFFFFF)) * np.uint64(0x9E3779B97F4A7C15) + of_payload


@compiled(nogil=True)
def seal(header: np.ndarray, of_payload: np.uint64) -> None:
    """Write magic, version and checksum of a header whose other fields are set; `of_payload`: see `checksum`."""
    write_field(header, MAGIC_AT, _BEGINNING)
    write_field(header, _CHECKSUM_AT, np.int64(_sealed(header, of_payload)))


@compiled(nogil=True)
def is_intact(datagram: np.ndarray) -> bool:
    """Whether `decode` would find a packet in the bytes; but the kind and operation are looked at by the caller."""
    if len(datagram) < HEADER_BYTES or read_field(datagram, MAGIC_AT) != _BEGINNING:
        return False
    if read_field(datagram, LENGTH_AT) != len(datagram) - HEADER_BYTES:
        return False
    found = np.uint64(read_field(datagram, _CHECKSUM_AT))
    return found == _sealed(datagram, checksum(datagram[HEADER_BYTES:]))
