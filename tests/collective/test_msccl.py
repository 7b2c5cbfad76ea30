"""The XML is what the public parsers accept, and thread blocks that carry it out do the collective.

The rules checked are those of microsoft/msccl (`src/graph/topo.cc`, `src/include/msccl.h`) and of
Azure/msccl-executor-nccl (`src/misc/msccl/msccl_parser.cc`, `src/include/msccl/msccl_struct.h`).
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.algorithms import ALGORITHMS, generate, names
from headway.collective.msccl import to_msccl
from headway.collective.program import Builder, Chunk, even_chunks
from headway.errors import ProgramError
from headway.hardware.catalog import load_cluster

DGX_1 = load_cluster("dgx-1v")
TWO = load_cluster("dgx-a100:2")

LIMITS = {"msccl": (256, 216), "executor": (64, 1024)}  # steps of a thread block, thread blocks
COLLECTIVES = {
    "msccl": {"allreduce", "allgather", "reduce", "broadcast", "alltoall", "reduce_scatter", "custom"},
    "executor": {
        "reduce", "broadcast", "allreduce", "reducescatter", "allgather", "send", "recv", "gather", "scatter",
        "alltoall", "alltoallv",
    },
}  # fmt: skip
KINDS = {"s", "r", "rcs", "rrs", "rrc", "rrcs", "cpy", "re", "nop"}


class Element(NamedTuple):
    name: str
    attributes: dict[str, str]
    children: list


def read_xml(text: str) -> Element:
    """As the parsers read: no declaration, one space between attributes, double quotes, at most 255 characters."""
    top = Element("", {}, [])
    stack = [top]
    position = 0
    token = re.compile(r'\s*<(/?)([a-z]+)((?: [A-Za-z_]+="[^"]*")*)(/?)>')
    while text[position:].strip():
        match = token.match(text, position)
        assert match, text[position : position + 80]
        position = match.end()
        closing, name, attributes, single = match.groups()
        if closing:
            assert stack.pop().name == name
            continue
        pairs = re.findall(r' ([A-Za-z_]+)="([^"]*)"', attributes)
        assert len(pairs) <= 16
        assert all(len(value) <= 255 for _, value in pairs)
        element = Element(name, dict(pairs), [])
        assert len(stack[-1].children) < 1024
        stack[-1].children.append(element)
        if not single:
            stack.append(element)
    assert len(stack) == 1
    (algorithm,) = top.children
    return algorithm


class Step(NamedTuple):
    kind: str
    source: tuple[str, int]
    target: tuple[str, int]
    count: int
    waits: list[tuple[int, int]]
    index: int
    announces: bool


class Block(NamedTuple):
    send: int
    receive: int
    channel: int
    steps: list[Step]


class Gpu(NamedTuple):
    sizes: dict[str, int]
    blocks: list[Block]


def parse(text: str, parser: str) -> tuple[dict[str, str], list[Gpu]]:
    """What the parsers make of the text, with an assertion wherever they would refuse or misread it."""
    most_steps, most_blocks = LIMITS[parser]
    algorithm = read_xml(text)
    top = algorithm.attributes
    assert algorithm.name == "algo"
    assert len(top["name"]) <= 63
    assert top["proto"] in ("Simple", "LL", "LL128")
    assert top["coll"] in COLLECTIVES[parser]
    assert {top["inplace"], top["outofplace"]} <= {"0", "1"}
    assert 0 <= int(top["minBytes"]) <= int(top["maxBytes"]) < 2**63
    size, loop, channels = int(top["ngpus"]), int(top["nchunksperloop"]), int(top["nchannels"])
    assert 1 <= channels <= 32
    inputs, outputs = (size if top["coll"] == "allgather" else 1), (size if top["coll"] == "reduce_scatter" else 1)
    gpus = []
    for rank, gpu in enumerate(algorithm.children):
        assert gpu.name == "gpu"
        assert int(gpu.attributes["id"]) == rank
        sizes = {letter: int(gpu.attributes[f"{letter}_chunks"]) for letter in "ios"}
        assert all(0 <= count < 2**15 for count in sizes.values())
        if parser == "msccl":
            assert sizes["i"] == 0 or sizes["i"] * inputs == loop
            assert sizes["o"] == 0 or sizes["o"] * outputs == loop
        assert len(gpu.children) <= most_blocks
        assert 1 + size + len(gpu.children) + sum(len(block.children) for block in gpu.children) < 4096
        blocks = []
        used = set()
        for number, block in enumerate(gpu.children):
            send, receive, channel = (int(block.attributes[key]) for key in ("send", "recv", "chan"))
            assert int(block.attributes["id"]) == number < 128
            assert -1 <= send < size
            assert -1 <= receive < size
            assert rank not in (send, receive)
            assert 0 <= channel < channels
            for end in (("send", send, channel), ("receive", receive, channel)):
                assert end[1] == -1 or end not in used  # one thread block for each end of a connection
                used.add(end)
            assert len(block.children) <= most_steps
            steps: list[Step] = []
            waits: list[tuple[int, int]] = []
            for index, step in enumerate(block.children):
                text_of = step.attributes
                values = {key: int(value) for key, value in text_of.items() if re.fullmatch(r"-?[0-9]+", value)}
                kind, source, target = text_of["type"], text_of["srcbuf"], text_of["dstbuf"]
                assert step.name == "step"
                assert values["s"] == index
                assert kind in KINDS
                assert {source, target} <= set("ios")
                if values["depid"] >= 0:
                    assert values["depid"] != number
                    waits.append((values["depid"], values["deps"]))
                if kind == "nop":
                    assert values["hasdep"] == 0
                    continue
                # A chain of waits must end at the step that they are for.
                assert not waits or values["depid"] >= 0
                assert 1 <= values["cnt"] < 72
                assert send >= 0 or kind not in ("s", "rcs", "rrs", "rrcs")
                assert receive >= 0 or kind not in ("r", "rcs", "rrs", "rrc", "rrcs")
                steps.append(
                    Step(
                        kind,
                        (source, values["srcoff"]),
                        (target, values["dstoff"]),
                        values["cnt"],
                        waits,
                        index,
                        bool(values["hasdep"]),
                    )
                )
                waits = []
            assert not waits
            blocks.append(Block(send, receive, channel, steps))
        for channel in range(channels):
            for side in ("send", "receive"):
                assert sum(1 for one, peer, at in used if (one, at) == (side, channel) and peer >= 0) <= 32
        for block in blocks:
            for step in block.steps:
                for other, index in step.waits:
                    awaited = [one for one in blocks[other].steps if one.index == index]
                    assert awaited
                    assert awaited[0].announces
        gpus.append(Gpu(sizes, blocks))
    assert len(gpus) == size
    return top, gpus


def carry_out(program, text: str, parser: str, *, in_place: bool, slots: int, seed: int) -> None:
    """Run the thread blocks in a random order on sets of contributions (as sums of distinct large numbers)."""
    top, gpus = parse(text, parser)
    rng = random.Random(seed)
    size, collective = program.size, program.collective
    loop = int(top["nchunksperloop"])
    whole = loop * size if collective in ("gather", "scatter") else loop
    block = whole // size
    gathers, scatters = collective in ("all_gather", "gather"), collective in ("reduce_scatter", "scatter")
    memory: list[dict[str, list]] = []
    for rank, gpu in enumerate(gpus):
        fill = [rng.getrandbits(200) for _ in range(block if gathers else whole)]
        brings = program.reduces or gathers or collective == "all_to_all" or rank == program.root
        space = {"i": fill if brings else [None] * len(fill), "s": [None] * gpu.sizes["s"]}
        space["o"] = [None] * (block if scatters else whole)
        memory.append(space)
    inputs = [list(space["i"]) for space in memory]

    def cell(rank: int, buffer: str, offset: int) -> tuple[list, int]:
        assert 0 <= offset < gpus[rank].sizes[buffer], (rank, buffer, offset)
        if in_place and buffer == "o":
            if gathers:
                return memory[rank]["o"], offset
            return memory[rank]["i"], offset + (rank * block if scatters else 0)
        if in_place and buffer == "i" and gathers:
            return memory[rank]["o"], offset + rank * block
        return memory[rank][buffer], offset

    if in_place and gathers:
        for rank in range(size):
            memory[rank]["o"][rank * block : (rank + 1) * block] = inputs[rank]
    connections: dict[tuple[int, int, int], list] = {}
    done = [[0] * len(gpu.blocks) for gpu in gpus]
    over: set[tuple[int, int, int]] = set()  # rank, thread block, step: flags that were raised

    def advance(rank: int, number: int) -> bool:
        mine = gpus[rank].blocks[number]
        step = mine.steps[done[rank][number]]
        for other, index in step.waits:
            # A flag tells of the last announced step, and says no more of earlier ones.
            if not any((rank, other, later) in over for later in range(index, 256)):
                return False
        incoming = connections.setdefault((mine.receive, rank, mine.channel), [])
        outgoing = connections.setdefault((rank, mine.send, mine.channel), [])
        if (step.kind in ("r", "rrc") and not incoming) or (step.kind == "s" and len(outgoing) == slots):
            return False
        data = incoming.pop(0) if step.kind in ("r", "rrc") else None
        if data is not None:
            assert len(data) == step.count
        sent = []
        for at in range(step.count):
            if step.kind == "s":
                where, offset = cell(rank, step.source[0], step.source[1] + at)
                assert where[offset] is not None
                sent.append(where[offset])
                continue
            if step.kind in ("rrc", "cpy"):
                where, offset = cell(rank, step.source[0], step.source[1] + at)
                assert where[offset] is not None
                value = where[offset] + (data[at] if data is not None else 0)
            else:
                assert step.kind == "r"
                assert data is not None
                value = data[at]
            where, offset = cell(rank, step.target[0], step.target[1] + at)
            where[offset] = value
        if step.kind == "s":
            outgoing.append(sent)
        if step.announces:
            over.add((rank, number, step.index))
        done[rank][number] += 1
        return True

    alive = [(rank, number) for rank, gpu in enumerate(gpus) for number, one in enumerate(gpu.blocks) if one.steps]
    while alive:
        rng.shuffle(alive)
        moved = [one for one in alive if advance(*one)]
        assert moved, "stuck"
        alive = [(rank, at) for rank, at in alive if done[rank][at] < len(gpus[rank].blocks[at].steps)]
    for rank in range(size):
        if collective in ("reduce", "gather") and rank != program.root:
            continue
        length = block if scatters else whole
        gpus[rank].sizes["o"] = length  # a rank whose output nobody wrote may have declared none
        found = []
        for offset in range(length):
            where, at = cell(rank, "o", offset)
            found.append(where[at])
        mine = slice(rank * block, (rank + 1) * block)
        sums = [sum(column) for column in zip(*inputs, strict=True)] if program.reduces else []
        match collective:
            case "reduce" | "all_reduce":
                expected = sums
            case "reduce_scatter":
                expected = sums[mine]
            case "broadcast":
                expected = inputs[program.root]
            case "scatter":
                expected = inputs[program.root][mine]
            case "all_to_all":
                expected = [value for one in inputs for value in one[mine]]
            case _:
                expected = [value for one in inputs for value in one]
        assert found == expected


@st.composite
def programs(draw):
    cluster = draw(st.sampled_from([DGX_1, TWO]))
    collective = draw(st.sampled_from(["broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather",
                                       "gather", "scatter", "all_to_all"]))  # fmt: skip
    name = draw(st.sampled_from([name for name in names(collective) if "blink" not in name]))
    size = draw(st.integers(1, 5))
    devices = draw(st.permutations([device.name for device in cluster.devices]))[:size]
    return generate(name, cluster, collective, devices, root=draw(st.integers(0, size - 1)))


@settings(deadline=None, max_examples=120)
@given(program=programs(), data=st.data())
def test_what_the_thread_blocks_do_is_the_collective(program, data):
    parser = "executor" if program.collective in ("gather", "scatter") else data.draw(st.sampled_from(list(LIMITS)))
    in_place = program.collective != "all_to_all" and data.draw(st.booleans())
    channels = data.draw(st.sampled_from([None, 1, 2]))
    try:
        text = to_msccl(program, parser=parser, in_place=in_place, channels=channels)
    except ProgramError as error:
        assert channels is not None
        assert "limits" in str(error)  # noqa: PT017
        return
    carry_out(program, text, parser, in_place=in_place, slots=1, seed=data.draw(st.integers(0, 2**32)))


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.integers(1, 200), min_size=1, max_size=4), scale=st.integers(1, 5), seed=st.integers(0, 2**32)
)
def test_unequal_chunks_become_multiples_of_a_unit(weights, scale, seed):
    builder = Builder("line", "all_reduce", ("a", "b", "c"), [Chunk(weight=weight * scale) for weight in weights])
    for chunk in range(len(weights)):
        builder.transfer(chunk, 0, 1, reduce=True)
        builder.transfer(chunk, 1, 2, reduce=True)
        builder.transfer(chunk, 2, 1)
        builder.transfer(chunk, 1, 0)
    program = builder.build()
    text = to_msccl(program)
    top, _ = parse(text, "msccl")
    assert sum(weights) % int(top["nchunksperloop"]) == 0
    carry_out(program, text, "msccl", in_place=bool(seed % 2), slots=2, seed=seed)


@pytest.mark.parametrize("spec", ["dgx-1v", "mi300x-8", "dgx-a100:2"])
@pytest.mark.parametrize("name", ["ring", "tree", "halving-doubling", "hierarchical", "torus", "direct", "packed"])
def test_whole_machines_fit_into_the_older_parser(spec, name):
    cluster = load_cluster(spec)
    for collective in ALGORITHMS[name].collectives:
        if collective in ("gather", "scatter"):
            continue
        parse(to_msccl(generate(name, cluster, collective)), "msccl")


def test_more_channels_shorten_the_thread_blocks():
    builder = Builder("long", "broadcast", ("a", "b"), even_chunks(200))
    for chunk in range(200):
        builder.transfer(chunk, 0, 1)
    program = builder.build()
    assert parse(to_msccl(program), "msccl")[0]["nchannels"] == "1"
    assert parse(to_msccl(program, parser="executor"), "executor")[0]["nchannels"] == "4"
    with pytest.raises(ProgramError, match="200 steps in a thread block, and 64 are allowed"):
        to_msccl(program, parser="executor", channels=1)


def test_a_list_out_of_order_is_put_in_order():
    program = generate("ring", DGX_1, "broadcast", ["node0/gpu0", "node0/gpu1", "node0/gpu2"])
    count = len(program.transfers)
    turned = msgspec.structs.replace(
        program,
        transfers=tuple(
            msgspec.structs.replace(transfer, after=tuple(count - 1 - other for other in transfer.after))
            for transfer in reversed(program.transfers)
        ),
    )
    carry_out(turned, to_msccl(turned), "msccl", in_place=True, slots=1, seed=0)


def test_the_older_parser_knows_no_gather():
    with pytest.raises(ProgramError, match="gather") as caught:
        to_msccl(generate("direct", DGX_1, "gather"))
    assert "executor" in caught.value.remedy


def test_offsets_that_do_not_fit_are_refused():
    chunks = (Chunk(weight=1), Chunk(weight=40_000))
    builder = Builder("heavy", "broadcast", ("a", "b"), chunks)
    builder.transfer(0, 0, 1)
    builder.transfer(1, 0, 1)
    with pytest.raises(ProgramError, match="40001 unit chunks"):
        to_msccl(builder.build())


def test_a_name_cannot_break_out_of_its_attribute():
    program = msgspec.structs.replace(generate("direct", DGX_1, "all_reduce"), name='x" coll="evil' + "y" * 300)
    top, _ = parse(to_msccl(program), "msccl")
    assert top["coll"] == "allreduce"


@pytest.mark.parametrize(
    "bad", [{"channels": 0}, {"channels": 33}, {"min_bytes": 9, "max_bytes": 8}, {"min_bytes": -1}]
)
def test_bounds_that_cannot_be_are_refused(bad):
    with pytest.raises(ProgramError, match="MSCCL"):
        to_msccl(generate("direct", DGX_1, "all_reduce"), **bad)
