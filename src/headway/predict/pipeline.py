"""When each micro-batch runs on each pipeline stage: the schedules as data, and what follows from them.

`order_of_rank` writes a schedule down as the runtime (torch.distributed.pipelining) executes it. `play` derives exact
start times from it by the dependencies alone; `closed_form` says nearly the same in a formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

__all__ = ["WEIGHT", "Cell", "Played", "closed_form", "finish_seconds", "in_flight", "order_of_rank", "play"]

# `Cell.backward` of the second half of a backward pass that a schedule splits.
WEIGHT = 2


class Cell(NamedTuple):
    """One micro-batch going through one stage.

    `backward` is False for the forward pass and True for the backward pass. A schedule that splits backward in two
    (zero bubble) has True for the gradient of the stage's input, for which the stage before waits, and `WEIGHT` for the
    gradients of its parameters, for which nobody waits.
    """

    stage: int
    micro_batch: int
    backward: int


class Played(NamedTuple):
    """A schedule with times. `starts` holds each cell's start, `finish` for each pipeline rank its last cell's end."""

    starts: dict[Cell, float]
    finish: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return max(self.finish)


@lru_cache(maxsize=4096)
def order_of_rank(schedule: str, rank: int, pipeline: int, virtual_stages: int, micro_batches: int) -> tuple[Cell, ...]:
    """The cells of one pipeline rank in the order in which it runs them.

    "gpipe": all forward, then all backward (Huang et al., NeurIPS 2019, section 2.3). "1f1b": as many forward as ranks
    remain, then one backward and one forward in turn (Narayanan et al., ICML 2021). "interleaved": the same over
    `virtual_stages` chunks on each rank (Narayanan et al., SC 2021, section 2.2). "zero_bubble": ZB-H1 (Qi et al., ICLR
    2024, section 2.3), 1F1B with backward split in two; rank r lets its parameters' gradients wait for r micro-batches,
    so that every rank holds as many micro-batches as the first one does under 1F1B, and the gradients that the stages
    before wait for are made earlier.
    """
    return _cells_of(schedule, rank, pipeline, virtual_stages, micro_batches)


def _cells_of(schedule: str, rank: int, pipeline: int, virtual_stages: int, micro_batches: int) -> tuple[Cell, ...]:
    m, p, v = micro_batches, pipeline, virtual_stages
    if schedule == "interleaved":
        return _interleaved(rank, p, v, m)
    forward = [Cell(rank, i, False) for i in range(m)]
    backward = [Cell(rank, i, True) for i in range(m)]
    if schedule == "gpipe":
        return (*forward, *backward)
    if schedule == "none":
        return tuple(cell for pair in zip(forward, backward, strict=True) for cell in pair)
    warmup = min(m, p - rank)
    cells = forward[:warmup]
    delay = rank if schedule == "zero_bubble" else m
    for i in range(m):
        cells.append(backward[i])
        if i >= delay:
            cells.append(Cell(rank, i - delay, WEIGHT))
        if warmup + i < m:
            cells.append(forward[warmup + i])
    if schedule == "zero_bubble":
        cells.extend(Cell(rank, i, WEIGHT) for i in range(max(0, m - delay), m))
    return tuple(cells)


def _interleaved(rank: int, p: int, v: int, m: int) -> tuple[Cell, ...]:
    round_size = m // max(1, m // p)
    total = m * v
    warmup = min(total, (v - 1) * round_size + 2 * (p - 1 - rank))
    counts: dict[tuple[int, bool], int] = {}
    cells: list[Cell] = []

    def add(step: int, backward: bool) -> None:
        chunk = step // round_size % v
        if backward:
            chunk = v - 1 - chunk
        stage = chunk * p + rank
        index = counts.get((stage, backward), 0)
        counts[stage, backward] = index + 1
        cells.append(Cell(stage, index, backward))

    for step in range(warmup):
        add(step, False)
    for step in range(total - warmup):
        add(warmup + step, False)
        add(step, True)
    for step in range(total - warmup, total):
        add(step, True)
    return tuple(cells)


@lru_cache(maxsize=4096)
def in_flight(schedule: str, rank: int, pipeline: int, virtual_stages: int, micro_batches: int) -> tuple[int, ...]:
    """For each stage of a rank, how many micro-batches it holds activations of when the rank holds most.

    1F1B keeps min(m, p - rank), GPipe all m (Narayanan et al., SC 2021, section 2.2). ZB-H1 keeps min(m, p) on every
    rank (Qi et al., ICLR 2024, section 2.3), counted until its parameters' gradients are made: an upper bound, since
    the gradient of the input has released a part by then.
    """
    m, p, v = micro_batches, pipeline, virtual_stages
    if schedule == "gpipe":
        return (m,)
    if schedule == "none":
        return (1,)
    if schedule == "1f1b":
        return (min(m, p - rank),)
    if schedule == "zero_bubble":
        return (min(m, p),)
    # Interleaved: most is held after the warm-up and the first forward behind it; from there on backward and forward
    # take turns. Forward passes go through the chunks in rounds (see `_interleaved`).
    round_size = m // max(1, m // p)
    forward = min(m * v, (v - 1) * round_size + 2 * (p - 1 - rank) + 1)
    rounds, rest = divmod(forward, round_size)
    held = [rounds // v * round_size + (round_size if chunk < rounds % v else 0) for chunk in range(v)]
    held[rounds % v] += rest
    return tuple(held)


def play(
    schedule: str,
    pipeline: int,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None = None,
) -> Played:
    """Start every cell as soon as its rank is free and its input is there.

    `forward_seconds` and `backward_seconds` are for each stage; `send_seconds[r]` is the time from pipeline rank r to
    the next one (and back, for gradients). `weight_seconds`: the part of each stage's `backward_seconds` that the
    gradients of its parameters take, where the schedule splits them off; half if not given. Takes about a microsecond
    for each cell.
    """
    virtual = len(forward_seconds) // pipeline
    sweep = _sweep(schedule, pipeline, virtual, micro_batches)
    weights = _weights(schedule, backward_seconds, weight_seconds)
    starts, finish = _run(sweep, forward_seconds, backward_seconds, weights, send_seconds)
    return Played(starts=dict(zip(sweep.cells, starts, strict=True)), finish=finish)


def finish_seconds(
    schedule: str,
    pipeline: int,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """`play(...).finish` for short schedules that are asked for again and again: what follows what is kept."""
    sweep = _kept_sweep(schedule, pipeline, len(forward_seconds) // pipeline, micro_batches)
    weights = _weights(schedule, backward_seconds, weight_seconds)
    return _run(sweep, forward_seconds, backward_seconds, weights, send_seconds)[1]


class _Sweep(NamedTuple):
    """The cells of all ranks in an order in which each comes after the one that it needs, column by column.

    `ranks`: of each cell. `takes`: which duration (see `_run`). `needs`: whose end it waits for, as the position behind
    that cell in the sweep, 0 for none. `sends`: the rank whose send lies between, or `pipeline`: none does.
    """

    cells: tuple[Cell, ...]
    ranks: tuple[int, ...]
    takes: tuple[int, ...]
    needs: tuple[int, ...]
    sends: tuple[int, ...]


def _sweep(schedule: str, pipeline: int, virtual_stages: int, micro_batches: int) -> _Sweep:
    orders = [_cells_of(schedule, rank, pipeline, virtual_stages, micro_batches) for rank in range(pipeline)]
    stages = pipeline * virtual_stages
    last = stages - 1
    cells: list[Cell] = []
    steps: list[tuple[int, int, int, int]] = []
    behind: dict[Cell, int] = {}
    done = [0] * pipeline
    waiting: dict[Cell, int] = {}
    ready = list(range(pipeline - 1, -1, -1))
    while ready:
        rank = ready.pop()
        order = orders[rank]
        at = done[rank]
        while at < len(order):
            cell = order[at]
            stage, index, backward = cell
            send = pipeline
            if backward == WEIGHT:
                needs = None  # its own rank has made the gradient of the input before
            elif backward:
                needs = Cell(stage, index, False) if stage == last else Cell(stage + 1, index, True)
                send = pipeline if stage == last else stage % pipeline
            else:
                needs = Cell(stage - 1, index, False) if stage else None
                send = (stage - 1) % pipeline if stage else pipeline
            if needs is not None and needs not in behind:
                waiting[needs] = rank
                break
            position = 0 if needs is None else behind[needs]
            steps.append((rank, backward * stages + stage, position, send if pipeline > 1 else pipeline))
            cells.append(cell)
            behind[cell] = len(cells)
            at += 1
            if cell in waiting:
                other = waiting.pop(cell)
                if other != rank:
                    ready.append(other)
        done[rank] = at
    assert all(at == len(order) for at, order in zip(done, orders, strict=True)), "a schedule that deadlocks"
    return _Sweep(tuple(cells), *zip(*steps, strict=True))


@lru_cache(maxsize=128)
def _kept_sweep(schedule: str, pipeline: int, virtual_stages: int, micro_batches: int) -> _Sweep:
    """A sweep for its times alone: cells would take most of its memory."""
    return _sweep(schedule, pipeline, virtual_stages, micro_batches)._replace(cells=())


def _run(
    sweep: _Sweep,
    forward: Sequence[float],
    backward: Sequence[float],
    weights: Sequence[float],
    send_seconds: Sequence[float],
) -> tuple[list[float], tuple[float, ...]]:
    """When each cell of a sweep starts, and when each rank is done."""
    # By `Cell.backward`, then by stage.
    takes = [*forward, *(b - w for b, w in zip(backward, weights, strict=True)), *weights]
    pipeline = len(send_seconds)
    delays = [*send_seconds, 0.0]
    clock = [0.0] * pipeline
    ends = [-math.inf]  # what a cell that needs nothing waits for
    starts: list[float] = []
    for rank, taken, needs, send in zip(*sweep[1:], strict=True):
        now = clock[rank]
        there = ends[needs] + delays[send]
        if there > now:
            now = there
        starts.append(now)
        now += takes[taken]
        ends.append(now)
        clock[rank] = now
    return starts, tuple(clock)


def _weights(schedule: str, backward_seconds: Sequence[float], given: Sequence[float] | None) -> Sequence[float]:
    """Seconds of each stage's backward pass that its schedule splits off."""
    if schedule != "zero_bubble":
        return [0.0] * len(backward_seconds)
    return given if given is not None else [seconds / 2 for seconds in backward_seconds]


