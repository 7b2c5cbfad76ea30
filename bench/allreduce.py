"""How fast is an all-reduce through shared memory, against gloo and against memcpy? Real processes on this machine.

    python bench/allreduce.py                       1 KB to 256 MB over 2 and 4 ranks; a few minutes
    python bench/allreduce.py --quick               1 KB, 256 KB and 64 MiB, fewer rounds
    python bench/allreduce.py --algorithms direct,ring

Every rank is a process that has both: our communicator and a gloo process group. Blocks of all-reduces of the one and
the other, and of plain copies of the same vector, follow one another in each round, so that whatever else the machine
does falls on all three. Time is of one all-reduce, the slowest rank's, the median over the rounds. CPU-seconds are of
all threads of all ranks together, for a GB of the vector. "copies" says how many copies of the vector by every rank
would have taken as much processor time. Run it on an otherwise idle machine.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.collective.algorithms import generate
from headway.exchange.choice import cluster_of
from headway.exchange.executor import Communicator
from headway.units import format_bytes, format_seconds
from record import new_record, save_record

HERE = Path(__file__).parent
SIZES = (1_000, 16_000, 256_000, 1_000_000, 4_000_000, 16_000_000, 64 * 2**20, 256_000_000)
QUICK_SIZES = (1_000, 256_000, 64 * 2**20)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int32": torch.int32}


def blocks_of(size_bytes: int) -> int:
    """All-reduces in a block: enough to be measured, few enough to be interleaved."""
    return max(2, min(300, 100_000_000 // size_bytes))


def work(rank: int, size: int, folder: Path, arguments: argparse.Namespace) -> None:
    """One rank: measures, gathers what all ranks measured, and rank 0 writes it down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "gloo"), size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    communicator = Communicator(
        rank=rank, size=size, store=dist.FileStore(str(folder / "ours"), size), timeout_seconds=120
    )
    cluster = cluster_of(["here"] * size)
    dtype = DTYPES[arguments.dtype]
    rows = []
    for size_bytes in QUICK_SIZES if arguments.quick else SIZES:
        count = size_bytes // dtype.itemsize
        vector, other = torch.zeros(count, dtype=dtype), torch.ones(count, dtype=dtype)
        ways: dict[str, Callable[[], object]] = {
            name: partial(communicator.run, generate(name, cluster, "all_reduce"), vector)
            for name in arguments.algorithms.split(",")
        }
        ways["gloo"] = partial(dist.all_reduce, vector)
        ways["memcpy"] = partial(other.copy_, vector)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        repeats = blocks_of(size_bytes)
        for round_ in range(arguments.rounds + 1):
            for name, way in ways.items():
                dist.barrier()
                way()  # the barrier is gloo's: let it go, and bring everybody in step
                before, processor = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    way()
                elapsed = (time.perf_counter() - before) / repeats
                if round_:  # the first round warms up
                    measured[name].append((elapsed, (time.process_time() - processor) / repeats))
        everybody: list = [None] * size
        dist.all_gather_object(everybody, measured)
        row: dict = {"ranks": size, "bytes": size_bytes, "repeats": repeats}
        for name in ways:
            seconds = [max(one[name][i][0] for one in everybody) for i in range(arguments.rounds)]
            processor = [sum(one[name][i][1] for one in everybody) for i in range(arguments.rounds)]
            row[name] = {
                "seconds": statistics.median(seconds),
                "processor_seconds_per_gb": statistics.median(processor) / (size_bytes / 1e9),
            }
        rows.append(row)
        if rank == 0:
            print(f"{size} ranks, {format_bytes(size_bytes)}: done", file=sys.stderr)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    communicator.close()
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, arguments: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, *arguments, "--worker"]
        ranks = [subprocess.Popen([*command, f"{rank},{size},{folder}"]) for rank in range(size)]
        try:
            for process in ranks:
                process.wait(timeout=1800)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if any(process.returncode for process in ranks):
            sys.exit(f"ranks ended with {[process.returncode for process in ranks]}")
        return json.loads((Path(folder) / "rows.json").read_text())


def table_of(rows: list[dict], algorithms: list[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="All-reduce on this machine", title_justify="left", padding=(0, 1))
    for column in ("ranks", "vector", "program", "time", "gloo", "ratio", "CPU s/GB", "gloo", "ratio", "copies"):
        table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
    for row in rows:
        for name in algorithms:
            ours, gloo, copy = row[name], row["gloo"], row["memcpy"]
            processor = "processor_seconds_per_gb"
            table.add_row(
                str(row["ranks"]),
                format_bytes(row["bytes"]),
                name,
                format_seconds(ours["seconds"]),
                format_seconds(gloo["seconds"]),
                f"{gloo['seconds'] / ours['seconds']:.1f}x",
                f"{ours[processor]:.3g}",
                f"{gloo[processor]:.3g}",
                f"{gloo[processor] / ours[processor]:.1f}x",
                f"{ours[processor] / copy[processor]:.1f}",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--algorithms", default="direct")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "allreduce.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 3)
    if arguments.worker:
        rank, size, folder = arguments.worker.split(",")
        work(int(rank), int(size), Path(folder), arguments)
        return
    rows = [row for size in arguments.ranks.split(",") for row in measure(int(size), sys.argv[1:])]
    algorithms = arguments.algorithms.split(",")
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    console.print(table_of(rows, algorithms))
    record = new_record("nothing is drawn", cores=torch.get_num_threads(), torch=torch.__version__) | {
        "dtype": arguments.dtype,
        "rows": rows,
    }
    save_record(record, arguments.output)


if __name__ == "__main__":
    main()
