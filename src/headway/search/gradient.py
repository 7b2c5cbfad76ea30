"""Differentiable search over stages: gradient descent on a smooth model of the step, then rounding.

pipeDejavu's idea on a `StageProblem`: where layers belong is a matrix A (layers x stages) with row-wise softmax, what
runs a stage is a softmax over options, and a smooth model of step time is descended while both are cooled towards one
choice. What differs here: the rows of A are monotone by construction, the model is exact at every whole solution, and
memory and devices are held by multipliers and by an exact repair, where a soft knapsack would overshoot.

Shapes: B candidates, S stages, L layers, O options, P pools.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headway.errors import FieldError
from headway.search.mcmc import Progress, Record, Result, check_budget, finish
from headway.search.problem import Assignment, StageProblem
from headway.search.proposals import Walk, ordered_cuts
from headway.search.supply import Tables

__all__ = ["SmoothModel", "gradient"]

# Softmax temperatures at the first and last iteration of a round; A's is in layers.
_HOT, _COLD = 1.0, 0.1
_RATE = 0.1  # of Adam, for logits
_MULTIPLIERS_EVERY = 5
_PENALTY = 2.0  # quadratic, of the augmented Lagrangian
# How far apart two runs of layers may begin, where the seconds of one layer are taken from their difference.
_DISTANCES = (1, 2, 3, 5, 8, 13)
# An option that lacks more than this share of its memory is no worse than one that lacks so much.
_MOST_LACKING = 3.0
# (candidates x stages x options) of one round: more takes too long for each iteration.
_LARGEST_ROUND = 1 << 20


class _Costs(NamedTuple):
    """What stages cost on every option, (B, S, O)."""

    seconds: Tensor
    lacking: Tensor  # the share of the capacity by which memory is exceeded
    impossible: Tensor


class SmoothModel:
    """The step time of soft solutions: layers shared out by A, options mixed by P, both differentiable.

    The seconds of a stage are the sum over layers of A times what each layer adds, plus what the table of the nearest
    whole stage has besides (a constant for the gradient). So at whole solutions the model equals the tables.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        possible = np.isfinite(tables.seconds)
        known = np.where(possible, tables.seconds, np.nan)
        self.scale = float(np.nanmean(known[np.arange(len(known) - 1), np.arange(1, len(known))])) or 1.0
        capacity = np.maximum(tables.capacity, 1.0)
        stacked = np.stack(
            [
                known / self.scale,
                np.where(possible, tables.fixed, np.nan) / capacity,
                np.where(possible, tables.kept, np.nan) / capacity,
            ],
            axis=2,
        )  # (L + 1, L + 1, 3, O)
        self.table = torch.from_numpy(np.nan_to_num(stacked, nan=0.0).astype(np.float32))
        self.possible = torch.from_numpy(possible)
        self.added = torch.from_numpy(_added(stacked).astype(np.float32))  # (L, 3, O): what each layer adds
        self.before = torch.cat([torch.zeros_like(self.added[:1]), self.added.cumsum(0)])  # (L + 1, 3, O)
        self.send = torch.from_numpy((tables.send / self.scale).astype(np.float32))
        pools = np.maximum(tables.pools, 1)
        share = np.zeros((len(tables.group), len(tables.pools)), np.float32)
        pool = tables.group_pool[tables.group]
        share[np.arange(len(pool)), pool] = tables.group_devices[tables.group] / pools[pool]
        self.devices = torch.from_numpy(share)  # (O, P): the share of its pool that an option takes

    def assignment(self, cuts: Tensor, exists: Tensor, temperature: float) -> Tensor:
        """A (B, L, S) for real cuts (B, S), the position before which each stage begins; rows sum to one.

        The logit of stage s for layer l is the sum over cuts t <= s of (l + 1/2 - cut t) / temperature: it is largest
        for the stage between whose cuts the layer lies, and falls off to both sides.
        """
        layers = len(self.added)
        middle = torch.arange(layers) + 0.5
        logits = ((middle[None, :, None] - cuts[:, None, :]) / temperature).cumsum(2)
        return logits.masked_fill(~exists[:, None, :], -torch.inf).softmax(2)

    def costs(self, assignment: Tensor, starts: Tensor, stops: Tensor, flights: Tensor) -> _Costs:
        """What the stages cost, and whether they can be; `starts`, `stops`: the nearest whole stages (B, S)."""
        soft = torch.einsum("bls,lko->bsko", assignment, self.added)
        exact = self.table[starts, stops] - (self.before[stops] - self.before[starts])
        costs = soft + exact.detach()
        needs = costs[:, :, 1] + flights[:, :, None] * costs[:, :, 2]
        return _Costs(
            costs[:, :, 0].clamp(min=1e-9),
            (needs - 1).clamp(0.0, _MOST_LACKING),
            ~self.possible[starts, stops],
        )


