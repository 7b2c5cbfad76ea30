"""Times learned from measurements: of groups, meshes and sizes that were measured, and of those that were not.

pipeDejavu fits one straight line per collective; `timing.Linear` is that, for comparison. Here three layers stand on
each other:

1. **A physical model with few constants.** A collective costs a start, a step for each member and for each doubling of
   the nodes, what it moves over the links inside a node or through the node's shared network, and, in between, the
   filling of the pipeline, which grows with the square root of the size (a message cut into the best number of pieces:
   Sanders, Speck, Träff, Parallel Computing 2009). Constants are found by least squares of *relative* errors, none
   negative.
2. **Boosted trees** on what that leaves over, on features of size, group and topology, not on the name of the mesh: so
   both carry over to meshes that nobody measured.
3. **What was measured.** Where the group itself was measured, or one of the same topology on another mesh, the curve is
   drawn through the points; between them it has the shape that the model gives it.

Bounds come from cross-validation: whole topologies left out for groups that were not measured, sizes left out for
those that were.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from headway.errors import HeadwayError, InputError
from headway.hardware.catalog import find_accelerator
from headway.hardware.cluster import Accelerator
from headway.predict.boosting import Trees, boost
from headway.predict.bounded import (
    PER_DOUBLING,
    at_a_bound,
    between_rates,
    item_bytes,
    never_falling_rates,
    sends_nothing,
    with_rates_that_never_fall,
)
from headway.predict.database import Group, Measurement
from headway.predict.timing import PRODUCTS, Curve, Estimate, Query, Timing, curves, one_device

__all__ = ["Learned", "topology"]

_LOW, _HIGH = 0.05, 0.95
# The curve of a group is kept from 1 byte to 2**_DOUBLINGS.
_DOUBLINGS = 44
_TOPOLOGY_FOLDS = 6
_SIZE_FOLDS = 3

_Places = tuple[Group, ...]


class _Traffic(NamedTuple):
    """Bytes moved for each byte of a collective: over a member's links in the node, and through a node's network."""

    local: float
    network: float


def _traffic(group: Group) -> _Traffic:
    """Of rings, except that an all-reduce over two nodes is a tree: each sends everything once.

    In NCCL's double binary tree over two nodes, each is the root of one half: it sends that half down and the other one
    up, 1 byte for each byte. From three nodes on a node in the middle sends 2, and the ring's 2 (n-1)/n are less.
    """
    n, m = group.group_size, group.members_per_node
    if n == 1:
        return _Traffic(1.0, 0.0)  # a copy within the device
    ring = {"all_reduce": 2 * (n - 1) / n, "all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n}
    within = (n - 1) / n**2 if group.kind == "all_to_all" else ring.get(group.kind, 1.0)
    if group.spans == 1:
        return _Traffic(within, 0.0)
    if group.kind == "all_to_all":
        outside = m * (n - m) / n**2
    elif group.kind == "all_reduce" and group.spans == 2:
        outside = 1.0
    else:
        outside = within
    return _Traffic(0.0, outside * group.sharing)


def _pattern(group: Group) -> tuple[str, int, int]:
    """What the bandwidth within a node depends on: kind, members, and, of more than two, how far they are apart."""
    return group.kind, group.group_size, group.stride if group.group_size > 2 else 1


@cache
def topology(group: Group) -> tuple[str, int, int, int, int, int]:
    """What a group's time depends on, size aside: the same on every mesh that has it, and, in bytes, in every dtype."""
    stride = _pattern(group)[2] if group.spans == 1 else 0
    return group.kind, group.group_size, group.members_per_node, group.spans, group.sharing, stride


class _Rows(NamedTuple):
    """Measured points to fit: the group of each, bytes and seconds."""

    groups: _Places
    size: np.ndarray
    seconds: np.ndarray

    def where(self, chosen: np.ndarray) -> _Rows:
        return _Rows(tuple(self.groups[at] for at in np.flatnonzero(chosen)), self.size[chosen], self.seconds[chosen])


