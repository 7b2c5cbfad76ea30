"""How fast is in-network aggregation over loopback, and when would a switch beat a ring? Measured, and simulated.

    python bench/aggregator.py                      64 MiB over 2 and 3 workers, then the simulated switch
    python bench/aggregator.py --quick              fewer rounds, 2 workers
    python bench/aggregator.py --only simulated     needs no idle machine

Measured: an aggregator and the workers are processes on this machine. Every worker also has a gloo process group, and
a plain echo on UDP: datagrams of the same size to another process and back, which is all that the aggregation does but
for adding, so no faster one can be built on these datagrams. Blocks of all of them follow one another in each round, so
that whatever else the machine does falls on all. Time is of one all-reduce, the slowest worker's, the median over the
rounds; CPU-seconds are of all workers and the server together, for a GB of the vector. Run it on an idle machine.

Simulated: an all-reduce in a switch (the real protocol packet by packet where it is small, else a closed form that
tests compare with it), as a ring, and by parameter servers, on the same links.
"""

import argparse
import contextlib
import datetime
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.collective.packets import HEADER_BYTES, LARGEST_PAYLOAD_BYTES
from headway.exchange.aggregation import AggregationClient
from headway.simulate.switch import SwitchModel, compare_switch
from headway.units import format_bytes, format_rate, format_seconds
from record import new_record, save_record

HERE = Path(__file__).parent
DATAGRAM_BYTES = LARGEST_PAYLOAD_BYTES + HEADER_BYTES
ECHO_WINDOW = 16
REPEATS = 2  # all-reduces in a block
COUNTS = (2, 4, 8, 16, 32, 64)
SIMULATED_BYTES = (10_000, 1_000_000, 100_000_000)
SIMULATED_SLOTS = (4, 64)
SEED = 0


def buffered_socket() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        made.setsockopt(socket.SOL_SOCKET, option, 4 << 20)
    return made


def echo() -> None:
    """Send back every datagram, until killed."""
    served = buffered_socket()
    served.bind(("127.0.0.1", 0))
    print(f"127.0.0.1:{served.getsockname()[1]}", flush=True)
    buffer = bytearray(DATAGRAM_BYTES)
    view = memoryview(buffer)
    while True:
        size, source = served.recvfrom_into(buffer)
        served.sendto(view[:size], source)


