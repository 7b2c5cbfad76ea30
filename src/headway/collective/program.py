"""A collective as data: which chunk goes from which rank to which, over which links, and what it waits for.

A `Program` does nothing by itself. It has four readers: `collective.verify` proves that every rank ends with the right
contributions, `predict.collective` says what it costs, `simulate.communication` plays it on a cluster's links, and
`exchange.executor` carries it out on real processes.

**Data.** The collective's vector is divided into chunks. `(rank, chunk)` is one *place*. In the reducing collectives
every place begins with that rank's own contribution; in the others a place is empty until the chunk's owner, or a
transfer, fills it. The order of `transfers` is their meaning: whoever carries out one after the other gets the right
result. `after` says which of them must really wait for which, so that everything else may go on at the same time.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import msgspec

from headway.errors import ProgramError
from headway.hardware.cluster import Cluster
from headway.value import Value

__all__ = ["Builder", "Chunk", "Collective", "Program", "Transfer", "blocks", "bus_factor", "even_chunks"]

Collective = Literal[
    "broadcast", "reduce", "all_reduce", "reduce_scatter", "all_gather", "gather", "scatter", "all_to_all"
]

_REDUCING = {"reduce", "all_reduce", "reduce_scatter"}
_ROOTED = {"broadcast", "reduce", "gather", "scatter"}
_BLOCKED = {"reduce_scatter", "all_gather", "gather", "scatter", "all_to_all"}


class Chunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Part of the vector: `weight` parts of it, in the block of `owner`.

    `owner` matters where the vector is made of one block for each rank: all-gather, gather and all-to-all (whose data
    it is), reduce-scatter and scatter (who gets it). `target`: who gets it, in all-to-all alone.
    """

    owner: int = 0
    target: int = 0
    weight: int = 1


class Transfer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """`chunk` goes from rank `source` to rank `target`, over `Program.paths[path]`.

    It replaces what is in its place there, or with `reduce` is added to it. It starts when the transfers at the
    positions `after` have arrived.
    """

    chunk: int
    source: int
    target: int
    path: int
    reduce: bool = False
    after: tuple[int, ...] = ()


