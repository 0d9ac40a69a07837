"""Seka: amplify the keys of spans along learned subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.seka.keys import change_keys, held_masks
from kvedit.editors.seka.projectors import (
    PROJECTORS,
    LayerProjectors,
    operand_layers,
    read_projectors,
)
from kvedit.editors.target import as_indices, as_number, as_spans
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Seka"]


@dataclass(frozen=True)
class Seka(Editor):
    """``k' = k + (g+ P+ k + g- P- k) / 2`` on the keys of spans before RoPE, for heads that pass.

    Li et al. 2026 (SEKA, arXiv 2603.01281), section 3. Called with an operand of kind
    "projectors" (:func:`~kvedit.editors.seka.learning.learn_projectors`) behind the memory.

    Args:
        spans: what to highlight: one span or several; their union is edited once.
        gain_positive: g+, on the subspace of relevant questions; 0.8 in the published code.
        gain_negative: g-, on the subspace of what irrelevant questions share least; 0.2. None uses
            no negative projector, as the code then does: ``k' = k + g+ P+ k``, without the half.
        layers: layers to touch; negative numbers count from the end; None means those of the
            operand.
        min_difference: delta_min, which heads are edited; None takes the operand's own.

    Raises:
        InvalidArgument: if a parameter is out of range, the operand is of another kind, or no head
            passes.
        IncompatibleModel: if another model made the operand.
    """

    rewrites: ClassVar[bool] = True
    operands: ClassVar[tuple[str, ...]] = (PROJECTORS,)

    spans: SpanLike | tuple[SpanLike, ...]
    gain_positive: float = 0.8
    gain_negative: float | None = 0.2
    layers: tuple[int, ...] | None = None
    min_difference: float | None = None

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        gain = as_number("gain_positive", self.gain_positive)
        object.__setattr__(self, "gain_positive", gain)
        for name, low in (("gain_negative", -math.inf), ("min_difference", 0.0)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_number(name, value, low=low))

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the spans' keys amplified."""
        memory, operand = memories
        chosen, entries, facts = operand_layers(memory, operand, PROJECTORS, self.layers)
        masks = held_masks(memory, self.spans, chosen)
        if not self.gain_positive and not self.gain_negative:
            return memory
        floor = facts["min_difference"] if self.min_difference is None else self.min_difference
        changed = {}
        for index, slots in masks.items():
            found = read_projectors(operand, entries[index], floor)
            if bool(found.passes.any()):
                layer, spec = memory.layers[index], memory.model.layers[index]
                added = partial(self._added, found)
                changed[index] = change_keys(layer, spec, slots, found.passes, added)
        if not changed:
            raise InvalidArgument(
                f"no head of the layers {chosen} moves by min_difference={floor} with the "
                "question: the edit would do nothing; lower it, or learn other layers"
            )
        return memory.with_layers(changed)

    def _added(self, projectors: LayerProjectors, keys: torch.Tensor) -> torch.Tensor:
        positive, negative = projectors.split(keys)
        if self.gain_negative is None:
            return self.gain_positive * positive
        return 0.5 * (self.gain_positive * positive + self.gain_negative * negative)
