"""Gradient-boosted regression trees, small: what a formula leaves over, learned from measurements.

Trees of a fixed depth on features cut into a few bins, each fitted to what the trees before it leave over (Friedman,
Annals of Statistics 2001). Residuals are clipped (Huber's loss), so that one odd measurement does not bend a leaf.
Nothing is drawn at random: the same rows give the same trees.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headway.compiled import compiled

__all__ = ["Trees", "boost"]

_BINS = 32


class Trees(NamedTuple):
    """Fitted trees. Node k of a tree has the children 2k + 1 and 2k + 2; shapes are (trees, nodes).

    `feature`: column that a node asks about (-1: a leaf); `threshold`: values up to it go left; `value`: of a leaf.
    """

    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The sum of all trees for each row of `x`, of shape (rows, features)."""
        return _evaluate(self.feature, self.threshold, self.value, np.ascontiguousarray(x, dtype=np.float64))


def boost(
    x: np.ndarray,
    y: np.ndarray,
    *,
    trees: int = 150,
    depth: int = 4,
    rate: float = 0.1,
    smallest_leaf: int = 8,
    clip: float = 0.3,
) -> Trees:
    """Fit `y` (rows,) by `trees` trees on `x` (rows, features); no leaf stands on fewer than `smallest_leaf` rows.

    `rate` shrinks each tree; residuals beyond `clip` pull no harder than `clip`.
    """
    x = np.ascontiguousarray(x, dtype=np.float64)
    nodes = 2 ** (depth + 1) - 1
    feature = np.full((trees, nodes), -1, dtype=np.int64)
    threshold = np.zeros((trees, nodes))
    value = np.zeros((trees, nodes))
    cuts = [_cuts(column) for column in x.T]
    binned = np.stack([np.searchsorted(cut, column) for cut, column in zip(cuts, x.T, strict=True)], axis=1)
    edges = np.full((x.shape[1], _BINS), np.inf)
    for position, cut in enumerate(cuts):
        edges[position, : len(cut)] = cut
    left_over = y.astype(np.float64).copy()
    for number in range(trees):
        target = np.clip(left_over, -clip, clip)
        step = _grow(binned, edges, target, rate, smallest_leaf, feature[number], threshold[number], value[number])
        left_over -= step
    return Trees(feature, threshold, value)


def _cuts(column: np.ndarray) -> np.ndarray:
    """At most `_BINS` - 1 values between which a column is cut: between its distinct values, or at quantiles."""
    distinct = np.unique(column)
    if len(distinct) <= _BINS:
        return (distinct[:-1] + distinct[1:]) / 2
    return np.unique(np.quantile(distinct, np.linspace(0, 1, _BINS + 1)[1:-1]))


@compiled()
def _grow(binned, edges, target, rate, smallest_leaf, feature, threshold, value):  # pragma: no cover - compiled
    rows, features = binned.shape
    bins = edges.shape[1]
    place = np.zeros(rows, dtype=np.int64)
    nodes = len(feature)
    inner = nodes // 2
    for node in range(nodes):
        count = 0
        total = 0.0
        for row in range(rows):
            if place[row] == node:
                count += 1
                total += target[row]
        if count == 0:
            continue
        # A leaf of few rows says less: it is drawn towards zero.
        value[node] = rate * total / (count + 1.0)
        if node >= inner or count < 2 * smallest_leaf:
            continue
        best, best_feature, best_bin = 1e-12, -1, -1
        for column in range(features):
            sums = np.zeros(bins)
            counts = np.zeros(bins, dtype=np.int64)
            for row in range(rows):
                if place[row] == node:
                    sums[binned[row, column]] += target[row]
                    counts[binned[row, column]] += 1
            left_sum, left_count = 0.0, 0
            for at in range(bins - 1):
                left_sum += sums[at]
                left_count += counts[at]
                if left_count < smallest_leaf or count - left_count < smallest_leaf:
                    continue
                right_sum = total - left_sum
                gain = (
                    left_sum * left_sum / (left_count + 1.0)
                    + right_sum * right_sum / (count - left_count + 1.0)
                    - total * total / (count + 1.0)
                )
                if gain > best:
                    best, best_feature, best_bin = gain, column, at
        if best_feature < 0:
            continue
        feature[node] = best_feature
        threshold[node] = edges[best_feature, best_bin]
        for row in range(rows):
            if place[row] == node:
                place[row] = 2 * node + (1 if binned[row, best_feature] <= best_bin else 2)
    step = np.empty(rows)
    for row in range(rows):
        step[row] = value[place[row]]
    return step


@compiled()
def _evaluate(feature, threshold, value, x):  # pragma: no cover - compiled
    result = np.zeros(len(x))
    for row in range(len(x)):
        for tree in range(len(feature)):
            node = 0
            while feature[tree, node] >= 0:
                node = 2 * node + (1 if x[row, feature[tree, node]] <= threshold[tree, node] else 2)
            result[row] += value[tree, node]
    return result
