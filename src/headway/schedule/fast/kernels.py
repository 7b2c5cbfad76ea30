"""The compiled twin of the scheduler: the rules of scheduler.py, seating.py and replay.py in arrays.

It is a second telling of what those files say, and they are the ones that are right: tests/schedule/fast/ draws
traces, and a time that differs in one bit fails. So every sum here stands in the order in which it stands there.

What makes it fast: jobs that wait stay sorted and are visited only while devices are left that one of them could use;
the order of those that run changes little from event to event, and is repaired by insertion; when all fit, nobody is
sorted at all.
"""

from __future__ import annotations

import heapq

import numpy as np

from headway.compiled import compiled
from headway.schedule.fast.places import SKEW, STRICT, place_gang
from headway.schedule.fast.story import (
    FIXED,
    GANDIVA,
    HEADWAY,
    expects,
    leave,
    patience_ends,
    seat,
    set_crossing,
    set_key,
    working,
)
from headway.schedule.policies.history import expected_effort, learn, mixture

__all__ = ["play_compiled"]

# ------------------------------------------------------------------------------------------------------ sorted numbers


@compiled()
def _before(jobs, one, other):
    if jobs[one].key != jobs[other].key:
        return jobs[one].key < jobs[other].key
    if jobs[one].key2 != jobs[other].key2:
        return jobs[one].key2 < jobs[other].key2
    return one < other


@compiled()
def _search(jobs, line, length, number):
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if _before(jobs, line[middle], number):
            low = middle + 1
        else:
            high = middle
    return low


@compiled()
def _insert(jobs, line, length, number):
    at = _search(jobs, line, length, number)
    for place in range(length, at, -1):
        line[place] = line[place - 1]
    line[at] = number


@compiled()
def _remove(jobs, line, length, number):
    at = _search(jobs, line, length, number)
    assert line[at] == number
    for place in range(at, length - 1):
        line[place] = line[place + 1]


@compiled()
def _merge_sort(jobs, line, length, spare):
    width = 1
    while width < length:
        for start in range(0, length, 2 * width):
            middle, stop = min(start + width, length), min(start + 2 * width, length)
            left, right = start, middle
            for place in range(start, stop):
                if left < middle and (right >= stop or not _before(jobs, line[right], line[left])):
                    spare[place] = line[left]
                    left += 1
                else:
                    spare[place] = line[right]
                    right += 1
        for place in range(length):
            line[place] = spare[place]
        width *= 2


@compiled()
def _repair(jobs, line, length, spare):
    """Sort what is nearly sorted."""
    moves = 0
    for place in range(1, length):
        number = line[place]
        at = place
        while at > 0 and _before(jobs, number, line[at - 1]):
            line[at] = line[at - 1]
            at -= 1
            moves += 1
        line[at] = number
        if moves > 16 * length:
            _merge_sort(jobs, line, length, spare)
            return


# ------------------------------------------------------------------------------------------------------------ the play


@compiled()
def _give(job, free, nodes, counts, sign):
    for place in range(job.offset, job.offset + job.nodes):
        free[nodes[place]] += sign * counts[place]


@compiled()
def _take_target(job, trial, nodes, counts, used):
    for place in range(job.offset, job.offset + used):
        trial[nodes[place]] -= counts[place]
    job.target, job.target_nodes = 2, used


@compiled()
def _log(log, length, job, number, now, nodes, counts):
    """Rows (job, start, stop, node, devices) of the segment that ends now."""
    if now <= job.since:
        return log, length
    if length + job.nodes > len(log):
        grown = np.empty((2 * (length + job.nodes) + 64, 5))
        grown[:length] = log[:length]
        log = grown
    for place in range(job.offset, job.offset + job.nodes):
        row = log[length]
        row[0], row[1], row[2], row[3], row[4] = number, job.since, now, nodes[place], counts[place]
        length += 1
    return log, length


@compiled()
def _make_room(jobs, chosen, total, position, trial, rack_of, rules, turn, held, held_counts, nodes, counts):
    """As `_Arranging._make_room`: nodes used or -1."""
    loose = trial.copy()
    anybody = False
    for other in range(total - 1, position, -1):
        row = jobs[chosen[other]]
        if row.target == 1:
            anybody = True
            for place in range(row.offset, row.offset + row.nodes):
                loose[held[place]] += held_counts[place]
    if not anybody:
        return -1, turn
    turn += 1
    job = jobs[chosen[position]]
    used = place_gang(job, loose, rack_of, rules, turn, nodes, counts)
    if used < 0:
        return -1, turn
    for at in range(job.offset, job.offset + used):
        node = nodes[at]
        for other in range(total - 1, position, -1):
            if trial[node] >= counts[at]:
                break
            row = jobs[chosen[other]]
            if row.target != 1:
                continue
            on_node = False
            for place in range(row.offset, row.offset + row.nodes):
                on_node = on_node or held[place] == node
            if on_node:
                for place in range(row.offset, row.offset + row.nodes):
                    trial[held[place]] += held_counts[place]
                row.target = 0
    return used, turn


