"""A collective played on a cluster's links: when each piece of each transfer leaves and arrives.

**What happens.** Every chunk is cut into `pieces` of one size. Piece k of a transfer is ready when piece k of all that
it waits for (`Transfer.after`) has arrived, and piece k - 1 of the same transfer has left. A path carries one piece at
a time, in the order in which they got ready, as a connection between two processes does. A piece under way is a flow:
it shares the links with the pieces on other paths (`simulate.sharing`), and when its last byte has left, the latency of
the path passes until it has arrived. Reductions and copies inside a device take no time. The collective's own start
(`Cluster.collective_latency_seconds`) is paid once, before all else.

For a ring among n ranks this gives the closed form 2 (n - 1) (latency + M / (n B)) with one piece, and with the slowest
of unequal links in place of B where the latency is 0 (Patarasuk and Yuan, JPDC 2009, section 3). Where links differ and
there is a latency, the slowest link is waited for and hides the others' latencies: it takes less than that.

With `in_order=False` all pieces that are ready flow at once. What is early then takes bandwidth from what is late: the
reductions of a packed all-reduce run ahead of its broadcasts, and the links stand idle at the end.

**What may go wrong.** Links change their bandwidth (`LinkChange`), and ranks die: what a dead rank was sending or
receiving stops, and so does whatever passes through its device. The collective then never ends; `Simulated.waiting`
says which rank waits for what, and why.

There is no chance in any of this, so there is no seed. All is compiled, because a program of thousands of transfers in
hundreds of pieces has a million of events; the state is in arrays, and the loop is `_play`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import numpy as np

from headway.collective.program import Program, bus_factor
from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.predict.collective import predict_program
from headway.simulate.network import Conditions, LinkChange, Links
from headway.simulate.shares import Records, Shares, add_path, new_shares
from headway.simulate.sharing import (
    TOGETHER,
    add_flow,
    cancel_flow,
    change_capacity,
    compiled,
    complete,
    earliest,
    refill,
)
from headway.timeline import Span, Timeline
from headway.value import Value

__all__ = ["LinkUse", "Simulated", "Waiting", "simulate"]

# With more pieces than this in all, the timeline has one span for each transfer instead of one for each piece.
_MOST_SPANS = 20_000

_TRANSFER = np.dtype(
    [
        ("arrived", "i8"),  # pieces
        ("started", "i8"),
        ("sent", "i8"),
        ("path", "i8"),
        ("first", "i8"),  # it waits for after[first : stop]
        ("stop", "i8"),
        ("first_follower", "i8"),  # followers[first_follower : stop_follower] wait for it
        ("stop_follower", "i8"),
        ("is_busy", "i8"),  # a piece is ready, and has not left
        ("next", "i8"),  # who is behind it in the queue of its path; -1: nobody
        ("is_flowing", "i8"),
        ("is_dead", "i8"),
        ("piece_bytes", "f8"),
        ("latency", "f8"),
        ("start", "f8"),  # of the first piece
        ("end", "f8"),  # when the last piece that was sent had left
    ]
)
_NEWS = np.dtype([("time", "f8"), ("number", "i8"), ("transfer", "i8")])  # negative transfer: may begin to flow
_LINE = np.dtype([("current", "i8"), ("head", "i8"), ("tail", "i8")])  # a path's queue of transfers; -1: nobody
_CHANGE = np.dtype([("time", "f8"), ("link", "i8"), ("bytes_per_second", "f8"), ("rank", "i8")])  # rank -1: no death

# Positions in the kernel's counters.
_SIZE, _NUMBER, _MISSING, _CHANGES, _EVENTS, _HAS_BEGUN = range(6)
# ... and in its clock.
_NOW, _LAST = range(2)


class LinkUse(Value):
    """What the link from `source` to `target` carried, and the share of the whole time that it took at full speed."""

    source: str
    target: str
    bytes: float
    busy_seconds: float
    utilisation: float


class Waiting(Value):
    """`rank` waits for `chunk` from rank `source` (the transfer at position `transfer`), of which so many pieces have
    arrived; `reason` says what holds it up."""

    rank: int
    source: int
    transfer: int
    chunk: int
    pieces_arrived: int
    reason: str


class Simulated:
    """What playing a program showed.

    `seconds`: until the last piece had arrived everywhere, the start included; where `is_finished` is false, until
    nothing moved any more. `bytes_per_second` is the vector's size over that ("algorithm bandwidth"),
    `bus_bytes_per_second` the same in the convention of nccl-tests; both are 0 if it never ends. `links` holds the
    links that carried something, `events` counts pieces that started, left or arrived.
    """

    def __init__(
        self,
        program: Program,
        *,
        size_bytes: float,
        pieces: int,
        seconds: float,
        start_seconds: float,
        is_finished: bool,
        events: int,
        links: tuple[LinkUse, ...],
        waiting: tuple[Waiting, ...],
        transfers: Records,
        spans: np.ndarray,
    ) -> None:
        self.program = program
        self.size_bytes = size_bytes
        self.pieces = pieces
        self.seconds = seconds
        self.is_finished = is_finished
        self.events = events
        self.links = links
        self.waiting = waiting
        self.bytes_per_second = size_bytes / seconds if is_finished and seconds else 0.0
        self.bus_bytes_per_second = self.bytes_per_second * bus_factor(program.collective, program.size)
        self._start_seconds = start_seconds
        self._transfers = transfers
        self._spans = spans  # (start, end) of each piece of each transfer; empty where these are too many

    @property
    def bottleneck(self) -> LinkUse | None:
        """The link that was busy longest."""
        return max(self.links, key=lambda link: link.busy_seconds, default=None)

    @cached_property
    def timeline(self) -> Timeline:
        """When each piece was leaving (each transfer, if there are more than 20,000 pieces).

        A lane is what one rank sends to another, `rank 0/to 3`; what overlaps there is on `rank 0/to 3 (2)`, and so on.
        """
        spans: list[tuple[float, float, int, int]] = []
        if len(self._spans):
            for position, pieces in enumerate(self._spans.tolist()):
                for piece, (start, end) in enumerate(pieces[: int(self._transfers["sent"][position])]):
                    spans.append((start, end, position, piece))
        else:
            for position, row in enumerate(self._transfers):
                if row["sent"]:
                    spans.append((float(row["start"]), float(row["end"]), position, -1))
        drawn = [self._span(*span) for span in spans]
        # Ranks in order, and each rank's lanes in the order of the other rank.
        drawn.sort(key=lambda each: each[0])
        timeline = Timeline(
            name=f"{self.program.name} {self.program.collective}", spans=tuple(span for _, span in drawn)
        )
        return timeline.disjoint()

    def _span(self, start: float, end: float, position: int, piece: int) -> tuple[tuple[int, int, float], Span]:
        """What is drawn for a piece (for the whole transfer, if that is -1), and where it comes in the order."""
        transfer = self.program.transfers[position]
        size = float(self._transfers["piece_bytes"][position])
        detail: dict[str, str | int | float] = {"transfer": position, "chunk": transfer.chunk}
        if piece < 0:
            sent = int(self._transfers["sent"][position])
            detail |= {"pieces": sent, "bytes": size * sent}
        else:
            detail |= {"piece": piece, "bytes": size}
        span = Span(
            name=f"{'add' if transfer.reduce else 'copy'} chunk {transfer.chunk}",
            lane=f"rank {transfer.source}/to {transfer.target}",
            start_seconds=self._start_seconds + start,
            duration_seconds=end - start,
            kind="communication",
            detail=detail,
        )
        return (transfer.source, transfer.target, start), span


def simulate(
    program: Program,
    cluster: Cluster,
    size_bytes: float,
    *,
    pieces: int | None = None,
    in_order: bool = True,
    conditions: Conditions | None = None,
    changes: Iterable[LinkChange] = (),
    deaths: Mapping[int, float] | None = None,
) -> Simulated:
    """Play `program` for a vector of `size_bytes` on an otherwise idle `cluster`, each chunk cut into `pieces`.

    Without `pieces`, as many as `predict.collective` finds best. `in_order`: a path carries one piece at a time, and
    not all that are ready. `deaths`: rank → when it dies; this, and the times of `changes`, count from the first
    transfers on, after the collective's own start. Raises ClusterError for a path that is not in the cluster,
    InputError for figures that cannot be, ProgramError for a program that contradicts itself.
    """
    program.validate()
    conditions = (conditions or Conditions()).validate()
    deaths = deaths or {}
    if not 0 <= size_bytes < math.inf:
        raise InputError(f"a vector of {size_bytes:g} bytes", place="size_bytes", remedy="give 0 or more")
    if pieces is None:
        pieces = predict_program(program, cluster, size_bytes).pieces
    if pieces < 1:
        raise InputError(f"{pieces} pieces", place="pieces", remedy="give 1 or more")
    links = Links(cluster, conditions)
    paths = [
        links.along(path, place=f"{cluster.name}: {program.name}: paths[{position}]")
        for position, path in enumerate(program.paths)
    ]
    transfers, after, followers = _tables(program, links, paths, size_bytes / pieces)
    happenings, victims = _happenings(program, links, changes, deaths)
    slots = sum(len(path) for path in paths)
    shares = new_shares(
        links.payload_per_second,
        paths=len(paths),
        slots=slots,
        flows=len(transfers),
        congestion=conditions.congestion,
    )
    for path in paths:
        add_path(shares, path)
    count = len(program.transfers)
    spans = np.zeros((count, pieces, 2) if count * pieces <= _MOST_SPANS else (0, 0, 2))
    lines = np.full(len(paths) if in_order else 0, -1, dtype=np.int64).repeat(3).view(_LINE)
    clock = np.zeros(2)
    counters = np.zeros(6, dtype=np.int64)
    counters[_MISSING] = count * pieces
    heap = np.zeros(4 * count + 64, dtype=_NEWS)
    while not _play(
        shares, transfers, lines, after, followers, happenings, *victims, heap, spans, clock, counters, pieces,
        conditions.message_seconds,
    ):  # fmt: skip
        # More in the air than there was room for; all that it knows is in these arrays, so it goes on.
        heap = np.concatenate([heap, np.zeros(len(heap), dtype=_NEWS)])
    is_finished = not counters[_MISSING]
    start = cluster.collective_latency_seconds if count else 0.0
    seconds = start + float(clock[_LAST])
    return Simulated(
        program,
        size_bytes=size_bytes,
        pieces=pieces,
        seconds=seconds,
        start_seconds=start,
        is_finished=is_finished,
        events=int(counters[_EVENTS]),
        links=_use(links, paths, transfers, seconds),
        waiting=() if is_finished else _waiting(program, links, paths, shares, transfers, pieces, deaths),
        transfers=transfers[:count],
        spans=spans,
    )


def _tables(
    program: Program, links: Links, paths: list[tuple[int, ...]], part_bytes: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transfers, what they wait for, and what waits for them, as arrays."""
    count = len(program.transfers)
    transfers = np.zeros(max(1, count), dtype=_TRANSFER)
    if not count:
        return transfers, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    waits = np.fromiter((len(transfer.after) for transfer in program.transfers), np.int64, count)
    after = np.fromiter((other for transfer in program.transfers for other in transfer.after), np.int64, waits.sum())
    stops = np.cumsum(waits)
    transfers["first"], transfers["stop"] = stops - waits, stops
    follows = np.bincount(after, minlength=count)
    ends = np.cumsum(follows)
    transfers["first_follower"], transfers["stop_follower"] = ends - follows, ends
    followers = np.repeat(np.arange(count), waits)[np.argsort(after, kind="stable")]
    transfers["path"] = [transfer.path for transfer in program.transfers]
    fractions = np.array([program.fraction(chunk) for chunk in range(len(program.chunks))])
    transfers["piece_bytes"] = fractions[[transfer.chunk for transfer in program.transfers]] * part_bytes
    transfers["latency"] = np.array([links.latency(path) for path in paths])[transfers["path"]]
    return transfers, after, followers


