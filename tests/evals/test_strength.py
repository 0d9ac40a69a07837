"""Strength at equal KL, on collateral that is known in closed form; and the front of points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from kvedit.errors import InvalidArgument
from kvedit.evals import Conflict, Mean, Point, Report, at_equal_kl, frontier_points, pareto
from kvedit.evals.results import CaseResult, Moved, Preference

CASES = [Conflict("a b", "a", f" p{i}", " x", " y", unrelated=(" u",)) for i in range(20)]


def stand_in(kl: Callable[[float], float], log: list[tuple[float, tuple[str, ...]]]):
    def evaluate_at(strength: float, cases: Sequence[Conflict]) -> Report:
        log.append((strength, tuple(case.key for case in cases)))
        own = Preference(strength, 1.0, strength, 1.0, True, True)
        moved = (Moved(kl(strength), False),)
        results = tuple(CaseResult(case.key, own, (), moved) for case in cases)
        return Report("known", results, strength)

    return evaluate_at


def test_it_finds_the_strength_of_a_known_curve_and_reports_other_cases() -> None:
    log: list[tuple[float, tuple[str, ...]]] = []
    found = at_equal_kl(stand_in(lambda s: s**2, log), CASES, 0.5, (0.0, 4.0), tolerance=1e-3)
    assert found.strength == pytest.approx(0.5**0.5, rel=1e-3)
    assert found.calibrated_kl == pytest.approx(0.5, rel=1e-3)
    assert found.crossings == 1
    chosen = {keys for _, keys in log[:-1]}
    assert len(chosen) == 1
    used, rest = set(chosen.pop()), {result.key for result in found.report.results}
    assert len(used) == 5 and len(rest) == 15 and used | rest == {case.key for case in CASES}
    assert not used & rest
    assert found.report.strength == found.strength
    # No strength is evaluated twice on the calibration cases.
    tried = [strength for strength, _ in log[:-1]]
    assert len(tried) == len(set(tried)) == len(found.trace)


def test_a_curve_that_falls_or_goes_up_and_down_is_no_trouble() -> None:
    log: list[tuple[float, tuple[str, ...]]] = []
    falling = at_equal_kl(stand_in(lambda s: 4 - s, log), CASES, 1.0, (0, 4), tolerance=1e-3)
    assert falling.strength == pytest.approx(3, abs=1e-2)
    wave = at_equal_kl(
        stand_in(lambda s: 1 + math.sin(s), log), CASES, 1.5, (0, 2 * math.pi), tolerance=1e-3,
        scan=9, most=25,
    )  # fmt: skip
    assert wave.strength == pytest.approx(math.pi / 6, rel=1e-2)
    assert wave.crossings == 2


def test_a_step_ends_after_the_allowed_number_at_the_nearest_side() -> None:
    log: list[tuple[float, tuple[str, ...]]] = []
    step = stand_in(lambda s: 0.1 if s < 1.3 else 2.0, log)
    found = at_equal_kl(step, CASES, 0.5, (0, 4), most=9)
    assert len(found.trace) <= 9
    assert found.calibrated_kl == 0.1 and found.strength < 1.3


def test_a_target_out_of_reach_says_what_was_seen() -> None:
    log: list[tuple[float, tuple[str, ...]]] = []
    with pytest.raises(InvalidArgument, match=r"0 to 2 at strengths 0 to 2.*not crossed"):
        at_equal_kl(stand_in(lambda s: s, log), CASES, 3.0, (0, 2))
    assert len({keys for _, keys in log}) == 1
    for wrong in ({"target_kl": 0.0}, {"bracket": (2.0, 1.0)}, {"scan": 1}, {"calibration": 1.0}):
        options = {"target_kl": 1.0, "bracket": (0.0, 2.0), **wrong}
        with pytest.raises(InvalidArgument):
            at_equal_kl(stand_in(lambda s: s, log), CASES, **options)
    with pytest.raises(InvalidArgument, match="split"):
        at_equal_kl(stand_in(lambda s: s, log), CASES[:1], 1.0, (0, 2))
    with pytest.raises(InvalidArgument, match="neighbourhood_kl"):
        at_equal_kl(stand_in(lambda s: s, log), CASES, 1.0, (0, 2), metric="neighbourhood_kl")


def point(gain: float, cost: float, name: str = "m") -> Point:
    return Point(name, None, Mean(gain, None, None, 1), Mean(cost, None, None, 1))


def test_the_front_is_what_brute_force_finds() -> None:
    drawn = torch.randint(0, 6, (60, 2), generator=torch.Generator().manual_seed(0)).tolist()
    points = [point(*pair) for pair in drawn]
    front = pareto(points)
    for candidate in points:
        beaten = any(
            (g >= candidate.gain.value and c <= candidate.cost.value)
            and (g, c) != (candidate.gain.value, candidate.cost.value)
            for g, c in drawn
        )
        assert (candidate in front) == (not beaten)
    costs = [found.cost.value for found in front]
    gains = [found.gain.value for found in front]
    assert costs == sorted(costs) and gains == sorted(gains)


def test_points_carry_the_reports_metrics() -> None:
    report = stand_in(lambda s: s / 10, [])(2.0, CASES[:4])
    (found,) = frontier_points([report])
    assert (found.name, found.strength) == ("known", 2.0)
    assert (found.gain.value, found.cost.value) == (1.0, 0.2)
