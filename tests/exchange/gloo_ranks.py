"""Real processes with gloo between them, for tests: each runs a case of a file and leaves its result in a folder.

    python gloo_ranks.py CASE SIZE FOLDER

The ranks are forked from one process that has imported everything and started nothing: importing torch takes longer
than most cases.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from headway.exchange.adasum import adasum as combine
from headway.exchange.compression import Compression, all_reduce


def run_case(
    case: str, size: int, folder: Path, *, file: str = __file__, timeout_seconds: float = 120, killed: int = -1
) -> list:
    """What each rank's case returned, after all ended; a rank that fails or hangs fails the test with its output.

    Rank `killed` is expected to die by SIGKILL, and returns None.
    """
    command = [sys.executable, "-W", "ignore", file, case, str(size), str(folder)]
    # A session of its own, so that nothing is left behind whatever happens.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(timeout=timeout_seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        told = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob(f"{case}-*.log")))
    assert process.returncode == 0, told
    codes = [int(code) for code in (folder / f"{case}.codes").read_text().split()]
    assert codes == [-signal.SIGKILL if rank == killed else 0 for rank in range(size)], f"{codes}\n{told}"
    return [None if rank == killed else torch.load(folder / f"{case}-{rank}.pt") for rank in range(size)]


def gradients(rank: int, seed: int) -> list[torch.Tensor]:
    """A rank's gradients: of several shapes, some empty or zero, alike over the ranks to some degree."""
    shared = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(1000 * seed + rank + 1)
    made = []
    for shape in ((7, 3), (1,), (0,), (64,), (5, 2, 2)):
        common = torch.randn(shape, generator=shared)
        made.append(common + torch.randn(shape, generator=own))
    if rank == seed % 3:
        made[1].zero_()
    return made


def adasum(rank: int, size: int) -> dict:
    results = {}
    for count in range(1, size + 1):
        group: Any = dist.new_group(list(range(count)))
        for seed in range(3):
            if rank < count:
                tensors = gradients(rank, seed)
                before = [tensor.clone() for tensor in tensors]
                results[count, seed] = combine(tensors, group=group)
                assert all(torch.equal(a, b) for a, b in zip(tensors, before)), "the input was changed"
        if rank < count:
            results[count, "bfloat16"] = combine([gradients(rank, 5)[0].bfloat16()], group=group)
            results[count, "float64"] = combine([gradients(rank, 5)[0].double()], group=group)
            results[count, "none"] = combine([], group=group)
    return results


def compression(rank: int, size: int) -> dict:
    results = {}
    for name in ("none", "fp16", "bf16"):
        compressor = getattr(Compression, name)
        tensor = gradients(rank, 0)[0]
        results[name] = [all_reduce(tensor, compressor), all_reduce(tensor, compressor, average=False)]
        results[name, "left"] = tensor
    results["integers"] = all_reduce(torch.tensor([rank, 7]), Compression.fp16, average=False)
    results["overflow"] = all_reduce(torch.full((2,), 6e4), Compression.fp16)
    topk = Compression.topk(0.25)
    results["topk"], results["residual"] = [], []
    for step in range(4):
        results["topk"].append(all_reduce(gradients(rank, step)[3], topk, name="weight", average=False))
        results["residual"].append(topk.residuals["weight"].clone())
    results["whole"] = all_reduce(gradients(rank, 0)[3], Compression.topk(1.0), name="weight")
    results["half"] = all_reduce(gradients(rank, 0)[3].bfloat16(), Compression.topk(0.5), name="weight")

    # Distributed gradient descent on a convex problem: every rank has its own rows.
    for feedback in (True, False):
        matrix, target = regression(rank)
        compressor = Compression.topk(1 / 8, feedback=feedback)
        weights = torch.zeros(8, dtype=torch.float64)
        for _ in range(400):
            gradient = matrix.T @ (matrix @ weights - target) / len(target)
            weights -= 0.02 * all_reduce(gradient, compressor, name="weights")
        results["descent", feedback] = weights
    return results


def regression(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a least-squares problem whose ranks pull strongly in opposite directions on entry 0."""
    source = torch.Generator().manual_seed(rank)
    matrix = torch.randn(32, 8, dtype=torch.float64, generator=source)
    target = matrix @ torch.linspace(-1, 1, 8, dtype=torch.float64)
    # Entry 0's gradients stay large on two ranks and cancel out over all, so plain top-1 sends little else from them.
    pull = torch.zeros(1, 8, dtype=torch.float64)
    pull[0, 0] = 1.0
    aim = torch.tensor([(-300.0, 300.0, 0.0)[rank]], dtype=torch.float64)
    return torch.cat((matrix, pull)), torch.cat((target, aim))


def main(cases: dict[str, Any]) -> None:
    """Fork as many ranks as the command line says, run the case that it names in each, and write their exit codes."""
    case, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    ranks = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with (folder / f"{case}-{rank}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                    _run(cases[case], case, rank, size, folder)
                code = 0
            except BaseException:  # noqa: BLE001 - whatever it is, it belongs into the log
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    (folder / f"{case}.codes").write_text(" ".join(map(str, codes)))


def _run(function: Any, case: str, rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / case}.store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(function(rank, size), folder / f"{case}-{rank}.pt")
    if not case.startswith("killed"):
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(globals())
