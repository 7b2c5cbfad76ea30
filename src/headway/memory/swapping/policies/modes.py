"""One word for each tensor of forward about what happens to it until backward, and at once what that costs.

A search needs the cost of many schedules that differ little. Here a schedule is a vector of modes, and compiled code
writes its steps, finds out when each tensor goes, moves transfers back ahead as far as the budget allows, and plays it
on the three clocks of `pricing`: thousands of schedules a second for a step of a thousand operations. The steps are
those that `decisions.with_frees` then makes a schedule of, so that `pricing` and the interpreter see the answer.

What backward needs and is not there is made just in time: right before the operation that reads it, with what that
takes, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.memory.swapping.decisions import with_frees
from headway.memory.swapping.problem import Action, Problem, Schedule

__all__ = ["AGAIN", "AWAY", "EACH", "KEEP", "Net", "cost_of", "modes_of", "net_of", "schedule_of"]

KEEP, AGAIN, EACH, AWAY = 0, 1, 2, 3
"""Stay; be made again once and stay until its last use; be made again for each use; rest in the first tier."""

_PATIENCE = 6  # so many times the operations of the step, and it is thrashing


class Net(NamedTuple):
    """A problem in arrays: for each operation its inputs and outputs (from `starts` on), for each tensor the rest.

    `leaves`: the last operation of forward that reads (else makes) a tensor. `ways`: bytes per second out and in, and
    seconds of latency, of the first tier; all zero without one.
    """

    seconds: np.ndarray
    workspace: np.ndarray
    overwrites: np.ndarray
    input_starts: np.ndarray
    inputs: np.ndarray
    output_starts: np.ndarray
    outputs: np.ndarray
    size: np.ndarray
    maker: np.ndarray
    leaves: np.ndarray
    ways: np.ndarray
    stop: int
    streams: int


def net_of(problem: Problem) -> Net:
    """The arrays of a problem. Encodings, and tiers after the first, are left out."""
    operations, tensors = problem.operations, problem.tensors
    stop = problem.forward_stop

    def flat(lists: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(each) for each in lists], out=starts[1:])
        return starts, np.array([at for each in lists for at in each], np.int64)

    input_starts, inputs = flat([tuple(dict.fromkeys(each.inputs)) for each in operations])
    output_starts, outputs = flat([each.outputs for each in operations])
    leaves = [
        max((at for at in problem.readers[tensor] if at < stop), default=each.maker)
        for tensor, each in enumerate(tensors)
    ]
    path = problem.paths[0] if problem.paths else None
    ways = (path.write_bytes_per_second, path.read_bytes_per_second, path.latency_seconds) if path else (0.0, 0.0, 0.0)
    return Net(
        seconds=np.array([each.seconds for each in operations]),
        workspace=np.array([each.workspace_bytes for each in operations]),
        overwrites=np.array([each.overwrites for each in operations], np.int64),
        input_starts=input_starts,
        inputs=inputs,
        output_starts=output_starts,
        outputs=outputs,
        size=np.array([each.bytes for each in tensors]),
        maker=np.array([each.maker for each in tensors], np.int64),
        leaves=np.array(leaves, np.int64),
        ways=np.array(ways),
        stop=stop,
        streams=problem.streams,
    )


def modes_of(problem: Problem, schedule: Schedule) -> np.ndarray:
    """The modes that come nearest to a schedule of whatever policy: what it makes again or fetches, and how often."""
    modes = np.zeros(len(problem.tensors), np.int8)
    computed = np.zeros(len(problem.operations), np.int64)
    for step in schedule.steps:
        if step.action.startswith("compute"):
            computed[step.index] += 1
    stop = problem.forward_stop
    saved = set(problem.saved)
    for at, tensor in enumerate(problem.tensors):
        if 0 <= tensor.maker < stop:
            count = computed[tensor.maker]
            # What forward alone reads is not held for backward, unless something else says so.
            modes[at] = EACH if count > 2 else AGAIN if count > 1 or at not in saved else KEEP
    if problem.paths:
        for step in schedule.steps:
            if step.action == "fetch" and 0 <= problem.tensors[step.index].maker < stop:
                modes[step.index] = AWAY
    return modes


def schedule_of(problem: Problem, net: Net, modes: np.ndarray, budget_bytes: float, policy: str = "") -> Schedule:
    """The schedule that the modes stand for. It may need more than the budget, as `cost_of` says."""
    sequence, length = _written(net, modes)
    issue, _ = _issued(net, sequence, length, budget_bytes)
    tier = problem.paths[0].tier if problem.paths else "host"
    raw: list[tuple[Action, int, str]] = []
    count = len(problem.operations)
    fetched = {int(code) - count for code in sequence[:length] if code >= count}
    ahead: dict[int, list[int]] = {}
    for at in np.flatnonzero(sequence[:length] >= count):
        ahead.setdefault(int(issue[at]), []).append(int(sequence[at]) - count)
    gone: set[int] = set()
    for at in range(length):
        raw.extend(("fetch", tensor, tier) for tensor in ahead.get(at, ()))
        code = int(sequence[at])
        if code >= count:
            continue
        raw.append(("compute", code, tier))
        for tensor in _outputs(problem, code):
            if tensor in fetched and tensor not in gone:
                gone.add(tensor)
                raw.append(("offload", tensor, tier))
    return Schedule(steps=with_frees(problem, raw, budget_bytes), policy=policy)


def _outputs(problem: Problem, position: int) -> Sequence[int]:
    return problem.operations[position].outputs


@compiled(nogil=True)
def _written(net: Net, modes: np.ndarray) -> tuple[np.ndarray, int]:
    """The operations in the order in which they run, and (number of operations + tensor) where one is fetched.

    Length -1: too many.
    """
    count, tensors = len(net.seconds), len(net.size)
    most = _PATIENCE * count + tensors
    sequence = np.empty(most, np.int64)
    here = np.zeros(tensors, np.bool_)
    for tensor in range(tensors):
        here[tensor] = net.maker[tensor] < 0 or (modes[tensor] == KEEP and net.maker[tensor] < net.stop)
    length = 0
    for position in range(net.stop):
        sequence[length] = position
        length += 1
    stamp = np.full(count, -1, np.int64)
    stack = np.empty(count + 1, np.int64)
    again = np.empty(count + 1, np.int64)
    for position in range(net.stop, count):
        # What must be made: from what is missing back to what is there.
        top, found = 1, 0
        stack[0] = position
        while top:
            top -= 1
            reader = stack[top]
            for slot in range(net.input_starts[reader], net.input_starts[reader + 1]):
                tensor = net.inputs[slot]
                if here[tensor]:
                    continue
                if modes[tensor] == AWAY:
                    sequence[length] = count + tensor
                    length += 1
                    here[tensor] = True
                    continue
                maker = net.maker[tensor]
                if stamp[maker] != position:
                    stamp[maker] = position
                    again[found] = maker
                    found += 1
                    stack[top] = maker
                    top += 1
        if length + found + tensors >= most:
            return sequence, -1
        for at in range(1, found):  # by insertion: most come in reverse order and are few
            maker, place = again[at], at
            while place > 0 and again[place - 1] > maker:
                again[place] = again[place - 1]
                place -= 1
            again[place] = maker
        for at in range(found):
            maker = again[at]
            sequence[length] = maker
            length += 1
            for slot in range(net.output_starts[maker], net.output_starts[maker + 1]):
                tensor = net.outputs[slot]
                if modes[tensor] == AGAIN:
                    here[tensor] = True
        sequence[length] = position
        length += 1
        for slot in range(net.output_starts[position], net.output_starts[position + 1]):
            here[net.outputs[slot]] = True
    return sequence, length


@compiled(nogil=True)
def _deaths(net: Net, sequence: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step where its flags begin, and the flags: inputs, then outputs (or what is fetched) that nothing reads
    before they come again."""
    count = len(net.seconds)
    starts = np.empty(length + 1, np.int64)
    starts[0] = 0
    for at in range(length):
        code = sequence[at]
        width = 1
        if code < count:
            width = net.input_starts[code + 1] - net.input_starts[code]
            width += net.output_starts[code + 1] - net.output_starts[code]
        starts[at + 1] = starts[at] + width
    dies = np.empty(starts[length], np.bool_)
    needed = np.zeros(len(net.size), np.bool_)
    for at in range(length - 1, -1, -1):
        code = sequence[at]
        if code >= count:
            dies[starts[at]] = not needed[code - count]  # made again right after it came
            needed[code - count] = False
            continue
        flag = starts[at]
        for slot in range(net.input_starts[code], net.input_starts[code + 1]):
            dies[flag] = not needed[net.inputs[slot]]
            flag += 1
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            dies[flag] = not needed[net.outputs[slot]]
            flag += 1
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            needed[net.outputs[slot]] = False
        for slot in range(net.input_starts[code], net.input_starts[code + 1]):
            needed[net.inputs[slot]] = True
    return starts, dies


