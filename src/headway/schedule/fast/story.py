"""One job's story in the compiled twin: its row, and what happens to the row when it waits, runs and stops.

The rules are those of `headway.schedule.entry` and of the policies; see kernels.py.
"""

from __future__ import annotations

import numpy as np

from headway.compiled import compiled
from headway.schedule.fast.costs import slowdown

__all__ = [
    "FIXED",
    "GANDIVA",
    "HEADWAY",
    "JOB",
    "ORDERS",
    "RUN",
    "expects",
    "leave",
    "patience_ends",
    "seat",
    "set_crossing",
    "set_key",
    "working",
]

JOB = np.dtype(
    [
        # What is known before: times in seconds; `base` and `spread` are rates, well placed and not; `cost` is the row
        # of the table that predicts what places cost it, -1: `spread` says it.
        ("submit", "f8"), ("duration", "f8"), ("devices", "i8"), ("base", "f8"), ("spread", "f8"), ("fewest", "i8"),
        ("first_cost", "f8"), ("resume_cost", "f8"), ("strict", "b1"), ("offset", "i8"), ("fixed_key", "f8"),
        ("joined", "f8"), ("cost", "i8"),
        # As the fields of `Entry`.
        ("running", "b1"), ("since", "f8"), ("begun", "f8"), ("rate", "f8"), ("worked", "f8"), ("service", "f8"),
        ("ran", "f8"), ("waited", "f8"), ("overhead", "f8"), ("overhead_service", "f8"), ("level", "f8"),
        ("level_wait", "f8"), ("queue", "i8"), ("entered", "i8"), ("settled", "b1"), ("crossing", "f8"),
        ("started", "f8"), ("starts", "i8"), ("preemptions", "i8"), ("migrations", "i8"), ("promotions", "i8"),
        ("finish", "f8"), ("nodes", "i8"), ("overdue", "b1"),
        # Of this arranging: its key, whether chosen, its target (0: none, 1: what it holds, 2: another place).
        ("end", "f8"), ("key", "f8"), ("key2", "f8"), ("chosen", "b1"), ("target", "i8"), ("target_nodes", "i8"),
    ]
)  # fmt: skip
"""One row a job: what is known of it, and what `Entry` remembers."""

ORDERS = ("fixed", "srtf", "srsf", "las", "2d-las-continuous", "queues", "headway", "gandiva")
"""Kinds of key. "fixed": `fixed_key` of the row; "queues": by the rank of the queue, those that run, and entering."""
FIXED, SRTF, SRSF, LAS, SERVICE, QUEUES, HEADWAY, GANDIVA = range(8)
RUN = np.dtype(
    [
        ("order", "i8"), ("place", "i8"), ("preemptive", "b1"), ("head_blocks", "b1"), ("quantum", "f8"),
        ("knob", "f8"), ("seed", "u8"), ("racks", "i8"), ("largest_node", "i8"), ("keep", "b1"), ("weight", "f8"),
        ("memory", "f8"), ("patience", "f8"),
    ]
)  # fmt: skip
"""The rules of a run, one row."""


@compiled()
def working(job, now):
    """Seconds that it has worked since it was given its devices."""
    return now - job.begun if job.running and now > job.begun else 0.0


@compiled()
def leave(job, now):
    """It gives its devices back."""
    worked = working(job, now)
    held = now - job.since
    job.worked += worked * job.rate
    job.service += worked * job.devices
    job.level += worked * job.devices
    job.ran += worked
    job.overhead += held - worked
    job.overhead_service += (held - worked) * job.devices
    job.running = False
    job.since = now
    job.crossing = np.inf


@compiled()
def seat(job, now, costs, rack_of, nodes, counts):
    """It is given the devices that `nodes` and `counts` say."""
    if not job.running:
        job.waited += now - job.since
        job.level_wait += now - job.since if job.level > 0 else 0.0
    if job.started < 0:
        job.started = now
    cost = job.resume_cost if job.starts > 0 else job.first_cost
    job.starts += 1
    job.running = True
    job.since = now
    job.begun = now + cost
    if job.cost >= 0:
        job.rate = job.base
        if job.nodes > 1:
            job.rate /= slowdown(job.cost, job.devices, costs, rack_of, job.offset, job.nodes, nodes, counts)
    else:
        job.rate = job.spread if job.nodes > 1 and job.nodes > job.fewest else job.base
    job.end = job.begun + (job.duration - job.worked) / job.rate


@compiled()
def patience_ends(job, patience):
    """When it will have waited too long; its patience doubles with each start."""
    return job.since + patience * (1 << min(job.starts, 30))


@compiled()
def expects(job, time, patience):
    """Whether it waits, and its patience ends at that time."""
    return not job.running and np.isnan(job.finish) and patience_ends(job, patience) == time


@compiled()
def set_crossing(job, thresholds, knob):
    """When it reaches the threshold of its queue, or has waited enough to be promoted."""
    job.crossing = np.inf
    if job.running:
        if job.queue < len(thresholds):
            job.crossing = job.begun + (thresholds[job.queue] - job.level) / job.devices
    elif knob > 0 and job.queue > 0 and job.level > 0:
        job.crossing = job.since + max(0.0, knob * job.level / job.devices - job.level_wait)


@compiled()
def set_key(job, now, order, ranks, efforts, number, quantum):
    """Where it stands in the order."""
    job.key2 = 0.0
    if job.overdue:
        job.key, job.key2 = -np.inf, job.since
    elif order == FIXED:
        job.key = job.fixed_key
    elif order in (SRTF, SRSF):
        left = job.duration - (job.worked + working(job, now) * job.rate)
        job.key = left * job.devices if order == SRSF else left
    elif order == LAS:
        job.key = job.ran + working(job, now)
    elif order == SERVICE:
        job.key = job.service + working(job, now) * job.devices
    elif order == QUEUES:
        job.key = 2.0 * ranks[job.queue] + (0.0 if job.settled else 1.0)
        job.key2 = job.entered
    elif order == GANDIVA:
        job.key = (job.ran + working(job, now) + job.joined) // quantum
        job.key2 = 0.0 if job.running else 1.0
    elif job.running:
        job.key = efforts[number, job.queue] - job.resume_cost * job.devices
    else:
        cost = job.resume_cost if job.starts > 0 else job.first_cost
        job.key = efforts[number, job.queue] + cost * job.devices
