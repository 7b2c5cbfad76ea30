"""The loop that carries out a rank's steps: one compiled function, with no Python in between.

It reads the tables of `exchange.lowering`, copies and reduces between the windows and the user's tensor, and keeps the
rank's counter. It gives control back only when it is done, when it has waited in vain for a while, or when it comes to
a step that talks to another machine.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
import hashlib
from pathlib import Path

import numpy as np

from headway.compiled import compiled
from headway.exchange import kernels, lowering, shared
from headway.exchange.kernels import call_kernel, copy_bytes
from headway.exchange.lowering import (
    CHUNK,
    DIVIDE,
    FIRST_SOURCE,
    FIRST_WAIT,
    INPUT,
    KIND,
    LENGTH,
    OUTPUT,
    PIECE,
    PUBLISH,
    RECEIVE,
    SEND,
    SLOT,
    SOURCE_RANK,
    SOURCE_SLOT,
    SOURCES,
    STEP_STAGE,
    TO_USER,
    WAIT_BACK,
    WAIT_FIRST,
    WAIT_PER_SLICE,
    WAIT_RANK,
    WAITS,
)
from headway.exchange.shared import advance, wait_for

__all__ = ["DONE", "MESSAGE", "WAITING", "interpret", "scratch", "warm_up"]

DONE, WAITING, MESSAGE = range(3)
"""Why `interpret` has returned."""

# The interpreter's registers: what it is given, and where it stands.
(
    HEADER, RANK, SIZE, ELEMENT_BYTES, FROM_USER, INTO_USER, KERNEL, DIVISOR, SLICES, PERIODS, COPIES, SPINS, YIELDS,
    PERIOD, STEP, AWAITED, AWAITED_PROGRESS, BUILD,
) = range(18)  # fmt: skip
REGISTERS = 18


def _fingerprint() -> int:
    """A number that changes with the text of every module whose code ends up in the compiled interpreter."""
    digest = hashlib.blake2b(digest_size=7)
    for module in (kernels, lowering, shared):
        digest.update(Path(module.__file__).read_bytes())
    return int.from_bytes(digest.digest(), "little")


def _compile(build: int):
    # Compiled code is kept on disk, and numba looks only at this file to see whether it is still good; but it also
    # tells code apart by the numbers that a function is closed over.
    @compiled(nogil=True)
    def interpret(registers, steps, sources, waits, chunks, strides, windows, bases, needs, seen, addresses):
        """Carry out steps from where `registers` stand; returns DONE, WAITING or MESSAGE.

        windows: address of each rank's window. bases: each rank's counter when the run began. needs: what each rank's
        counter must reach before this rank's window may be written. seen: what each rank's counter has been seen at.
        addresses: scratch. All of them are flat or two-dimensional arrays of int64.
        """
        header, rank, size = registers[HEADER], registers[RANK], registers[SIZE]
        element_bytes, kernel = registers[ELEMENT_BYTES], registers[KERNEL]
        from_user, into_user = registers[FROM_USER], registers[INTO_USER]
        slices, periods, copies = registers[SLICES], registers[PERIODS], registers[COPIES]
        spins, yields = registers[SPINS], registers[YIELDS]
        count = len(steps)
        first = registers[STEP]
        registers[BUILD] = build
        if registers[PERIOD] == 0 and first == 0:
            for peer in range(size):
                if needs[peer] > seen[peer]:
                    seen[peer] = wait_for(header, rank, peer, needs[peer], spins, yields)
                    if needs[peer] > seen[peer]:
                        registers[AWAITED], registers[AWAITED_PROGRESS] = peer, needs[peer]
                        return WAITING
        for period in range(registers[PERIOD], periods):
            for step in range(first, count):
                which = period - steps[step, STEP_STAGE]
                chunk = steps[step, CHUNK]
                offset = which * chunks[chunk, PIECE]
                length = min(chunks[chunk, PIECE], chunks[chunk, LENGTH] - offset)
                if 0 <= which < slices and length > 0:
                    first_wait = steps[step, FIRST_WAIT]
                    for wait in range(first_wait, first_wait + steps[step, WAITS]):
                        if which < waits[wait, WAIT_BACK]:
                            continue
                        peer = waits[wait, WAIT_RANK]
                        target = bases[peer] + which * waits[wait, WAIT_PER_SLICE] + waits[wait, WAIT_FIRST]
                        if seen[peer] < target:
                            seen[peer] = wait_for(header, rank, peer, target, spins, yields)
                            if seen[peer] < target:
                                registers[PERIOD], registers[STEP] = period, step
                                registers[AWAITED], registers[AWAITED_PROGRESS] = peer, target
                                return WAITING
                    kind = steps[step, KIND]
                    if kind in (SEND, RECEIVE):
                        registers[PERIOD], registers[STEP] = period, step
                        return MESSAGE
                    copy = which % copies
                    length_bytes = length * element_bytes
                    first_source, source_count = steps[step, FIRST_SOURCE], steps[step, SOURCES]
                    for position in range(source_count):
                        source = sources[first_source + position, SOURCE_RANK]
                        if source < 0:
                            addresses[position] = from_user + (chunks[chunk, INPUT] + offset) * element_bytes
                        else:
                            slot = sources[first_source + position, SOURCE_SLOT]
                            addresses[position] = windows[source] + copy * strides[source] + slot
                    out = also = 0
                    if steps[step, SLOT] >= 0:
                        out = windows[rank] + copy * strides[rank] + steps[step, SLOT]
                    if steps[step, TO_USER] != 0:
                        also = into_user + (chunks[chunk, OUTPUT] + offset) * element_bytes
                    if out == 0:
                        out, also = also, out
                    if source_count == 1:
                        copy_bytes(out, addresses[0], length_bytes)
                        if also != 0:
                            copy_bytes(also, out, length_bytes)
                    else:
                        divisor = registers[DIVISOR] if steps[step, DIVIDE] != 0 else 1
                        call_kernel(kernel, out, also, addresses.ctypes.data, source_count, length, divisor)
                if steps[step, PUBLISH] != 0:
                    advance(header, rank, size, bases[rank] + period * count + step + 1)
            first = 0
        advance(header, rank, size, bases[rank] + periods * count)
        return DONE

    return interpret


interpret = _compile(_fingerprint())


def warm_up() -> None:
    """Compile the interpreter, or load it from disk, by letting it do nothing."""
    memory = np.zeros(1024, np.int64)
    registers = np.zeros(REGISTERS, np.int64)
    registers[HEADER], registers[SIZE] = memory.ctypes.data, 1
    table, line = np.zeros((0, 1), np.int64), np.zeros(1, np.int64)
    interpret(registers, table, table, table, table, line, line, line, line, line, line)


def scratch(steps: np.ndarray) -> np.ndarray:
    """Room for the addresses of the sources of any one step."""
    return np.zeros(max(1, int(steps[:, SOURCES].max(initial=1))), np.int64)
