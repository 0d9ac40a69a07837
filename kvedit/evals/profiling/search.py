"""Searches: which head sets to try, and in what order they end up.

Each takes a function that measures head sets and returns their effects ranked, the best first.
Ties keep the order of layers and heads, so equal numbers give equal rankings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvedit.errors import InvalidArgument
from kvedit.evals.profiling.candidates import join, single_heads, single_layers
from kvedit.evals.profiling.effects import Effects
from kvedit.memory import ModelSpec
from kvedit.memory.heads import HeadSet, Kind

__all__ = ["Measure", "coarse_to_fine", "exhaustive", "greedy", "ranked"]

Measure = Callable[[Sequence[HeadSet]], Effects]
"""Measures head sets on all probes."""


def ranked(effects: Effects) -> Effects:
    """Returns the effects with the largest mean gain first."""
    order = torch.argsort(effects.gains.mean(dim=0), descending=True, stable=True)
    return effects.select(order.tolist())


def exhaustive(measure: Measure, candidates: Sequence[HeadSet]) -> Effects:
    """Returns every candidate alone, ranked: PASTA's profiling (arXiv 2311.02262, section 3.2)."""
    return ranked(measure(candidates))


def coarse_to_fine(measure: Measure, spec: ModelSpec, kind: Kind, layers: int) -> Effects:
    """Returns the heads of the best layers, ranked.

    Whole layers are tried first, then single heads inside the best of them (AutoPASTA,
    arXiv 2409.10790). It tries ``L + layers * heads`` sets in place of ``L * heads``, and misses a
    good head in a layer whose others do harm.

    Args:
        measure: measures head sets.
        spec: the model's facts.
        kind: query or KV heads.
        layers: layers to look into.

    Raises:
        InvalidArgument: if the model has fewer layers.
    """
    if not 1 <= layers <= len(spec.layers):
        raise InvalidArgument(f"the model has {len(spec.layers)} layers, asked for {layers}")
    coarse = exhaustive(measure, single_layers(spec, kind))
    best = [one.heads[0][0] for one in coarse.sets[:layers]]
    return exhaustive(measure, single_heads(spec, kind, best))


def greedy(
    measure: Measure, candidates: Sequence[HeadSet], count: int, pool: int | None = None
) -> Effects:
    """Returns growing sets: each adds the candidate that helps most beside those before it.

    It ends early once nothing helps any more.

    Args:
        measure: measures head sets.
        candidates: what may be added.
        count: sets at most.
        pool: how many of the candidates that are best alone stay in the race; None keeps all.

    Raises:
        InvalidArgument: if count or pool is below 1.
    """
    if count < 1 or (pool is not None and pool < 1):
        raise InvalidArgument(f"count and pool must be at least 1, found {count}, {pool}")
    alone = exhaustive(measure, candidates)
    left = list(alone.sets[1:pool])
    found = newest = alone.select([0])
    while left and len(found.sets) < count:
        tried = measure([join((newest.sets[0], one)) for one in left])
        best = int(tried.gains.mean(dim=0).argmax())
        added = tried.select([best])
        if float(added.gains.mean()) <= float(newest.gains.mean()):
            break
        found, newest = found.beside(added), added
        left.pop(best)
    return found
