"""A search over what happens to each tensor (`modes`), by simulated annealing from several beginnings.

The beginnings: everything kept; what is cheap made again (all but convolutions, products and attention: about what
SuperNeurons and torch's partitioner do), once or for each use; what is dear moved away; and what schedules of other
policies do. A move changes one tensor, two that an operation connects, a run of tensors of one kind (models repeat
themselves), or exchanges the modes of two of a kind. A schedule over the budget pays for what it is over, more while
most are and less while none is, so that the search goes along the border of what fits; the best that fits is kept
(Kirkpatrick, Gelatt and Vecchi, Science 220, 1983).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

import numpy as np

from headway.compiled import compiled
from headway.memory.swapping.policies.modes import AGAIN, AWAY, EACH, KEEP, Net, cost_of, modes_of, net_of, schedule_of
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import EXPENSIVE_KINDS, Problem, Schedule

__all__ = ["annealed"]

_SMALLEST = 1e-5  # of the budget: what is smaller stays
_CHUNK = 50  # schedules between two looks at the clock
_HOT, _COLD = 1e-3, 5e-6  # of the step's seconds
# Round after round the best of the walks go on: how many, for what share of the seconds together, and from how hot.
_ROUNDS = ((1000, 0.25, 0.3 * _HOT), (3, 0.25, _HOT), (1, 0.5, _HOT))
_LEAST_PRICE, _MOST_PRICE = 0.02, 100.0  # of the budget's worth of bytes too many, in seconds of the step


def annealed(
    problem: Problem, budget_bytes: float, known: Iterable[Schedule] = (), *, seconds: float = 5.0, seed: int = 0
) -> Schedule | None:
    """The fastest schedule found in `seconds` that fits, or None. `known`: schedules to begin from as well.

    The same `seed` gives the same answer only as far as the clock allows as many steps.
    """
    search = _Search(problem, budget_bytes, seed)
    if not len(search.movable):
        return None
    search.go(search.begin(np.zeros(len(problem.tensors), np.int8)), 0.0, _HOT)  # compiled before the clock starts
    walks = [search.begin(modes) for modes in _beginnings(problem, search.movable, known)]
    for most, share, hot in _ROUNDS:
        walks = sorted(walks, key=lambda walk: walk.rank)[:most]
        for walk in walks:
            search.go(walk, share * seconds / len(walks), hot)
    best = min(walks, key=lambda walk: walk.rank)
    schedule = schedule_of(problem, search.net, best.best, budget_bytes)
    return schedule if price(problem, schedule).peak_bytes <= budget_bytes * (1 + 1e-9) else None


def _beginnings(problem: Problem, movable: np.ndarray, known: Iterable[Schedule]) -> list[np.ndarray]:
    saved = set(problem.saved)
    plain = np.zeros(len(problem.tensors), np.int8)
    for at in movable:
        plain[at] = KEEP if at in saved else AGAIN
    found = [plain]
    ways = [(AGAIN, KEEP), (EACH, KEEP), (AGAIN, AWAY), (KEEP, AWAY)]
    for cheap, dear in ways if problem.paths else ways[:2]:
        modes = plain.copy()
        for at in movable:
            maker = problem.operations[problem.tensors[at].maker]
            if maker.kind in EXPENSIVE_KINDS or not maker.repeatable:
                modes[at] = dear
            elif at in saved or cheap != KEEP:
                modes[at] = cheap
        found.append(modes)
    for schedule in known:
        modes = plain.copy()
        modes[movable] = modes_of(problem, schedule)[movable]
        found.append(modes)
    for modes in found:  # what may not be made again stays or goes
        for at in movable:
            if modes[at] in (AGAIN, EACH) and not problem.operations[problem.tensors[at].maker].repeatable:
                modes[at] = KEEP
    different: dict[bytes, np.ndarray] = {modes.tobytes(): modes for modes in found}
    return list(different.values())


class _Walk:
    """One walk: where it is, what is the best that it found, and what bytes over the budget cost it.

    `numbers`: seconds and excess of where it is, seconds of the best (infinite: none fits yet) and its excess, price of
    the excess.
    """

    def __init__(self, modes: np.ndarray, cost: tuple[float, float, float], budget_bytes: float) -> None:
        self.modes = modes.copy()
        self.best = modes.copy()
        excess = _excess(cost[1], cost[2], budget_bytes)
        self.numbers = np.array([cost[0], excess, cost[0] if excess <= 0 else np.inf, excess, 1.0])

    @property
    def rank(self) -> tuple[float, float]:
        """Of the best: what fits comes first."""
        return float(self.numbers[2]), float(self.numbers[3])


class _Search:
    def __init__(self, problem: Problem, budget_bytes: float, seed: int) -> None:
        self.net = net_of(problem)
        self.budget = budget_bytes
        operations, tensors = problem.operations, problem.tensors
        kinds: dict[tuple[str, int], int] = {}
        kind_of: dict[int, int] = {}
        for at, tensor in enumerate(tensors):
            if 0 <= tensor.maker < problem.forward_stop and tensor.bytes > _SMALLEST * budget_bytes:
                maker = operations[tensor.maker]
                name = re.sub(r"_\d+$", "", maker.name.rpartition(":")[2])
                kind_of[at] = kinds.setdefault((name, maker.outputs.index(at)), len(kinds))
        # One kind after the other, each in the order of the step.
        order = sorted(kind_of, key=lambda at: (kind_of[at], tensors[at].maker))
        self.movable = np.array(order, np.int64)
        self.kinds = np.array([kind_of[at] for at in order], np.int64)
        self.repeatable = np.array([operations[tensors[at].maker].repeatable for at in order], np.bool_)
        near = [_near(problem, at, kind_of) for at in order]
        self.near_starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum([len(each) for each in near], out=self.near_starts[1:])
        place = {at: slot for slot, at in enumerate(order)}
        self.near = np.array([place[at] for each in near for at in each], np.int64)
        self.has_way = bool(problem.paths)
        self.scale = problem.compute_seconds or 1.0
        self.random = np.array([2 * seed + 0x9E3779B97F4A7C15], np.uint64)

    def begin(self, modes: np.ndarray) -> _Walk:
        return _Walk(modes, cost_of(self.net, modes, self.budget), self.budget)

    def go(self, walk: _Walk, seconds: float, hot: float) -> None:
        """Go on from the walk's best for so many seconds, from `hot` down to where only better steps are taken."""
        walk.modes[:] = walk.best
        if walk.numbers[2] < np.inf:
            walk.numbers[0], walk.numbers[1] = walk.numbers[2], 0.0
        begin = time.perf_counter()
        passed, steps = 0.0, _CHUNK if seconds > 0 else 0
        while passed <= seconds:
            temperature = hot * (_COLD / hot) ** (passed / max(seconds, 1e-9))
            _steps(
                self.net, walk.modes, walk.best, walk.numbers, self.movable, self.kinds, self.repeatable,
                self.near_starts, self.near, self.has_way, self.budget, self.scale, temperature, steps, self.random,
            )  # fmt: skip
            passed = time.perf_counter() - begin


