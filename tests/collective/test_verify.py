"""What is proven right is right in every order, and what is wrong is named."""

from __future__ import annotations

import random
from collections import deque

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.algorithms import ALGORITHMS, generate
from headway.collective.program import Builder, Chunk, Program, Transfer, blocks, even_chunks
from headway.collective.reference import evaluate, expected
from headway.collective.verify import verify
from headway.errors import ProgramError
from headway.hardware.catalog import load_cluster

DEVICES = ("a", "b", "c", "d")
MACHINE = load_cluster("dgx-1v")


def program_of(collective, chunks, transfers, *, size=3, root=0) -> Program:
    """A program from (chunk, source, target, reduce, after) tuples, over paths without switches."""
    paths = {}
    return Program(
        name="test",
        collective=collective,
        devices=DEVICES[:size],
        chunks=chunks,
        transfers=tuple(
            Transfer(
                chunk=chunk,
                source=source,
                target=target,
                path=paths.setdefault((DEVICES[source], DEVICES[target]), len(paths)),
                reduce=reduce,
                after=after,
            )
            for chunk, source, target, reduce, after in transfers
        ),
        paths=tuple(paths),
        root=root,
    )


# An independent judge: no vector clocks, no bit sets, no theorems; small programs only.


def closure(program: Program) -> np.ndarray:
    """[i, j]: transfer j waits for i, by way of any others."""
    count = len(program.transfers)
    before = np.zeros((count, count), dtype=bool)
    for position, transfer in enumerate(program.transfers):
        before[list(transfer.after), position] = True
    for middle in range(count):
        before |= np.outer(before[:, middle], before[middle])
    return before


def has_race(program: Program) -> bool:
    before = closure(program)
    for i, one in enumerate(program.transfers):
        for j, other in enumerate(program.transfers[:i]):
            touches = one.chunk == other.chunk and (
                one.target == other.target or one.target == other.source or one.source == other.target
            )
            if touches and not before[i, j] and not before[j, i]:
                return True
    return False


def gets_stuck(program: Program, slots: int) -> bool:
    """Whether ranks that carry out their lists in order come to a stop before the end."""
    todo = [
        deque(at for at, transfer in enumerate(program.transfers) if rank in (transfer.source, transfer.target))
        for rank in range(program.size)
    ]
    fifos: dict[tuple[int, int], list[int]] = {}
    arrived: set[int] = set()
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(todo):
            if not mine:
                continue
            at = mine[0]
            transfer = program.transfers[at]
            fifo = fifos.setdefault((transfer.source, transfer.target), [])
            if rank == transfer.source:
                if len(fifo) < slots and arrived.issuperset(transfer.after):
                    fifo.append(mine.popleft())
                    moved = True
            elif fifo and fifo[0] == at:
                arrived.add(fifo.pop(0))
                mine.popleft()
                moved = True
    return any(todo)


def play(program: Program, vectors, rng: random.Random):
    """Start and finish transfers in a random order that `after` allows: reads at the start, writes at the end."""
    chunk_values = {
        (rank, chunk): vectors[rank][chunk]
        for chunk in range(len(program.chunks))
        for rank in range(program.size)
        if program.starts_with(rank, chunk)
    }
    waits = [set(transfer.after) for transfer in program.transfers]
    pending = set(range(len(waits)))
    flying: dict[int, float] = {}
    while pending or flying:
        ready = sorted(at for at in pending if not waits[at])
        choices = [("start", at) for at in ready] + [("end", at) for at in flying]
        if not choices:
            return None  # a circle
        what, at = rng.choice(choices)
        transfer = program.transfers[at]
        if what == "start":
            if (transfer.source, transfer.chunk) not in chunk_values:
                return None
            flying[at] = chunk_values[transfer.source, transfer.chunk]
            pending.remove(at)
            continue
        value = flying.pop(at)
        goal = (transfer.target, transfer.chunk)
        if transfer.reduce:
            if goal not in chunk_values:
                return None
            value = chunk_values[goal] + value
        chunk_values[goal] = value
        for other in waits:
            other.discard(at)
    return {
        place: chunk_values.get(place)
        for place in ((rank, chunk) for rank in range(program.size) for chunk in range(len(program.chunks)))
        if program.ends_with(*place)
    }


