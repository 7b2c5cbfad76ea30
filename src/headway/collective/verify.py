"""Proof, by symbolic execution, that a program does what its collective promises.

**Contributions.** Each place `(rank, chunk)` holds a set of ranks whose data are in it, as the bits of an integer, and
a second set of those that are in it more than once. Transfers unite these sets, or replace them. In the end every
place that `Program.ends_with` names must hold the right ranks' data, each once.

**Order.** Floating-point sums depend on their order, so it is not enough that one order of execution gives the right
result: all orders that `after` allows must give the same bits. They do if any two accesses of a place, at least one of
them a write, are ordered by `after`, directly or by way of others. In one order that `after` allows, it suffices to
look at neighbours: a read and the write before it, a write and the reads (or, without reads, the write) before it.
Most of these pairs stand in `after` directly. The rest are looked up by pushing, for a few thousand transfers at a
time, one bit for each of them along `after`, which is exact and needs no table of all pairs.

**Bounded buffers.** Each rank carries out its own sends and receives one after the other, in the order of the list.
Between each two ranks there is, each way, a FIFO of `slots` buffers. A send waits for the transfers in its `after` to
have arrived and for a free buffer; a receive waits for a buffer that is filled. If every transfer stands in the list
behind those it waits for, nothing can get stuck, with a single buffer: of the transfers that have not arrived, the
first has all that its two ranks do before it behind it, and its FIFO is empty. Other lists are carried out in
full, and may get stuck; `Program.in_order` mends them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

from headway.collective.program import Program
from headway.errors import ProgramError
from headway.value import Value

__all__ = ["Report", "verify"]

_BATCH = 4096  # transfers whose followers are looked up at a time: 512 bytes for each transfer of the program


class Report(Value):
    """What is known of a program that has been proven right."""

    name: str
    collective: str
    ranks: int
    transfers: int
    steps: int  # the longest chain of transfers that wait for each other
    slots: int  # buffers between each two ranks, each way, with which it cannot get stuck
    sent: tuple[float, ...]  # by each rank, in shares of the vector
    received: tuple[float, ...]  # by each rank, in shares of the vector


def verify(program: Program, *, slots: int = 2) -> Report:
    """A report on `program`, or ProgramError naming the rank, the chunk and the transfer where it goes wrong.

    Raised for whatever `Program.validate` refuses; a circle in `after`; a place that is read before it is written;
    accesses of one place in an order that is left to chance; contributions that are missing, too many or foreign in
    the end; and ranks that wait for each other for ever with `slots` buffers between each two of them.
    """
    program.validate()
    if slots < 1:
        raise ProgramError(f"{slots} buffers carry nothing", place=program.name, remedy="give at least one slot")
    order = _one_order(program)
    _check_contributions(program, order)
    _check_races(program, order)
    if not program.is_in_order:
        _check_buffers(program, slots)
    sent, received = [0.0] * program.size, [0.0] * program.size
    steps = [0] * len(program.transfers)
    for position in order:
        transfer = program.transfers[position]
        steps[position] = 1 + max((steps[other] for other in transfer.after), default=0)
        sent[transfer.source] += program.fraction(transfer.chunk)
        received[transfer.target] += program.fraction(transfer.chunk)
    return Report(
        name=program.name,
        collective=program.collective,
        ranks=program.size,
        transfers=len(program.transfers),
        steps=max(steps, default=0),
        slots=slots,
        sent=tuple(sent),
        received=tuple(received),
    )


def _where(program: Program, position: int) -> str:
    transfer = program.transfers[position]
    return (
        f"{program.name}: transfers[{position}] (chunk {transfer.chunk}, rank {transfer.source} -> {transfer.target})"
    )


def _one_order(program: Program) -> Sequence[int]:
    """Positions in an order that `after` allows: that of the list where possible. Raises ProgramError for a circle."""
    if program.is_in_order:
        return range(len(program.transfers))
    waits = [len(set(transfer.after)) for transfer in program.transfers]
    followers: list[list[int]] = [[] for _ in program.transfers]
    for position, transfer in enumerate(program.transfers):
        for other in set(transfer.after):
            followers[other].append(position)
    ready = [position for position, count in enumerate(waits) if not count]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for follower in followers[order[-1]]:
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(order) == len(waits):
        return order
    # Whoever is left waits for another that is left: going from one to the next must come round.
    circle = [next(position for position, count in enumerate(waits) if count)]
    while True:
        following = next(other for other in program.transfers[circle[-1]].after if waits[other])
        if following in circle:
            circle = [*circle[circle.index(following) :], following]
            break
        circle.append(following)
    raise ProgramError(
        f"waits for itself: {' after '.join(map(str, circle))}",
        place=_where(program, circle[0]),
        remedy="leave out one of these waits",
    )


def _check_contributions(program: Program, order: Sequence[int]) -> None:
    """Carry the program out on sets of contributions."""
    once: dict[tuple[int, int], int] = {}  # place → ranks whose data are in it
    again: dict[tuple[int, int], int] = {}  # place → those of them that are in it more than once
    written: dict[tuple[int, int], int] = {}

    def read(place: tuple[int, int], position: int) -> int:
        held = once.get(place)
        if held is None:
            if not program.starts_with(*place):
                raise ProgramError(
                    f"reads chunk {place[1]} at rank {place[0]}, where nothing has been written",
                    place=_where(program, position),
                    remedy="bring the chunk there first, and wait for it",
                )
            held = once[place] = 1 << place[0]
        return held

    for position in order:
        transfer = program.transfers[position]
        origin, goal = (transfer.source, transfer.chunk), (transfer.target, transfer.chunk)
        data, repeated = read(origin, position), again.get(origin, 0)
        if transfer.reduce:
            there = read(goal, position)
            again[goal] = again.get(goal, 0) | repeated | (data & there)
            once[goal] = data | there
        else:
            once[goal], again[goal] = data, repeated
        written[goal] = position
    everybody = (1 << program.size) - 1
    for chunk, what in enumerate(program.chunks):
        origin = program.root if program.collective in ("broadcast", "scatter") else what.owner
        right = everybody if program.reduces else 1 << origin
        for rank in range(program.size):
            if not program.ends_with(rank, chunk):
                continue
            place = (rank, chunk)
            held = once.get(place, 1 << rank if program.starts_with(*place) else 0)
            repeated = again.get(place, 0)
            if held == right and not repeated:
                continue
            faults = [
                f"{said} {', '.join(map(str, _bits(ranks)))}"
                for said, ranks in (
                    ("without the data of rank", right & ~held),
                    ("with the data of rank", held & ~right),
                    ("with more than one contribution of rank", repeated),
                )
                if ranks
            ]
            by = f", last written by transfers[{written[place]}]" if place in written else ", which nobody writes"
            raise ProgramError(
                f"rank {rank} ends {' and '.join(faults)} in chunk {chunk}{by}",
                place=f"{program.name}: rank {rank}, chunk {chunk}",
                remedy=f"{program.collective} must bring each contribution there exactly once",
            )


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _check_races(program: Program, order: Sequence[int]) -> None:
    """Find two accesses of one place, at least one of them a write, that `after` leaves unordered."""
    # Pairs in terms of positions in `order`: the earlier must be waited for by the later.
    pairs: dict[int, list[int]] = {}  # earlier → laters, where `after` does not say it directly
    written: dict[tuple[int, int], int] = {}
    read: dict[tuple[int, int], list[int]] = {}
    turn = {position: at for at, position in enumerate(order)}
    waits = [[turn[other] for other in program.transfers[position].after] for position in order]
    for at, position in enumerate(order):
        transfer = program.transfers[position]
        origin, goal = (transfer.source, transfer.chunk), (transfer.target, transfer.chunk)
        before = read.pop(goal, [])
        if not before and goal in written:
            before = [written[goal]]
        if origin in written:
            before = [*before, written[origin]]
        for other in before:
            if other not in waits[at]:
                pairs.setdefault(other, []).append(at)
        written[goal] = at
        read.setdefault(origin, []).append(at)
    earlier = sorted(pairs)
    for start in range(0, len(earlier), _BATCH):
        batch = earlier[start : start + _BATCH]
        bit = {at: 1 << number for number, at in enumerate(batch)}
        until = max(later for at in batch for later in pairs[at])
        reached: dict[int, int] = {}  # transfer → those of the batch that it waits for, itself included
        for at in range(batch[0], until + 1):
            mask = bit.get(at, 0)
            for other in waits[at]:
                mask |= reached.get(other, 0)
            if mask:
                reached[at] = mask
        for at in batch:
            for later in pairs[at]:
                if not reached.get(later, 0) & bit[at]:
                    _refuse_race(program, order[at], order[later])


def _refuse_race(program: Program, earlier: int, later: int) -> None:
    one, other = program.transfers[earlier], program.transfers[later]
    if one.target == other.target and one.chunk == other.chunk:
        rank, said = one.target, "both write"
    elif one.target == other.source:
        rank, said = one.target, "write and read"
    else:
        rank, said = one.source, "read and write"
    raise ProgramError(
        f"transfers[{earlier}] and transfers[{later}] {said} chunk {one.chunk} at rank {rank}, in either order",
        place=_where(program, later),
        remedy=f"let it wait: `after` must lead to {earlier}",
    )


def _check_buffers(program: Program, slots: int) -> None:
    """Carry out each rank's operations in the order of the list, with `slots` buffers from each rank to each other."""
    transfers = program.transfers
    operations: list[list[int]] = [[] for _ in range(program.size)]  # of each rank: positions in the list
    for position, transfer in enumerate(transfers):
        operations[transfer.source].append(position)
        operations[transfer.target].append(position)
    done = [0] * program.size
    sent, arrived = [False] * len(transfers), [False] * len(transfers)
    filled: dict[tuple[int, int], int] = {}
    waiting: dict[int, list[int]] = {}  # transfer → ranks that wait for it to arrive
    awake = deque(range(program.size))
    while awake:
        rank = awake.popleft()
        while done[rank] < len(operations[rank]):
            position = operations[rank][done[rank]]
            transfer = transfers[position]
            pair = (transfer.source, transfer.target)
            if rank == transfer.source:
                missing = next((other for other in transfer.after if not arrived[other]), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(rank)
                    break
                if filled.get(pair, 0) == slots:
                    break
                filled[pair] = filled.get(pair, 0) + 1
                sent[position] = True
                awake.append(transfer.target)
            else:
                if not sent[position]:
                    break
                filled[pair] -= 1
                arrived[position] = True
                awake.append(transfer.source)
                awake.extend(waiting.pop(position, ()))
            done[rank] += 1
    stuck = [rank for rank in range(program.size) if done[rank] < len(operations[rank])]
    if not stuck:
        return
    reasons: dict[int, tuple[int, str]] = {}  # rank → the rank that it waits for, and why
    for rank in stuck:
        position = operations[rank][done[rank]]
        transfer = transfers[position]
        if rank == transfer.target:
            reasons[rank] = (transfer.source, f"to receive transfers[{position}] from rank {transfer.source}")
            continue
        missing = next((other for other in transfer.after if not arrived[other]), None)
        if missing is None:
            reasons[rank] = (transfer.target, f"for a buffer to rank {transfer.target} for transfers[{position}]")
        else:
            late = transfers[missing]
            whom = late.target if sent[missing] else late.source
            reasons[rank] = (whom, f"for transfers[{missing}] to arrive, to send transfers[{position}]")
    circle: list[int] = [stuck[0]]
    while reasons[circle[-1]][0] not in circle:
        circle.append(reasons[circle[-1]][0])
    circle = circle[circle.index(reasons[circle[-1]][0]) :]
    told = "; ".join(f"rank {rank} waits {reasons[rank][1]}" for rank in circle)
    position = operations[circle[0]][done[circle[0]]]
    raise ProgramError(
        f"gets stuck with {slots} buffers between two ranks: {told}",
        place=_where(program, position),
        remedy="list each transfer behind those that it waits for: `Program.in_order` does so",
    )
