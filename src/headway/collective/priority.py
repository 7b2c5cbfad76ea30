"""Priority scheduling of a gradient exchange: what the next forward pass needs first goes first.

Backward produces the last layer's gradient first, but the next forward pass needs the first layer's parameters first.
ByteScheduler (Peng et al., SOSP 2019, section 4) therefore cuts tensors into parts, so that a large one can be
overtaken between two parts, always starts the waiting part of the highest priority, and allows a limited number of
bytes in flight, the credit. A small credit lets an urgent tensor overtake at once; a large one keeps the network busy
while one part's start overlaps another's transfer.

A `PriorityScheduler` is a state machine without a clock or a network: `ready` puts a tensor in, `next` says which parts
to start now, `finished` gives their credit back. The same calls give the same answers, on every rank.
"""

from __future__ import annotations

import heapq
import math

import msgspec

from headway.errors import FieldError

__all__ = ["CREDIT_BYTES", "PARTITION_BYTES", "PriorityScheduler", "SubTensor", "partition"]

PARTITION_BYTES = 4 * 2**20
"""How large a part may be, unless said otherwise."""

CREDIT_BYTES = 4 * PARTITION_BYTES
"""How many bytes may be in flight, unless said otherwise."""


class SubTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part number `part` of `parts` of a tensor: `size_bytes` of it from `offset_bytes` on."""

    tensor: str
    priority: int
    part: int
    parts: int
    offset_bytes: int
    size_bytes: int


def partition(
    tensor: str,
    size_bytes: int,
    partition_bytes: float = PARTITION_BYTES,
    *,
    priority: int = 0,
    element_bytes: int = 1,
) -> tuple[SubTensor, ...]:
    """A tensor cut into parts of `partition_bytes`, rounded down to whole elements (one at least); the last is shorter.

    An empty tensor is one empty part. Raises FieldError for sizes that cannot be.
    """
    if element_bytes < 1 or size_bytes < 0 or size_bytes % element_bytes:
        raise FieldError(
            f"{size_bytes} bytes in elements of {element_bytes}", place=f"tensor {tensor!r}", remedy="give whole ones"
        )
    if not partition_bytes > 0:
        raise FieldError(
            f"parts of {partition_bytes} bytes", place="partition_bytes", remedy="above 0; infinite: tensors stay whole"
        )
    if partition_bytes >= size_bytes:
        each = max(size_bytes, 1)
    else:
        each = max(math.floor(partition_bytes) // element_bytes, 1) * element_bytes
    starts = range(0, max(size_bytes, 1), each)
    return tuple(
        SubTensor(
            tensor=tensor,
            priority=priority,
            part=number,
            parts=len(starts),
            offset_bytes=start,
            size_bytes=min(each, size_bytes - start),
        )
        for number, start in enumerate(starts)
    )


class PriorityScheduler:
    """Says which part of which tensor to start next, with at most `credit_bytes` in flight.

    A lower `priority` number goes first, as the first layer is number 0; among equals the tensor that got ready first,
    and of a tensor the first part. The part whose turn it is waits for its credit and lets nobody overtake it; one that
    is larger than the whole credit starts when nothing else is in flight.
    """

    def __init__(self, partition_bytes: float = PARTITION_BYTES, credit_bytes: float = CREDIT_BYTES) -> None:
        """Raises FieldError unless both are above 0; infinite means whole tensors, and no limit."""
        for name, value in (("partition_bytes", partition_bytes), ("credit_bytes", credit_bytes)):
            if not value > 0:
                raise FieldError(f"{name} is {value}", place="priority scheduling", remedy="give a number above 0")
        self.partition_bytes = partition_bytes
        self.credit_bytes = credit_bytes
        self._waiting: list[tuple[int, int, int, SubTensor]] = []  # a heap: priority, arrival, part
        self._in_flight: set[SubTensor] = set()
        self._in_flight_bytes = 0
        self._unfinished: dict[str, int] = {}  # tensor → parts that are not finished
        self._arrivals = 0

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of the parts that were started and are not finished."""
        return self._in_flight_bytes

    @property
    def is_idle(self) -> bool:
        """Whether every tensor that got ready is finished."""
        return not self._unfinished

    def ready(self, tensor: str, size_bytes: int, priority: int, *, element_bytes: int = 1) -> tuple[SubTensor, ...]:
        """A tensor can be exchanged from now on; its parts. Raises FieldError if it is still being exchanged."""
        if tensor in self._unfinished:
            raise FieldError(
                "got ready again before it was finished", place=f"tensor {tensor!r}", remedy="wait until it is"
            )
        parts = partition(tensor, size_bytes, self.partition_bytes, priority=priority, element_bytes=element_bytes)
        self._unfinished[tensor] = len(parts)
        for part in parts:
            heapq.heappush(self._waiting, (priority, self._arrivals, part.part, part))
        self._arrivals += 1
        return parts

    def next(self) -> tuple[SubTensor, ...]:
        """The parts to start now, in this order: the most urgent ones, as far as the credit reaches."""
        started = []
        while self._waiting:
            part = self._waiting[0][-1]
            if self._in_flight and self._in_flight_bytes + part.size_bytes > self.credit_bytes:
                break
            heapq.heappop(self._waiting)
            self._in_flight.add(part)
            self._in_flight_bytes += part.size_bytes
            started.append(part)
        return tuple(started)

    def finished(self, part: SubTensor) -> bool:
        """A part has been exchanged; whether that completes its tensor. Raises FieldError if it was not in flight."""
        if part not in self._in_flight:
            raise FieldError(
                f"part {part.part} finished without being in flight", place=f"tensor {part.tensor!r}", remedy="start it"
            )
        self._in_flight.remove(part)
        self._in_flight_bytes -= part.size_bytes
        self._unfinished[part.tensor] -= 1
        if self._unfinished[part.tensor]:
            return False
        del self._unfinished[part.tensor]
        return True
