"""The options that name measured times, written once for all verbs that predict."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import typer

from headway.errors import FieldError

__all__ = ["Times", "Timing", "formulas_only", "with_measured_times"]

Times = Callable[[Any], Any]
"""From a cluster to the `MeasuredTimes` that the options name for its devices; None where they name none."""


class Timing(enum.StrEnum):
    """How operators and collectives are timed (`predict.timing`)."""

    catalog = "catalog"
    interpolated = "interpolated"
    linear = "linear"
    learned = "learned"


TimingOption = Annotated[
    Timing | None,
    typer.Option("--timing", help="How operators and collectives are timed; with --profile: learned."),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option("--profile", help="Measured times: a database, or a .csv or .json file (docs/profile.md)."),
]
ProfileDevice = Annotated[
    str | None, typer.Option("--profile-device", help="Whose times, where the file has several devices'.")
]
ProfileSource = Annotated[str | None, typer.Option("--profile-source", help="Who measured them, where several did.")]
ScaleProfile = Annotated[
    bool, typer.Option("--scale-profile", help="Take another device's times, scaled by what both can do.")
]
ProfileCluster = Annotated[
    str | None,
    typer.Option("--profile-cluster", help="The machines that were measured: with it collectives are scaled too."),
]


class _Options(NamedTuple):
    """What the options say; fields are named and ordered as they are on the command line."""

    profile: ProfileFile = None
    timing: TimingOption = None
    profile_device: ProfileDevice = None
    profile_source: ProfileSource = None
    scale_profile: ScaleProfile = False
    profile_cluster: ProfileCluster = None

    def check(self) -> None:
        """Raises FieldError for an option that says something about times, where no times are asked for."""
        if self.profile is not None or self.timing not in (None, Timing.catalog):
            return
        for name in ("profile_device", "profile_source", "scale_profile", "profile_cluster"):
            if getattr(self, name):
                raise FieldError(
                    "no measured times are asked for",
                    place=f"--{name.replace('_', '-')}",
                    remedy="add --profile FILE, or --timing learned for the user's own database",
                )

    def measured(self, cluster: Any) -> Any:
        """The measured times for the devices of `cluster`, or None."""
        from headway.hardware.catalog import load_cluster
        from headway.predict.measured import measured_times

        if self.profile is None and self.timing is None:
            return None
        return measured_times(
            self.profile, cluster, way=self.timing.value if self.timing is not None else "learned",
            device=self.profile_device, source=self.profile_source, scale=self.scale_profile,
            origin=load_cluster(self.profile_cluster) if self.profile_cluster is not None else None,
        )  # fmt: skip


def formulas_only(cluster: Any) -> None:
    """No measured times at all: the `Times` of a verb that was given none."""


def with_measured_times(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Give a verb the options of measured times in the place of its parameter `times`, which becomes a `Times`."""
    hints = get_type_hints(verb, include_extras=True)
    own = get_type_hints(_Options, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name != "times":
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        parameters += [
            inspect.Parameter(name, parameter.kind, default=_Options._field_defaults[name], annotation=own[name])
            for name in _Options._fields
        ]

    @functools.wraps(verb)
    def wrapped(**given: Any) -> Any:
        options = _Options(**{name: given.pop(name) for name in _Options._fields})
        options.check()
        return verb(**given, times=options.measured)

    # typer reads both to learn the options.
    wrapped.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
    wrapped.__dict__["__signature__"] = inspect.Signature(parameters)
    return wrapped
