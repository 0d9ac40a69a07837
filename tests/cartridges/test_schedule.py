"""The learning rate of every step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from kvedit.cartridges.schedule import rate


def rates(schedule, steps, **options):
    return [rate(schedule, step, steps, 1.0, **options) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_first_step_of_a_warm_up_is_a_part_of_the_peak(schedule):
    found = rates(schedule, 12, warmup=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(found) == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule):
    assert rates(schedule, 5)[0] == 1.0
    assert rates(schedule, 1) == [1.0]


def test_constant_stays_and_the_others_end_where_told():
    assert rates("constant", 6, warmup=2)[2:] == [1.0] * 4
    assert rates("linear", 5, final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    half = [0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(5)]
    assert rates("cosine", 5) == pytest.approx(half, abs=1e-12)
    assert rates("cosine", 7, warmup=3, final=0.5)[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_they_fall_all_the_way(schedule):
    found = rates(schedule, 20, warmup=5)
    assert all(a > b for a, b in pairwise(found[4:]))
