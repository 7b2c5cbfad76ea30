"""Policies by the names that a user writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headway.errors import InputError
from headway.schedule.policies.fifo import Fifo, FirstFitFifo, YarnCapacity
from headway.schedule.policies.ordering import Policy
from headway.schedule.policies.shortest import (
    ShortestJobFirst,
    ShortestRemainingServiceFirst,
    ShortestRemainingTimeFirst,
    SmallestFirst,
)
from headway.schedule.policies.tiresias import (
    THRESHOLDS,
    DiscretisedGittins,
    DiscretisedLas,
    Las,
    TwoDimensionalGittins,
    TwoDimensionalLas,
)

__all__ = ["POLICIES", "make_policy"]


def _history(options: dict[str, Any], name: str) -> Sequence[float]:
    history = options.get("history")
    if not history:
        raise InputError(
            "needs the services of past jobs", place=f"policy {name}", remedy="give a history (read_history reads one)"
        )
    return history


def _quantum(options: dict[str, Any], default: float = 60.0) -> float:
    return options.get("quantum_seconds") or default


def _gandiva(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.gandiva import Gandiva

    return Gandiva(_quantum(options), profiles=options.get("profiles"))


def _themis(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.fairness import Themis

    return Themis(_quantum(options, 600.0))


def _max_min(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.fairness import MaxMin

    return MaxMin(_quantum(options, 360.0))


def _gavel(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.gavel import Gavel

    return Gavel(_quantum(options, 360.0))


def _optimus(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.elastic import Optimus

    return Optimus(_quantum(options, 600.0))


def _pollux(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.elastic import Pollux

    return Pollux(_quantum(options, 60.0))


def _recurring(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.recurring import QuasiShortestServiceFirst

    return QuasiShortestServiceFirst()


def _headway(options: dict[str, Any]) -> Policy:
    from headway.schedule.policies.headway import HeadwayPolicy

    return HeadwayPolicy()


def _las(options: dict[str, Any]) -> Policy:
    return DiscretisedLas(options.get("thresholds") or THRESHOLDS, promote_knob=options.get("promote_knob", 0.0))


def _gittins(options: dict[str, Any]) -> Policy:
    return DiscretisedGittins(
        _history(options, "2d-gittins"),
        options.get("thresholds") or THRESHOLDS,
        promote_knob=options.get("promote_knob", 0.0),
    )


def _continuous_gittins(options: dict[str, Any]) -> Policy:
    history = _history(options, "2d-gittins-continuous")
    return TwoDimensionalGittins(history, quantum_seconds=_quantum(options))


_MAKERS: dict[str, Callable[[dict[str, Any]], Policy]] = {
    "fifo": lambda options: Fifo(),
    "first-fit-fifo": lambda options: FirstFitFifo(),
    "yarn": lambda options: YarnCapacity(),
    "sf": lambda options: SmallestFirst(),
    "sjf": lambda options: ShortestJobFirst(),
    "srtf": lambda options: ShortestRemainingTimeFirst(),
    "srsf": lambda options: ShortestRemainingServiceFirst(),
    "las": lambda options: Las(_quantum(options)),
    "2d-las-continuous": lambda options: TwoDimensionalLas(_quantum(options)),
    "2d-las": _las,
    "2d-gittins": _gittins,
    "2d-gittins-continuous": _continuous_gittins,
    "gandiva": _gandiva,
    "themis": _themis,
    "max-min": _max_min,
    "gavel": _gavel,
    "optimus": _optimus,
    "pollux": _pollux,
    "qssf": _recurring,
    "headway": _headway,
}

POLICIES = tuple(_MAKERS)


def make_policy(name: str, **options: Any) -> Policy:
    """The policy of that name (see `POLICIES`), made new: a policy that learns belongs to one run.

    Options, each used by those that need it: `history` (services of past jobs, for Gittins), `thresholds`,
    `promote_knob`, `quantum_seconds`, `profiles`. Raises InputError for an unknown name or a missing history.
    """
    maker = _MAKERS.get(name)
    if maker is None:
        raise InputError(f"no policy is named {name!r}", place="policy", remedy=f"one of: {', '.join(POLICIES)}")
    return maker(options)
