"""Proposals on the stages of a `StageProblem`, and walks made of them: what `mcmc` and `gradient` change solutions by.

A proposal changes one thing: cuts move, stages are split, merged or swapped, or take other options. Only the stages
that it touched are looked up again (delta evaluation); what a solution takes then follows from sums over its stages.
Every proposal keeps the number of devices right. A walk may pass through solutions that lack memory, at a price.
The kernel is compiled by numba: a few microseconds for a proposal and its evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.search.problem import Assignment, StageProblem
from headway.search.supply import Supply, pack

__all__ = ["Walk", "ordered_cuts"]

# What lacking memory adds to log(seconds): for each stage that lacks some, and for the share that it lacks.
_LACKING, _LACKING_SHARE = 0.2, 2.0
# An impossible stage (infinite seconds) is dearer than any memory.
_IMPOSSIBLE = 50.0
# Kinds of proposal and how often each is drawn, relative to the others.
_CUT, _SHIFT, _OPTION, _SWAP, _RESIZE, _SPLIT, _MERGE, _SWEEP = range(8)
_WEIGHTS = (3.0, 2.0, 3.0, 1.0, 2.0, 1.0, 1.0, 1.0)
# A proposal for which nothing can be changed is drawn again; after so many for each evaluation the walk gives up.
_DRAWS = 50


class _Chains(NamedTuple):
    """The walks, one in each row; the last row is the proposal. `seconds`, `fixed`, `kept` of each stage."""

    count: np.ndarray  # (rows,)
    starts: np.ndarray  # (rows, most stages + 1); after the last stage, the number of layers
    options: np.ndarray  # (rows, most stages)
    seconds: np.ndarray
    fixed: np.ndarray
    kept: np.ndarray
    used: np.ndarray  # (rows, pools)
    energy: np.ndarray  # (rows,)
    best: np.ndarray  # (1,): seconds of the best solution of all walks
    best_count: np.ndarray  # (1,)
    best_starts: np.ndarray  # (most stages + 1,)
    best_options: np.ndarray  # (most stages,)


# ------------------------------------------------------------------------------------------------------- the kernel

# The kernel allocates nothing, so references to arrays need not be counted: that took most of the time.
_OPTIONS: dict[str, Any] = {"_nrt": False}
_compiled = compiled(**_OPTIONS)
_INNER: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_inner = compiled(**_INNER)


@_inner
def _below(rng, count):
    return min(int(rng.random() * count), count - 1)


@_inner
def _look_up(tables, chains, row, stage):
    """What one stage costs, out of the tables."""
    start, stop = chains.starts[row, stage], chains.starts[row, stage + 1]
    option = chains.options[row, stage]
    chains.seconds[row, stage] = tables.seconds[start, stop, option]
    chains.fixed[row, stage] = tables.fixed[start, stop, option]
    chains.kept[row, stage] = tables.kept[start, stop, option]


@_inner
def _judge(tables, chains, row):
    """(energy, seconds) of a row whose stages have been looked up; seconds are infinite where it is no solution."""
    count = chains.count[row]
    total, slowest, price = 0.0, 0.0, 0.0
    for stage in range(count):
        seconds = chains.seconds[row, stage]
        if not np.isfinite(seconds):
            price += _IMPOSSIBLE
            continue
        total += seconds + (tables.send[chains.starts[row, stage]] if stage else 0.0)
        slowest = max(slowest, seconds)
        flights = min(count - stage, tables.micro_batches)
        needs = chains.fixed[row, stage] + flights * chains.kept[row, stage]
        capacity = tables.capacity[chains.options[row, stage]]
        if needs > capacity:
            price += _LACKING + _LACKING_SHARE * min(needs / max(capacity, 1.0) - 1, 10.0)
    total += (tables.micro_batches - 1) * slowest
    energy = math.log(max(total, 1e-300)) + price
    return energy, (total if price == 0.0 else np.inf)


@_compiled
def _pick(rng, tables, group, start, stop, flights):
    """An option of a group for layers `start` to `stop`: the fastest that fits, or any, one time in two."""
    first, end = tables.first[group], tables.first[group + 1]
    if rng.random() < 0.5:
        found, least = -1, np.inf
        for option in range(first, end):
            seconds = tables.seconds[start, stop, option]
            if seconds < least:
                needs = tables.fixed[start, stop, option] + flights * tables.kept[start, stop, option]
                if needs <= tables.capacity[option]:
                    found, least = option, seconds
        if found >= 0:
            return found
    return first + _below(rng, end - first)


@_inner
def _set(rng, tables, chains, row, stage, group):
    """Give a stage an option of `group`, counting the devices."""
    old = tables.group[chains.options[row, stage]]
    chains.used[row, tables.group_pool[old]] -= tables.group_devices[old]
    chains.used[row, tables.group_pool[group]] += tables.group_devices[group]
    flights = min(chains.count[row] - stage, tables.micro_batches)
    start, stop = chains.starts[row, stage], chains.starts[row, stage + 1]
    chains.options[row, stage] = _pick(rng, tables, group, start, stop, flights)
    _look_up(tables, chains, row, stage)


@_inner
def _copy(chains, source, target):
    count = chains.count[source]
    chains.count[target] = count
    chains.energy[target] = chains.energy[source]
    for pool in range(chains.used.shape[1]):
        chains.used[target, pool] = chains.used[source, pool]
    for stage in range(count):
        chains.starts[target, stage] = chains.starts[source, stage]
        chains.options[target, stage] = chains.options[source, stage]
        chains.seconds[target, stage] = chains.seconds[source, stage]
        chains.fixed[target, stage] = chains.fixed[source, stage]
        chains.kept[target, stage] = chains.kept[source, stage]
    chains.starts[target, count] = chains.starts[source, count]


@_inner
def _shift_cuts(rng, tables, chains, row, most):
    """Move up to `most` neighbouring cuts by the same distance: whole stages keep their size and pass layers on."""
    count = chains.count[row]
    if count < 2:
        return False
    first = 1 + _below(rng, count - 1)
    last = min(first + _below(rng, most), count - 1)
    lowest = chains.starts[row, first - 1] + 1 - chains.starts[row, first]
    highest = chains.starts[row, last + 1] - 1 - chains.starts[row, last]
    if lowest == 0 and highest == 0:
        return False
    if most > 1 or rng.random() < 0.5:
        by = -1 if rng.random() < 0.5 else 1
        if by < lowest or by > highest:
            by = -by
    else:
        by = lowest + _below(rng, highest - lowest)
        by += by >= 0
    for cut in range(first, last + 1):
        chains.starts[row, cut] += by
    for stage in range(first - 1, last + 1):
        _look_up(tables, chains, row, stage)
    return True


@_inner
def _change_option(rng, tables, chains, row):
    stage = _below(rng, chains.count[row])
    if tables.exactly:
        group = tables.group[chains.options[row, stage]]
    else:
        group = _below(rng, len(tables.group_pool))
    before = chains.options[row, stage]
    _set(rng, tables, chains, row, stage, group)
    return chains.options[row, stage] != before


@_inner
def _sweep(rng, tables, chains, row):
    """All stages that have the same option take the same other one with as many devices."""
    before = chains.options[row, _below(rng, chains.count[row])]
    group = tables.group[before]
    after = tables.first[group] + _below(rng, tables.first[group + 1] - tables.first[group])
    if after == before:
        return False
    for stage in range(chains.count[row]):
        if chains.options[row, stage] == before:
            chains.options[row, stage] = after
            _look_up(tables, chains, row, stage)
    return True


@_inner
def _swap(rng, tables, chains, row):
    count = chains.count[row]
    one, other = _below(rng, count), _below(rng, count)
    mine, yours = chains.options[row, one], chains.options[row, other]
    if mine == yours:
        return False
    chains.options[row, one], chains.options[row, other] = yours, mine
    _look_up(tables, chains, row, one)
    _look_up(tables, chains, row, other)
    return True


@_inner
def _resize(rng, tables, chains, row):
    """Two stages share their devices out anew; if they have different pools, they change places there."""
    count = chains.count[row]
    one, other = _below(rng, count), _below(rng, count)
    if one == other:
        return False
    mine, yours = tables.group[chains.options[row, one]], tables.group[chains.options[row, other]]
    if not tables.exactly:
        _set(rng, tables, chains, row, one, _below(rng, len(tables.group_pool)))
        _set(rng, tables, chains, row, other, _below(rng, len(tables.group_pool)))
        return True
    pool = tables.group_pool[mine]
    if pool != tables.group_pool[yours]:
        _set(rng, tables, chains, row, one, yours)
        _set(rng, tables, chains, row, other, mine)
        return True
    first, end = tables.pool_first[pool], tables.pool_first[pool + 1]
    group = first + _below(rng, end - first)
    rest = tables.group_devices[mine] + tables.group_devices[yours] - tables.group_devices[group]
    if rest <= 0 or rest >= tables.group_at.shape[1] or tables.group_at[pool, rest] < 0:
        return False
    _set(rng, tables, chains, row, one, group)
    _set(rng, tables, chains, row, other, tables.group_at[pool, rest])
    return True


@_inner
def _split(rng, tables, chains, row):
    """A stage becomes two; the devices of the new one come out of its own, or out of another stage's."""
    count = chains.count[row]
    stage = _below(rng, count)
    start, stop = chains.starts[row, stage], chains.starts[row, stage + 1]
    if count >= tables.most_stages or stop - start < 2:
        return False
    donor = stage if rng.random() < 0.5 else _below(rng, count)
    giving = tables.group[chains.options[row, donor]]
    pool, devices = tables.group_pool[giving], tables.group_devices[giving]
    first, end = tables.pool_first[pool], tables.pool_first[pool + 1]
    half = tables.group_at[pool, devices // 2]
    group = half if half >= 0 and rng.random() < 0.5 else first + _below(rng, end - first)
    rest = giving
    if tables.exactly:
        left = devices - tables.group_devices[group]
        rest = tables.group_at[pool, left] if left > 0 else -1
        if rest < 0:
            return False
    elif rng.random() < 0.5:
        rest = first + _below(rng, end - first)
    new = stage + (1 if rng.random() < 0.5 else 0)  # the half that is new: the right one, or the left
    chains.starts[row, count + 1] = chains.starts[row, count]
    for later in range(count, stage, -1):
        chains.starts[row, later] = chains.starts[row, later - 1]
        chains.options[row, later] = chains.options[row, later - 1]
        chains.seconds[row, later] = chains.seconds[row, later - 1]
        chains.fixed[row, later] = chains.fixed[row, later - 1]
        chains.kept[row, later] = chains.kept[row, later - 1]
    chains.count[row] = count + 1
    chains.starts[row, stage + 1] = start + 1 + _below(rng, stop - start - 1)
    if donor > stage:
        donor += 1
    elif donor == stage:
        donor = stage + 1 if new == stage else stage
    # The new half was a copy of the old one, and counts for nothing before it is set.
    copied = tables.group[chains.options[row, new]]
    chains.used[row, tables.group_pool[copied]] += tables.group_devices[copied]
    _set(rng, tables, chains, row, new, group)
    _set(rng, tables, chains, row, donor, rest)
    _look_up(tables, chains, row, stage)
    _look_up(tables, chains, row, stage + 1)
    return True


@_inner
def _merge(rng, tables, chains, row):
    """Two neighbours become one; the devices that one of them had go to the merged stage, or to another."""
    count = chains.count[row]
    if count < 2:
        return False
    stage = _below(rng, count - 1)
    gone = stage + (1 if rng.random() < 0.5 else 0)
    freed = tables.group[chains.options[row, gone]]
    keeper = stage + 1 if gone == stage else stage
    heir = keeper if rng.random() < 0.5 else _below(rng, count)
    if heir == gone:
        heir = keeper
    taking = tables.group[chains.options[row, heir]]
    if tables.exactly:
        pool = tables.group_pool[freed]
        both = tables.group_devices[freed] + tables.group_devices[taking]
        if pool != tables.group_pool[taking] or both >= tables.group_at.shape[1] or tables.group_at[pool, both] < 0:
            return False
        taking = tables.group_at[pool, both]
    elif rng.random() < 0.5:
        taking = _below(rng, len(tables.group_pool))
    chains.used[row, tables.group_pool[freed]] -= tables.group_devices[freed]
    chains.options[row, stage] = chains.options[row, keeper]
    for later in range(stage + 1, count - 1):
        chains.options[row, later] = chains.options[row, later + 1]
        chains.seconds[row, later] = chains.seconds[row, later + 1]
        chains.fixed[row, later] = chains.fixed[row, later + 1]
        chains.kept[row, later] = chains.kept[row, later + 1]
    for later in range(stage + 1, count):
        chains.starts[row, later] = chains.starts[row, later + 1]
    chains.count[row] = count - 1
    heir = stage if heir == keeper else heir - (heir > stage + 1)
    _set(rng, tables, chains, row, heir, taking)
    _look_up(tables, chains, row, stage)
    return True


@_compiled
def _spread(tables, chains, row):
    """Cut anew so that every stage gets work in proportion to its speed.

    Other options need other cuts: without this, each change of both would pass through an unbalanced pipeline.
    """
    count, layers = chains.count[row], len(tables.work) - 1
    speeds = 0.0
    for stage in range(count):
        if not np.isfinite(chains.seconds[row, stage]):
            return
        share = tables.work[chains.starts[row, stage + 1]] - tables.work[chains.starts[row, stage]]
        speeds += share / chains.seconds[row, stage]
    done, at, before = 0.0, 0, 0
    for stage in range(count - 1):
        share = tables.work[chains.starts[row, stage + 1]] - tables.work[before]
        before = chains.starts[row, stage + 1]
        done += share / chains.seconds[row, stage] / speeds
        at += 1
        while at < layers - (count - 1 - stage) and tables.work[at] + tables.work[at + 1] < 2 * done:
            at += 1
        chains.starts[row, stage + 1] = at
    for stage in range(count):
        _look_up(tables, chains, row, stage)


@_inner
def _propose(rng, tables, chains, row, weights):
    """Change `row` in one way, and cut anew one time in two if it has other options; whether anything was changed."""
    drawn, kind = rng.random() * weights[-1], 0
    while drawn >= weights[kind]:
        kind += 1
    if not _change(rng, tables, chains, row, kind):
        return False
    if kind > _SHIFT and rng.random() < 0.5:
        _spread(tables, chains, row)
    return True


@_inner
def _change(rng, tables, chains, row, kind):
    if kind == _CUT:
        return _shift_cuts(rng, tables, chains, row, 1)
    if kind == _SHIFT:
        return _shift_cuts(rng, tables, chains, row, max(2, chains.count[row]))
    if kind == _OPTION:
        return _change_option(rng, tables, chains, row)
    if kind == _SWAP:
        return _swap(rng, tables, chains, row)
    if kind == _RESIZE:
        return _resize(rng, tables, chains, row)
    if kind == _SPLIT:
        return _split(rng, tables, chains, row)
    if kind == _MERGE:
        return _merge(rng, tables, chains, row)
    return _sweep(rng, tables, chains, row)


@_inner
def _keep_best(tables, chains, row, seconds):
    if seconds < chains.best[0]:
        count = chains.count[row]
        chains.best[0] = seconds
        chains.best_count[0] = count
        for stage in range(count):
            chains.best_starts[stage] = chains.starts[row, stage]
            chains.best_options[stage] = chains.options[row, stage]
        chains.best_starts[count] = chains.starts[row, count]


@_compiled
def _begin(tables, chains, row):
    """Look up all stages of a row that was put in from outside."""
    for stage in range(chains.count[row]):
        _look_up(tables, chains, row, stage)
    energy, seconds = _judge(tables, chains, row)
    chains.energy[row] = energy
    _keep_best(tables, chains, row, seconds)


@_compiled
def _walk(rng, tables, chains, weights, temperature, evaluations, turn):
    """`evaluations` proposals, one for each row in turn, beginning with row `turn`; returns how many were made."""
    rows = len(chains.count) - 1
    trial = rows
    evaluated = 0
    for _draw in range(evaluations * _DRAWS):
        if evaluated == evaluations:
            break
        row = (turn + evaluated) % rows
        _copy(chains, row, trial)
        if not _propose(rng, tables, chains, trial, weights):
            continue
        if not tables.exactly:
            over = False
            for pool in range(len(tables.pools)):
                over = over or chains.used[trial, pool] > tables.pools[pool]
            if over:
                continue
        evaluated += 1
        energy, seconds = _judge(tables, chains, trial)
        worse = energy - chains.energy[row]
        if np.isinf(temperature):
            taken = np.isfinite(seconds) or worse <= 0
        else:
            taken = worse <= 0 or (temperature > 0 and rng.random() < math.exp(-worse / temperature))
        if taken:
            chains.energy[trial] = energy
            _copy(chains, trial, row)
            _keep_best(tables, chains, row, seconds)
    return evaluated


# ------------------------------------------------------------------------------------------------------ around it


class Walk:
    """Several walks over the solutions of one problem: drawn or given beginnings, then proposals as asked for.

    `rows` walks take turns. Nothing depends on how `run` is divided into calls, but for the temperature of each.
    """

    def __init__(self, problem: StageProblem, *, seed: int = 0, rows: int = 1) -> None:
        self.problem = problem
        self.rng = np.random.default_rng(seed)
        self.order, self.tables = pack(problem)
        self.supply = Supply(self.tables)
        self._weights = np.cumsum(_WEIGHTS)
        self.evaluated = 0
        most, pools = self.tables.most_stages, len(problem.pools)
        self._chains = _Chains(
            count=np.zeros(rows + 1, np.int64),
            starts=np.zeros((rows + 1, most + 2), np.int64),
            options=np.zeros((rows + 1, most + 1), np.int64),
            seconds=np.zeros((rows + 1, most + 1)),
            fixed=np.zeros((rows + 1, most + 1)),
            kept=np.zeros((rows + 1, most + 1)),
            used=np.zeros((rows + 1, pools), np.int64),
            energy=np.zeros(rows + 1),
            best=np.full(1, np.inf),
            best_count=np.zeros(1, np.int64),
            best_starts=np.zeros(most + 2, np.int64),
            best_options=np.zeros(most + 1, np.int64),
        )
        self.rows = rows

    def begin(self, row: int, stages: Sequence[Assignment] | None = None, *, count: int = 0) -> None:
        """Put a walk at `stages`, or at a drawn solution (which may lack memory) of `count` stages (0: any number)."""
        chains = self._chains
        if stages is None:
            starts, options = self._draw(count)
        else:
            back = {option: at for at, option in enumerate(self.order.tolist())}
            starts = [stage.start for stage in stages]
            options = [back[stage.option] for stage in stages]
        count = len(starts)
        chains.count[row] = count
        chains.starts[row, :count] = starts
        chains.starts[row, count] = self.problem.layers
        chains.options[row, :count] = options
        groups = self.tables.group[np.asarray(options)]
        chains.used[row] = 0
        np.add.at(chains.used[row], self.tables.group_pool[groups], self.tables.group_devices[groups])
        _begin(self.tables, chains, row)
        if stages is None and self.rng.random() < 0.5:
            _spread(self.tables, chains, row)
            _begin(self.tables, chains, row)
        self.evaluated += 1

    def run(self, evaluations: int, temperature: float) -> int:
        """Propose so often (fewer only if hardly anything can be changed), and say how often."""
        made = _walk(
            self.rng, self.tables, self._chains, self._weights, temperature, evaluations, self.evaluated % self.rows
        )
        self.evaluated += made
        return made

    def halve(self) -> None:
        """Go on with the better half of the walks only."""
        chains, keep = self._chains, max(1, self.rows // 2)
        order = np.argsort(chains.energy[: self.rows], kind="stable")[:keep]
        for array in chains[: chains._fields.index("best")]:
            # The proposal's row stays the last one.
            array[:keep] = array[order]
        self._chains = chains._replace(
            **{name: getattr(chains, name)[: keep + 1] for name in chains._fields if not name.startswith("best")}
        )
        self.rows = keep

    @property
    def seconds(self) -> float:
        """Of the best solution so far; infinite while there is none."""
        return float(self._chains.best[0])

    @property
    def stages(self) -> tuple[Assignment, ...]:
        """The best solution so far."""
        chains = self._chains
        if not np.isfinite(chains.best[0]):
            return ()
        return self._assignments(int(chains.best_count[0]), chains.best_starts, chains.best_options)

    def current(self, row: int) -> tuple[tuple[Assignment, ...], float]:
        """Where a walk is now, and the logarithm of its seconds, with a price on lacking memory."""
        chains = self._chains
        found = self._assignments(int(chains.count[row]), chains.starts[row], chains.options[row])
        return found, float(chains.energy[row])

    def _assignments(self, count: int, starts: np.ndarray, options: np.ndarray) -> tuple[Assignment, ...]:
        return tuple(
            Assignment(int(starts[at]), int(starts[at + 1]), int(self.order[options[at]])) for at in range(count)
        )

    def _draw(self, count: int) -> tuple[list[int], list[int]]:
        """A solution with the right devices: any number of stages, even or not, with cuts that follow the devices."""
        rng, tables, layers = self.rng, self.tables, self.problem.layers
        groups = self.supply.draw(rng, count)
        count = len(groups)
        if rng.random() < 0.5:
            share = np.cumsum(tables.group_devices[groups].astype(float))
            cuts = np.rint(share[:-1] / share[-1] * layers).astype(int)
            cuts = ordered_cuts(cuts, layers).tolist()
        else:
            cuts = sorted((1 + rng.permutation(layers - 1)[: count - 1]).tolist())
        starts = [0, *cuts]
        options = []
        for at, (start, stop) in enumerate(zip(starts, [*cuts, layers], strict=True)):
            flights = min(count - at, tables.micro_batches)
            options.append(int(_pick(rng, tables, groups[at], start, stop, flights)))
        return starts, options


def ordered_cuts(cuts: np.ndarray, layers: int) -> np.ndarray:
    """The nearest cuts that leave every stage a layer."""
    steps = np.arange(1, len(cuts) + 1)
    cuts = np.maximum.accumulate(np.maximum(cuts - steps, 0)) + steps
    return np.minimum(cuts, layers - len(cuts) - 1 + steps)