class _Model:
    """Layers 1 and 2: seconds of any group and size."""

    def __init__(self, rows: _Rows) -> None:
        self.kinds = sorted({group.kind for group in rows.groups})
        self._starts: dict[Group, float] = {}
        self.rates: dict[tuple[str, int, int], float] = {}
        for group, size, seconds in zip(rows.groups, rows.size, rows.seconds, strict=True):
            if group.spans == 1:
                rate = _traffic(group).local * size / seconds
                self.rates[_pattern(group)] = max(rate, self.rates.get(_pattern(group), 0.0))
        self.leaves_node = any(group.spans > 1 for group in rows.groups)
        self.constants: dict[str, np.ndarray] = {}
        kind = np.array([group.kind for group in rows.groups])
        columns = self._columns(rows.groups, rows.size)
        for name in self.kinds:
            self.constants[name] = _relative_fit(columns[kind == name], rows.seconds[kind == name])
        physical = self._physical(rows.groups, columns)
        self.trees: Trees | None = None
        if len(rows.size) >= 100:
            features = self._features(rows.groups, rows.size, physical)
            self.trees = boost(features, np.log(rows.seconds / physical))

    def rate(self, group: Group) -> float:
        """Bytes per second within a node, at best: of the pattern itself, or of the one most like it."""
        wanted = _pattern(group)
        if wanted in self.rates:
            return self.rates[wanted]
        known = [pattern for pattern in self.rates if (pattern[1] == 1) == (wanted[1] == 1)]
        if not known:
            return math.inf

        def unlike(pattern: tuple[str, int, int]) -> tuple:
            kind, members, stride = pattern
            return (
                abs(math.log2(members / wanted[1])) + 0.5 * (kind != wanted[0]),
                abs(math.log2(max(stride, 1) / max(wanted[2], 1))),
                pattern,
            )

        return self.rates[min(known, key=unlike)]

    def seconds(self, groups: _Places, size: np.ndarray) -> np.ndarray:
        """Seconds of each group at each size in bytes."""
        physical = self._physical(groups, self._columns(groups, size))
        if self.trees is None:
            return physical
        return physical * np.exp(self.trees.predict(self._features(groups, size, physical)))

    def start_seconds(self, group: Group) -> float:
        """What the smallest message costs."""
        if group not in self._starts:
            self._starts[group] = float(self._columns((group,), np.zeros(1))[0] @ self.constants[group.kind])
        return self._starts[group]

    def _columns(self, groups: _Places, size: np.ndarray) -> np.ndarray:
        made: dict[Group, tuple[float, ...]] = {}
        for group in groups:
            if group not in made:
                traffic = _traffic(group)
                n = group.group_size
                made[group] = (
                    float(n > 1), n * float(n > 1), math.log2(group.spans), traffic.local / self.rate(group),
                    traffic.network, traffic.network * math.log2(group.sharing), n,
                )  # fmt: skip
        several, steps, levels, local, network, crowded, n = (
            np.array([made[group] for group in groups]).reshape(-1, 7).T
        )
        inside, outside = local * size, network * size
        return np.stack(
            [
                np.ones(len(size)), several, steps, levels, inside, np.sqrt(inside), outside, crowded * size,
                np.sqrt(outside * n),
            ],
            axis=1,
        )  # fmt: skip

    def _physical(self, groups: _Places, columns: np.ndarray) -> np.ndarray:
        constants = np.array([self.constants[group.kind] for group in groups]).reshape(columns.shape)
        return np.sum(columns * constants, axis=1)

    def _features(self, groups: _Places, size: np.ndarray, physical: np.ndarray) -> np.ndarray:
        made: dict[Group, tuple[float, ...]] = {}
        for group in groups:
            if group not in made:
                stride = 0 if group.spans > 1 else _pattern(group)[2]
                made[group] = (
                    self.kinds.index(group.kind), group.group_size, group.members_per_node, group.spans, group.sharing,
                    stride, item_bytes(group), self.start_seconds(group),
                )  # fmt: skip
        table = np.array([made[group] for group in groups])
        return np.column_stack([table[:, :-1], np.log2(np.maximum(size, 1.0)), np.log2(physical / table[:, -1])])


