"""What the algorithms are built from: chains, along which a chunk is handed on from rank to rank.

A chain that reduces adds each rank's contribution on the way, and the last rank has them all; one that does not leaves
a copy at every rank. Rings, tori and hierarchies are chains that begin and end at different ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from headway.collective.program import Builder, Chunk, Collective, Program, blocks, even_chunks
from headway.errors import ClusterError, ProgramError
from headway.hardware.cluster import Cluster

__all__ = ["Chain", "add_chains", "begin", "choose_devices", "group_by_node", "simple_chunks"]


class Chain(NamedTuple):
    """`chunk` is handed on along `ranks`; hop i passes `paths[i]` (None: what `Cluster.route` says)."""

    chunk: int
    ranks: Sequence[int]
    reduce: bool = False
    paths: Sequence[Sequence[str] | None] = ()


def add_chains(builder: Builder, chains: Iterable[Chain]) -> None:
    """Add the hops of all chains: first the first hop of each, then the second, so that they go on side by side."""
    alive = [chain for chain in chains if len(chain.ranks) > 1]
    hop = 0
    while alive:
        for chain in alive:
            builder.transfer(
                chain.chunk,
                chain.ranks[hop],
                chain.ranks[hop + 1],
                reduce=chain.reduce,
                path=chain.paths[hop] if chain.paths else None,
            )
        hop += 1
        alive = [chain for chain in alive if len(chain.ranks) > hop + 1]


def choose_devices(cluster: Cluster, devices: Sequence[str] | None) -> tuple[str, ...]:
    """The names given (all devices of the cluster if None). Raises ClusterError: unknown, named twice, none."""
    known = [device.name for device in cluster.devices]
    if devices is None:
        return tuple(known)
    if not devices:
        raise ClusterError("no devices are chosen", place=cluster.name, remedy="choose at least one")
    for position, name in enumerate(devices):
        if name not in known:
            raise ClusterError(
                f"no device is named {name!r}", place=cluster.name, remedy="see `headway probe` or the preset's names"
            )
        if name in devices[:position]:
            raise ClusterError(f"device {name!r} is named twice", place=cluster.name, remedy="name each device once")
    return tuple(devices)


def group_by_node(cluster: Cluster, devices: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, in the order of the ranks."""
    node_of = {device.name: device.node for device in cluster.devices}
    groups: dict[str, list[int]] = {}
    for rank, name in enumerate(devices):
        groups.setdefault(node_of[name], []).append(rank)
    return list(groups.values())


def simple_chunks(collective: Collective, size: int) -> tuple[Chunk, ...]:
    """The fewest chunks that a collective can have: the whole vector, or a block for each rank (or pair of ranks)."""
    if collective in ("broadcast", "reduce", "all_reduce"):
        return even_chunks(1)
    if collective == "all_to_all":
        return tuple(Chunk(owner=owner, target=target) for owner in range(size) for target in range(size))
    return blocks(size)


def begin(
    name: str,
    collectives: Collection[str],
    cluster: Cluster,
    collective: Collective,
    devices: Sequence[str] | None,
    root: int,
) -> tuple[tuple[str, ...], Program | None]:
    """The names of the devices, and for a single device the program, which has nothing to transfer.

    Raises ProgramError for a collective that is not among `collectives` and for a root that is not there, ClusterError
    as `choose_devices` does.
    """
    if collective not in collectives:
        raise ProgramError(
            f"does not do {collective!r}", place=f"algorithm {name!r}", remedy=f"it does: {', '.join(collectives)}"
        )
    chosen = choose_devices(cluster, devices)
    if not 0 <= root < len(chosen):
        raise ProgramError(f"no rank {root}", place=f"{name}: root", remedy=f"0 to {len(chosen) - 1}")
    if len(chosen) > 1:
        return chosen, None
    return chosen, Builder(name, collective, chosen, simple_chunks(collective, 1), cluster=cluster).build()