@compiled(nogil=True)
def _issued(net: Net, sequence: np.ndarray, length: int, budget: float) -> tuple[np.ndarray, bool]:
    """For each fetch the step before which it begins: from the last to the first, each so early that it is in time.

    It must end before the next begins, and its tensor must fit at all steps in between. The second result: whether
    there is one at all.
    """
    count = len(net.seconds)
    issue = np.empty(length, np.int64)
    some = False
    for at in range(length):
        issue[at] = at
        some = some or sequence[at] >= count
    if not some:
        return issue, False
    starts, dies = _deaths(net, sequence, length)
    memory = np.empty(length)
    begins = np.empty(length + 1)
    begins[0] = 0.0
    there = np.zeros(len(net.size), np.bool_)
    live = 0.0
    for at in range(length):
        code = sequence[at]
        begins[at + 1] = begins[at]
        if code >= count:
            there[code - count] = True
            live += net.size[code - count]
            memory[at] = live
            continue
        begins[at + 1] += net.seconds[code]
        flag = starts[at]
        first = net.input_starts[code]
        used = live + net.workspace[code]
        over = net.overwrites[code]
        for slot in range(first, net.input_starts[code + 1]):
            if net.inputs[slot] == over and dies[flag + slot - first] and there[over] and net.maker[over] >= 0:
                used -= net.size[over]
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            tensor = net.outputs[slot]
            used += net.size[tensor]
            if not there[tensor]:
                there[tensor] = True
                live += net.size[tensor]
        memory[at] = used
        for slot in range(first, net.input_starts[code + 1]):
            tensor = net.inputs[slot]
            if dies[flag] and there[tensor] and net.maker[tensor] >= 0:
                there[tensor] = False
                live -= net.size[tensor]
            flag += 1
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            tensor = net.outputs[slot]
            if dies[flag] and there[tensor]:
                there[tensor] = False
                live -= net.size[tensor]
            flag += 1
    until = np.inf
    for at in range(length - 1, -1, -1):
        code = sequence[at]
        if code < count:
            continue
        tensor = code - count
        size = net.size[tensor]
        begin = min(begins[at], until) - size / net.ways[1] - net.ways[2]
        place = at
        while place > 0 and begins[place] > begin and memory[place - 1] + size <= budget:
            # Not before the tensor has left (after forward's last reader of it), and not before it is made again.
            if sequence[place - 1] == net.leaves[tensor] or sequence[place - 1] == net.maker[tensor]:
                break
            place -= 1
            memory[place] += size
        issue[at] = place
        until = min(begin, begins[place])
    return issue, True