def is_right(program: Program, slots: int, seed: int) -> bool:
    try:
        program.validate()
    except ProgramError:
        return False
    if len(program.transfers) and bool(np.diag(closure(program)).any()):
        return False
    if has_race(program) or gets_stuck(program, slots):
        return False
    rng = random.Random(seed)
    # Sums of distinct large integers: another multiset of contributions gives another sum.
    exact = [[rng.getrandbits(200) for _ in program.chunks] for _ in range(program.size)]
    found = play(program, exact, rng)
    if found is None:
        return False
    for (_, chunk), value in found.items():
        what = program.chunks[chunk]
        origin = program.root if program.collective in ("broadcast", "scatter") else what.owner
        right = sum(vector[chunk] for vector in exact) if program.reduces else exact[origin][chunk]
        if value != right:
            return False
    return True


def says_right(program: Program, slots: int = 2) -> bool:
    try:
        verify(program, slots=slots)
    except ProgramError:
        return False
    return True


@st.composite
def small_programs(draw) -> Program:
    name = draw(st.sampled_from(sorted(set(ALGORITHMS) & {"ring", "tree", "binomial", "halving-doubling", "direct"})))
    collective = draw(st.sampled_from(ALGORITHMS[name].collectives))
    size = draw(st.integers(2, 4))
    devices = draw(st.permutations([device.name for device in MACHINE.devices]))[:size]
    return generate(name, MACHINE, collective, devices, root=draw(st.integers(0, size - 1)))


def without(program: Program, gone: int) -> tuple[Transfer, ...]:
    """The transfers but one; who waited for it waits for what it waited for."""
    kept = []
    for position, transfer in enumerate(program.transfers):
        after = set(transfer.after)
        if gone in after:
            after = (after - {gone}) | set(program.transfers[gone].after)
        if position != gone:
            moved = sorted(other - (other > gone) for other in after)
            kept.append(msgspec.structs.replace(transfer, after=tuple(moved)))
    return tuple(kept)


@st.composite
def mutants(draw) -> Program:
    program = draw(small_programs())
    paths = list(program.paths)
    kinds = ["remove", "wait", "swap", "duplicate", "redirect", "flip", "chunk", "order", "circle"]
    kind = draw(st.sampled_from(kinds))
    transfers = list(program.transfers)
    at = draw(st.integers(0, len(transfers) - 1))
    one = transfers[at]
    if kind == "remove":
        transfers = list(without(program, at))
    elif kind == "wait":
        waiting = [position for position, transfer in enumerate(transfers) if transfer.after]
        if waiting:
            at = draw(st.sampled_from(waiting))
            gone = draw(st.sampled_from(transfers[at].after))
            after = tuple(other for other in transfers[at].after if other != gone)
            transfers[at] = msgspec.structs.replace(transfers[at], after=after)
    elif kind == "swap":  # what is done, leaving the waits where they are
        other = draw(st.integers(0, len(transfers) - 1))
        two = transfers[other]
        transfers[at] = msgspec.structs.replace(two, after=one.after)
        transfers[other] = msgspec.structs.replace(one, after=two.after)
    elif kind == "duplicate":
        transfers.append(msgspec.structs.replace(one, after=draw(st.sampled_from([one.after, (at,), ()]))))
    elif kind == "redirect":
        source, target = draw(st.permutations(range(program.size)))[:2]
        if draw(st.booleans()):
            source = one.source if one.source != target else source
        path = (program.devices[source], program.devices[target])
        if path not in paths:
            paths.append(path)
        transfers[at] = msgspec.structs.replace(one, source=source, target=target, path=paths.index(path))
    elif kind == "flip":
        transfers[at] = msgspec.structs.replace(one, reduce=not one.reduce)
    elif kind == "chunk":
        chunk = draw(st.integers(0, len(program.chunks) - 1))
        transfers[at] = msgspec.structs.replace(one, chunk=chunk)
    elif kind == "order":  # the same waits, listed in another order
        order = draw(st.permutations(range(len(transfers))))
        place = {old: new for new, old in enumerate(order)}
        transfers = [
            msgspec.structs.replace(transfers[old], after=tuple(place[other] for other in transfers[old].after))
            for old in order
        ]
    else:
        others = [position for position in range(len(transfers)) if position != at]
        if others:
            after = (*one.after, draw(st.sampled_from(others)))
            transfers[at] = msgspec.structs.replace(one, after=after)
    return msgspec.structs.replace(program, transfers=tuple(transfers), paths=tuple(paths))


