"""Statistics that hold on shared machines: ranks and medians, which a busy neighbour moves little. Pure.

Light by intent: the standard library, and one exact test written out. Sources are named where they are used.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

median = statistics.median


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled. (Hampel 1974; Gauss.)"""
    middle = median(samples)
    return median([abs(sample - middle) for sample in samples])


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: a sample that was really measured, never one in between."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def rank_sum(first: Sequence[float], second: Sequence[float]) -> float:
    """U of Mann and Whitney: pairs in which the second is the larger one, ties counted half."""
    return sum(1.0 if b > a else 0.5 if b == a else 0.0 for a in first for b in second)


def superiority(first: Sequence[float], second: Sequence[float]) -> float:
    """Effect size A of Vargha and Delaney (2000): how likely one of the second is larger than one of the first."""
    return rank_sum(first, second) / (len(first) * len(second))


@cache
def _ways(n: int, m: int, u: int) -> int:
    """In how many orders of n and m samples U is ``u``: the recursion of Mann and Whitney (1947), section 3."""
    if u < 0:
        return 0
    if n == 0 or m == 0:
        return int(u == 0)
    return _ways(n - 1, m, u - m) + _ways(n, m - 1, u)


def p_value(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test: exact, by counting orders; a tie counts against a difference."""
    n, m = len(first), len(second)
    u = rank_sum(first, second)
    least = math.ceil(min(u, n * m - u))
    tail = sum(_ways(n, m, value) for value in range(least + 1)) / math.comb(n + m, n)
    return min(1.0, 2 * tail)


def least_p(n: int, m: int) -> float:
    """The smallest p that this many samples can give: with it above the level asked for, nothing can be told."""
    return min(1.0, 2 / math.comb(n + m, n))
