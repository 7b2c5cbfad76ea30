"""Checks a schedule by carrying it out on symbols: written apart from the simulator that priced it.

Every tensor has a value: a digest of the operation that made it and of the values that it read. The interpreter keeps
devices and tiers as dictionaries of values and transfers as events in a queue, so that a tensor is found by what it is.
A step that reads what is not there, a recomputation that yields another value, a byte over the budget, a tier over its
capacity, or a price that is not what the clocks say, is an error.
"""

from __future__ import annotations

import hashlib
import heapq
import math

from headway.errors import PlanError
from headway.memory.swapping.problem import Price, Problem, Schedule, Step

__all__ = ["check"]

_SLACK = 1e-6  # relative: floating-point sums in another order


def check(problem: Problem, schedule: Schedule, budget_bytes: float, claimed: Price | None = None) -> Price:
    """Carry `schedule` out on symbols, and say what it cost.

    Raises PlanError naming the step if it reads what is not there, is over the budget or a tier's capacity, computes
    something else than the problem asks for, or if `claimed` differs from what happened.
    """
    return _Interpreter(problem, schedule, budget_bytes).run(claimed)


class _Transfer:
    """One transfer: `key` (tensor and form) is on its way from `begin` to `end`."""

    def __init__(self, begin: float, end: float) -> None:
        self.begin = begin
        self.end = end


