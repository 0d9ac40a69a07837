"""Least squares under bounds: how much mass each kept key stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Bounds", "bounded_least_squares", "clamped_least_squares"]

_JITTER = 1e-10
_TOLERANCE = 1e-9
_PATIENCE = 3
_GRADIENT_STEPS = 3000


@dataclass(frozen=True)
class Bounds:
    """Range of the weights.

    Args:
        low: lowest weight, 0 or above.
        high: highest weight.
    """

    low: float
    high: float


def bounded_least_squares(
    gram: torch.Tensor, target: torch.Tensor, bounds: Bounds, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``argmin ||M w - y||^2`` with ``low <= w <= high``, from normal equations.

    Block principal pivoting (Kim and Park 2011, *Fast nonnegative matrix factorization*,
    algorithm 1; Júdice and Pires 1994 for bounds): every weight is free or at a bound; those that
    break their sign condition change sides together, and one by one where that does not lead on.
    It ends at the exact solution. Columns are scaled to unit length; a ridge of 1e-10 of that
    towards a weight of 1 decides what the data leave open.

    Args:
        gram: ``M^T M`` ``[problem, weight, weight]`` float64.
        target: ``M^T y`` ``[problem, weight]`` float64.
        bounds: the range.
        start: weights to begin with ``[problem, weight]``; those inside of the range are free.

    Returns:
        Weights ``[problem, weight]`` float64.
    """
    scale = gram.diagonal(dim1=1, dim2=2).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    unit = gram / (scale[:, :, None] * scale[:, None, :])
    unit.diagonal(dim1=1, dim2=2).add_(_JITTER)
    aim = target / scale + _JITTER * scale
    low, high = bounds.low * scale, bounds.high * scale
    found = _pivot(unit, aim, low, high, None if start is None else start * scale)
    return (found / scale).clamp(bounds.low, bounds.high)


def clamped_least_squares(
    gram: torch.Tensor, target: torch.Tensor, bounds: Bounds, steps: int
) -> torch.Tensor:
    """Returns weights as the published code gets them: free solution, clamp, gradient steps.

    Args:
        gram: ``M^T M`` ``[problem, weight, weight]`` float64.
        target: ``M^T y`` ``[problem, weight]`` float64.
        bounds: the range that is clamped to.
        steps: projected-gradient steps of size ``1 / ||M||_2^2``.
    """
    power, turn = torch.linalg.eigh(gram)
    largest = power[:, -1:].clamp_min(torch.finfo(gram.dtype).tiny)
    inverse = torch.where(power > 1e-12 * largest, 1 / power, 0.0)
    free = (turn @ (inverse[..., None] * (turn.mT @ target[..., None])))[..., 0]
    weights: torch.Tensor = free.clamp(bounds.low, bounds.high)
    for _ in range(steps):
        slope = (gram @ weights[..., None])[..., 0] - target
        weights = (weights - slope / largest).clamp(bounds.low, bounds.high)
    return weights


def _pivot(
    gram: torch.Tensor,
    target: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    start: torch.Tensor | None,
) -> torch.Tensor:
    problems, size = target.shape
    free = torch.ones_like(target, dtype=torch.bool)
    at = low.clone()
    if start is not None:
        free = (start > low) & (start < high)
        at = torch.where(start >= high, high, low)
    fewest = torch.full((problems,), size + 1, device=target.device)
    tries = torch.full_like(fewest, _PATIENCE)
    order = torch.arange(size, device=target.device)
    tolerance = _TOLERANCE * target.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    for _ in range(5 * size + 50):
        found = _solve(gram, target, free, at)
        slope = (gram @ found[..., None])[..., 0] - target
        under, over = free & (found < low), free & (found > high)
        loose = ~free & torch.where(at > low, slope > tolerance, slope < -tolerance)
        broken = under | over | loose
        count = broken.sum(dim=1)
        if not bool(count.any()):
            return found
        fewer = count < fewest
        together = fewer | (tries > 0)
        tries = torch.where(fewer, _PATIENCE, (tries - 1).clamp_min(0))
        fewest = torch.minimum(fewest, count)
        last = torch.where(broken, order, -1).amax(dim=1, keepdim=True)
        change = broken & (together[:, None] | (order == last))
        at = torch.where(change & under, low, torch.where(change & over, high, at))
        free = free ^ change
    return _descend(gram, target, low, high, found)


def _solve(
    gram: torch.Tensor, target: torch.Tensor, free: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Returns the weights with the free ones solved for and the others at their bounds."""
    held = torch.where(free, 0.0, at)
    rest = target - (gram @ held[..., None])[..., 0]
    inside = free[:, :, None] & free[:, None, :]
    eye = torch.diag_embed((~free).to(gram.dtype))
    solved = torch.linalg.solve(gram * inside + eye, (rest * free)[..., None])[..., 0]
    return torch.where(free, solved, at)


def _descend(
    gram: torch.Tensor,
    target: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    start: torch.Tensor,
) -> torch.Tensor:
    """Accelerated projected gradient, for the rare problem on which rounding makes pivots cycle."""
    size = torch.linalg.matrix_norm(gram, ord=2)[:, None].clamp_min(1e-30)
    weights = start.clamp(low, high)
    ahead, momentum = weights, 1.0
    for _ in range(_GRADIENT_STEPS):
        slope = (gram @ ahead[..., None])[..., 0] - target
        stepped = (ahead - slope / size).clamp(low, high)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = stepped + (momentum - 1) / following * (stepped - weights)
        weights, momentum = stepped, following
    return weights
