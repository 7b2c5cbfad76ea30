"""Algorithms for one collective side by side: predicted, simulated, and as a share of what the links allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from headway.collective import algorithms
from headway.collective.packing import optimal_rate
from headway.collective.program import Collective, Program
from headway.collective.topology import topology_of
from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.predict.collective import CollectiveTime, link_loads, predict_program
from headway.simulate.communication import Simulated, simulate
from headway.value import Value

__all__ = ["Compared", "Comparison", "Entry", "compare"]

# The collectives for which a bound on the rate is known.
_BOUNDED = {"broadcast", "reduce", "all_gather", "reduce_scatter", "all_reduce"}


class Entry(Value):
    """What one algorithm does: times in seconds; `optimum_share`, of the best possible rate for large vectors, counts
    bytes on links alone and is 0 where no bound is known. `left_out` says why there are no figures."""

    algorithm: str
    predicted_seconds: float = 0.0
    simulated_seconds: float = 0.0
    bytes_per_second: float = 0.0  # simulated, of the vector
    bus_bytes_per_second: float = 0.0  # the same, in the convention of nccl-tests
    optimum_share: float = 0.0
    pieces: int = 0
    transfers: int = 0
    bottleneck: tuple[str, str] | None = None
    left_out: str = ""


class Comparison(Value):
    """A collective of `size_bytes` among `devices`: the entries from the fastest to the slowest."""

    cluster: str
    devices: tuple[str, ...]
    collective: str
    size_bytes: float
    optimal_bytes_per_second: float  # for large vectors, over the links that joining the devices takes; 0: not known
    entries: tuple[Entry, ...]


class Compared:
    """A comparison with what stands behind it: the program and its simulation, by algorithm."""

    def __init__(
        self, comparison: Comparison, programs: dict[str, Program], simulated: dict[str, Simulated], cluster: Cluster
    ) -> None:
        self.comparison = comparison
        self.programs = programs
        self.simulated = simulated
        self.cluster = cluster

    @property
    def best(self) -> str:
        """The algorithm that the simulation finds fastest."""
        return self.comparison.entries[0].algorithm

    def busy(self, algorithm: str) -> dict[tuple[str, str], float]:
        """(source, target) → the share of the collective's time that the link carries bytes."""
        rate: dict[tuple[str, str], float] = {}
        for link in self.cluster.links:
            key = (link.source, link.target)
            rate[key] = rate.get(key, 0.0) + link.bytes_per_second
        seconds = self.simulated[algorithm].seconds
        size = self.comparison.size_bytes
        loads = link_loads(self.programs[algorithm], self.cluster)
        return {key: load * size / rate[key] / seconds if seconds else 0.0 for key, load in loads.items()}


def compare(
    cluster: Cluster,
    collective: Collective,
    size_bytes: float,
    *,
    devices: Sequence[str] | None = None,
    root: int = 0,
    names: Sequence[str] | None = None,
    pieces: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Generate, predict and simulate `collective` by the algorithms called `names`, or by all that can do it.

    Raises InputError if none of them can, or for an unknown name; DisconnectedError for devices that cannot reach each
    other. An algorithm that fails on these devices is listed with its reason.
    """
    if not 0 < size_bytes < math.inf:
        raise InputError(f"a vector of {size_bytes:g} bytes", place="--size", remedy="give a size like 100MB")
    chosen = tuple(names) if names else algorithms.names(collective)
    members = tuple(device.name for device in cluster.devices) if devices is None else tuple(devices)
    topology = topology_of(cluster, members)
    optimum = optimal_rate(topology, collective, root) if collective in _BOUNDED and len(members) > 1 else 0.0
    entries: list[Entry] = []
    programs: dict[str, Program] = {}
    simulated: dict[str, Simulated] = {}
    for name in chosen:
        progress(f"Simulating {name}")
        try:
            program = algorithms.generate(name, cluster, collective, members, root=root)
        except InputError as error:
            if len(chosen) == 1:
                raise
            entries.append(Entry(algorithm=name, left_out=error.message))
            continue
        predicted: CollectiveTime = predict_program(program, cluster, size_bytes, pieces=pieces)
        played = simulate(program, cluster, size_bytes, pieces=predicted.pieces)
        programs[name], simulated[name] = program, played
        rate = size_bytes / predicted.bandwidth_seconds if predicted.bandwidth_seconds else 0.0
        entries.append(
            Entry(
                algorithm=name,
                predicted_seconds=predicted.seconds,
                simulated_seconds=played.seconds,
                bytes_per_second=played.bytes_per_second,
                bus_bytes_per_second=played.bus_bytes_per_second,
                optimum_share=rate / optimum if optimum else 0.0,
                pieces=predicted.pieces,
                transfers=len(program.transfers),
                bottleneck=predicted.bottleneck,
            )
        )
    if not programs:
        reasons = "; ".join(f"{entry.algorithm}: {entry.left_out}" for entry in entries)
        raise InputError(f"no algorithm does this {collective}: {reasons}", place=cluster.name)
    entries.sort(key=lambda entry: (bool(entry.left_out), entry.simulated_seconds))
    comparison = Comparison(
        cluster=cluster.name,
        devices=members,
        collective=collective,
        size_bytes=size_bytes,
        optimal_bytes_per_second=optimum,
        entries=tuple(entries),
    )
    return Compared(comparison, programs, simulated, cluster)
