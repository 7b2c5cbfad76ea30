"""What a Program asks of each rank: steps in an order in which nobody ever waits in a circle.

A program moves chunks between *places*. Here each value that a place ever holds becomes a *node*, made by one step of
one rank and never changed afterwards, so that the only thing to wait for is "the node has been made":

- `STAGE` copies the rank's own contribution to its window, because somebody reads it there;
- `COMBINE` reads one or more nodes straight from the windows where they lie (and the rank's own contribution from the
  user's tensor), reduces them in one go, and writes the result to the rank's window if somebody will read it, and to
  the user's tensor if it is a result. Transfers that reduce into a place one after the other, with nobody reading in
  between, are one step. A single source is a copy;
- `SEND` and `RECEIVE` take a node to a rank of another machine.

**Order.** The vector is cut in slices, small enough for the windows to stay in the processor's cache, and slices follow
one another through the steps like wagons: the steps are divided into stages by the length of the chain that leads to
them, and in period p a rank carries out its steps of stage s on slice p - s. A step waits only for steps with a smaller
(period, position in the program), and every rank goes through its steps in that order; so there is always a rank that
can go on. A window has one copy of its slots for each stage, and a copy is used again when its readers are done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headway.collective.program import Program
from headway.errors import ProgramError

__all__ = [
    "COMBINE", "RECEIVE", "SEND", "STAGE", "Instructions", "Node", "Schedule", "cut", "instructions", "schedule",
]  # fmt: skip

STAGE, COMBINE, SEND, RECEIVE = range(4)
_ALIGNMENT = 64  # bytes: of slots, a cache line


@dataclass(eq=False, slots=True)
class Node:
    """One step of one rank, and the value that it makes. See the module for the kinds."""

    kind: int
    rank: int
    chunk: int
    position: tuple[int, int]  # order among the steps of all ranks
    sources: list[Node | None] = field(default_factory=list)  # None: the rank's own contribution, in its tensor
    contributions: int = 0  # bit r: rank r's contribution is in it
    peer: int = -1  # SEND, RECEIVE: the other rank
    is_read: bool = False  # somebody reads it while it is what the place holds
    is_result: bool = False
    completes: bool = False  # the reduction is complete with it
    readers: list[Node] = field(default_factory=list)
    earlier: Node | None = None  # what the place held before
    depth: int = -1  # steps on the longest chain that leads to it
    order: int = -1  # among the steps of its rank
    slot: int = -1  # in the window of its rank


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The steps of every rank for a program, whatever the size of the vector."""

    steps: tuple[tuple[Node, ...], ...]  # by rank
    slots: tuple[tuple[int, ...], ...]  # by rank: the chunk that each slot holds
    depth: int  # the largest of all
    transport: bool  # whether there is a SEND or RECEIVE

    def stages(self, most: int) -> tuple[int, int]:
        """(how many stages there are if there may be `most`, how many steps of a chain each has)."""
        span = -(-(self.depth + 1) // most)
        return self.depth // span + 1, span


def schedule(program: Program, machines: tuple[int, ...]) -> Schedule:
    """The steps of every rank. `machines[r]` is the number of the machine of rank r.

    Raises ProgramError where a transfer reads a place that holds nothing.
    """
    program = program.in_order()
    places: dict[tuple[int, int], Node] = {}
    staged: dict[tuple[int, int], Node] = {}
    received: dict[tuple[Node, int], Node] = {}  # (node, rank of another machine) → what arrived there
    own = {
        (rank, chunk): 1 << rank
        for chunk in range(len(program.chunks))
        for rank in range(program.size)
        if program.starts_with(rank, chunk)
    }
    full = (1 << program.size) - 1

    def read(rank: int, chunk: int, reader: int, position: int) -> Node:
        node = places.get((rank, chunk))
        if node is None:
            if (rank, chunk) not in own:
                raise ProgramError(
                    f"chunk {chunk} is not at rank {rank} yet",
                    place=f"{program.name}: transfers[{position}]",
                    remedy="put the transfers in an order in which they can be carried out",
                )
            node = staged.get((rank, chunk))
            if node is None:
                node = Node(STAGE, rank, chunk, (position, 0), contributions=own[rank, chunk])
                staged[rank, chunk] = node
        node.is_read = True
        if machines[rank] == machines[reader]:
            return node
        arrived = received.get((node, reader))
        if arrived is None:
            sent = Node(SEND, rank, chunk, (position, 1), sources=[node], peer=reader)
            arrived = Node(RECEIVE, reader, chunk, (position, 1), sources=[sent], peer=rank)
            arrived.contributions = node.contributions
            received[node, reader] = arrived
        return arrived

    for position, transfer in enumerate(program.transfers):
        source = read(transfer.source, transfer.chunk, transfer.target, position)
        place = (transfer.target, transfer.chunk)
        before = places.get(place)
        if transfer.reduce and before is not None and not before.is_read:
            before.sources.append(source)
            before.contributions |= source.contributions
            before.position = (position, 2)
            continue
        node = Node(COMBINE, *place, (position, 2), sources=[source], earlier=before)
        node.contributions = source.contributions
        if transfer.reduce:
            if before is None and place not in own:
                raise ProgramError(
                    f"there is nothing at rank {place[0]} to reduce chunk {place[1]} with",
                    place=f"{program.name}: transfers[{position}]",
                    remedy="leave out `reduce`",
                )
            node.sources.insert(0, before)
            node.contributions |= own[place] if before is None else before.contributions
            if before is not None:
                before.is_read = True
        places[place] = node

    for (rank, chunk), node in places.items():
        if program.ends_with(rank, chunk):
            node.is_result = True
    # A value that nobody reads and nobody wants is left out, by going back from the results.
    wanted: set[Node] = set()
    stack = [node for node in places.values() if node.is_result]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack.extend(source for source in node.sources if source is not None)
    kept = sorted(wanted, key=lambda node: (node.position, node.kind))
    _measure(kept)

    steps: list[list[Node]] = [[] for _ in range(program.size)]
    slots: list[list[int]] = [[] for _ in range(program.size)]
    for node in kept:
        node.order = len(steps[node.rank])
        steps[node.rank].append(node)
        # A set of contributions is complete where the last ones came together, and there an average is divided.
        node.completes = node.kind == COMBINE and len(node.sources) > 1 and node.contributions == full
        for source in node.sources:
            if source is not None:
                source.readers.append(node)
    for node in kept:
        if node.readers and node.kind != SEND:
            node.slot = len(slots[node.rank])
            slots[node.rank].append(node.chunk)
    return Schedule(
        tuple(tuple(one) for one in steps),
        tuple(tuple(one) for one in slots),
        max((node.depth for node in kept), default=0),
        any(node.kind == SEND for node in kept),
    )


def _measure(nodes: list[Node]) -> None:
    """Find the depth of each of `nodes`, which are in order."""
    for node in nodes:
        if node.kind == RECEIVE:
            # Both ends of a message go through their steps in one order, so they must agree on where it is.
            node.depth = node.sources[0].depth  # pyright: ignore[reportOptionalMemberAccess]
            continue
        node.depth = 1 + max((source.depth for source in node.sources if source is not None), default=-1)
        # A result may overwrite the rank's contribution, so it must not come before a step that reads that.
        earlier = node.earlier
        while earlier is not None:
            node.depth = max(node.depth, earlier.depth)
            earlier = earlier.earlier if earlier.depth < 0 else None


# Columns of the tables that the interpreter reads.
KIND, CHUNK, STEP_STAGE, PUBLISH, SLOT, TO_USER, FIRST_SOURCE, SOURCES, FIRST_WAIT, WAITS, DIVIDE, PEER = range(12)
STEP_COLUMNS = 12
SOURCE_RANK, SOURCE_SLOT = range(2)  # rank among those of this machine, -1: the user's tensor; bytes in the window
WAIT_RANK, WAIT_FIRST, WAIT_PER_SLICE, WAIT_BACK = range(4)
LENGTH, PIECE, INPUT, OUTPUT = range(4)  # of a chunk, in elements


@dataclass(frozen=True, slots=True, eq=False)
class Instructions:
    """The steps of one rank for a vector of a certain size, as tables of int64 (see the names of the columns)."""

    steps: np.ndarray
    sources: np.ndarray
    waits: np.ndarray
    chunks: np.ndarray
    strides: np.ndarray  # bytes of one copy of the slots, of each rank of the machine
    totals: np.ndarray  # what the counter of each rank of the machine grows by
    readers: np.ndarray  # bool, for each rank of the machine that reads this rank's window
    slices: int
    stages: int
    copies: int  # of the slots
    transport: bool  # whether this rank has a SEND or RECEIVE


def cut(program: Program, count: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each chunk in a vector of `count` elements: `Program.bounds`, rounded down to whole elements."""
    unit = program.unit
    return tuple((start * count // unit, stop * count // unit) for start, stop in program.bounds)


def instructions(
    program: Program,
    plan: Schedule,
    *,
    rank: int,
    members: tuple[int, ...],
    count: int,
    element_bytes: int,
    window_bytes: int,
    slice_bytes: int,
    most_stages: int,
) -> Instructions:
    """The steps of `rank` on a vector of `count` elements, with `members` on its machine.

    A slice is about `slice_bytes` of the vector, or less where the slots would not fit into `window_bytes`. Raises
    ProgramError where they cannot be made small enough.
    """
    bounds = cut(program, count)
    lengths = np.array([stop - start for start, stop in bounds], np.int64)
    slices = max(1, -(-count * element_bytes // slice_bytes))
    grain = max(1, _ALIGNMENT // element_bytes)
    while True:
        pieces = -(-lengths // slices)
        if slices > 1:
            pieces = -(-pieces // grain) * grain
        slot_bytes = -(-pieces * element_bytes // _ALIGNMENT) * _ALIGNMENT
        starts = [np.cumsum([0, *slot_bytes[list(held)]]) for held in plan.slots]
        stages, span = plan.stages(most_stages) if slices > 1 else (1, plan.depth + 1)
        copies = stages + (plan.transport and slices > 1)
        if max(int(start[-1]) for start in starts) * copies <= window_bytes:
            break
        if (pieces <= grain).all():
            raise ProgramError(
                f"{len(program.chunks)} chunks are too many for a window of {window_bytes} bytes",
                place=program.name,
                remedy="use fewer chunks",
            )
        slices *= 2
    slices = max(1, int(np.max(-(-lengths // np.maximum(pieces, 1)), initial=0)))
    local = {member: position for position, member in enumerate(members)}
    counts = [len(steps) for steps in plan.steps]

    def stage(node: Node) -> int:
        return node.depth // span

    steps, sources, waits = [], [], []
    readers = np.zeros(len(members), bool)
    for node in plan.steps[rank]:
        row = [0] * STEP_COLUMNS
        after: dict[tuple[int, int], int] = {}  # (rank, slices back) → what its counter must have reached
        row[KIND], row[CHUNK], row[STEP_STAGE], row[PEER] = node.kind, node.chunk, stage(node), node.peer
        row[SLOT] = int(starts[rank][node.slot]) if node.slot >= 0 else -1
        row[TO_USER], row[DIVIDE], row[FIRST_SOURCE] = int(node.is_result), int(node.completes), len(sources)
        if node.kind != RECEIVE:
            for source in [None] if node.kind == STAGE else node.sources:
                if source is None:
                    sources.append((-1, 0))
                    continue
                sources.append((local[source.rank], int(starts[source.rank][source.slot])))
                if source.rank != rank:
                    key = (source.rank, 0)
                    reached = stage(source) * counts[source.rank] + source.order + 1
                    after[key] = max(after.get(key, 0), reached)
        for reader in node.readers:
            if reader.rank != rank and node.kind != SEND:
                readers[local[reader.rank]] = True
                row[PUBLISH] = 1
                key = (reader.rank, copies)
                reached = (stage(reader) - copies) * counts[reader.rank] + reader.order + 1
                after[key] = max(after.get(key, reached), reached)
        if slices > copies and any(source is not None and source.rank != rank for source in node.sources):
            row[PUBLISH] = 1
        row[SOURCES] = len(sources) - row[FIRST_SOURCE]
        row[FIRST_WAIT] = len(waits)
        waits += [(local[who], reached, counts[who], back) for (who, back), reached in after.items()]
        row[WAITS] = len(waits) - row[FIRST_WAIT]
        steps.append(row)
    outputs = bounds
    if program.collective == "all_to_all":
        # What arrives lies in blocks by owner, what is sent in blocks by target.
        block = count // program.size
        outputs = tuple(
            (start + (chunk.owner - chunk.target) * block, 0) for (start, _), chunk in zip(bounds, program.chunks)
        )
    table = [(int(lengths[i]), int(pieces[i]), bounds[i][0], outputs[i][0]) for i in range(len(bounds))]
    return Instructions(
        steps=_table(steps, STEP_COLUMNS),
        sources=_table(sources, 2),
        waits=_table(waits, 4),
        chunks=_table(table, 4),
        strides=np.array([int(starts[member][-1]) for member in members], np.int64),
        totals=np.array([(slices + stages - 1) * counts[member] for member in members], np.int64),
        readers=readers,
        slices=slices,
        stages=stages,
        copies=copies,
        transport=any(node.kind in (SEND, RECEIVE) for node in plan.steps[rank]),
    )


def _table(rows: list, columns: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, columns)
