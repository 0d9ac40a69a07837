"""Bounded least squares: against all active sets, and by the conditions of an optimum."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from kvedit.editors.matching.weights import (
    Bounds,
    _descend,
    bounded_least_squares,
    clamped_least_squares,
)

BOUNDS = (Bounds(0.0, math.inf), Bounds(math.exp(-7), math.exp(7)), Bounds(0.6, 1.4))


def problem(size: int, problems: int = 3, rows: int = 60, spread: float = 2.0) -> tuple:
    """Columns as attention has them: positive, alike, some tiny; the goal is their weighted sum."""
    random = torch.Generator().manual_seed(size)
    logits = spread * torch.randn(problems, rows, size, generator=random, dtype=torch.float64)
    columns = (logits - logits.amax(dim=2, keepdim=True)).exp()
    weights = torch.randn(problems, size, generator=random, dtype=torch.float64) * 2
    noise = 0.3 * torch.rand(problems, rows, generator=random, dtype=torch.float64)
    return columns, (columns @ weights.clamp_min(0)[..., None])[..., 0] + noise


def solved(columns: torch.Tensor, goal: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
    return bounded_least_squares(gram, aim, bounds)


def by_enumeration(columns: np.ndarray, goal: np.ndarray, low: float, high: float) -> float:
    """Least squared error over every choice of weights that are free, low or high."""
    best, size = math.inf, columns.shape[1]
    for states in itertools.product((0, 1, 2) if math.isfinite(high) else (0, 1), repeat=size):
        state = np.array(states)
        weights = np.where(state == 1, low, np.where(state == 2, high, 0.0))
        free = state == 0
        rest = goal - columns[:, ~free] @ weights[~free]
        weights[free] = np.linalg.lstsq(columns[:, free], rest, rcond=None)[0]
        if ((weights >= low - 1e-12) & (weights <= high + 1e-12)).all():
            best = min(best, float(((columns @ weights - goal) ** 2).sum()))
    return best


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_error_is_the_least_of_all_active_sets(bounds: Bounds) -> None:
    columns, goal = problem(6)
    weights = solved(columns, goal, bounds)
    for one, wanted, found in zip(columns.numpy(), goal.numpy(), weights.numpy(), strict=True):
        error = float(((one @ found - wanted) ** 2).sum())
        assert error == pytest.approx(
            by_enumeration(one, wanted, bounds.low, bounds.high), rel=1e-7
        )


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("size", [1, 17, 90])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_the_conditions_of_an_optimum_hold(bounds: Bounds, size: int, spread: float) -> None:
    columns, goal = problem(size, rows=200, spread=spread)
    weights = solved(columns, goal, bounds)
    slope = (columns.mT @ (columns @ weights[..., None] - goal[..., None]))[..., 0]
    slope = slope / columns.norm(dim=1) / goal.norm(dim=1, keepdim=True)  # of unit columns
    assert bool((weights >= bounds.low).all() and (weights <= bounds.high).all())
    low, high = weights <= bounds.low * (1 + 1e-12), weights >= bounds.high * (1 - 1e-12)
    assert most(slope.abs(), ~low & ~high) < 1e-6
    assert most(-slope, low) < 1e-6
    assert most(slope, high) < 1e-6


def most(values: torch.Tensor, where: torch.Tensor) -> float:
    return float(values[where].max()) if bool(where.any()) else -math.inf


def test_the_start_does_not_matter() -> None:
    columns, goal = problem(30)
    gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
    bounds = Bounds(0.0, math.inf)
    cold = bounded_least_squares(gram, aim, bounds)
    warm = bounded_least_squares(gram, aim, bounds, torch.rand(3, 30, dtype=torch.float64) - 0.5)
    torch.testing.assert_close(cold, warm, rtol=1e-6, atol=1e-9)


def test_what_the_data_leave_open_is_one() -> None:
    columns, _ = problem(5)
    columns[:, :, 4] = 0
    doubled = torch.cat((columns, columns[:, :, :1]), dim=2)
    weights = solved(doubled, doubled.sum(dim=2), Bounds(0.0, math.inf))
    torch.testing.assert_close(weights, torch.ones(3, 6, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_fallback_finds_the_same() -> None:
    columns, goal = problem(8)
    gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
    low, high = torch.full_like(aim, 0.6), torch.full_like(aim, 1.4)
    found = _descend(gram, aim, low, high, torch.ones_like(aim))
    wanted = solved(columns, goal, Bounds(0.6, 1.4))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_clamped_solution_is_the_published_one(steps: int) -> None:
    columns, goal = problem(9)
    gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
    found = clamped_least_squares(gram, aim, Bounds(0.05, 3.0), steps)
    for one, wanted, weights in zip(columns.numpy(), goal.numpy(), found.numpy(), strict=True):
        w = np.clip(np.linalg.lstsq(one, wanted, rcond=None)[0], 0.05, 3.0)
        for _ in range(steps):
            w = np.clip(w - one.T @ (one @ w - wanted) / np.linalg.norm(one, 2) ** 2, 0.05, 3.0)
        np.testing.assert_allclose(weights, w, rtol=1e-6)


def test_exact_is_not_worse_than_clamped() -> None:
    columns, goal = problem(40)
    gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
    bounds = Bounds(math.exp(-3), math.exp(3))
    errors = [
        (columns @ w[..., None] - goal[..., None]).square().sum()
        for w in (bounded_least_squares(gram, aim, bounds),
                  clamped_least_squares(gram, aim, bounds, 2))
    ]  # fmt: skip
    assert errors[0] < errors[1]
