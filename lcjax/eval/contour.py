"""Effective context: how long an input may be before the score falls under a threshold."""

import itertools
import math
from collections.abc import Mapping

import numpy as np


def effective_length(scores: Mapping[int, float], threshold: float = 0.75) -> float:
    """Length at which a curve first falls under `threshold`, log-linear between lengths.

    0 where the shortest length is already under it; the longest length where the curve never falls.
    """
    lengths = sorted(scores)
    if not lengths or scores[lengths[0]] < threshold:
        return 0.0
    for short, long in itertools.pairwise(lengths):
        if scores[long] < threshold:
            share = (scores[short] - threshold) / (scores[short] - scores[long])
            return math.exp(math.log(short) + share * (math.log(long) - math.log(short)))
    return float(lengths[-1])


def effective_lengths(scores: Mapping[int, Mapping[int, float]], threshold: float = 0.75) -> dict[int, float]:
    """Effective length for each number of needles (or hops, threads): scores are {needles: {length: score}}."""
    return {needles: effective_length(curve, threshold) for needles, curve in sorted(scores.items())}


def longest_passing(scores: Mapping[int, float], threshold: float) -> int:
    """RULER's effective length: the largest length whose score is at least `threshold`; 0 for none."""
    return max((length for length, score in scores.items() if score >= threshold), default=0)


def relative_length(scores: Mapping[int, float], share: float = 0.75) -> int:
    """Largest length whose score is at least `share` of the shortest length's."""
    return longest_passing(scores, share * scores[min(scores)])


def weighted_score(scores: Mapping[int, float], *, increasing: bool) -> float:
    """RULER's mean over lengths with linearly increasing or decreasing weights."""
    lengths = sorted(scores)
    weights = np.arange(1, len(lengths) + 1, dtype=float)
    return float(np.average([scores[n] for n in lengths], weights=weights if increasing else weights[::-1]))
