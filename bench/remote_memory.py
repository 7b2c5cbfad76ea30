"""Key-value stores on passive memory: YCSB on pDPM-Direct, pDPM-Central and Clover, 1 to 64 simulated clients.

    python bench/remote_memory.py                      all of it; some minutes
    python bench/remote_memory.py --clients 1 16 --operations 500 --workloads A
    python bench/remote_memory.py --verbs              the real verbs of shared memory, on this machine

YCSB A, B and C (50, 5 and 0 % updates), values of 1 KB, keys drawn uniformly or by Zipf's law with exponent 0.99
(Cooper et al., SoCC 2010, section 4). Every client is a machine of its own and makes one call after the other; there is
one memory node. Times are virtual, from `FabricParameters`, so they do not depend on this machine: they say what the
designs cost under these parameters, not what the paper's hardware did. "clover as published" writes without looking
whether its cursor is the newest (`Clover`, `looks_ahead`). Beside latency (average, median, 99th
percentile) and throughput stands the load of the server (coordinator, metadata server): the busy part of its cores,
its requests and its bytes for each call of a client. Then what the authors say of the three designs (`SAID`) is held
against the same cells. Afterwards the verbs of shared memory are timed for real.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.memory.disaggregated.central import Central, CentralLayout, Coordinator
from headway.memory.disaggregated.clover import Clover
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.clover_metadata import MetadataServer
from headway.memory.disaggregated.direct import Direct, DirectLayout
from headway.memory.remote import Clock, Logic
from headway.memory.remote_shared import SharedVerbs, start_memory_node
from headway.memory.remote_simulated import FabricParameters, SimulatedFabric, SimulatedServer
from headway.memory.remote_store import RemoteStore
from headway.simulate.engine import Engine
from record import new_record, save_record

HERE = Path(__file__).parent
STORES = ("direct", "central", "clover", "clover as published")
WORKLOADS = {"A": 0.5, "B": 0.05, "C": 0.0}
VALUE_BYTES = 1000
EXPONENT = 0.99
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
LARGE = 64 * 2**20
FEW = 4  # clients at most: "small scale"

# What the authors found, from the abstract of the work's first version (Tsai and Zhang, arXiv 1901.01628, whose DPM-Sep
# is Clover's forerunner; its data stores are compared by microbenchmarks and YCSB), put in our words: the store, reads
# or updates, from so many clients to so many, and which of the three places it is said to take, 1 the fastest.
SAID = (
    ("Direct reads small values very well", "direct", "read", 1, FEW, 1),
    ("Direct writes poorly", "direct", "update", 1, 64, 3),
    ("Central writes best while there are few clients", "central", "update", 1, FEW, 1),
    ("Central does poorly when there are many", "central", "update", 32, 64, 3),
    ("Clover's kind does well overall (no other is ahead of it by much)", "clover as published", "all", 1, 64, 1),
)


def keys_of(distribution: str, keys: int, count: int, seed: int) -> np.ndarray:
    """`count` keys; by Zipf's law, which key is the hottest is drawn too."""
    generator = np.random.default_rng(seed)
    if distribution == "uniform":
        return generator.integers(0, keys, count)
    weights = 1.0 / np.arange(1, keys + 1) ** EXPONENT
    ranks = generator.choice(keys, size=count, p=weights / weights.sum())
    return np.random.default_rng(0).permutation(keys)[ranks]


def build(store: str, keys: int, clients: int, engine: Engine, parameters: FabricParameters):
    """(the fabric, what makes client number i's store, its server or None), with a value for each key."""
    server: SimulatedServer | None = None
    if store == "direct":
        direct = DirectLayout(keys=keys, value_bytes=VALUE_BYTES)
        fabric = SimulatedFabric(engine, parameters, [direct.node_bytes])
        return fabric, lambda number: Direct(direct, number + 1), server
    if store == "central":
        central = CentralLayout(keys=keys, value_bytes=VALUE_BYTES, buffers=keys + 4 * clients)
        fabric = SimulatedFabric(engine, parameters, [central.node_bytes])
        server = fabric.serve("coordinator", Coordinator(central).handle)
        return fabric, lambda _: Central(), server
    clover = CloverLayout(keys=keys, value_bytes=VALUE_BYTES, buffers=keys + 4096 + 256 * clients)
    fabric = SimulatedFabric(engine, parameters, [clover.node_bytes])
    metadata = MetadataServer(clover)
    server = fabric.serve("metadata", metadata.handle)
    engine.run(server.client.start(metadata.load()))
    looks_ahead = store == "clover"
    return fabric, lambda number: Clover(clover, f"c{number}", retire_after=1, looks_ahead=looks_ahead), server


