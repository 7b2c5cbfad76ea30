"""Whether an error says no more than that another rank went away: then the cause is to be looked for there."""

from __future__ import annotations

import re

from headway import errors

__all__ = ["causes", "is_consequence", "lost_peer"]

# What a rank says when it was another one that died under it.
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused)|connection.*by peer|broken pipe|socket timeout|remote process exited"
    r"|failed to (connect|recv|send)|recvvalue failed|ncclremoteerror|unhandled system error|timed out|store.*timeout",
    re.IGNORECASE,
)


def is_consequence(error: dict) -> bool:
    """Whether an `error` event (`train.events`) says no more than that another rank went away."""
    if error.get("kind") in errors.__all__:
        return False
    return bool(
        error.get("kind") in ("DistBackendError", "DistNetworkError", "DistStoreError")
        or _CONSEQUENCE.search(str(error.get("message", "")))
    )


def causes(error: BaseException) -> list[BaseException]:
    """An error, or those of single ranks that torch's checkpoints have put into it; the last one lies deepest."""
    failures = getattr(error, "failures", {})
    return [inner for found, _ in failures.values() for inner in causes(found)] if failures else [error]


def lost_peer(error: BaseException) -> RuntimeError | None:
    """The error of a collective whose other side has gone, if `error` is one or (torch's checkpoints) is made of one.

    A file system's errors are none, whatever they say: those are no RuntimeErrors.
    """
    for each in causes(error):
        if isinstance(each, RuntimeError) and is_consequence({"kind": type(each).__name__, "message": str(each)}):
            return each
    return None
