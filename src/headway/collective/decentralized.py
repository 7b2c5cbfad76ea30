"""All-reduce by servers and by gossip: who adds up, and who merely passes on.

- A **parameter server** adds up what all push to it and lets them pull the sum (Li et al., OSDI 2014); *sharded*, each
  rank serves its part of the vector; *rolling*, the role moves on each round, so that no rank is special for long and
  a dead one is passed over.
- **Gossip** needs no server and no agreement: each rank sends shares of what it has to a few random peers, and all come
  to hold the mean (push-sum, Kempe, Dobra and Gehrke, FOCS 2003).
- **BytePS** (Jiang et al., OSDI 2020, section 4) divides the adding between the machines that train and CPU machines
  that help, so that no network card waits for another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import msgspec
import numpy as np

from headway.collective.program import Builder, Chunk, Program, Transfer, even_chunks
from headway.collective.topology import topology_of
from headway.errors import InputError, ProgramError
from headway.hardware.cluster import Cluster

__all__ = [
    "BytePSSplit",
    "RollingRound",
    "byteps_program",
    "byteps_split",
    "gossip_program",
    "gossip_targets",
    "parameter_server_program",
    "push_sum_round",
    "rolling_rounds",
    "rolling_server",
    "rolling_server_program",
    "sharded_server_program",
]


def _chosen(cluster: Cluster, devices: Sequence[str] | None) -> tuple[str, ...]:
    # Refuses unknown, doubled and disconnected devices; routes are the cluster's own, over all kinds of links.
    return topology_of(cluster, devices, kinds={link.kind for link in cluster.links}).devices


# --- Parameter servers ---


def parameter_server_program(cluster: Cluster, devices: Sequence[str] | None = None, *, server: int = 0) -> Program:
    """An all-reduce by one server rank: all others push their vector to it, and pull the sum.

    Raises ProgramError for a server that is no rank; DisconnectedError and ClusterError as `topology_of`.
    """
    names = _chosen(cluster, devices)
    if not 0 <= server < len(names):
        raise ProgramError(f"no rank {server}", place="parameter server: server", remedy=f"0 to {len(names) - 1}")
    return _served("parameter server", cluster, names, even_chunks(1), [server])


def sharded_server_program(cluster: Cluster, devices: Sequence[str] | None = None) -> Program:
    """An all-reduce in which each rank is the server of one n-th of the vector. Raises as `topology_of`."""
    names = _chosen(cluster, devices)
    return _served("sharded server", cluster, names, even_chunks(len(names)), range(len(names)))


def _served(
    name: str, cluster: Cluster, names: Sequence[str], chunks: Sequence[Chunk], servers: Sequence[int], workers: int = 0
) -> Program:
    """The first `workers` ranks (all, unless given) push each chunk to its server and pull it again."""
    workers = workers or len(names)
    builder = Builder(name, "all_reduce", names, chunks, cluster=cluster)
    # Each worker begins with the chunk that follows its own, so that at no time all push to one server.
    pairs = [
        (worker, (worker + turn) % len(chunks))
        for turn in range(len(chunks))
        for worker in range(workers)
        if worker != servers[(worker + turn) % len(chunks)]
    ]
    for worker, chunk in pairs:
        builder.transfer(chunk, worker, servers[chunk], reduce=True)
    for worker, chunk in pairs:
        builder.transfer(chunk, servers[chunk], worker)
    return builder.build()


def rolling_server(size: int, round: int, dead: Collection[int] = ()) -> int:
    """The rank that serves in a round: `round` modulo `size`, or the next one that lives.

    Whoever knows of a death and whoever doesn't agree on all rounds but those that the dead rank would have served.
    Raises ProgramError where nobody lives.
    """
    for step in range(size):
        server = (round + step) % size
        if server not in dead:
            return server
    raise ProgramError("no rank lives", place="rolling server", remedy="restart at least one rank")


class RollingRound(msgspec.Struct, frozen=True):
    """One round: its number, who serves, who takes part (ranks of the whole group), and the program among these.

    The program's ranks are positions in `living`.
    """

    number: int
    server: int
    living: tuple[int, ...]
    program: Program


def rolling_server_program(
    cluster: Cluster, devices: Sequence[str] | None = None, *, round: int = 0, dead: Collection[int] = ()
) -> Program:
    """The all-reduce of one round among the living ranks, by the server whose turn it is.

    Raises ProgramError where nobody lives; DisconnectedError and ClusterError as `topology_of`.
    """
    names = _chosen(cluster, devices)
    server = rolling_server(len(names), round, dead)
    living = [rank for rank in range(len(names)) if rank not in dead]
    alive = [names[rank] for rank in living]
    return _served("rolling server", cluster, alive, even_chunks(1), [living.index(server)])


def rolling_rounds(
    cluster: Cluster, devices: Sequence[str] | None = None, *, dead: Collection[int] = (), start: int = 0
) -> Iterator[RollingRound]:
    """Round after round without end, from the number `start`.

    `dead` is looked at anew before each round, so whoever carries the rounds out adds to it the ranks that were lost.
    A round whose server died in it has no result: the ranks still hold their own vectors, and carry out the next one.
    """
    names = _chosen(cluster, devices)
    number = start
    while True:
        yield RollingRound(
            number=number,
            server=rolling_server(len(names), number, dead),
            living=tuple(rank for rank in range(len(names)) if rank not in dead),
            program=rolling_server_program(cluster, names, round=number, dead=dead),
        )
        number += 1


# --- Gossip ---


def gossip_targets(size: int, round: int, *, fanout: int = 1, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """For each rank, the `fanout` different peers to whom it sends in this round, drawn evenly.

    The same seed and round give the same peers on every rank. Raises ProgramError for a fanout outside 1 … size - 1.
    """
    if not 1 <= fanout < max(size, 2):
        raise ProgramError(
            f"{fanout} different peers of {size} ranks", place="gossip: fanout", remedy=f"1 to {max(1, size - 1)}"
        )
    random = np.random.default_rng([seed, round])
    targets: list[tuple[int, ...]] = []
    for rank in range(size):
        others = random.choice(size - 1, size=fanout, replace=False) if size > 1 else []
        targets.append(tuple(int(other + (other >= rank)) for other in others))
    return tuple(targets)


def push_sum_round(
    values: np.ndarray,
    weights: np.ndarray,
    targets: Sequence[Sequence[int]],
    *,
    lost: Collection[tuple[int, int]] = (),
    kept: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights after one round of push-sum; a rank's estimate of the mean is its value / its weight.

    values: (ranks, …), at first what each rank contributes; weights: (ranks,), at first ones. Each rank divides what it
    has into equal shares, one for itself and one for each of its `targets`, and adds up the shares that reach it.

    `lost`: (source, target) of the messages that do not arrive. With `kept` their sender keeps these shares, as it can
    where a send fails or is not acknowledged: the sums of values and of weights stay what they were (mass is
    conserved), and all estimates go to the true mean. Without, the shares are gone: sums of values and weights shrink,
    and all estimates go to the quotient of what remains, which is a mean, but one with uneven weights.
    A rank that died is one to and from which all is lost; with `kept`, the others go to the quotient of their own sums.
    """
    new_values, new_weights = np.zeros_like(values, dtype=float), np.zeros_like(weights, dtype=float)
    for source, peers in enumerate(targets):
        value, weight = values[source] / (len(peers) + 1), weights[source] / (len(peers) + 1)
        for target in (source, *peers):
            if (source, target) in lost:
                if not kept:
                    continue
                target = source
            new_values[target] += value
            new_weights[target] += weight
    return new_values, new_weights