def _happenings(
    program: Program, links: Links, changes: Iterable[LinkChange], deaths: Mapping[int, float]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Changes and deaths in the order of time, and the transfers that each rank's death stops (starts, positions)."""
    rows: list[tuple[float, int, float, int]] = []
    for change in changes:
        link = links.find(change.source, change.target)
        rows.append((change.validate().seconds, link, float(links.payload_per_second[link]) * change.scale, -1))
    for rank, seconds in deaths.items():
        if not 0 <= rank < program.size:
            raise InputError(f"no rank {rank}", place="deaths", remedy=f"0 to {program.size - 1}")
        if not 0 <= seconds < math.inf:
            raise InputError(f"rank {rank} dies at {seconds:g} s", place="deaths", remedy="give a time of 0 or more")
        rows.append((seconds, 0, 0.0, rank))
    rows.sort(key=lambda row: row[0])
    starts, positions = [0], []
    for rank in range(program.size):
        if rank in deaths:
            through = {number for number, path in enumerate(program.paths) if program.devices[rank] in path}
            positions += [at for at, transfer in enumerate(program.transfers) if transfer.path in through]
        starts.append(len(positions))
    return np.array(rows, dtype=_CHANGE), (np.array(starts, dtype=np.int64), np.array(positions, dtype=np.int64))


@compiled
def _push(heap: Records, counters: np.ndarray, time: float, transfer: int) -> None:
    number = counters[_NUMBER]
    counters[_NUMBER] += 1
    at = counters[_SIZE]
    counters[_SIZE] += 1
    while at > 0:
        parent = (at - 1) // 2
        if heap[parent].time <= time:  # of equal times the one that was there first
            break
        heap[at].time, heap[at].number = heap[parent].time, heap[parent].number
        heap[at].transfer = heap[parent].transfer
        at = parent
    heap[at].time, heap[at].number, heap[at].transfer = time, number, transfer


@compiled
def _pop(heap: Records, counters: np.ndarray) -> int:
    top = heap[0].transfer
    counters[_SIZE] -= 1
    size = counters[_SIZE]
    time, number, transfer = heap[size].time, heap[size].number, heap[size].transfer
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            heap[other].time < heap[child].time
            or (heap[other].time == heap[child].time and heap[other].number < heap[child].number)
        ):
            child = other
        if heap[child].time > time or (heap[child].time == time and heap[child].number > number):
            break
        heap[at].time, heap[at].number = heap[child].time, heap[child].number
        heap[at].transfer = heap[child].transfer
        at = child
    heap[at].time, heap[at].number, heap[at].transfer = time, number, transfer
    return top


