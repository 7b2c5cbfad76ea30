"""One training step played event by event: what overlaps, who waits for whom, and what goes wrong.

How long each thing takes alone is what `Predictor.parts` says, so that a decision costs the same in both readers. What
follows from their interplay is played here: each device has streams (compute, collectives inside layers, collectives of
its replicas, sends), a stream does one thing after the other, and what one waits for another starts later. Nothing of
the closed form's assumptions about the schedule enters; docs/simulate.md tells where the two agree.

- Ranks that are alike are played once (`simulate.symmetry`); stragglers, faults and jitter split only who differs.
- A pass of one micro-batch through a stage is one piece of work, unless something happens between its layers:
  parameters that are gathered a layer ahead (ZeRO), gradients that leave while backward goes on, or a medium shared
  with others. Then it goes layer by layer.
- Collectives of replicas begin when the last of them is there. Communication of several axes that uses the same ports
  or network interfaces of a device shares them max-min fairly (`simulate.streams`).
- Faults are data (`simulate.faults`). A lost device stalls whoever needs it; after the detection all ranks begin again
  behind the last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from headway.errors import InputError
from headway.plan.plan import Plan
from headway.predict.step import Predictor
from headway.simulate.attempt import Attempt
from headway.simulate.faults import DeviceSlowed, Fault, Faults, LinkChanged
from headway.simulate.played import Played, StepSimulation
from headway.simulate.setting import Setting
from headway.simulate.streams import Pace

__all__ = ["simulate_step"]


def simulate_step(
    predictor: Predictor,
    plan: Plan,
    *,
    steps: int = 1,
    stragglers: Mapping[int, float] | None = None,
    jitter: float = 0.0,
    faults: Sequence[Fault] = (),
    checkpoint_steps: int = 1,
    seed: int = 0,
) -> StepSimulation:
    """Play `steps` steps of `plan`, one behind the other.

    `stragglers`: rank to the factor by which its device is slower. `jitter`: standard deviation of the logarithm of
    what every pass takes on every rank, its mean unchanged; drawn from `seed`. After a restart the run goes on behind
    the last multiple of `checkpoint_steps`. The plan is taken as valid. Raises InputError for ranks, factors and
    faults that cannot be.
    """
    slower = dict(stragglers or {})
    for rank, factor in slower.items():
        if not 0 <= rank < plan.world_size or not 0 < factor < math.inf:
            raise InputError(
                f"rank {rank} at {factor:g} times the time",
                place="--straggler",
                remedy=f"give a rank below {plan.world_size} and a factor above 0",
            )
    for name, value, least in (("steps", steps, 1), ("checkpoint_steps", checkpoint_steps, 1), ("jitter", jitter, 0.0)):
        if not least <= value < math.inf:
            raise InputError(f"{value:g} is too little", place=name, remedy=f"give at least {least:g}")
    Faults(faults=tuple(faults)).validate(plan, predictor.cluster)
    setting = Setting(predictor, plan, slower, jitter, tuple(faults), seed)
    return _play(setting, steps, checkpoint_steps)


def _play(setting: Setting, steps: int, checkpoint_steps: int) -> StepSimulation:
    """Attempt after attempt, until all steps are done."""
    gone: set[int] = set()
    begun, first = 0.0, 0
    attempts: list[Played] = []
    while True:
        fatal = _next_fatal(setting, gone, begun)
        deadline = math.inf
        if fatal is not None:
            fault = setting.faults[fatal]
            assert not isinstance(fault, DeviceSlowed)
            deadline = max(begun, fault.seconds) + fault.detection_seconds
        attempt = Attempt(setting, gone, begun, first, steps)
        played = attempt.play(deadline)
        attempts.append(played)
        if fatal is None or played.is_complete:
            break
        fault = setting.faults[fatal]
        assert not isinstance(fault, DeviceSlowed)
        gone.add(fatal)
        if isinstance(fault, LinkChanged):  # all links are repaired together
            gone |= {
                at for at, each in enumerate(setting.faults) if each in setting.links.cut and each.seconds <= deadline
            }
        begun = deadline + fault.restart_seconds
        # Steps done since the checkpoint are done again.
        first = (first + len(played.ends)) // checkpoint_steps * checkpoint_steps
    works = [work.stages for work in setting.works]
    offloads = [work.once.offload for work in setting.works]
    return StepSimulation(setting.plan, setting.kinds, tuple(attempts), steps, works, _paces(setting, gone), offloads)


def _paces(setting: Setting, gone: set[int]) -> dict[tuple[int, int], tuple[Pace, Pace]]:
    """For the teams whose ranks are not equally fast: each rank's own pace, and that of all together."""
    apart = set(setting.slower) | {
        setting.rank_of[fault.device] for fault in setting.faults if isinstance(fault, DeviceSlowed)
    }
    found = {}
    for number, kind in enumerate(setting.kinds):
        ranks = kind.one.ranks
        if len(ranks) > 1 and apart & set(ranks):
            together = setting.pace_of(ranks, gone)
            for position, rank in enumerate(ranks):
                found[number, position] = (setting.pace_of((rank,), gone), together)
    return found


def _next_fatal(setting: Setting, gone: set[int], begun: float) -> int | None:
    """The first fault still to come after which the job must begin again."""
    found = None
    for position, fault in enumerate(setting.faults):
        if position in gone or isinstance(fault, DeviceSlowed):
            continue
        if isinstance(fault, LinkChanged):
            back = fault.seconds + fault.lasts_seconds if fault.lasts_seconds else math.inf
            if fault not in setting.links.cut or back <= max(begun, fault.seconds) + fault.detection_seconds:
                continue
        if found is None or fault.seconds < setting.faults[found].seconds:
            found = position
    return found