def measure(
    store: str, workload: str, distribution: str, clients: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One cell: every client makes `arguments.operations` calls after a tenth of them to warm up."""
    engine = Engine(arguments.seed)
    parameters = arguments.parameters
    fabric, make, server = build(store, arguments.keys, clients, engine, parameters)
    value = bytes(range(250)) * 4
    loaded = make(clients)
    load = fabric.client("load")

    def fill() -> Logic[None]:
        for key in range(arguments.keys):
            yield from loaded.write(key, value)

    engine.run(load.start(fill()))
    updates = WORKLOADS[workload]
    warm = arguments.operations // 10
    latencies: list[float] = []
    by_kind: dict[str, list[float]] = {"read": [], "update": []}
    began: list[float] = []

    def calls(number: int, own: Any) -> Logic[None]:
        chance = random.Random(f"{arguments.seed}/{number}")
        keys = keys_of(distribution, arguments.keys, warm + arguments.operations, arguments.seed + 1 + number)
        if isinstance(own, Clover):
            yield from own.open()
        for turn, key in enumerate(keys.tolist()):
            begin = yield Clock()
            kind = "update" if chance.random() < updates else "read"
            if kind == "update":
                yield from own.write(key, value)
            else:
                yield from own.read(key)
            end = yield Clock()
            if turn >= warm:
                latencies.append(end - begin)
                by_kind[kind].append(end - begin)
                began.append(begin)

    if server is not None:
        server.requests, server.busy_seconds = 0, 0.0
        moved = server.bytes_moved
    else:
        moved = 0
    first = engine.now
    machines = [fabric.client(f"c{number}") for number in range(clients)]
    running = [machine.start(calls(number, make(number))) for number, machine in enumerate(machines)]
    engine.run(engine.all_of(*running))
    seconds = engine.now - min(began)
    every = clients * (warm + arguments.operations)
    latencies.sort()
    cell: dict[str, Any] = {
        "store": store, "workload": workload, "keys": distribution, "clients": clients,
        "average_seconds": statistics.fmean(latencies),
        "median_seconds": latencies[len(latencies) // 2],
        "p99_seconds": latencies[int(len(latencies) * 0.99)],
        "calls_per_second": len(latencies) / seconds,
        "round_trips_per_call": sum(machine.round_trips for machine in machines) / every,
        "verbs_per_call": sum(machine.verbs for machine in machines) / every,
    }  # fmt: skip
    for kind, seconds_each in by_kind.items():
        if seconds_each:
            cell[f"{kind}_seconds"] = statistics.fmean(seconds_each)
    if server is not None:
        cell["server_load"] = server.load(engine.now - first)
        cell["server_requests_per_call"] = server.requests / every
        cell["server_bytes_per_call"] = (server.bytes_moved - moved) / every
    return cell


def beside_the_paper(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each statement of `SAID`: in how many of the cells that it speaks of it holds, and by how much it fails.

    Compared are average latencies of the three designs as published, in one workload with as many clients. A store is
    at its place if none (first) or both (last) of the other two are faster; "overall", it is if it takes at most 1.1
    times as long as the fastest.
    """
    published = ("direct", "central", "clover as published")
    rivals: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        if cell["store"] in published:
            rivals.setdefault((cell["workload"], cell["keys"], cell["clients"]), {})[cell["store"]] = cell
    found = []
    for statement, store, kind, fewest, most, place in SAID:
        name = "average_seconds" if kind == "all" else f"{kind}_seconds"
        ratios = []  # over the fastest other (first), of the slowest other over it (last): above 1 where it fails
        for (_, _, clients), at in rivals.items():
            if fewest <= clients <= most and len(at) == len(published) and all(name in cell for cell in at.values()):
                own, others = at[store][name], [cell[name] for other, cell in at.items() if other != store]
                ratios.append(own / min(others) if place == 1 else max(others) / own)
        limit = 1.1 if kind == "all" else 1.0
        found.append({
            "statement": statement, "store": store, "clients": [fewest, most], "cells": len(ratios),
            "holds": sum(ratio <= limit for ratio in ratios), "worst_ratio": max(ratios, default=None),
        })  # fmt: skip
    return found


def show_beside_the_paper(found: list[dict[str, Any]]) -> None:
    table = Table(title="What the authors say (arXiv 1901.01628), and these cells", box=SIMPLE_HEAD)
    for heading in ("statement", "clients", "holds in", "fails by at most"):
        table.add_column(heading, justify="left" if heading == "statement" else "right")
    for each in found:
        fewest, most = each["clients"]
        worst = each["worst_ratio"]
        fails = "" if each["holds"] == each["cells"] else f"{worst:.2f}x"
        table.add_row(each["statement"], f"{fewest} to {most}", f"{each['holds']} of {each['cells']}", fails)
    Console(width=100).print(table)


def verbs_of_this_machine() -> dict[str, float]:
    """Median seconds of the four verbs on shared memory, from Python, and bytes per second of the tier above it."""
    found: dict[str, float] = {}
    with start_memory_node(4 * LARGE) as node:
        verbs = SharedVerbs([node.address])
        kilobyte = memoryview(bytearray(1024))
        ways = {
            "read_1024_seconds": lambda: verbs.read_into(0, 64, kilobyte),
            "write_1024_seconds": lambda: verbs.write_from(0, 64, kilobyte),
            "compare_and_swap_seconds": lambda: verbs.compare_and_swap(0, 0, 0, 0),
            "fetch_and_add_seconds": lambda: verbs.fetch_and_add(0, 8, 1),
        }
        for name, way in ways.items():
            found[name] = seconds_of(way, 5000)
        verbs.write_from(0, 0, memoryview(bytes(64)))
        tier = RemoteStore(verbs, node.address.region_bytes)
        content = np.ones(LARGE // 4, np.float32)
        copied = np.ones_like(content)
        found["copy_bytes_per_second"] = LARGE / seconds_of(lambda: np.copyto(copied, content), 9)
        for checksums in (True, False):
            tier = RemoteStore(verbs, node.address.region_bytes, checksums=checksums)
            suffix = "" if checksums else "_without_checksums"
            write = seconds_of(lambda tier=tier: tier.write("tensor", content.data.cast("B")), 9)
            read = seconds_of(lambda tier=tier: tier.read("tensor", copied.data.cast("B")), 9)
            found[f"tier_write_bytes_per_second{suffix}"] = LARGE / write
            found[f"tier_read_bytes_per_second{suffix}"] = LARGE / read
            tier.remove("tensor")
        verbs.close()
    return found


def seconds_of(way: Any, count: int) -> float:
    way()
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        way()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def show(cells: list[dict[str, Any]], workload: str, distribution: str) -> None:
    table = Table(title=f"YCSB {workload}, {distribution} keys", box=SIMPLE_HEAD)
    for heading in ("clients", "store", "average µs", "median µs", "p99 µs", "calls/s", "trips", "server load"):
        table.add_column(heading, justify="right")
    for cell in cells:
        load = f"{100 * cell['server_load']:.1f} %" if "server_load" in cell else ""
        times = (f"{cell[f'{name}_seconds'] * 1e6:.2f}" for name in ("average", "median", "p99"))
        trips = f"{cell['round_trips_per_call']:.2f}"
        table.add_row(str(cell["clients"]), cell["store"], *times, f"{cell['calls_per_second']:.3g}", trips, load)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--keys-drawn", nargs="+", default=["zipf", "uniform"], choices=["zipf", "uniform"])
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=STORES)
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--operations", type=int, default=200, help="calls of each client, after the warm-up")
    parser.add_argument("--parameters", type=Path, help="a file of FabricParameters")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbs", action="store_true", help="only the verbs of shared memory")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "remote_memory.json")
    arguments = parser.parse_args()
    path, arguments.parameters = arguments.parameters, FabricParameters(bursts=2)
    if path is not None:
        arguments.parameters = FabricParameters.load(path)
    record = new_record(arguments.seed, numpy=np.__version__)
    record["parameters"] = arguments.parameters.to_builtins()
    record["value_bytes"], record["keys"], record["exponent"] = VALUE_BYTES, arguments.keys, EXPONENT
    record["cells"] = []
    for workload in [] if arguments.verbs else arguments.workloads:
        for distribution in arguments.keys_drawn:
            cells = [
                measure(store, workload, distribution, clients, arguments)
                for clients in arguments.clients
                for store in arguments.stores
            ]
            record["cells"] += cells
            show(cells, workload, distribution)
    record["beside_the_paper"] = beside_the_paper(record["cells"])
    if record["cells"]:
        show_beside_the_paper(record["beside_the_paper"])
    record["shared_memory"] = verbs_of_this_machine()
    for name, number in record["shared_memory"].items():
        print(f"{name:50} {number:.3g}")
    save_record(record, arguments.output)


if __name__ == "__main__":
    main()
