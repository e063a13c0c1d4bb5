"""The statistics, against values worked out elsewhere."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmctl.bench import stats


def test_mad_and_percentile_are_of_what_was_measured() -> None:
    assert stats.mad([1, 1, 2, 2, 4, 6, 9]) == 1  # the textbook's example
    samples = list(range(1, 101))
    assert (stats.percentile(samples, 99), stats.percentile(samples, 50), stats.percentile([7.0], 99)) == (99, 50, 7)
    assert stats.percentile([3, 1, 2], 0) == 1 and stats.percentile([3, 1, 2], 100) == 3


@pytest.mark.parametrize(
    ("n", "m", "u", "one_sided"),
    # Mann and Whitney (1947), table I, n = 3 to 5.
    [(3, 3, 0, 0.050), (3, 3, 1, 0.100), (4, 4, 0, 0.014), (4, 4, 3, 0.100), (5, 5, 0, 0.004), (5, 5, 4, 0.048)],
)
def test_the_published_table(n: int, m: int, u: int, one_sided: float) -> None:
    first, second = next(
        (a, b)
        for chosen in itertools.combinations(range(n + m), n)
        if stats.rank_sum(a := list(chosen), b := [x for x in range(n + m) if x not in chosen]) == u
    )
    assert stats.p_value(first, second) == pytest.approx(2 * one_sided, abs=0.001)


def by_counting(first: list[float], second: list[float]) -> float:
    """The same p by trying all orders, without ties."""
    both, n = first + second, len(first)
    seen = min(stats.rank_sum(first, second), n * len(second) - stats.rank_sum(first, second))
    orders = list(itertools.combinations(range(len(both)), n))
    us = [
        stats.rank_sum([both[i] for i in chosen], [both[i] for i in range(len(both)) if i not in chosen])
        for chosen in orders
    ]
    return min(1.0, 2 * sum(u <= seen for u in us) / len(orders))


def test_p_is_what_trying_all_orders_gives() -> None:
    numbers = random.Random(1)
    for n, m in ((2, 3), (4, 4), (5, 3)):
        first, second = [numbers.random() for _ in range(n)], [numbers.random() for _ in range(m)]
        assert stats.p_value(first, second) == pytest.approx(by_counting(first, second))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.lists(st.integers(1, 9), min_size=1, max_size=7))
def test_p_and_effect_are_bounded_and_symmetrical(first: list[int], second: list[int]) -> None:
    p = stats.p_value(first, second)
    assert stats.least_p(len(first), len(second)) <= p <= 1.0
    assert p == pytest.approx(stats.p_value(second, first))
    assert stats.superiority(first, second) == pytest.approx(1 - stats.superiority(second, first))


def test_what_few_samples_can_never_tell() -> None:
    assert stats.least_p(3, 3) == pytest.approx(0.1) and stats.least_p(5, 5) < 0.01
    assert stats.superiority([1, 2], [3, 4]) == 1.0 and stats.superiority([1, 2], [1, 2]) == 0.5
