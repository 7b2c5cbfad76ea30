"""What the scheduler is told, and what it decides: plain values, so that both can live in a log.

`Submit`, `Progress`, `Finish`, `Fail` and `Cancel` are about one job; `NodeDown` and `NodeUp` about one machine;
`Quota` about whose jobs may hold how many devices; `Tick` and `Crossing` only say that time has passed, which is what
the scheduler asks for by `wakes_at`.
"""

from __future__ import annotations

from headway.schedule.job import Job
from headway.value import Value

__all__ = [
    "Cancel",
    "Crossing",
    "Decision",
    "Demote",
    "Event",
    "Fail",
    "Finish",
    "Migrate",
    "NodeDown",
    "NodeUp",
    "Preempt",
    "Progress",
    "Promote",
    "Quota",
    "Refuse",
    "Resize",
    "Share",
    "Start",
    "Submit",
    "Tick",
]


class Share(Value):
    """Devices of one node, by their numbers in it."""

    node: str
    devices: tuple[int, ...]


class Submit(Value, tag="submit"):
    """A job arrives."""

    job: Job


class Tick(Value, tag="tick"):
    """Time has passed."""


class Crossing(Value, tag="crossing"):
    """Time has passed, and the attained service of a job has reached the threshold of its queue."""

    job: str


class Progress(Value, tag="progress"):
    """A running job reports how many seconds of its work (at the reference speed of its `duration_seconds`) are done.

    It corrects what the scheduler assumed from the predicted pace.
    """

    job: str
    seconds: float


class Finish(Value, tag="finish"):
    """A job has done all of its work."""

    job: str


class Fail(Value, tag="fail"):
    """A running job died; it waits again, from its last checkpoint."""

    job: str


class NodeDown(Value, tag="node-down"):
    """A machine is lost; its jobs wait again, from their last checkpoints."""

    node: str


class NodeUp(Value, tag="node-up"):
    """A machine is back."""

    node: str


class Cancel(Value, tag="cancel"):
    """The owner takes a job back."""

    job: str


class Quota(Value, tag="quota"):
    """Jobs of `queue` (see Job) may hold so many devices together; -1: as many as they like."""

    queue: str
    devices: int


Event = Submit | Tick | Crossing | Progress | Finish | Fail | NodeDown | NodeUp | Cancel | Quota


class Start(Value, tag="start"):
    """A job begins or resumes on these devices; its work goes on after `overhead_seconds`, at `rate` times the
    reference speed."""

    job: str
    shares: tuple[Share, ...]
    overhead_seconds: float = 0.0
    rate: float = 1.0
    shared_with: str = ""


class Preempt(Value, tag="preempt"):
    """A job gives its devices back and waits; its progress is kept. `reason`: "order", "failed" or "node down"."""

    job: str
    reason: str = "order"


class Migrate(Value, tag="migrate"):
    """A running job moves to other devices, as many as before."""

    job: str
    shares: tuple[Share, ...]
    overhead_seconds: float = 0.0
    rate: float = 1.0


class Resize(Value, tag="resize"):
    """A running job goes on with more or fewer devices."""

    job: str
    shares: tuple[Share, ...]
    overhead_seconds: float = 0.0
    rate: float = 1.0


class Promote(Value, tag="promote"):
    """A job that has waited long goes back to the first queue."""

    job: str
    queue: int


class Demote(Value, tag="demote"):
    """A job has attained the threshold of its queue."""

    job: str
    queue: int


class Refuse(Value, tag="refuse"):
    """A job is not taken, and why. It holds nothing and preempts nothing."""

    job: str
    reason: str


Decision = Start | Preempt | Migrate | Resize | Promote | Demote | Refuse