@settings(deadline=None, max_examples=400)
@given(program=mutants(), slots=st.integers(1, 2), seed=st.integers(0, 2**32))
def test_the_verdict_on_a_mutant_is_that_of_brute_force(program, slots, seed):
    assert says_right(program, slots) == is_right(program, slots, seed)


@settings(deadline=None, max_examples=60)
@given(program=mutants(), seed=st.integers(0, 2**32))
def test_what_is_proven_right_gives_the_same_bits_in_every_order(program, seed):
    if not says_right(program):
        return
    rng = random.Random(seed)
    vectors = [[rng.uniform(-1, 1) * 10 ** rng.uniform(-8, 8) for _ in program.chunks] for _ in range(program.size)]
    results = [play(program, vectors, rng) for _ in range(6)]
    assert results[0] is not None
    assert all(result == results[0] for result in results)


@settings(deadline=None, max_examples=60)
@given(program=small_programs(), data=st.data())
def test_no_transfer_of_a_generated_program_can_be_left_out(program, data):
    gone = data.draw(st.integers(0, len(program.transfers) - 1))
    mutant = msgspec.structs.replace(program, transfers=without(program, gone))
    with pytest.raises(ProgramError):
        verify(mutant)


@settings(deadline=None, max_examples=40)
@given(program=small_programs())
def test_a_list_in_order_never_gets_stuck_even_with_one_buffer(program):
    assert program.is_in_order
    assert not gets_stuck(program, 1)
    verify(program, slots=1)


def test_the_report_says_how_far_and_how_much():
    program = program_of(
        "all_reduce",
        even_chunks(1),
        [(0, 0, 1, True, ()), (0, 1, 2, True, (0,)), (0, 2, 1, False, (1,)), (0, 1, 0, False, (2,))],
    )
    report = verify(program)
    assert (report.steps, report.transfers, report.ranks) == (4, 4, 3)
    assert report.sent == (1.0, 2.0, 1.0)
    assert report.received == (1.0, 2.0, 1.0)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            program_of("broadcast", even_chunks(1), [(0, 0, 1, False, ()), (0, 1, 2, False, ())]),
            ["transfers[0] and transfers[1] write and read chunk 0 at rank 1"],
        ),
        (
            program_of("broadcast", even_chunks(1), [(0, 1, 2, False, ()), (0, 0, 1, False, ())]),
            ["reads chunk 0 at rank 1, where nothing has been written", "transfers[0]"],
        ),
        (
            program_of("reduce", even_chunks(1), [(0, 1, 0, True, ()), (0, 2, 0, True, ())]),
            ["both write chunk 0 at rank 0", "`after` must lead to 0"],
        ),
        (
            program_of(
                "broadcast", even_chunks(1), [(0, 0, 1, False, ()), (0, 1, 2, False, (0,)), (0, 0, 1, False, (0,))]
            ),
            ["transfers[1] and transfers[2] read and write chunk 0 at rank 1"],
        ),
        (
            program_of("reduce", even_chunks(2), [(0, 1, 0, True, ()), (1, 1, 0, True, ()), (1, 2, 0, True, (1,))]),
            ["rank 0, chunk 0", "without the data of rank 2", "last written by transfers[0]"],
        ),
        (
            program_of("reduce", even_chunks(1), [(0, 1, 0, True, ()), (0, 1, 0, True, (0,))], size=2),
            ["more than one contribution of rank 1"],
        ),
        (
            program_of("all_gather", blocks(2), [(0, 0, 1, False, ())], size=2),
            ["rank 0, chunk 1", "without the data of rank 1", "which nobody writes"],
        ),
        (
            program_of(
                "broadcast", even_chunks(1), [(0, 0, 1, False, (1,)), (0, 0, 2, False, (2,)), (0, 1, 2, False, (0,))]
            ),
            ["waits for itself: 0 after 1 after 2 after 0"],
        ),
    ],
)
def test_errors_name_the_rank_the_chunk_and_the_transfer(program, told):
    with pytest.raises(ProgramError) as caught:
        verify(program)
    for words in told:
        assert words in str(caught.value)


