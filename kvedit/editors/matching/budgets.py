"""How many slots each KV head, and each chunk of it, may keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from kvedit.errors import InvalidArgument

__all__ = ["COMPETING", "by_mass", "by_weights", "proportional", "slots_of"]

COMPETING: Mapping[str, str] = MappingProxyType({"mass": "mean", "peak": "max"})
"""Ways in which heads compete for slots, and the score of a slot in each: what queries pay it on
average, or at most. One query's answer may hang on one slot, which the average does not see."""

CAP = 0.75
"""Largest share of its slots that a head gets where heads compete (arXiv 2602.16284)."""

FLOOR = 0.2
"""Least share of the uniform budget that a head keeps where heads compete."""

_FUZZ = 1e-9


def slots_of(budget: int | float, slots: int, where: str) -> int:
    """Returns a budget as a number of slots, rounded down, at least 1.

    Args:
        budget: see :func:`~kvedit.editors.compacting.budget.as_budget`.
        slots: slots that there are.
        where: what the error calls the place.

    Raises:
        InvalidArgument: if there are fewer slots.
    """
    if isinstance(budget, float):
        return max(1, min(slots, math.floor(budget * slots + _FUZZ)))
    if budget > slots:
        raise InvalidArgument(
            f"a budget of {budget} slots, {where} has {slots}: ask for fewer, or a share in (0, 1]"
        )
    return budget


def proportional(
    total: int, weights: Sequence[float], low: Sequence[int], high: Sequence[int]
) -> list[int]:
    """Returns whole numbers near ``weights`` times one factor, within bounds, adding to ``total``.

    Where the bounds leave no such sum, the nearest sum that they do.
    """
    total = min(max(total, sum(low)), sum(high))
    fewest, most = 0.0, max(h / w for h, w in zip(high, weights, strict=True) if w > 0) + 1.0
    for _ in range(100):
        middle = (fewest + most) / 2
        reached = sum(
            min(max(middle * w, a), b) for w, a, b in zip(weights, low, high, strict=True)
        )
        fewest, most = (middle, most) if reached < total else (fewest, middle)
    exact = [min(max(most * w, a), b) for w, a, b in zip(weights, low, high, strict=True)]
    found = [min(max(math.floor(x + 1e-9), a), b) for x, a, b in zip(exact, low, high, strict=True)]
    by_rest = sorted(range(len(found)), key=lambda i: (found[i] - exact[i], i))
    while sum(found) < total:
        for i in by_rest:
            if sum(found) < total and found[i] < high[i]:
                found[i] += 1
    return found


def by_mass(
    attention: Mapping[int, torch.Tensor], uniform: Mapping[int, int], forced: int
) -> dict[int, list[int]]:
    """Returns slots per layer and head, so that all heads together keep the best slots.

    Every head keeps its best slots up to a floor of a fifth of the uniform budget; what remains
    goes to the best slots of all heads and layers, up to three quarters of a head's
    slots. The sum is that of the uniform budget.

    Args:
        attention: layer to attention ``[kv_head, slot]``, its mean or its peak over queries, forced
            slots included.
        uniform: layer to the slots that each of its heads would get.
        forced: slots that every head keeps in any case.
    """
    owners, gains = [], []
    counts: dict[int, list[int]] = {}
    for layer, scores in attention.items():
        heads, slots = scores.shape
        least = min(slots, max(forced + 1, math.ceil(FLOOR * uniform[layer])))
        most = max(least, uniform[layer], math.floor(CAP * slots))
        counts[layer] = [least] * heads
        ranked = scores.sort(dim=1, descending=True).values[:, least:most]
        gains.append(ranked.flatten().double().cpu())
        owners += [(layer, head) for head in range(heads) for _ in range(ranked.shape[1])]
    total = sum(uniform[layer] * len(scores) for layer, scores in attention.items())
    spare = max(0, total - sum(sum(row) for row in counts.values()))
    order = torch.cat(gains).argsort(descending=True, stable=True)[:spare]
    for place in order.tolist():
        layer, head = owners[place]
        counts[layer][head] += 1
    return counts


def by_weights(
    weights: Mapping[int, Sequence[float]],
    uniform: Mapping[int, int],
    slots: Mapping[int, int],
    heads: Mapping[int, int],
    forced: int,
) -> dict[int, list[int]]:
    """Returns slots per layer and head in proportion to given weights, of the same sum.

    Raises:
        InvalidArgument: if a layer or head has no weight.
    """
    for layer, count in heads.items():
        if len(weights.get(layer, ())) != count:
            raise InvalidArgument(
                f"allocate: layer {layer} has {count} KV heads, found "
                f"{len(weights.get(layer, ()))} weights"
            )
    places = [(layer, head) for layer in uniform for head in range(heads[layer])]
    counts = proportional(
        sum(uniform[layer] * heads[layer] for layer in uniform),
        [weights[layer][head] for layer, head in places],
        [min(forced + 1, slots[layer]) for layer, _ in places],
        [slots[layer] for layer, _ in places],
    )
    found: dict[int, list[int]] = {layer: [] for layer in uniform}
    for (layer, _), count in zip(places, counts, strict=True):
        found[layer].append(count)
    return found
