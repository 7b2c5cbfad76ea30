"""Tensor fusion: many small tensors exchanged as few large ones, and the cache that makes agreeing on them cheap.

A collective has a cost for starting, whatever its size. Horovod (Sergeev and Del Balso 2018, section "Tensor Fusion")
therefore waits for a cycle, takes the tensors that are ready on every rank by then, and exchanges those that fit
together in one buffer of at most a threshold. `fuse` says which ones: the same way as `FuseResponses` in Horovod's
`controller.cc`. `ResponseCache` is what makes it cheap that all ranks agree on "ready": a tensor that was agreed on
before has a bit, and a cycle in which nothing is new is agreed on by one bitwise AND over the ranks.

Nothing here has a clock or talks to anybody. The same calls give the same answers, on every rank.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable

import msgspec

from headway.errors import FieldError

__all__ = [
    "CACHE_CAPACITY",
    "CYCLE_SECONDS",
    "FUSABLE",
    "THRESHOLD_BYTES",
    "Agreement",
    "Batch",
    "Request",
    "ResponseCache",
    "fuse",
]

THRESHOLD_BYTES = 128 * 2**20
"""Horovod's default for the size of a fused buffer (HOROVOD_FUSION_THRESHOLD)."""

CYCLE_SECONDS = 1e-3
"""Horovod's default for how long tensors are collected before they are fused (HOROVOD_CYCLE_TIME)."""

CACHE_CAPACITY = 1024
"""Horovod's default for how many tensors the response cache knows (HOROVOD_CACHE_CAPACITY)."""

FUSABLE = frozenset({"all_reduce", "adasum"})
"""The operations whose tensors may lie one behind the other in a buffer."""


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A rank wants `name` exchanged. Everything but the name must be the same on every rank that asks for it.

    `detail` is for whatever else must agree and keeps tensors apart: reduction, root, factors, process set.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    element_bytes: int = 4
    device: str = "cpu"
    operation: str = "all_reduce"
    detail: str = ""

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes

    @property
    def kind(self) -> tuple[str, str, str, str]:
        """Tensors of one kind may share a buffer."""
        return (self.operation, self.dtype, self.device, self.detail)

    @property
    def signature(self) -> tuple[object, ...]:
        """What must be the same on every rank, and from step to step for a cached answer to hold."""
        return (*self.kind, self.shape, self.element_bytes)


class Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tensors that are exchanged as one, in the order in which they lie in the buffer."""

    requests: tuple[Request, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(request.name for request in self.requests)

    @property
    def size_bytes(self) -> int:
        return sum(request.size_bytes for request in self.requests)

    @property
    def offsets_bytes(self) -> tuple[int, ...]:
        """Where each tensor begins in the buffer."""
        offsets, at = [], 0
        for request in self.requests:
            offsets.append(at)
            at += request.size_bytes
        return tuple(offsets)


def fuse(
    requests: Iterable[Request],
    threshold_bytes: float = THRESHOLD_BYTES,
    *,
    look_ahead: bool = True,
    fusable: Collection[str] = FUSABLE,
) -> tuple[Batch, ...]:
    """`requests`, in the order in which they got ready, as batches to be exchanged one after the other.

    The first tensor opens a batch; the following ones join it while they are of its kind and the batch stays within
    the threshold. One that cannot join is skipped as long as the batch and all that was skipped would still fit into
    the threshold together; the first that would not ends the batch. (Mixed precision gives tensors of two kinds in
    turns; a gradient that is ready should not wait for one that is far behind it.) Skipped tensors come first again,
    in their order, for the next batch. Without `look_ahead` the first tensor that cannot join ends the batch.

    Every tensor is in exactly one batch; a batch is larger than the threshold only if it is a single tensor. With a
    threshold of 0 every tensor that has any bytes goes alone. Tensors of a kind keep their order across batches unless
    a smaller one overtakes a larger one that did not fit. Raises FieldError for a threshold that is negative and for
    a name that is asked for twice.
    """
    if not threshold_bytes >= 0:
        raise FieldError(
            f"a fusion threshold of {threshold_bytes} bytes", place="threshold_bytes", remedy="0 or more; 0: no fusion"
        )
    waiting = list(requests)
    names = set()
    for request in waiting:
        if request.name in names:
            raise FieldError(
                f"tensor {request.name!r} is asked for twice at once", place="requests", remedy="give each its own name"
            )
        names.add(request.name)
    batches = []
    waiting.reverse()  # the next one is last: cheap to take, and skipped ones are cheap to put back
    while waiting:
        first = waiting.pop()
        batch, fused_bytes = [first], first.size_bytes
        if first.operation in fusable:
            skipped, skipped_bytes = [], 0
            while waiting:
                other = waiting[-1]
                if other.kind == first.kind and fused_bytes + other.size_bytes <= threshold_bytes:
                    batch.append(waiting.pop())
                    fused_bytes += other.size_bytes
                    continue
                skipped_bytes += other.size_bytes
                if not look_ahead or fused_bytes + skipped_bytes > threshold_bytes:
                    break
                skipped.append(waiting.pop())
            waiting.extend(reversed(skipped))
        batches.append(Batch(requests=tuple(batch)))
    return tuple(batches)


class Agreement(msgspec.Struct, frozen=True):
    """What all ranks know after their vectors were combined.

    `hits`: positions that are ready on every rank, in order. `invalid`: positions that some rank wants to forget.
    `uncached`: some rank has a tensor that is not in the cache, so a full negotiation must follow. `stopping`: some
    rank wants to stop.
    """

    hits: tuple[int, ...]
    invalid: tuple[int, ...]
    uncached: bool
    stopping: bool


class ResponseCache:
    """The tensors that all ranks have agreed on before, each with a bit position; the least recently used leaves first.

    A cycle of negotiation on each rank, all ranks calling the same `touch`, `put` and `forget` in the same order:

    1. for each waiting tensor `position(request)`: known as it is (a hit), or None;
    2. `vector(...)` packs hits, invalid positions and two flags in one integer; all ranks combine theirs by AND;
    3. `read(vector)` says what was agreed: `forget` the invalid ones, `touch` the hits and exchange them;
    4. if some rank has something that is not cached, negotiate it in full, and `put` what was agreed on.

    A bit position stays the same while its tensor is in the cache. As everything that changes the cache is agreed on
    first, the positions mean the same tensors on every rank: Horovod's `response_cache.cc` keeps them equal likewise.
    """

    def __init__(self, capacity: int = CACHE_CAPACITY) -> None:
        """An empty cache. Raises FieldError for a negative capacity; with 0 nothing is ever kept."""
        if capacity < 0:
            raise FieldError(f"a cache of {capacity} tensors", place="capacity", remedy="0 or more; 0: no cache")
        self.capacity = capacity
        self._positions: OrderedDict[str, int] = OrderedDict()  # by name, least recently used first
        self._requests: dict[int, Request] = {}
        self._free = list(range(capacity))  # a heap: the lowest position first keeps the vectors short

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def position(self, request: Request) -> int | None:
        """The bit of a tensor that is known with this very signature; None if it must be negotiated."""
        position = self._positions.get(request.name)
        if position is None or self._requests[position].signature != request.signature:
            return None
        return position

    def stale(self, request: Request) -> int | None:
        """The bit of a tensor that is known by this name with another signature: to be reported as invalid."""
        position = self._positions.get(request.name)
        if position is None or self._requests[position].signature == request.signature:
            return None
        return position

    def request(self, position: int) -> Request:
        """What was agreed on at a position. Raises FieldError where there is nothing."""
        try:
            return self._requests[position]
        except KeyError:
            raise FieldError(f"no tensor has bit {position}", place="response cache") from None

    def put(self, request: Request) -> int:
        """Keep a tensor that all ranks agreed on, as the most recently used; its bit, or -1 if nothing is kept."""
        if self.capacity == 0:
            return -1
        known = self._positions.pop(request.name, None)
        if known is None:
            if not self._free:
                self._drop(next(iter(self._positions)))
            known = heapq.heappop(self._free)
        self._positions[request.name] = known
        self._requests[known] = request
        return known

    def touch(self, position: int) -> Request:
        """Say that a tensor was exchanged: it is now the most recently used. Raises FieldError where there is none."""
        request = self.request(position)
        self._positions.move_to_end(request.name)
        return request

    def forget(self, position: int) -> None:
        """Drop the tensor at a position. Raises FieldError where there is none."""
        self._drop(self.request(position).name)

    def _drop(self, name: str) -> None:
        position = self._positions.pop(name)
        del self._requests[position]
        heapq.heappush(self._free, position)

    def vector(
        self, hits: Iterable[int], *, invalid: Iterable[int] = (), uncached: bool = False, stopping: bool = False
    ) -> int:
        """This rank's integer for the AND over all ranks, of at most `bits` bits.

        AND keeps what holds everywhere. So from the lowest bit: "not stopping", "nothing uncached", "ready" for each
        position, and "not invalid" for each position.
        """
        ready = sum(1 << position for position in set(hits))
        lost = sum(1 << position for position in set(invalid))
        valid = self._all_positions & ~lost
        flags = int(not stopping) | int(not uncached) << 1
        return flags | ready << 2 | valid << 2 + self.capacity

    @property
    def bits(self) -> int:
        """Length of a vector."""
        return 2 + 2 * self.capacity

    @property
    def _all_positions(self) -> int:
        return (1 << self.capacity) - 1

    def read(self, vector: int) -> Agreement:
        """What the AND of all ranks' vectors says. Raises FieldError for an integer that no vectors give."""
        if not 0 <= vector < 1 << self.bits:
            raise FieldError(
                f"a vector of {vector.bit_length()} bits",
                place="response cache",
                remedy=f"give all ranks the same capacity: here a vector has {self.bits} bits",
            )
        ready = vector >> 2 & self._all_positions
        lost = ~(vector >> 2 + self.capacity) & self._all_positions
        return Agreement(
            hits=_positions(ready & ~lost), invalid=_positions(lost), uncached=not vector & 2, stopping=not vector & 1
        )


def _positions(bits: int) -> tuple[int, ...]:
    """Where `bits` has ones."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return tuple(found)
