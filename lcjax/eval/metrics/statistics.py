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
    values = np.asarray(scores, np.float64)
    if values.size == 0:
        raise ValueError("an interval needs at least one score; this cell has none")
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all() and values.min() == values.max():
        return wilson_interval(mean, values.size, confidence=confidence)
    draws = np.random.default_rng(seed).integers(0, values.size, (resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), values.size)


def paired_difference(left: Sequence[float], right: Sequence[float], *, seed: int = 0) -> Interval:
    """Bootstrap of mean(right - left) over the same examples; lengths must agree, else ValueError."""
    if len(left) != len(right):
        raise ValueError(f"a paired difference needs equal counts; got {len(left)} and {len(right)} scores")
    differences = np.asarray(right, np.float64) - np.asarray(left, np.float64)
    draws = np.random.default_rng(seed).integers(0, differences.size, (2000, differences.size))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high), differences.size)


def wilson_interval(share: float, count: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a share of `count` yes/no outcomes."""
    z = _normal_quantile((1 + confidence) / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)
