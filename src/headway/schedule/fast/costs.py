"""The compiled twin of placement/cost.py, for parameter servers on nodes that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job
from headway.schedule.pace import Pace
from headway.schedule.placement.cost import PlacementCost

__all__ = ["COST", "CostTable", "cost_table", "slowdown"]

COST = np.dtype([("at", "i8"), ("compute", "f8"), ("together", "f8")])
"""Of a model with so many workers: where its `prefix` begins, seconds of compute, and of a step well placed."""


class CostTable(NamedTuple):
    """What `slowdown` needs: a row of `COST` for each model and number of workers, their prefixes one after the other,
    the rate of all ports, and of the uplink of each rack (infinite: never binds)."""

    rows: np.ndarray
    prefixes: np.ndarray
    port: float
    uplinks: np.ndarray


def cost_table(jobs: Sequence[Job], fleet: Fleet, pace: Pace, racks: dict[str, int]) -> tuple[CostTable, list[int]]:
    """The table of what these jobs may cost, and for each its row; -1: no placement costs it anything.

    `racks`: name to number, of all racks of the fleet.
    """
    costs = pace.costs if pace.spread else None
    if not isinstance(costs, PlacementCost):
        return CostTable(np.zeros(1, dtype=COST), np.zeros(1), 1.0, np.full(len(racks), np.inf)), [-1] * len(jobs)
    numbers: dict[tuple[str, int], int] = {}
    found: list[tuple[int, float, float]] = []
    prefixes: list[float] = [0.0]
    kind = fleet.nodes[0].kind
    rows = []
    for job in jobs:
        if job.model not in costs.models or job.devices < 2:
            rows.append(-1)
            continue
        key = (job.model, job.devices)
        if key not in numbers:
            numbers[key] = len(found)
            compute = costs.models[job.model].compute_seconds[kind]
            found.append((len(prefixes), compute, costs.together_seconds(job.model, [0], job.devices)))
            prefixes.extend(costs.prefix(job.model, job.devices))
        rows.append(numbers[key])
    uplinks = np.array([costs.uplinks.get(rack, np.inf) for rack in racks])
    table = np.array(found or [(0, 0.0, 1.0)], dtype=COST)
    return CostTable(table, np.array(prefixes), costs.ports[0], uplinks), rows


@compiled()
def slowdown(row, devices, table, rack_of, at, used, nodes, counts):
    """As `PlacementCost.slowdown`, of the gang whose places stand in `nodes` and `counts` from `at` on."""
    order = np.empty(used, dtype=np.int64)
    for place in range(used):
        back = place
        while back > 0 and (
            counts[at + order[back - 1]] < counts[at + place]
            or (counts[at + order[back - 1]] == counts[at + place] and nodes[at + order[back - 1]] > nodes[at + place])
        ):
            order[back] = order[back - 1]
            back -= 1
        order[back] = place
    cost = table.rows[row]
    prefix = table.prefixes
    first = cost.at
    whole = prefix[first + devices]
    workers, stored = np.zeros(len(table.uplinks), dtype=np.int64), np.zeros(len(table.uplinks))
    slowest, begin = 0.0, 0
    for place in order:
        count = counts[at + place]
        own = prefix[first + begin + count] - prefix[first + begin]
        begin += count
        slowest = max(slowest, max(own * (devices - count), count * (whole - own)) / table.port)
        rack = rack_of[nodes[at + place]]
        workers[rack] += count
        stored[rack] += own
    for rack in range(len(table.uplinks)):
        if workers[rack] > 0 and table.uplinks[rack] < np.inf:
            crossing = max(stored[rack] * (devices - workers[rack]), workers[rack] * (whole - stored[rack]))
            slowest = max(slowest, crossing / table.uplinks[rack])
    return max(1.0, (cost.compute + 2 * slowest) / cost.together)
