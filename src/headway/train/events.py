"""What a rank tells its launcher: one JSON object a line, on the file descriptor that HEADWAY_EVENTS_FD names.

Without that variable events go nowhere, so a script runs the same under plain `python` and under `torchrun`.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

__all__ = ["emit"]


def emit(event: str, **fields: Any) -> None:
    """Write one event. A launcher that has gone away is not an error: the rank ends by its own means."""
    descriptor = os.environ.get("HEADWAY_EVENTS_FD")
    if descriptor is None:
        return
    line = msgspec.json.encode({"event": event, **fields}) + b"\n"
    try:
        while line:
            line = line[os.write(int(descriptor), line) :]
    except BrokenPipeError:
        # Nobody listens any more. Do not try again: the next write would only fail in the same way.
        os.environ.pop("HEADWAY_EVENTS_FD", None)
