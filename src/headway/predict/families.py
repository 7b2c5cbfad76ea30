"""Loads of all groups of a mesh axis at once, worked out on as few nodes as tell the whole.

The groups of every axis are a *family*: ranks `stride` apart, `size` of them, in blocks of stride x size ranks. Where
an order takes nodes that are wired alike one after the other, a family looks the same from every node that is in the
same place of a block, and only the links of a hop's two nodes are used. Then one period of blocks stands for all; a
ring over many nodes loads each as a ring over two does; and of a pipeline through many nodes the first, one in between
and the last differ. What passes links that belong to no node (a spine) is counted in full.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from headway.predict.orders import Order
from headway.predict.wiring import Loads, Wiring

__all__ = ["Families"]


class _Pattern(NamedTuple):
    """An order that takes `nodes` nodes of one class one after the other, the same `width` devices of each."""

    width: int
    nodes: int


class Families:
    """Loads of families of groups, memoised by family."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._patterns: dict[int, _Pattern | None] = {}
        self._groups: dict[tuple[int, int, int, bool], Loads] = {}
        self._along: dict[tuple[int, int], Loads] = {}

    def groups(self, order: Order, stride: int, size: int, *, pairwise: bool = False) -> Loads:
        """For each block of the family its slowest group, all groups at work; fewer blocks than there are: they repeat.

        `pairwise`: every member hands a part to every other (all-to-all), instead of going round rings.
        """
        key = (order.number, stride, size, pairwise)
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = self._find_groups(order, stride, size, pairwise)
        return found

    def _find_groups(self, order: Order, stride: int, size: int, pairwise: bool) -> Loads:
        pattern = self._pattern(order)
        if pattern is not None:
            folded_stride, folded_size = _fold(stride, size, pattern.width, pairwise)
            period = math.lcm(folded_stride * folded_size, pattern.width)
            if period < len(order.positions):
                loads, is_own = self._count(order.positions[:period], folded_stride, folded_size, pairwise)
                if is_own:
                    return loads
        return self._count(order.positions, stride, size, pairwise)[0]

    def _count(self, positions: np.ndarray, stride: int, size: int, pairwise: bool) -> tuple[Loads, bool]:
        groups = positions.reshape(-1, size, stride).transpose(0, 2, 1).reshape(-1, size)
        if pairwise:
            one, other = (at.ravel() for at in np.nonzero(~np.eye(size, dtype=bool)))
            source, target = groups[:, one].ravel(), groups[:, other].ravel()
            owner = np.repeat(np.arange(len(groups)), len(one))
            weight = np.full(len(source), 1 / size)
        else:
            source, target, weight, owner = self.wiring.rings(groups)
        loads, is_own = self.wiring.loads(source, target, weight, owner, len(groups))
        return Loads(*(figure.reshape(-1, stride).max(axis=1) for figure in loads)), is_own

    def along(self, order: Order, pipeline: int) -> Loads:
        """For each pipeline rank its sends to the next one, all at once; the last one's back to the first, alone."""
        key = (order.number, pipeline)
        found = self._along.get(key)
        if found is None:
            found = self._along[key] = self._find_along(order, pipeline)
        return found

    def _find_along(self, order: Order, pipeline: int) -> Loads:
        pattern = self._pattern(order)
        if pattern is not None:
            width = len(order.positions) // pipeline
            # A node for each pipeline rank of whole nodes, or several ranks in each node.
            inside = pattern.width // width if pattern.width % width == 0 else int(width % pattern.width == 0)
            nodes = pipeline // inside if inside else 0
            if nodes > 3 or (nodes > 1 and width > pattern.width):
                # The first node, those between, and the last.
                few = min(nodes, 3)
                loads, is_own = self._send(order.positions[: few * pattern.width], few * inside)
                if is_own:
                    at = np.arange(pipeline)
                    between = inside + at % inside
                    last = (few - 1) * inside + at % inside
                    place = np.where(at < inside, at, np.where(at >= pipeline - inside, last, between))
                    return Loads(*(figure[place] for figure in loads))
        return self._send(order.positions, pipeline)[0]

    def _send(self, positions: np.ndarray, pipeline: int) -> tuple[Loads, bool]:
        source = positions.reshape(pipeline, -1)
        target = np.roll(source, -1, axis=0)
        owner = np.repeat(np.arange(pipeline), source.shape[1])
        ones = np.ones(source.size)
        # The way back from the last rank to the first is idle except for the interleaved schedule: count it alone.
        count = (pipeline - 1) * source.shape[1]
        both = []
        for part in (slice(count), slice(count, None)):
            both.append(
                self.wiring.loads(source.ravel()[part], target.ravel()[part], ones[part], owner[part], pipeline)
            )
        (forward, one), (back, other) = both
        return Loads(*map(np.maximum, forward, back)), one and other

    def _pattern(self, order: Order) -> _Pattern | None:
        if order.number not in self._patterns:
            self._patterns[order.number] = self._find_pattern(order.positions)
        return self._patterns[order.number]

    def _find_pattern(self, positions: np.ndarray) -> _Pattern | None:
        nodes = self.wiring.node_of[positions]
        other = np.flatnonzero(nodes != nodes[0])
        width = int(other[0]) if len(other) else len(nodes)
        if len(nodes) % width:
            return None
        rows = nodes.reshape(-1, width)
        classes = self.wiring.class_of[rows[:, 0]]
        local = self.wiring.local_of[positions].reshape(-1, width)
        is_alike = (
            (rows == rows[:, :1]).all()
            and len(np.unique(rows[:, 0])) == len(rows)
            and (classes == classes[0]).all()
            and (local == local[0]).all()
        )
        return _Pattern(width, len(rows)) if is_alike else None


def _fold(stride: int, size: int, width: int, pairwise: bool) -> tuple[int, int]:
    """The smallest family (stride, size) that loads nodes of `width` ranks as the given one does."""
    block = stride * size
    if block <= width or block % width:
        return stride, size
    if stride % width == 0:
        # One member in a node; which node follows which does not matter, nor for rings how many there are.
        return width, size if pairwise else 2
    if width % stride == 0 and not pairwise:
        return stride, 2 * width // stride
    return stride, size
