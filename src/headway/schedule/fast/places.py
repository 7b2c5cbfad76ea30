"""The compiled twin of placement/rules.py: the same rules over arrays, for `kernels.py`.

A rule writes (node, devices of it) into `nodes` and `counts` from `at` on, and returns how many nodes it took, or -1 if
the gang is to wait. `free[i]` devices are free on node i, and no node has more than `largest`.
"""

from __future__ import annotations

import numpy as np

from headway.compiled import compiled

__all__ = ["PLACES", "SKEW", "STRICT", "place_gang"]

PLACES = ("first-fit", "best-fit", "consolidated", "consolidated-strict", "random", "skew")
FIRST_FIT, BEST_FIT, CONSOLIDATED, STRICT, RANDOM, SKEW = range(6)
"""The rules, by the numbers that `RUN` has for them."""


@compiled()
def _mixed(word):
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@compiled()
def _first_fit(devices, free, at, nodes, counts):
    used = 0
    for node in range(len(free)):
        if free[node] >= devices:
            nodes[at + used], counts[at + used] = node, devices
            return used + 1
        if free[node] > 0:
            nodes[at + used], counts[at + used] = node, free[node]
            devices -= free[node]
            used += 1
    return -1


@compiled()
def _snuggest(devices, free):
    found, fewest = -1, 0
    for node in range(len(free)):
        count = free[node]
        if count >= devices and (found < 0 or count < fewest):
            if count == devices:
                return node
            found, fewest = node, count
    return found


@compiled()
def _best_fit(devices, free, largest, at, nodes, counts):
    found = _snuggest(devices, free)
    if found >= 0:
        nodes[at], counts[at] = found, devices
        return 1
    used = 0
    for size in range(1, largest + 1):
        for node in range(len(free)):
            if free[node] == size:
                if size >= devices:
                    nodes[at + used], counts[at + used] = node, devices
                    return used + 1
                nodes[at + used], counts[at + used] = node, size
                devices -= size
                used += 1
    return -1


@compiled()
def _fewest(devices, free, rack_of, rack, largest, at, nodes, counts):
    """In one rack (-1: in all): the emptiest nodes first, the remainder where it fits best."""
    used = 0
    for size in range(largest, 0, -1):
        for node in range(len(free)):
            if free[node] != size or (rack >= 0 and rack_of[node] != rack):
                continue
            if size >= devices:
                found, least = -1, 0
                for other in range(len(free)):
                    count = free[other]
                    if count > size or (count == size and other < node) or (rack >= 0 and rack_of[other] != rack):
                        continue
                    if count >= devices and (found < 0 or count < least):
                        found, least = other, count
                        if count == devices:
                            break
                nodes[at + used], counts[at + used] = found, devices
                return used + 1
            nodes[at + used], counts[at + used] = node, size
            devices -= size
            used += 1
    return -1


@compiled()
def _consolidated(devices, free, rack_of, racks, largest, strict, fewest, at, nodes, counts):
    found = _snuggest(devices, free)
    if found >= 0:
        nodes[at], counts[at] = found, devices
        return 1
    if strict and fewest == 1:
        return -1
    used = _fewest(devices, free, rack_of, -1, largest, at, nodes, counts)
    if used < 0:
        return -1
    together = True
    for place in range(1, used):
        together = together and rack_of[nodes[at + place]] == rack_of[nodes[at]]
    if not together:
        inner_nodes, inner_counts = np.empty(used, dtype=np.int64), np.empty(used, dtype=np.int64)
        for rack in range(racks):
            # A rack that needs more nodes than all together is of no use: look no further than that many.
            within = _fewest_bounded(devices, free, rack_of, rack, largest, used, inner_nodes, inner_counts)
            if within > 0:
                for place in range(within):
                    nodes[at + place], counts[at + place] = inner_nodes[place], inner_counts[place]
                used = within
                break
    if strict and used > fewest:
        return -1
    return used


@compiled()
def _fewest_bounded(devices, free, rack_of, rack, largest, most, nodes, counts):
    """As `_fewest`, -1 if it takes more than `most` nodes."""
    needed, left = 0, devices
    for size in range(largest, 0, -1):
        for node in range(len(free)):
            if left > 0 and free[node] == size and rack_of[node] == rack:
                left -= size
                needed += 1
    if left > 0 or needed > most:
        return -1
    return _fewest(devices, free, rack_of, rack, largest, 0, nodes, counts)


@compiled()
def _random(devices, free, seed, turn, at, nodes, counts):
    total = 0
    for count in free:
        total += count
    if total < devices:
        return -1
    left = free.copy()
    taken = np.zeros(len(free), dtype=np.int64)
    state = _mixed(seed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(turn))
    for _ in range(devices):
        state = _mixed(state + np.uint64(0x9E3779B97F4A7C15))
        drawn = np.int64(state % np.uint64(total))
        for node in range(len(left)):
            if drawn < left[node]:
                left[node] -= 1
                taken[node] += 1
                break
            drawn -= left[node]
        total -= 1
    used = 0
    for node in range(len(free)):
        if taken[node]:
            nodes[at + used], counts[at + used] = node, taken[node]
            used += 1
    return used


@compiled()
def place_gang(job, free, rack_of, rules, turn, nodes, counts):
    """How many nodes the job takes, written at its offset; -1: none."""
    devices, at, place = job.devices, job.offset, rules.place
    if place == FIRST_FIT:
        return _first_fit(devices, free, at, nodes, counts)
    if place == BEST_FIT or (place == SKEW and not job.strict):
        return _best_fit(devices, free, rules.largest_node, at, nodes, counts)
    if place == RANDOM:
        return _random(devices, free, rules.seed, turn, at, nodes, counts)
    strict = place != CONSOLIDATED
    return _consolidated(
        devices, free, rack_of, rules.racks, rules.largest_node, strict, job.fewest, at, nodes, counts
    )  # fmt: skip
