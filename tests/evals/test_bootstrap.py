"""Bootstrap: what must hold for every sample, and the normal theory for a large one."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kvedit.errors import InvalidArgument
from kvedit.evals import bootstrap
from kvedit.evals.bootstrap import mean, mean_interval, paired_difference


def sample(n: int, seed: int = 1) -> list[float]:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_constant_has_no_spread_and_one_value_no_interval() -> None:
    assert mean_interval([2.5] * 7) == (2.5, 2.5)
    assert mean_interval([2.5]) is None
    found = mean([2.5])
    assert (found.value, found.low, found.high, found.n) == (2.5, None, None, 1)


def test_no_value_is_nan_and_null_in_json() -> None:
    found = mean([])
    assert math.isnan(found.value) and found.n == 0
    assert json.dumps(found.to_json(), allow_nan=False).startswith('{"value": null')


def test_the_interval_is_that_of_the_normal_theory_for_a_large_sample() -> None:
    values = sample(400)
    low, high = mean_interval(values, seed=3)
    data = torch.tensor(values, dtype=torch.float64)
    error = float(data.std()) / 400**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(float(data.mean()), abs=0.15 * error)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    inside = 0
    for trial in range(200):
        low, high = mean_interval(sample(60, seed=trial), seed=trial)
        inside += low <= 0 <= high
    assert 0.90 <= inside / 200 <= 0.985


def test_it_moves_and_stretches_with_the_values() -> None:
    values = sample(30)
    low, high = mean_interval(values, seed=5)
    moved = mean_interval([4 * value + 10 for value in values], seed=5)
    assert moved == pytest.approx((4 * low + 10, 4 * high + 10))
    assert mean_interval(values, seed=5) == (low, high)
    assert mean_interval(values, seed=6) != (low, high)


def test_drawing_in_parts_changes_no_more_than_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = sample(50)
    whole = mean_interval(values)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 70 * 50)
    assert mean_interval(values) == pytest.approx(whole)


def test_pairing_takes_out_how_hard_a_case_is() -> None:
    hard = {str(i): value for i, value in enumerate(sample(40))}
    better = {key: value + 0.5 for key, value in hard.items()}
    found = paired_difference(better, hard)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
    assert found.clear and found.n == 40
    unpaired = mean_interval(list(better.values()))
    assert unpaired[1] - unpaired[0] > 0.3


def test_only_common_cases_are_compared_and_sides_turn_the_sign() -> None:
    a = {str(i): value for i, value in enumerate(sample(20, 1))}
    b = {str(i): value for i, value in enumerate(sample(30, 2))}
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.n == back.n == 20
    assert there.value == pytest.approx(sum(a[k] - b[k] for k in a) / 20)
    assert there.value == pytest.approx(-back.value)
    assert not paired_difference(a, a).clear
    with pytest.raises(InvalidArgument, match="both sides"):
        paired_difference(a, {"other": 1.0})
