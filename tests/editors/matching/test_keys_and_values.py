"""Scores, picks and values, against a dense reference in numpy written from the equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvedit.editors.matching.keys import Candidates, choose, pool, score
from kvedit.editors.matching.logits import Block, look
from kvedit.editors.matching.values import _GRID, refit
from kvedit.memory import LayerSpec

HEADS, GROUP, TOKENS, SLOTS, DIM = 2, 3, 40, 24, 8


def make(
    dtype: torch.dtype = torch.float64, softcap: float | None = None, bias: bool = True
) -> Any:
    """A block and queries; the bias differs within a group and evicts a slot for all of it."""
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    spec = LayerSpec("full", HEADS * GROUP, HEADS, DIM, DIM, 0.7, softcap=softcap)
    pushes = normal(HEADS, GROUP, SLOTS)
    pushes[0, :, 5] = -torch.inf
    pushes[1, 1, 7] = -torch.inf
    block = Block(normal(HEADS, SLOTS, DIM), normal(HEADS, SLOTS, DIM), pushes, spec)
    return block, normal(HEADS, GROUP, TOKENS, DIM)


def dense(block: Block, queries: torch.Tensor, head: int) -> tuple[np.ndarray, ...]:
    """``E``, ``y`` and ``A`` of one KV head, row by row."""
    rows = []
    for member in range(GROUP):
        for query in queries[head, member].double().numpy():
            s = block.spec.scale * (block.keys[head].double().numpy() @ query)
            if block.spec.softcap is not None:
                s = block.spec.softcap * np.tanh(s / block.spec.softcap)
            if block.bias is not None:
                s = s + block.bias[head, member].double().numpy()
            rows.append(np.exp(s - s.max()))
    e = np.array(rows)
    return e, e.sum(axis=1), e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_mass_and_output_are_those_of_the_equations(
    dtype: torch.dtype, softcap: float | None
) -> None:
    block, queries = make(dtype, softcap)
    seen = look(block, queries)
    for head in range(HEADS):
        e, y, a = dense(block, queries, head)
        np.testing.assert_allclose(seen.weights[head].double(), e, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(seen.mass[head].double(), y, rtol=1e-4)
        output = a @ block.values[head].double().numpy()
        np.testing.assert_allclose(seen.output[head].double(), output, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_has_no_mass() -> None:
    block, queries = make()
    block.bias[1, 2] = -torch.inf  # type: ignore[index]
    seen = look(block, queries)
    assert seen.mass[1, 2 * TOKENS :].eq(0).all() and seen.output[1, 2 * TOKENS :].eq(0).all()
    assert score(seen, "rms").isfinite().all()


@pytest.mark.parametrize(
    ("how", "reduce"),
    [
        ("rms", lambda a: np.sqrt((a**2).mean(axis=0))),
        ("max", lambda a: a.max(axis=0)),
        ("mean", lambda a: a.mean(axis=0)),
    ],
)
def test_scores_are_the_attention_that_slots_get(how: str, reduce: Any) -> None:
    block, queries = make(torch.float32)
    found = score(look(block, queries), how)
    for head in range(HEADS):
        wanted = reduce(dense(block, queries, head)[2])
        np.testing.assert_allclose(found[head].double(), wanted, rtol=1e-4, atol=1e-8)
        pooled = pool(found, 3)[head].double().numpy()
        ends = [wanted[:2].mean(), wanted[-2:].mean()]
        middle = (wanted[:-2] + wanted[1:-1] + wanted[2:]) / 3
        np.testing.assert_allclose(pooled, [ends[0], *middle, ends[1]], rtol=1e-4)


def nnls(columns: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Non-negative least squares by Lawson and Hanson's active set."""
    free = np.zeros(columns.shape[1], dtype=bool)
    weights = np.zeros(columns.shape[1])
    while True:
        slope = columns.T @ (goal - columns @ weights)
        slope[free] = -np.inf
        if free.all() or slope.max() < 1e-10:
            return weights
        free[slope.argmax()] = True
        while True:
            solved = np.zeros_like(weights)
            solved[free] = np.linalg.lstsq(columns[:, free], goal, rcond=None)[0]
            below = free & (solved <= 0)
            if not below.any():
                break
            share = (weights[below] / (weights[below] - solved[below])).min()
            weights = weights + share * (solved - weights)
            free &= weights > 1e-14
        weights = solved


def pursuit(e: np.ndarray, y: np.ndarray, count: int, step: int, every: int) -> list[int]:
    """Orthogonal matching pursuit, as arXiv 2602.16284 writes it."""
    picked: list[int] = []
    weights = np.zeros(0)
    rounds = 0
    while len(picked) < count:
        known = len(weights)
        gains = e.T @ (y - e[:, picked[:known]] @ weights)
        gains[picked] = -np.inf
        picked += list(np.argsort(-gains, kind="stable")[: min(step, count - len(picked))])
        rounds += 1
        if rounds % every == 0:
            weights = nnls(e[:, picked], y)
    return picked


