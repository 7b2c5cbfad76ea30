"""The state of the sharing of links among flows: arrays that know links, paths and flows by number.

`sharing.py` says what it means and brings it up to date. Units: bytes, seconds; levels in bytes per second for each
unit of weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "ACTIVE",
    "CHANGED",
    "DIRTY",
    "GATHERED",
    "HEAP",
    "MEMBERS",
    "PATHS",
    "SEEN",
    "SLOTS",
    "STAMP",
    "TOUCHED",
    "TO_OPEN",
    "Records",
    "Shares",
    "add_path",
    "grown",
    "new_shares",
]

# Positions in Shares.counters.
STAMP, ACTIVE, TOUCHED, CHANGED, DIRTY, SEEN, TO_OPEN, GATHERED, HEAP, PATHS, SLOTS, MEMBERS = range(12)

_LINK = np.dtype(
    [
        # While refilling
        ("left", "f8"),  # bytes per second that nobody has yet
        ("growing", "f8"),  # weight of the gathered paths on it that still grow
        ("count", "i8"),  # how many these are
        ("filled", "f8"),  # the level found
        ("seat", "i8"),  # in the heap; -1: not there
        ("is_seen", "i8"),  # stamp: a gathered path is on it
        ("opened", "f8"),  # its paths from this level on are gathered; infinity: not opened
        ("is_dirty", "i8"),  # stamp: other flows, or another capacity, than the last time
        # Always
        ("nominal", "f8"),  # bytes per second before congestion
        ("capacity", "f8"),  # what is left of it
        ("load", "f8"),  # bytes per second that were given out
        ("level", "f8"),  # infinity: not full
        ("flows", "i8"),
        ("first", "i8"),  # its active paths: members[first : first + size]
        ("size", "i8"),
        ("known", "i8"),  # slots of all paths that are known
        ("room", "i8"),  # for so many members
        # Lists of links; what stands in row n has nothing to do with link n
        ("changed", "i8"),  # capacity was changed by hand
        ("dirty", "i8"),
        ("seen", "i8"),
        ("to_open", "i8"),
        ("heap", "i8"),
        ("key", "f8"),  # of the heap
    ]
)
# 64 bytes, a line of the cache: filling visits these at random.
_PATH = np.dtype(
    [
        ("start", "i4"),  # its slots: start to stop
        ("stop", "i4"),
        ("flows", "i4"),
        ("known_flows", "i4"),  # when it was last filled
        ("weight", "f8"),  # of all its flows
        ("known_weight", "f8"),
        ("level", "f8"),
        ("next_level", "f8"),
        ("in_gathered", "i8"),  # stamp
        ("is_frozen", "i8"),  # whether it has stopped growing
    ]
)
_QUEUE = np.dtype(
    [
        ("service", "f8"),  # bytes for each unit of weight, up to `updated`
        ("updated", "f8"),
        ("root", "i8"),  # of the heap of flows; -1: none
        ("place", "i8"),  # in the list of active paths
        ("is_touched", "i8"),
        # Lists of paths
        ("active", "i8"),  # with flows
        ("touched", "i8"),  # flows have come or gone
        ("gathered", "i8"),
    ]
)
_SLOT = np.dtype([("link", "i4"), ("place", "i4")])  # where it stands among the link's members
_MEMBER = np.dtype([("path", "i4"), ("slot", "i4")])
_FLOW = np.dtype(
    [
        ("threshold", "f8"),
        ("weight", "f8"),
        ("path", "i8"),
        ("child", "i8"),
        ("sibling", "i8"),
        ("previous", "i8"),  # the sibling before, or the parent of a first child
        ("done", "i8"),  # list: what `complete` has found
    ]
)


# An array of records. Their fields are attributes in compiled code only, which type checkers do not know.
Records = Any


class Shares(NamedTuple):
    """The state, as arrays of records, one for each link, path (twice), slot (one link of one path) and flow."""

    counters: np.ndarray
    congestion: np.ndarray  # flows that a link carries without loss, share lost with each more, least share left
    links: Records
    paths: Records  # how they share
    queues: Records  # the flows of each path
    due: np.ndarray  # when the first flow of each active path will be done, in the order of that list
    slots: Records
    members: Records  # for each link, one behind the other, the slots of its active paths
    flows: Records


def new_shares(
    bytes_per_second: np.ndarray,
    *,
    paths: int,
    slots: int,
    flows: int,
    congestion: tuple[float, float, float] = (1.0, 0.0, 0.0),
) -> Shares:
    """Empty state for links of these capacities, with room for so many paths, slots in all paths, and flows."""
    links = _blank(_LINK, len(bytes_per_second))
    links["nominal"] = links["capacity"] = bytes_per_second
    return Shares(
        counters=np.zeros(12, dtype=np.int64),
        congestion=np.array(congestion, dtype=np.float64),
        links=links,
        paths=_blank(_PATH, paths),
        queues=_blank(_QUEUE, paths),
        due=np.full(max(1, paths), math.inf),
        slots=_blank(_SLOT, slots),
        members=_blank(_MEMBER, 4 * slots),
        flows=_blank(_FLOW, flows),
    )


def _blank(kind: np.dtype, length: int) -> np.ndarray:
    rows = np.zeros(max(1, length), dtype=kind)
    if kind is _LINK:
        rows["level"] = math.inf
    if kind is _QUEUE:
        rows["root"] = -1
    return rows


def grown(shares: Shares, *, paths: int, slots: int, flows: int) -> Shares:
    """The same state with room for at least so many paths, slots and flows."""
    return shares._replace(
        paths=_longer(shares.paths, _PATH, paths),
        queues=_longer(shares.queues, _QUEUE, paths),
        due=_longer(shares.due, shares.due.dtype, paths),
        slots=_longer(shares.slots, _SLOT, slots),
        # A link's members move to twice the room when there are too many: less than four times the slots in all.
        members=_longer(shares.members, _MEMBER, 4 * slots),
        flows=_longer(shares.flows, _FLOW, flows),
    )


def _longer(rows: np.ndarray, kind: np.dtype, length: int) -> np.ndarray:
    if length <= len(rows):
        return rows
    longer = _blank(kind, max(length, 2 * len(rows)))
    longer[: len(rows)] = rows
    return longer


def add_path(shares: Shares, links: Sequence[int]) -> int:
    """Make a path over these links known, and say its number. There must be room (see `grown`)."""
    path, slot = int(shares.counters[PATHS]), int(shares.counters[SLOTS])
    shares.paths["start"][path] = slot
    shares.paths["stop"][path] = slot + len(links)
    shares.slots["link"][slot : slot + len(links)] = links
    shares.counters[PATHS] += 1
    shares.counters[SLOTS] += len(links)
    for link in links:
        row = shares.links[link]
        row["known"] += 1
        if row["known"] > row["room"]:
            room = max(1, 2 * int(row["room"]))
            first, start = int(row["first"]), int(shares.counters[MEMBERS])
            shares.members[start : start + row["size"]] = shares.members[first : first + row["size"]]
            shares.slots["place"][shares.members["slot"][start : start + row["size"]]] += start - first
            row["first"], row["room"] = start, room
            shares.counters[MEMBERS] += room
    return path
