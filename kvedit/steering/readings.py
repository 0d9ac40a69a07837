"""Readings: what a contrast set's contexts have at each site, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.memory import ModelSpec

__all__ = ["Readings"]

Stacked = Mapping[str, Mapping[int, torch.Tensor]]
"""Site to layer to ``[pair, kv_head, dim]`` (keys, values) or ``[pair, hidden]``."""


@dataclass(frozen=True, eq=False)
class Readings:
    """Vectors of all pairs; an estimator makes a delta of them.

    Args:
        positive: site to layer to float32 ``[pair, kv_head, dim]`` (keys before RoPE, values) or
            ``[pair, hidden]`` (residual, attention).
        negative: the same of the other side.
        model: facts of the model.
        facts: plain data: digest of the contrast set and of its tokens, the token read, dtype.

    Raises:
        ShapeMismatch: if the sides do not have the same sites, layers and shapes.
        InvalidArgument: if there is no pair.
    """

    positive: Stacked
    negative: Stacked
    model: ModelSpec
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Checks that both sides fit each other."""
        shapes = [
            {(s, i): v.shape for s, each in side.items() for i, v in each.items()}
            for side in (self.positive, self.negative)
        ]
        if shapes[0] != shapes[1] or not shapes[0]:
            raise ShapeMismatch(
                f"positive and negative readings must have equal shapes, found {shapes[0]} and "
                f"{shapes[1]}"
            )
        if len({shape[0] for shape in shapes[0].values()}) != 1 or not self.pairs:
            raise InvalidArgument("readings need one row per pair, and one pair at least")

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return next(v.shape[0] for each in self.positive.values() for v in each.values())

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that were read."""
        return tuple(self.positive)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that were read."""
        return tuple(sorted({layer for each in self.positive.values() for layer in each}))

    def sides(self, site: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns both sides of a site and layer as float64 ``[pair, head, dim]``.

        The residual stream and attention's output count as one head.

        Raises:
            UnknownName: if it was not read.
        """
        if site not in self.positive or layer not in self.positive[site]:
            known = [f"{s}, {i}" for s, each in self.positive.items() for i in each]
            raise UnknownName("reading", f"{site}, {layer}", known)
        both = (self.positive[site][layer].double(), self.negative[site][layer].double())
        first, second = (x if x.ndim == 3 else x[:, None] for x in both)
        return first, second

    def part(self, pairs: Sequence[int]) -> Readings:
        """Returns the readings of some pairs."""
        index = torch.tensor(list(pairs), dtype=torch.int64)

        def taken(side: Stacked) -> Stacked:
            return {s: {i: v[index] for i, v in each.items()} for s, each in side.items()}

        return Readings(taken(self.positive), taken(self.negative), self.model, self.facts)
