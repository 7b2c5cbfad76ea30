"""Was there one register? Linearizability of a history of reads and writes of one key.

The search of Wing and Gong (1993) with the memory of Lowe ("Testing for linearizability", 2017): take the calls one by
one in an order in which none comes before one that had returned before it began; never go on from the same set of
calls with the same value twice. Calls that never returned, because their client died, may have taken effect at any
moment after they began, or never. Linearizability is local (Herlihy and Wing 1990): keys are checked one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from headway.errors import InputError
from headway.value import Value

__all__ = ["Operation", "Violation", "check", "is_linearizable"]


class Operation(Value):
    """A call: what it did to which key, when it began and when it returned (infinite: it never did).

    `value`: what was written, or what the read returned; None stands for "no value yet".
    """

    client: str
    kind: str
    key: int
    value: bytes | None
    begin: float
    end: float = math.inf


class Violation(Value):
    """A key whose history no register could have; `operations` in the order of their beginning."""

    key: int
    operations: tuple[Operation, ...]

    def describe(self) -> str:
        """The history, a line for each call, for a person to read."""
        lines = [f"key {self.key} has no linearization:"]
        for call in self.operations:
            shown = "none" if call.value is None else call.value[:24].hex(" ", 8)
            lines.append(f"  {call.begin * 1e6:10.3f} to {call.end * 1e6:10.3f} us  {call.client} {call.kind} {shown}")
        return "\n".join(lines)


def check(history: Iterable[Operation], initial: bytes | None = None) -> Violation | None:
    """The first key (the smallest) that is not linearizable, each beginning with `initial`; None: all are."""
    by_key: dict[int, list[Operation]] = {}
    for call in history:
        by_key.setdefault(call.key, []).append(call)
    for key in sorted(by_key):
        if not is_linearizable(by_key[key], initial):
            return Violation(key=key, operations=tuple(sorted(by_key[key], key=lambda call: call.begin)))
    return None


def is_linearizable(calls: Sequence[Operation], initial: bytes | None = None) -> bool:
    """Whether these calls to one key could be those of one register that begins with `initial`.

    Raises InputError for a call that is neither a read nor a write, or that ends before it begins.
    """
    for call in calls:
        if call.kind not in ("read", "write") or call.end < call.begin:
            raise InputError(f"not a read or write that ends after it begins: {call}", place="history")
    # A read that never returned says nothing.
    kept = [call for call in calls if call.kind == "write" or call.end < math.inf]
    kept.sort(key=lambda call: call.begin)
    begins = [call.begin for call in kept]
    ends = [call.end for call in kept]
    # Values by number, so that a state is two numbers.
    numbers: dict[bytes | None, int] = {initial: 0}
    values = [numbers.setdefault(call.value, len(numbers)) for call in kept]
    reads = [call.kind == "read" for call in kept]
    must = 0  # those that returned, and so did happen
    for i, end in enumerate(ends):
        must |= (end < math.inf) << i
    seen: set[tuple[int, int]] = set()
    stack: list[tuple[int, int]] = [(0, 0)]
    while stack:
        done, value = stack.pop()
        candidates = _next(done, begins, ends)
        # A read of what is there now changes nothing: taken at once, it never stands in the way of anything.
        while (easy := [i for i in candidates if reads[i] and values[i] == value]) != []:
            for i in easy:
                done |= 1 << i
            candidates = _next(done, begins, ends)
        if done & must == must:
            return True
        if (done, value) in seen:
            continue
        seen.add((done, value))
        stack.extend((done | 1 << i, values[i]) for i in reversed(candidates) if not reads[i])
    return False


def _next(done: int, begins: list[float], ends: list[float]) -> list[int]:
    """The calls that may come next: not done, and begun before all others that are not done had returned."""
    found: list[Any] = []
    first_end = math.inf
    # In the order of their beginning: whatever begins after the earliest end is out, and all that follow it.
    for i in range(_lowest_zero(done), len(begins)):
        if begins[i] > first_end:
            break
        if not done >> i & 1:
            found.append(i)
            first_end = min(first_end, ends[i])
    return [i for i in found if begins[i] <= first_end]


def _lowest_zero(bits: int) -> int:
    return (~bits & (bits + 1)).bit_length() - 1
