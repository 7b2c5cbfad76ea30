"""Real processes that carry programs out, for tests: each runs a case of this file and leaves its result in a folder.

python program_ranks.py CASE RANK SIZE FOLDER
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.collective.algorithms import generate, names
from headway.collective.program import Builder, Chunk, Program, blocks
from headway.errors import ProgramError
from headway.exchange import executor
from headway.exchange.choice import cluster_of
from headway.exchange.executor import Communicator
from headway.exchange.lowering import cut
from headway.exchange.tcp import Mesh

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
)  # fmt: skip


def run_case(case: str, size: int, folder: Path, *, killed: int = -1, timeout_seconds: float = 120) -> list:
    """What each rank's case returned, after all have ended; None for rank `killed`, which must die by SIGKILL."""
    logs = [folder / f"{case}-{rank}.log" for rank in range(size)]
    running = []
    try:
        for rank in range(size):
            command = [sys.executable, "-W", "ignore", __file__, case, str(rank), str(size), str(folder)]
            with logs[rank].open("w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        for process in running:
            process.wait(timeout=timeout_seconds)
    finally:
        for process in running:
            process.kill()
            process.wait()
    for rank, process in enumerate(running):
        expected = -9 if rank == killed else 0
        assert process.returncode == expected, f"rank {rank} of {case}:\n{logs[rank].read_text()[-3000:]}"
    return [None if rank == killed else torch.load(folder / f"{case}-{rank}.pt") for rank in range(size)]


def contribution(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    low = 0 if dtype in (torch.uint8, torch.bool) else -3
    return torch.randint(low, 4, (count,), generator=generator).to(dtype)


def reduced(vectors: list[torch.Tensor], operation: str) -> torch.Tensor:
    """What torch makes of all contributions."""
    dtype = vectors[0].dtype
    wide = torch.stack(vectors).to(torch.float64 if dtype.is_floating_point else torch.int64)
    match operation:
        case "sum":
            return wide.sum(0).to(dtype)
        case "average":
            if dtype.is_floating_point:
                # Divided in what the kernel computes with, rounded once.
                computed = torch.float64 if dtype == torch.float64 else torch.float32
                return (wide.sum(0).to(computed) / len(vectors)).to(dtype)
            return torch.div(wide.sum(0), len(vectors), rounding_mode="trunc").to(dtype)
        case "min":
            return wide.amin(0).to(dtype)
        case "max":
            return wide.amax(0).to(dtype)
        case "product":
            return wide.prod(0).to(dtype)
    combine = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}[operation]
    result = vectors[0]
    for vector in vectors[1:]:
        result = combine(result, vector)
    return result


def wrong_places(program: Program, rank: int, vectors: list[torch.Tensor], found: torch.Tensor, operation: str) -> list:
    """The chunks in which `found` is not what the collective promises to `rank`, by its definition alone."""
    count = found.numel()
    whole = reduced(vectors, operation) if program.reduces else found
    wrong = []
    for chunk, (start, stop) in enumerate(cut(program, count)):
        if not program.ends_with(rank, chunk):
            continue
        what, at = program.chunks[chunk], start
        if program.reduces:
            expected = whole[start:stop]
        elif program.collective in ("broadcast", "scatter"):
            expected = vectors[program.root][start:stop]
        else:
            expected = vectors[what.owner][start:stop]
            if program.collective == "all_to_all":
                at = start + (what.owner - what.target) * (count // program.size)
        if not torch.equal(found[at : at + stop - start], expected):
            wrong.append(chunk)
    return wrong


def check(communicator: Communicator, program: Program, count: int, dtype: torch.dtype, operation: str) -> list[str]:
    """Carry it out; a line for each thing that is wrong."""
    vectors = [contribution(rank, count, dtype) for rank in range(communicator.size)]
    buffer = vectors[communicator.rank].clone()
    communicator.run(program, buffer, operation=operation)
    wrong = wrong_places(program, communicator.rank, vectors, buffer, operation)
    return [f"{program.name} {program.collective} {count} {dtype} {operation}: chunks {wrong}"] if wrong else []


def programs(machines: list[str], *, roots: tuple[int, ...] = (0,)) -> Iterator[Program]:
    """What every generator makes for these ranks."""
    cluster = cluster_of(machines)
    for collective in (
        "broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather", "gather", "scatter", "all_to_all",
    ):  # fmt: skip
        for name in names(collective):
            for root in roots:
                try:
                    yield generate(name, cluster, collective, root=root)
                except ProgramError:
                    continue  # this algorithm does not do this number of ranks
                if collective not in ("broadcast", "reduce", "gather", "scatter"):
                    break


def random_program(size: int, seed: int) -> Program:
    """An all-reduce, reduce, broadcast or reduce-scatter over random trees, with chunks of random weights."""
    rng = random.Random(seed)
    collective: Any = rng.choice(["all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather"])
    root = rng.randrange(size)
    if collective in ("reduce_scatter", "all_gather"):
        chunks = blocks(size, [rng.randint(1, 9) for _ in range(rng.randint(1, 3))])
    else:
        chunks = tuple(Chunk(weight=rng.randint(1, 9)) for _ in range(rng.randint(1, 6)))
    builder = Builder("random", collective, [f"rank{rank}" for rank in range(size)], chunks, root=root)
    for chunk, what in enumerate(chunks):
        top = what.owner if collective in ("reduce_scatter", "all_gather") else root
        if collective == "all_reduce":
            top = rng.randrange(size)
        order = [top, *rng.sample([rank for rank in range(size) if rank != top], size - 1)]
        edges = [(rng.choice(order[:position]), order[position]) for position in range(1, size)]
        if collective != "broadcast" and collective != "all_gather":
            for parent, child in reversed(edges):
                builder.transfer(chunk, child, parent, reduce=True)
        if collective in ("all_reduce", "broadcast", "all_gather"):
            if collective == "all_reduce" and rng.random() < 0.5:
                order = [top, *rng.sample([rank for rank in range(size) if rank != top], size - 1)]
                edges = [(rng.choice(order[:position]), order[position]) for position in range(1, size)]
            for parent, child in edges:
                builder.transfer(chunk, parent, child)
    return builder.build()


def join(rank: int, size: int, folder: Path, machines: list[str] | None = None, timeout_seconds: float = 60.0):
    """This rank's communicator."""
    store = dist.FileStore(str(folder / "store"), size)
    mesh = None
    if machines is not None and len(set(machines)) > 1:
        mesh = Mesh(rank, size, store, machines, timeout_seconds=timeout_seconds, address="127.0.0.1")
    return Communicator(
        rank=rank, size=size, store=store, machines=machines, timeout_seconds=timeout_seconds, transport=mesh
    )


def every_generator(communicator: Communicator, machines: list[str], counts: tuple[int, ...]) -> list[str]:
    """Every generator and collective, on vectors of these sizes."""
    wrong = []
    for number, program in enumerate(programs(machines, roots=(0, communicator.size - 1))):
        for count in counts:
            if program.collective == "all_to_all":
                count -= count % communicator.size
            wrong += check(communicator, program, count, DTYPES[(number + count) % 9], "sum")
    return wrong


def every_dtype(communicator: Communicator) -> list[str]:
    """Every dtype, and every operation on some."""
    wrong = []
    cluster = cluster_of(["here"] * communicator.size)
    for name in ("direct", "ring"):
        program = generate(name, cluster, "all_reduce")
        for dtype in DTYPES[:-1]:
            operations = ["sum"]
            if dtype in (torch.float32, torch.int32):
                operations += ["average", "min", "max", "product"]
            if dtype == torch.int32:
                operations += ["band", "bor", "bxor"]
            for operation in operations:
                wrong += check(communicator, program, 4099, dtype, operation)
    return wrong


def random_ones(communicator: Communicator) -> list[str]:
    """Random programs, one after the other without a pause."""
    wrong = []
    for seed in range(40):
        program = random_program(communicator.size, seed)
        for count in (3, 257, 9001):
            wrong += check(communicator, program, count, torch.float32, "sum")
    return wrong


def bits(communicator: Communicator) -> list[str]:
    """Digests of all-reduces of awkward numbers: in one slice, in many, and again."""
    digests = []
    cluster = cluster_of(["here"] * communicator.size)
    for slice_bytes in (1 << 30, 8192, 8192, 100_000):
        executor._SLICE_BYTES = slice_bytes
        digest = hashlib.sha256()
        for name in ("direct", "ring"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                generator = torch.Generator().manual_seed(communicator.rank)
                vector = torch.randn(50_021, generator=generator).to(dtype)
                communicator.run(generate(name, cluster, "all_reduce"), vector)
                digest.update(vector.view(torch.uint8).numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def case_all(rank: int, size: int, folder: Path) -> list:
    """Everything that ends well, in one start of the processes: (what is wrong, digests)."""
    executor._SLICE_BYTES, executor._MESSAGE_SLICE_BYTES = 16 * 2**10, 32 * 2**10
    machines = ["left" if other < (size + 1) // 2 else "right" for other in range(size)]
    wrong, digests = [], []
    for name, where in (("one", ["here"] * size), ("two", machines)):
        (folder / name).mkdir(exist_ok=True)
        communicator = join(rank, size, folder / name, where)
        counts = (0, 1, 7, 1000, 30011) if name == "one" else (5, 30011)
        wrong += every_generator(communicator, where, counts)
        if name == "one":
            wrong += every_dtype(communicator)
            wrong += random_ones(communicator)
            digests = bits(communicator)
        communicator.close()
    return [wrong, digests]


def until_it_fails(communicator: Communicator, count: int) -> tuple[str, str, float]:
    """(kind of the error, its text, seconds since the epoch) of what ends an endless series of all-reduces."""
    program = generate("direct", cluster_of(list(map(str, communicator._machines))), "all_reduce")
    vector = torch.ones(count)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            communicator.run(program, vector)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            found = (type(error).__name__, str(error), time.time())
            communicator.close()
            return found
        vector.fill_(1.0)
    return ("none", "", time.time())


def _kill_oneself(folder: Path) -> None:
    time.sleep(0.5)
    (folder / "killed").write_text(str(time.time()))
    os.kill(os.getpid(), 9)


def case_killed(rank: int, size: int, folder: Path) -> tuple[str, str, float]:
    """Rank 1 dies by SIGKILL in the middle of an all-reduce."""
    communicator = join(rank, size, folder)
    if rank == 1:
        threading.Thread(target=_kill_oneself, args=(folder,)).start()
    return until_it_fails(communicator, 1 << 20)


def case_killed_elsewhere(rank: int, size: int, folder: Path) -> tuple[str, str, float]:
    """The same on two machines."""
    communicator = join(rank, size, folder, ["left"] * 2 + ["right"] * (size - 2))
    if rank == 1:
        threading.Thread(target=_kill_oneself, args=(folder,)).start()
    return until_it_fails(communicator, 1 << 18)


def main() -> None:
    case, rank, size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    torch.save(globals()[f"case_{case}"](rank, size, folder), folder / f"{case}-{rank}.pt")


if __name__ == "__main__":
    main()
