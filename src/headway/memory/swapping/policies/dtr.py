"""Dynamic tensor rematerialization: evict online, whatever has the least cost / (size x staleness) (DTR, ICLR 2021).

Kirisame et al. look at nothing but the past. When an allocation does not fit, the tensor with the least
h = cost / (bytes x staleness) goes (section 2), where the cost is that of computing it and its evicted neighbourhood
again: the evicted ancestors and descendants that are connected to it through evicted tensors (h_DTR, section 4.1).
A tensor that the program lets go of is evicted at once (section 2, deallocation).
"""

from __future__ import annotations

from headway.memory.swapping.decisions import refuse, with_frees
from headway.memory.swapping.problem import Action, Problem, Schedule

__all__ = ["dtr"]

_PATIENCE = 30  # recomputations, in operations of the step, after which it is thrashing


def dtr(problem: Problem, budget_bytes: float) -> Schedule:
    """Carry the step out under the budget, greedily. Raises DoesNotFitError where it thrashes or finds no victim."""
    online = _Online(problem, budget_bytes)
    for position in range(len(problem.operations)):
        online.run(position)
    return Schedule(steps=with_frees(problem, online.steps, budget_bytes), policy="dtr")


class _Online:
    def __init__(self, problem: Problem, budget_bytes: float) -> None:
        self.problem = problem
        self.budget = budget_bytes
        self.steps: list[tuple[Action, int, str]] = []
        self.here = [tensor.maker < 0 for tensor in problem.tensors]
        self.made = list(self.here)
        self.accessed = [0.0] * len(problem.tensors)
        self.pinned = [0] * len(problem.tensors)
        self.pending = [len(readers) for readers in problem.readers]  # uses that the program still holds it for
        self.now = 0.0
        self.live = 0.0
        self.resident: set[int] = set()
        self.limit = _PATIENCE * len(problem.operations)

    def run(self, position: int) -> None:
        """The next operation of the program; then lets go of what it read last."""
        self._compute(position)
        operation = self.problem.operations[position]
        for tensor in operation.inputs:
            self.pending[tensor] -= 1
        for tensor in (*operation.inputs, *operation.outputs):
            if self.pending[tensor] == 0:
                self._evict(tensor)

    def _evict(self, tensor: int) -> None:
        if self.here[tensor] and self.problem.tensors[tensor].maker >= 0:
            self.here[tensor] = False
            self.resident.discard(tensor)
            self.live -= self.problem.tensors[tensor].bytes

    def _compute(self, target: int) -> None:
        """Compute an operation, with an explicit stack: chains of evicted tensors are long."""
        operations, tensors = self.problem.operations, self.problem.tensors
        stack = [(target, False)]
        while stack:
            position, ready = stack.pop()
            operation = operations[position]
            if not ready:
                for tensor in operation.inputs:
                    self.pinned[tensor] += 1
                stack.append((position, True))
            missing = [tensor for tensor in operation.inputs if not self.here[tensor]]
            if missing:
                if ready:
                    stack.append((position, True))
                stack.append((tensors[missing[0]].maker, False))
                if len(stack) > 4 * len(operations):
                    raise refuse(self.problem, "dtr", self.live, self.budget)
                continue
            if not ready:
                stack.pop()
            self._launch(position)
            for tensor in operation.inputs:
                self.pinned[tensor] -= 1
                self.accessed[tensor] = self.now
            if position != target:
                for tensor in operation.inputs:
                    if self.pending[tensor] == 0 and not self.pinned[tensor]:
                        self._evict(tensor)

    def _launch(self, position: int) -> None:
        operation, tensors = self.problem.operations[position], self.problem.tensors
        fresh = [tensor for tensor in operation.outputs if not self.here[tensor]]
        needed = operation.workspace_bytes + sum(tensors[tensor].bytes for tensor in operation.outputs)
        over = operation.overwrites
        if over >= 0 and tensors[over].maker >= 0 and self.pending[over] <= 1 and self.pinned[over] <= 1:
            needed -= tensors[over].bytes
        for tensor in fresh:
            self.pinned[tensor] += 1
        while self.live + needed > self.budget:
            victim = self._victim()
            if victim < 0:
                raise refuse(self.problem, "dtr", self.live + needed, self.budget)
            self._evict(victim)
        for tensor in fresh:
            self.pinned[tensor] -= 1
            self.here[tensor] = self.made[tensor] = True
            self.resident.add(tensor)
            self.live += tensors[tensor].bytes
        self.now += operation.seconds
        for tensor in operation.outputs:
            self.accessed[tensor] = self.now
        self.steps.append(("compute", position, "host"))
        if len(self.steps) > self.limit:
            raise refuse(self.problem, "dtr", self.live + needed, self.budget)

    def _victim(self) -> int:
        best, least = -1, float("inf")
        for tensor in self.resident:
            size = self.problem.tensors[tensor].bytes
            if self.pinned[tensor] or size == 0:
                continue
            maker = self.problem.operations[self.problem.tensors[tensor].maker]
            if not maker.repeatable:
                continue
            staleness = self.now - self.accessed[tensor] + 1e-9
            # The tensor's own cost bounds h from below: the neighbourhood is looked at only if it can still win.
            if maker.seconds / (size * staleness) >= least:
                continue
            score = self._neighbourhood(tensor) / (size * staleness)
            if score < least:
                best, least = tensor, score
        return best

    def _neighbourhood(self, tensor: int) -> float:
        operations, tensors = self.problem.operations, self.problem.tensors
        seconds = operations[tensors[tensor].maker].seconds
        seen: set[int] = {tensors[tensor].maker}
        stack = [tensors[source].maker for source in operations[tensors[tensor].maker].inputs if not self.here[source]]
        while stack:
            maker = stack.pop()
            if maker in seen:
                continue
            seen.add(maker)
            seconds += operations[maker].seconds
            stack.extend(tensors[source].maker for source in operations[maker].inputs if not self.here[source])
        stack = list(self.problem.readers[tensor])
        while stack:
            reader = stack.pop()
            if reader in seen or not operations[reader].repeatable:
                continue
            gone = [made for made in operations[reader].outputs if self.made[made] and not self.here[made]]
            if not gone or all(self.pending[made] == 0 for made in gone):
                continue
            seen.add(reader)
            seconds += operations[reader].seconds
            for made in gone:
                stack.extend(self.problem.readers[made])
        return seconds
