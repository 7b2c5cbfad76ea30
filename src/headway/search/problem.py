"""Where to cut a model into stages, and what runs each: the problem that all methods of search solve, as tables.

A `StageProblem` is what remains of a workload and a cluster once the micro-batch is chosen: what each run of layers
costs on each option (a sub-mesh with its degrees, ZeRO stage and recomputation). `dynamic` solves it exactly, `mcmc`
and `gradient` approximately, and all are judged by the same `evaluate`. Alpa's inter-operator problem (Zheng et al.,
OSDI 2022, section 5), with memory, several kinds of device, and the cost of what happens once in a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Assignment", "Option", "Solution", "StageProblem", "brute_force"]


class Option(NamedTuple):
    """What may run a stage: `devices` devices of pool `pool`, used with these degrees.

    `recompute`: share of the stage's layers that are recomputed (1: all); `label` is for people.
    """

    pool: int
    devices: int
    data: int = 1
    tensor: int = 1
    zero_stage: int = 0
    recompute: float = 0.0
    label: str = ""


class Assignment(NamedTuple):
    """One stage of a solution: layers `start` to `stop` (exclusive) on option `option`."""

    start: int
    stop: int
    option: int


class Solution(NamedTuple):
    """What a method of search found: `stages` in order, `seconds` of a step; infinity and none: nothing is allowed.

    `evaluated` counts what the method tries (tables of the dynamic programme, solutions of the others). No solution
    takes less than `bound_seconds`, as far as the method knows; `proven`: none is faster than this one by more than
    the tolerance that was asked for.
    """

    seconds: float
    stages: tuple[Assignment, ...]
    evaluated: int = 0
    seconds_spent: float = 0.0
    proven: bool = False
    bound_seconds: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class StageProblem:
    """Tables of shape (options, layers + 1, layers + 1), entry [o, j, i] for layers j to i (exclusive) on option o.

    - `seconds`: one micro-batch, forward and backward, communication inside the stage included, and what the stage does
      once in a step (gradients, update) divided by `micro_batches`; infinity: impossible, or j >= i.
    - `fixed_bytes`: parameters, gradients, optimizer states, workspace on the fullest device; `kept_bytes`: activations
      of one micro-batch in flight. A stage with k stages behind it keeps min(k + 1, micro_batches) of them (1F1B).
    - `capacity_bytes` of a device of each option, shape (options,).
    - `send_seconds[i]`: handing one micro-batch's activation on, and its gradient back, at the cut before layer i.
    - `pools`: devices there are of each kind; a solution uses all of them (`exactly`), or at most so many.

    A step takes sum of stages + sends + (micro_batches - 1) x the slowest stage.
    """

    layers: int
    options: tuple[Option, ...]
    pools: tuple[int, ...]
    micro_batches: int
    seconds: np.ndarray
    fixed_bytes: np.ndarray
    kept_bytes: np.ndarray
    capacity_bytes: np.ndarray
    send_seconds: np.ndarray
    exactly: bool = True
    most_stages: int = 0  # 0: as many as there are layers

    def __repr__(self) -> str:
        pools = " + ".join(map(str, self.pools))
        return f"StageProblem({self.layers} layers, {len(self.options)} options, {pools} devices)"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What notebooks, and hypothesis, print: not the tables."""
        printer.text(repr(self))

    def stage_fits(self, assignment: Assignment, stages_behind: int) -> bool:
        """Whether a stage has room for what it keeps with so many stages behind it."""
        start, stop, option = assignment
        flights = min(stages_behind + 1, self.micro_batches)
        needs = self.fixed_bytes[option, start, stop] + flights * self.kept_bytes[option, start, stop]
        return bool(needs <= self.capacity_bytes[option])

    def evaluate(self, solution: Sequence[Assignment]) -> float:
        """Seconds of a step, or infinity for what is no solution: gaps, too many devices, too little memory."""
        position = 0
        used = [0] * len(self.pools)
        total = slowest = 0.0
        if not solution or (self.most_stages and len(solution) > self.most_stages):
            return math.inf
        for at, stage in enumerate(solution):
            if stage.start != position or stage.stop <= stage.start:
                return math.inf
            option = self.options[stage.option]
            used[option.pool] += option.devices
            seconds = float(self.seconds[stage.option, stage.start, stage.stop])
            if not math.isfinite(seconds) or not self.stage_fits(stage, len(solution) - at - 1):
                return math.inf
            total += seconds + (float(self.send_seconds[stage.start]) if at else 0.0)
            slowest = max(slowest, seconds)
            position = stage.stop
        complete = position == self.layers
        counts = zip(used, self.pools, strict=True)
        allowed = all(mine == there if self.exactly else mine <= there for mine, there in counts)
        return total + (self.micro_batches - 1) * slowest if complete and allowed else math.inf


def brute_force(problem: StageProblem) -> Solution:
    """The best solution, by trying every cut with every choice of options: the oracle for small problems."""
    began = time.perf_counter()
    options = range(len(problem.options))
    most = min(problem.layers, problem.most_stages or problem.layers)
    best, chosen, evaluated = math.inf, (), 0
    for count in range(1, most + 1):
        for inner in combinations(range(1, problem.layers), count - 1):
            spans = tuple(pairwise((0, *inner, problem.layers)))
            for picks in product(options, repeat=count):
                stages = tuple(Assignment(*span, option) for span, option in zip(spans, picks, strict=True))
                seconds = problem.evaluate(stages)
                evaluated += 1
                if seconds < best:
                    best, chosen = seconds, stages
    return Solution(best, chosen, evaluated, time.perf_counter() - began, proven=True, bound_seconds=best)
