"""Which slots keep their keys: by attention received, by matching pursuit, or as controls."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.editors.matching.logits import Seen
from kvedit.editors.matching.weights import Bounds, bounded_least_squares

__all__ = ["METHODS", "SCORES", "Candidates", "choose", "mass_left", "pool", "score", "take"]

METHODS = ("attention", "omp", "omp_fast", "omp_progressive", "random", "first")
"""Ways to choose keys."""

SCORES = ("rms", "max", "mean")
"""How a slot's attention over all queries becomes one number."""

_FREE = Bounds(0.0, torch.inf)


@dataclass(frozen=True, eq=False)
class Candidates:
    """What may be chosen.

    Args:
        available: bool ``[kv_head, slot]``; the others are never chosen.
        forced: ``[forced]`` int64 slots that are chosen first, by every head.
        count: slots to choose per head, forced ones included.
    """

    available: torch.Tensor
    forced: torch.Tensor
    count: int

    @property
    def open(self) -> torch.Tensor:
        """Slots that are left to choose from, bool ``[kv_head, slot]``."""
        found = self.available.clone()
        found[:, self.forced] = False
        return found


def score(seen: Seen, how: str) -> torch.Tensor:
    """Returns how much attention each slot gets, ``[kv_head, slot]``.

    ``A = E / y``; rms, max or mean of ``A_ij`` over queries i (arXiv 2602.16284,
    HighestAttnKeys).
    """
    if how == "max":
        return (seen.weights * seen.inverse[..., None]).amax(dim=1)
    power = 1 if how == "mean" else 2
    weights = seen.weights if power == 1 else seen.weights.square()
    total = (seen.inverse[:, None] ** power @ weights)[:, 0] / seen.mass.shape[1]
    return total if power == 1 else total.sqrt()


def pool(scores: torch.Tensor, width: int | None) -> torch.Tensor:
    """Returns scores ``[kv_head, slot]`` averaged over ``width`` neighbours, an odd number."""
    if width is None or width == 1:
        return scores
    return torch.nn.functional.avg_pool1d(
        scores[:, None], width, stride=1, padding=width // 2, count_include_pad=False
    )[:, 0]


def choose(
    seen: Seen, candidates: Candidates, method: str, how: str, width: int | None, seed: int
) -> torch.Tensor:
    """Returns the chosen slots ``[kv_head, count]``: forced ones, then the rest, best first.

    Args:
        seen: what the queries see.
        candidates: what may be chosen.
        method: one of :data:`METHODS`.
        how: one of :data:`SCORES`, for ``"attention"``.
        width: pooling width of the scores, or None.
        seed: of ``"random"``.
    """
    if method.startswith("omp"):
        return _pursue(seen, candidates, method)
    if method == "attention":
        ranks = pool(score(seen, how), width)
    elif method == "random":
        drawn = torch.rand(candidates.available.shape, generator=_generator(seed))
        ranks = drawn.to(seen.mass)
    else:
        slots = candidates.available.shape[1]
        ranks = -torch.arange(slots, device=seen.mass.device).expand_as(candidates.available)
    rest = candidates.count - len(candidates.forced)
    return torch.cat((_forced(candidates), _best(ranks, candidates.open, rest)), dim=1)


def take(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns columns ``index`` ``[kv_head, pick]`` of ``[kv_head, query, slot]``, in float64."""
    return weights.gather(2, index[:, None].expand(-1, weights.shape[1], -1)).double()


def mass_left(seen: Seen, forced: torch.Tensor) -> torch.Tensor:
    """Returns the mass ``[kv_head, query]`` that slots beside the forced ones stand for."""
    return (seen.mass.double() - seen.weights[..., forced].double().sum(dim=-1)).clamp_min(0)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _forced(candidates: Candidates) -> torch.Tensor:
    return candidates.forced.expand(len(candidates.available), -1)


def _best(ranks: torch.Tensor, allowed: torch.Tensor, count: int) -> torch.Tensor:
    barred = ranks.double().masked_fill(~allowed, -torch.inf)
    return barred.argsort(dim=1, descending=True, stable=True)[:, :count]


def _schedule(method: str, chosen: int) -> tuple[int, int]:
    """Returns keys per round, and rounds per refit (the published schedules)."""
    if method == "omp" or (method == "omp_progressive" and chosen < 300):
        return 1, 1
    if method == "omp_progressive" and chosen < 1500:
        return 2, 2
    return 4, 2


def _pursue(seen: Seen, candidates: Candidates, method: str) -> torch.Tensor:
    """Returns slots by orthogonal matching pursuit of the mass, with weights from 0.

    Residual ``r = y - M w``; the slot with the largest ``sum_i E_ij r_i`` joins; ``w`` is refitted
    (arXiv 2602.16284). Correlations are kept up through ``E^T M``, so that a pick costs one
    product with ``E``, and several picks of one round one pass over it.
    """
    rest = candidates.count - len(candidates.forced)
    heads, queries, slots = seen.weights.shape
    goal = mass_left(seen, candidates.forced)
    start = (seen.weights.mT @ goal.to(seen.weights)[..., None])[..., 0].double()
    open_ = candidates.open
    picked = torch.zeros(heads, 0, dtype=torch.int64, device=start.device)
    columns = seen.weights.new_zeros(heads, queries, rest, dtype=torch.float64)
    cross = seen.weights.new_zeros(heads, slots, rest)
    weights, gram = start.new_zeros(heads, 0), start.new_zeros(heads, rest, rest)
    rounds = 0
    while picked.shape[1] < rest:
        step, refit_every = _schedule(method, picked.shape[1])
        known = weights.shape[1]
        against = (cross[:, :, :known] @ weights.to(cross)[..., None])[..., 0]
        new = _best(start - against.double(), open_, min(step, rest - picked.shape[1]))
        open_.scatter_(1, new, False)
        at = slice(picked.shape[1], picked.shape[1] + new.shape[1])
        picked = torch.cat((picked, new), dim=1)
        columns[:, :, at] = take(seen.weights, new)
        cross[:, :, at] = seen.weights.mT @ columns[:, :, at].to(cross)
        products = columns[:, :, at].mT @ columns[:, :, : at.stop]
        gram[:, at, : at.stop], gram[:, : at.stop, at] = products, products.mT
        rounds += 1
        if rounds % refit_every == 0:
            aim = start.gather(1, picked)
            begin = torch.nn.functional.pad(weights, (0, at.stop - known), value=1.0)
            size = at.stop
            weights = bounded_least_squares(gram[:, :size, :size], aim, _FREE, begin)
    return torch.cat((_forced(candidates), picked), dim=1)
