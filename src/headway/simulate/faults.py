"""What goes wrong during a simulated run, as data: devices lost, devices that slow down, links degraded or down.

A fault says when it happens and to what, and nothing about its consequences: those follow from the simulation. Faults
go to and from JSON and YAML (`Faults`), and people write one in a line (`parse_fault`)::

    lost=node0/gpu3@1.5s                      the device is gone from 1.5 s on
    slow=node0/gpu3*2@1.5s                    from then on it needs twice the time
    link=node0/nic0->network*0.1@1.5s+20s     the link keeps a tenth of its bandwidth, for 20 s
    link=node0/nic0->network*0@1.5s           the link is down
"""

from __future__ import annotations

import math
import re

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.units import parse_seconds
from headway.value import Value

__all__ = ["DeviceLost", "DeviceSlowed", "Fault", "Faults", "LinkChanged", "parse_fault", "parse_straggler"]


class DeviceLost(Value, tag="device lost", tag_field="fault"):
    """From `seconds` on, `device` does nothing any more.

    The others go on until they need something of it. `detection_seconds` later (a time-out, a missed heartbeat) all
    ranks are stopped; `restart_seconds` after that they begin again, on a device put in its place, with the step that
    follows the last checkpoint.
    """

    seconds: float
    device: str
    detection_seconds: float = 30.0
    restart_seconds: float = 60.0


class DeviceSlowed(Value, tag="device slowed", tag_field="fault"):
    """From `seconds` on, `device` takes `factor` times as long to compute; for `lasts_seconds` (0: for good)."""

    seconds: float
    device: str
    factor: float
    lasts_seconds: float = 0.0


class LinkChanged(Value, tag="link changed", tag_field="fault"):
    """From `seconds` on, the link from `source` to `target` has `scale` of its bandwidth, 0: none; both directions if
    `both_ways`; for `lasts_seconds` (0: for good).

    Communication takes other ways round a link that is down, if there are any. Where there are none it stalls, and
    unless the link is back by then, all ranks are stopped after `detection_seconds` and begin again
    `restart_seconds` later, the link repaired.
    """

    seconds: float
    source: str
    target: str
    scale: float = 0.0
    both_ways: bool = True
    lasts_seconds: float = 0.0
    detection_seconds: float = 30.0
    restart_seconds: float = 60.0


Fault = DeviceLost | DeviceSlowed | LinkChanged


class Faults(Value):
    """Faults as a file: `Faults.load("faults.yaml").faults`."""

    faults: tuple[Fault, ...] = ()

    def validate(self, plan: Plan, cluster: Cluster) -> Faults:
        """These faults, or InputError naming the one that cannot happen to this plan on this cluster."""
        links = {(link.source, link.target) for link in cluster.links}
        for position, fault in enumerate(self.faults):
            place = f"faults[{position}]"
            for field, value in fault.to_builtins().items():
                if field.endswith("seconds") and not 0 <= value < math.inf:
                    raise InputError("must be 0 or more", place=f"{place}.{field}", remedy="give seconds")
            if isinstance(fault, LinkChanged):
                ends = (fault.source, fault.target)
                if ends not in links or (fault.both_ways and ends[::-1] not in links):
                    raise InputError(
                        f"no link leads from {fault.source} to {fault.target}" + (" and back" * fault.both_ways),
                        place=place,
                        remedy=f"name the ends of a link of {cluster.name}",
                    )
                if not 0 <= fault.scale < math.inf:
                    raise InputError(f"a scale of {fault.scale:g}", place=f"{place}.scale", remedy="0 is down")
                continue
            if fault.device not in plan.devices:
                raise InputError(
                    f"the plan does not use a device {fault.device!r}",
                    place=f"{place}.device",
                    remedy="name one of the plan's devices",
                )
            if isinstance(fault, DeviceSlowed) and not 0 < fault.factor < math.inf:
                raise InputError(f"a factor of {fault.factor:g}", place=f"{place}.factor", remedy="2 is half as fast")
        return self


_LINE = re.compile(
    r"(?P<kind>lost|slow|link)=(?P<what>[^@*]+?)(\*(?P<number>[\d.eE+-]+))?@(?P<at>[^+]+)(\+(?P<lasts>.+))?"
)


def parse_fault(text: str) -> Fault:
    """The fault that a line like `slow=node0/gpu3*2@1.5s` describes (see the head of this module).

    Raises InputError; QuantityError for what is no time.
    """
    found = _LINE.fullmatch(text.strip())
    kind = found["kind"] if found else ""
    ends = found["what"].split("->") if found else []
    complete = found is not None and (
        (kind == "lost" and found["number"] is None and found["lasts"] is None)
        or (kind == "slow" and found["number"] is not None)
        or (kind == "link" and len(ends) == 2)
    )
    if found is None or not complete:
        raise InputError(
            f"{text!r} is no fault",
            place="--fault",
            remedy="lost=DEVICE@1.5s, slow=DEVICE*2@1.5s, or link=FROM->TO*0.1@1.5s; +20s at the end: for so long",
        )
    seconds = parse_seconds(found["at"])
    lasts = parse_seconds(found["lasts"]) if found["lasts"] else 0.0
    try:
        number = float(found["number"]) if found["number"] else 0.0
    except ValueError:
        raise InputError(f"{found['number']!r} is no number", place=f"--fault {text}") from None
    if kind == "lost":
        return DeviceLost(seconds=seconds, device=found["what"])
    if kind == "slow":
        return DeviceSlowed(seconds=seconds, device=found["what"], factor=number, lasts_seconds=lasts)
    source, target = (end.strip() for end in ends)
    return LinkChanged(seconds=seconds, source=source, target=target, scale=number, lasts_seconds=lasts)


def parse_straggler(text: str) -> tuple[int, float]:
    """The rank and the factor that `5=2.0` names: rank 5 takes twice the time. Raises InputError."""
    rank, _, factor = text.partition("=")
    try:
        return int(rank), float(factor)
    except ValueError:
        raise InputError(
            f"{text!r} is no straggler", place="--straggler", remedy="write RANK=FACTOR, for instance 5=2.0"
        ) from None
