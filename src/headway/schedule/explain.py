"""Why a job waits, at any time: who is before it, what is missing, and what would change that.

`why` only reads: it asks the policy for its order and the placement for a place, as the scheduler itself does.
"""

from __future__ import annotations

import math

from headway.errors import InputError
from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import Wish
from headway.schedule.scheduler import Scheduler
from headway.units import format_seconds
from headway.value import Value

__all__ = ["Blocker", "Explanation", "why"]


class Blocker(Value):
    """A job that holds or is reserved devices before the one asked about. `until`: when it leaves its queue, if it
    does by itself (-1: not known)."""

    job: str
    devices: int
    running: bool
    until: float = -1.0


class Explanation(Value):
    """The state of one job at `now`.

    - `state`: "running" or "waiting"; `queue`: its queue by attained service, the first is 0; `attained`:
      device-seconds; `waited_seconds`: since it last had devices, or came.
    - `place`: how many are before it in the order; `free_devices`: free now, of those that it can use;
      `missing_devices`: how many more it needs beyond what is not taken by those before it.
    - `reason`: "runs", "devices" (too few are free), "scattered" (enough are free, in bad places), "head of line"
      (nobody may overtake), "quota", "nodes down", or "order" (its turn has not been asked for yet).
    - `blockers`: those because of whom, nearest in the order first; `changes`: what would let it start, in words.
    """

    job: str
    now: float
    state: str
    reason: str
    queue: int
    attained: float
    waited_seconds: float
    place: int
    needed_devices: int
    free_devices: int
    missing_devices: int
    blockers: tuple[Blocker, ...] = ()
    changes: tuple[str, ...] = ()

    def text(self) -> str:
        """In words, one fact a line."""
        lines = [f"{self.job} {'runs' if self.state == 'running' else 'waits'}: {_WORDS[self.reason]}"]
        lines.append(
            f"queue {self.queue}, {self.attained:.6g} device-seconds attained, {self.place} before it in the order"
        )
        if self.state == "waiting":
            lines.append(
                f"waiting for {format_seconds(self.waited_seconds)}; needs {self.needed_devices} devices,"
                f" {self.free_devices} are free, {self.missing_devices} missing"
            )
        for blocker in self.blockers:
            until = f", leaves its queue at {blocker.until:.6g} s" if blocker.until >= 0 else ""
            lines.append(
                f"blocked by {blocker.job}: {blocker.devices} devices, {'runs' if blocker.running else 'waits'}{until}"
            )
        lines.extend(f"would change it: {change}" for change in self.changes)
        return "\n".join(lines)


_WORDS = {
    "runs": "it has its devices",
    "devices": "too few devices are left by those before it",
    "scattered": "enough devices are free, but not where it has to be",
    "head of line": "a job before it does not fit, and nobody may overtake",
    "quota": "its queue holds as many devices as it may",
    "nodes down": "too few nodes are up",
    "order": "it will start when the order is next asked for",
}


def why(scheduler: Scheduler, job: str, now: float | None = None) -> Explanation:
    """The state of `job` at `now` (default: the last event). Raises InputError for one that neither waits nor runs."""
    entry = scheduler.entry(job)
    if entry is None:
        raise InputError("neither waits nor runs", place=f"job {job}", remedy="it is done, refused or was never there")
    return _Inquiry(scheduler, entry, scheduler.now if now is None else now).answer()


