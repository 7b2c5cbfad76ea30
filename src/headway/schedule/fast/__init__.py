"""The compiled twin of the pure machine.

`engine.py` takes it where it knows the rules; `kernels.py` and `places.py` are what is compiled.
"""

from __future__ import annotations

from headway.schedule.fast.engine import ENGINES, replay_of, run, why_not

__all__ = ["ENGINES", "replay_of", "run", "why_not"]
