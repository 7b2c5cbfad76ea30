"""The steps of all ranks, played in any order that their waits allow: nobody gets stuck, and nothing is read too early
or too late."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.program import Builder, Chunk, Program, even_chunks
from headway.errors import ProgramError
from headway.exchange import lowering
from headway.exchange.lowering import COMBINE, Instructions, cut, instructions, schedule


def lower(
    program: Program, count: int, slice_bytes: int, stages: int, window_bytes: int = 1 << 20
) -> list[Instructions]:
    """Every rank's instructions, all on one machine, elements of 4 bytes."""
    plan = schedule(program, (0,) * program.size)
    return [
        instructions(
            program, plan, rank=rank, members=tuple(range(program.size)), count=count, element_bytes=4,
            window_bytes=window_bytes, slice_bytes=slice_bytes, most_stages=stages,
        )
        for rank in range(program.size)
    ]  # fmt: skip


def play(program: Program, tables: list[Instructions], rng: random.Random) -> dict[tuple[int, int, int], Counter]:
    """Let random ranks make their next step whenever they need not wait. What each has written at the end, for each
    (rank, chunk, slice): how often each rank's contribution is in it.
    """
    size = program.size
    stands, counters = [0] * size, [0] * size
    windows: list[dict[tuple[int, int], tuple[int, int, Counter]]] = [{} for _ in range(size)]
    written: dict[tuple[int, int, int], Counter] = {}

    def ready(rank: int, step: Any, which: int) -> bool:
        table = tables[rank]
        for wait in table.waits[step[lowering.FIRST_WAIT] :][: step[lowering.WAITS]]:
            peer, first, per_slice, back = map(int, wait)
            if which >= back and counters[peer] < which * per_slice + first:
                return False
        return True

    left = [table for table in range(size) if tables[table].totals[table]]
    while left:
        movable = []
        for rank in left:
            table = tables[rank]
            period, index = divmod(stands[rank], len(table.steps))
            step = table.steps[index]
            which = period - int(step[lowering.STEP_STAGE])
            length, piece = (int(table.chunks[step[lowering.CHUNK], at]) for at in (lowering.LENGTH, lowering.PIECE))
            runs = 0 <= which < table.slices and length - which * piece > 0
            if not runs or ready(rank, step, which):
                movable.append((rank, step, which, runs))
        assert movable, "everybody waits"
        rank, step, which, runs = rng.choice(movable)
        table = tables[rank]
        if runs:
            chunk, copy = int(step[lowering.CHUNK]), which % table.copies
            first = int(step[lowering.FIRST_SOURCE])
            result: Counter = Counter()
            for source, slot in table.sources[first : first + int(step[lowering.SOURCES])]:
                if source < 0:
                    assert (rank, chunk, which) not in written, "overwritten before it was read"
                    result[rank] += 1
                    continue
                # What lies there is what was meant: this chunk, this slice.
                found = windows[source][copy, int(slot)]
                assert found[:2] == (chunk, which)
                result.update(found[2])
            if step[lowering.SLOT] >= 0:
                windows[rank][copy, int(step[lowering.SLOT])] = (chunk, which, result)
            if step[lowering.TO_USER]:
                written[rank, chunk, which] = result
        stands[rank] += 1
        # Between two counts that others wait for, the counter may lag behind: the interpreter lets it.
        if step[lowering.PUBLISH] or stands[rank] == table.totals[rank]:
            counters[rank] = stands[rank]
        if stands[rank] == table.totals[rank]:
            left.remove(rank)
    return written


def any_program(size: int, seed: int) -> Program:
    """Any transfers at all: most of them make no sense, and must be carried out all the same."""
    rng = random.Random(seed)
    chunks = tuple(Chunk(weight=rng.randint(1, 5)) for _ in range(rng.randint(1, 3)))
    builder = Builder("any", "all_reduce", [f"rank{rank}" for rank in range(size)], chunks)
    for _ in range(rng.randint(0, 30)):
        source, target = rng.sample(range(size), 2)
        builder.transfer(rng.randrange(len(chunks)), source, target, reduce=rng.random() < 0.6)
    return builder.build()