@compiled
def _send(
    s: Shares,
    transfers: Records,
    heap: Records,
    spans: np.ndarray,
    counters: np.ndarray,
    transfer: int,
    now: float,
    message_seconds: float,
) -> None:
    """The next piece of a transfer begins to leave."""
    piece = transfers[transfer].sent
    counters[_EVENTS] += 1
    if piece == 0:
        transfers[transfer].start = now
    if len(spans):
        spans[transfer, piece, 0] = now
    if message_seconds > 0.0:
        _push(heap, counters, now + message_seconds, -1 - transfer)
    else:
        transfers[transfer].is_flowing = 1
        add_flow(s, transfer, transfers[transfer].path, transfers[transfer].piece_bytes, 1.0, now)


@compiled
def _offer(
    s: Shares,
    transfers: Records,
    lines: Records,
    after: np.ndarray,
    heap: Records,
    spans: np.ndarray,
    counters: np.ndarray,
    transfer: int,
    pieces: int,
    now: float,
    message_seconds: float,
) -> None:
    """If the next piece of a transfer may go, let it: at once, or behind those that its path has to carry first."""
    piece = transfers[transfer].started
    if transfers[transfer].is_busy or transfers[transfer].is_dead or piece == pieces:
        return
    for position in range(transfers[transfer].first, transfers[transfer].stop):
        if transfers[after[position]].arrived <= piece:
            return
    transfers[transfer].is_busy = 1
    transfers[transfer].started = piece + 1
    path = transfers[transfer].path
    if len(lines) == 0:
        _send(s, transfers, heap, spans, counters, transfer, now, message_seconds)
    elif lines[path].current < 0:
        lines[path].current = transfer
        _send(s, transfers, heap, spans, counters, transfer, now, message_seconds)
    else:
        transfers[transfer].next = -1
        if lines[path].head < 0:
            lines[path].head = transfer
        else:
            transfers[lines[path].tail].next = transfer
        lines[path].tail = transfer


