"""A `StageProblem` laid out for the kernels that walk over it, and which stages make up the devices there are."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from headway.errors import PlanError
from headway.search.problem import StageProblem

__all__ = ["Supply", "Tables", "pack"]


class Tables(NamedTuple):
    """A `StageProblem` as the kernel reads it: options ordered by (pool, devices), and last in each table.

    A group is a run of options with the same pool and number of devices: any may take another's place.
    """

    seconds: np.ndarray  # (layers + 1, layers + 1, options)
    fixed: np.ndarray
    kept: np.ndarray
    capacity: np.ndarray  # (options,)
    send: np.ndarray  # (layers,)
    group: np.ndarray  # (options,)
    first: np.ndarray  # (groups + 1,): the options of each group
    group_pool: np.ndarray  # (groups,)
    group_devices: np.ndarray  # (groups,)
    group_at: np.ndarray  # (pools, most devices + 1): the group of so many devices of a pool, or -1
    pool_first: np.ndarray  # (pools + 1,): the groups of each pool
    pools: np.ndarray  # (pools,)
    work: np.ndarray  # (layers + 1,): what all layers before each position take, roughly, as a share of the whole
    micro_batches: int
    exactly: bool
    most_stages: int


def _order(problem: StageProblem) -> np.ndarray:
    """The options that can run anything at all, by (pool, devices)."""
    pool = np.array([option.pool for option in problem.options], np.int64)
    devices = np.array([option.devices for option in problem.options], np.int64)
    possible = np.isfinite(problem.seconds).any(axis=(1, 2)) & (devices <= np.asarray(problem.pools)[pool])
    order = np.lexsort((devices, pool))
    return order[possible[order]]


def pack(problem: StageProblem) -> tuple[np.ndarray, Tables]:
    """The options of `problem` in the order of the kernels (positions in `problem.options`), and its tables in it."""
    order = _order(problem)
    pool = np.array([option.pool for option in problem.options], np.int64)[order]
    devices = np.array([option.devices for option in problem.options], np.int64)[order]
    if not len(order):
        raise PlanError("no option can run any layer", place="options", remedy="offer other options")
    begins = np.flatnonzero(np.r_[True, (np.diff(pool) != 0) | (np.diff(devices) != 0)])
    first = np.r_[begins, len(order)]
    group = np.repeat(np.arange(len(begins)), np.diff(first))
    group_at = np.full((len(problem.pools), int(max(problem.pools)) + 1), -1, np.int64)
    group_at[pool[begins], devices[begins]] = np.arange(len(begins))
    seconds, fixed, kept = (
        np.ascontiguousarray(np.asarray(table, float)[order].transpose(1, 2, 0))
        for table in (problem.seconds, problem.fixed_bytes, problem.kept_bytes)
    )
    return order, Tables(
        seconds,
        fixed,
        kept,
        np.asarray(problem.capacity_bytes, float)[order],
        np.asarray(problem.send_seconds, float)[: problem.layers].copy(),
        group,
        first,
        pool[begins],
        devices[begins],
        group_at,
        np.searchsorted(pool[begins], np.arange(len(problem.pools) + 1)),
        np.asarray(problem.pools, np.int64),
        _work(seconds),
        int(problem.micro_batches),
        bool(problem.exactly),
        int(min(problem.layers, problem.most_stages or problem.layers)),
    )


def _work(seconds: np.ndarray) -> np.ndarray:
    """The share of the whole that all layers before each position take: of options alone with each layer, the mean."""
    layers = len(seconds) - 1
    alone = seconds[np.arange(layers), np.arange(1, layers + 1)]  # (layers, options)
    known = np.isfinite(alone)
    scale = np.where(known, alone, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    shares = np.where(known, alone / np.where(scale > 0, scale, 1), 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    shares = np.where(shares > 0, shares, shares[shares > 0].mean() if (shares > 0).any() else 1.0)
    return np.concatenate(([0.0], np.cumsum(shares / shares.sum())))


class Supply:
    """Which numbers of devices so many stages can make up, for each pool: what drawn solutions are made of."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._reach, self._sizes, self._units = [], [], []
        for pool, devices in enumerate(tables.pools.tolist()):
            first, end = tables.pool_first[pool], tables.pool_first[pool + 1]
            sizes = tables.group_devices[first:end]
            unit = math.gcd(*sizes.tolist()) or 1
            reach = np.zeros((tables.most_stages + 1, devices // unit + 1), bool)
            if devices % unit == 0 or not tables.exactly:
                reach[0, 0] = True
            for stages in range(1, tables.most_stages + 1):
                for size in (sizes // unit).tolist():
                    if size < reach.shape[1]:
                        reach[stages, size:] |= reach[stages - 1, : reach.shape[1] - size]
                if not reach[stages].any():
                    break
            self._reach.append(reach)
            self._sizes.append(sizes // unit)
            self._units.append(unit)
        # [pool, stages]: whether so many stages can have the pool's devices.
        self._counts = [reach[:, -1] if tables.exactly else reach.any(axis=1) for reach in self._reach]
        totals = np.zeros(tables.most_stages + 1, bool)
        totals[0] = True
        self._after = [totals]  # stages that the first pools can make up together
        for counts in self._counts:
            after = np.zeros_like(totals)
            for stages in np.flatnonzero(counts):
                after[stages:] |= self._after[-1][: len(after) - stages]
            self._after.append(after)
        self.counts = np.flatnonzero(self._after[-1][1:]) + 1
        if not len(self.counts):
            raise PlanError(
                f"no {tables.most_stages} stages or fewer make up "
                f"{'exactly' if tables.exactly else 'any of'} {', '.join(map(str, tables.pools.tolist()))} devices",
                place="stages",
                remedy="offer options with other numbers of devices, or do not ask for all devices",
            )

    def draw(self, rng: np.random.Generator, count: int = 0) -> np.ndarray:
        """The group of each of `count` stages (0: any number, few as likely as many)."""
        if not count:
            chance = 1 / self.counts
            count = int(rng.choice(self.counts, p=chance / chance.sum()))
        groups: list[int] = []
        even = rng.random() < 0.5
        for pool in reversed(range(len(self._counts))):
            possible = [
                stages
                for stages in np.flatnonzero(self._counts[pool][: count + 1]).tolist()
                if self._after[pool][count - stages]
            ]
            stages = possible[int(rng.integers(len(possible)))]
            groups += self._fill(rng, pool, stages, even)
            count -= stages
        found = np.asarray(groups)
        if len(self._counts) > 1 and rng.random() < 0.5:
            return found  # pool after pool, the last first
        return found[::-1].copy() if rng.random() < 0.5 else found[rng.permutation(len(found))]

    def _fill(self, rng: np.random.Generator, pool: int, stages: int, even: bool) -> list[int]:
        """Groups of a pool that make up its devices together."""
        reach, sizes = self._reach[pool], self._sizes[pool]
        left = reach.shape[1] - 1
        if not self.tables.exactly:
            left = int(np.flatnonzero(reach[stages])[-1])
        groups = []
        for remaining in range(stages, 0, -1):
            fits = np.flatnonzero(sizes <= left)
            fits = fits[reach[remaining - 1, left - sizes[fits]]]
            if even:
                chosen = int(fits[np.argmin(np.abs(sizes[fits] - left / remaining))])
            else:
                chosen = int(fits[int(rng.integers(len(fits)))])
            left -= int(sizes[chosen])
            groups.append(int(self.tables.pool_first[pool]) + chosen)
        return groups

    def choose(self, scores_SG: np.ndarray) -> np.ndarray:
        """The group of each stage with high scores, so that the devices come out right. S stages, G groups.

        The surest stage chooses first, among the groups that leave the others a way.
        """
        tables = self.tables
        count = len(scores_SG)
        left = [reach.shape[1] - 1 for reach in self._reach]
        chosen = np.zeros(count, np.int64)
        for after, stage in enumerate(np.argsort(scores_SG.max(axis=1), kind="stable").tolist()[::-1], 1):
            for group in np.argsort(-scores_SG[stage], kind="stable").tolist():
                pool = int(tables.group_pool[group])
                size = int(tables.group_devices[group]) // self._units[pool]
                if size <= left[pool]:
                    left[pool] -= size
                    if self._possible(left, count - after):
                        chosen[stage] = group
                        break
                    left[pool] += size
        return chosen

    def _possible(self, left: list[int], stages: int) -> bool:
        """Whether exactly so many stages can make up what is left of all pools."""
        if not self.tables.exactly:
            rest = zip(left, self._sizes, strict=True)
            return sum(have // int(sizes.min()) for have, sizes in rest if len(sizes)) >= stages
        totals = np.zeros(stages + 1, bool)
        totals[0] = True
        for reach, devices in zip(self._reach, left, strict=True):
            after = np.zeros_like(totals)
            for here in np.flatnonzero(reach[: stages + 1, devices]):
                after[here:] |= totals[: len(after) - here]
            totals = after
        return bool(totals[stages])
