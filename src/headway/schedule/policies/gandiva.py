"""Gandiva (Xiao et al., OSDI 2018): time slicing, packing of jobs that leave a device half idle, and migration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headway.schedule.entry import Entry
from headway.schedule.job import Job, ModelProfile
from headway.schedule.policies.ordering import Policy, View, Wish

__all__ = ["Gandiva"]


class Gandiva(Policy):
    """Round robin by device time, with packing and migration (sections 3 and 4).

    - time slicing: while jobs wait, those that have held devices longest in the current round give way each quantum:
      the order is by slices had, then by submission;
    - packing: a job that would wait shares the devices of one of the same size, the one with whom most is gained: by
      measured speeds of the pair, if together they do more than one alone, else where both are known to leave enough
      idle (utilisations that add up to at most 1). Gandiva tries pairs out and undoes what slows (section 3.3); with
      the speeds known before, such pairs are not formed;
    - migration: a job that runs spread is moved together when there is room and the move is paid for (`migrates`); one
      that is slowed by whom it shares with gets devices of its own when some are free that nobody else waits for.

    Gandiva minds efficiency, not completion times, and so is agnostic of sizes. Starvation: none: a job that has had
    fewer slices goes first, and a newcomer begins with as many as the one that had fewest.
    """

    name = "gandiva"
    migrates = True

    def __init__(self, quantum_seconds: float = 60.0, *, profiles: Mapping[str, ModelProfile] | None = None) -> None:
        self.quantum_seconds = quantum_seconds
        self.profiles = dict(profiles or {})
        self._slices: dict[int, float] = {}  # seconds of execution with which a job joined the round

    def submitted(self, entry: Entry, now: float) -> None:
        """A newcomer joins the round where the one is that had fewest slices, else it would shut all others out."""
        self._slices[entry.number] = -1.0

    def left(self, entry: Entry) -> None:
        """It leaves the round."""
        self._slices.pop(entry.number, None)

    def _had(self, entry: Entry, now: float) -> float:
        return entry.executed(now) + self._slices.get(entry.number, 0.0)

    def arrange(self, view: View) -> list[Wish]:
        """By whole slices had, those that run first; then whoever can be packed onto one of those."""
        old = [entry for entry in view.entries if self._slices.get(entry.number, 0.0) >= 0]
        fewest = min((self._had(entry, view.now) for entry in old), default=0.0)
        for number, joined in self._slices.items():
            if joined < 0:
                self._slices[number] = fewest

        def rank(entry: Entry) -> tuple:
            slices = self._had(entry, view.now) // self.quantum_seconds
            return (slices, not (entry.running and entry.host < 0), entry.number)

        ranked = sorted(view.entries, key=rank)
        left, wishes, hosts = view.capacity, [], []
        waiting = []
        for entry in ranked:
            if entry.job.devices <= left and not (entry.running and entry.host >= 0):
                left -= entry.job.devices
                wishes.append(Wish(entry, entry.job.devices))
                hosts.append(entry)
            else:
                waiting.append(entry)
        # Those that share already keep their partner, so that nobody moves for nothing.
        by_number = {host.number: host for host in hosts}
        guests = [entry for entry in waiting if entry.running and entry.host in by_number]
        alone = len(guests) == len(waiting)  # nobody waits for the devices that are left
        rest: list[Entry] = []
        for entry in waiting:
            if not (entry.running and entry.host in by_number):
                rest.append(entry)
            elif (
                alone
                and entry.job.devices <= left
                and self._leaves(entry, by_number[entry.host], view)
                and entry.job.devices <= self._room(entry.job, hosts, view)
            ):
                left -= entry.job.devices
                hosts.append(entry)
                wishes.append(Wish(entry, entry.job.devices))
            else:
                del by_number[entry.host]
                wishes.append(Wish(entry, entry.job.devices, host=entry.host))
        partners = _Partners(self, [host for host in hosts if host.number in by_number], view)
        for entry in rest:
            host = partners.best(entry.job)
            wishes.append(Wish(entry, entry.job.devices, host=-1 if host is None else host.number))
        return wishes

    def gain(self, job: Job, host: Job, kind: str, view: View) -> float:
        """What both get done on the devices of one, over what one would alone, less 1; at most 0: they stay apart."""
        pairs = view.pace.pairs
        if pairs is not None:
            speeds = []
            # Wherever they may be moved to together, neither may come to a halt.
            for place in {node.kind for node in view.fleet.nodes}:
                both = (
                    pairs.speed(job.model, host.model, job.devices, place),
                    pairs.speed(host.model, job.model, job.devices, place),
                )
                if both[0] == 0 or both[1] == 0:
                    return 0.0
                if place == kind:
                    speeds = [speed for speed in both if speed is not None]
            if len(speeds) == 2:
                return sum(speeds) - 1
        first, second = self.profiles.get(job.model), self.profiles.get(host.model)
        return 1.0 if first and second and first.utilisation + second.utilisation <= 1 else 0.0

    def _leaves(self, entry: Entry, host: Entry, view: View) -> bool:
        """Whether devices of its own would speed up one of the two, and it has worked longer than the move lasts."""
        kind = view.fleet.nodes[entry.counts[0][0]].kind
        speeds = (view.pace.shared_rate(entry.job, host.job, kind), view.pace.shared_rate(host.job, entry.job, kind))
        return min(speeds) < 1 and view.repays(entry)

    @staticmethod
    def _room(job: Job, hosts: Iterable[Entry], view: View) -> int:
        """Devices that it may use and that no other holds or is to start on. Those of nodes that are down count as if
        they were of these."""
        eligible = set(view.fleet.eligible(job))
        room = sum(view.fleet.nodes[place].devices for place in eligible) - (view.fleet.devices - view.capacity)
        for host in hosts:
            if host.running and host.host < 0:
                room -= sum(count for place, count in host.counts if place in eligible)
            else:
                room -= host.job.devices
        return room

    def snapshot(self) -> dict[str, float]:
        """With how much execution each job joined."""
        return {str(number): joined for number, joined in self._slices.items()}

    def restore(self, learned: dict[str, float]) -> None:
        """Take it back."""
        self._slices = {int(number): joined for number, joined in learned.items()}


class _Partners:
    """Jobs that share with nobody yet, by what matters for sharing: those alike are asked about once."""

    def __init__(self, policy: Gandiva, hosts: Sequence[Entry], view: View) -> None:
        self.policy = policy
        self.view = view
        self._alike: dict[tuple[int, tuple[str, ...]], dict[tuple[str, str], list[tuple[int, Entry]]]] = {}
        pairs = view.pace.pairs
        self._known = set(policy.profiles) | set(pairs.models if pairs is not None else ())
        for place, host in reversed(list(enumerate(hosts))):
            if host.job.model in self._known:
                node = host.counts[0][0] if host.counts else 0
                group = self._alike.setdefault((host.job.devices, host.job.kinds), {})
                group.setdefault((host.job.model, view.fleet.nodes[node].kind), []).append((place, host))

    def best(self, job: Job) -> Entry | None:
        """With whom most is gained, the first of several; None: nobody. It is taken then."""
        if job.model not in self._known:
            return None
        found, most = None, (0.0, 0)
        for (_, kind), alike in self._alike.get((job.devices, job.kinds), {}).items():
            if alike:
                place, host = alike[-1]
                gain = self.policy.gain(job, host.job, kind, self.view)
                if gain > 0 and (found is None or (gain, -place) > most):
                    found, most = alike, (gain, -place)
        return found.pop()[1] if found else None