class _Inquiry:
    def __init__(self, scheduler: Scheduler, entry: Entry, now: float) -> None:
        self.scheduler = scheduler
        self.entry = entry
        self.now = now
        learned = scheduler.policy.snapshot()
        self.wishes = scheduler.order(now)
        if learned is not None:
            scheduler.policy.restore(learned)  # asking must not count as a round
        self.place = next(place for place, wish in enumerate(self.wishes) if wish.entry is entry)
        self.needed = self.wishes[self.place].devices or entry.job.smallest
        seating = scheduler.seating
        self.eligible = scheduler.fleet.eligible(entry.job)
        self.free = sum(seating.counts[node] for node in self.eligible)
        self.available = sum(scheduler.fleet.nodes[node].devices for node in self.eligible if seating.up[node])

    def answer(self) -> Explanation:
        if self.entry.running:
            return self._made("runs", 0, (), self._running_changes())
        quota = self._over_quota()
        if quota:
            held = [wish for wish in self.wishes if wish.entry.running and self._same_queue(wish)]
            change = f"a quota of {quota} more devices for {self.entry.job.queue or 'its queue'}"
            return self._made("quota", quota, held, (change, *self._clock_changes()))
        if self.available < self.needed:
            missing = self.needed - self.available
            return self._made("nodes down", missing, (), (f"nodes with {missing} more devices coming up",))
        before = self._before()
        left = self.available - sum(wish.devices for wish in before)
        if left < self.needed:
            missing = self.needed - left
            return self._made("devices", missing, before, self._device_changes(left))
        head = self._head()
        if head is not None:
            changes = (f"{head.entry.job.name} starting or being cancelled", *self._clock_changes())
            return self._made("head of line", 0, (head,), changes)
        found = self.scheduler.placement.place(
            self.entry.job, self.needed, self.scheduler.seating.counts, self.scheduler.fleet, 0
        )
        if found is None and self.free >= self.needed:
            fewest = self.scheduler.fleet.fewest_nodes(self.entry.job, self.needed)
            change = f"{self.needed} devices free together on {fewest} node{'s' if fewest > 1 else ''}"
            changes = (change, "a placement that lets it be spread", *self._clock_changes())
            return self._made("scattered", 0, self._on_best_nodes(), changes)
        return self._made("order", 0, (), self._clock_changes())

    def _made(self, reason, missing, blockers, changes) -> Explanation:
        entry = self.entry
        return Explanation(
            job=entry.job.name, now=self.now, state="running" if entry.running else "waiting", reason=reason,
            queue=entry.queue, attained=entry.attained(self.now), place=self.place, needed_devices=self.needed,
            waited_seconds=0.0 if entry.running else self.now - entry.since, free_devices=self.free,
            missing_devices=missing, changes=tuple(changes),
            blockers=tuple(self._blocker(wish) for wish in reversed(list(blockers))),
        )  # fmt: skip

    def _blocker(self, wish: Wish) -> Blocker:
        entry = wish.entry
        until = entry.crossing if entry.running and entry.crossing < math.inf else -1.0
        return Blocker(job=entry.job.name, devices=entry.devices or wish.devices, running=entry.running, until=until)

    def _same_queue(self, wish: Wish) -> bool:
        return wish.entry.job.queue == self.entry.job.queue

    def _over_quota(self) -> int:
        """How many devices more its queue would have to be allowed; 0: enough."""
        allowed = self.scheduler.quotas.get(self.entry.job.queue)
        if allowed is None:
            return 0
        preemptive = self.scheduler.policy.preemptive
        held = sum(
            wish.devices
            for place, wish in enumerate(self.wishes)
            if self._same_queue(wish) and wish.entry.running and (place < self.place or not preemptive)
        )
        return max(0, held + self.needed - allowed)

    def _before(self) -> list[Wish]:
        """Those whose devices it cannot have: who runs, and under a preemptive policy only those before it."""
        eligible = set(self.eligible)

        def uses(wish: Wish) -> bool:
            return wish.entry.running and wish.entry.host < 0 and any(node in eligible for node, _ in wish.entry.counts)

        if self.scheduler.policy.preemptive:
            return [wish for wish in self.wishes[: self.place] if uses(wish)]
        return [wish for wish in self.wishes if uses(wish)]

    def _head(self) -> Wish | None:
        for wish in self.wishes[: self.place]:
            if not wish.entry.running and wish.devices:
                overdue = self.scheduler.is_overdue(wish.entry, self.now)
                if self.scheduler.policy.head_blocks or overdue:
                    return wish
        return None

    def _on_best_nodes(self) -> list[Wish]:
        """Who holds devices of the node where most are free: those that would have to go for it to start."""
        counts = self.scheduler.seating.counts
        best = max(self.eligible, key=lambda node: (counts[node], -node))
        return [wish for wish in self.wishes if any(node == best for node, _ in wish.entry.counts)]

    def _running_changes(self) -> tuple[str, ...]:
        if self.entry.crossing < math.inf:
            return (f"it moves to queue {self.entry.queue + 1} at {self.entry.crossing:.6g} s",)
        return ()

    def _device_changes(self, left: int) -> tuple[str, ...]:
        changes = [f"{self.needed - left} devices given back by those before it"]
        if left > 0:
            changes.append(f"asking for {left} devices: so many are left for it")
        kinds = self.entry.job.kinds
        if kinds:
            others = sum(self.scheduler.seating.counts) - self.free
            if others >= self.needed:
                changes.append(f"being able to use other kinds than {', '.join(kinds)}: {others} devices are free")
        leaving = [wish.entry.crossing for wish in self._before() if wish.entry.crossing < math.inf]
        if leaving and self.scheduler.policy.preemptive:
            changes.append(f"at {min(leaving):.6g} s the first of those before it leaves its queue")
        return (*changes, *self._clock_changes())

    def _clock_changes(self) -> tuple[str, ...]:
        changes = []
        if self.entry.crossing < math.inf:
            changes.append(f"at {self.entry.crossing:.6g} s it goes back to the first queue")
        ends = self.entry.patience_ends(self.scheduler.patience_seconds)
        if self.now < ends < math.inf:
            changes.append(f"at {ends:.6g} s its patience ends, and it goes before all others")
        return tuple(changes)