def _near(problem: Problem, tensor: int, among: dict[int, int]) -> list[int]:
    """The tensors that an operation connects with one: what its maker reads, and what its readers in forward make."""
    found = list(problem.operations[problem.tensors[tensor].maker].inputs)
    for reader in problem.readers[tensor]:
        if reader < problem.forward_stop:
            found += problem.operations[reader].outputs
    return [at for at in dict.fromkeys(found) if at in among and at != tensor]


@compiled(nogil=True)
def _excess(peak: float, over: float, budget: float) -> float:
    """How far over the budget, as shares of it: at the peak, and on average over time (which shows the way down)."""
    return max(0.0, peak / budget - 1.0 - 1e-12) + (4.0 * over / budget if peak > budget else 0.0)


@compiled(nogil=True)
def _drawn(random: np.ndarray, below: int) -> int:
    """A number from 0 to `below` - 1 (xorshift64*, Vigna 2016)."""
    state = random[0]
    state ^= state >> np.uint64(12)
    state ^= state << np.uint64(25)
    state ^= state >> np.uint64(27)
    random[0] = state
    return int((state * np.uint64(2685821657736338717)) >> np.uint64(33)) % below


@compiled(nogil=True)
def _another(random: np.ndarray, mode: int, repeatable: bool, has_way: bool) -> int:
    """A mode other than `mode` that is allowed (or the same, where there is no other)."""
    for _ in range(8):
        found = _drawn(random, 4 if has_way else 3)
        if found != mode and (repeatable or found == 0 or found == 3):
            return found
    return mode


