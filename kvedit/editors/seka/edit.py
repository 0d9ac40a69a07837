"""Seka: amplify the keys of spans along learned subspaces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from kvedit.editors.base import Reader, SpanLike
from kvedit.editors.phases import Phase, Phased
from kvedit.editors.seka.featuremaps import FeatureMapName, check_learned_with, named_map
from kvedit.editors.seka.keys import KeyEdit, edit_keys, held_masks
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
class Seka(Phased):
    """``k' = k + (g+ P+ k + g- P- k) / 2`` on the keys of spans before RoPE, for heads that pass.

    Li et al. 2026 (SEKA, arXiv 2603.01281), section 3. Called with an operand of kind
    "projectors" (:func:`~kvedit.editors.seka.learning.learn_projectors`) behind the memory, and in
    the phases that read anew with a reader.

    Args:
        spans: what to highlight: one span or several; their union is edited once.
        gain_positive: g+, on the subspace of relevant questions; 0.8 in the published code.
        gain_negative: g-, on the subspace of what irrelevant questions share least; 0.2. None uses
            no negative projector, as the code then does: ``k' = k + g+ P+ k``, without the half.
        layers: layers to touch; negative numbers count from the end; None means those of the
            operand.
        min_difference: delta_min, which heads are edited; None takes the operand's own.
        feature_map: phi of :data:`~kvedit.editors.seka.featuremaps.FEATURE_MAPS`:
            ``k' = phi^-1(phi(k) + added(phi(k)))``. The operand must be learned with the same.
        phase: who reads changed keys. ``"decode"``: later tokens; the context was read before.
            ``"prefill"``: the context, which reads itself anew; later tokens read the unchanged
            keys of that pass. ``"both"``: all, as with the published hook.

    Raises:
        InvalidArgument: if a parameter is out of range, the operand is of another kind or was
            learned with another feature map, no head passes, or the context can't be read anew.
        IncompatibleModel: if another model made the operand.
        UnknownName: if there is no such feature map.
    """

    rewrites: ClassVar[bool] = True
    operands: ClassVar[tuple[str, ...]] = (PROJECTORS,)

    spans: SpanLike | tuple[SpanLike, ...]
    gain_positive: float = 0.8
    gain_negative: float | None = 0.2
    layers: tuple[int, ...] | None = None
    min_difference: float | None = None
    feature_map: FeatureMapName = "none"
    phase: Phase = field(default="decode", kw_only=True)

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        super().__post_init__()
        named_map(self.feature_map)
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
        check_learned_with(self.feature_map, facts)
        masks = held_masks(memory, self.spans, chosen)
        if not self.gain_positive and not self.gain_negative:
            return memory
        floor = facts["min_difference"] if self.min_difference is None else self.min_difference
        edits = {}
        for index, slots in masks.items():
            found = read_projectors(operand, entries[index], floor)
            if bool(found.passes.any()):
                change = partial(self._change, found)
                edits[index] = KeyEdit(memory.model.layers[index], slots, found.passes, change)
        if not edits:
            raise InvalidArgument(
                f"no head of the layers {chosen} moves by min_difference={floor} with the "
                "question: the edit would do nothing; lower it, or learn other layers"
            )
        return edit_keys(memory, edits, self.phase, reader)

    def _change(self, projectors: LayerProjectors, keys: torch.Tensor) -> torch.Tensor:
        return named_map(self.feature_map).added(keys, partial(self._added, projectors))

    def _added(self, projectors: LayerProjectors, features: torch.Tensor) -> torch.Tensor:
        positive, negative = projectors.split(features)
        if self.gain_negative is None:
            return self.gain_positive * positive
        return 0.5 * (self.gain_positive * positive + self.gain_negative * negative)
