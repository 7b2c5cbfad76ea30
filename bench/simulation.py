"""How fast does the simulator run? Its event core against simpy's, flows that share a network, and whole collectives.

    python bench/simulation.py                  about a minute; results in bench/results/
    python bench/simulation.py --only engine

Processor time of one core, the best of several rounds in which the two sides take turns. simpy is the extra `bench`.
Run it on an otherwise idle machine.
"""

import argparse
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simpy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.collective import algorithms
from headway.collective.program import Collective
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.predict.collective import predict_program
from headway.simulate.communication import simulate
from headway.simulate.engine import Engine
from headway.simulate.network import Network
from record import new_record, save_record

HERE = Path(__file__).parent
SEED = 0


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# The event core: the same processes for both, which sleep for times of their own.


def ours_sleeping(processes: int, sleeps: int) -> Callable[[], object]:
    engine = Engine()

    def sleeper(delay: float):
        for _ in range(sleeps):
            yield delay

    for number in range(processes):
        engine.process(sleeper(1.0 + 0.0137 * number))
    return engine.run


def simpy_sleeping(processes: int, sleeps: int) -> Callable[[], object]:
    environment = simpy.Environment()

    def sleeper(delay: float):
        for _ in range(sleeps):
            yield environment.timeout(delay)

    for number in range(processes):
        environment.process(sleeper(1.0 + 0.0137 * number))
    return environment.run


def ours_talking(pairs: int, messages: int) -> Callable[[], object]:
    engine = Engine()

    def speaker(doors: list):
        for number in range(messages):
            yield 1.0
            doors[number].succeed(number)

    def listener(doors: list):
        for door in doors:  # noqa: UP028 - values are sent in, which a list does not take
            yield door

    for _ in range(pairs):
        doors = [engine.event() for _ in range(messages)]
        engine.process(speaker(doors))
        engine.process(listener(doors))
    return engine.run


def simpy_talking(pairs: int, messages: int) -> Callable[[], object]:
    environment = simpy.Environment()

    def speaker(doors: list):
        for number in range(messages):
            yield environment.timeout(1.0)
            doors[number].succeed(number)

    def listener(doors: list):
        for door in doors:  # noqa: UP028 - values are sent in, which a list does not take
            yield door

    for _ in range(pairs):
        doors = [environment.event() for _ in range(messages)]
        environment.process(speaker(doors))
        environment.process(listener(doors))
    return environment.run


def engine_rows(rounds: int) -> list[dict]:
    rows = []
    cases = [
        ("1 process sleeps", ours_sleeping, simpy_sleeping, (1, 300_000), 300_000),
        ("100 processes sleep", ours_sleeping, simpy_sleeping, (100, 3000), 300_000),
        ("1000 processes sleep", ours_sleeping, simpy_sleeping, (1000, 300), 300_000),
        ("100 pairs wake each other", ours_talking, simpy_talking, (100, 1000), 200_000),
    ]
    for name, ours, theirs, size, events in cases:
        best = [float("inf"), float("inf")]
        for _ in range(rounds):
            for side, make in enumerate((ours, theirs)):
                best[side] = min(best[side], seconds_of(make(*size)))
        rows.append(
            {
                "workload": name,
                "events_per_second": events / best[0],
                "simpy_events_per_second": events / best[1],
                "ratio": best[1] / best[0],
            }
        )
    return rows


# Flows: 10,000 at any time on a network of 1,000 links; who ends is replaced by a new one.

HOSTS, LEAVES = 400, 10


def leaf_spine() -> Cluster:
    """400 hosts under 10 leaves and 10 spines: 800 links to and from hosts, 200 between leaves and spines."""
    kind = Accelerator(name="a", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)
    hosts = [f"h{number}" for number in range(HOSTS)]
    links = []
    for number, host in enumerate(hosts):
        leaf = f"leaf{number * LEAVES // HOSTS}"
        links += [(host, leaf, 1e9), (leaf, host, 1e9)]
    for leaf in range(LEAVES):
        for spine in range(LEAVES):
            links += [(f"leaf{leaf}", f"spine{spine}", 4e9), (f"spine{spine}", f"leaf{leaf}", 4e9)]
    return Cluster(
        name="leaf-spine",
        accelerators={"a": kind},
        devices=tuple(Device(name=host, accelerator="a", node=host) for host in hosts),
        switches=tuple(Switch(name=f"{kind}{number}") for kind in ("leaf", "spine") for number in range(LEAVES)),
        links=tuple(Link(source=source, target=target, bytes_per_second=rate) for source, target, rate in links),
    ).validate()


