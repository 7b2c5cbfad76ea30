"""A program in the XML that Microsoft's collective communication library (MSCCL) reads and runs on GPUs.

The format is that of two public parsers: microsoft/msccl (`src/graph/topo.cc`) and its successor Azure/msccl-executor-
nccl (`src/misc/msccl/msccl_parser.cc`), which RCCL has too. They differ in a few names and limits; `parser` chooses.

**How a program becomes thread blocks.** A thread block of a GPU sends to at most one peer and receives from at most
one, over one channel, and carries out its steps one after the other; a step may wait for a step of another thread
block of the same GPU (`depid`, `deps`; further waits stand in `nop` steps before it). Each transfer is a send (`s`) at
its source and a receive (`r`, or `rrc`: receive, reduce, copy) at its target. Here a thread block either sends or
receives, so that none has to wait for a buffer before it can empty another; its steps are in the order of the program,
so the bounded FIFOs cannot get stuck (see `collective.verify`). The waits are found anew from who reads and writes
each place, which at one GPU is all that a verified program's `after` can demand.

**Where the data are.** A place is in the input buffer until it is first written. Then it moves to its position in the
output buffer if it belongs to the result, else to the scratch buffer. What ends where it began is copied at last.
Chunks of unequal weight become multiples of a unit chunk, and one transfer moves at most 71 of them in a step.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from headway.collective.program import Program
from headway.errors import ProgramError

__all__ = ["to_msccl"]

Parser = Literal["msccl", "executor"]


class _Limits(NamedTuple):
    collectives: dict[str, str]
    steps: int  # of a thread block


_NAMES = {"all_reduce": "allreduce", "all_gather": "allgather", "all_to_all": "alltoall"} | {
    name: name for name in ("broadcast", "reduce", "reduce_scatter")
}
_PARSERS: dict[str, _Limits] = {
    "msccl": _Limits(_NAMES, 256),
    "executor": _Limits({**_NAMES, "reduce_scatter": "reducescatter", "gather": "gather", "scatter": "scatter"}, 64),
}
_MOST_COUNT = 71  # unit chunks in one step
_MOST_BLOCKS = 108  # thread blocks of a GPU, which must all run at once: an A100 has so many multiprocessors
_MOST_CHANNELS = 32
_MOST_PEERS = 32  # of a channel, each way
_MOST_NODES = 4096  # XML elements that a rank reads: all of its own, and the others' outermost
_MOST_UNITS = 1 << 15  # offsets have 16 bits, with a sign
_ALL_BYTES = (1 << 63) - 1
_NONE = ("i", -1)

_Where = tuple[str, int]  # buffer ("i", "o", "s") and offset in unit chunks


class _Step(NamedTuple):
    kind: str
    source: _Where
    target: _Where
    count: int
    wait: tuple[int, int] = (-1, -1)  # thread block, step


class _Operation(NamedTuple):
    """One end of a transfer, before it is known in which step of which thread block it will be."""

    kind: str
    source: _Where
    target: _Where
    count: int
    end: tuple[int, bool, int]  # (peer, whether it sends, chunk)
    waits: tuple[int, ...]  # earlier operations of the same rank


class _TooLong(Exception):
    """A limit of the parser is exceeded; more channels may help."""


def to_msccl(
    program: Program,
    *,
    parser: Parser = "msccl",
    protocol: Literal["Simple", "LL", "LL128"] = "Simple",
    channels: int | None = None,
    in_place: bool = True,
    min_bytes: int = 0,
    max_bytes: int = _ALL_BYTES,
) -> str:
    """The XML text of `program` for `parser`: "msccl" or "executor" (Azure's, and RCCL's).

    Chunks take turns on the channels; unless given, as few channels as the limit on steps allows. The older parser
    uses an algorithm either in place or not, as `in_place` says; for the newer it is good for both. `min_bytes` and
    `max_bytes` bound the vectors that the library uses it for. The program should have been verified. Raises
    ProgramError for a collective that the parser does not know, a program beyond its limits, and what
    `Program.in_order` refuses.
    """
    limits = _PARSERS[parser]
    if channels is not None and not 1 <= channels <= _MOST_CHANNELS:
        raise ProgramError(f"{channels} channels", place="MSCCL: channels", remedy=f"1 to {_MOST_CHANNELS}")
    if not 0 <= min_bytes <= max_bytes <= _ALL_BYTES:
        raise ProgramError(
            f"from {min_bytes} to {max_bytes} bytes", place="MSCCL: min_bytes", remedy="give the smaller one first"
        )
    if program.collective not in limits.collectives:
        raise ProgramError(
            f"the parser {parser!r} does not know {program.collective}",
            place=program.name,
            remedy="choose the parser 'executor'" if parser == "msccl" else "choose another collective",
        )
    program = program.in_order()
    writer = _Writer(program, limits)
    fault = ""
    for tried in (1, 2, 4, 8, 16, _MOST_CHANNELS) if channels is None else (channels,):
        try:
            gpus = [writer.gpu(rank, tried) for rank in range(program.size)]
        except _TooLong as error:
            fault = str(error)
            continue
        block = writer.units // program.size
        loop = block if program.collective in ("gather", "scatter") else writer.units
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{program.name}_{program.collective}")[:60]
        apart = program.collective == "all_to_all"  # its input and output cannot share memory
        used = 0 if apart or (parser == "msccl" and not in_place) else 1
        head = (
            f'<algo name="{name}" proto="{protocol}" nchannels="{tried}" nchunksperloop="{loop}" '
            f'ngpus="{program.size}" coll="{limits.collectives[program.collective]}" inplace="{used}" '
            f'outofplace="{0 if used and parser == "msccl" else 1}" minBytes="{min_bytes}" maxBytes="{max_bytes}">'
        )
        return "\n".join([head, *(line for gpu in gpus for line in gpu), "</algo>", ""])
    raise ProgramError(
        f"is beyond the limits of the parser {parser!r}: {fault}",
        place=program.name,
        remedy="use fewer chunks, another algorithm, or more channels",
    )


class _Writer:
    """Turns each rank's part of a program into lines of XML."""

    def __init__(self, program: Program, limits: _Limits) -> None:
        self.program = program
        self.limits = limits
        unit = math.gcd(*(chunk.weight for chunk in program.chunks))
        self.start = [start // unit for start, _ in program.bounds]
        self.count = [chunk.weight // unit for chunk in program.chunks]
        self.units = program.unit // unit
        if self.units >= _MOST_UNITS:
            raise ProgramError(
                f"has {self.units} unit chunks, and offsets end at {_MOST_UNITS - 1}",
                place=program.name,
                remedy="give the chunks weights with a larger common divisor",
            )
        self.scratch = [0] * program.size  # unit chunks of each rank
        self.operations: list[list[_Operation]] = [[] for _ in range(program.size)]
        self.at: dict[tuple[int, int], _Where] = {}  # where a place is that has been written
        self._read: dict[tuple[int, int], list[int]] = {}
        self._written: dict[tuple[int, int], int] = {}
        for transfer in program.transfers:
            self._carry_out(transfer.chunk, transfer.source, transfer.target, transfer.reduce)

    def _input(self, chunk: int) -> _Where:
        what, block = self.program.chunks[chunk], self.units // self.program.size
        gathers = self.program.collective in ("all_gather", "gather")
        return "i", self.start[chunk] - (what.owner * block if gathers else 0)

    def _output(self, chunk: int) -> _Where:
        what, block = self.program.chunks[chunk], self.units // self.program.size
        if self.program.collective in ("reduce_scatter", "scatter"):
            return "o", self.start[chunk] - what.owner * block
        if self.program.collective == "all_to_all":
            return "o", self.start[chunk] + (what.owner - what.target) * block
        return "o", self.start[chunk]

    def _carry_out(self, chunk: int, source: int, target: int, reduce: bool) -> None:
        origin, goal = (source, chunk), (target, chunk)
        sent = self.at.get(origin, self._input(chunk))
        before = self.at.get(goal, self._input(chunk))
        if goal not in self.at:
            if self.program.ends_with(*goal):
                self.at[goal] = self._output(chunk)
            else:
                self.at[goal] = ("s", self.scratch[target])
                self.scratch[target] += self.count[chunk]
                if self.scratch[target] >= _MOST_UNITS:
                    raise ProgramError(
                        "needs more scratch memory than offsets reach", place=f"{self.program.name}: rank {target}"
                    )
        written = self.at[goal]
        waits = (self._written[origin],) if origin in self._written else ()
        self._read.setdefault(origin, []).append(len(self.operations[source]))
        self.operations[source].append(_Operation("s", sent, written, self.count[chunk], (target, True, chunk), waits))
        readers = tuple(self._read.pop(goal, ()))
        waits = (*readers, self._written[goal]) if goal in self._written else readers
        self._written[goal] = len(self.operations[target])
        kind, local = ("rrc", before) if reduce else ("r", sent)
        self.operations[target].append(
            _Operation(kind, local, written, self.count[chunk], (source, False, chunk), waits)
        )

    def gpu(self, rank: int, channels: int) -> list[str]:
        """The lines of one rank. Raises _TooLong where a limit is exceeded."""
        program = self.program
        operations = self.operations[rank]
        # Thread blocks: on each channel, one for each peer to send to and one for each to receive from.
        ends = sorted({(chunk % channels, not is_send, peer) for peer, is_send, chunk in (o.end for o in operations)})
        number = {(peer, not receives, channel): at for at, (channel, receives, peer) in enumerate(ends)}
        blocks = [(-1 if receives else peer, peer if receives else -1, channel) for channel, receives, peer in ends]
        busiest = max(Counter((channel, receives) for channel, receives, _ in ends).values(), default=0)
        if busiest > _MOST_PEERS:
            raise _TooLong(f"rank {rank} has {busiest} peers on a channel, and {_MOST_PEERS} are allowed")
        steps: list[list[_Step]] = [[] for _ in blocks]
        last_step: list[tuple[int, int]] = []  # of each operation: thread block, step
        awaited: set[tuple[int, int]] = set()
        for operation in operations:
            peer, is_send, chunk = operation.end
            here = number[peer, is_send, chunk % channels]
            latest: dict[int, int] = {}  # other thread block → the last of its steps that must be over
            for other in operation.waits:
                block, step = last_step[other]
                if block != here:
                    latest[block] = max(latest.get(block, -1), step)
            waits = sorted(latest.items())
            awaited.update(waits)
            steps[here].extend(_Step("nop", _NONE, ("o", -1), 0, wait) for wait in waits[:-1])
            wait = waits[-1] if waits else (-1, -1)
            for done in range(0, operation.count, _MOST_COUNT):
                count = min(_MOST_COUNT, operation.count - done)
                (source, source_at), (target, target_at) = operation.source, operation.target
                piece = _Step(operation.kind, (source, source_at + done), (target, target_at + done), count, wait)
                steps[here].append(piece)
                wait = (-1, -1)
            last_step.append((here, len(steps[here]) - 1))
        copies = list(self._copies(rank))
        for first in range(0, len(copies), self.limits.steps):
            blocks.append((-1, -1, 0))
            steps.append(copies[first : first + self.limits.steps])
        longest = max(map(len, steps), default=0)
        if longest > self.limits.steps:
            raise _TooLong(f"rank {rank} has {longest} steps in a thread block, and {self.limits.steps} are allowed")
        if len(blocks) > _MOST_BLOCKS:
            raise _TooLong(f"rank {rank} has {len(blocks)} thread blocks, and {_MOST_BLOCKS} are allowed")
        nodes = 1 + program.size + len(blocks) + sum(map(len, steps))
        if nodes >= _MOST_NODES:
            raise _TooLong(f"rank {rank} reads {nodes} XML elements, and {_MOST_NODES - 1} are allowed")
        block = self.units // program.size
        whole = {"i": self.units, "o": self.units}
        if program.collective in ("all_gather", "gather"):
            whole["i"] = block
        if program.collective in ("reduce_scatter", "scatter"):
            whole["o"] = block
        if rank != program.root:
            if program.collective in ("broadcast", "scatter"):
                whole["i"] = 0
            if program.collective in ("reduce", "gather"):
                whole["o"] = 0
        lines = [f'  <gpu id="{rank}" i_chunks="{whole["i"]}" o_chunks="{whole["o"]}" s_chunks="{self.scratch[rank]}">']
        for at, (send, receive, channel) in enumerate(blocks):
            lines.append(f'    <tb id="{at}" send="{send}" recv="{receive}" chan="{channel}">')
            for turn, step in enumerate(steps[at]):
                lines.append(
                    f'      <step s="{turn}" type="{step.kind}" srcbuf="{step.source[0]}" srcoff="{step.source[1]}" '
                    f'dstbuf="{step.target[0]}" dstoff="{step.target[1]}" cnt="{step.count}" '
                    f'depid="{step.wait[0]}" deps="{step.wait[1]}" hasdep="{int((at, turn) in awaited)}"/>'
                )
            lines.append("    </tb>")
        return [*lines, "  </gpu>"]

    def _copies(self, rank: int) -> Iterator[_Step]:
        """What ends where it began, from the input to the output, neighbours in one step where they fit."""
        pieces = sorted(
            (self._input(chunk)[1], self._output(chunk)[1], self.count[chunk])
            for chunk in range(len(self.program.chunks))
            if (rank, chunk) not in self.at
            and self.program.starts_with(rank, chunk)
            and self.program.ends_with(rank, chunk)
        )
        joined: list[list[int]] = []
        for source, target, count in pieces:
            if joined and (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]) == (source, target):
                joined[-1][2] += count
            else:
                joined.append([source, target, count])
        for source, target, count in joined:
            for done in range(0, count, _MOST_COUNT):
                yield _Step("cpy", ("i", source + done), ("o", target + done), min(_MOST_COUNT, count - done))
