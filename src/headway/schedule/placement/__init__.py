"""Where a gang goes: `rules.py` picks nodes, `program.py` by a mixed-integer program.

What a place is worth to a model: `profiles.py` (how skewed it is, published slowdowns), `spread.py` (slowdowns
predicted for a cluster).
"""

from __future__ import annotations

from headway.schedule.placement.rules import (
    PLACEMENTS,
    BestFit,
    Consolidated,
    Counts,
    FirstFit,
    Placement,
    Random,
    SkewBased,
    make_placement,
)

__all__ = [
    "PLACEMENTS",
    "BestFit",
    "Consolidated",
    "Counts",
    "FirstFit",
    "Placement",
    "Random",
    "SkewBased",
    "make_placement",
]