@compiled(nogil=True)
def cost_of(net: Net, modes: np.ndarray, budget: float) -> tuple[float, float, float]:
    """Seconds, peak in bytes, and how far over the budget the schedule is on average over time, in bytes.

    Infinite seconds: it takes more than some times the operations of the step.
    """
    sequence, length = _written(net, modes)
    if length < 0:
        return np.inf, np.inf, np.inf
    issue, has_fetches = _issued(net, sequence, length, budget)
    starts, dies = _deaths(net, sequence, length)
    count, tensors = len(net.seconds), len(net.size)
    there = np.zeros(tensors, np.bool_)
    arrival = np.zeros(tensors)
    departure = np.zeros(tensors)
    # Fetches by the step before which they begin, in their order; and which tensors go out at all.
    goes = np.zeros(tensors, np.bool_)
    out_now = np.zeros(tensors, np.bool_)
    leaving = np.empty(tensors + length, np.int64)
    waits = np.full(tensors, -1, np.int64)  # its place among those that leave, and stay until their room is needed
    first_leaving = last_leaving = 0
    head = np.full(length + 1, -1, np.int64)
    following = np.full(length + 1, -1, np.int64)
    if has_fetches:
        for at in range(length - 1, -1, -1):
            if sequence[at] >= count:
                goes[sequence[at] - count] = True
                following[at] = head[issue[at]]
                head[issue[at]] = at
    live = peak = clock = out_clock = in_clock = over_time = 0.0
    for at in range(length):
        code = sequence[at]
        fetch = head[at]
        while fetch >= 0:
            place = fetch
            tensor = sequence[fetch] - count
            fetch = following[fetch]
            if waits[tensor] >= 0:  # it never had to go
                waits[tensor] = -1
                continue
            size = net.size[tensor]
            while first_leaving < last_leaving and live + size > budget:
                other = leaving[first_leaving]
                first_leaving += 1
                if waits[other] == first_leaving - 1:
                    waits[other] = -1
                    clock = max(clock, departure[other])
                    live -= net.size[other]
                    there[other] = False
            begin = max(clock, max(in_clock, departure[tensor]))
            in_clock = begin + net.ways[2] + size / net.ways[1]
            arrival[tensor] = in_clock
            if net.streams < 3:
                out_clock = in_clock
            if net.streams == 1:
                clock = in_clock
            out_now[tensor] = False
            there[tensor] = True
            live += size
            peak = max(peak, live)
            if dies[starts[place]]:
                clock = max(clock, in_clock)
                live -= size
                there[tensor] = False
        if code >= count:
            continue
        flag = starts[at]
        first = net.input_starts[code]
        made = net.workspace[code]
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            tensor = net.outputs[slot]
            made += net.size[tensor]
            if waits[tensor] >= 0:
                waits[tensor] = -1
                clock = max(clock, departure[tensor])
                live -= net.size[tensor]
                there[tensor] = False
        over, spared = net.overwrites[code], 0.0
        begin = clock
        for slot in range(first, net.input_starts[code + 1]):
            tensor = net.inputs[slot]
            begin = max(begin, arrival[tensor])
            if tensor == over and dies[flag + slot - first] and there[over] and net.maker[over] >= 0:
                spared = net.size[over]
        while first_leaving < last_leaving and live + made - spared > budget:
            other = leaving[first_leaving]
            first_leaving += 1
            if waits[other] == first_leaving - 1:
                waits[other] = -1
                clock = max(clock, departure[other])
                live -= net.size[other]
                there[other] = False
        begin = max(begin, clock)
        if spared > 0:
            begin = max(begin, departure[over])
            live -= spared
            there[over] = False
        during = live + made
        peak = max(peak, during)
        clock = begin + net.seconds[code]
        if during > budget:
            over_time += (during - budget) * net.seconds[code]
        for slot in range(net.output_starts[code], net.output_starts[code + 1]):
            tensor = net.outputs[slot]
            arrival[tensor] = 0.0
            if not there[tensor]:
                there[tensor] = True
                live += net.size[tensor]
            if goes[tensor] and code < net.stop:
                goes[tensor] = False
                begin = max(clock, out_clock)
                out_clock = begin + net.ways[2] + net.size[tensor] / net.ways[0]
                departure[tensor] = out_clock
                out_now[tensor] = True
                if net.streams < 3:
                    in_clock = out_clock
                if net.streams == 1:
                    clock = out_clock
        for slot in range(first, net.output_starts[code + 1] - net.output_starts[code] + net.input_starts[code + 1]):
            if slot < net.input_starts[code + 1]:
                tensor = net.inputs[slot]
            else:
                tensor = net.outputs[slot - net.input_starts[code + 1] + net.output_starts[code]]
            if dies[flag] and there[tensor] and net.maker[tensor] >= 0:
                if out_now[tensor]:
                    waits[tensor] = last_leaving
                    leaving[last_leaving] = tensor
                    last_leaving += 1
                else:
                    clock = max(clock, max(arrival[tensor], departure[tensor]))
                    live -= net.size[tensor]
                    there[tensor] = False
            flag += 1
    return float(clock), float(peak), float(over_time / max(clock, 1e-30))