def bounce(line: socket.socket, size_bytes: int) -> None:
    """Send a vector's worth of datagrams and take them back, some at a time; what is lost is sent again."""
    out, back = bytearray(DATAGRAM_BYTES), bytearray(DATAGRAM_BYTES)
    left = total = -(-size_bytes // LARGEST_PAYLOAD_BYTES)
    under_way = 0
    while left:
        while under_way < min(ECHO_WINDOW, left):
            line.send(out)
            under_way += 1
        try:
            line.recv_into(back)
            under_way -= 1
            left -= 1
        except TimeoutError:
            print(f"echo: {under_way} of {total} datagrams were lost", file=sys.stderr)
            under_way = 0


def processor_seconds(pid: int) -> float:
    """What the main thread of another process has used."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def work(rank: int, size: int, folder: Path, ports: list[int], pids: list[int], arguments: argparse.Namespace) -> None:
    """One worker: measures, gathers what all measured, and the first writes it down."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED + rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "gloo"), size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=120),
    )
    vector, plain = torch.randn(arguments.bytes // 4), torch.zeros(arguments.bytes // 4)
    client = AggregationClient(("127.0.0.1", ports[0]), job=1, workers=size)
    line = buffered_socket()
    line.connect(("127.0.0.1", ports[1]))
    line.settimeout(1.0)
    ways: dict[str, Callable[[], object]] = {
        "integer": partial(client.all_reduce, vector, operation="average"),
        "ordered": partial(client.all_reduce, vector, operation="average", how="ordered"),
        "gloo": partial(dist.all_reduce, plain),
        "echo": partial(bounce, line, arguments.bytes),
    }
    helps = {"integer": pids[0], "ordered": pids[0], "echo": pids[1]}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            way()  # the barrier is gloo's: let it go, and bring everybody in step
            dist.barrier()
            pid = helps.get(name) if rank == 0 else None
            other = processor_seconds(pid) if pid is not None else 0.0
            before, processor = time.perf_counter(), time.process_time()
            for _ in range(REPEATS):
                way()
            elapsed, processor = time.perf_counter() - before, time.process_time() - processor
            dist.barrier()
            if pid is not None:
                processor += processor_seconds(pid) - other
            if round_:  # the first round warms up
                measured[name].append((elapsed / REPEATS, processor / REPEATS))
    everybody: list = [None] * size
    dist.all_gather_object(everybody, (measured, client.machine.asked, client.machine.resent))
    row: dict = {
        "workers": size,
        "bytes": arguments.bytes,
        "asked": sum(one[1] for one in everybody),
        "resent": sum(one[2] for one in everybody),
    }
    for name in ways:
        seconds = [max(one[0][name][i][0] for one in everybody) for i in range(arguments.rounds)]
        processor = [sum(one[0][name][i][1] for one in everybody) for i in range(arguments.rounds)]
        row[name] = {
            "seconds": statistics.median(seconds),
            "fastest_seconds": min(seconds),
            "processor_seconds_per_gb": statistics.median(processor) / (arguments.bytes / 1e9),
        }
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(row))
    client.close()
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def server(*command: str) -> Iterator[tuple[int, int]]:
    """Start a process that prints its address; its port, and its process id."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rpartition(":")[2]), process.pid
    finally:
        process.kill()
        process.communicate()


def measure(size: int, arguments: list[str]) -> dict:
    aggregator = ("-m", "headway.exchange.aggregation", "--port", "0", "--workers", str(size))
    with (
        tempfile.TemporaryDirectory() as folder,
        server(*aggregator) as (port, pid),
        server(__file__, "--echo") as (echo_port, echo_pid),
    ):
        command = [sys.executable, "-W", "ignore", __file__, *arguments, "--worker"]
        where = f"{size},{folder},{port},{echo_port},{pid},{echo_pid}"
        workers = [subprocess.Popen([*command, f"{rank},{where}"]) for rank in range(size)]
        try:
            for process in workers:
                process.wait(timeout=1800)
        finally:
            for process in workers:
                process.kill()
                process.wait()
        if any(process.returncode for process in workers):
            sys.exit(f"workers ended with {[process.returncode for process in workers]}")
        return json.loads((Path(folder) / "row.json").read_text())


def measured_table(rows: list[dict]) -> Table:
    title = f"All-reduce of {format_bytes(rows[0]['bytes'])} of float32 through an aggregator on this machine"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1))
    # A ratio of times, to gloo and to the echo: above 1x is faster than it; of processor time: below 1x is less.
    for column in ("workers", "way", "time", "rate", "best rate", "gloo", "echo", "CPU s/GB", "gloo"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    processor = "processor_seconds_per_gb"
    for row in rows:
        for name in ("integer", "ordered", "gloo", "echo"):
            one = row[name]
            table.add_row(
                str(row["workers"]),
                name,
                format_seconds(one["seconds"]),
                format_rate(row["bytes"] / one["seconds"]),
                format_rate(row["bytes"] / one["fastest_seconds"]),
                f"{row['gloo']['seconds'] / one['seconds']:.2f}x",
                f"{row['echo']['seconds'] / one['seconds']:.2f}x",
                f"{one[processor]:.2f}",
                f"{one[processor] / row['gloo'][processor]:.2f}x",
            )
    return table


def simulated_rows() -> list[dict]:
    rows = []
    for size_bytes in SIMULATED_BYTES:
        for slots in SIMULATED_SLOTS:
            model = SwitchModel(workers=2, slots=slots)
            for one in compare_switch(model, size_bytes, COUNTS, seed=SEED):
                rows.append({"slots": slots, "fastest": one.fastest, **one.to_builtins()})
    return rows


def simulated_table(rows: list[dict]) -> Table:
    model = SwitchModel(workers=2)
    rate, latency = format_rate(model.link_bytes_per_second), format_seconds(model.latency_seconds)
    title = f"Simulated all-reduce: {rate} links, {latency} one way, {model.slots_needed} slots fill them"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1))
    for column in ("vector", "slots", "workers", "switch", "ring", "sharded server", "server", "fastest"):
        table.add_column(column, justify="left" if column == "fastest" else "right", no_wrap=True)
    for row in rows:
        others = row["other_seconds"]
        cells = [row["switch_seconds"], others["ring"], others["sharded-server"], others["parameter-server"]]
        table.add_row(
            format_bytes(row["size_bytes"]), str(row["slots"]), str(row["workers"]), *map(format_seconds, cells),
            row["fastest"],
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", default="2,3")
    parser.add_argument("--bytes", type=int, default=64 * 2**20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["measured", "simulated"])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "aggregator.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.workers = min(arguments.rounds, 3), "2"
    if arguments.echo:
        echo()
    if arguments.worker:
        rank, size, folder, *numbers = arguments.worker.split(",")
        ports_and_pids = [int(number) for number in numbers]
        work(int(rank), int(size), Path(folder), ports_and_pids[:2], ports_and_pids[2:], arguments)
        return
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    record = new_record(SEED, cores=torch.get_num_threads(), torch=torch.__version__)
    if arguments.only != "simulated":
        record["measured"] = [measure(int(size), sys.argv[1:]) for size in arguments.workers.split(",")]
        console.print(measured_table(record["measured"]))
    if arguments.only != "measured":
        record["simulated"] = simulated_rows()
        console.print(simulated_table(record["simulated"]))
    save_record(record, arguments.output)


if __name__ == "__main__":
    main()