@compiled(nogil=True)
def _steps(
    net: Net,
    modes: np.ndarray,
    best: np.ndarray,
    numbers: np.ndarray,
    movable: np.ndarray,
    kinds: np.ndarray,
    repeatable: np.ndarray,
    near_starts: np.ndarray,
    near: np.ndarray,
    has_way: bool,
    budget: float,
    scale: float,
    temperature: float,
    steps: int,
    random: np.ndarray,
) -> None:
    """So many proposals at one temperature; `modes`, `best`, `numbers` and `random` go on."""
    changed = np.empty(64, np.int64)
    before = np.empty(64, np.int8)
    count = len(movable)
    for _ in range(steps):
        slot = _drawn(random, count)
        tensor = movable[slot]
        kind = _drawn(random, 100)
        total = 1
        changed[0] = tensor
        before[0] = modes[tensor]
        mode = _another(random, modes[tensor], repeatable[slot], has_way)
        if kind < 40:
            modes[tensor] = mode
        elif kind < 65:  # two that are connected
            modes[tensor] = mode
            width = near_starts[slot + 1] - near_starts[slot]
            if width:
                other = near[near_starts[slot] + _drawn(random, width)]
                changed[1], before[1], total = movable[other], modes[movable[other]], 2
                modes[movable[other]] = _another(random, before[1], repeatable[other], has_way)
        elif kind < 85:  # two of a kind exchange
            other = min(max(slot + _drawn(random, 41) - 20, 0), count - 1)
            if kinds[other] != kinds[slot] or repeatable[other] != repeatable[slot]:
                continue
            changed[1], before[1], total = movable[other], modes[movable[other]], 2
            if before[1] == before[0]:
                continue
            modes[tensor], modes[movable[other]] = before[1], before[0]
        else:  # some of a kind, one after the other
            modes[tensor] = mode
            stop = min(count, slot + 2 + _drawn(random, 8))
            for other in range(slot + 1, stop):
                if kinds[other] != kinds[slot] or repeatable[other] != repeatable[slot]:
                    break
                changed[total], before[total] = movable[other], modes[movable[other]]
                modes[movable[other]] = mode
                total += 1
        seconds, peak, over = cost_of(net, modes, budget)
        excess = _excess(peak, over, budget)
        price = numbers[4]
        gain = (numbers[0] - seconds) / scale + price * (numbers[1] - excess)
        if gain >= 0 or _drawn(random, 1 << 30) / (1 << 30) < np.exp(gain / temperature):
            numbers[0], numbers[1] = seconds, excess
            if (excess <= 0 and seconds < numbers[2]) or (numbers[2] == np.inf and excess < numbers[3]):
                if excess <= 0:
                    numbers[2] = seconds
                numbers[3] = excess
                best[:] = modes
        else:
            for at in range(total):
                modes[changed[at]] = before[at]
        if numbers[1] > 0:
            numbers[4] = min(price * 1.01, _MOST_PRICE)
        else:
            numbers[4] = max(price * 0.995, _LEAST_PRICE)
