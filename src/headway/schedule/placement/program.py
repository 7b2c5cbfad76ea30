"""Placement as a mixed-integer program: least fragmentation and least traffic between nodes and racks, by HiGHS.

For gang j on node n: x[j,n] devices, y[j,n] whether it uses the node, z[j,r] whether it uses rack r, k[j,c] whether it
uses devices of kind c, u[n] whether anybody uses the node. Minimise

    sum over j of t[j] (sum y + 4 sum z) + s[j] sum k  +  sum over n of (free[n] / devices[n]) u[n]

subject to every gang getting its devices, no node giving more than are free, and y, z, k, u being 1 where x is above 0.
The last term counts what is left over on nodes that are touched: the sum of all x is given. t[j] grows with what being
spread costs the model, and a link between racks counts four times one between nodes. Slow kinds cost what they add to
the run, by s[j], and so does a mixture, in which the fast wait for the slow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headway.errors import MissingExtraError
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job, ModelProfile
from headway.schedule.placement.rules import Counts, Placement

__all__ = ["Gang", "ProgramPlacement", "place_together", "program_cost"]

_RACK = 4.0  # a hop between racks, in hops between nodes
_SLOW = 10.0  # being twice as slow, in nodes touched


class Gang(NamedTuple):
    """A job to be placed on so many devices."""

    job: Job
    devices: int


class ProgramPlacement(Placement):
    """Each gang by its own program, among what is free. Needs highspy (extra `solve`)."""

    name = "program"

    def __init__(self, *, profiles: Mapping[str, ModelProfile] | None = None) -> None:
        self.profiles = dict(profiles or {})

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        found = place_together([Gang(job, devices)], free, fleet, profiles=self.profiles)
        return None if found is None else found[0]


def traffic_weight(job: Job, profiles: Mapping[str, ModelProfile]) -> float:
    """t[j]: what a further node costs a gang, in nodes touched; 1 where nothing is known of its model."""
    profile = profiles.get(job.model)
    return 1.0 if profile is None else 0.1 + 10 * (profile.spread_slowdown - 1)


def _slowness(job: Job, kind: str) -> float:
    return _SLOW * (1 / job.throughputs[kind] - 1 / max(job.throughputs.values())) if kind in job.throughputs else 0.0


def program_cost(
    placed: Sequence[Counts], gangs: Sequence[Gang], free: Sequence[int], fleet: Fleet,
    profiles: Mapping[str, ModelProfile] | None = None,
) -> float:  # fmt: skip
    """The objective of these places: what `place_together` minimises."""
    cost, touched = 0.0, set()
    for gang, counts in zip(gangs, placed, strict=True):
        nodes = [node for node, _ in counts]
        weight = traffic_weight(gang.job, profiles or {})
        cost += weight * (len(nodes) + _RACK * len({fleet.nodes[node].rack for node in nodes}))
        cost += sum(_kind_cost(gang.job, kind) for kind in {fleet.nodes[node].kind for node in nodes})
        touched.update(nodes)
    return cost + sum(free[node] / fleet.nodes[node].devices for node in touched)


def _kind_cost(job: Job, kind: str) -> float:
    return 1.0 + _slowness(job, kind)


def place_together(
    gangs: Sequence[Gang],
    free: Sequence[int],
    fleet: Fleet,
    *,
    profiles: Mapping[str, ModelProfile] | None = None,
    nodes_of_search: int = 2000,
) -> list[Counts] | None:
    """Places for all gangs at once, of least cost (see the module), or None if they don't all fit.

    `free[i]` devices are free on node i of the fleet. Of nodes that are alike, only as many are looked at as all gangs
    together could fill. `nodes_of_search` bounds the branching; beyond it the best found is taken. Raises
    MissingExtraError without highspy.
    """
    try:
        import highspy
    except ImportError:
        raise MissingExtraError(library="highspy", extra="solve") from None
    if not gangs:
        return []
    nodes = _candidates(gangs, free, fleet)
    model = _Program()
    used = {node: model.binary(free[node] / fleet.nodes[node].devices) for node in nodes}
    taken: dict[tuple[int, int], int] = {}
    for place, gang in enumerate(gangs):
        eligible = set(fleet.eligible(gang.job))
        mine = [node for node in nodes if node in eligible]
        if sum(free[node] for node in mine) < gang.devices:
            return None
        weight = traffic_weight(gang.job, profiles or {})
        rack = {name: model.binary(_RACK * weight) for name in _unique(fleet.nodes[node].rack for node in mine)}
        kind = {
            name: model.binary(_kind_cost(gang.job, name)) for name in _unique(fleet.nodes[node].kind for node in mine)
        }
        for node in mine:
            most = min(gang.devices, free[node])
            x = taken[place, node] = model.integer(most)
            y = model.binary(weight)
            model.row({x: 1.0, y: -float(most)}, upper=0.0)
            for other in (used[node], rack[fleet.nodes[node].rack], kind[fleet.nodes[node].kind]):
                model.row({y: 1.0, other: -1.0}, upper=0.0)
        model.row({taken[place, node]: 1.0 for node in mine}, gang.devices, gang.devices)
    for node in nodes:
        model.row({x: 1.0 for (_, other), x in taken.items() if other == node}, upper=free[node])
    values = model.solve(highspy, nodes_of_search)
    if values is None:
        return None
    return [
        tuple(
            (node, round(values[taken[place, node]]))
            for node in nodes
            if (place, node) in taken and round(values[taken[place, node]])
        )
        for place in range(len(gangs))
    ]


def _unique(names) -> list[str]:
    return list(dict.fromkeys(names))


def _candidates(gangs: Sequence[Gang], free: Sequence[int], fleet: Fleet) -> list[int]:
    total = sum(gang.devices for gang in gangs)
    seen: dict[tuple, int] = {}
    found = []
    for index, node in enumerate(fleet.nodes):
        if free[index]:
            key = (free[index], node.devices, node.kind, node.rack, node.memory_bytes)
            seen[key] = seen.get(key, 0) + 1
            if seen[key] <= max(len(gangs), math.ceil(total / free[index])):
                found.append(index)
    return found


class _Program:
    """Columns and rows of a program, as HiGHS wants them."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.most: list[float] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []

    def integer(self, most: float) -> int:
        self.cost.append(0.0)
        self.most.append(float(most))
        return len(self.cost) - 1

    def binary(self, cost: float) -> int:
        self.cost.append(cost)
        self.most.append(1.0)
        return len(self.cost) - 1

    def row(self, terms: dict[int, float], lower: float = -math.inf, upper: float = math.inf) -> None:
        self.rows.append((terms, float(lower), float(upper)))

    def solve(self, highspy, nodes_of_search: int) -> list[float] | None:
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = len(self.cost), len(self.rows)
        program.col_cost_ = self.cost
        program.col_lower_ = [0.0] * len(self.cost)
        program.col_upper_ = self.most
        program.row_lower_ = [lower for _, lower, _ in self.rows]
        program.row_upper_ = [upper for _, _, upper in self.rows]
        program.integrality_ = [highspy.HighsVarType.kInteger] * len(self.cost)
        matrix = program.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        starts = [0]
        for terms, _, _ in self.rows:
            starts.append(starts[-1] + len(terms))
        matrix.start_ = starts
        matrix.index_ = [column for terms, _, _ in self.rows for column in terms]
        matrix.value_ = [value for terms, _, _ in self.rows for value in terms.values()]
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("mip_rel_gap", 0.0)
        solver.setOptionValue("mip_max_nodes", nodes_of_search)
        solver.passModel(program)
        solver.run()
        if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        return list(solver.getSolution().col_value)
