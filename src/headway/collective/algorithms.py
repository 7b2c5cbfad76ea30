"""The algorithms by name: which collectives each does, and the program it makes.

`generate("ring", cluster, "all_reduce")` is the way in for whoever has a name (a plan, the command line, a benchmark).
Each algorithm is imported when it is first asked for, and with it the optional libraries that it may need.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from headway.collective.program import Collective, Program
from headway.errors import ProgramError
from headway.hardware.cluster import Cluster

__all__ = ["ALGORITHMS", "Algorithm", "generate", "names"]

_Generator = Callable[[Cluster, Collective, "Sequence[str] | None", int], Program]


class Algorithm(NamedTuple):
    """What an algorithm does, and what makes it: cluster, collective, devices (None: all) and root to a program."""

    collectives: tuple[Collective, ...]
    summary: str
    make: _Generator


def _ring(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.ring import ring

    return ring(cluster, collective, devices, root=root)


def _tree(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.tree import double_tree

    return double_tree(cluster, collective, devices, root=root)


def _binomial(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.tree import binomial_tree

    return binomial_tree(cluster, collective, devices, root=root)


def _halving_doubling(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.tree import halving_doubling

    return halving_doubling(cluster, collective, devices, root=root)


def _hierarchical(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.hierarchical import hierarchical

    return hierarchical(cluster, collective, devices, root=root)


def _torus(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.hierarchical import torus

    return torus(cluster, collective, devices, root=root)


def _direct(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.direct import direct

    return direct(cluster, collective, devices, root=root)


def _packed(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.packing import packed_program

    return packed_program(cluster, collective, devices, root=root)


def _blink(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.blink import blink_program

    return blink_program(cluster, collective, devices, root=root)


def _three_phase(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.blink import three_phase_program

    return three_phase_program(cluster, devices)


def _parameter_server(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.decentralized import parameter_server_program

    return parameter_server_program(cluster, devices, server=root)


def _sharded_server(cluster: Cluster, collective: Collective, devices: Sequence[str] | None, root: int) -> Program:
    from headway.collective.decentralized import sharded_server_program

    return sharded_server_program(cluster, devices)


_VECTOR: tuple[Collective, ...] = ("broadcast", "reduce", "all_reduce")
_BLOCKS: tuple[Collective, ...] = ("reduce_scatter", "all_gather")

ALGORITHMS: dict[str, Algorithm] = {
    "ring": Algorithm((*_VECTOR, *_BLOCKS), "as many rings as the links allow", _ring),
    "tree": Algorithm(_VECTOR, "two binary trees, half of the vector on each", _tree),
    "binomial": Algorithm(_VECTOR, "fewest steps, for short vectors", _binomial),
    "halving-doubling": Algorithm(
        ("all_reduce", *_BLOCKS), "few bytes in a logarithmic number of steps", _halving_doubling
    ),
    "hierarchical": Algorithm((*_VECTOR, *_BLOCKS), "in the nodes, then between them", _hierarchical),
    "torus": Algorithm((*_VECTOR, *_BLOCKS), "rows and columns, in both directions", _torus),
    "direct": Algorithm(get_args(Collective), "everyone to everyone in one step", _direct),
    "packed": Algorithm((*_VECTOR, *_BLOCKS), "spanning trees at the best possible rate", _packed),
    "blink": Algorithm((*_VECTOR, *_BLOCKS), "few spanning trees, found approximately", _blink),
    "blink-three-phase": Algorithm(("all_reduce",), "spanning trees in each server, then between them", _three_phase),
    "parameter-server": Algorithm(("all_reduce",), "one rank adds up and hands out", _parameter_server),
    "sharded-server": Algorithm(("all_reduce",), "each rank is the server of a part", _sharded_server),
}


def names(collective: str) -> tuple[str, ...]:
    """The algorithms that do this collective. Raises ProgramError for a collective that does not exist."""
    _check("collective", collective, get_args(Collective))
    return tuple(name for name, algorithm in ALGORITHMS.items() if collective in algorithm.collectives)


def generate(
    name: str, cluster: Cluster, collective: Collective, devices: Sequence[str] | None = None, *, root: int = 0
) -> Program:
    """The program of this algorithm among `devices` (all, unless given); `root` where the collective has one.

    A single device gives a program without transfers. Raises ProgramError for a name or a collective that does not
    exist and for a pair that does not go together, ClusterError, DisconnectedError where no path joins two devices,
    and MissingExtraError where the algorithm needs an optional library.
    """
    _check("algorithm", name, tuple(ALGORITHMS))
    _check("collective", collective, get_args(Collective))
    algorithm = ALGORITHMS[name]
    if collective not in algorithm.collectives:
        raise ProgramError(
            f"does not do {collective!r}",
            place=f"algorithm {name!r}",
            remedy=f"these do: {', '.join(names(collective))}",
        )
    return algorithm.make(cluster, collective, devices, root)


def _check(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ProgramError(
            f"no {kind} is named {name!r}",
            place=kind,
            remedy=f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(known)}",
        )