@compiled
def _advance(
    s: Shares,
    transfers: Records,
    lines: Records,
    heap: Records,
    spans: np.ndarray,
    counters: np.ndarray,
    path: int,
    now: float,
    message_seconds: float,
) -> None:
    """The path is free for the next in its queue."""
    if len(lines) == 0:
        return
    transfer = lines[path].head
    lines[path].current = transfer
    if transfer >= 0:
        lines[path].head = transfers[transfer].next
        _send(s, transfers, heap, spans, counters, transfer, now, message_seconds)


@compiled
def _happen(
    s: Shares,
    transfers: Records,
    happenings: Records,
    victim_starts: np.ndarray,
    victims: np.ndarray,
    at: int,
    now: float,
) -> None:
    """A link changes, or a rank dies."""
    rank = happenings[at].rank
    if rank < 0:
        change_capacity(s, happenings[at].link, happenings[at].bytes_per_second)
        return
    for position in range(victim_starts[rank], victim_starts[rank + 1]):
        transfer = victims[position]
        if transfers[transfer].is_flowing:
            cancel_flow(s, transfer, now)
            transfers[transfer].is_flowing = 0
        transfers[transfer].is_dead = 1


@compiled
def _play(
    s: Shares,
    transfers: Records,
    lines: Records,
    after: np.ndarray,
    followers: np.ndarray,
    happenings: Records,
    victim_starts: np.ndarray,
    victims: np.ndarray,
    heap: Records,
    spans: np.ndarray,
    clock: np.ndarray,
    counters: np.ndarray,
    pieces: int,
    message_seconds: float,
) -> bool:
    """Play until nothing is left to do; false if the heap may become too small first."""
    now = clock[_NOW]
    if counters[_MISSING] == 0:
        return True
    if not counters[_HAS_BEGUN]:
        counters[_HAS_BEGUN] = 1
        while counters[_CHANGES] < len(happenings) and happenings[counters[_CHANGES]].time <= now:
            _happen(s, transfers, happenings, victim_starts, victims, counters[_CHANGES], now)
            counters[_CHANGES] += 1
        for transfer in range(len(transfers)):
            _offer(s, transfers, lines, after, heap, spans, counters, transfer, pieces, now, message_seconds)
    while counters[_MISSING]:
        # In one round each transfer has at most one piece that leaves and one that begins to.
        if counters[_SIZE] + 2 * len(transfers) > len(heap):
            clock[_NOW] = now
            return False
        refill(s, now)
        following = earliest(s)
        if counters[_SIZE]:
            following = min(following, heap[0].time)
        if counters[_CHANGES] < len(happenings):
            following = min(following, happenings[counters[_CHANGES]].time)
        if following == math.inf:
            break
        now = following
        for position in range(complete(s, now)):
            transfer = s.flows[position].done
            transfers[transfer].is_flowing = 0
            transfers[transfer].is_busy = 0
            transfers[transfer].end = now
            if len(spans):
                spans[transfer, transfers[transfer].sent, 1] = now
            transfers[transfer].sent += 1
            counters[_EVENTS] += 1
            clock[_LAST] = max(clock[_LAST], now)
            _push(heap, counters, now + transfers[transfer].latency, transfer)
            # Those in the queue were ready before the next piece of the same transfer is.
            _advance(s, transfers, lines, heap, spans, counters, transfers[transfer].path, now, message_seconds)
            _offer(s, transfers, lines, after, heap, spans, counters, transfer, pieces, now, message_seconds)
        while counters[_SIZE] and heap[0].time <= now * (1 + TOGETHER):
            transfer = _pop(heap, counters)
            if transfer < 0:
                transfer = -1 - transfer
                if not transfers[transfer].is_dead:
                    transfers[transfer].is_flowing = 1
                    add_flow(s, transfer, transfers[transfer].path, transfers[transfer].piece_bytes, 1.0, now)
                continue
            transfers[transfer].arrived += 1
            counters[_MISSING] -= 1
            counters[_EVENTS] += 1
            clock[_LAST] = max(clock[_LAST], now)
            for position in range(transfers[transfer].first_follower, transfers[transfer].stop_follower):
                follower = followers[position]
                _offer(s, transfers, lines, after, heap, spans, counters, follower, pieces, now, message_seconds)
        while counters[_CHANGES] < len(happenings) and happenings[counters[_CHANGES]].time <= now:
            _happen(s, transfers, happenings, victim_starts, victims, counters[_CHANGES], now)
            counters[_CHANGES] += 1
    clock[_NOW] = now
    return True


