"""Every exception that Headway raises on purpose.

The tree; the number is the exit code of the command line::

    HeadwayError                     1
    ├── InputError                   2   what the user gave cannot be used
    │   ├── FileError                    a file is missing, unreadable or cannot be written
    │   ├── FieldError                   a field of a file is unknown, missing or has the wrong value
    │   ├── QuantityError                "80GBit" is not a number of bytes
    │   ├── ClusterError                 the machines described cannot exist
    │   │   └── DisconnectedError        two devices that must talk have no path between them
    │   ├── TraceError                   the model cannot be traced
    │   ├── PlanError                    the plan contradicts itself, the model or the machines
    │   ├── ProgramError                 a program does not do what its collective promises
    │   └── MissingExtraError            an optional library is not installed
    ├── DoesNotFitError              3   no plan (or not this plan) fits into the memory at hand
    ├── RunError                     4   training started and could not go on
    │   ├── RankFailedError              a rank died or raised
    │   ├── CheckpointError              a checkpoint could not be written or read
    │   ├── MismatchError                ranks submitted tensors that do not fit together
    │   └── StalledError                 a rank did not submit what the others wait for
    └── Interrupted                130   stopped by Ctrl-C or SIGTERM, in good order

Each says what is wrong, where (file, field, rank), and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClusterError",
    "DisconnectedError",
    "DoesNotFitError",
    "FieldError",
    "FileError",
    "HeadwayError",
    "InputError",
    "Interrupted",
    "MismatchError",
    "MissingExtraError",
    "PlanError",
    "ProgramError",
    "QuantityError",
    "RankFailedError",
    "RunError",
    "StalledError",
    "TraceError",
]


class HeadwayError(Exception):
    """What was wrong (`message`), where (`place`), and what would be right (`remedy`)."""

    exit_code = 1

    def __init__(self, message: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.place}: {self.message}" if self.place else self.message
        return f"{text}\n  hint: {self.remedy}" if self.remedy else text

    def __reduce__(self):
        # Keyword-only fields would be lost by the default protocol, and Ray sends exceptions between processes.
        return (_rebuild, (type(self), self.message, self.place, self.remedy))


def _rebuild(kind: type[HeadwayError], message: str, place: str, remedy: str) -> HeadwayError:
    return kind(message, place=place, remedy=remedy)


class InputError(HeadwayError):
    """What the user gave cannot be used."""

    exit_code = 2


class FileError(InputError):
    """A file is missing, unreadable or cannot be written."""


class FieldError(InputError):
    """A field of a file is unknown, missing or has the wrong value."""


class QuantityError(InputError):
    """A text is not a quantity of the kind asked for."""


class ClusterError(InputError):
    """The machines described cannot exist."""


class DisconnectedError(ClusterError):
    """Two devices that must talk have no path between them."""


class TraceError(InputError):
    """The model cannot be traced."""


class PlanError(InputError):
    """The plan contradicts itself, the model or the machines."""


class ProgramError(InputError):
    """A program contradicts itself, or does not do what its collective promises."""


class MissingExtraError(InputError):
    """An optional library is not installed."""

    def __init__(self, message: str = "", *, library: str = "", extra: str = "", place: str = "", remedy: str = ""):
        super().__init__(
            message or f"{library} is not installed",
            place=place,
            remedy=remedy or f"install it with: pip install 'headway[{extra}]'",
        )


class DoesNotFitError(HeadwayError):
    """No plan, or not this plan, fits into the memory at hand."""

    exit_code = 3


class RunError(HeadwayError):
    """Training started and could not go on."""

    exit_code = 4


class RankFailedError(RunError):
    """A rank died or raised."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read."""


class MismatchError(RunError):
    """Ranks submitted tensors that do not fit together: another shape, dtype, operation or root."""


class StalledError(RunError):
    """A rank did not submit, in time, what the others wait for."""


class Interrupted(HeadwayError):
    """Stopped by Ctrl-C or SIGTERM, in good order."""

    exit_code = 130
