"""Bounds for the stage programme: devices at a price instead of a supply.

Where every device has a price and there are as many as one likes to pay for, the least sum of a pipeline's stages needs
no table of devices: it is a shortest path over layers and the number of stages that follow. What it comes to, less the
price of all devices there are, is never more than the sum of the best stages that use just those, whatever the prices
(Lagrangian relaxation; Geoffrion, Mathematical Programming Study 2, 1974). The best prices are found by column
generation (Dantzig and Wolfe, Operations Research 8, 1960): each shortest path is a column of a linear program with one
row for each pool, whose dual values are the next prices. Runs of layers that cost too much at those prices, together
with the cheapest way to them and from them, are in no solution that is looked for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.search.runs import Machines, Runs

__all__ = ["ROUNDING", "Bound", "Prices"]

# Sums of the same stages in another order differ by less than this share.
ROUNDING = 1e-12
# So many prices are tried for one bound, and so many steps made for the next ones.
_MOST_PATHS = 24
_MOST_PIVOTS = 60


class Bound(NamedTuple):
    """What no sum of stages can beat, and the prices that say so (one for a device of each pool).

    `supply` is the price of all devices; `after[level, layer]` the cheapest way from a layer to the last with so many
    stages, its devices' prices included.
    """

    seconds: float
    prices: np.ndarray
    supply: float
    after: np.ndarray


class Prices:
    """Prices of the devices of each pool, kept from one limit on the slowest stage to the next."""

    def __init__(self, machines: Machines, sends: np.ndarray, *, exactly: bool, highest: float) -> None:
        self.machines, self.sends, self.exactly, self.highest = machines, sends, exactly, highest
        pools = len(machines.supply)
        self.columns = 0
        self.costs, self.slowest = np.empty(256), np.empty(256)
        self.gaps = np.empty((256, pools))

    def bound(self, runs: Runs, limit: float, enough: float, close: float) -> Bound:
        """A bound for stages of at most `limit` seconds; not improved from `enough` on, or when `close` to the best."""
        best: Bound | None = None
        prices, _ = self._next(limit)
        for _ in range(_MOST_PATHS):
            after, begins = _after(*runs, self.sends, self._of_sizes(prices), limit, len(self.sends) - 1)
            least = float(after[1:, 0].min())
            if not math.isfinite(least):
                return Bound(math.inf, prices, 0.0, after)
            supply = float(prices @ self.machines.supply)
            seconds = least - supply - ROUNDING * (least + float(np.abs(prices) @ self.machines.supply))
            if best is None or seconds > best.seconds:
                best = Bound(seconds, prices, supply, after)
            if seconds >= enough:
                break
            self._keep(runs, prices, limit, after, begins)
            prices, most = self._next(limit)
            if most - best.seconds <= close:
                break
        assert best is not None
        return best

    def kept(
        self, runs: Runs, limit: float, bound: Bound, before: np.ndarray, first: float, behind: int, below: float
    ) -> np.ndarray:  # fmt: skip
        """Which runs can be in stages whose sum, with `behind` times the slowest (or `first`), is less than `below`."""
        margin = ROUNDING * (abs(bound.seconds) + 2 * float(np.abs(bound.prices) @ self.machines.supply))
        return _kept(
            *runs, self.sends, self._of_sizes(bound.prices), limit, bound.after, before, first, float(behind),
            below + bound.supply + margin,
        )  # fmt: skip

    def before(self, runs: Runs, limit: float, bound: Bound) -> np.ndarray:
        """[level, layer]: the cheapest way to a layer with so many stages after it, at the prices of a bound."""
        return _before(*runs, self.sends, self._of_sizes(bound.prices), limit, len(self.sends) - 1)

    def _of_sizes(self, prices: np.ndarray) -> np.ndarray:
        return prices[self.machines.pool] * self.machines.devices

    def _keep(self, runs: Runs, prices: np.ndarray, limit: float, after: np.ndarray, begins: np.ndarray) -> None:
        """A shortest path becomes a column: its seconds, and how many devices more than there are it takes."""
        if self.columns == len(self.costs):
            self.costs, self.slowest = (
                np.concatenate((each, np.empty_like(each))) for each in (self.costs, self.slowest)
            )
            self.gaps = np.concatenate((self.gaps, np.empty_like(self.gaps)))
        stages, start, layers = [], 0, len(self.sends) - 1
        level, of_sizes = int(np.argmin(after[1:, 0])) + 1, self._of_sizes(prices)
        while start < layers:
            begin = int(begins[level, start])
            # No more runs begin at a layer than there are later layers, for each size.
            group = slice(begin, begin + (layers - start) * len(of_sizes))
            ours = (runs.start[group] == start) & (runs.level[group] == level) & (runs.seconds[group] <= limit)
            rest = after[level - 1]
            if runs.open_ended and level == runs.levels:
                rest = np.minimum(rest, after[level])
            costs = rest[runs.stop[group]] + (runs.seconds[group] + of_sizes[runs.size[group]])
            stages.append(begin + int(np.argmin(np.where(ours, costs, math.inf))))
            start = int(runs.stop[stages[-1]])
            level -= bool(rest[start] == after[level - 1, start])
        seconds, starts, sizes = runs.seconds[stages], runs.start[stages], runs.size[stages]
        used = np.bincount(self.machines.pool[sizes], self.machines.devices[sizes], len(self.machines.supply))
        self.costs[self.columns] = seconds.sum() + self.sends[starts[1:]].sum()
        self.slowest[self.columns] = seconds.max()
        self.gaps[self.columns] = used - self.machines.supply
        self.columns += 1

    def _next(self, limit: float) -> tuple[np.ndarray, float]:
        """The prices at which the known paths of stages within `limit` cost most, and that cost.

        The simplex method on the dual: shares of the paths, and devices bought or sold at the highest price, balance
        what each pool has.
        """
        known = np.flatnonzero(self.slowest[: self.columns] <= limit)
        pools = len(self.machines.supply)
        if not len(known):
            return np.zeros(pools), math.inf
        rows = pools + 1
        table = np.zeros((rows, 2 * pools + len(known)))
        table[:pools, :pools] = np.eye(pools)
        table[:pools, pools : 2 * pools] = -np.eye(pools)
        table[:pools, 2 * pools :] = self.gaps[known].T
        table[pools, 2 * pools :] = 1.0
        costs = np.full(table.shape[1], self.highest)
        if not self.exactly:
            costs[:pools] = 0.0  # devices may be left over
        costs[2 * pools :] = self.costs[known]
        first = self.gaps[known[0]]
        basis = np.array([pool if first[pool] <= 0 else pools + pool for pool in range(pools)] + [2 * pools])
        values = np.zeros(pools)
        for _ in range(_MOST_PIVOTS):
            inverse = np.linalg.inv(table[:, basis])
            values = costs[basis] @ inverse
            reduced = costs - values @ table
            enters = int(np.argmin(reduced))
            if reduced[enters] >= -1e-9 * (1 + abs(values[-1])):
                break
            along, now = inverse @ table[:, enters], inverse[:, -1]
            ratios = np.where(along > 1e-12, now / np.where(along > 1e-12, along, 1.0), math.inf)
            leaves = int(np.argmin(ratios))
            if not math.isfinite(ratios[leaves]):
                break
            basis[leaves] = enters
        # Any prices give a bound: rounding here can only make it weaker.
        prices = -values[:-1]
        if not self.exactly:
            prices = np.maximum(prices, 0.0)
        return prices, float(values[-1])


@compiled(nogil=True)
def _after(
    level: np.ndarray, start: np.ndarray, stop: np.ndarray, size: np.ndarray, seconds: np.ndarray, levels: int,
    open_ended: bool, sends: np.ndarray, prices: np.ndarray, limit: float, layers: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The cheapest way from each layer to the last, [level, layer], and where its runs begin in the list."""
    found = np.full((levels + 1, layers + 1), np.inf)
    begins = np.zeros((levels + 1, layers + 1), dtype=np.int64)
    found[0, layers] = 0.0
    at, count, now = 0, len(level), 0
    rest = found[0]
    while at < count:
        own, begin = level[at], start[at]
        top = open_ended and own == levels
        if own != now:
            now = own
            # Behind a run of an open-ended level come others of it, with what is known of them so far.
            rest = found[own - 1].copy() if top else found[own - 1]
        end = at
        while end < count and start[end] == begin and level[end] == own:
            end += 1
        least = np.inf
        for run in range(at, end):
            value = rest[stop[run]] + (seconds[run] + prices[size[run]])
            least = min(least, value if seconds[run] <= limit else np.inf)
        least += sends[begin]
        found[own, begin], begins[own, begin] = least, at
        if top:
            rest[begin] = min(rest[begin], least)
        at = end
    return found, begins


