"""Fits one block: which slots stay, how much mass each stands for, what values they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from kvedit.editors.matching.keys import Candidates, choose, mass_left, pool, score, take
from kvedit.editors.matching.logits import Block, Seen, look
from kvedit.editors.matching.values import Refit, refit
from kvedit.editors.matching.weights import (
    Bounds,
    bounded_least_squares,
    clamped_least_squares,
)

if TYPE_CHECKING:
    from kvedit.editors.matching.editor import AttentionMatching

__all__ = ["HeadFit", "fit_block"]

_AT_ONCE = 1 << 25
"""Logits of one block that are held at once, as far as whole heads go."""

_REFINEMENTS = 4


@dataclass(frozen=True, eq=False)
class HeadFit:
    """What became of one KV head's slots.

    Args:
        index: ``[kept]`` int64, slots that stay, in ascending order.
        beta: ``[kept]`` float64, log of the mass that each stands for.
        values: ``[kept, dim]`` float64.
        coverage: share of attention that the kept slots had before, mean over the fitted queries.
        condition: condition number of the values' fit; None where none was made.
        ridge: ridge of that fit, as a share of the mean eigenvalue; None likewise.
        clamped: weights that ended at a bound.
    """

    index: torch.Tensor
    beta: torch.Tensor
    values: torch.Tensor
    coverage: float
    condition: float | None = None
    ridge: float | None = None
    clamped: int = 0


def fit_block(
    block: Block,
    queries: torch.Tensor,
    check: torch.Tensor,
    counts: list[int],
    forced: torch.Tensor,
    how: AttentionMatching,
    seed: int,
) -> list[HeadFit]:
    """Returns the fit of each KV head of a block.

    Args:
        block: the slots.
        queries: ``[kv_head, group, token, dim]`` reference queries.
        check: bool ``[token]``, queries on which an automatic ridge is chosen.
        counts: slots that each KV head keeps; a head that has fewer keeps those.
        forced: int64 ``[forced]``, slots that stay as they are.
        how: the options.
        seed: of random choices.
    """
    usable = _usable(block, how)
    forced = forced[usable.all(dim=0)[forced]]
    sizes = [min(count, int(n)) for count, n in zip(counts, usable.sum(dim=1), strict=True)]
    per_head = max(1, queries.shape[1] * queries.shape[2] * block.keys.shape[1])
    found: dict[int, HeadFit] = {}
    for size in dict.fromkeys(sizes):
        heads = [head for head, own in enumerate(sizes) if own == size]
        step = max(1, _AT_ONCE // per_head)
        for start in range(0, len(heads), step):
            some = heads[start : start + step]
            candidates = Candidates(usable[some], forced, size)
            fits = _fit(block.of_heads(some), queries[some], check, candidates, how, seed)
            found.update(zip(some, fits, strict=True))
    return [found[head] for head in range(len(sizes))]


def _usable(block: Block, how: AttentionMatching) -> torch.Tensor:
    if how.fold_bias and block.bias is not None:
        # Without bias a slot can't be hidden from part of a group, so it is hidden from all.
        return (block.bias > -torch.inf).all(dim=1)
    return block.available()


def _fit(
    block: Block,
    queries: torch.Tensor,
    check: torch.Tensor,
    candidates: Candidates,
    how: AttentionMatching,
    seed: int,
) -> list[HeadFit]:
    fixed, size = len(candidates.forced), candidates.count
    folds = how.fold_bias and block.bias is not None
    whole = bool((candidates.available.sum(dim=1) == size).all())
    if (whole or fixed == size) and not folds:
        index = candidates.available.nonzero()[:, 1].reshape(len(block.keys), -1)
        index = candidates.forced.expand(len(block.keys), -1) if fixed == size else index
        return _heads(block, index, index.new_zeros(index.shape), None, None, 0)
    seen = look(block, queries)
    index = choose(seen, candidates, how.keys, how.score, how.pooling, seed)
    weights = torch.ones(index.shape, dtype=torch.float64, device=index.device)
    clamped = torch.zeros_like(weights, dtype=torch.bool)
    if how.bias and not how.fold_bias and size > fixed:
        index, free, clamped = _weigh(seen, candidates, index, how)
        weights[:, fixed:] = free
    beta = weights.log()
    made = _values(block, seen, queries, check, index, beta, fixed, how)
    covered = (take(seen.weights, index).sum(dim=-1) * seen.inverse).mean(dim=1)
    return _heads(block, index, beta, made, covered, clamped.sum(dim=1))


def _weigh(
    seen: Seen, candidates: Candidates, index: torch.Tensor, how: AttentionMatching
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns slots, weights of the free ones, and which of these are at a bound."""
    fixed = len(candidates.forced)
    goal = mass_left(seen, candidates.forced)
    bounds = Bounds(*(float(torch.tensor(b, dtype=torch.float64).exp()) for b in how.bias_range))
    barred = torch.zeros_like(candidates.available)
    weights = goal.new_ones(index[:, fixed:].shape)
    for turn in range(_REFINEMENTS):
        columns = take(seen.weights, index[:, fixed:])
        gram, aim = columns.mT @ columns, (columns.mT @ goal[..., None])[..., 0]
        if how.solver == "nnls":
            weights = bounded_least_squares(gram, aim, bounds, weights if turn else None)
        else:
            weights = clamped_least_squares(gram, aim, bounds, how.steps)
        if how.refine is None or turn == _REFINEMENTS - 1:
            break
        weak = weights.log() <= how.refine + 1e-9
        if not bool(weak.any()):
            break
        left = (goal - (columns @ weights[..., None])[..., 0]).to(seen.weights)
        ranks = (
            (seen.weights.mT @ left[..., None])[..., 0]
            if how.keys.startswith("omp")
            else pool(score(seen, how.score), how.pooling)
        )
        index = _replaced(index, fixed, weak, ranks, candidates.available, barred)
    at_bound = (weights <= bounds.low * (1 + 1e-9)) | (weights >= bounds.high * (1 - 1e-9))
    return index, weights, at_bound


