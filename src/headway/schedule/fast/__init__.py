"""The compiled twin of the pure machine.

`engine.py` takes it where it knows the rules. Compiled are `kernels.py`, `story.py`, `places.py` and `costs.py`.
"""

from __future__ import annotations

from headway.schedule.fast.engine import ENGINES, replay_of, run, why_not

__all__ = ["ENGINES", "replay_of", "run", "why_not"]
