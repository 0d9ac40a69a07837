"""Boost: InstABoost (Guardieiro et al. 2025, arXiv 2506.13734), instruction attention times M."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvedit.editors.base import Reader, SpanLike
from kvedit.editors.phases import Phased, bias_memory, push
from kvedit.editors.target import as_heads, as_indices, as_number, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet

__all__ = ["Boost"]


@dataclass(frozen=True)
class Boost(Phased):
    """Attention to spans, multiplied by M and renormalised: ``log M`` on their logits.

    The paper's first version multiplies the pattern's columns and divides by the sum, in all
    layers and heads, at every step; its third adds a constant B = log M to the logits. Both are
    this bias, against every other key.

    Args:
        spans: the instruction, one span or several; a token in several counts once.
        multiplier: M, 1 or above; 1 changes nothing. The paper tries 1 to 19.
        layers: layers to touch, negative from the end; None means all, as in the paper.
        heads: query or KV heads instead of whole layers; None means all.
        phase: when the bias acts; the paper boosts in both.

    Raises:
        InvalidArgument: if a parameter is out of range, or layers and heads are both given.
    """

    spans: tuple[SpanLike, ...]
    multiplier: float
    layers: tuple[int, ...] | None = None
    heads: HeadSet | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        super().__post_init__()
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        object.__setattr__(self, "heads", as_heads(self.heads))
        if self.layers is not None and self.heads is not None:
            raise InvalidArgument("give layers, or heads, which name their layers; not both")
        multiplier = as_number("multiplier", self.multiplier)
        if multiplier < 1:
            raise InvalidArgument(
                f"multiplier must be 1 or above, found {self.multiplier!r}; Suppress takes "
                "attention away"
            )
        object.__setattr__(self, "multiplier", multiplier)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the spans boosted."""
        memory = memories[0]
        layers = memory.layer_indices(self.layers)
        heads = self.heads or HeadSet.all(memory.model, layers)
        span = held_union(memory, self.spans, [layer for layer, _ in heads.heads])

        def bias(layer: int, source: torch.Tensor) -> torch.Tensor:
            chosen = heads.mask(memory.model, layer)
            return push(chosen, span.inside(source), math.log(self.multiplier))

        return bias_memory(memory, bias, self.phase, reader)
