"""Crossing: where a measure passes a target, found by a scan, guesses and halving."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvedit.errors import InvalidArgument

__all__ = ["Crossing", "Measure", "find_crossing", "find_rungs"]

Measure = Callable[[float], float]
"""What a strength does, as a number, such as a mean KL."""


@dataclass(frozen=True)
class Crossing:
    """Two strengths with the target between them, and the one that is nearest to it.

    Args:
        first: end of the last interval that comes first in the order of the search.
        second: its other end.
        nearest: the tried strength within it whose measure is nearest to the target.
        trace: ``(strength, measure)`` of every strength that was tried, by strength.
        crossings: how often the scan crossed the target; above 1, the measure is not monotone,
            and the first crossing was taken.
    """

    first: float
    second: float
    nearest: float
    trace: tuple[tuple[float, float], ...]
    crossings: int

    def at(self, strength: float) -> float:
        """Returns the measure at a strength that was tried."""
        return dict(self.trace)[strength]


class _Gaps:
    """Differences from the target, each strength measured once."""

    def __init__(self, measure: Measure, target: float) -> None:
        self.measure, self.target = measure, target
        self.seen: dict[float, float] = {}

    def __call__(self, strength: float) -> float:
        if strength not in self.seen:
            self.seen[strength] = self.measure(strength)
        return self.seen[strength] - self.target

    def below(self, strength: float) -> bool:
        return self(strength) < 0

    def crossed(self, grid: Sequence[float]) -> list[tuple[float, float]]:
        return [(a, b) for a, b in pairwise(grid) if self.below(a) != self.below(b)]

    def between(self, a: float, b: float) -> float:
        """Returns where the target would be if the root of the measure went straight.

        A KL begins as the square of a strength (Kullback and Leibler 1951).
        """
        low, high, aim = (
            math.sqrt(max(0.0, number)) for number in (self.seen[a], self.seen[b], self.target)
        )
        share = (aim - low) / (high - low) if high != low else 0.5
        return a + min(max(share, 0.05), 0.95) * (b - a)

    def found(self, ends: tuple[float, float], nearest: float, crossings: int) -> Crossing:
        return Crossing(*ends, nearest, tuple(sorted(self.seen.items())), crossings)

    def missed(self, name: str, low: float, high: float) -> InvalidArgument:
        values = self.seen.values()
        return InvalidArgument(
            f"{name} is {min(values):.4g} to {max(values):.4g} at strengths {low:g} to {high:g}: "
            f"the target {self.target:g} is not crossed; widen the bracket"
        )


def find_crossing(
    measure: Measure,
    target: float,
    bracket: tuple[float, float],
    *,
    scan: int,
    tolerance: float,
    most: int,
    grow: int = 0,
    name: str = "the measure",
) -> Crossing:
    """Returns the first strength found at which a continuous measure is the target.

    A scan of the bracket finds two neighbours with the target between them, and guesses and
    halvings go on there: it needs continuity, not monotony. A step ends at the side that is
    nearest.

    Args:
        measure: gives the number at a strength; it is asked once per strength.
        target: the number to hit.
        bracket: first and last strength of the scan.
        scan: evenly spaced strengths of the scan, both ends included.
        tolerance: distance from the target at which to stop.
        most: strengths to try, at most.
        grow: how often the bracket may be made twice as long where the target is beyond its end.
        name: what the measure is called in errors.

    Raises:
        InvalidArgument: if the target is not crossed.
    """
    low, high = bracket
    gap = _Gaps(measure, target)
    grid = [low + (high - low) * step / (scan - 1) for step in range(scan)]
    crossed = gap.crossed(grid)
    for _ in range(grow):
        if crossed or len(gap.seen) >= most:
            break
        grid.append(low + 2 * (grid[-1] - low))
        crossed = gap.crossed(grid[-2:])
    if not crossed:
        raise gap.missed(name, low, grid[-1])
    a, b = crossed[0]
    best = min((a, b), key=lambda strength: abs(gap(strength)))
    guess = True
    while abs(gap(best)) > tolerance and len(gap.seen) < most:
        # In turn: a guess, which is often enough, and a halving, which always gets nearer.
        middle = gap.between(a, b) if guess else (a + b) / 2
        guess = not guess
        a, b = (middle, b) if gap.below(middle) == gap.below(a) else (a, middle)
        best = min((best, middle), key=lambda strength: abs(gap(strength)))
    return gap.found((a, b), best, len(crossed))


def find_rungs(
    measure: Measure,
    target: float,
    ladder: Sequence[float],
    *,
    scan: int,
    name: str = "the measure",
) -> Crossing:
    """Returns the neighbours on a ladder of strengths between which the target lies.

    Args:
        measure: gives the number at a strength; it is asked once per strength.
        target: the number to pass.
        ladder: strengths, from what does least to what does most.
        scan: rungs of the scan, both ends included; more find more crossings.
        name: what the measure is called in errors.

    Raises:
        InvalidArgument: if no two rungs have the target between them.
    """
    gap = _Gaps(measure, target)
    last = len(ladder) - 1
    steps = min(scan - 1, last)
    rungs = [round(last * step / steps) for step in range(steps + 1)]
    crossed = gap.crossed([ladder[rung] for rung in rungs])
    if not crossed:
        raise gap.missed(name, ladder[0], ladder[-1])
    a, b = (ladder.index(strength) for strength in crossed[0])
    while b - a > 1:
        middle = (a + b) // 2
        a, b = (middle, b) if gap.below(ladder[middle]) == gap.below(ladder[a]) else (a, middle)
    ends = (ladder[a], ladder[b])
    return gap.found(ends, min(ends, key=lambda strength: abs(gap(strength))), len(crossed))
