"""draw_parts: two parts of some cases that are alike in numbers that are known of each case."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev

__all__ = ["draw_parts"]


def draw_parts(
    columns: Sequence[Sequence[float]], count: int, seed: int, *, balance: bool
) -> tuple[list[int], list[int]]:
    """Returns the indices of two parts, each in order.

    Cases are put in order by the sum of their numbers, and each run of neighbours gives one case,
    by lot, to the first part. Balanced, a case is exchanged for another one of its run as long as
    that brings the means of the parts nearer to each other, in all columns together: what a column
    explains linearly of some other number then no longer sets that number's two means apart
    (Morgan and Rubin 2012, *Rerandomization to improve covariate balance in experiments*).

    Args:
        columns: numbers of each case, a sequence per kind; kinds count the same, by their spread.
        count: cases of the first part, from 1 to one less than all.
        seed: of the lot.
        balance: whether cases are exchanged.
    """
    rows = list(zip(*map(_standard, columns), strict=True))
    order = sorted(range(len(rows)), key=lambda index: sum(rows[index]))
    edges = [round(part * len(rows) / count) for part in range(count + 1)]
    runs = [order[start:stop] for start, stop in pairwise(edges)]
    drawn = random.Random(seed)
    chosen = [drawn.choice(run) for run in runs]
    if balance:
        _exchange(rows, runs, chosen)
    first = set(chosen)
    return sorted(first), [index for index in range(len(rows)) if index not in first]


def _standard(column: Sequence[float]) -> list[float]:
    middle, spread = fmean(column), pstdev(column)
    return [(number - middle) / (spread or 1.0) for number in column]


def _exchange(rows: Sequence[Sequence[float]], runs: list[list[int]], chosen: list[int]) -> None:
    """Changes the chosen cases until no single exchange makes the parts more alike.

    All numbers are taken from their mean, so the parts have equal means where the first one's sums
    are 0.
    """
    sums = [sum(rows[index][kind] for index in chosen) for kind in range(len(rows[0]))]
    better = True
    while better:
        better = False
        for place, run in enumerate(runs):
            own = rows[chosen[place]]
            without = [total - number for total, number in zip(sums, own, strict=True)]
            found = min(run, key=lambda index: _length(without, rows[index]))
            # By more than rounding, so that this ends.
            if _length(without, rows[found]) < _length(without, own) - 1e-12:
                chosen[place], better = found, True
                sums = [total + number for total, number in zip(without, rows[found], strict=True)]


def _length(sums: Sequence[float], row: Sequence[float]) -> float:
    return sum((total + number) ** 2 for total, number in zip(sums, row, strict=True))