def _relative_fit(columns: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants, none below 0, for which `columns` @ constants is closest to `seconds` in relative error.

    Coordinate descent on the squares, weighted again and again so that large errors count about by their size.
    """
    relative = columns / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale
    constants = np.zeros(columns.shape[1])
    weight = np.ones(len(seconds))
    for _ in range(4):
        weighted = relative * weight[:, None]
        squares, right = weighted.T @ weighted, weighted.T @ weight
        gradient = squares @ constants - right
        for _ in range(3000):
            moved = 0.0
            for at in range(len(constants)):
                if squares[at, at] > 0:
                    change = max(-constants[at], -gradient[at] / squares[at, at])
                    if change:
                        constants[at] += change
                        gradient += squares[:, at] * change
                        moved = max(moved, abs(change) * math.sqrt(squares[at, at]))
            if moved < 1e-7:
                break
        weight = 1 / np.sqrt(1 + 5 * np.abs(relative @ constants - 1))
    return constants / scale


# ---------------------------------------------------------------------------------------------------------- the answer


class _Bounds(NamedTuple):
    """Logarithm of measured over predicted at the 5th and 95th percentile; by whether a node is left and by regime."""

    by_class: dict[tuple[bool, int], tuple[float, float]]

    def of(self, key: tuple[bool, int]) -> tuple[float, float]:
        return self.by_class.get(key) or self.by_class.get((key[0], -1)) or (-math.log(2), math.log(2))


class Learned(Timing):
    """Times of one kind of device, learned from its measurements; see the module for how.

    `as_profiled` (None: as the measurements show): answer as the profile at hand would, which, if it is Alpa's, sends
    nothing where a tensor cannot be divided and never lets the rate fall. False gives the time itself; for messages of
    a few kilobytes and less that is more. `bounds` false skips cross-validation (about ten fits).
    """

    def __init__(
        self, measurements: Sequence[Measurement], *, as_profiled: bool | None = None, bounds: bool = True
    ) -> None:
        self.device = one_device(measurements)
        known = curves(measurements)
        self.collectives = {key: curve for key, curve in known.items() if isinstance(key, Group)}
        self.products = {
            (key[0], key[1]): curve for key, curve in known.items() if not isinstance(key, Group) and not key[2]
        }
        self._operators = _Operators(measurements)
        self.as_profiled = never_falling_rates(self.collectives) if as_profiled is None else as_profiled
        self._is_bounded = never_falling_rates(self.collectives)
        self._topologies = {topology(group) for group in self.collectives}
        self._drawn: dict[Group, np.ndarray] = {}
        self._model: _Model | None = None
        self._rows = self._usable_rows(self.collectives)
        self._unseen = self._twins = self._seen = _Bounds({})
        if len(self._rows.size):
            self._model = _Model(self._rows)
            self._nothing_of_kind = {kind: self._nothing_seconds(self._model, kind) for kind in self._model.kinds}
            if bounds:
                self._unseen, self._seen = self._topologies_left_out(), self._sizes_left_out()
                self._twins = self._groups_left_out()

    def answer_collective(self, group: Group, size_bytes: float) -> Estimate:
        """Any group of a kind of collective that was measured in some group; sizes in bytes of the whole tensor.

        Raises InputError for a kind that was not measured, and for groups over several nodes if none was.
        """
        model, kind = self._model, group.kind
        if model is None or kind not in model.kinds:
            known = ", ".join(model.kinds) if model is not None else "nothing"
            raise InputError(
                f"no {kind} was measured on {self.device}",
                remedy=f"measured were: {known}; use the times of the catalogue",
            )
        if group.spans > 1 and not model.leaves_node:
            raise InputError(
                f"nothing was measured between nodes of {self.device}",
                remedy="measure a collective over two nodes, or use the times of the catalogue",
            )
        seconds = self._at(group, size_bytes)
        own = self.collectives.get(group)
        if own is not None and own.sizes[0] <= size_bytes <= own.sizes[-1]:
            bounds, how = self._seen, "learned, through the group's own measurements"
        elif own is None and topology(group) in self._topologies:
            bounds, how = self._twins, "learned, through measurements of the same topology"
        else:
            bounds, how = (
                self._unseen,
                "learned from other groups" if own is None else "learned, beyond what was measured",
            )
        low, high = bounds.of(self._class(model, group, size_bytes))
        return Estimate(seconds, seconds * math.exp(min(low, 0.0)), seconds * math.exp(max(high, 0.0)), how)

    def answer(self, query: Query) -> Estimate:
        """Of the very shape if it was measured; of products by FLOP; of other shapes by FLOP and bytes moved.

        A product in a dtype that was not measured takes as long as one in a dtype that was, whose FLOP take the same
        time at the peak rate; that needs a device of the catalogue. Raises InputError for what is not known at all.
        """
        operation, dtype, flop = query.operation, query.dtype, query.flop
        found = self._operators.of_shape(operation, dtype, query.shape, query.samples)
        if found is None and operation in PRODUCTS:
            found = self._product(operation, dtype, flop)
        if found is None:
            found = self._operators.of_size(operation, dtype, flop, query.moved_bytes)
        if found is None:
            raise InputError(
                f"{operation} in {dtype} was not measured on {self.device}, nor anything like it",
                remedy="measure a model that has it (headway probe --profile), or use the roofline",
            )
        return found

    def _product(self, operation: str, dtype: str, flop: float) -> Estimate | None:
        for name in (operation, "dot"):
            curve = self.products.get((name, dtype))
            if curve is not None:
                return _bounded(curve.at(flop), curve.spread(), "interpolated by FLOP")
        others = [(name, other) for name, other in self.products if name in (operation, "dot")]
        kind = _catalogue(self.device)
        if not others or kind is None:
            return None
        name, other = min(others, key=lambda key: abs(math.log(kind.flop_rate(key[1]) / kind.flop_rate(dtype))))
        seconds = self.products[name, other].at(flop * kind.flop_rate(other) / kind.flop_rate(dtype))
        return _bounded(seconds, math.log(2), f"from {other}, by the ratio of peak rates")

    # The curve of a group: the model's, moved through what was measured.

    def _at(self, group: Group, size: float) -> float:
        grid = self._drawn.get(group)
        if grid is None:
            assert self._model is not None
            grid = self._drawn[group] = self._draw(self._model, group, self.collectives)
        place = math.log2(max(size, 1.0)) * PER_DOUBLING
        below = min(int(place), len(grid) - 2)
        # Beyond its last place a curve goes on at the rate there.
        slope = grid[below + 1] - grid[below] if place <= len(grid) - 1 else math.log(2) / PER_DOUBLING
        start = below if place <= len(grid) - 1 else len(grid) - 1
        return math.exp(grid[start] + slope * (place - start))

    def _draw(self, model: _Model, group: Group, known: dict[Group, Curve]) -> np.ndarray:
        """Logarithm of seconds at sizes 2 ** (k / PER_DOUBLING), by the model and the measured curves `known`."""
        size = 2.0 ** (np.arange(_DOUBLINGS * PER_DOUBLING + 1) / PER_DOUBLING)
        drawn = np.log(model.seconds((group,) * len(size), size))
        curve = known.get(group)
        sizes, seconds = self._points(group, known)
        drawn += _corrections(drawn, sizes, seconds)
        # More never takes less time.
        drawn = np.maximum.accumulate(drawn)
        if not self.as_profiled:
            if curve is not None and not self._is_bounded:
                drawn += _corrections(drawn, curve.sizes, curve.seconds)
            return drawn
        smallest = next((at for at in range(len(size)) if not sends_nothing(group, size[at])), 0)
        profiled = drawn.copy()
        profiled[:smallest] = math.log(self._nothing_of_kind[group.kind])
        profiled = with_rates_that_never_fall(profiled, int(math.log2(item_bytes(group))) * PER_DOUBLING)
        if curve is not None:
            profiled += _corrections(profiled, curve.sizes, curve.seconds)
            if self._is_bounded:
                profiled[smallest:] = between_rates(profiled, drawn, curve)[smallest:]
                # Sizes that lie between places of the grid are met again.
                profiled += _corrections(profiled, curve.sizes, curve.seconds)
        return profiled

    def _nothing_seconds(self, model: _Model, kind: str) -> float:
        """What starting an operator costs that then sends nothing: the median of those that did."""
        found = [
            seconds
            for group, curve in self.collectives.items()
            if group.kind == kind
            for size, seconds in zip(curve.sizes, curve.seconds, strict=True)
            if sends_nothing(group, size)
        ]
        return float(np.median(found)) if found else float(model.constants[kind][0])

    def _points(self, group: Group, known: dict[Group, Curve]) -> tuple[np.ndarray, np.ndarray]:
        """Usable points of a group's own curve and, at sizes that it lacks, of its twins'.

        Twins are groups of the same topology on other meshes, or in another dtype. Where both were measured, their
        ratio is known, and what they say elsewhere is multiplied by it.
        """
        twins: dict[float, list[float]] = {}
        for other, curve in known.items():
            if other != group and topology(other) == topology(group):
                usable = self._usable(other, curve)
                for size, seconds in zip(curve.sizes[usable], curve.seconds[usable], strict=True):
                    twins.setdefault(float(size), []).append(seconds)
        points = {size: statistics.median(seconds) for size, seconds in twins.items()}
        own = known.get(group)
        if own is not None:
            usable = self._usable(group, own)
            mine = dict(zip(own.sizes[usable].tolist(), own.seconds[usable].tolist(), strict=True))
            both = sorted(mine.keys() & points.keys())
            if both:
                ratio = [math.log(mine[size] / points[size]) for size in both]
                points = {
                    size: seconds * math.exp(np.interp(math.log(size), np.log(both), ratio))
                    for size, seconds in points.items()
                }
            points |= mine
        sizes = sorted(points)
        return np.array(sizes), np.array([points[size] for size in sizes])

    def _usable(self, group: Group, curve: Curve) -> np.ndarray:
        """Which points of a curve are times of sending something, and not lower bounds."""
        if not self._is_bounded:
            return np.ones(len(curve.sizes), dtype=bool)
        nothing = np.array([sends_nothing(group, size) for size in curve.sizes])
        return ~(nothing | at_a_bound(curve))

    def _usable_rows(self, known: dict[Group, Curve]) -> _Rows:
        groups: list[Group] = []
        sizes: list[np.ndarray] = []
        seconds: list[np.ndarray] = []
        for group, curve in sorted(known.items()):
            usable = self._usable(group, curve)
            groups += [group] * int(usable.sum())
            sizes.append(curve.sizes[usable])
            seconds.append(curve.seconds[usable])
        empty = np.zeros(0)
        return _Rows(tuple(groups), np.concatenate([empty, *sizes]), np.concatenate([empty, *seconds]))

    # Bounds.

    def _class(self, model: _Model, group: Group, size: float) -> tuple[bool, int]:
        """Does it leave the node; and is it latency (0), in between (1), or bandwidth (2) that rules?"""
        ratio = self._at(group, size) / model.start_seconds(group)
        return group.spans > 1, 0 if ratio < 2 else 1 if ratio < 20 else 2

    def _topologies_left_out(self) -> _Bounds:
        rows = self._rows
        names = sorted({topology(group)[1:] for group in rows.groups if group.group_size > 1})
        fold = {name: number % _TOPOLOGY_FOLDS for number, name in enumerate(names)}
        of_row = np.array([fold.get(topology(group)[1:], -1) for group in rows.groups])
        errors: list[tuple[tuple[bool, int], float]] = []
        for number in range(min(_TOPOLOGY_FOLDS, len(names))):
            kept, left = rows.where(of_row != number), rows.where(of_row == number)
            missing = {group.kind for group in left.groups} - {group.kind for group in kept.groups}
            if missing or not (any(group.spans > 1 for group in kept.groups) or all(g.spans == 1 for g in left.groups)):
                continue
            predicted = _Model(kept).seconds(left.groups, left.size)
            errors += self._errors(left, predicted)
        return _quantiles(errors)

    def _groups_left_out(self) -> _Bounds:
        """Of groups that have twins, each in turn without its own measurements."""
        assert self._model is not None
        errors: list[tuple[tuple[bool, int], float]] = []
        count = Counter(topology(group) for group in self.collectives)
        for group, curve in self.collectives.items():
            if count[topology(group)] > 1:
                others = {other: found for other, found in self.collectives.items() if other != group}
                predicted = _read(self._draw(self._model, group, others), curve.sizes)
                errors += self._errors(_Rows((group,) * len(curve.sizes), curve.sizes, curve.seconds), predicted)
        return _quantiles(errors)

    def _sizes_left_out(self) -> _Bounds:
        errors: list[tuple[tuple[bool, int], float]] = []
        for number in range(_SIZE_FOLDS):
            kept, left = {}, {}
            for group, curve in self.collectives.items():
                out = np.arange(len(curve.sizes)) % _SIZE_FOLDS == number
                if out.all() or not out.any():
                    continue
                kept[group] = Curve(curve.sizes[~out], curve.seconds[~out], curve.fixed_seconds)
                left[group] = Curve(curve.sizes[out], curve.seconds[out])
            if not kept:
                continue
            model = _Model(self._usable_rows(kept))
            if set(model.kinds) != set(self._model.kinds if self._model else ()):
                continue
            for group, curve in left.items():
                predicted = _read(self._draw(model, group, kept), curve.sizes)
                errors += self._errors(_Rows((group,) * len(curve.sizes), curve.sizes, curve.seconds), predicted)
        return _quantiles(errors)

    def _errors(self, rows: _Rows, predicted: np.ndarray) -> list[tuple[tuple[bool, int], float]]:
        assert self._model is not None
        return [
            (self._class(self._model, group, size), math.log(seconds / guess))
            for group, size, seconds, guess in zip(rows.groups, rows.size, rows.seconds, predicted, strict=True)
        ]


def _quantiles(errors: Sequence[tuple[tuple[bool, int], float]]) -> _Bounds:
    found: dict[tuple[bool, int], tuple[float, float]] = {}
    for key in sorted({key for key, _ in errors} | {(key[0], -1) for key, _ in errors}):
        values = [error for (leaves, regime), error in errors if leaves == key[0] and key[1] in (-1, regime)]
        if len(values) >= 20:
            found[key] = (float(np.quantile(values, _LOW)), float(np.quantile(values, _HIGH)))
    return _Bounds(found)


def _read(drawn: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Seconds at these sizes from a curve that was drawn; beyond its last place at the rate there."""
    places = np.log2(np.maximum(sizes, 1.0)) * PER_DOUBLING
    beyond = np.maximum(places - (len(drawn) - 1), 0.0) / PER_DOUBLING
    return np.exp(np.interp(places, np.arange(len(drawn)), drawn)) * 2.0**beyond


def _corrections(drawn: np.ndarray, sizes: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """What to add at each place of the grid for the curve to pass through the points; constant beyond their ends."""
    if not len(sizes):
        return np.zeros(len(drawn))
    grid = np.arange(len(drawn))
    places = np.log2(np.maximum(sizes, 1.0)) * PER_DOUBLING
    return np.interp(grid, places, np.log(seconds) - np.interp(places, grid, drawn))


# ---------------------------------------------------------------------------------------------------- traced operators


class _Operators:
    """Operators of traced models: by their shape where that was measured, else by what they compute and move."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.shapes = {
            key: curve for key, curve in curves(measurements).items() if not isinstance(key, Group) and key[2]
        }
        rows = [row for row in measurements if row.unit == "samples" and row.seconds and (row.flop or row.moved_bytes)]
        self.fits: dict[tuple[str, str], tuple[np.ndarray, float]] = {}
        # Under the name "" all operators of a dtype together: for those that were measured too seldom.
        for name, dtype in sorted({key for row in rows for key in ((row.operation, row.dtype), ("", row.dtype))}):
            chosen = [row for row in rows if row.dtype == dtype and name in ("", row.operation)]
            if len(chosen) < 4:
                continue
            columns = np.array([(1.0, row.flop, row.moved_bytes) for row in chosen])
            seconds = np.array([row.seconds for row in chosen], dtype=float)
            constants = _relative_fit(columns, seconds)
            errors = np.abs(np.log(np.maximum(columns @ constants, 1e-12) / seconds))
            self.fits[name, dtype] = constants, float(np.quantile(errors, 0.9))

    def of_shape(self, operation: str, dtype: str, shape: str, samples: float) -> Estimate | None:
        curve = self.shapes.get((operation, dtype, shape))
        return None if curve is None else _bounded(curve.at(samples), curve.spread(), "measured, between sample counts")

    def of_size(self, operation: str, dtype: str, flop: float, moved_bytes: float) -> Estimate | None:
        own = (operation, dtype) in self.fits
        fit = self.fits.get((operation if own else "", dtype))
        if fit is None:
            return None
        constants, spread = fit
        seconds = float(constants @ np.array([1.0, flop, moved_bytes]))
        how = f"learned from other shapes of {operation}" if own else "learned from other operators"
        return _bounded(seconds, max(spread, 0.1), how)


def _bounded(seconds: float, spread: float, how: str) -> Estimate:
    return Estimate(seconds, seconds * math.exp(-spread), seconds * math.exp(spread), how)


def _catalogue(device: str) -> Accelerator | None:
    try:
        return find_accelerator(device)
    except HeadwayError:
        return None
