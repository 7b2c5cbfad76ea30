"""Trees and hypercubes: a number of steps that grows with the logarithm of the ranks.

*Double binary tree* (Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan",
Parallel Computing 2009; NCCL uses it between nodes): in one binary tree half of the ranks are leaves and send nothing
on. A second tree, in which these are the inner ranks, carries the other half of the vector.

*Binomial tree*: in each step everyone who has the data sends it to one who has not. The fewest steps there can be.

*Recursive halving and doubling* (Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations
in MPICH", IJHPCA 2005, section 4): in step k the ranks whose numbers differ in bit k alone exchange half of what they
still work on. As few bytes as a ring, in 2 log2 n steps. If n is not a power of two, as many ranks as are too many
lend their data to a neighbour first, and get the result from it in the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from headway.collective.chains import begin, group_by_node, simple_chunks
from headway.collective.program import Builder, Collective, Program, even_chunks
from headway.hardware.cluster import Cluster

__all__ = [
    "BINOMIAL_COLLECTIVES",
    "DOUBLE_TREE_COLLECTIVES",
    "HALVING_DOUBLING_COLLECTIVES",
    "binomial_tree",
    "double_tree",
    "halving_doubling",
]

DOUBLE_TREE_COLLECTIVES: tuple[Collective, ...] = ("broadcast", "reduce", "all_reduce")
BINOMIAL_COLLECTIVES: tuple[Collective, ...] = ("broadcast", "reduce", "all_reduce")
HALVING_DOUBLING_COLLECTIVES: tuple[Collective, ...] = ("all_reduce", "reduce_scatter", "all_gather")


def double_tree(
    cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0
) -> Program:
    """Broadcast, reduce or all-reduce over two binary trees, half of the vector on each.

    The trees stand on the ranks in the order of their nodes, so that only high branches leave a node. A root stands
    above both trees. Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("tree", DOUBLE_TREE_COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    builder = Builder("tree", collective, names, even_chunks(2), cluster=cluster, root=root)
    ranks = [rank for group in group_by_node(cluster, names) for rank in group]
    if collective != "all_reduce":
        ranks.remove(root)
    count = len(ranks)
    up: list[list[tuple[int, int, int]]] = []  # for each tree: (depth, child, parent)
    for second in (False, True):
        parents = _binary_tree(count)
        # The second tree: mirrored if the number of ranks is even, else moved on by one; leaves become inner nodes.
        place = [(count - 1 - at if count % 2 == 0 else (at + 1) % count) if second else at for at in range(count)]
        edges = []
        for at, parent in enumerate(parents):
            if parent >= 0:
                edges.append((_depth(parents, at), ranks[place[at]], ranks[place[parent]]))
            elif collective != "all_reduce":
                edges.append((0, ranks[place[at]], root))
        up.append(sorted(edges, reverse=True))
    # Deepest first going up, highest first coming down, the two trees in turns.
    if collective != "broadcast":
        for _, chunk, child, parent in sorted(
            ((depth, chunk, child, parent) for chunk, edges in enumerate(up) for depth, child, parent in edges),
            key=lambda edge: -edge[0],
        ):
            builder.transfer(chunk, child, parent, reduce=True)
    if collective != "reduce":
        for _, chunk, child, parent in sorted(
            ((depth, chunk, child, parent) for chunk, edges in enumerate(up) for depth, child, parent in edges),
            key=lambda edge: edge[0],
        ):
            builder.transfer(chunk, parent, child)
    return builder.build()


def _binary_tree(count: int) -> list[int]:
    """Parents in the in-order binary tree of positions 0 to `count` - 1 (-1: its root): even positions are leaves.

    Position p stands at the height of the lowest bit of p + 1. Where the parent would be beyond the end, the next one
    further up takes its place.
    """
    root = 1 << (count.bit_length() - 1)
    parents = []
    for position in range(1, count + 1):
        above = position
        while position != root:
            bit = above & -above
            above = (above & ~bit) | (bit << 1)
            if above <= count:
                break
        parents.append(above - 1 if position != root else -1)
    return parents


def _depth(parents: Sequence[int], position: int) -> int:
    depth = 0
    while parents[position] >= 0:
        position = parents[position]
        depth += 1
    return depth


def binomial_tree(
    cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0
) -> Program:
    """Broadcast or reduce over a binomial tree in ceil(log2 n) steps; all-reduce is a reduce to rank 0 and back.

    Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("binomial", BINOMIAL_COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    builder = Builder("binomial", collective, names, simple_chunks(collective, size), cluster=cluster, root=root)
    # Counted from the root on, node by node; far steps first going down, so that few of them leave a node.
    ranks = [rank for group in group_by_node(cluster, names) for rank in group]
    start = ranks.index(root)
    ranks = [*ranks[start:], *ranks[:start]]
    pairs: list[tuple[int, int]] = []
    distance = 1 << (size - 1).bit_length()
    while distance > 1:
        distance //= 2
        for at in range(0, size - distance, 2 * distance):
            pairs.append((ranks[at], ranks[at + distance]))
    if collective != "broadcast":
        for parent, child in reversed(pairs):
            builder.transfer(0, child, parent, reduce=True)
    if collective != "reduce":
        for parent, child in pairs:
            builder.transfer(0, parent, child)
    return builder.build()


def halving_doubling(
    cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0
) -> Program:
    """Reduce-scatter by recursive halving, all-gather by recursive doubling, all-reduce by one after the other.

    Raises ProgramError, ClusterError, DisconnectedError.
    """
    names, trivial = begin("halving-doubling", HALVING_DOUBLING_COLLECTIVES, cluster, collective, devices, root)
    if trivial is not None:
        return trivial
    size = len(names)
    power = 1 << (size.bit_length() - 1)
    spare = size - power
    # Of the first 2 x spare ranks every other one works for its neighbour too.
    ranks = [rank for group in group_by_node(cluster, names) for rank in group]
    workers = [*ranks[: 2 * spare : 2], *ranks[2 * spare :]]
    lenders = list(zip(ranks[1 : 2 * spare : 2], workers))
    if collective == "all_reduce":
        chunks, shares = even_chunks(power), [[at] for at in range(power)]
    else:
        chunks = simple_chunks(collective, size)
        shares = [[worker, lenders[at][0]] if at < spare else [worker] for at, worker in enumerate(workers)]
    builder = Builder("halving-doubling", collective, names, chunks, cluster=cluster, root=root)
    everything = range(len(chunks))
    distances = [1 << bit for bit in range(power.bit_length() - 1)]
    if collective != "all_gather":
        for lender, worker in lenders:
            for chunk in everything:
                builder.transfer(chunk, lender, worker, reduce=True)
        # Near first: the larger halves stay in the node. What both still work on agrees with them in all lower bits.
        for distance in distances:
            for at, worker in enumerate(workers):
                partner = at ^ distance
                for share in range(partner % (2 * distance), power, 2 * distance):
                    for chunk in shares[share]:
                        builder.transfer(chunk, worker, workers[partner], reduce=True)
    if collective == "reduce_scatter":
        for lender, worker in lenders:
            builder.transfer(lender, worker, lender)
    if collective == "all_gather":
        for lender, worker in lenders:
            builder.transfer(lender, lender, worker)
    if collective != "reduce_scatter":
        for distance in reversed(distances):
            for at, worker in enumerate(workers):
                for share in range(at % (2 * distance), power, 2 * distance):
                    for chunk in shares[share]:
                        builder.transfer(chunk, worker, workers[at ^ distance])
        for lender, worker in lenders:
            for chunk in everything:
                if collective == "all_reduce" or chunk != lender:
                    builder.transfer(chunk, worker, lender)
    return builder.build()
