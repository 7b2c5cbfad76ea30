"""How fast a job runs where it was put, and what it costs to stop and resume it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from headway.errors import InputError
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job, ModelProfile
from headway.value import Value

__all__ = ["MeasuredPairs", "Overhead", "Pace", "PlacementCosts", "Scaling"]


class Overhead(Value):
    """What stopping and resuming a job costs, in seconds during which its devices do no work for it.

    A job that was preempted pays for saving and restoring together when it resumes: `fixed_seconds` and twice its state
    over `storage_bytes_per_second`. Its state is `state_factor` x the bytes of its parameters (3: parameters and Adam's
    two moments). A job whose model is not known, or with no storage bandwidth said, pays `fixed_seconds` only. Jobs
    that can be switched without leaving the process pay `switch_seconds` instead. The first start costs
    `first_start_seconds`. After a failure, what was done since the last multiple of `checkpoint_seconds` in the run is
    lost (0: nothing is).
    """

    fixed_seconds: float = 0.0
    storage_bytes_per_second: float = 0.0
    state_factor: float = 3.0
    switch_seconds: float = 0.0
    first_start_seconds: float = 0.0
    checkpoint_seconds: float = 0.0

    def start(self, job: Job, profile: ModelProfile | None, *, resumed: bool) -> float:
        """Seconds between being given devices and working."""
        if not resumed:
            return self.first_start_seconds
        if job.switchable and self.switch_seconds:
            return self.switch_seconds
        if profile is None or not self.storage_bytes_per_second:
            return self.fixed_seconds
        state_bytes = self.state_factor * profile.parameter_bytes
        return self.fixed_seconds + 2 * state_bytes / self.storage_bytes_per_second

    def kept(self, worked_seconds: float) -> float:
        """Of so many seconds worked since the last start, those that survive a failure."""
        if not self.checkpoint_seconds:
            return worked_seconds
        return math.floor(worked_seconds / self.checkpoint_seconds) * self.checkpoint_seconds


class PlacementCosts(Protocol):
    """What `Pace` asks of predicted placements (placement/cost.py has them)."""

    def slowdown(self, model: str, nodes: Sequence[int], counts: Sequence[int]) -> float:
        """Of a job with `counts[i]` devices on node `nodes[i]` of the fleet, over the best placement; at least 1."""
        ...


class MeasuredPairs(Protocol):
    """What `Pace` asks of measured pairs of jobs (placement/pairs.py has them)."""

    @property
    def models(self) -> Collection[str]:
        """Those that were measured."""
        ...

    def speed(self, model: str, other: str, devices: int, kind: str = "") -> float | None:
        """Of a job of `model` beside one of `other` on the same devices, over its speed alone; None: not measured."""
        ...


class Pace:
    """Speed of a job relative to the run that its `duration_seconds` is of.

    - on several nodes: 1 / what `costs` predicts for that very placement; without `costs`, on more nodes than needed,
      1 / its model's `spread_slowdown` (`spread` off: places cost nothing);
    - on another kind of device: `throughputs` of the job, the slowest kind of the gang counting; a kind that the job
      has no figure for: 1;
    - with more or fewer devices than asked for: measured where `scaling` has the model (see policies/goodput.py), else
      (devices / asked) ** `exponent`.
    """

    def __init__(
        self,
        fleet: Fleet,
        profiles: Mapping[str, ModelProfile] | None = None,
        *,
        spread: bool = True,
        exponent: float = 0.9,
        scaling: Mapping[str, Scaling] | None = None,
        costs: PlacementCosts | None = None,
        pairs: MeasuredPairs | None = None,
    ) -> None:
        if not 0 < exponent <= 1:
            raise InputError(f"the exponent of scaling is {exponent}", place="pace", remedy="above 0, at most 1")
        self.fleet = fleet
        self.profiles = dict(profiles or {})
        self.spread = spread
        self.exponent = exponent
        self.scaling = dict(scaling or {})
        self.costs = costs
        self.pairs = pairs

    def profile(self, job: Job) -> ModelProfile | None:
        """What is known of the job's model, if anything."""
        return self.profiles.get(job.model)

    def rate(self, job: Job, nodes: Sequence[int], counts: Sequence[int]) -> float:
        """Speed on `counts[i]` devices of the node at place `nodes[i]` of the fleet."""
        devices = sum(counts)
        rate = 1.0
        if job.throughputs:
            rate = min(job.throughputs.get(self.fleet.nodes[node].kind, 1.0) for node in nodes)
        if devices != job.devices:
            rate *= self.speedup(job, devices)
        if not self.spread or len(nodes) < 2:
            return rate
        if self.costs is not None:
            rate /= self.costs.slowdown(job.model, nodes, counts)
        else:
            profile = self.profiles.get(job.model)
            if profile is not None and len(nodes) > self.fleet.fewest_nodes(job, devices):
                rate /= profile.spread_slowdown
        return rate

    def shared_rate(self, job: Job, other: Job, kind: str = "") -> float:
        """Speed of a job that shares its devices, of that kind, with another, over its speed alone.

        Measured where `pairs` has the two; 0: they can't share. Else they run at full speed together while their
        utilisations add up to at most 1, and share what there is beyond that (Gandiva's packing).
        """
        if self.pairs is not None:
            measured = self.pairs.speed(job.model, other.model, job.devices, kind)
            if measured is not None:
                return measured
        first, second = self.profiles.get(job.model), self.profiles.get(other.model)
        wanted = (first.utilisation if first else 1.0) + (second.utilisation if second else 1.0)
        return min(1.0, 1.0 / wanted)

    def speedup(self, job: Job, devices: int) -> float:
        """Speed with so many devices over the speed with those asked for, all well placed."""
        if devices == job.devices:
            return 1.0
        scaling = self.scaling.get(job.model)
        if scaling is not None:
            return scaling.goodput(devices) / scaling.goodput(job.devices)
        return (devices / job.devices) ** self.exponent


class Scaling:
    """What `Pace` asks of measured scaling: `goodput(devices)`, in any unit."""

    def goodput(self, devices: int) -> float:
        """Useful samples per second with so many devices."""
        raise NotImplementedError
