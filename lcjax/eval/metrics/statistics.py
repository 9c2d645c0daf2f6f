"""Intervals for a mean over examples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with its bounds and the number of examples behind it."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    scores: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean; the same scores and seed give the same bounds. Raises ValueError for no scores.

    Where all scores agree the bootstrap has no width; scores in {0, 1} take the Wilson interval instead, which does.
    """
    return mean_interval([scores], confidence=confidence, resamples=resamples, seed=seed)


def mean_interval(
    groups: Sequence[Sequence[float]],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`bootstrap_interval` of a mean of tasks: every group is drawn from by itself. weights: None: all the same.

    Raises ValueError for no scores.
    """
    values = [np.asarray(group, np.float64) for group in groups]
    if not values or not all(group.size for group in values):
        raise ValueError("an interval needs at least one score; this cell has none")
    together = np.concatenate(values)
    if together[0] in (0.0, 1.0) and (together == together[0]).all():
        return wilson_interval(float(together[0]), together.size, confidence=confidence)
    return _bootstrap(values, weights, confidence, resamples, seed)


def paired_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> Interval:
    """Bootstrap of mean(right - left), each pair of scores over the same examples of one task; weights as above.

    Raises ValueError for a pair of unequal lengths. Differences that all agree have an interval without width.
    """
    for left, right in pairs:
        if len(left) != len(right):
            raise ValueError(f"a paired difference needs equal counts; got {len(left)} and {len(right)} scores")
    changes = [np.asarray(right, np.float64) - np.asarray(left, np.float64) for left, right in pairs]
    return _bootstrap(changes, weights, 0.95, 2000, seed)


def _bootstrap(
    groups: Sequence[np.ndarray], weights: Sequence[float] | None, confidence: float, resamples: int, seed: int
) -> Interval:
    rng = np.random.default_rng(seed)
    drawn = [group[rng.integers(0, group.size, (resamples, group.size))].mean(axis=1) for group in groups]
    means = np.average(drawn, axis=0, weights=weights)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = float(np.average([group.mean() for group in groups], weights=weights))
    return Interval(mean, float(low), float(high), sum(group.size for group in groups))


def wilson_interval(share: float, count: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share of `count` yes/no outcomes."""
    z = _normal_quantile((1 + confidence) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
