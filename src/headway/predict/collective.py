"""What a program costs on the links that it names, in closed form.

Two things bound a collective (Hockney 1994; Thakur, Rabenseifner, Gropp, IJHPCA 2005): the bytes that its most loaded
link must carry, and the hops that one piece of data makes one behind the other. Chunks are cut into pieces that follow
each other like the cars of a train: with K pieces the first arrives after the longest chain of hops at 1/K of the
size, and the others follow at the pace of the most loaded link.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from headway.collective.program import Program, bus_factor
from headway.errors import ClusterError
from headway.hardware.cluster import Cluster
from headway.value import Value

__all__ = ["CollectiveTime", "link_loads", "predict_program"]

# Smaller pieces than this are not worth a message of their own, on any transport that we know.
_SMALLEST_PIECE_BYTES = 16 * 1024
_MOST_PIECES = 1024


class CollectiveTime(Value):
    """What a program was predicted to take: `seconds` in all, of which `bandwidth_seconds` are the bytes on
    `bottleneck` (the two ends of the most loaded link), and the rest hops and the filling of the pipeline.

    `bytes_per_second`: of the vector. `bus_bytes_per_second`: the same in the convention of nccl-tests.
    """

    seconds: float
    pieces: int  # that each chunk is cut into
    bandwidth_seconds: float
    latency_seconds: float
    bottleneck: tuple[str, str] | None
    bytes_per_second: float
    bus_bytes_per_second: float


class _Shape:
    """A program's longest chains and link loads on one cluster, before the vector's size is known."""

    def __init__(self, program: Program, cluster: Cluster) -> None:
        rate: dict[tuple[str, str], float] = {}
        latency: dict[tuple[str, str], float] = {}
        for link in cluster.links:
            key = (link.source, link.target)
            rate[key] = rate.get(key, 0.0) + link.bytes_per_second
            latency[key] = max(latency.get(key, 0.0), link.latency_seconds)
        number = {key: position for position, key in enumerate(rate)}
        self.names = list(rate)
        self.rates = np.array(list(rate.values()) or [1.0])
        hops: list[tuple[list[int], float]] = []
        for position, path in enumerate(program.paths):
            keys = list(itertools.pairwise(path))
            for key in keys:
                if key not in number:
                    raise ClusterError(
                        f"no link leads from {key[0]} to {key[1]}",
                        place=f"{cluster.name}: {program.name}: paths[{position}]",
                        remedy=f"use it on the cluster that it was made for: {program.cluster or 'not named'}",
                    )
            hops.append(([number[key] for key in keys], sum(latency[key] for key in keys)))
        # Transfers that are equally deep share the links that they have in common.
        depth = np.zeros(len(program.transfers), dtype=np.int64)
        for position, transfer in enumerate(program.transfers):
            if transfer.after:
                depth[position] = 1 + max(depth[other] for other in transfer.after)
        fraction = np.array([program.fraction(chunk) for chunk in range(len(program.chunks))])
        self.loads = np.zeros(len(self.rates))
        together: dict[tuple[int, int], float] = {}
        for position, transfer in enumerate(program.transfers):
            share = float(fraction[transfer.chunk])
            for link in hops[transfer.path][0]:
                self.loads[link] += share
                key = (int(depth[position]), link)
                together[key] = together.get(key, 0.0) + share
        seconds_per_byte = 1.0 / self.rates
        self.latency = [hops[transfer.path][1] for transfer in program.transfers]
        self.slowness = [
            float(max(together[int(depth[position]), link] * seconds_per_byte[link] for link in hops[transfer.path][0]))
            for position, transfer in enumerate(program.transfers)
        ]
        self.after = [transfer.after for transfer in program.transfers]
        busy = self.loads * seconds_per_byte
        self.busiest = int(np.argmax(busy))
        self.latency_at_bottleneck = min((delay for links, delay in hops if self.busiest in links), default=0.0)
        self.seconds_per_byte = float(busy[self.busiest])

    def longest_chain(self, size_bytes: float) -> float:
        """Seconds until the last transfer of one piece has arrived, if the vector were of this size."""
        arrived: list[float] = []
        for latency, slowness, after in zip(self.latency, self.slowness, self.after, strict=True):
            start = max((arrived[other] for other in after), default=0.0)
            arrived.append(start + latency + slowness * size_bytes)
        return max(arrived, default=0.0)


def link_loads(program: Program, cluster: Cluster) -> dict[tuple[str, str], float]:
    """(source, target) of every link that the program uses → how many times the vector's bytes pass it.

    Raises ClusterError if a path of the program is not in the cluster.
    """
    shape = _Shape(program.validate().in_order(), cluster)
    return {shape.names[link]: float(shape.loads[link]) for link in np.flatnonzero(shape.loads)}


def predict_program(
    program: Program, cluster: Cluster, size_bytes: float, *, pieces: int | None = None
) -> CollectiveTime:
    """The time that `program` takes for a vector of `size_bytes` (see Program) on an otherwise idle `cluster`.

    Each chunk is cut into `pieces`, or into as many as are fastest. Raises ClusterError if a path of the program is
    not in the cluster, ProgramError if the program contradicts itself.
    """
    program = program.validate().in_order()
    shape = _Shape(program, cluster)
    if not program.transfers or size_bytes <= 0:
        start = cluster.collective_latency_seconds if program.transfers else 0.0
        return CollectiveTime(
            seconds=start,
            pieces=1,
            bandwidth_seconds=0.0,
            latency_seconds=start,
            bottleneck=None,
            bytes_per_second=0.0,
            bus_bytes_per_second=0.0,
        )
    bandwidth_seconds = shape.seconds_per_byte * size_bytes
    # Each chain may be quick while all of them wait in turn for one link; that link hides the latency of the others.
    least = bandwidth_seconds + shape.latency_at_bottleneck
    counts = [pieces] if pieces is not None else _counts(program, size_bytes)
    best, chosen = math.inf, counts[0]
    # The chain is linear in the size up to where another chain takes over; doubling finds the best to a few percent.
    for count in counts:
        seconds = max(shape.longest_chain(size_bytes / count) + bandwidth_seconds * (1 - 1 / count), least)
        if seconds < best * (1 - 1e-9):
            best, chosen = seconds, count
    seconds = best + cluster.collective_latency_seconds
    return CollectiveTime(
        seconds=seconds,
        pieces=chosen,
        bandwidth_seconds=bandwidth_seconds,
        latency_seconds=seconds - bandwidth_seconds,
        bottleneck=shape.names[shape.busiest],
        bytes_per_second=size_bytes / seconds,
        bus_bytes_per_second=size_bytes / seconds * bus_factor(program.collective, program.size),
    )


def _counts(program: Program, size_bytes: float) -> list[int]:
    # Of the average chunk: a few chunks that are much smaller than the others (of a packing) do not decide.
    chunk_bytes = sum(chunk.weight for chunk in program.chunks) / len(program.chunks) / program.unit * size_bytes
    most = max(1, min(_MOST_PIECES, int(chunk_bytes // _SMALLEST_PIECE_BYTES)))
    return [1 << power for power in range(most.bit_length())]