def _added(stacked: np.ndarray) -> np.ndarray:
    """What each layer adds to a stage, (L, 3, O): the mean difference of runs with and without it."""
    layers = len(stacked) - 1
    total = np.zeros((layers, *stacked.shape[2:]))
    count = np.zeros_like(total)

    def add(at: np.ndarray, difference: np.ndarray) -> None:
        known = np.isfinite(difference)
        total[at] += np.where(known, difference, 0.0)
        count[at] += known

    for distance in _DISTANCES:
        at = np.arange(distance, layers)
        add(at, stacked[at - distance, at + 1] - stacked[at - distance, at])
        at = np.arange(layers - distance)
        add(at, stacked[at, at + 1 + distance] - stacked[at + 1, at + 1 + distance])
    alone = np.nan_to_num(stacked[np.arange(layers), np.arange(1, layers + 1)], nan=0.0)
    return np.where(count > 0, total / np.maximum(count, 1), alone)


class _Round:
    """One batch of candidates, from drawn beginnings to the coldest temperature."""

    def __init__(self, problem: StageProblem, model: SmoothModel, begun: list[tuple[Assignment, ...]], walk: Walk):
        self.problem, self.model, self.walk = problem, model, walk
        tables = model.tables
        layers, count = problem.layers, max(map(len, begun))
        back = np.zeros(len(problem.options), np.int64)
        back[walk.order] = np.arange(len(walk.order))
        self.counts = torch.tensor([len(stages) for stages in begun])
        self.exists = torch.arange(count)[None, :] < self.counts[:, None]
        behind = (self.counts[:, None] - torch.arange(count)[None, :]).clamp(1, tables.micro_batches)
        self.flights = behind.float()
        widths = np.ones((len(begun), count))
        logits = np.zeros((len(begun), count, len(walk.order)), np.float32)
        for candidate, stages in enumerate(begun):
            for at, stage in enumerate(stages):
                widths[candidate, at] = stage.stop - stage.start
                option = back[stage.option]
                logits[candidate, at, tables.group == tables.group[option]] += 0.5
                logits[candidate, at, option] += 0.5
        logits += 0.1 * walk.rng.standard_normal(logits.shape, dtype=np.float32)
        self.widths = torch.tensor(np.log(widths), dtype=torch.float32, requires_grad=True)
        self.logits = torch.tensor(logits, requires_grad=True)
        self.layers = layers
        self.optimizer = torch.optim.Adam([self.widths, self.logits], lr=_RATE)
        self.device_multipliers = torch.zeros(len(begun), len(problem.pools))
        self.memory_multipliers = torch.ones(len(begun), count)

    def cuts(self) -> Tensor:
        """Where each stage begins (B, S), real numbers; the order is kept, since widths are positive."""
        shares = self.widths.masked_fill(~self.exists, -torch.inf).softmax(1) * self.layers
        return shares.cumsum(1) - shares

    def nearest(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest whole stages: starts and stops (B, S); where there is no stage, the last one's."""
        count = cuts.shape[1]
        steps = torch.arange(count)
        starts = cuts.detach().round().long()
        starts = (starts - steps).clamp(min=0).cummax(1).values + steps
        latest = self.layers - self.counts[:, None] + steps
        starts = torch.minimum(starts, latest)
        starts = torch.where(self.exists, starts, torch.full_like(starts, self.layers))
        stops = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], self.layers)], 1)
        last = (self.counts - 1)[:, None]
        absent = ~self.exists
        return (
            torch.where(absent, starts.gather(1, last), starts),
            torch.where(absent, torch.full_like(stops, self.layers), stops),
        )

    def step(self, temperature: float, iteration: int) -> Tensor:
        """One step of Adam; returns the logarithm of each candidate's smooth step time, with penalties."""
        model, tables = self.model, self.model.tables
        cuts = self.cuts()
        starts, stops = self.nearest(cuts)
        assignment = model.assignment(cuts, self.exists, temperature)
        costs = model.costs(assignment, starts, stops, self.flights)
        mixture = (self.logits / temperature).masked_fill(costs.impossible, -30.0).softmax(2)
        seconds = (mixture * costs.seconds).sum(2) * self.exists
        # Whether layer l lies behind cut s; its increments say where the cut is.
        behind = assignment.flip(2).cumsum(2).flip(2)
        sends = ((behind - torch.nn.functional.pad(behind, (0, 0, 1, 0))[:, :-1]) * model.send[None, :, None]).sum(1)
        total = seconds.sum(1) + (sends[:, 1:] * self.exists[:, 1:]).sum(1)
        sharpness = 0.2 * temperature * seconds.detach().amax(1, keepdim=True)
        slowest = (torch.logsumexp((seconds / sharpness).masked_fill(~self.exists, -torch.inf), 1)) * sharpness[:, 0]
        loss = torch.log(total + (tables.micro_batches - 1) * slowest)
        used = torch.einsum("bso,op,bs->bp", mixture, model.devices, self.exists.float()) - 1
        if not tables.exactly:
            used = used.clamp(min=0)
        lacking = (mixture * costs.lacking).sum(2) * self.exists
        priced = (
            loss
            + (self.device_multipliers * used + _PENALTY * used**2).sum(1)
            + (self.memory_multipliers * lacking + _PENALTY * lacking**2).sum(1)
        )
        self.optimizer.zero_grad()
        priced.sum().backward()
        self.optimizer.step()
        if iteration % _MULTIPLIERS_EVERY == 0:
            self.device_multipliers += 2 * _PENALTY * used.detach()
            self.memory_multipliers += 2 * _PENALTY * lacking.detach()
        return priced.detach()

    def rounded(self, candidate: int, temperature: float) -> list[Assignment]:
        """The whole solution nearest to a candidate: its devices are right, its memory as far as options allow.

        Groups of options by their share of the mixture, those first that can hold the stage; in a group the fastest
        option that has room.
        """
        tables, model = self.model.tables, self.model
        count = int(self.counts[candidate])
        cuts = self.cuts()[candidate, :count].detach().numpy()
        inner = ordered_cuts(np.rint(cuts[1:]).astype(int), self.layers)
        starts, stops = np.r_[0, inner], np.r_[inner, self.layers]
        mixture = (self.logits[candidate, :count] / temperature).log_softmax(1).detach().numpy()
        flights = self.flights[candidate, :count].numpy()
        table = model.table[starts, stops].numpy()
        needs = tables.fixed[starts, stops] + flights[:, None] * tables.kept[starts, stops]
        fits = model.possible[starts, stops].numpy() & (needs <= tables.capacity)
        # Mass alone decides between groups in which something fits, and between the others.
        scores = np.logaddexp.reduceat(np.where(fits, mixture, mixture - 50.0), tables.first[:-1], axis=1)
        groups = self.walk.supply.choose(scores)
        found = []
        for stage in range(count):
            members = slice(int(tables.first[groups[stage]]), int(tables.first[groups[stage] + 1]))
            cost = np.where(fits[stage, members], table[stage, 0, members], 1e9 + needs[stage, members])
            option = members.start + int(np.argmin(cost))
            found.append(Assignment(int(starts[stage]), int(stops[stage]), int(self.walk.order[option])))
        return found