def gossip_program(
    cluster: Cluster, devices: Sequence[str] | None = None, *, rounds: int = 1, fanout: int = 1, seed: int = 0
) -> Program:
    """What `rounds` rounds of gossip send, for the simulator: whole vectors to the peers of `gossip_targets`.

    A rank sends in a round when all has arrived that was sent to it in the rounds before, and does not wait for others.
    This is not a collective: ranks come near the mean and never quite hold it, so `verify` refuses the program, and
    adding alone (without the division of `push_sum_round`) would not give the mean.
    Raises ProgramError for a wrong fanout; DisconnectedError and ClusterError as `topology_of`.
    """
    names = _chosen(cluster, devices)
    paths: dict[tuple[str, ...], int] = {}
    transfers: list[Transfer] = []
    arrived: list[tuple[int, ...]] = [()] * len(names)
    for number in range(rounds):
        arriving: list[list[int]] = [[] for _ in names]
        for source, peers in enumerate(gossip_targets(len(names), number, fanout=fanout, seed=seed)):
            for target in peers:
                links = cluster.route(names[source], names[target])
                path = (names[source], *(cluster.links[link].target for link in links))
                arriving[target].append(len(transfers))
                transfers.append(
                    Transfer(
                        chunk=0,
                        source=source,
                        target=target,
                        path=paths.setdefault(path, len(paths)),
                        reduce=True,
                        after=arrived[source],
                    )
                )
        arrived = [tuple(sorted({*old, *new})) for old, new in zip(arrived, arriving)]
    return Program(
        name="gossip",
        collective="all_reduce",
        devices=names,
        chunks=even_chunks(1),
        transfers=tuple(transfers),
        paths=tuple(paths),
        cluster=cluster.name,
    ).validate()