def test_ranks_that_wait_for_each_other_are_named():
    # Rank 1 is to send on before it receives.
    program = program_of("broadcast", even_chunks(1), [(0, 1, 2, False, (1,)), (0, 0, 1, False, ())])
    with pytest.raises(ProgramError, match=r"rank 1 waits for transfers\[1\] to arrive, to send") as caught:
        verify(program)
    assert "in_order" in caught.value.remedy
    verify(program.in_order())


def test_more_buffers_than_the_pipeline_is_long_do_not_get_stuck():
    # Rank 0 sends all chunks before it receives the one that rank 1 sends first of all.
    chunks = (Chunk(owner=0), Chunk(owner=0), Chunk(owner=1), Chunk(owner=1))
    listed = [
        (2, 1, 0, False, (2,)),
        (3, 1, 0, False, ()),
        (0, 0, 1, False, ()),
        (1, 0, 1, False, ()),
    ]
    program = program_of("all_gather", chunks, listed, size=2)
    with pytest.raises(ProgramError, match="stuck"):
        verify(program)
    verify(program.in_order())


@pytest.mark.parametrize("slots", [0, -1])
def test_a_fifo_needs_a_buffer(slots):
    with pytest.raises(ProgramError, match="carry nothing"):
        verify(program_of("broadcast", even_chunks(1), [(0, 0, 1, False, ())], size=2), slots=slots)


def test_waits_by_way_of_others_are_found_across_batches():
    # All transfers in one long line: each waits for the one before it alone, whatever place it touches.
    count = 6000
    builder = Builder("line", "broadcast", ("a", "b", "c"), even_chunks(count))
    for chunk in range(count):
        builder.transfer(chunk, 0, 1)
    for chunk in range(count):
        builder.transfer(chunk, 1, 2)
    program = builder.build()
    line = tuple(
        msgspec.structs.replace(transfer, after=(at - 1,) if at else ())
        for at, transfer in enumerate(program.transfers)
    )
    verify(msgspec.structs.replace(program, transfers=line))
    cut = list(line)
    cut[count] = msgspec.structs.replace(cut[count], after=())
    with pytest.raises(ProgramError, match=rf"transfers\[0\] and transfers\[{count}\] write and read"):
        verify(msgspec.structs.replace(program, transfers=tuple(cut)))


def test_the_plain_reading_agrees_with_the_definition_of_each_collective():
    rng = np.random.default_rng(0)
    for collective in ALGORITHMS["direct"].collectives:
        program = generate("direct", MACHINE, collective, ["node0/gpu2", "node0/gpu0", "node0/gpu5"], root=1)
        length = program.unit * (2 if collective not in ("all_gather", "gather") else 1)
        vectors = [rng.integers(-99, 99, length) for _ in range(3)]
        found, right = evaluate(program, vectors), expected(program, vectors)
        assert [None if one is None else one.tolist() for one in found] == [
            None if one is None else one.tolist() for one in right
        ]