def gradient(
    problem: StageProblem,
    *,
    seed: int = 0,
    iterations: int | None = None,
    evaluations: int | None = None,
    budget_seconds: float | None = None,
    candidates: int = 16,
    round_iterations: int = 60,
    polish: int = 200,
    progress: Callable[[Progress], Any] | None = None,
) -> Result:
    """Search for the fastest step by gradient descent from drawn beginnings, `candidates` at once.

    Each round descends for `round_iterations` while it cools, rounds every candidate, and tries `polish` proposals on
    each that are taken only if no worse (0: none). Rounds follow each other until `iterations` (in all), `evaluations`
    or the seconds are used up; the later ones draw half of their candidates with as many stages as the best has. An
    iteration counts as one evaluation of each candidate, although it looks at every option. The same seed and budget
    give the same answer, unless it is one of seconds. Raises PlanError if no options make up the devices.
    """
    if iterations is None:
        check_budget(evaluations, budget_seconds)
    else:
        check_budget(iterations, budget_seconds if evaluations is None else evaluations, name="iterations")
    for name, value, least in (
        ("candidates", candidates, 1),
        ("round_iterations", round_iterations, 1),
        ("polish", polish, 0),
    ):
        if value < least:
            raise FieldError(f"must be at least {least}, not {value}", place=name)
    began = time.perf_counter()
    record = Record(began, progress)
    walk = Walk(problem, seed=seed, rows=1)
    model = SmoothModel(walk.tables)
    done = 0

    def out() -> bool:
        if iterations is not None:
            return done >= iterations
        if evaluations is not None:
            return walk.evaluated >= evaluations
        return budget_seconds is not None and time.perf_counter() - began >= budget_seconds

    with _one_thread():
        while not out():
            length, most, tries = round_iterations, candidates, polish
            if iterations is not None:
                length = min(length, iterations - done)
            if evaluations is not None:
                # A round as it should be, with fewer candidates; or a short one of a single candidate.
                left = evaluations - walk.evaluated
                most = max(1, min(candidates, left // (length + polish + 2)))
                length = max(0, min(length, left - polish - 2))
            begun = _drawn(walk, most)
            record.note(walk.evaluated, walk.seconds)
            batch = _Round(problem, model, begun, walk)
            temperature, figures = _HOT, torch.zeros(len(begun))
            for iteration in range(length):
                temperature = _HOT * (_COLD / _HOT) ** (iteration / max(1, length - 1))
                figures = batch.step(temperature, iteration)
                done += 1
                walk.evaluated += len(begun)
                if budget_seconds is not None and out():
                    break
            # The most promising are rounded first: time may be short.
            for candidate in torch.argsort(figures, stable=True).tolist():
                if iterations is None and out():
                    break
                walk.begin(0, batch.rounded(candidate, temperature))
                if evaluations is not None:
                    tries = min(polish, evaluations - walk.evaluated)
                if tries > 0:
                    walk.run(tries, 0.0)
                record.note(walk.evaluated, walk.seconds)
    return finish(problem, walk, record)


def _drawn(walk: Walk, most: int) -> list[tuple[Assignment, ...]]:
    """Up to `most` drawn solutions, fewer if they are large; every second one with as many stages as the best."""
    found: list[tuple[Assignment, ...]] = []
    for candidate in range(most):
        walk.begin(0, count=len(walk.stages) if candidate % 2 else 0)
        stages = walk.current(0)[0]
        if found and max(len(stages), *map(len, found)) * (len(found) + 1) * len(walk.order) > _LARGEST_ROUND:
            break
        found.append(stages)
    return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """These tensors are small: a second thread costs more than it brings, ten times as much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
