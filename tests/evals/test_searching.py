"""Searches for a target on functions that are known, and on ladders."""

from __future__ import annotations

import math

import pytest

from kvedit.errors import InvalidArgument
from kvedit.evals.searching import find_crossing, find_rungs

OPTIONS = {"scan": 3, "tolerance": 1e-6, "most": 40}


def test_a_bracket_that_is_too_short_grows_until_the_target_is_passed() -> None:
    asked: list[float] = []

    def square(strength: float) -> float:
        asked.append(strength)
        return strength**2

    found = find_crossing(square, 50.0, (0.0, 1.0), grow=5, **OPTIONS)
    assert found.nearest == pytest.approx(math.sqrt(50), abs=1e-5)
    assert found.at(found.nearest) == pytest.approx(50, abs=1e-5)
    assert len(asked) == len(set(asked)) == len(found.trace)
    # The scan, then 2, 4, 8: the crossing is looked for in the last step alone.
    assert asked[:6] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert 4 <= found.first <= found.nearest <= found.second <= 8
    with pytest.raises(InvalidArgument, match=r"KL is 0 to 16 at strengths 0 to 4.*50"):
        find_crossing(square, 50.0, (0.0, 1.0), grow=2, name="KL", **OPTIONS)


def test_a_square_is_guessed_at_once_and_what_is_crooked_is_halved() -> None:
    square = find_crossing(lambda s: 0.3 * s**2, 1.0, (0.0, 4.0), **OPTIONS)
    assert len(square.trace) == 4
    crooked = find_crossing(lambda s: s**9, 1.0, (0.0, 4.0), **OPTIONS)
    assert crooked.nearest == pytest.approx(1, abs=1e-6) and len(crooked.trace) < 40
    step = find_crossing(lambda s: float(s > 1.23), 0.5, (0.0, 4.0), **OPTIONS)
    assert step.first < 1.23 < step.second and step.second - step.first < 1e-3


def test_brackets_may_run_downwards() -> None:
    found = find_crossing(abs, 3.0, (0.0, -1.0), grow=4, **OPTIONS)
    assert found.nearest == pytest.approx(-3)


@pytest.mark.parametrize("scan", [2, 3, 9])
def test_a_ladder_ends_between_neighbours(scan: int) -> None:
    ladder = [1, 2, 3, 5, 8, 13, 21, 34]
    asked: list[float] = []

    def log(strength: float) -> float:
        asked.append(strength)
        return math.log(strength)

    found = find_rungs(log, 1.8, ladder, scan=scan)
    assert (found.first, found.second, found.nearest) == (5, 8, 5)
    assert len(asked) == len(set(asked))
    falling = find_rungs(lambda s: -s, -6.0, ladder, scan=scan)
    assert (falling.first, falling.second) == (5, 8)
    with pytest.raises(InvalidArgument, match="not crossed"):
        find_rungs(log, 99.0, ladder, scan=scan)


def test_a_ladder_that_goes_up_and_down_takes_the_first_crossing_of_its_scan() -> None:
    values = dict(enumerate([0, 2, 0, 0, 2, 2]))
    found = find_rungs(values.__getitem__, 1.0, list(values), scan=6)
    assert (found.first, found.second, found.crossings) == (0, 1, 3)
