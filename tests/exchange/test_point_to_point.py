"""Programs over torch's batched point-to-point do what the programs say: compared with the reference, over gloo.

Three real processes carry out every program that the test draws up, on the same vectors as `collective.reference`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from headway.collective.algorithms import generate, names
from headway.collective.program import Builder, Collective, Program, even_chunks
from headway.collective.reference import evaluate
from headway.errors import InputError
from headway.exchange.choice import cluster_of
from headway.exchange.point_to_point import levels, run_program

SIZE = 3
ALGORITHMS = ("direct", "ring", "tree", "binomial", "halving-doubling", "hierarchical")
COLLECTIVES: tuple[Collective, ...] = (
    "broadcast",
    "reduce",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "gather",
    "scatter",
    "all_to_all",
)


def _programs() -> list[Program]:
    cluster = cluster_of(["a", "a", "b"])
    found = []
    for collective in COLLECTIVES:
        for name in names(collective):
            if name in ALGORITHMS:
                roots = range(SIZE) if collective in ("broadcast", "reduce", "gather", "scatter") else (0,)
                found += [generate(name, cluster, collective, root=root) for root in roots]
    return found


def _vectors(program: Program, scale: int) -> list[np.ndarray]:
    """What each rank brings, as of `collective.reference`: whole numbers, so that sums are exact in any order."""
    gathers = program.collective in ("all_gather", "gather")
    length = (program.unit // program.size if gathers else program.unit) * scale
    generator = np.random.default_rng(3)
    return [generator.integers(-50, 50, length).astype(np.float64) for _ in range(SIZE)]


def _buffer(program: Program, rank: int, vectors: list[np.ndarray]) -> torch.Tensor:
    """The whole vector as the rank must lay it out: its block where the collective gathers."""
    if program.collective not in ("all_gather", "gather"):
        return torch.from_numpy(vectors[rank].copy())
    length = len(vectors[rank])
    whole = torch.full((length * SIZE,), float("nan"), dtype=torch.float64)
    whole[rank * length : (rank + 1) * length] = torch.from_numpy(vectors[rank])
    return whole


def _result(program: Program, rank: int, buffer: torch.Tensor) -> torch.Tensor:
    if program.collective in ("reduce_scatter", "scatter"):
        return buffer.view(SIZE, -1)[rank]
    return buffer


def _run_all(rank: int) -> dict[str, Any]:
    wrong, count = [], 0
    for program in _programs():
        for scale, piece_bytes in ((1, 1 << 20), (5, 8), (64, 100)):
            vectors = _vectors(program, scale)
            wanted = evaluate(program, vectors)[rank]
            buffer = _buffer(program, rank, vectors)
            run_program(program, buffer, piece_bytes=piece_bytes)
            if wanted is not None and not np.array_equal(_result(program, rank, buffer).numpy(), wanted):
                wrong.append([program.name, program.collective, program.root, scale])
            count += 1
    program = generate("ring", cluster_of(["a"] * SIZE), "all_reduce")
    torch_results: dict[str, list[bool]] = {}
    for length in (0, 1, 2, 1000):
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            for name, combine in (("min", dist.ReduceOp.MIN), ("max", dist.ReduceOp.MAX), ("sum", dist.ReduceOp.SUM)):
                given = torch.arange(length).remainder(7).to(dtype) * (rank + 1)
                mine = given.clone()
                run_program(program, mine, None, name, piece_bytes=64)
                if length:
                    dist.all_reduce(given, op=combine)
                torch_results.setdefault(f"{name} {dtype}", []).append(torch.equal(mine, given))
    average = torch.full((5,), float(rank))
    run_program(program, average, operation="average")
    whole = torch.full((5,), 2 * rank)
    run_program(program, whole, operation="average")
    refusals = []
    for arguments in ((average.view(5, 1), None, "sum"), (average, None, "mean")):
        try:
            run_program(program, *arguments)
        except InputError as error:
            refusals.append(error.message)
    return {
        "wrong": wrong,
        "count": count,
        "unlike torch": [what for what, same in torch_results.items() if not all(same)],
        "average": average.tolist() + whole.tolist(),
        "refusals": refusals,
    }


@pytest.mark.processes
@pytest.mark.xdist_group("process_group")
def test_programs_carried_out_by_point_to_point_end_as_the_reference_says(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(rank), f"{tmp_path}/store"],
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(SIZE)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            found = json.loads(output)
            assert found["wrong"] == []
            assert found["count"] > 60
            assert found["unlike torch"] == []
            assert found["average"] == [1.0] * 5 + [2] * 5
            assert found["refusals"] == ["the tensor must be flat and contiguous", "unknown operation 'mean'"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_level_of_a_transfer_is_one_more_than_of_those_it_waits_for():
    builder = Builder("chain", "broadcast", ["a", "b", "c"], even_chunks(2))
    for chunk in range(2):
        builder.transfer(chunk, 0, 1)
        builder.transfer(chunk, 1, 2)
    assert levels(builder.build()) == (0, 1, 0, 1)


@pytest.mark.parametrize("program", _programs(), ids=lambda p: f"{p.name}-{p.collective}-{p.root}")
def test_no_two_transfers_of_a_level_touch_a_place_that_one_of_them_writes(program: Program):
    found = levels(program)
    for level in set(found):
        transfers = [transfer for transfer, at in zip(program.transfers, found) if at == level]
        written = [(transfer.target, transfer.chunk) for transfer in transfers]
        assert len(set(written)) == len(written)
        assert not set(written) & {(transfer.source, transfer.chunk) for transfer in transfers}


def _main() -> None:
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    print(json.dumps(_run_all(rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main()
