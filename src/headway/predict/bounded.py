"""Profiles whose rates never fall: what Alpa makes of measurements, and what that says of a size between two others.

Alpa gives a size whose rate (bytes per second) is below that of a smaller one just that rate (`make_monotonic` in its
`mesh_profiling.py`), and sends nothing where a tensor has too few elements to be divided. So some of its times are
bounds and no measurements; and between two sizes that are known a time can be neither longer than the smaller one's
rate makes it, nor shorter than the larger one's.

Curves are kept as logarithms of seconds at the sizes 2 ** (k / PER_DOUBLING) bytes, k = 0, 1, ...
"""

from __future__ import annotations

import math

import numpy as np

from headway.errors import HeadwayError
from headway.predict.database import Group
from headway.predict.timing import Curve
from headway.workload.graph import dtype_bytes

__all__ = [
    "PER_DOUBLING",
    "at_a_bound",
    "between_rates",
    "item_bytes",
    "never_falling_rates",
    "sends_nothing",
    "with_rates_that_never_fall",
]

PER_DOUBLING = 4


def item_bytes(group: Group) -> int:
    """Bytes of an element of what the group sends; 4 for a dtype that is not known."""
    try:
        return dtype_bytes(group.dtype)
    except (HeadwayError, KeyError, AttributeError):
        return 4


def sends_nothing(group: Group, size: float) -> bool:
    """Whether a tensor has too few elements to be divided among the members, in a profile that rounds down."""
    if group.group_size == 1 or group.kind not in ("all_gather", "reduce_scatter", "all_to_all"):
        return False
    parts = group.group_size**2 if group.kind == "all_to_all" else group.group_size
    return size / item_bytes(group) < parts


def never_falling_rates(known: dict[Group, Curve]) -> bool:
    """Whether no rate is below that of a smaller size, and a good part of them just at it.

    Alpa makes its profiles so (`make_monotonic`): a size whose rate is below that of a smaller one is given that rate.
    Measured noise never is so orderly, and a law without noise has no two rates that are equal.
    """
    pairs = sum(len(curve.sizes) - 1 for curve in known.values())
    bounds = sum(int(at_a_bound(curve).sum()) for curve in known.values())
    if pairs < 100 or bounds < 0.02 * pairs:
        return False
    rates = (curve.sizes / curve.seconds for curve in known.values())
    return all(bool(np.all(np.diff(rate) >= -1e-6 * rate[1:])) for rate in rates)


def at_a_bound(curve: Curve) -> np.ndarray:
    """Which points have just the rate of the point before: their time is a lower bound, not a measurement."""
    rate = curve.sizes / curve.seconds
    return np.concatenate([[False], np.abs(np.diff(rate)) < 1e-6 * rate[1:]])


def with_rates_that_never_fall(drawn: np.ndarray, first: int) -> np.ndarray:
    """The curve after what Alpa does to sizes that double from `first`: each has at least the rate of a smaller one."""
    drawn = drawn.copy()
    for at in range(first + PER_DOUBLING, len(drawn)):
        drawn[at] = min(drawn[at], drawn[at - PER_DOUBLING] + math.log(2))
    return drawn


def between_rates(profiled: np.ndarray, drawn: np.ndarray, curve: Curve) -> np.ndarray:
    """`profiled` within the limits that the two measured sizes around each place set where rates never fall.

    The smaller size's rate makes the longest time that can be, the larger one's the shortest. Where `drawn`, the time
    that the profile would not give, is beyond the longest, the profile has the longest.
    """
    if len(curve.sizes) < 2:
        return profiled
    grid = np.arange(len(profiled)) * math.log(2) / PER_DOUBLING
    sizes, seconds = np.log(curve.sizes), np.log(curve.seconds)
    above = np.searchsorted(sizes, grid - 1e-9)
    inside = (above > 0) & (above < len(sizes))
    above = np.clip(above, 1, len(sizes) - 1)
    inside &= sizes[above] - grid > 1e-9  # what was measured stays
    longest = seconds[above - 1] + grid - sizes[above - 1]
    shortest = seconds[above] + grid - sizes[above]
    found = np.where(drawn >= longest, longest, np.clip(profiled, shortest, np.maximum(shortest, longest)))
    return np.where(inside, found, profiled)
