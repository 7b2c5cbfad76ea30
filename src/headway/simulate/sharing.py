"""Max-min fair sharing of links among flows, compiled, and brought up to date only where something changed.

**Progressive filling** (Bertsekas and Gallager, Data Networks, 2nd edition, section 6.5.2): all flows grow alike until
a link is full; the flows on it stay as they are, and the others grow on. What a flow gets for each unit of its weight
is its *level*; the level at which a link was full is the link's. A link that never fills has the level infinity.

**Paths, not flows.** Flows on one path have one level, so they are filled as one. `service` counts what each unit of
weight on a path has been given, and a flow is done when the service has grown by its bytes over its weight: when the
level changes, nothing must be written for each flow. The flows of a path stand in a pairing heap by that threshold.

**Only what is affected.** Filling with and without a change goes the same way up to the level at which the first
changed link fills (before or after the change): flows below that keep what they have. From there on a change spreads
from link to link in the order of their levels (the bottleneck structure of Ros-Giralt et al., On the Bottleneck
Structure of Congestion-Controlled Networks, SIGMETRICS 2020). So `refill` fills the paths that certainly change while
all others keep their share, and gathers more on the way. A link that fills, and a full link on which somebody stops at
another level than before, is *opened*: its paths from the present level on are filled with the rest.

Everything here is a function of `Shares` (shares.py), arrays that know links, paths and flows by number. The rest of
the room gives them names. Units: bytes, seconds; levels in bytes per second for each unit of weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from headway.compiled import compiled as compile_and_keep
from headway.simulate.shares import ACTIVE, CHANGED, DIRTY, GATHERED, HEAP, SEEN, STAMP, TO_OPEN, TOUCHED, Shares

__all__ = [
    "TOGETHER",
    "add_and_refill",
    "add_flow",
    "cancel_flow",
    "change_capacity",
    "compiled",
    "complete",
    "earliest",
    "refill",
]

# What finishes within this part of the time that has passed finishes together: the rounding of sums of a million terms.
TOGETHER = 1e-13
# A level that differs by less from the one before is the one before, so that rounding does not spread.
_SAME = 1e-13


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled by numba on its first call, and kept on disk for the next time.

    References to arrays are not counted: nothing in this room's kernels owns or allocates memory, and to count the
    references to all arrays of the state at each call took four fifths of the time.
    """
    return compile_and_keep(**_OPTIONS)(function)


def _inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_and_keep(**_OPTIONS, inline="always")(function)


_OPTIONS: dict[str, Any] = {"_nrt": False}


@compiled
def change_capacity(s: Shares, link: int, bytes_per_second: float) -> None:
    """From the next `refill` on, the link carries so many bytes per second."""
    s.links[link].nominal = bytes_per_second
    for position in range(s.counters[CHANGED]):
        if s.links[position].changed == link:
            return
    s.links[s.counters[CHANGED]].changed = link
    s.counters[CHANGED] += 1


@_inlined
def _touch(s: Shares, path: int) -> None:
    if not s.queues[path].is_touched:
        s.queues[path].is_touched = 1
        s.queues[s.counters[TOUCHED]].touched = path
        s.counters[TOUCHED] += 1


@compiled
def _merge(s: Shares, one: int, other: int) -> int:
    """Join two pairing heaps (Fredman, Sedgewick, Sleator, Tarjan 1986); equal thresholds by number of the flow."""
    if one < 0:
        return other
    if other < 0:
        return one
    ahead = s.flows[one].threshold - s.flows[other].threshold
    if ahead > 0.0 or (ahead == 0.0 and other < one):
        one, other = other, one
    first = s.flows[one].child
    s.flows[other].sibling = first
    if first >= 0:
        s.flows[first].previous = other
    s.flows[other].previous = one
    s.flows[one].child = other
    return one


