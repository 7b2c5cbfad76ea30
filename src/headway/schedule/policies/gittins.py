"""The Gittins index of a distribution of service, tabulated from history.

For a job that has attained `a`, out of jobs that need S in all, the index is the best rate of finishing per service
that some quantum D offers: sup over D of P(S - a <= D | S > a) / E[min(S - a, D) | S > a]  (Aalto, Ayesta and Righter,
Queueing Systems 2009, section 2). Tiresias (Gu et al., NSDI 2019, section 3.2.2) takes D fixed, as the quantum up to
the next threshold.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from headway.errors import FileError, InputError
from headway.value import read_text

__all__ = ["GittinsIndex", "read_history"]


class GittinsIndex:
    """Of the services of past jobs, each as likely as it is frequent.

    The best quantum ends at a service of the history. With T(k) = E[min(S, s_k)] and F(k) = P(S <= s_k), the index at
    `a` is the steepest slope from (E[min(S, a)], P(S <= a)) to a point (T(k), F(k)) beyond it: a tangent to the upper
    hull of those points. The hulls of all suffixes share one forest, `_onward`, made in one pass from the right; a
    query walks along one branch of it.

    `services` in device-seconds, above 0; `weights` for those that are not equally likely. Raises InputError.
    """

    def __init__(self, services: Sequence[float], weights: Sequence[float] | None = None) -> None:
        given = list(weights) if weights is not None else [1.0] * len(services)
        if not services:
            raise InputError("a history of no jobs", place="Gittins index", remedy="give the services of past jobs")
        if len(given) != len(services) or min(given) < 0 or not sum(given) > 0:
            raise InputError("the weights do not fit", place="Gittins index", remedy="one for each service, 0 or more")
        if not all(0 < service < math.inf for service in services):
            raise InputError("a service is not above 0", place="Gittins index", remedy="device-seconds, above 0")
        merged: dict[float, float] = {}
        for service, weight in zip(services, given, strict=True):
            merged[service] = merged.get(service, 0.0) + weight
        total = sum(merged.values())
        self.services = sorted(merged)
        masses = [merged[service] / total for service in self.services]
        # Sums from below: mass and mass x service of the first k services; the last is all.
        self._mass = [0.0, *accumulate(masses)]
        self._moment = [0.0, *accumulate(mass * service for mass, service in zip(masses, self.services, strict=True))]
        count = len(self.services)
        self._onward = [count] * count
        for place in range(count - 2, -1, -1):
            self._onward[place] = self._steepest(self.services[place], place + 1)

    def index(self, attained: float, quantum: float | None = None) -> float:
        """The index at `attained`, in 1 / device-second. `quantum`: Tiresias's fixed D; None: the best one.

        0 where no job of the history needed more: nothing is known there, and such a job goes last.
        """
        first = bisect_right(self.services, attained)
        if first == len(self.services):
            return 0.0
        if quantum is not None and quantum < math.inf:
            return self._ratio(attained, first, bisect_right(self.services, attained + quantum), quantum)
        best = self._steepest(attained, first)
        return self._ratio(attained, first, best + 1, self.services[best] - attained)

    def _steepest(self, attained: float, first: int) -> int:
        """Which service the best quantum at `attained` ends at, `first` being the place of the next one."""
        best = first
        slope = self._ratio(attained, first, best + 1, self.services[best] - attained)
        while (onward := self._onward[best]) < len(self.services):
            steeper = self._ratio(attained, first, onward + 1, self.services[onward] - attained)
            if steeper < slope:
                break
            best, slope = onward, steeper
        return best

    def _ratio(self, attained: float, first: int, last: int, quantum: float) -> float:
        """Of finishing: those with services `first` to `last` (exclusive). Both sides times P(S > attained)."""
        finishing = self._mass[last] - self._mass[first]
        moment = self._moment[last] - self._moment[first]
        expected = moment - finishing * attained + (self._mass[-1] - self._mass[last]) * quantum
        return finishing / expected if finishing > 0 else 0.0

    def table(self, points: Sequence[float], quantum: float | None = None) -> list[float]:
        """The index at each of the points."""
        return [self.index(point, quantum) for point in points]

    @property
    def mean(self) -> float:
        """Of the services."""
        return self._moment[-1] / self._mass[-1]


def read_history(path: str | Path) -> list[float]:
    """The services in a file like Tiresias's `yarn-gput1000.csv`: a line `duration`, then device-seconds, one a line.

    Raises FileError naming all lines that are not numbers above 0.
    """
    lines = read_text(path).splitlines()
    if not lines or lines[0].strip() != "duration":
        raise FileError("is no history", place=f"{path}:1", remedy="the first line is: duration")
    services, wrong = [], []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            service = float(line)
        except ValueError:
            service = math.nan
        if 0 < service < math.inf:
            services.append(service)
        else:
            wrong.append(number)
    if wrong:
        listed = ", ".join(map(str, wrong))
        raise FileError(f"not a number above 0 in line {listed}", place=str(path), remedy="device-seconds, one a line")
    if not services:
        raise FileError("has no jobs", place=str(path), remedy="device-seconds of past jobs, one a line")
    return services