def closed_form(
    schedule: str,
    pipeline: int,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """When each pipeline rank is done, without playing the schedule: the slowest stage sets the pace.

    The first micro-batch passes through everything, the other m - 1 follow at the pace of the slowest stage: for equal
    stages the textbook bubble of (p - 1)/m, or (p - 1)/(v m) interleaved (Narayanan et al., SC 2021, section 2.2), and
    of (p - 1)(F + B - W)/(m (F + B + W)) for ZB-H1 (Qi et al., ICLR 2024, table 2).
    """
    m, p = micro_batches, pipeline
    forward, backward = forward_seconds, backward_seconds
    sends = sum(send_seconds[: p - 1])
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    if schedule == "zero_bubble":
        return _zero_bubble(m, both, _weights(schedule, backward, weight_seconds), forward, send_seconds)
    if schedule == "interleaved":
        ranks = [sum(both[rank::p]) for rank in range(p)]
        # A micro-batch crosses p - 1 chunks before the last rank can begin, and p - 1 after it ended.
        seconds = m * max(ranks) + (p - 1) * max(both) + 2 * sends
    elif schedule == "gpipe":
        seconds = sum(both) + (m - 1) * (max(forward) + max(backward)) + 2 * sends
    else:
        seconds = sum(both) + 2 * sends + _following(m - 1, both, [0.0] * p, send_seconds)
    finish = [seconds]
    for rank in range(p - 1):
        finish.append(finish[-1] - backward[rank] - send_seconds[rank])
    return tuple(finish)


def _following(count: int, both: Sequence[float], weights: Sequence[float], send_seconds: Sequence[float]) -> float:
    """Seconds that `count` micro-batches behind the first one add when forward and backward take turns.

    Between ranks i and j (i <= j) only j - i + 1 micro-batches are under way at a time: so many go round, back and
    forth, in the work of all ranks between them and 2 (j - i) sends. Without sends the slowest rank alone is the
    slowest round; with them, long rounds are. The slowest round rules, and a shorter one takes the remainder.
    `weights`: the part of `both` that only the first rank of a round does within it.
    """
    count_of_ranks = len(both)
    # Row i: what a round out of rank i adds up to as it grows, rank by rank; what lies beyond the last rank is -inf.
    terms = np.full((2 * count_of_ranks, 2), -math.inf)
    terms[:count_of_ranks, 0] = np.subtract(both, weights)
    terms[:count_of_ranks, 1] = np.multiply(2, send_seconds)
    rounds_of = sliding_window_view(terms.ravel(), 2 * count_of_ranks)[: 2 * count_of_ranks : 2]
    added = np.cumsum(np.column_stack((weights, rounds_of)), axis=1)
    slowest = np.maximum(added[:, 1::2].max(axis=0), 0.0)  # by micro-batches in the round, less one
    size = int(np.argmax(slowest / np.arange(1, count_of_ranks + 1))) + 1
    rounds, rest = divmod(count, size)
    remainder = max(float(slowest[rest - 1]), rest * float(slowest[0])) if rest else 0.0
    return rounds * float(slowest[size - 1]) + remainder


def _zero_bubble(
    m: int, both: Sequence[float], weights: Sequence[float], forward: Sequence[float], send_seconds: Sequence[float]
) -> tuple[float, ...]:
    """ZB-H1: the slowest rank works without a pause, but for filling and draining the ranks around it.

    Unless sends are so long that even with the gradients of parameters to fill in, rounds take longer than that.
    """
    slowest = max(range(len(both)), key=lambda at: both[at])
    sends = sum(send_seconds[: len(both) - 1])
    # By how much less a rank's gradients of inputs take than those of its parameters, which others work off meanwhile.
    behind = [both[at] - forward[at] - 2 * weights[at] for at in range(len(both))]
    seconds = m * both[slowest] + 4 * sends
    inputs = [both[at] - forward[at] - weights[at] for at in range(len(both))]
    seconds += sum(
        max(forward[at], inputs[at], forward[at] + inputs[at] - weights[at]) for at in range(len(both)) if at != slowest
    )
    following = _following(m - 1, both, weights, send_seconds)
    if following > (m - 1) * both[slowest] * (1 + 1e-9):
        seconds = max(seconds, sum(both) - sum(weights) + 2 * sends + following)
    finish = [0.0]
    for each in behind[:-1]:
        finish.append(finish[-1] - each)
    return tuple(each + seconds - max(finish) for each in finish)