@pytest.mark.parametrize(
    ("method", "step", "every"), [("omp", 1, 1), ("omp_progressive", 1, 1), ("omp_fast", 4, 2)]
)
def test_pursuit_picks_what_the_equations_pick(method: str, step: int, every: int) -> None:
    block, queries = make()
    seen = look(block, queries)
    none = torch.zeros(0, dtype=torch.int64)
    picks = choose(seen, Candidates(block.available(), none, 10), method, "rms", None, 0)
    for head in range(HEADS):
        e, y, _ = dense(block, queries, head)
        assert picks[head].tolist() == pursuit(e, y, 10, step, every)


def test_pursuit_covers_the_mass_that_forced_slots_leave() -> None:
    block, queries = make()
    forced = torch.tensor([2, 9])
    seen = look(block, queries)
    picks = choose(seen, Candidates(block.available(), forced, 8), "omp", "rms", None, 0)
    for head in range(HEADS):
        e, y, _ = dense(block, queries, head)
        barred = e.copy()
        barred[:, [2, 9]] = 0
        assert picks[head].tolist() == [
            2,
            9,
            *pursuit(barred, y - e[:, [2, 9]].sum(axis=1), 6, 1, 1),
        ]


@pytest.mark.parametrize("method", ["attention", "omp", "omp_fast", "random", "first"])
def test_evicted_slots_are_never_chosen_and_forced_ones_always(method: str) -> None:
    block, queries = make()
    candidates = Candidates(block.available(), torch.tensor([20]), SLOTS - 1)
    picks = choose(look(block, queries), candidates, method, "rms", None, 1)
    assert picks.shape == (HEADS, SLOTS - 1)
    assert picks[:, 0].eq(20).all()
    assert sorted(picks[0].tolist()) == [slot for slot in range(SLOTS) if slot != 5]
    assert all(len(set(row.tolist())) == SLOTS - 1 for row in picks)


def regression(rows: int = 90, size: int = 7) -> Any:
    random = torch.Generator().manual_seed(5)
    x = torch.rand(2, rows, size, generator=random, dtype=torch.float64).pow(4)
    y = torch.randn(2, rows, 4, generator=random, dtype=torch.float64)
    before = torch.randn(2, size, 4, generator=random, dtype=torch.float64)
    check = torch.arange(rows) % 5 == 0
    return x, y, before, check


def test_without_ridge_values_are_least_squares() -> None:
    x, y, before, check = regression()
    found = refit(x, y, before, 7, 0.0, check)
    for head in range(2):
        wanted = np.linalg.lstsq(x[head].numpy(), y[head].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found.values[head], wanted, rtol=1e-4)
        assert float(found.condition[head]) == pytest.approx(
            np.linalg.cond(x[head].numpy()), rel=1e-4
        )


def test_fixed_slots_keep_their_values() -> None:
    x, y, before, check = regression()
    found = refit(x, y, before, 5, 0.0, check)
    assert torch.equal(found.values[:, :2], before[:, :2])
    for head in range(2):
        rest = (y[head] - x[head, :, :2] @ before[head, :2]).numpy()
        wanted = np.linalg.lstsq(x[head, :, 2:].numpy(), rest, rcond=None)[0]
        np.testing.assert_allclose(found.values[head, 2:], wanted, rtol=1e-4)


def ridge_fit(x: np.ndarray, y: np.ndarray, before: np.ndarray, share: float) -> np.ndarray:
    """``argmin ||X C - Y||^2 + rho ||C - C0||^2`` by stacking."""
    rho = share * (x**2).sum() / x.shape[1]
    tall = np.concatenate((x, math.sqrt(rho) * np.eye(x.shape[1])))
    return np.linalg.lstsq(tall, np.concatenate((y, math.sqrt(rho) * before)), rcond=None)[0]


def test_a_ridge_pulls_towards_the_values_that_were() -> None:
    x, y, before, check = regression()
    found = refit(x, y, before, 7, 0.3, check)
    for head in range(2):
        wanted = ridge_fit(x[head].numpy(), y[head].numpy(), before[head].numpy(), 0.3)
        np.testing.assert_allclose(found.values[head], wanted, rtol=1e-6)


def test_the_automatic_ridge_has_the_least_error_on_checked_queries() -> None:
    x, y, before, check = regression()
    found = refit(x, y, before, 7, None, check)
    for head in range(2):
        a, b, c, at = x[head].numpy(), y[head].numpy(), before[head].numpy(), check.numpy()
        errors = [
            ((a[at] @ ridge_fit(a[~at], b[~at], c, share) - b[at]) ** 2).sum() for share in _GRID
        ]
        assert float(found.ridge[head]) == _GRID[int(np.argmin(errors))]
        wanted = ridge_fit(a, b, c, float(found.ridge[head]))
        np.testing.assert_allclose(found.values[head], wanted, rtol=1e-5)


def test_a_slot_that_no_query_sees_keeps_its_value() -> None:
    x, y, before, check = regression()
    x[:, :, 3] = 0
    for ridge in (0.0, None):
        found = refit(x, y, before, 7, ridge, check)
        assert torch.equal(found.values[:, 3], before[:, 3]) or torch.allclose(
            found.values[:, 3], before[:, 3], atol=1e-12
        )
