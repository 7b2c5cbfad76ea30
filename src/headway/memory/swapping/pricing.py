"""What a schedule costs: one pass over its steps with three clocks.

Memory follows from the order of the steps. Time: the compute stream carries steps out one after the other and waits for
a tensor that is still on its way, and for a transfer out to end before it frees what is moved. Transfers begin when
they are issued and their stream is free; one that fetches what is still on its way out begins after that.
"""

from __future__ import annotations

from headway.errors import PlanError
from headway.memory.swapping.problem import Price, Problem, Schedule

__all__ = ["lateness", "memory_by_step", "price"]


def price(problem: Problem, schedule: Schedule) -> Price:
    """Seconds and bytes of a schedule. Raises PlanError at a step that cannot be carried out."""
    return _play(problem, schedule, None)


def memory_by_step(problem: Problem, schedule: Schedule) -> list[float]:
    """Bytes on the device while each step is carried out, its temporaries included."""
    trail: list[float] = []
    _play(problem, schedule, trail)
    return trail


def lateness(problem: Problem, schedule: Schedule) -> dict[int, float]:
    """For each tensor that was waited for, the seconds that the compute stream waited."""
    late: dict[int, float] = {}
    _play(problem, schedule, None, late)
    return late


def _play(
    problem: Problem, schedule: Schedule, trail: list[float] | None, late: dict[int, float] | None = None
) -> Price:
    operations, tensors = problem.operations, problem.tensors
    size = [tensor.bytes for tensor in tensors]
    # What of each tensor is on the device: 0 nothing, 1 the tensor, 2 its encoded form.
    form = [1 if tensor.maker < 0 else 0 for tensor in tensors]
    held = [0.0] * len(tensors)
    away = [0] * len(tensors)  # the form that rests in a tier
    arrival = [0.0] * len(tensors)
    departure = [0.0] * len(tensors)
    done = [False] * len(operations)
    clock = out_clock = in_clock = 0.0
    live = peak = tier_live = moved = repeated_seconds = coding = waiting = 0.0
    repeated, peak_step = 0, -1
    paths = {path.tier: path for path in problem.paths}
    path_of: list[str] = [""] * len(tensors)
    streams = problem.streams

    def refuse(at: int, message: str) -> PlanError:
        step = schedule.steps[at]
        return PlanError(message, place=f"{problem.name}: step {at} ({step.action} {step.index})")

    for at, step in enumerate(schedule.steps):
        action, index = step.action, step.index
        during = live
        if action == "compute" or action == "compute_in_place":
            operation = operations[index]
            begin = clock
            for tensor in operation.inputs:
                if form[tensor] != 1:
                    raise refuse(at, f"tensor {tensor} is not on the device")
                if arrival[tensor] > begin:
                    if late is not None:
                        late[tensor] = late.get(tensor, 0.0) + arrival[tensor] - begin
                    begin = arrival[tensor]
            made = sum([size[tensor] for tensor in operation.outputs])
            during = live + made + operation.workspace_bytes
            if action == "compute_in_place":
                taken = operation.overwrites
                if taken < 0:
                    raise refuse(at, "the operation does not work in place")
                during -= held[taken]
                live -= held[taken]
                held[taken] = 0.0
                form[taken] = 0
                if departure[taken] > begin:
                    begin = departure[taken]
            waiting += begin - clock
            clock = begin + operation.seconds
            if done[index]:
                repeated += 1
                repeated_seconds += operation.seconds
            done[index] = True
            for tensor in operation.outputs:
                # An output that is still there is computed beside it and dropped.
                if form[tensor] == 0:
                    form[tensor], held[tensor] = 1, size[tensor]
                    live += size[tensor]
                elif form[tensor] == 2:
                    raise refuse(at, f"tensor {tensor} is on the device in its encoded form")
                arrival[tensor] = 0.0
        elif action == "free":
            if form[index] == 0:
                raise refuse(at, "it is not on the device")
            until = max(departure[index], arrival[index])
            if until > clock:
                waiting += until - clock
                clock = until
            form[index] = 0
            live -= held[index]
            held[index] = 0.0
        elif action == "offload":
            if form[index] == 0:
                raise refuse(at, "it is not on the device")
            path = paths.get(step.tier)
            if path is None:
                raise refuse(at, f"no way to the tier {step.tier}")
            begin = max(clock, out_clock, arrival[index])
            out_clock = departure[index] = begin + path.latency_seconds + held[index] / path.write_bytes_per_second
            if streams < 3:
                in_clock = out_clock
            if streams == 1:
                waiting += out_clock - clock
                clock = out_clock
            if not away[index]:
                tier_live += held[index]
            away[index], path_of[index] = form[index], step.tier
            moved += held[index]
        elif action == "fetch":
            if form[index] != 0 or not away[index]:
                raise refuse(at, "it is on the device already" if form[index] else "it is in no tier")
            path = paths[path_of[index]]  # type: ignore[index]
            encoding = tensors[index].encoding
            amount = size[index] * (encoding.ratio if encoding and away[index] == 2 else 1.0)
            begin = max(clock, in_clock, departure[index])
            in_clock = arrival[index] = begin + path.latency_seconds + amount / path.read_bytes_per_second
            if streams < 3:
                out_clock = in_clock
            if streams == 1:
                waiting += in_clock - clock
                clock = in_clock
            form[index], held[index] = away[index], amount
            live += amount
            during = live
            moved += amount
        else:
            encoding = tensors[index].encoding
            wanted = 1 if action == "encode" else 2
            if encoding is None or form[index] != wanted:
                raise refuse(at, "there is no encoding of it" if encoding is None else "it is not there in that form")
            amount = size[index] * (encoding.ratio if action == "encode" else 1.0)
            begin = max(clock, arrival[index], departure[index])
            waiting += begin - clock
            clock = begin + encoding.seconds
            coding += encoding.seconds
            during = live + amount
            live += amount - held[index]
            form[index], held[index] = 3 - form[index], amount
        if during > peak:
            peak, peak_step = during, at
        if trail is not None:
            trail.append(during)
    missing = [at for at, was in enumerate(done) if not was]
    if missing:
        raise PlanError(f"operation {missing[0]} is never computed", place=problem.name)
    return Price(
        seconds=clock,
        peak_bytes=peak,
        repeated_seconds=repeated_seconds,
        coding_seconds=coding,
        waiting_seconds=waiting,
        moved_bytes=moved,
        tier_bytes=tier_live,
        repeated=repeated,
        peak_step=peak_step,
    )
