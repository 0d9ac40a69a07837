"""Point: efficacy against collateral of one method at one strength; and which are undominated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvedit.evals.bootstrap import Mean
from kvedit.evals.report import Report

__all__ = ["Point", "as_points", "frontier_points", "pareto"]


@dataclass(frozen=True)
class Point:
    """A method at one strength.

    Args:
        name: the method.
        strength: its strength, or None.
        gain: what is wanted: efficacy, or another metric of which more is better.
        cost: collateral: KL in nats, or another metric of which less is better.
    """

    name: str
    strength: float | None
    gain: Mean
    cost: Mean

    def dominates(self, other: Point) -> bool:
        """Whether it is at least as good in both means, and better in one."""
        gains, costs = self.gain.value, self.cost.value
        no_worse = gains >= other.gain.value and costs <= other.cost.value
        return no_worse and (gains > other.gain.value or costs < other.cost.value)


def frontier_points(
    reports: Iterable[Report], gain: str = "efficacy", cost: str = "kl"
) -> list[Point]:
    """Returns one point per report."""
    return [Point(r.name, r.strength, r.mean(gain), r.mean(cost)) for r in reports]


def as_points(given: Iterable[Report | Point], gain: str, cost: str) -> list[Point]:
    """Returns one point per report; points stay as they are."""
    points = []
    for one in given:
        points += [one] if isinstance(one, Point) else frontier_points([one], gain, cost)
    return points


def pareto(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other one dominates, by rising cost.

    Means decide, not intervals: a front of noisy points is itself noisy. Compare two methods by
    :func:`~kvedit.evals.report.difference`.
    """
    best = [point for point in points if not any(other.dominates(point) for other in points)]
    return sorted(best, key=lambda point: (point.cost.value, point.gain.value))