# --- BytePS ---


class BytePSSplit(msgspec.Struct, frozen=True):
    """How many bytes each helping CPU machine and each GPU machine adds up, and the seconds that all takes."""

    helper_bytes: float
    worker_bytes: float
    seconds: float


def byteps_split(size_bytes: float, workers: int, helpers: int, bytes_per_second: float) -> BytePSSplit:
    """The fastest division of the adding between `workers` GPU machines and `helpers` CPU machines.

    Of n workers with a vector of M bytes, one that adds up y bytes sends M - y to the others and (n-1)·y as a server;
    a helper that adds up x bytes sends n·x; both receive as much, over one full-duplex card of B bytes per second.
    Equal times give, for k ≤ n helpers, x = 2(n-1)M / (n²+kn-2k), y = (n-k)M / (n²+kn-2k) and
    t = 2n(n-1)M / ((n²+kn-2k)B): a ring's time for k = 0, M/B for k = n. More helpers than workers do not make it
    faster, since each worker must send its vector once: then the workers add up nothing (Jiang et al., OSDI 2020, 4.1).
    Raises InputError for a negative size, no worker, a negative number of helpers or no bandwidth.
    """
    if size_bytes < 0 or workers < 1 or helpers < 0 or not bytes_per_second > 0:
        raise InputError(
            f"{size_bytes:g} bytes, {workers} workers, {helpers} helpers, {bytes_per_second:g} bytes per second",
            place="byteps_split",
            remedy="give at least one worker, a bandwidth above zero, and nothing negative",
        )
    helper, worker = _byteps_weights(workers, helpers)
    part = size_bytes / (helper * helpers + worker * workers)
    seconds = max(size_bytes + (workers - 2) * worker * part, workers * helper * part) / bytes_per_second
    return BytePSSplit(helper_bytes=helper * part, worker_bytes=worker * part, seconds=seconds if workers > 1 else 0.0)


def _byteps_weights(workers: int, helpers: int) -> tuple[int, int]:
    """The parts of a helper and of a worker, as whole numbers in the best ratio."""
    if workers == 1:
        return 0, 1  # its vector is the sum
    if helpers >= workers:
        return 1, 0
    return 2 * (workers - 1), workers - helpers


def byteps_program(cluster: Cluster, workers: Sequence[str], helpers: Sequence[str] = ()) -> Program:
    """All-reduce among `workers` (one device for each machine) with `helpers` as servers, divided by `byteps_split`.

    The program's ranks are the workers, then the helpers. A helper contributes nothing: whoever carries the program
    out lets it begin with zeros, and it ends with the sums of its own chunks alone. A `Program` has no word for such
    a rank, so `verify` refuses this one where there are helpers; the simulator and the executor need no such word.
    Raises ProgramError without workers; DisconnectedError and ClusterError as `topology_of`.
    """
    if not workers:
        raise ProgramError("has no workers", place="byteps", remedy="name at least one")
    names = _chosen(cluster, (*workers, *helpers))
    helper, worker = _byteps_weights(len(workers), len(helpers))
    weights = [worker] * len(workers) + [helper] * len(helpers)
    servers = [rank for rank, weight in enumerate(weights) if weight]
    chunks = [Chunk(weight=weights[rank]) for rank in servers]
    return _served("byteps", cluster, names, chunks, servers, workers=len(workers))
