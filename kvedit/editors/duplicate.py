"""Duplicate: slots that stand m times get m times the attention; exactly a bias of log m.

``e^s`` counted m times is ``e^(s + log m)``. No bias is stored, so any kernel serves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.target import as_indices, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Duplicate"]


@dataclass(frozen=True)
class Duplicate(Editor):
    """Slots of spans, held ``times`` times, beside each other, at one position.

    All heads of a layer see the copies. Engines that expect as many slots as tokens don't serve
    the result.

    Args:
        spans: what to multiply, one span or several; a token in several counts once.
        times: how often each slot stands afterwards; 1 changes nothing.
        layers: layers to touch, negative from the end; None means all.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    spans: tuple[SpanLike, ...]
    times: int
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        if type(self.times) is not int or self.times < 1:
            raise InvalidArgument(f"times: expected a whole number from 1, found {self.times!r}")

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with its slots multiplied."""
        memory = memories[0]
        chosen = memory.layer_indices(self.layers)
        span = held_union(memory, self.spans, chosen)
        changed = {}
        for index in chosen:
            layer = memory.layers[index]
            inside = span.mask(layer).cpu()
            if self.times > 1 and bool(inside.any()):
                counts = torch.where(inside, self.times, 1)
                changed[index] = layer.select(torch.arange(layer.slots).repeat_interleave(counts))
        return memory.with_layers(changed)
