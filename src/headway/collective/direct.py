"""Everyone to everyone in one step: the fewest steps, and as many messages as there are pairs of ranks.

Best for short vectors, and for ranks that share a memory, where reading from many costs no more than reading from one:
there an all-reduce is each rank adding up its share of the vector from all others, and then everybody reading the
results. It is also what gather, scatter and all-to-all are on a network whose links all pairs can use alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from headway.collective.chains import begin, simple_chunks
from headway.collective.program import Builder, Collective, Program, even_chunks
from headway.hardware.cluster import Cluster

__all__ = ["COLLECTIVES", "direct"]

COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


def direct(cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0) -> Program:
    """Any collective, each chunk sent straight from whoever has it to whoever needs it.

    A rank adds contributions to its own in the order of the ranks. All-reduce is a reduce-scatter, n-1 contributions
    to each rank's share, followed by an all-gather. Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("direct", COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    chunks = even_chunks(size) if collective == "all_reduce" else simple_chunks(collective, size)
    builder = Builder("direct", collective, names, chunks, cluster=cluster, root=root)
    others = [rank for rank in range(size) if rank != root]
    match collective:
        case "broadcast":
            for rank in others:
                builder.transfer(0, root, rank)
        case "reduce":
            for rank in others:
                builder.transfer(0, rank, root, reduce=True)
        case "scatter":
            for rank in others:
                builder.transfer(rank, root, rank)
        case "gather":
            for rank in others:
                builder.transfer(rank, rank, root)
        case "all_to_all":
            for shift in range(1, size):
                for rank in range(size):
                    target = (rank + shift) % size
                    builder.transfer(rank * size + target, rank, target)
        case _:
            if collective != "all_gather":
                for source in range(size):
                    for owner in range(size):
                        if owner != source:
                            builder.transfer(owner, source, owner, reduce=True)
            if collective != "reduce_scatter":
                for shift in range(1, size):
                    for owner in range(size):
                        builder.transfer(owner, owner, (owner + shift) % size)
    return builder.build()