class Program(Value):
    """A collective among `devices` (rank → name of the device), as transfers of chunks over named links.

    Each of `paths` names what a transfer passes, from the source's device to the target's, switches included: a link
    joins each two neighbours in it. Sizes are relative: `weight` over `unit` of the vector's bytes, which are what a
    rank holds of the result (broadcast, reduce, all-reduce), all blocks together (all-gather, gather, reduce-scatter,
    scatter), or what one rank sends to all (all-to-all).
    """

    name: str  # of the algorithm: "ring", "tree", "packed", …
    collective: Collective
    devices: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    transfers: tuple[Transfer, ...]
    paths: tuple[tuple[str, ...], ...]
    root: int = 0  # where the collective has one
    cluster: str = ""  # the name of the cluster that it was made for

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.devices)

    @property
    def reduces(self) -> bool:
        """Whether contributions are added up."""
        return self.collective in _REDUCING

    @property
    def has_root(self) -> bool:
        return self.collective in _ROOTED

    @cached_property
    def unit(self) -> int:
        """Weight of the whole vector."""
        total = sum(chunk.weight for chunk in self.chunks)
        return total // self.size if self.collective == "all_to_all" else total

    def fraction(self, chunk: int) -> float:
        """The share of the vector that a chunk has."""
        return self.chunks[chunk].weight / self.unit

    @cached_property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) of each chunk in the vector, in parts of `unit`: blocks by rank, chunks in order in a block.

        In all-to-all the chunks of each owner fill the vector by themselves, in blocks by target; what arrives is laid
        out in blocks by owner.
        """
        at: dict[int, int] = {}
        if self.collective == "all_to_all":
            block = self.unit // self.size
            for owner in range(self.size):
                for target in range(self.size):
                    at[owner * self.size + target] = target * block
        elif self.collective in _BLOCKED:
            block = self.unit // self.size
            at = {owner: owner * block for owner in range(self.size)}
        bounds = []
        for chunk in self.chunks:
            key = 0
            if self.collective == "all_to_all":
                key = chunk.owner * self.size + chunk.target
            elif self.collective in _BLOCKED:
                key = chunk.owner
            start = at.get(key, 0)
            at[key] = start + chunk.weight
            bounds.append((start, start + chunk.weight))
        return tuple(bounds)

    def starts_with(self, rank: int, chunk: int) -> bool:
        """Whether the place holds data before the first transfer."""
        what = self.chunks[chunk]
        if self.reduces:
            return True
        if self.collective in ("broadcast", "scatter"):
            return rank == self.root
        return rank == what.owner

    def ends_with(self, rank: int, chunk: int) -> bool:
        """Whether the place must hold the chunk's result after the last transfer."""
        what = self.chunks[chunk]
        match self.collective:
            case "broadcast" | "all_reduce" | "all_gather":
                return True
            case "reduce" | "gather":
                return rank == self.root
            case "reduce_scatter" | "scatter":
                return rank == what.owner
            case "all_to_all":
                return rank == what.target

    @property
    def is_in_order(self) -> bool:
        """Whether each transfer comes after those that it waits for."""
        return all(other < position for position, transfer in enumerate(self.transfers) for other in transfer.after)

    def in_order(self) -> Program:
        """The same program with each transfer after those that it waits for; this one if it is so already.

        Raises ProgramError if transfers wait for each other in a circle.
        """
        if self.is_in_order:
            return self
        waits = [len(set(transfer.after)) for transfer in self.transfers]
        followers: list[list[int]] = [[] for _ in self.transfers]
        for position, transfer in enumerate(self.transfers):
            for other in set(transfer.after):
                followers[other].append(position)
        ready = [position for position, count in enumerate(waits) if not count]
        heapq.heapify(ready)
        order: list[int] = []
        while ready:
            order.append(heapq.heappop(ready))
            for follower in followers[order[-1]]:
                waits[follower] -= 1
                if not waits[follower]:
                    heapq.heappush(ready, follower)
        if len(order) < len(self.transfers):
            stuck = next(position for position, count in enumerate(waits) if count)
            raise ProgramError(
                "waits for itself, by way of others", place=f"{self.name}: transfers[{stuck}]", remedy="mend `after`"
            )
        moved = {old: new for new, old in enumerate(order)}
        transfers = tuple(
            msgspec.structs.replace(
                self.transfers[old], after=tuple(sorted(moved[other] for other in self.transfers[old].after))
            )
            for old in order
        )
        return msgspec.structs.replace(self, transfers=transfers)

    def validate(self, *, place: str = "") -> Program:
        """This program, or ProgramError naming the field: ranks, chunks, paths and waits that do not exist.

        Says nothing about whether it does its work: that is `collective.verify`.
        """
        place = place or self.name
        if not self.devices:
            raise ProgramError("has no devices", place=place, remedy="list at least one")
        if len(set(self.devices)) != len(self.devices):
            raise ProgramError("a device stands for two ranks", place=f"{place}: devices", remedy="name each once")
        if not 0 <= self.root < self.size:
            raise ProgramError(f"no rank {self.root}", place=f"{place}: root", remedy=f"0 to {self.size - 1}")
        weights: dict[tuple[int, int], int] = {}
        for position, chunk in enumerate(self.chunks):
            where = f"{place}: chunks[{position}]"
            if not (0 <= chunk.owner < self.size and 0 <= chunk.target < self.size):
                raise ProgramError("names a rank that does not exist", place=where, remedy=f"0 to {self.size - 1}")
            if chunk.weight <= 0:
                raise ProgramError(f"weighs {chunk.weight}", place=where, remedy="give a positive whole number")
            key = (chunk.owner, chunk.target if self.collective == "all_to_all" else 0)
            weights[key] = weights.get(key, 0) + chunk.weight
        if not self.chunks:
            raise ProgramError("has no chunks", place=f"{place}: chunks", remedy="list at least one")
        expected = self.size * (self.size if self.collective == "all_to_all" else 1)
        if self.collective in _BLOCKED and (len(weights) != expected or len(set(weights.values())) != 1):
            raise ProgramError(
                "the ranks' blocks are not of one size", place=f"{place}: chunks", remedy="make their weights equal"
            )
        for position, path in enumerate(self.paths):
            if len(path) < 2:
                raise ProgramError("leads nowhere", place=f"{place}: paths[{position}]", remedy="name both ends")
        for position, transfer in enumerate(self.transfers):
            where = f"{place}: transfers[{position}]"
            if not 0 <= transfer.chunk < len(self.chunks):
                raise ProgramError(f"no chunk {transfer.chunk}", place=where, remedy=f"there are {len(self.chunks)}")
            if not (0 <= transfer.source < self.size and 0 <= transfer.target < self.size):
                raise ProgramError("names a rank that does not exist", place=where, remedy=f"0 to {self.size - 1}")
            if transfer.source == transfer.target:
                raise ProgramError("goes from a rank to itself", place=where, remedy="leave it out")
            if not 0 <= transfer.path < len(self.paths):
                raise ProgramError(f"no path {transfer.path}", place=where, remedy=f"there are {len(self.paths)}")
            path = self.paths[transfer.path]
            ends = (self.devices[transfer.source], self.devices[transfer.target])
            if (path[0], path[-1]) != ends:
                raise ProgramError(
                    f"its path goes from {path[0]} to {path[-1]}", place=where, remedy=f"from {ends[0]} to {ends[1]}"
                )
            if not all(0 <= other < len(self.transfers) and other != position for other in transfer.after):
                raise ProgramError("waits for a transfer that does not exist", place=where, remedy="mend `after`")
        return self


