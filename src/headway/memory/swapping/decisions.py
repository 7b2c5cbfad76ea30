"""From decisions about single tensors (keep, swap, recompute, encode) to a program that carries them out.

A decision is about one gap: the time between two uses of a tensor, usually the last in forward and the first in
backward. Whatever is decided, the program computes every operation in its place; where an input is missing it is
brought back the way that was decided, recomputation going back as far as it must. Frees are not decided: a tensor goes
as soon as nothing reads it before it comes again, except that one on its way out stays until its room is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np

from headway.errors import DoesNotFitError
from headway.memory.swapping.pricing import memory_by_step, price
from headway.memory.swapping.problem import Action, Price, Problem, Schedule, Step
from headway.plan.plan import Tier
from headway.value import Value

__all__ = ["Decision", "Gap", "backward_gap", "fit", "prefetched", "program", "refuse", "with_frees"]

_Raw = tuple[Action, int, str]


class Decision(Value):
    """What happens to one tensor between two of its uses.

    - "swap": it rests in `tier`. The transfer out begins after operation `out_at` (-1: as soon as it is made), the one
      back before operation `in_at` (-1: right before the use). `encoded`: in its encoded form, both ways.
    - "recompute": it is dropped, and made again for its next use. `retain`: it then stays for its later uses;
      otherwise it is dropped after each.
    - "encode": it stays in its encoded form.
    - "keep": it stays, even if no operation of the backward pass reads it: what is recomputed begins with it.

    `gap`: the operation with the use that follows (-1: the first one in backward).
    """

    tensor: int
    action: Literal["keep", "swap", "recompute", "encode"]
    tier: Tier = "host"
    out_at: int = -1
    in_at: int = -1
    gap: int = -1
    retain: bool = True
    encoded: bool = False


class Gap(Value):
    """Two uses of a tensor in a row: after operation `before` nothing reads it until operation `after` does."""

    tensor: int
    before: int
    after: int


def backward_gap(problem: Problem, tensor: int) -> Gap:
    """The gap between the last use (or the making) of a saved tensor in forward and its first use in backward."""
    stop = problem.forward_stop
    readers = problem.readers[tensor]
    before = max((at for at in readers if at < stop), default=problem.tensors[tensor].maker)
    return Gap(tensor=tensor, before=before, after=next(at for at in readers if at >= stop))


def _gap_of(problem: Problem, decision: Decision) -> Gap:
    if decision.gap < 0:
        return backward_gap(problem, decision.tensor)
    readers = problem.readers[decision.tensor]
    before = max((at for at in readers if at < decision.gap), default=problem.tensors[decision.tensor].maker)
    return Gap(tensor=decision.tensor, before=before, after=decision.gap)


def program(
    problem: Problem, decisions: Iterable[Decision], budget_bytes: float = float("inf"), policy: str = ""
) -> Schedule:
    """The program that carries `decisions` out. It may need more than the budget, which `price` then says.

    The budget only tells it how long tensors on their way out can stay, which delays nothing.
    """
    return Schedule(steps=with_frees(problem, _Writer(problem, decisions).steps, budget_bytes), policy=policy)


class _Writer:
    """Writes the steps of a program without its frees."""

    def __init__(self, problem: Problem, decisions: Iterable[Decision]) -> None:
        self.problem = problem
        self.steps: list[_Raw] = []
        self.due: list[int] = []  # for each step the operation that it belongs to
        operations, readers = problem.operations, problem.readers
        count = len(operations)
        # What is so when a tensor is missing: how it comes back.
        self.mode: dict[int, Decision] = {}
        self.here = [tensor.maker < 0 for tensor in problem.tensors]
        self.encoded = [False] * len(problem.tensors)
        self.away = [False] * len(problem.tensors)
        leave: list[list[Decision]] = [[] for _ in range(count)]
        start: list[list[Decision]] = [[] for _ in range(count)]
        fetch: list[list[Decision]] = [[] for _ in range(count)]
        decided: set[int] = set()
        for decision in decisions:
            decided.add(decision.tensor)
            if decision.action == "keep":
                continue
            gap = _gap_of(problem, decision)
            leave[gap.before].append(decision)
            if decision.action == "swap":
                if not decision.encoded:
                    maker = problem.tensors[decision.tensor].maker
                    start[min(max(decision.out_at, maker), gap.before)].append(decision)
                if gap.before < decision.in_at < gap.after:
                    fetch[decision.in_at].append(decision)
        stop = problem.forward_stop
        # What no later operation reads is not there for a recomputation, unless it was kept for backward.
        fading: list[list[int]] = [[] for _ in range(count)]
        for at, tensor in enumerate(problem.tensors):
            if tensor.maker >= 0 and at not in decided:
                last = readers[at][-1] if readers[at] else tensor.maker
                if last < stop or tensor.maker >= stop:
                    fading[last].append(at)
        for position in range(count):
            self.position = position
            for decision in fetch[position]:
                self._bring(decision.tensor)
            self._ensure(position)
            self._compute(position)
            for decision in start[position]:
                self._write("offload", decision.tensor, decision.tier)
                self.away[decision.tensor] = True
            for decision in leave[position]:
                self._leave(decision)
            for tensor in fading[position]:
                self.here[tensor] = False
            for tensor in operations[position].inputs:
                mode = self.mode.get(tensor)
                if mode is not None and not mode.retain and position > backward_gap_start(problem, mode):
                    self.here[tensor] = False

    def _write(self, action: Action, index: int, tier: str = "host") -> None:
        self.steps.append((action, index, tier))
        self.due.append(self.position)

    def _compute(self, position: int) -> None:
        self._write("compute", position)
        for tensor in self.problem.operations[position].outputs:
            self.here[tensor] = True
            self.encoded[tensor] = False

    def _leave(self, decision: Decision) -> None:
        tensor = decision.tensor
        self.mode[tensor] = decision
        if decision.action == "encode" or decision.encoded:
            self._write("encode", tensor)
            self.encoded[tensor] = True
        if decision.encoded and decision.action == "swap":
            self._write("offload", tensor, decision.tier)
            self.away[tensor] = True
        if decision.action != "encode":
            self.encoded[tensor] = False
        self.here[tensor] = False

    def _bring(self, tensor: int) -> bool:
        """Bring back what is encoded or away; whether it is on the device (or on its way) then."""
        if self.here[tensor]:
            return True
        decision = self.mode.get(tensor)
        if decision is None or decision.action == "recompute":
            return False
        if decision.action == "swap":
            if not self.away[tensor]:
                return False
            if not self.encoded[tensor]:
                self._write("fetch", tensor, decision.tier)
                self.encoded[tensor] = decision.encoded
        if not self.encoded[tensor]:
            self.here[tensor] = True
        return True

    def _ready(self, tensor: int) -> bool:
        """Like `_bring`, and decoded."""
        if not self._bring(tensor):
            return False
        if self.encoded[tensor]:
            self._write("decode", tensor)
            self.encoded[tensor] = False
            self.here[tensor] = True
        return True

    def _ensure(self, position: int) -> None:
        """All inputs of an operation, by recomputing what must be, oldest first."""
        operations, tensors = self.problem.operations, self.problem.tensors
        missing = [tensor for tensor in operations[position].inputs if not self._ready(tensor)]
        if not missing:
            return
        again: set[int] = set()
        wanted = set(missing)
        stack = list(missing)
        while stack:
            maker = tensors[stack.pop()].maker
            if maker in again:
                continue
            again.add(maker)
            for source in operations[maker].inputs:
                if not self.here[source] and source not in wanted and not self._ready(source):
                    wanted.add(source)
                    stack.append(source)
        made: set[int] = set()
        for maker in sorted(again):
            before = [tensor for tensor in operations[maker].outputs if self.here[tensor]]
            self._compute(maker)
            made.update(tensor for tensor in operations[maker].outputs if tensor not in before)
        needed = set(operations[position].inputs)
        for tensor in made - needed:
            decision = self.mode.get(tensor)
            later = self.problem.readers[tensor]
            kept = decision is not None and decision.retain and decision.action == "recompute"
            # A by-product that backward reads later, which nobody decided about, was kept all the time.
            if not (kept and later and later[-1] > position):
                self.here[tensor] = False
        for tensor in made & needed:
            if tensor not in self.mode:
                self.here[tensor] = self.problem.readers[tensor][-1] > position


def backward_gap_start(problem: Problem, decision: Decision) -> int:
    """The operation after which a decision has taken effect."""
    return _gap_of(problem, decision).before


def with_frees(problem: Problem, raw: Sequence[_Raw], budget_bytes: float = float("inf")) -> tuple[Step, ...]:
    """`raw` steps with frees as early as can be, and in place what can be; transfers out end when room is needed."""
    operations, tensors = problem.operations, problem.tensors
    size = [tensor.bytes for tensor in tensors]
    reads_after = _next_events(problem, raw)
    steps: list[Step] = []
    form = [1 if tensor.maker < 0 else 0 for tensor in tensors]
    leaving: dict[int, None] = {}  # on their way out, oldest first
    in_flight = [False] * len(tensors)
    live = 0.0

    def held(tensor: int) -> float:
        encoding = tensors[tensor].encoding
        return size[tensor] * encoding.ratio if form[tensor] == 2 and encoding else size[tensor]

    def free(tensor: int) -> None:
        nonlocal live
        steps.append(Step(action="free", index=tensor))
        live -= held(tensor)
        form[tensor] = 0

    def make_room(amount: float) -> None:
        while leaving and live + amount > budget_bytes:
            tensor = next(iter(leaving))
            del leaving[tensor]
            free(tensor)

    away = [0] * len(tensors)
    for at, (action, index, tier) in enumerate(raw):
        touched: tuple[int, ...]
        if action == "compute":
            operation = operations[index]
            touched = tuple(dict.fromkeys((*operation.inputs, *operation.outputs)))
            for tensor in operation.outputs:
                if tensor in leaving or form[tensor] == 2:
                    leaving.pop(tensor, None)
                    free(tensor)
            over = operation.overwrites
            gone = over >= 0 and tensors[over].maker >= 0 and form[over] == 1 and not reads_after[at].get(over, False)
            made = sum(size[tensor] for tensor in operation.outputs) + operation.workspace_bytes
            make_room(made - (size[over] if gone else 0.0))
            steps.append(Step(action="compute_in_place" if gone else "compute", index=index))
            if gone:
                live -= held(over)
                form[over] = 0
                leaving.pop(over, None)
            for tensor in operation.outputs:
                if form[tensor] == 0:
                    form[tensor] = 1
                    live += size[tensor]
        else:
            touched = (index,)
            if action == "fetch":
                if index in leaving:  # it never had to go
                    del leaving[index]
                    continue
                if form[index] or not away[index]:
                    continue
                form[index] = away[index]
                amount = held(index)
                form[index] = 0
                make_room(amount)
                form[index] = away[index]
                live += amount
                in_flight[index] = False
            elif action == "encode" or action == "decode":
                before = held(index)
                form[index] = 2 if action == "encode" else 1
                after = held(index)
                make_room(after)
                live += after - before
            else:
                away[index] = form[index]
                in_flight[index] = True
            steps.append(Step(action=action, index=index, tier=tier))  # type: ignore[arg-type]
        for tensor in touched:
            if form[tensor] and tensors[tensor].maker >= 0 and not reads_after[at].get(tensor, False):
                if in_flight[tensor] and away[tensor] == form[tensor]:
                    leaving.setdefault(tensor)
                else:
                    free(tensor)
    return tuple(steps)


def _next_events(problem: Problem, raw: Sequence[_Raw]) -> list[dict[int, bool]]:
    """For each step, for each tensor it touches: whether it is read before it comes again (by any way)."""
    operations = problem.operations
    read_next: dict[int, bool] = {}
    found: list[dict[int, bool]] = []
    for action, index, _ in reversed(raw):
        if action == "compute":
            operation = operations[index]
            found.append({tensor: read_next.get(tensor, False) for tensor in (*operation.inputs, *operation.outputs)})
            for tensor in operation.outputs:
                read_next[tensor] = False
            for tensor in operation.inputs:
                read_next[tensor] = True
        else:
            found.append({index: read_next.get(index, False)})
            read_next[index] = action != "fetch"
    found.reverse()
    return found


def refuse(problem: Problem, policy: str, peak_bytes: float, budget_bytes: float) -> DoesNotFitError:
    """The error of a policy that does not get below the budget."""
    return DoesNotFitError(
        f"{policy} needs {peak_bytes:.4g} bytes for activations, and the budget is {budget_bytes:.4g}",
        place=problem.name,
        remedy=f"no policy needs less than {problem.bytes_needed:.4g}; try another policy, or a smaller micro-batch",
    )


def fit(
    problem: Problem, ranked: Sequence[Decision], budget_bytes: float, policy: str, *, prefetch: bool = True
) -> tuple[Schedule, Price, list[Decision]]:
    """The shortest beginning of `ranked` whose program fits the budget, found by bisection.

    With `prefetch`, transfers back are then moved ahead as far as they need and the budget allows. Raises
    DoesNotFitError if not even all decisions together are enough.
    """

    def attempt(count: int) -> tuple[Schedule, Price]:
        schedule = program(problem, ranked[:count], budget_bytes, policy)
        return schedule, price(problem, schedule)

    low, high = 0, len(ranked)
    best = attempt(0)
    if best[1].peak_bytes > budget_bytes:
        best = attempt(high)
        if best[1].peak_bytes > budget_bytes:
            raise refuse(problem, policy, best[1].peak_bytes, budget_bytes)
        while low + 1 < high:
            middle = (low + high) // 2
            tried = attempt(middle)
            if tried[1].peak_bytes <= budget_bytes:
                high, best = middle, tried
            else:
                low = middle
    else:
        high = 0
    chosen = list(ranked[:high])
    if prefetch and any(decision.action == "swap" for decision in chosen):
        ahead = prefetched(problem, chosen, budget_bytes)
        schedule = program(problem, ahead, budget_bytes, policy)
        cost = price(problem, schedule)
        if cost.peak_bytes <= budget_bytes and cost.seconds < best[1].seconds:
            return schedule, cost, ahead
    return *best, chosen


def prefetched(problem: Problem, decisions: Sequence[Decision], budget_bytes: float) -> list[Decision]:
    """The same decisions, each swap's transfer back begun early enough to be hidden, as far as the budget allows.

    From the last use to the first: a transfer must end before the use and before the next transfer begins, and its
    tensor must fit at every operation in between.
    """
    writer = _Writer(problem, decisions)
    memory = _memory_by_operation(problem, decisions, budget_bytes)
    begins = np.concatenate([[0.0], np.cumsum([operation.seconds for operation in problem.operations])])
    for (action, index, _), due in zip(writer.steps, writer.due, strict=True):
        if action == "compute" and index != due:  # what is recomputed delays everything after it
            begins[due:] += problem.operations[index].seconds
    found = list(decisions)
    order = sorted(
        (at for at, decision in enumerate(found) if decision.action == "swap"),
        key=lambda at: -_gap_of(problem, found[at]).after,
    )
    free_until = float("inf")
    for at in order:
        decision = found[at]
        gap = _gap_of(problem, decision)
        path = problem.path(decision.tier)
        tensor = problem.tensors[decision.tensor]
        size = tensor.bytes * (tensor.encoding.ratio if decision.encoded and tensor.encoding else 1.0)
        begin = min(float(begins[gap.after]), free_until) - size / path.read_bytes_per_second - path.latency_seconds
        wanted = int(np.searchsorted(begins, begin, side="right")) - 1
        wanted = max(wanted, gap.before + 1)
        crowded = np.flatnonzero(memory[wanted : gap.after] + size > budget_bytes)
        if len(crowded):
            wanted += int(crowded[-1]) + 1
        if wanted < gap.after:
            memory[wanted : gap.after] += size
            found[at] = msgspec.structs.replace(decision, in_at=wanted)
            free_until = float(min(begin, begins[wanted]))
        else:
            free_until = begin
    return found


def _memory_by_operation(problem: Problem, decisions: Sequence[Decision], budget_bytes: float) -> np.ndarray:
    """Bytes in use while each operation (and what is recomputed for it) runs; what is leaving does not count."""
    schedule = program(problem, decisions, 0.0)  # everything that can leave has left
    memory = np.zeros(len(problem.operations))
    held = memory_by_step(problem, schedule)
    position = 0
    pending: list[float] = []
    seen = -1
    for step, amount in zip(schedule.steps, held, strict=True):
        pending.append(amount)
        if step.action.startswith("compute") and step.index > seen:
            seen = position = step.index
            memory[position] = max(memory[position], *pending)
            pending = []
    if pending:
        memory[position] = max(memory[position], *pending)
    return memory
