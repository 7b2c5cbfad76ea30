"""The value itself: JSON, the layout of chunks, what is refused, and what the builder lets wait for what."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.program import Builder, Chunk, Program, Transfer, blocks, bus_factor, even_chunks
from headway.errors import FieldError, ProgramError

DEVICES = ("a", "b", "c")


def broadcast() -> Program:
    builder = Builder("line", "broadcast", DEVICES, even_chunks(2))
    for chunk in range(2):
        builder.transfer(chunk, 0, 1)
        builder.transfer(chunk, 1, 2)
    return builder.build()


def test_json_and_yaml_carry_it_unchanged(tmp_path):
    program = broadcast()
    assert Program.from_json(program.to_json()) == program
    assert Program.from_yaml(program.to_yaml()) == program
    program.save(tmp_path / "program.json")
    assert Program.load(tmp_path / "program.json") == program


def test_json_refuses_a_field_that_it_does_not_know():
    text = broadcast().to_json().replace('"chunk"', '"chnuk"', 1)
    with pytest.raises(FieldError, match="chnuk"):
        Program.from_json(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"devices": ()}, "no devices"),
        ({"devices": ("a", "a", "b")}, "two ranks"),
        ({"root": 3}, "no rank 3"),
        ({"chunks": ()}, "no chunks"),
        ({"chunks": (Chunk(weight=0), Chunk())}, "chunks[0]"),
        ({"chunks": (Chunk(owner=7), Chunk())}, "chunks[0]"),
        ({"paths": (("a",), ("b", "c"))}, "leads nowhere"),
        ({"collective": "all_gather"}, "not of one size"),
        ({"transfers": (Transfer(chunk=2, source=0, target=1, path=0),)}, "no chunk 2"),
        ({"transfers": (Transfer(chunk=0, source=0, target=9, path=0),)}, "rank that does not exist"),
        ({"transfers": (Transfer(chunk=0, source=1, target=1, path=0),)}, "to itself"),
        ({"transfers": (Transfer(chunk=0, source=0, target=1, path=5),)}, "no path 5"),
        ({"transfers": (Transfer(chunk=0, source=0, target=1, path=1),)}, "its path goes from b to c"),
        ({"transfers": (Transfer(chunk=0, source=0, target=1, path=0, after=(0,)),)}, "waits for a transfer"),
        ({"transfers": (Transfer(chunk=0, source=0, target=1, path=0, after=(4,)),)}, "waits for a transfer"),
    ],
)
def test_what_contradicts_itself_is_refused(change, told):
    with pytest.raises(ProgramError) as caught:
        msgspec.structs.replace(broadcast(), **change).validate()
    assert told in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 5), weights=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_the_chunks_tile_the_vector(size, weights):
    devices = tuple("abcde"[:size])
    for collective in ("all_gather", "reduce_scatter", "gather", "scatter"):
        program = Builder("none", collective, devices, blocks(size, weights)).build()
        ends = sorted(program.bounds)
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]
        assert ends[-1][1] == program.unit == size * sum(weights)
        block = sum(weights)
        for (start, stop), chunk in zip(program.bounds, program.chunks, strict=True):
            assert chunk.owner * block <= start < stop <= (chunk.owner + 1) * block
    exchange = tuple(
        Chunk(owner=owner, target=target, weight=weight)
        for weight in weights
        for target in range(size)
        for owner in range(size)
    )
    program = Builder("none", "all_to_all", devices, exchange).build()
    for owner in range(size):
        mine = sorted(
            bounds for bounds, chunk in zip(program.bounds, program.chunks, strict=True) if chunk.owner == owner
        )
        assert [start for start, _ in mine] == [0, *(stop for _, stop in mine[:-1])]
        assert mine[-1][1] == program.unit


def test_the_builder_lets_a_transfer_wait_for_whoever_wrote_or_reads_its_places():
    builder = Builder("test", "reduce", DEVICES, even_chunks(1))
    first = builder.transfer(0, 1, 2, reduce=True)
    second = builder.transfer(0, 2, 0, reduce=True)  # reads what the first wrote
    third = builder.transfer(0, 0, 2)  # writes what the second reads
    fourth = builder.transfer(0, 1, 0, reduce=True)  # writes what the third reads
    transfers = builder.build().transfers
    assert [transfer.after for transfer in transfers] == [(), (first,), (second,), (third,)]
    assert fourth == 3


@settings(deadline=None, max_examples=60)
@given(order=st.permutations(range(4)))
def test_in_order_puts_each_transfer_behind_those_it_waits_for(order):
    program = broadcast()
    place = {old: new for new, old in enumerate(order)}
    shuffled = msgspec.structs.replace(
        program,
        transfers=tuple(
            msgspec.structs.replace(
                program.transfers[old], after=tuple(place[other] for other in program.transfers[old].after)
            )
            for old in order
        ),
    )
    mended = shuffled.in_order()
    assert mended.is_in_order
    assert len(mended.transfers) == 4
    for transfer in mended.transfers:
        what = [mended.transfers[other] for other in transfer.after]
        if transfer.source == 1:
            assert [(one.chunk, one.target) for one in what] == [(transfer.chunk, 1)]
        else:
            assert what == []


def test_in_order_refuses_a_circle():
    transfers = (
        Transfer(chunk=0, source=0, target=1, path=0, after=(1,)),
        Transfer(chunk=0, source=1, target=2, path=1, after=(0,)),
    )
    with pytest.raises(ProgramError, match="waits for itself"):
        msgspec.structs.replace(broadcast(), transfers=transfers).in_order()


@pytest.mark.parametrize(
    ("collective", "size", "factor"),
    [("all_reduce", 8, 1.75), ("all_gather", 4, 0.75), ("broadcast", 4, 1.0), ("all_to_all", 2, 0.5), ("reduce", 1, 0)],
)
def test_the_bus_factor_is_that_of_nccl_tests(collective, size, factor):
    assert bus_factor(collective, size) == factor
