"""Strength at equal KL: methods are compared where they move unrelated answers equally far."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict
from kvedit.evals.report import Report
from kvedit.evals.searching import find_crossing

__all__ = ["EqualKL", "at_equal_kl"]

EvaluateAt = Callable[[float, Sequence[Conflict]], Report]


@dataclass(frozen=True)
class EqualKL:
    """The strength at which a method's collateral hits a target, and what it does there.

    Args:
        strength: the strength.
        target_kl: the target, in nats.
        calibrated_kl: mean KL at that strength on the calibration cases.
        report: evaluation on the other cases. Its KL has sampling noise of its own.
        trace: ``(strength, KL)`` of every evaluation on the calibration cases, by strength.
        crossings: how often the scan crossed the target; above 1, KL is not monotone, and the
            weakest crossing was taken.
    """

    strength: float
    target_kl: float
    calibrated_kl: float
    report: Report
    trace: tuple[tuple[float, float], ...]
    crossings: int


def at_equal_kl(
    evaluate_at: EvaluateAt,
    cases: Sequence[Conflict],
    target_kl: float,
    bracket: tuple[float, float],
    *,
    calibration: float = 0.25,
    scan: int = 5,
    tolerance: float = 0.05,
    most: int = 16,
    metric: str = "kl",
    seed: int = 0,
) -> EqualKL:
    """Returns the weakest strength found at which the mean collateral is ``target_kl``.

    A scan of the bracket finds two neighbours with the target between them, and the search goes on
    there (:mod:`kvedit.evals.searching`): it needs continuity, not monotony. Strength is chosen on
    some cases and the method evaluated on the others, so that the choice does not flatter it.

    Args:
        evaluate_at: evaluates a strength on given cases; share its
            :class:`~kvedit.evals.prefills.Prefills`.
        cases: conflicts.
        target_kl: mean collateral to hit, in nats.
        bracket: weakest and strongest strength; the collateral at the first must lie on the
            other side of the target than somewhere later.
        calibration: fraction of cases, drawn by ``seed``, on which the strength is chosen.
        scan: evenly spaced strengths of the scan, both ends included.
        tolerance: relative distance from the target at which to stop.
        most: evaluations on the calibration cases, at most.
        metric: the collateral, a name of :data:`~kvedit.evals.results.METRICS`.
        seed: seed of the split.

    Raises:
        InvalidArgument: if a number is out of range, or the target is not crossed in the bracket.
    """
    low, high = bracket
    if not (math.isfinite(low) and math.isfinite(high) and low < high and target_kl > 0):
        raise InvalidArgument(
            f"expected a finite bracket (low, high) and a target above 0, found {bracket}, "
            f"{target_kl}"
        )
    if scan < 2 or most < scan or not 0 < calibration < 1 or tolerance <= 0:
        raise InvalidArgument(
            "expected 2 <= scan <= most, 0 < calibration < 1 and tolerance > 0, found "
            f"{scan}, {most}, {calibration}, {tolerance}"
        )
    chosen, rest = _split(cases, calibration, seed)

    def measure(strength: float) -> float:
        found = evaluate_at(strength, chosen).mean(metric).value
        if math.isnan(found):
            raise InvalidArgument(f"the calibration cases have no {metric!r}")
        return found

    found = find_crossing(
        measure, target_kl, bracket, scan=scan, tolerance=tolerance * target_kl, most=most,
        name=metric,
    )  # fmt: skip
    at = found.nearest
    report = evaluate_at(at, rest)
    return EqualKL(at, target_kl, found.at(at), report, found.trace, found.crossings)


def _split(
    cases: Sequence[Conflict], fraction: float, seed: int
) -> tuple[list[Conflict], list[Conflict]]:
    count = round(len(cases) * fraction)
    if not 1 <= count < len(cases):
        raise InvalidArgument(
            f"{len(cases)} cases can't be split into {fraction:g} of them and a rest"
        )
    drawn = set(random.Random(seed).sample(range(len(cases)), count))
    chosen = [case for index, case in enumerate(cases) if index in drawn]
    return chosen, [case for index, case in enumerate(cases) if index not in drawn]
