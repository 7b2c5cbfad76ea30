"""Which program carries out a collective of a process group: the table, its overrides, and a cache of programs.

| the ranks are | bytes | algorithm |
|---|---|---|
| on one machine | any | direct: everybody reads what it needs from everybody, in one step |
| one on each of several machines | up to `SMALL_BYTES` | binomial for broadcast and reduce, else direct |
| one on each of several machines | more | ring |
| several on each of several machines | any | hierarchical: in each machine first, then between machines, then back |

An algorithm that does not do a collective is replaced by direct, which does all. `HEADWAY_ALGORITHM` or
`ProgramChoice.override` names another one, for all collectives or for one of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from headway.collective.algorithms import ALGORITHMS, generate
from headway.collective.program import Collective, Program
from headway.errors import InputError, ProgramError
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

__all__ = ["SMALL_BYTES", "ProgramChoice", "cluster_of"]

SMALL_BYTES = 256 << 10
"""Below this size the number of steps matters more than how evenly the links are loaded."""

_SHARED_MEMORY = (1e10, 1e-6)  # bytes per second, seconds: only their ratio matters to what is generated here
_NETWORK = (1.25e9, 3e-5)


def cluster_of(machines: Sequence[str], *, name: str = "ranks") -> Cluster:
    """A cluster with a device `rank0`, `rank1`, … for each rank: all joined in a machine, machines by one switch.

    `machines[rank]` names the machine. Bandwidths are nominal.
    """
    devices = tuple(
        Device(name=f"rank{rank}", accelerator="rank", node=machine) for rank, machine in enumerate(machines)
    )
    links = [
        Link(
            source=one.name,
            target=other.name,
            bytes_per_second=_SHARED_MEMORY[0],
            latency_seconds=_SHARED_MEMORY[1],
            kind="shared memory",
        )
        for one in devices
        for other in devices
        if one.node == other.node and one.name != other.name
    ]
    switches: list[Switch] = []
    if len(set(machines)) > 1:
        switches.append(Switch(name="network"))
        for machine in dict.fromkeys(machines):
            nic = Switch(name=f"nic of {machine}", node=machine)
            switches.append(nic)
            ends = [(nic.name, "network"), *((device.name, nic.name) for device in devices if device.node == machine)]
            links += [
                Link(
                    source=source,
                    target=target,
                    bytes_per_second=_NETWORK[0],
                    latency_seconds=_NETWORK[1] / 2,
                    kind="network",
                )
                for one, other in ends
                for source, target in ((one, other), (other, one))
            ]
    rank = Accelerator(name="rank", flop_per_second={"float32": 1e12}, memory_bytes=1e12, memory_bytes_per_second=1e11)
    return Cluster(
        name=name, accelerators={"rank": rank}, devices=devices, switches=tuple(switches), links=tuple(links)
    ).validate()


class ProgramChoice:
    """The programs of one group, whose ranks are on `machines`. Every rank must ask for the same."""

    def __init__(self, machines: Sequence[str]) -> None:
        self.cluster = cluster_of(machines)
        self._devices = tuple(device.name for device in self.cluster.devices)
        counts = Counter(machines)
        self._machines = len(counts)
        self._several = max(counts.values()) > 1
        self._overrides: dict[str, str] = {}
        self._programs: dict[tuple[str, str, int], Program] = {}
        self._chosen: dict[tuple[str, bool, int], Program] = {}
        named = os.environ.get("HEADWAY_ALGORITHM", "")
        if named:
            self.override(named)

    def override(self, algorithm: str, collective: Collective | None = None) -> None:
        """Use `algorithm`, any name that `collective.algorithms.generate` knows, for one collective or for all.

        "" goes back to the table. An algorithm that is named for one collective and cannot do it makes that collective
        raise ProgramError; one that is named for all is used where it can be.
        """
        if algorithm and algorithm not in ALGORITHMS:
            raise InputError(
                f"no algorithm is named {algorithm!r}", place="algorithm", remedy=f"one of: {', '.join(ALGORITHMS)}"
            )
        self._overrides[collective or ""] = algorithm
        self._chosen.clear()

    def algorithms(self, collective: Collective, size_bytes: int) -> tuple[str, ...]:
        """The table: what to try, best first."""
        if self._machines == 1:
            return ("direct",)
        if self._several:
            return ("hierarchical", "direct")
        if size_bytes <= SMALL_BYTES:
            return ("binomial", "direct") if collective in ("broadcast", "reduce") else ("direct",)
        return ("ring", "direct")

    def program(self, collective: Collective, size_bytes: int, root: int = 0) -> Program:
        """The program for a vector of so many bytes. Raises ProgramError if no algorithm does it."""
        key = (collective, size_bytes <= SMALL_BYTES, root)
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._choose(collective, size_bytes, root)
        return found

    def _choose(self, collective: Collective, size_bytes: int, root: int) -> Program:
        strict = self._overrides.get(collective, "")
        if strict:
            return self._generate(strict, collective, root)
        named = self._overrides.get("", "")
        refusals: list[str] = []
        for algorithm in ((named,) if named else ()) + self.algorithms(collective, size_bytes):
            try:
                return self._generate(algorithm, collective, root)
            except ProgramError as error:
                refusals.append(f"{algorithm}: {error.message}")
        raise ProgramError(f"no algorithm for {collective} ({'; '.join(refusals)})", place=self.cluster.name)

    def _generate(self, algorithm: str, collective: Collective, root: int) -> Program:
        key = (algorithm, collective, root)
        found = self._programs.get(key)
        if found is None:
            found = generate(algorithm, self.cluster, collective, self._devices, root=root).in_order()
            self._programs[key] = found
        return found
