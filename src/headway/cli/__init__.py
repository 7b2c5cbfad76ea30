"""The verbs: each parses its options, calls one function, and prints.

Answers go to standard output (`--json` for machines), everything else to standard error. Exit codes: 0 done; 2 bad
input; 3 nothing fits; 4 the run failed; 130 stopped by Ctrl-C, in good order.
"""

from __future__ import annotations

import signal

# Importing a module registers its verbs, in this order.
from headway.cli import planning, profiles, running, simulating  # noqa: F401
from headway.cli.application import app

# isort: split
from headway.cli import clusters  # noqa: F401  - after the verbs of `simulating`, whose group it joins

__all__ = ["app", "main"]


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The `headway` command."""
    # A verb that is terminated cleans up as it does for Ctrl-C: no process is left behind.
    signal.signal(signal.SIGTERM, _terminated)
    app()