@compiled
def _take_out(s: Shares, flow: int) -> None:
    """Remove a flow from the heap of its path."""
    path = s.flows[flow].path
    # Its children: pairs from left to right, kept as a list in reverse, then from right to left into one.
    pairs = -1
    each = s.flows[flow].child
    while each >= 0:
        other = s.flows[each].sibling
        s.flows[each].sibling = -1
        following = -1
        if other >= 0:
            following = s.flows[other].sibling
            s.flows[other].sibling = -1
        joined = _merge(s, each, other)
        s.flows[joined].sibling = pairs
        pairs = joined
        each = following
    rest = -1
    while pairs >= 0:
        following = s.flows[pairs].sibling
        s.flows[pairs].sibling = -1
        rest = _merge(s, rest, pairs)
        pairs = following
    s.flows[flow].child = -1
    if s.queues[path].root == flow:
        s.queues[path].root = rest
    else:
        before, after = s.flows[flow].previous, s.flows[flow].sibling
        if s.flows[before].child == flow:
            s.flows[before].child = after
        else:
            s.flows[before].sibling = after
        if after >= 0:
            s.flows[after].previous = before
        s.flows[flow].sibling = -1
        s.queues[path].root = _merge(s, s.queues[path].root, rest)
    s.paths[path].flows -= 1
    # Exactly nothing is left when nobody is: sums of weights round.
    s.paths[path].weight = s.paths[path].weight - s.flows[flow].weight if s.paths[path].flows else 0.0
    _touch(s, path)


@_inlined
def _serve(s: Shares, path: int, now: float) -> None:
    """Bring the service of a path up to date."""
    s.queues[path].service += s.paths[path].level * (now - s.queues[path].updated)
    s.queues[path].updated = now


@compiled
def add_flow(s: Shares, flow: int, path: int, size_bytes: float, weight: float, now: float) -> None:
    """A flow of `size_bytes` begins on a path; it counts from the next `refill` on."""
    _serve(s, path, now)
    s.flows[flow].threshold = s.queues[path].service + size_bytes / weight
    s.flows[flow].weight = weight
    s.flows[flow].path = path
    s.flows[flow].child = -1
    s.flows[flow].sibling = -1
    s.queues[path].root = _merge(s, s.queues[path].root, flow)
    s.paths[path].weight += weight
    s.paths[path].flows += 1
    _touch(s, path)


@compiled
def cancel_flow(s: Shares, flow: int, now: float) -> float:
    """End a flow before it is done; how many bytes it had left."""
    path = s.flows[flow].path
    _serve(s, path, now)
    left = max(0.0, s.flows[flow].threshold - s.queues[path].service) * s.flows[flow].weight
    _take_out(s, flow)
    return left


@compiled
def complete(s: Shares, now: float) -> int:
    """End the flows that are done at `now`; how many they are, at the front of `flows.done`."""
    done = 0
    close = now * TOGETHER
    for position in range(s.counters[ACTIVE]):
        if s.due[position] > now + close:
            continue
        path = s.queues[position].active
        # Exactly what the first flow was to get: no rounding is carried over to those that follow.
        s.queues[path].service = s.flows[s.queues[path].root].threshold
        s.queues[path].updated = now
        reached = s.queues[path].service + close * s.paths[path].level
        while s.queues[path].root >= 0 and s.flows[s.queues[path].root].threshold <= reached:
            flow = s.queues[path].root
            _take_out(s, flow)
            s.flows[done].done = flow
            done += 1
        s.due[position] = math.inf  # until the next refill
    return done


@compiled
def earliest(s: Shares) -> float:
    """When the next flow will be done, if nothing changes before; infinity if none. After `refill` only."""
    first = math.inf
    for position in range(s.counters[ACTIVE]):
        first = min(first, s.due[position])
    return first


@_inlined
def _schedule(s: Shares, path: int, now: float) -> None:
    """Find when the first flow of an active path will be done."""
    missing = s.flows[s.queues[path].root].threshold - s.queues[path].service
    if missing <= 0.0:
        s.due[s.queues[path].place] = now
    elif s.paths[path].level <= 0.0:
        s.due[s.queues[path].place] = math.inf
    else:
        s.due[s.queues[path].place] = max(now, s.queues[path].updated + missing / s.paths[path].level)