def _replaced(
    index: torch.Tensor,
    fixed: int,
    weak: torch.Tensor,
    ranks: torch.Tensor,
    available: torch.Tensor,
    barred: torch.Tensor,
) -> torch.Tensor:
    """Returns ``index`` with weak picks replaced by the best that were not yet tried."""
    index = index.clone()
    for head in range(len(index)):
        places = fixed + weak[head].nonzero().flatten()
        barred[head, index[head]] = True
        open_ = available[head] & ~barred[head]
        best = ranks[head].double().masked_fill(~open_, -torch.inf)
        order = best.argsort(descending=True, stable=True)[: int(open_.sum())]
        places = places[: len(order)]
        index[head, places] = order[: len(places)]
    return index


def _values(
    block: Block,
    seen: Seen,
    queries: torch.Tensor,
    check: torch.Tensor,
    index: torch.Tensor,
    beta: torch.Tensor,
    fixed: int,
    how: AttentionMatching,
) -> Refit | None:
    """Returns the values' fit under the bias that the result will have; None for none."""
    if not how.values or index.shape[1] == fixed:
        return None
    kept = block.pick(index)
    kept = kept.plain() if how.fold_bias else kept
    scores = kept.logits(queries).double() + beta[:, None]
    attention = scores.softmax(dim=-1).nan_to_num(0.0)  # a query that sees none of them
    rows = rearrange(check.expand(queries.shape[1], -1), "group token -> (group token)")
    ridge = None if how.ridge == "auto" else float(how.ridge)
    return refit(
        attention, seen.output.double(), kept.values.double(), index.shape[1] - fixed, ridge, rows
    )


def _heads(
    block: Block,
    index: torch.Tensor,
    beta: torch.Tensor,
    made: Refit | None,
    covered: torch.Tensor | None,
    clamped: torch.Tensor | int,
) -> list[HeadFit]:
    values = block.pick(index).values.double() if made is None else made.values
    found = []
    for head in range(len(index)):
        order = index[head].argsort()
        found.append(
            HeadFit(
                index[head, order],
                beta[head, order].double(),
                values[head, order],
                1.0 if covered is None else float(covered[head]),
                None if made is None else float(made.condition[head]),
                None if made is None else float(made.ridge[head]),
                0 if isinstance(clamped, int) else int(clamped[head]),
            )
        )
    return found
