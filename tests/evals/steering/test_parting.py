"""Parts of cases that are alike in several numbers at once."""

from __future__ import annotations

import random
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from kvedit.evals.steering.parting import draw_parts


def made(cases: int, kinds: int, seed: int = 0) -> list[list[float]]:
    """Returns columns of different scale and skew, such as KLs are."""
    drawn = random.Random(seed)
    return [
        [10.0**kind * drawn.lognormvariate(0, 1) for _ in range(cases)] for kind in range(kinds)
    ]


def gaps(columns, first, rest) -> list[float]:
    """Returns differences of the two means, in standard deviations."""
    return [
        abs(fmean(c[i] for i in first) - fmean(c[i] for i in rest)) / pstdev(c) for c in columns
    ]


@pytest.mark.parametrize("count", [1, 20, 67, 100, 150, 199])
@pytest.mark.parametrize("balance", [False, True])
def test_parts_are_of_one_case_from_each_run(count, balance) -> None:
    columns = made(200, 3)
    first, rest = draw_parts(columns, count, 1, balance=balance)
    assert len(first) == count and sorted(first + rest) == list(range(200))
    assert (first, rest) == draw_parts(columns, count, 1, balance=balance)
    # The order is that of the columns' sum, each by its own spread.
    size = [sum(c[i] / pstdev(c) for c in columns) for i in range(200)]
    order = sorted(range(200), key=size.__getitem__)
    edges = [round(part * 200 / count) for part in range(count + 1)]
    taken = sorted(order.index(i) for i in first)
    assert all(low <= rank < high for rank, (low, high) in zip(taken, pairwise(edges), strict=True))


def test_balanced_parts_have_equal_means_in_every_column() -> None:
    columns = made(300, 6)
    lots = [gaps(columns, *draw_parts(columns, 150, seed, balance=False)) for seed in range(10)]
    even = [gaps(columns, *draw_parts(columns, 150, seed, balance=True)) for seed in range(10)]
    assert max(map(max, even)) < 0.02
    assert fmean(map(max, lots)) > 0.1
    # The lot still counts: not one split for all seeds.
    splits = {tuple(draw_parts(columns, 150, seed, balance=True)[0]) for seed in range(10)}
    assert len(splits) == 10


def test_what_the_columns_explain_no_longer_sets_the_means_apart() -> None:
    columns = made(300, 4)
    noise = random.Random(5)
    unseen = [2 * a + 0.3 * b / 10 + noise.gauss(0, 0.3) for a, b in zip(*columns[:2], strict=True)]

    def error(balance: bool) -> float:
        drawn = [draw_parts(columns, 150, seed, balance=balance) for seed in range(20)]
        return fmean(gaps([unseen], *parts)[0] ** 2 for parts in drawn) ** 0.5

    by_lot = [random.Random(seed).sample(range(300), 300) for seed in range(20)]
    lot = fmean(gaps([unseen], order[:150], order[150:])[0] ** 2 for order in by_lot) ** 0.5
    assert error(True) < 0.5 * error(False) and error(True) < 0.25 * lot


def test_a_column_without_spread_says_nothing() -> None:
    flat = [1.0] * 40
    spread = made(40, 1)[0]
    assert draw_parts([flat, spread], 20, 0, balance=True) == draw_parts(
        [spread], 20, 0, balance=True
    )