@compiled
def _enlist(s: Shares, path: int) -> None:
    for slot in range(s.paths[path].start, s.paths[path].stop):
        link = s.slots[slot].link
        place = s.links[link].first + s.links[link].size
        s.links[link].size += 1
        s.slots[slot].place = place
        s.members[place].path = path
        s.members[place].slot = slot
    s.queues[s.counters[ACTIVE]].active = path
    s.queues[path].place = s.counters[ACTIVE]
    s.counters[ACTIVE] += 1


@compiled
def _delist(s: Shares, path: int) -> None:
    for slot in range(s.paths[path].start, s.paths[path].stop):
        link = s.slots[slot].link
        s.links[link].size -= 1
        end = s.links[link].first + s.links[link].size
        place = s.slots[slot].place
        s.members[place].path = s.members[end].path
        s.members[place].slot = s.members[end].slot
        s.slots[s.members[place].slot].place = place
        s.links[link].load -= s.paths[path].known_weight * s.paths[path].level
    s.counters[ACTIVE] -= 1
    last = s.queues[s.counters[ACTIVE]].active
    s.queues[s.queues[path].place].active = last
    s.queues[last].place = s.queues[path].place
    s.due[s.queues[last].place] = s.due[s.counters[ACTIVE]]
    # The next flow on this path starts from nothing, so that thresholds keep their digits.
    s.paths[path].level = 0.0
    s.queues[path].service = 0.0
    s.paths[path].known_weight = 0.0
    s.paths[path].known_flows = 0


@_inlined
def _soil(s: Shares, link: int) -> None:
    if s.links[link].is_dirty != s.counters[STAMP]:
        s.links[link].is_dirty = s.counters[STAMP]
        s.links[s.counters[DIRTY]].dirty = link
        s.counters[DIRTY] += 1


@compiled
def _note_changes(s: Shares, now: float) -> None:
    """Bring the lists of links and paths up to date; find the dirty links, and gather the paths that have changed."""
    counters = s.counters
    changed = 0
    for position in range(counters[TOUCHED]):
        path = s.queues[position].touched
        s.queues[path].is_touched = 0
        flows, known = s.paths[path].flows, s.paths[path].known_flows
        if flows == known and s.paths[path].weight == s.paths[path].known_weight:
            # One went and one came: nobody else is concerned.
            if flows:
                _schedule(s, path, now)
            continue
        for slot in range(s.paths[path].start, s.paths[path].stop):
            s.links[s.slots[slot].link].flows += flows - known
            _soil(s, s.slots[slot].link)
        if flows == 0:
            _delist(s, path)
            continue
        if known == 0:
            _enlist(s, path)
        s.queues[changed].touched = path  # the front of the list has been read
        changed += 1
    counters[TOUCHED] = 0
    for position in range(counters[CHANGED]):
        _soil(s, s.links[position].changed)
    counters[CHANGED] = 0
    for position in range(counters[DIRTY]):
        link = s.links[position].dirty
        lost = s.congestion[1] * max(0.0, s.links[link].flows - s.congestion[0])
        s.links[link].capacity = s.links[link].nominal * (max(s.congestion[2], 1.0 - lost) if lost > 0.0 else 1.0)
    # Only now are loads and capacities what they are to start from.
    for position in range(changed):
        _gather(s, s.queues[position].touched)


@_inlined
def _see(s: Shares, link: int) -> None:
    """Start to count what is left on a link."""
    if s.links[link].is_seen != s.counters[STAMP]:
        s.links[link].is_seen = s.counters[STAMP]
        s.links[link].left = s.links[link].capacity - s.links[link].load
        s.links[link].growing = 0.0
        s.links[link].count = 0
        s.links[link].filled = math.inf
        s.links[link].opened = math.inf
        s.links[link].seat = -1
        s.links[s.counters[SEEN]].seen = link
        s.counters[SEEN] += 1