class Builder:
    """Puts a program together; transfers are given in an order in which they could be carried out one by one.

    From that order it finds what each must wait for: the transfer that last wrote its place of origin, and everything
    that still reads or writes the place it goes to. Without a `path`, `cluster.route` chooses the links.
    """

    def __init__(
        self,
        name: str,
        collective: Collective,
        devices: Sequence[str],
        chunks: Sequence[Chunk],
        *,
        cluster: Cluster | None = None,
        root: int = 0,
    ) -> None:
        assert collective in get_args(Collective)
        self.name = name
        self.collective: Collective = collective
        self.devices = tuple(devices)
        self.chunks = tuple(chunks)
        self.cluster = cluster
        self.root = root
        self._transfers: list[Transfer] = []
        self._paths: dict[tuple[str, ...], int] = {}
        self._routes: dict[tuple[int, int], int] = {}
        self._written: dict[tuple[int, int], int] = {}  # place → the transfer that last wrote it
        self._read: dict[tuple[int, int], list[int]] = {}  # place → transfers that have read it since

    def transfer(
        self,
        chunk: int,
        source: int,
        target: int,
        *,
        reduce: bool = False,
        path: Sequence[str] | None = None,
        after: Sequence[int] = (),
    ) -> int:
        """Add a transfer and say its position; `after` adds to what it must wait for. Raises DisconnectedError."""
        position = len(self._transfers)
        origin, goal = (source, chunk), (target, chunk)
        waits = set(after)
        if origin in self._written:
            waits.add(self._written[origin])
        readers = self._read.pop(goal, [])
        waits.update(readers)
        # Whoever read the place since it was written has waited for that already.
        if goal in self._written and not readers:
            waits.add(self._written[goal])
        self._written[goal] = position
        self._read.setdefault(origin, []).append(position)
        self._transfers.append(
            Transfer(
                chunk=chunk,
                source=source,
                target=target,
                path=self._path(source, target) if path is None else self._known(tuple(path)),
                reduce=reduce,
                after=tuple(sorted(waits)),
            )
        )
        return position

    def _known(self, path: tuple[str, ...]) -> int:
        return self._paths.setdefault(path, len(self._paths))

    def _path(self, source: int, target: int) -> int:
        found = self._routes.get((source, target))
        if found is None:
            names = (self.devices[source], self.devices[target])
            if self.cluster is not None:
                links = self.cluster.route(*names)
                names = (names[0], *(self.cluster.links[link].target for link in links))
            found = self._routes[source, target] = self._known(names)
        return found

    def build(self) -> Program:
        """The program, validated. Raises ProgramError."""
        return Program(
            name=self.name,
            collective=self.collective,
            devices=self.devices,
            chunks=self.chunks,
            transfers=tuple(self._transfers),
            paths=tuple(self._paths),
            root=self.root,
            cluster=self.cluster.name if self.cluster is not None else "",
        ).validate()


def even_chunks(count: int) -> tuple[Chunk, ...]:
    """`count` chunks of one size, for the collectives whose vector has no blocks (broadcast, reduce, all-reduce)."""
    return (Chunk(),) * count


def blocks(size: int, weights: Sequence[int] = (1,)) -> tuple[Chunk, ...]:
    """Each rank's block in chunks of these weights: chunk `rank * len(weights) + position`."""
    return tuple(Chunk(owner=owner, weight=weight) for owner in range(size) for weight in weights)


def bus_factor(collective: Collective, size: int) -> float:
    """What a collective's bytes per second are multiplied by to compare with a link's: the convention of nccl-tests.

    With n ranks: 2 (n-1)/n for all-reduce, (n-1)/n where each rank moves all blocks but its own, 1 where all bytes
    pass the root, 0 for a single rank, which moves nothing.
    """
    if size < 2:
        return 0.0
    if collective == "all_reduce":
        return 2 * (size - 1) / size
    return 1.0 if collective in ("broadcast", "reduce") else (size - 1) / size