@settings(deadline=None, max_examples=300)
@given(
    st.integers(2, 5), st.integers(0, 2**32), st.sampled_from([0, 1, 7, 300, 1000]), st.sampled_from([64, 300, 4000]),
    st.integers(1, 5),
)  # fmt: skip
def test_in_any_order_nobody_gets_stuck_and_everybody_reads_what_was_meant(size, seed, count, slice_bytes, stages):
    program = any_program(size, seed)
    places = {(rank, chunk): Counter([rank]) for rank in range(size) for chunk in range(len(program.chunks))}
    changed = set()
    for transfer in program.transfers:
        source, target = places[transfer.source, transfer.chunk], (transfer.target, transfer.chunk)
        places[target] = places[target] + source if transfer.reduce else source
        changed.add(target)

    tables = lower(program, count, slice_bytes, stages)
    written = play(program, tables, random.Random(seed))
    for chunk, (start, stop) in enumerate(cut(program, count)):
        piece = max(1, int(tables[0].chunks[chunk, lowering.PIECE]))
        for rank in range(size):
            found = {which: result for (r, c, which), result in written.items() if (r, c) == (rank, chunk)}
            pieces = range(-(-(stop - start) // piece)) if (rank, chunk) in changed else ()
            assert found == dict.fromkeys(pieces, places[rank, chunk])


def test_a_result_that_comes_early_does_not_overwrite_a_contribution_that_is_read_late():
    builder = Builder("late", "all_reduce", list("abcde"), even_chunks(1))
    for source, target in ((1, 2), (2, 3), (3, 0)):
        builder.transfer(0, source, target, reduce=True)
    builder.transfer(0, 0, 1)
    builder.transfer(0, 4, 0)  # waits for nothing but its place
    program = builder.build()
    for seed in range(20):
        written = play(program, lower(program, 300, 64, 5), random.Random(seed))
        assert written[0, 0, 0] == Counter([4])
        assert written[1, 0, 0] == Counter([0, 1, 2, 3])


def test_contributions_that_meet_at_a_rank_are_one_step():
    builder = Builder("star", "reduce", list("abcd"), even_chunks(1))
    for rank in (1, 2, 3):
        builder.transfer(0, rank, 0, reduce=True)
    steps = schedule(builder.build(), (0,) * 4).steps
    assert [len(one) for one in steps] == [1, 1, 1, 1]
    combine = steps[0][0]
    assert combine.kind == COMBINE
    assert [source and source.rank for source in combine.sources] == [None, 1, 2, 3]
    assert combine.completes


def test_what_nobody_wants_is_not_done():
    builder = Builder("gossip", "reduce", list("abc"), even_chunks(1))
    builder.transfer(0, 1, 2)  # replaces what rank 2 holds, which is never used again
    builder.transfer(0, 1, 0, reduce=True)
    steps = schedule(builder.build(), (0,) * 3).steps
    assert [len(one) for one in steps] == [1, 1, 0]


def test_chunks_are_cut_between_elements_and_leave_none_out():
    builder = Builder("odd", "broadcast", list("ab"), (Chunk(weight=3), Chunk(weight=1), Chunk(weight=3)))
    for count in range(20):
        bounds = cut(builder.build(), count)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == count
        assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))


def test_slices_become_smaller_until_the_window_holds_them_or_it_is_refused():
    builder = Builder("many", "broadcast", list("ab"), even_chunks(64))
    for chunk in range(64):
        builder.transfer(chunk, 0, 1)
    program = builder.build()
    table = lower(program, 1 << 20, 1 << 30, 3, window_bytes=1 << 16)[0]
    assert int(table.strides.max()) * table.copies <= 1 << 16
    with pytest.raises(ProgramError, match="64 chunks are too many"):
        lower(program, 1 << 20, 1 << 30, 3, window_bytes=4096)