@compiled(nogil=True)
def _before(
    level: np.ndarray, start: np.ndarray, stop: np.ndarray, size: np.ndarray, seconds: np.ndarray, levels: int,
    open_ended: bool, sends: np.ndarray, prices: np.ndarray, limit: float, layers: int,
) -> np.ndarray:  # fmt: skip
    """The cheapest way from the first layer to each, [level, layer], with `level` stages after it."""
    found = np.full((levels + 1, layers + 1), np.inf)
    found[1:, 0] = 0.0
    at = len(level) - 1
    while at >= 0:
        own, begin = level[at], start[at]
        base = found[own, begin] + sends[begin]
        behind, again = found[own - 1], found[own]
        top = open_ended and own == levels
        while at >= 0 and start[at] == begin and level[at] == own:
            value = base + (seconds[at] + prices[size[at]])
            if seconds[at] <= limit:
                if value < behind[stop[at]]:
                    behind[stop[at]] = value
                if top and value < again[stop[at]]:
                    again[stop[at]] = value
            at -= 1
    return found


@compiled(nogil=True)
def _kept(
    level: np.ndarray, start: np.ndarray, stop: np.ndarray, size: np.ndarray, seconds: np.ndarray, levels: int,
    open_ended: bool, sends: np.ndarray, prices: np.ndarray, limit: float, after: np.ndarray, before: np.ndarray,
    first: float, behind: float, below: float,
) -> np.ndarray:  # fmt: skip
    found = np.zeros(len(level), dtype=np.bool_)
    at = 0
    while at < len(level):
        own, begin = level[at], start[at]
        base = before[own, begin] + sends[begin]
        rest, again = after[own - 1], after[own]
        top = open_ended and own == levels
        while at < len(level) and start[at] == begin and level[at] == own:
            takes, end = seconds[at], stop[at]
            value = min(rest[end], again[end]) if top else rest[end]
            value += base + takes + prices[size[at]] + behind * max(first, takes)
            found[at] = value < below and takes <= limit
            at += 1
    return found
