"""How near do collectives come to the optimum, and how long does it take to generate them?

    python bench/collectives.py                                  a minute; the table only
    python bench/collectives.py --output bench/results/collectives.json

On every class of connected allocations of 3 to 8 GPUs of a DGX-1V (46) and a DGX-1P (14), and on whole machines, each
algorithm's program is generated and its rate taken from its most loaded link: the bytes of the vector per second for
large vectors, whatever order the transfers take. The optimum is what cuts and partitions permit any program at all.
"blink" is Blink's method as `collective.blink` implements it, not its authors' code. Broadcasts are from rank 0.
CPU-seconds are those of generation alone, topology included, after one generation to warm up; the least of `--repeat`.
"""

import argparse
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.collective.algorithms import generate
from headway.collective.allocations import allocation_classes
from headway.collective.blink import blink_program, three_phase_program
from headway.collective.packing import optimal_rate, packed_program
from headway.collective.program import Collective, Program
from headway.collective.topology import topology_of
from headway.collective.verify import verify
from headway.errors import HeadwayError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Cluster
from record import new_record, save_record

HERE = Path(__file__).parent

COLLECTIVES: tuple[Collective, ...] = ("broadcast", "all_gather", "all_reduce")
MACHINES = ("dgx-1v", "dgx-1p")  # on every allocation
WHOLE = ("dgx-1v", "dgx-1p", "dgx-a100", "dgx-a100:2")  # with all devices

Algorithm = Callable[[Cluster, Collective, Sequence[str]], Program]


def three_phases(cluster: Cluster, collective: Collective, devices: Sequence[str]) -> Program:
    assert collective == "all_reduce"
    return three_phase_program(cluster, devices)


ALGORITHMS: dict[str, tuple[Algorithm, tuple[Collective, ...]]] = {
    "packed": (packed_program, COLLECTIVES),
    "blink": (blink_program, COLLECTIVES),
    "ring": (lambda cluster, collective, devices: generate("ring", cluster, collective, devices), COLLECTIVES),
    "double tree": (
        lambda cluster, collective, devices: generate("tree", cluster, collective, devices),
        ("broadcast", "all_reduce"),
    ),
}
# Between servers Blink has a protocol of its own, for all-reduce.
ACROSS = {**ALGORITHMS, "blink": (three_phases, ("all_reduce",))}


def rate_of(cluster: Cluster, program: Program) -> float:
    """Bytes of the vector per second by the most loaded link."""
    widths: dict[tuple[str, str], float] = {}
    for link in cluster.links:
        widths[link.source, link.target] = widths.get((link.source, link.target), 0.0) + link.bytes_per_second
    loads: dict[tuple[str, str], float] = {}
    for transfer in program.transfers:
        for pair in itertools.pairwise(program.paths[transfer.path]):
            loads[pair] = loads.get(pair, 0.0) + program.fraction(transfer.chunk)
    return 1 / max(load / widths[pair] for pair, load in loads.items())


def measure(
    name: str, algorithm: Algorithm, cluster: Cluster, collective: Collective, devices: Sequence[str], repeat: int
) -> dict:
    row = {"cluster": cluster.name, "devices": ",".join(devices), "collective": collective, "algorithm": name}
    times: list[float] = []
    try:
        for _ in range(repeat):
            # A cluster remembers the routes it has found: each repetition starts from a fresh one.
            fresh = load_cluster(cluster.name)
            start = time.process_time()
            program = algorithm(fresh, collective, devices)
            times.append(time.process_time() - start)
        verify(program)
    except HeadwayError as error:
        print(f"{name} {collective} on {cluster.name} {' '.join(devices)}: {error}", file=sys.stderr)
        return {**row, "failed": str(error)}
    rate, best = rate_of(cluster, program), optimal_rate(topology_of(cluster, devices), collective)
    return {
        **row,
        "bytes_per_second": rate,
        "optimal_bytes_per_second": best,
        "share": rate / best,
        "chunks": len(program.chunks),
        "transfers": len(program.transfers),
        "cpu_seconds": min(times),
    }