@_inlined
def _gather(s: Shares, path: int) -> None:
    """A path gives back what it has and grows with the others."""
    s.paths[path].in_gathered = s.counters[STAMP]
    s.paths[path].is_frozen = 0
    s.queues[s.counters[GATHERED]].gathered = path
    s.counters[GATHERED] += 1
    weight = s.paths[path].weight
    before = s.paths[path].known_weight * s.paths[path].level
    for slot in range(s.paths[path].start, s.paths[path].stop):
        link = s.slots[slot].link
        _see(s, link)
        s.links[link].left += before
        s.links[link].growing += weight
        s.links[link].count += 1
        _seat(s, link)


@compiled
def _open(s: Shares, link: int, level: float) -> None:
    """Gather the paths on a link that were filled to `level` or more, and add up anew what is left of it."""
    stamp = s.counters[STAMP]
    _see(s, link)
    s.links[link].opened = level
    level *= 1 - 1e-9  # levels are rounded; a path too many does no harm
    for place in range(s.links[link].first, s.links[link].first + s.links[link].size):
        path = s.members[place].path
        if s.paths[path].level >= level and s.paths[path].in_gathered != stamp:
            _gather(s, path)
    left = s.links[link].capacity
    for place in range(s.links[link].first, s.links[link].first + s.links[link].size):
        path = s.members[place].path
        if s.paths[path].in_gathered != stamp:
            left -= s.paths[path].weight * s.paths[path].level
        elif s.paths[path].is_frozen:
            left -= s.paths[path].weight * s.paths[path].next_level
    s.links[link].left = left
    if s.links[link].count:
        _seat(s, link)


@_inlined
def _seat(s: Shares, link: int) -> None:
    """Put a link into the heap, or move it up there. Its key may be less than its level, never more."""
    key = max(0.0, s.links[link].left / s.links[link].growing)
    at = s.links[link].seat
    if at < 0:
        at = s.counters[HEAP]
        s.counters[HEAP] += 1
    elif key >= s.links[at].key:
        return
    while at > 0:
        parent = (at - 1) // 2
        if s.links[parent].key <= key:
            break
        s.links[at].key = s.links[parent].key
        s.links[at].heap = s.links[parent].heap
        s.links[s.links[at].heap].seat = at
        at = parent
    s.links[at].key = key
    s.links[at].heap = link
    s.links[link].seat = at


@_inlined
def _sift(s: Shares, key: float, link: int) -> None:
    """Put a link at the top of the heap, and then down to where it belongs."""
    at, size = 0, s.counters[HEAP]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and s.links[child + 1].key < s.links[child].key:
            child += 1
        if s.links[child].key >= key:
            break
        s.links[at].key = s.links[child].key
        s.links[at].heap = s.links[child].heap
        s.links[s.links[at].heap].seat = at
        at = child
    s.links[at].key = key
    s.links[at].heap = link
    s.links[link].seat = at


@compiled
def _fills_at_least_at(s: Shares, link: int) -> float:
    """A level below which the link does not fill if every path that was filled before keeps what it has."""
    level = 0.0
    for _ in range(4):  # each round comes closer, and any is safe
        given, growing = 0.0, 0.0
        for place in range(s.links[link].first, s.links[link].first + s.links[link].size):
            path = s.members[place].path
            if s.paths[path].known_flows and s.paths[path].level < level:
                given += s.paths[path].weight * s.paths[path].level
            else:
                growing += s.paths[path].weight
        if growing <= 0.0:
            return math.inf
        better = (s.links[link].capacity - given) / growing
        if better <= level * (1 + 1e-9):
            break
        level = better
    return max(0.0, level)


