"""Collectives in levels: inside a node over its fast links, between nodes over the slow ones.

*Hierarchical*: each device of a node is in charge of a part of the vector. Contributions are reduced in the node to
whoever is in charge, then among those in charge of the same part in all nodes, and the results go the same way back.
So each byte leaves a node once, not once for each device. Nodes may be of different sizes.

*2-D torus* (Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash", 2018): ranks in rows
and columns; reduce-scatter along rows, all-reduce along columns, all-gather along rows. Here the vector is quartered:
two quarters go along the rows first and two along the columns, one of each pair in one direction and one in the other,
so that all four links of each rank are busy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headway.collective.chains import Chain, add_chains, begin, group_by_node
from headway.collective.program import Builder, Chunk, Collective, Program, blocks, even_chunks
from headway.collective.ring import local_order
from headway.errors import ProgramError
from headway.hardware.cluster import Cluster

__all__ = ["COLLECTIVES", "hierarchical", "torus"]

COLLECTIVES: tuple[Collective, ...] = ("broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather")


def _turned(cycle: Sequence[int], first: int) -> list[int]:
    """Once around the cycle, beginning at this member."""
    at = cycle.index(first)
    return [*cycle[at:], *cycle[:at]]


def _ending(cycle: Sequence[int], last: int) -> list[int]:
    """Once around the cycle, ending at this member."""
    at = cycle.index(last) + 1
    return [*cycle[at:], *cycle[:at]]


def hierarchical(
    cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0
) -> Program:
    """Any of `COLLECTIVES` in two levels: around each node, and around the nodes.

    There are as many parts as the largest node has devices, and in all-reduce each is cut into one chunk for each
    node, which is complete when it has been around all nodes. Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("hierarchical", COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    nodes = [
        [group[at] for at in local_order(cluster, [names[rank] for rank in group])]
        for group in group_by_node(cluster, names)
    ]
    home = {rank: number for number, node in enumerate(nodes) for rank in node}
    parts = max(map(len, nodes))
    # Each chunk: the part, which decides who is in charge in each node, and where its reduction ends or it comes from.
    plan: list[tuple[int, int]] = []
    if collective == "all_reduce":
        chunks: tuple[Chunk, ...] = even_chunks(parts * len(nodes))
        plan = [(part, nodes[node][part % len(nodes[node])]) for part in range(parts) for node in range(len(nodes))]
    elif collective in ("reduce_scatter", "all_gather"):
        chunks = blocks(size)
        plan = [(nodes[home[rank]].index(rank), rank) for rank in range(size)]
    else:
        chunks = even_chunks(parts)
        plan = [(part, root) for part in range(parts)]
    builder = Builder("hierarchical", collective, names, chunks, cluster=cluster, root=root)
    inwards: list[Chain] = []  # in the nodes, to those in charge
    across: list[Chain] = []
    homewards: list[Chain] = []  # in the end's own node, to the end
    for chunk, (part, end) in enumerate(plan):
        charge = [node[part % len(node)] for node in nodes]
        for number, node in enumerate(nodes):
            if number != home[end]:
                inwards.append(Chain(chunk, _ending(node, charge[number]), reduce=True))
        across.append(Chain(chunk, _ending(charge, charge[home[end]]), reduce=True))
        homewards.append(Chain(chunk, _ending(nodes[home[end]], end), reduce=True))
    if collective not in ("broadcast", "all_gather"):
        # The end's node joins last, or it would wait for the others with its own sum.
        if collective == "reduce":
            add_chains(builder, inwards)
            add_chains(builder, across)
            add_chains(builder, homewards)
        else:
            # Here the end is itself in charge: all nodes reduce alike, then the sums go around the nodes.
            add_chains(builder, [*inwards, *homewards])
            add_chains(builder, across)
    if collective not in ("reduce", "reduce_scatter"):
        own: list[Chain] = []
        outwards: list[Chain] = []
        beyond: list[Chain] = []
        for chunk, (part, end) in enumerate(plan):
            charge = [node[part % len(node)] for node in nodes]
            own.append(Chain(chunk, _turned(nodes[home[end]], end)))
            beyond.append(Chain(chunk, _turned(charge, charge[home[end]])))
            outwards.extend(
                Chain(chunk, _turned(node, charge[number])) for number, node in enumerate(nodes) if number != home[end]
            )
        if collective == "broadcast":
            add_chains(builder, own)
            add_chains(builder, beyond)
            add_chains(builder, outwards)
        else:
            add_chains(builder, beyond)
            add_chains(builder, [*own, *outwards])
    return builder.build()


def torus(
    cluster: Cluster,
    collective: Collective,
    devices: Sequence[str] | None = None,
    *,
    root: int = 0,
    shape: tuple[int, int] | None = None,
) -> Program:
    """Any of `COLLECTIVES` on a torus of `shape` (rows, columns), whose ranks are counted row by row.

    Without a shape the nodes are the rows if they are of one size and there are several; else the shape is the one
    nearest to a square. A prime number of ranks gives one row, which is a ring in both directions. Raises
    ProgramError, also for a shape that the ranks do not fill, ClusterError, DisconnectedError.
    """
    names, trivial = begin("torus", COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    groups = group_by_node(cluster, names)
    grid: list[list[int]]
    if shape is None and len(groups) > 1 and len({len(group) for group in groups}) == 1:
        grid = [[group[at] for at in local_order(cluster, [names[rank] for rank in group])] for group in groups]
    else:
        if shape is None:
            rows = max(number for number in range(1, math.isqrt(size) + 1) if size % number == 0)
            shape = (rows, size // rows)
        if shape[0] * shape[1] != size or min(shape) < 1:
            raise ProgramError(
                f"{shape[0]} x {shape[1]} is not {size} ranks",
                place="torus: shape",
                remedy="give rows and columns that multiply to the number of ranks",
            )
        ranks = [rank for group in groups for rank in group]
        grid = [ranks[row * shape[1] : (row + 1) * shape[1]] for row in range(shape[0])]
    at = {rank: (row, column) for row, line in enumerate(grid) for column, rank in enumerate(line)}
    columns = [list(column) for column in zip(*grid)]
    quarters = [(across, way) for across in (False, True) for way in (1, -1)]
    if collective == "all_reduce":
        chunks: tuple[Chunk, ...] = even_chunks(4 * size)
        ends = [(quarter, rank) for quarter in range(4) for rank in range(size)]
    elif collective in ("reduce_scatter", "all_gather"):
        chunks = blocks(size, (1, 1, 1, 1))
        ends = [(quarter, rank) for rank in range(size) for quarter in range(4)]
    else:
        chunks = even_chunks(4)
        ends = [(quarter, root) for quarter in range(4)]
    builder = Builder("torus", collective, names, chunks, cluster=cluster, root=root)
    first: list[Chain] = []
    second: list[Chain] = []
    for chunk, (quarter, end) in enumerate(ends):
        across, way = quarters[quarter]
        row, column = at[end]
        # `lines` are gone along first, each to its member in `last`, which holds the end.
        lines, last = (columns, grid[row]) if across else (grid, columns[column])
        for line, member in zip(lines, last, strict=True):
            first.append(Chain(chunk, _ending(line[::way], member), reduce=True))
        second.append(Chain(chunk, _ending(last[::way], end), reduce=True))
    if collective not in ("broadcast", "all_gather"):
        add_chains(builder, first)
        add_chains(builder, second)
    if collective not in ("reduce", "reduce_scatter"):
        # Back the same way: from the end along its line, then along the lines that cross it.
        add_chains(builder, [_back(chain) for chain in second])
        add_chains(builder, [_back(chain) for chain in first])
    return builder.build()


def _back(chain: Chain) -> Chain:
    """The same ranks, from the last, in the same direction, without reduction."""
    return Chain(chain.chunk, [chain.ranks[-1], *chain.ranks[:-1]])
