"""A job as the scheduler sees it: what it asks for, what it has had, and what it is like."""

from __future__ import annotations

import math

from headway.errors import InputError
from headway.value import Value

__all__ = ["Job", "ModelProfile"]


class ModelProfile(Value):
    """What the scheduler knows of a job's model.

    - `skew`: bytes of the largest tensor over bytes of all: the higher, the more a job suffers when its ranks are
      spread over nodes (Tiresias, Gu et al., NSDI 2019, section 3.3).
    - `parameter_bytes`: of all parameters; what preemption saves and restores is proportional to it.
    - `spread_slowdown`: run time spread over nodes at random, over run time on as few nodes as possible; at least 1.
    - `utilisation`: share of a device that one job of it keeps busy, by which two jobs may be packed on one.
    """

    name: str
    skew: float = 0.0
    parameter_bytes: float = 0.0
    spread_slowdown: float = 1.0
    utilisation: float = 1.0


class Job(Value):
    """One training job. Times in seconds since the beginning of the trace; `devices` are a gang, all or nothing.

    - `duration_seconds`: run time on `devices` devices, well placed; what only clairvoyant policies may look at.
    - `kinds`: device kinds that it can use, empty: any. `memory_bytes`: what it needs of each device.
    - `minimum_devices`, `maximum_devices`: the elastic range; 0: not elastic.
    - `user`, `queue`: whose it is and which quota it counts against.
    - `throughputs`: device kind to speed relative to the kind that `duration_seconds` is for.
    - `switchable`: it can be switched without leaving its process, at the cost of a switch.
    """

    name: str
    submit_seconds: float
    devices: int
    duration_seconds: float
    model: str = ""
    user: str = ""
    queue: str = ""
    kinds: tuple[str, ...] = ()
    memory_bytes: float = 0.0
    minimum_devices: int = 0
    maximum_devices: int = 0
    iterations: int = 0
    weight: float = 1.0
    throughputs: dict[str, float] = {}
    switchable: bool = False

    @property
    def smallest(self) -> int:
        """The fewest devices that it can run on."""
        return self.minimum_devices or self.devices

    @property
    def largest(self) -> int:
        """The most devices that it can use."""
        return self.maximum_devices or self.devices

    @property
    def service(self) -> float:
        """Device-seconds that it needs in all: `duration_seconds` x `devices`."""
        return self.duration_seconds * self.devices

    def validate(self, *, place: str = "job") -> Job:
        """This job, or InputError naming the field."""
        if self.devices < 1:
            raise InputError(f"asks for {self.devices} devices", place=f"{place}: devices", remedy="at least 1")
        if not self.duration_seconds > 0:
            raise InputError(f"lasts {self.duration_seconds} s", place=f"{place}: duration", remedy="above 0")
        if not self.duration_seconds < math.inf:
            raise InputError("never ends", place=f"{place}: duration", remedy="a finite number of seconds")
        if not 0 <= self.submit_seconds < math.inf:
            raise InputError(f"submitted at {self.submit_seconds} s", place=f"{place}: submit", remedy="0 or more")
        if not self.smallest <= self.devices <= self.largest or self.minimum_devices < 0:
            raise InputError(
                f"asks for {self.devices} devices, outside its range of {self.smallest} to {self.largest}",
                place=f"{place}: minimum_devices",
                remedy="minimum_devices <= devices <= maximum_devices; 0: not elastic",
            )
        if not 0 < self.weight < math.inf:
            raise InputError(f"has weight {self.weight}", place=f"{place}: weight", remedy="above 0")
        for kind, speed in self.throughputs.items():
            if not 0 < speed < math.inf:
                raise InputError(f"runs at {speed} on {kind}", place=f"{place}: throughputs", remedy="above 0")
        return self