@compiled()
def play_compiled(
    jobs, node_devices, rack_of, rules_row, thresholds, ranks, rows, history, bounds, nodes, counts, log, costs
):
    """Play all rows of `jobs` (in order of submission, none larger than the fleet) to the end.

    Returns the number of decisions, of events, and the segments kept. `nodes`, `counts`: room for what each job holds,
    from its `offset` on; `rows`, `history`: groups of each job and counts of each group, for "headway";
    `costs`: a `CostTable`.
    """
    rules = rules_row[0]
    total = len(jobs)
    capacity = 0
    for count in node_devices:
        capacity += count
    order, preemptive, head_blocks = rules.order, rules.preemptive, rules.head_blocks
    always_fits = rules.place != STRICT and rules.place != SKEW
    dynamic = order != FIXED
    free = node_devices.copy()
    trial = free.copy()
    target_nodes, target_counts = nodes.copy(), counts.copy()
    waiting, running = np.empty(total + 1, dtype=np.int64), np.empty(capacity + 1, dtype=np.int64)
    spare, chosen = np.empty(capacity + 1, dtype=np.int64), np.empty(total + 1, dtype=np.int64)
    stopped = np.empty(capacity + 1, dtype=np.int64)
    waits, runs = 0, 0
    sizes = np.zeros(capacity + 1, dtype=np.int64)  # how many jobs, waiting or running, ask for so many devices
    least = capacity + 1
    wanted = 0
    ends = [(0.0, 0)]
    ends.pop()
    crossings = [(0.0, 0)]
    crossings.pop()
    patiences = [(0.0, 0)]
    patiences.pop()
    impatient = rules.patience < np.inf
    has_queues = len(thresholds) > 0
    bins = history.shape[1]
    efforts = np.zeros((total if order == HEADWAY else 1, bins))
    share = np.empty(bins)
    failed_strict = capacity + 1
    now, next_ask = 0.0, 0.0
    turn, arrived, decisions, events = 0, 0, 0, 0
    logged = 0

    while True:
        # When something happens next.
        while len(ends) > 0 and not (jobs[ends[0][1]].running and jobs[ends[0][1]].end == ends[0][0]):
            heapq.heappop(ends)
        soonest = ends[0][0] if len(ends) > 0 else np.inf
        if arrived < total:
            soonest = min(soonest, jobs[arrived].submit)
        wakes = np.inf
        if has_queues:
            while len(crossings) > 0 and jobs[crossings[0][1]].crossing != crossings[0][0]:
                heapq.heappop(crossings)
            if len(crossings) > 0:
                wakes = crossings[0][0]
        while len(patiences) > 0 and (
            patiences[0][0] <= now or not expects(jobs[patiences[0][1]], patiences[0][0], rules.patience)
        ):
            heapq.heappop(patiences)
        if len(patiences) > 0:
            wakes = min(wakes, patiences[0][0])
        if rules.quantum > 0 and waits > 0:
            wakes = min(wakes, next_ask)
        if wakes < np.inf:
            soonest = min(soonest, max(wakes, now))
        if soonest == np.inf:
            break
        now = soonest
        events += 1

        # Finishes, in the order of submission.
        while len(ends) > 0 and ends[0][0] <= now:
            _, number = heapq.heappop(ends)
            job = jobs[number]
            if not (job.running and job.end <= now):
                continue
            if rules.keep:
                log, logged = _log(log, logged, job, number, now, nodes, counts)
            leave(job, now)
            _give(job, free, nodes, counts, 1)
            job.finish = now
            place = 0
            while running[place] != number:
                place += 1
            for after in range(place, runs - 1):
                running[after] = running[after + 1]
            runs -= 1
            sizes[job.devices] -= 1
            wanted -= job.devices
            if order == HEADWAY:
                learn(history, rows[number], bounds, job.service, rules.memory)

        # Submissions. Under Gandiva, newcomers join the round where the one is that has had least.
        fewest = np.inf
        if order == GANDIVA and arrived < total and jobs[arrived].submit <= now:
            for place in range(runs):
                job = jobs[running[place]]
                fewest = min(fewest, job.ran + working(job, now) + job.joined)
            for place in range(waits):
                job = jobs[waiting[place]]
                fewest = min(fewest, job.ran + job.joined)
            fewest = 0.0 if fewest == np.inf else fewest
        while arrived < total and jobs[arrived].submit <= now:
            number = arrived
            arrived += 1
            turn += 1
            job = jobs[number]
            job.entered, job.since = turn, now
            job.joined = fewest if order == GANDIVA else 0.0
            sizes[job.devices] += 1
            least = min(least, job.devices)
            wanted += job.devices
            if order == HEADWAY:
                mixture(history, rows[number], rules.weight, share)
                expected_effort(share, bounds, efforts[number])
            set_key(job, now, order, ranks, efforts, number, rules.quantum)
            _insert(jobs, waiting, waits, number)
            waits += 1
            if impatient:
                heapq.heappush(patiences, (patience_ends(job, rules.patience), number))

        # Thresholds that were reached, in the order of submission.
        if has_queues:
            crossed = [0]
            crossed.pop()
            while len(crossings) > 0 and crossings[0][0] <= now:
                time, number = heapq.heappop(crossings)
                if jobs[number].crossing == time and number not in crossed:
                    crossed.append(number)
            crossed.sort()
            for number in crossed:
                job = jobs[number]
                while job.crossing <= now:
                    turn += 1
                    decisions += 1
                    if job.running:
                        job.entered, job.settled = turn, False
                        job.queue += 1
                    else:
                        _remove(jobs, waiting, waits, number)
                        job.entered, job.settled = turn, False
                        job.queue, job.level, job.level_wait = 0, 0.0, 0.0
                        job.promotions += 1
                        set_key(job, now, order, ranks, efforts, number, rules.quantum)
                        _insert(jobs, waiting, waits - 1, number)
                    set_crossing(job, thresholds, rules.knob)
                if job.crossing < np.inf:
                    heapq.heappush(crossings, (job.crossing, number))

        # Those whose patience is at an end go first.
        while len(patiences) > 0 and patiences[0][0] <= now:
            time, number = heapq.heappop(patiences)
            job = jobs[number]
            if expects(job, time, rules.patience) and not job.overdue:
                _remove(jobs, waiting, waits, number)
                job.overdue = True
                set_key(job, now, order, ranks, efforts, number, rules.quantum)
                _insert(jobs, waiting, waits - 1, number)

        # Who is to run where.
        if now >= next_ask:
            next_ask = now + rules.quantum
        if runs + waits == 0:
            continue
        while least <= capacity and sizes[least] == 0:
            least += 1
        arranging = turn
        seated, moving = 0, 0
        for place in range(len(free)):
            trial[place] = free[place]
        left = capacity - wanted
        everybody = left >= 0
        fallen = 0  # of those that run, how many must stop
        if not preemptive or (everybody and always_fits):
            # Those that run stay; the rest are placed in order.
            left = 0
            for count in free:
                left += count
            failed_strict = capacity + 1
            for place in range(waits):
                if left < least:
                    break
                number = waiting[place]
                job = jobs[number]
                used = -1
                if job.devices <= left:
                    arranging += 1
                    strict = rules.place == STRICT or (rules.place == SKEW and job.strict)
                    if not (strict and job.devices == failed_strict):
                        used = place_gang(job, trial, rack_of, rules, arranging, target_nodes, target_counts)
                        if used < 0 and strict:
                            failed_strict = job.devices
                if used >= 0:
                    _take_target(job, trial, target_nodes, target_counts, used)
                    left -= job.devices
                    chosen[seated] = number
                    seated += 1
                elif head_blocks or job.overdue:
                    break
        else:
            if dynamic:
                for place in range(runs):
                    set_key(jobs[running[place]], now, order, ranks, efforts, running[place], rules.quantum)
            _repair(jobs, running, runs, spare)
            # First for whom there are enough, in order.
            left = capacity
            runner, waiter, picked = 0, 0, 0
            while runner < runs or waiter < waits:
                if left < least:
                    break
                if waiter >= waits or (runner < runs and _before(jobs, running[runner], waiting[waiter])):
                    number = running[runner]
                    runner += 1
                else:
                    number = waiting[waiter]
                    waiter += 1
                job = jobs[number]
                if job.devices <= left:
                    left -= job.devices
                    job.chosen = True
                    chosen[picked] = number
                    picked += 1
                elif head_blocks:
                    break
            for place in range(runs):
                job = jobs[running[place]]
                if job.chosen:
                    job.target = 1
                else:
                    _give(job, trial, nodes, counts, 1)
            failed = False
            for position in range(picked):
                number = chosen[position]
                job = jobs[number]
                if job.target > 0:
                    continue
                arranging += 1
                used = place_gang(job, trial, rack_of, rules, arranging, target_nodes, target_counts)
                if used < 0:
                    used, arranging = _make_room(
                        jobs, chosen, picked, position, trial, rack_of, rules, arranging, nodes, counts,
                        target_nodes, target_counts,
                    )  # fmt: skip
                if used < 0:
                    failed = True
                else:
                    _take_target(job, trial, target_nodes, target_counts, used)
            if failed and not head_blocks:
                # What is left over goes to the rest: those that hold it, then those that wait.
                for place in range(runs):
                    job = jobs[running[place]]
                    if job.chosen:
                        continue
                    fits = True
                    for at in range(job.offset, job.offset + job.nodes):
                        fits = fits and trial[nodes[at]] >= counts[at]
                    if fits:
                        _give(job, trial, nodes, counts, -1)
                        job.target = 1
                left = 0
                for count in trial:
                    left += count
                failed_strict = capacity + 1
                for place in range(waits):
                    if left < least:
                        break
                    number = waiting[place]
                    job = jobs[number]
                    if job.chosen or job.devices > left:
                        continue
                    arranging += 1
                    strict = rules.place == STRICT or (rules.place == SKEW and job.strict)
                    if strict and job.devices == failed_strict:
                        continue
                    used = place_gang(job, trial, rack_of, rules, arranging, target_nodes, target_counts)
                    if used >= 0:
                        _take_target(job, trial, target_nodes, target_counts, used)
                        left -= job.devices
                        chosen[picked] = number
                        picked += 1
                    elif strict:
                        failed_strict = job.devices
            # A target that is the place it holds is no move.
            for position in range(picked):
                number = chosen[position]
                job = jobs[number]
                job.chosen = False
                if job.target == 2 and not job.running:
                    chosen[seated] = number
                    seated += 1
                elif job.target == 2:
                    same = job.target_nodes == job.nodes
                    for at in range(job.offset, job.offset + job.target_nodes):
                        same = same and target_nodes[at] == nodes[at] and target_counts[at] == counts[at]
                    if same:
                        job.target = 1
                    else:
                        spare[moving] = number
                        moving += 1
                else:
                    job.chosen = False
            # Stop those that are not to run.
            for place in range(runs):
                if jobs[running[place]].target == 0:
                    stopped[fallen] = running[place]
                    fallen += 1

        for place in range(fallen):
            number = stopped[place]
            job = jobs[number]
            job.preemptions += 1
            decisions += 1
            job.settled = False
            if rules.keep:
                log, logged = _log(log, logged, job, number, now, nodes, counts)
            _give(job, free, nodes, counts, 1)
            leave(job, now)
            set_crossing(job, thresholds, rules.knob)
            if job.crossing < np.inf:
                heapq.heappush(crossings, (job.crossing, number))
        for place in range(moving):
            number = spare[place]
            job = jobs[number]
            if rules.keep:
                log, logged = _log(log, logged, job, number, now, nodes, counts)
            _give(job, free, nodes, counts, 1)
            leave(job, now)
            job.migrations += 1
        if fallen > 0:
            kept = 0
            for place in range(runs):
                if jobs[running[place]].target > 0:
                    running[kept] = running[place]
                    kept += 1
            runs = kept
        if seated > 0:
            # They leave the line of those that wait, which keeps its order.
            taken = 0
            for place in range(waits):
                if taken < seated and jobs[waiting[place]].target == 2:
                    taken += 1
                    continue
                if taken == seated:
                    for rest in range(place, waits):
                        waiting[rest - taken] = waiting[rest]
                    break
                waiting[place - taken] = waiting[place]
            waits -= seated
        for place in range(fallen):
            number = stopped[place]
            set_key(jobs[number], now, order, ranks, efforts, number, rules.quantum)
            _insert(jobs, waiting, waits, number)
            waits += 1
            if impatient:
                heapq.heappush(patiences, (patience_ends(jobs[number], rules.patience), number))
        for place in range(seated + moving):
            number = chosen[place] if place < seated else spare[place - seated]
            job = jobs[number]
            turn += 1
            decisions += 1
            job.nodes = job.target_nodes
            for at in range(job.offset, job.offset + job.nodes):
                nodes[at], counts[at] = target_nodes[at], target_counts[at]
            _give(job, free, nodes, counts, -1)
            seat(job, now, costs, rack_of, nodes, counts)
            if job.overdue:
                job.overdue = False
                set_key(job, now, order, ranks, efforts, number, rules.quantum)
            heapq.heappush(ends, (job.end, number))
            set_crossing(job, thresholds, rules.knob)
            if job.crossing < np.inf:
                heapq.heappush(crossings, (job.crossing, number))
            if place < seated:
                running[runs] = number
                runs += 1
        for place in range(runs):
            job = jobs[running[place]]
            job.settled = True
            job.target = 0
    return decisions, events, log[:logged]