def summarise(rows: list[dict]) -> dict:
    done = [row for row in rows if "share" in row]
    shares = [row["share"] for row in done] or [0.0]
    return {
        "programs": len(done),
        "failed": len(rows) - len(done),
        "optimal": sum(share > 1 - 1e-6 for share in shares),
        "mean share": statistics.mean(shares),
        "least share": min(shares),
        "most chunks": max((row["chunks"] for row in done), default=0),
        "cpu_seconds": sum(row["cpu_seconds"] for row in done),
        "most cpu_seconds": max((row["cpu_seconds"] for row in done), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    for (name, (algorithm, collectives)), collective in itertools.product(ALGORITHMS.items(), COLLECTIVES):
        if collective in collectives:
            print(f"warming up: {name}, {collective}", file=sys.stderr)
            algorithm(load_cluster("dgx-1p"), collective, ["node0/gpu0", "node0/gpu1", "node0/gpu2"])

    groups: list[tuple[str, list[dict]]] = []
    for machine in MACHINES:
        cluster = load_cluster(machine)
        classes = allocation_classes(cluster)
        for collective in COLLECTIVES:
            for name, (algorithm, collectives) in ALGORITHMS.items():
                if collective in collectives:
                    rows = [
                        measure(name, algorithm, cluster, collective, devices, arguments.repeat) for devices in classes
                    ]
                    groups.append((machine, rows))
    table = Table(box=SIMPLE_HEAD, title="Every connected allocation of 3 to 8 GPUs", title_justify="left")
    for column in ("machine", "collective", "algorithm"):
        table.add_column(column)
    for column in ("optimal", "mean", "least", "chunks ≤", "CPU ms", "CPU ms ≤"):
        table.add_column(column, justify="right")
    summaries = []
    for title, rows in groups:
        summary = {
            "machine": title,
            "collective": rows[0]["collective"],
            "algorithm": rows[0]["algorithm"],
            **summarise(rows),
        }
        summaries.append(summary)
        table.add_row(
            title,
            summary["collective"],
            summary["algorithm"],
            f"{summary['optimal']}/{len(rows)}",
            f"{summary['mean share']:.1%}",
            f"{summary['least share']:.1%}",
            str(summary["most chunks"]),
            f"{1e3 * summary['cpu_seconds']:.1f}",
            f"{1e3 * summary['most cpu_seconds']:.1f}",
        )
    console.print(table)

    whole = [
        measure(name, algorithm, cluster, collective, [device.name for device in cluster.devices], arguments.repeat)
        for cluster in map(load_cluster, WHOLE)
        for collective in COLLECTIVES
        for name, (algorithm, collectives) in (ACROSS if len(cluster.nodes) > 1 else ALGORITHMS).items()
        if collective in collectives
    ]
    table = Table(box=SIMPLE_HEAD, title="Whole machines", title_justify="left")
    for column in ("machine", "collective", "algorithm"):
        table.add_column(column)
    for column in ("GB/s", "optimum", "share", "chunks", "CPU ms"):
        table.add_column(column, justify="right")
    for row in whole:
        cells = [row["cluster"], row["collective"], row["algorithm"]]
        if "share" in row:
            cells += [
                f"{row['bytes_per_second'] / 1e9:.1f}",
                f"{row['optimal_bytes_per_second'] / 1e9:.1f}",
                f"{row['share']:.1%}",
                str(row["chunks"]),
                f"{1e3 * row['cpu_seconds']:.1f}",
            ]
        table.add_row(*cells, *["failed"] * ("failed" in row))
    console.print(table)

    totals = {
        name: sum(summary["cpu_seconds"] for summary in summaries if summary["algorithm"] == name)
        for name in ALGORITHMS
    }
    failed = sum(summary["failed"] for summary in summaries) + sum("failed" in row for row in whole)
    said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in totals.items())
    console.print(f"CPU-seconds for all allocations of both machines and {len(COLLECTIVES)} collectives: {said}")
    console.print(f"programs proven right by symbolic execution; failed: {failed}")
    if arguments.output is not None:
        record = new_record("nothing is random", python=platform.python_version()) | {
            "repeat": arguments.repeat,
            "cpu_seconds": totals,
            "allocations": summaries,
            "whole": whole,
            "rows": [row for _, rows in groups for row in rows],
        }
        save_record(record, arguments.output)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
