"""When each micro-batch runs on each pipeline stage: the schedules as data, and what follows from them.

`order_of_rank` writes a schedule down as the runtime (torch.distributed.pipelining) executes it. `play` derives exact
start times from it by the dependencies alone; `closed_form` says the same for balanced stages in a formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Cell", "Played", "closed_form", "in_flight", "order_of_rank", "play"]


class Cell(NamedTuple):
    """One micro-batch going forward or backward through one stage."""

    stage: int
    micro_batch: int
    backward: bool


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
    `virtual_stages` chunks on each rank (Narayanan et al., SC 2021, section 2.2).
    """
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
    for i in range(m):
        cells.append(backward[i])
        if warmup + i < m:
            cells.append(forward[warmup + i])
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

    1F1B keeps min(m, p - rank), GPipe all m (Narayanan et al., SC 2021, section 2.2).
    """
    m, p, v = micro_batches, pipeline, virtual_stages
    if schedule == "gpipe":
        return (m,)
    if schedule == "none":
        return (1,)
    if schedule == "1f1b":
        return (min(m, p - rank),)
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
) -> Played:
    """Start every cell as soon as its rank is free and its input is there.

    `forward_seconds` and `backward_seconds` are for each stage; `send_seconds[r]` is the time from pipeline rank r to
    the next one (and back, for gradients). Takes about a microsecond for each cell.
    """
    stages = len(forward_seconds)
    virtual = stages // pipeline
    orders = [order_of_rank(schedule, rank, pipeline, virtual, micro_batches) for rank in range(pipeline)]
    last = stages - 1
    ends: dict[Cell, float] = {}
    starts: dict[Cell, float] = {}
    clock = [0.0] * pipeline
    done = [0] * pipeline
    waiting: dict[Cell, int] = {}
    ready = list(range(pipeline - 1, -1, -1))
    while ready:
        rank = ready.pop()
        order = orders[rank]
        now = clock[rank]
        at = done[rank]
        while at < len(order):
            cell = order[at]
            stage, index, backward = cell
            if backward:
                needs = Cell(stage, index, False) if stage == last else Cell(stage + 1, index, True)
                delay = 0.0 if stage == last else send_seconds[stage % pipeline]
                takes = backward_seconds[stage]
            else:
                needs = Cell(stage - 1, index, False) if stage else None
                delay = send_seconds[(stage - 1) % pipeline]
                takes = forward_seconds[stage]
            if needs is not None:
                end = ends.get(needs)
                if end is None:
                    waiting[needs] = rank
                    break
                if pipeline > 1:
                    end += delay
                now = max(now, end)
            starts[cell] = now
            now += takes
            ends[cell] = now
            at += 1
            if cell in waiting:
                other = waiting.pop(cell)
                if other != rank:
                    ready.append(other)
        clock[rank] = now
        done[rank] = at
    assert all(at == len(order) for at, order in zip(done, orders, strict=True)), "a schedule that deadlocks"
    return Played(starts=starts, finish=tuple(clock))


def closed_form(
    schedule: str,
    pipeline: int,
    micro_batches: int,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    send_seconds: Sequence[float],
) -> tuple[float, ...]:
    """When each pipeline rank is done, without playing the schedule: the slowest stage sets the pace.

    The first micro-batch passes through everything, the other m - 1 follow at the pace of the slowest stage: for equal
    stages the textbook bubble of (p - 1)/m, or (p - 1)/(v m) interleaved (Narayanan et al., SC 2021, section 2.2).
    """
    m, p = micro_batches, pipeline
    forward, backward = forward_seconds, backward_seconds
    sends = sum(send_seconds[: p - 1])
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    if schedule == "interleaved":
        ranks = [sum(both[rank::p]) for rank in range(p)]
        # A micro-batch crosses p - 1 chunks before the last rank can begin, and p - 1 after it ended.
        seconds = m * max(ranks) + (p - 1) * max(both) + 2 * sends
    elif schedule == "gpipe":
        seconds = sum(both) + (m - 1) * (max(forward) + max(backward)) + 2 * sends
    else:
        seconds = sum(both) + (m - 1) * max(both) + 2 * sends
    finish = [seconds]
    for rank in range(p - 1):
        finish.append(finish[-1] - backward[rank] - send_seconds[rank])
    return tuple(finish)