class _Interpreter:
    def __init__(self, problem: Problem, schedule: Schedule, budget_bytes: float) -> None:
        self.problem = problem
        self.schedule = schedule
        self.budget = budget_bytes
        self.now = 0.0
        self.expected = self._values()
        # (tensor, is encoded) → value
        self.device: dict[tuple[int, bool], bytes] = {}
        self.tiers: dict[str, dict[tuple[int, bool], bytes]] = {path.tier: {} for path in problem.paths}
        self.transfers: dict[tuple[str, int], _Transfer] = {}
        self.queues: dict[str, list[float]] = {}
        self.computed: dict[int, int] = {}
        self.peak = 0.0
        self.peak_step = -1
        self.moved = self.coding = self.idle = self.again = 0.0
        for at, tensor in enumerate(problem.tensors):
            if tensor.maker < 0:
                self.device[at, False] = self.expected[at]

    def _values(self) -> list[bytes]:
        values = [f"given {at}".encode() for at in range(len(self.problem.tensors))]
        for position, operation in enumerate(self.problem.operations):
            for slot, at in enumerate(operation.outputs):
                values[at] = _digest(position, slot, [values[source] for source in operation.inputs])
        return values

    def _fail(self, at: int, message: str) -> PlanError:
        step = self.schedule.steps[at]
        place = f"{self.problem.name}: step {at} of {self.schedule.policy or 'the schedule'}"
        return PlanError(f"{step.action} {step.index}: {message}", place=place)

    def _bytes(self, key: tuple[int, bool]) -> float:
        tensor = self.problem.tensors[key[0]]
        if tensor.maker < 0:
            return 0.0
        return tensor.bytes * tensor.encoding.ratio if key[1] and tensor.encoding else tensor.bytes

    def _occupied(self) -> float:
        return math.fsum(self._bytes(key) for key in self.device)

    def _within(self, at: int, occupied: float) -> None:
        if occupied > self.peak:
            self.peak, self.peak_step = occupied, at
        if occupied > self.budget * (1 + _SLACK) + _SLACK:
            raise self._fail(at, f"{occupied:.6g} bytes are on the device, and the budget is {self.budget:.6g}")

    def _wait_until(self, moment: float) -> None:
        if moment > self.now:
            self.idle += moment - self.now
            self.now = moment

    def _form(self, at: int, tensor: int) -> tuple[int, bool]:
        keys = [key for key in ((tensor, False), (tensor, True)) if key in self.device]
        if len(keys) != 1:
            raise self._fail(at, f"{len(keys)} forms of the tensor are on the device")
        return keys[0]

    # ----------------------------------------------------------------------------------------------------- steps

    def run(self, claimed: Price | None) -> Price:
        for at, step in enumerate(self.schedule.steps):
            getattr(self, f"_{step.action}")(at, step)
            self._within(at, self._occupied())
        absent = set(range(len(self.problem.operations))) - set(self.computed)
        if absent:
            raise PlanError(f"operation {min(absent)} is never computed", place=self.problem.name)
        found = Price(
            seconds=self.now,
            peak_bytes=self.peak,
            repeated_seconds=self.again,
            coding_seconds=self.coding,
            waiting_seconds=self.idle,
            moved_bytes=self.moved,
            tier_bytes=math.fsum(self._bytes(key) for resting in self.tiers.values() for key in resting),
            repeated=sum(count - 1 for count in self.computed.values()),
            peak_step=self.peak_step,
        )
        if claimed is not None:
            for field in ("seconds", "peak_bytes", "repeated_seconds", "waiting_seconds", "moved_bytes", "repeated"):
                said, was = getattr(claimed, field), getattr(found, field)
                if not math.isclose(said, was, rel_tol=_SLACK, abs_tol=1e-9):
                    raise PlanError(f"{field} is claimed to be {said:.9g}, and is {was:.9g}", place=self.problem.name)
        return found

    def _compute(self, at: int, step: Step) -> None:
        self._operate(at, step, in_place=False)

    def _compute_in_place(self, at: int, step: Step) -> None:
        if self.problem.operations[step.index].overwrites < 0:
            raise self._fail(at, "the operation does not work in place")
        self._operate(at, step, in_place=True)

    def _operate(self, at: int, step: Step, *, in_place: bool) -> None:
        operation = self.problem.operations[step.index]
        read: list[bytes] = []
        ready = self.now
        for tensor in operation.inputs:
            if (tensor, False) not in self.device:
                raise self._fail(at, f"tensor {tensor} is not on the device")
            read.append(self.device[tensor, False])
            incoming = self.transfers.get(("in", tensor))
            if incoming:
                ready = max(ready, incoming.end)
        if step.index in self.computed and not operation.repeatable:
            raise self._fail(at, "the operation may not be repeated")
        temporary = operation.workspace_bytes
        if in_place:
            outgoing = self.transfers.get(("out", operation.overwrites))
            if outgoing:
                ready = max(ready, outgoing.end)
            del self.device[operation.overwrites, False]
        self._wait_until(ready)
        for slot, tensor in enumerate(operation.outputs):
            value = _digest(step.index, slot, read)
            if value != self.expected[tensor]:
                raise self._fail(at, f"tensor {tensor} gets another value than in the step without a budget")
            if (tensor, True) in self.device:
                raise self._fail(at, f"tensor {tensor} is there in its encoded form")
            if (tensor, False) in self.device:
                temporary += self._bytes((tensor, False))
            self.device[tensor, False] = value
            self.transfers.pop(("in", tensor), None)
        self._within(at, self._occupied() + temporary)
        self.now += operation.seconds
        if step.index in self.computed:
            self.again += operation.seconds
        self.computed[step.index] = self.computed.get(step.index, 0) + 1

    def _free(self, at: int, step: Step) -> None:
        key = self._form(at, step.index)
        for way in ("in", "out"):
            transfer = self.transfers.pop((way, step.index), None)
            if transfer:
                self._wait_until(transfer.end)
        del self.device[key]

    def _stream(self, way: str) -> list[float]:
        if self.problem.streams < 3:
            way = "both"
        return self.queues.setdefault(way, [0.0])

    def _transfer(self, way: str, step: Step, amount: float, rate: float, latency: float, after: float) -> None:
        stream = self._stream(way)
        begin = max(self.now, heapq.nlargest(1, stream)[0], after)
        end = begin + latency + amount / rate
        heapq.heappush(stream, end)
        self.transfers[way, step.index] = _Transfer(begin, end)
        self.moved += amount
        if self.problem.streams == 1:
            self._wait_until(end)

    def _offload(self, at: int, step: Step) -> None:
        key = self._form(at, step.index)
        if step.tier not in self.tiers:
            raise self._fail(at, f"no way to the tier {step.tier}")
        path = self.problem.path(step.tier)
        incoming = self.transfers.get(("in", step.index))
        after = incoming.end if incoming else 0.0
        self._transfer("out", step, self._bytes(key), path.write_bytes_per_second, path.latency_seconds, after)
        resting = self.tiers[step.tier]
        resting[key] = self.device[key]
        used = math.fsum(self._bytes(other) for other in resting)
        if used > path.capacity_bytes * (1 + _SLACK):
            raise self._fail(at, f"{used:.6g} bytes rest in {step.tier}, which holds {path.capacity_bytes:.6g}")

    def _fetch(self, at: int, step: Step) -> None:
        if any((step.index, encoded) in self.device for encoded in (False, True)):
            raise self._fail(at, "the tensor is on the device already")
        found = [(tier, key) for tier, resting in self.tiers.items() for key in resting if key[0] == step.index]
        if not found:
            raise self._fail(at, "the tensor is in no tier")
        tier, key = found[-1]
        path = self.problem.path(tier)
        outgoing = self.transfers.get(("out", step.index))
        after = outgoing.end if outgoing else 0.0
        self._transfer("in", step, self._bytes(key), path.read_bytes_per_second, path.latency_seconds, after)
        self.device[key] = self.tiers[tier][key]

    def _recode(self, at: int, step: Step, *, encode: bool) -> None:
        key = self._form(at, step.index)
        encoding = self.problem.tensors[step.index].encoding
        if encoding is None or key[1] == encode:
            raise self._fail(at, "the tensor is not there in that form, or has no encoding")
        for way in ("in", "out"):
            transfer = self.transfers.pop((way, step.index), None)
            if transfer:
                self._wait_until(transfer.end)
        self._within(at, self._occupied() + self._bytes((step.index, encode)))
        self.device[step.index, encode] = self.device.pop(key)
        self.now += encoding.seconds
        self.coding += encoding.seconds

    def _encode(self, at: int, step: Step) -> None:
        self._recode(at, step, encode=True)

    def _decode(self, at: int, step: Step) -> None:
        self._recode(at, step, encode=False)


def _digest(operation: int, slot: int, read: list[bytes]) -> bytes:
    digest = hashlib.blake2b(f"{operation} {slot}".encode(), digest_size=12)
    for value in read:
        digest.update(b"|" + value)
    return digest.digest()
