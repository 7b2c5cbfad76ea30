"""Ranks that are alike: found once, so that a simulation plays one of each kind.

Ranks that wait for each other inside every layer (a tensor, context or expert group) are one `Team`. Teams are alike if
they hold the same stages, have the same properties of their own, and the teams that they exchange activations with are
alike in turn: the coarsest equitable partition, found by colour refinement (Paige and Tarjan, SIAM J. Comput. 1987).
All members of a kind then do the same at the same time, and one stands for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from headway.plan.plan import Plan

__all__ = ["Kind", "Team", "kinds_of", "teams_of"]


class Team(NamedTuple):
    """Ranks of pipeline rank `pipeline` that work in lockstep, on replicas `first` to `stop` (exclusive)."""

    pipeline: int
    first: int
    stop: int
    ranks: tuple[int, ...]


class Kind(NamedTuple):
    """Teams that are alike. `before` and `after`: positions of the kinds that hold the neighbouring stages."""

    teams: tuple[Team, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def one(self) -> Team:
        """The team that stands for all."""
        return self.teams[0]


def teams_of(plan: Plan) -> list[Team]:
    """All teams of a plan, pipeline rank by pipeline rank."""
    found: list[Team] = []
    for pipeline in range(plan.pipeline):
        data, tensor = plan.degrees(pipeline)
        first_rank, width = plan.first_rank(pipeline), tensor * plan.context
        # Experts are divided over neighbours of the data and context axes, which then wait for each other too.
        replicas = max(1, min(data, -(-plan.expert // plan.context)))
        for first in range(0, data, replicas):
            stop = min(data, first + replicas)
            ranks = range(first_rank + first * width, first_rank + stop * width)
            found.append(Team(pipeline, first, stop, tuple(ranks)))
    return found


def kinds_of(plan: Plan, own: Callable[[Team], Hashable]) -> list[Kind]:
    """The kinds of teams of `plan`, where `own(team)` says what sets a team apart by itself."""
    teams = teams_of(plan)
    by_stage: list[list[int]] = [[] for _ in range(plan.pipeline)]
    for at, team in enumerate(teams):
        by_stage[team.pipeline].append(at)
    links = [
        (_facing(teams, by_stage, plan, at, -1), _facing(teams, by_stage, plan, at, 1)) for at in range(len(teams))
    ]
    colours = _numbered([(team.pipeline, own(team)) for team in teams])
    while True:
        seen = [
            (colours[at], frozenset(colours[to] for to in before), frozenset(colours[to] for to in after))
            for at, (before, after) in enumerate(links)
        ]
        finer = _numbered(seen)
        if max(finer) == max(colours):
            break
        colours = finer
    members: list[list[int]] = [[] for _ in range(max(colours) + 1)]
    for at, colour in enumerate(colours):
        members[colour].append(at)
    return [
        Kind(
            tuple(teams[at] for at in group),
            tuple(sorted({colours[to] for to in links[group[0]][0]})),
            tuple(sorted({colours[to] for to in links[group[0]][1]})),
        )
        for group in members
    ]


def _facing(teams: list[Team], by_stage: list[list[int]], plan: Plan, at: int, step: int) -> list[int]:
    """The teams one pipeline rank on (round the end: virtual stages) that hold some of the same samples."""
    if plan.pipeline == 1:
        return []
    team = teams[at]
    other = (team.pipeline + step) % plan.pipeline
    mine, theirs = plan.degrees(team.pipeline)[0], plan.degrees(other)[0]
    # Positions count in units of 1/(mine x theirs) of the micro-batch.
    first, stop = team.first * theirs, team.stop * theirs
    found = by_stage[other]
    size = len(found)
    low, high = first * size // (mine * theirs), -(-stop * size // (mine * theirs))
    return [
        to
        for to in found[max(0, low - 1) : high + 1]
        if teams[to].first * mine < stop and teams[to].stop * mine > first
    ]


def _numbered(values: list) -> list[int]:
    """Equal values get equal numbers, in the order of their first appearance."""
    numbers: dict = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]