@_inlined
def _freeze(s: Shares, link: int, level: float) -> None:
    """The link is full: what grows on it has reached its level."""
    stamp = s.counters[STAMP]
    s.links[link].filled = level
    for place in range(s.links[link].first, s.links[link].first + s.links[link].size):
        path = s.members[place].path
        if s.paths[path].in_gathered != stamp or s.paths[path].is_frozen:
            continue
        before = s.paths[path].level
        is_known = s.paths[path].weight == s.paths[path].known_weight
        mine = level
        if is_known and abs(level - before) <= _SAME * before:
            mine = before
        is_less = is_known and mine < before
        s.paths[path].is_frozen = 1
        s.paths[path].next_level = mine
        weight = s.paths[path].weight
        for slot in range(s.paths[path].start, s.paths[path].stop):
            at = s.slots[slot].link
            s.links[at].left -= weight * mine
            s.links[at].growing -= weight
            s.links[at].count -= 1
            if is_less and s.links[at].level < math.inf and s.links[at].opened > level:
                # What it leaves there is for those whom that link holds back.
                s.links[at].opened = level
                s.links[s.counters[TO_OPEN]].to_open = at
                s.counters[TO_OPEN] += 1


@compiled
def refill(s: Shares, now: float) -> int:
    """Take into account all that was changed at `now`; how many paths were filled anew.

    To be called once when everything has changed that changes at an instant, before the clock moves.
    """
    counters = s.counters
    if counters[TOUCHED] == 0 and counters[CHANGED] == 0:
        return 0
    counters[STAMP] += 1
    counters[DIRTY] = counters[SEEN] = counters[TO_OPEN] = counters[GATHERED] = counters[HEAP] = 0
    _note_changes(s, now)
    for position in range(counters[DIRTY]):
        link = s.links[position].dirty
        # A link that was not full concerns nobody, until it fills.
        if s.links[link].level < math.inf or s.links[link].load > s.links[link].capacity:
            _open(s, link, min(s.links[link].level, _fills_at_least_at(s, link)))
    reached = 0.0
    while counters[HEAP]:
        link = s.links[0].heap
        level = reached
        if s.links[link].count:
            level = max(0.0, s.links[link].left / s.links[link].growing)
            if level > s.links[0].key:
                # Flows that stopped elsewhere have left it room since: look again when the others have come so far.
                _sift(s, level, link)
                continue
            # Whatever was filled to less than the level that has been reached keeps it: only above may paths be
            # gathered. What is left here may be negative as long as those above still count with what they had.
            level = max(level, reached)
            if s.links[link].opened > level:
                _open(s, link, level)
                continue
        # Out of the heap before it is filled: links that are opened then may come to the top, and this one come again.
        s.links[link].seat = -1
        counters[HEAP] -= 1
        if counters[HEAP]:
            _sift(s, s.links[counters[HEAP]].key, s.links[counters[HEAP]].heap)
        if s.links[link].count:
            reached = level
            _freeze(s, link, level)
            while counters[TO_OPEN]:
                counters[TO_OPEN] -= 1
                _open(s, s.links[counters[TO_OPEN]].to_open, level)
    for position in range(counters[SEEN]):
        link = s.links[position].seen
        if s.links[link].opened < math.inf:
            s.links[link].level = s.links[link].filled
            s.links[link].load = s.links[link].capacity - s.links[link].left
        elif s.links[link].level == math.inf:
            s.links[link].load = s.links[link].capacity - s.links[link].left
    for position in range(counters[GATHERED]):
        path = s.queues[position].gathered
        _serve(s, path, now)
        s.paths[path].level = s.paths[path].next_level
        s.paths[path].known_weight = s.paths[path].weight
        s.paths[path].known_flows = s.paths[path].flows
        _schedule(s, path, now)
    return counters[GATHERED]


@compiled
def add_and_refill(
    s: Shares, flows: np.ndarray, paths: np.ndarray, sizes_bytes: np.ndarray, weights: np.ndarray, now: float
) -> float:
    """Many `add_flow`, one `refill`, and when the next flow will be done."""
    for position in range(len(flows)):
        add_flow(s, flows[position], paths[position], sizes_bytes[position], weights[position], now)
    refill(s, now)
    return earliest(s)