def leaf_spine_path(source: int, target: int, spine: int) -> tuple[str, ...]:
    leaves = (source * LEAVES // HOSTS, target * LEAVES // HOSTS)
    middle = (
        (f"leaf{leaves[0]}",) if leaves[0] == leaves[1] else (f"leaf{leaves[0]}", f"spine{spine}", f"leaf{leaves[1]}")
    )
    return (f"h{source}", *middle, f"h{target}")


def flow_row(name: str, cluster: Cluster, draw: Callable[[], tuple[str, ...]], sizes: Callable[[], float], ends: int):
    """Flow events (starts and ends) per second with 10,000 flows at any time."""
    engine = Engine(SEED)
    network = Network(engine, cluster)
    count = 10_000

    def again(_) -> None:
        network.send(draw(), sizes()).sent.then(again)

    for _ in range(count):
        network.send(draw(), sizes()).sent.then(again)
    engine.run(1e-9)  # everything has begun
    target = network.flows_ended + ends

    def watch():
        while network.flows_ended < target:
            yield watching

    watching = 1e-3
    elapsed = seconds_of(lambda: engine.run(engine.process(watch())))
    done = network.flows_ended - target + ends
    return {
        "network": name,
        "links": len(network.links.names),
        "flows": count,
        "paths": len(network._paths),
        "flow_events_per_second": 2 * done / elapsed,
        "flow_events": 2 * done,
    }


def flow_rows(ends: int) -> list[dict]:
    rng = random.Random(SEED)
    cluster = leaf_spine()

    def anywhere() -> tuple[str, ...]:
        source, target = rng.sample(range(HOSTS), 2)
        return leaf_spine_path(source, target, rng.randrange(LEAVES))

    def mostly_near() -> tuple[str, ...]:
        source = rng.randrange(HOSTS)
        rack = source * LEAVES // HOSTS * (HOSTS // LEAVES)
        near = rack + (source - rack + rng.randrange(1, HOSTS // LEAVES)) % (HOSTS // LEAVES)
        target = near if rng.random() < 0.9 else (source + rng.randrange(1, HOSTS)) % HOSTS
        return leaf_spine_path(source, target, rng.randrange(LEAVES))

    fixed = [anywhere() for _ in range(1000)]

    def any_size() -> float:
        return rng.expovariate(1e-8)

    return [
        flow_row("leaf-spine, paths drawn anew", cluster, anywhere, any_size, ends),
        flow_row("leaf-spine, nine in ten stay in the rack", cluster, mostly_near, any_size, ends),
        flow_row("leaf-spine, 1000 paths", cluster, lambda: rng.choice(fixed), any_size, ends),
    ]


# Whole collectives.

PROGRAMS: list[tuple[str, str, Collective, int]] = [
    ("dgx-1v", "packed", "all_reduce", 64),
    ("dgx-1v", "packed", "all_reduce", 1),
    ("dgx-1v", "ring", "all_reduce", 64),
    ("dgx-h100:8", "ring", "all_reduce", 1),
    ("dgx-h100:8", "ring", "all_reduce", 16),
    ("dgx-h100:8", "hierarchical", "all_reduce", 64),
]


def program_rows(rounds: int) -> list[dict]:
    rows = []
    for preset, algorithm, collective, pieces in PROGRAMS:
        cluster = load_cluster(preset)
        program = algorithms.generate(algorithm, cluster, collective)
        played = simulate(program, cluster, 1e8, pieces=pieces)  # compiled from here on
        elapsed = min(
            seconds_of(lambda: simulate(program, cluster, 1e8, pieces=pieces))  # noqa: B023 - called at once
            for _ in range(rounds)
        )
        rows.append(
            {
                "cluster": preset,
                "algorithm": algorithm,
                "collective": collective,
                "ranks": program.size,
                "transfers": len(program.transfers),
                "pieces": pieces,
                "events": played.events,
                "wall_seconds": elapsed,
                "events_per_second": played.events / elapsed,
                "simulated_seconds": played.seconds,
                "predicted_seconds": predict_program(program, cluster, 1e8, pieces=pieces).seconds,
            }
        )
    return rows


def show(console: Console, title: str, rows: list[dict]) -> None:
    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["engine", "flows", "programs"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ends", type=int, default=4000, help="flows to end in each network")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    record = new_record(SEED, python=platform.python_version(), numpy=np.__version__)
    if arguments.only in (None, "engine"):
        record["engine"] = engine_rows(arguments.rounds)
        show(console, "Events per second of processor time", record["engine"])
    if arguments.only in (None, "flows"):
        record["flows"] = flow_rows(arguments.ends)
        show(console, "Flows that share a network", record["flows"])
    if arguments.only in (None, "programs"):
        record["programs"] = program_rows(arguments.rounds)
        # The rest is in the file.
        narrow = [
            {key: row[key] for key in row if key not in ("collective", "events", "wall_seconds", "transfers")}
            for row in record["programs"]
        ]
        show(console, "Collectives of 100 MB", narrow)
    if arguments.output is not None:
        save_record(record, arguments.output)


if __name__ == "__main__":
    main()