def _use(links: Links, paths: list[tuple[int, ...]], transfers: np.ndarray, seconds: float) -> tuple[LinkUse, ...]:
    """What each link carried; a piece that was under way when all came to a stop does not count."""
    carried = np.zeros(len(links.names))
    on_path = np.bincount(transfers["path"], transfers["sent"] * transfers["piece_bytes"], minlength=len(paths))
    for path, size in zip(paths, on_path.tolist()):  # without transfers there is one row that carried nothing
        for link in path:
            carried[link] += size
    used: list[LinkUse] = []
    for link in np.flatnonzero(carried).tolist():
        busy = float(carried[link] / links.payload_per_second[link])
        source, target = links.names[link]
        used.append(
            LinkUse(
                source=source,
                target=target,
                bytes=float(carried[link]),
                busy_seconds=busy,
                utilisation=busy / seconds if seconds else 0.0,
            )
        )
    return tuple(used)


def _waiting(
    program: Program,
    links: Links,
    paths: list[tuple[int, ...]],
    shares: Shares,
    transfers: Records,
    pieces: int,
    dead: Collection[int],
) -> tuple[Waiting, ...]:
    """Who waits for what at the end, each rank once for each reason: the causes first, then what waits for them."""
    found: dict[tuple[int, int, str], tuple[bool, Waiting]] = {}
    for position, transfer in enumerate(program.transfers):
        row = transfers[position]
        if row["arrived"] == pieces or transfer.target in dead:
            continue
        path = program.paths[transfer.path]
        gone = next((rank for rank in sorted(dead) if program.devices[rank] in path), None)
        down = next((link for link in paths[transfer.path] if not shares.links["nominal"][link]), None)
        missing = next((other for other in transfer.after if transfers["arrived"][other] <= row["started"]), None)
        is_cause = True
        if gone is not None:
            reason = f"rank {gone} is dead"
        elif down is not None and row["is_busy"]:
            source, target = links.names[down]
            reason = f"the link from {source} to {target} is down"
        else:
            is_cause = False
            first = transfer if missing is None else program.transfers[missing]
            reason = f"rank {first.target} has not got chunk {first.chunk} from rank {first.source}"
        waiting = Waiting(
            rank=transfer.target,
            source=transfer.source,
            transfer=position,
            chunk=transfer.chunk,
            pieces_arrived=int(row["arrived"]),
            reason=reason,
        )
        found.setdefault((transfer.target, transfer.source, reason), (not is_cause, waiting))
    return tuple(waiting for _, waiting in sorted(found.values(), key=lambda each: each[0]))
