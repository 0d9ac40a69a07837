"""Keys: change the keys of a span before RoPE, whatever the layer's rotation, in any phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from kvedit.editors.base import Reader, SpanLike
from kvedit.editors.phases import Phase, read_anew
from kvedit.editors.target import as_spans, held_union
from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.models.rope import rotate, unrotate

__all__ = ["KeyEdit", "edit_keys", "held_masks"]

Change = Callable[[torch.Tensor], torch.Tensor]
"""From keys before RoPE ``[kv_head, slot, dim]`` to what is added to them."""


@dataclass(frozen=True, eq=False)
class KeyEdit:
    """What is done to one layer's keys: ``R(change(R^-1 k))`` is added, in some slots and heads.

    A rotation is linear, so only what is added is rotated; other keys keep their bits. Computed in
    float32 at least. A layer without RoPE, or of a model with learned positions, has its keys as
    they are.

    Args:
        spec: the layer's facts.
        slots: bool ``[slot]``.
        heads: bool ``[kv_head]``.
        change: from keys before RoPE ``[kv_head, slot, dim]`` of all heads and the chosen slots to
            what is added to them.
    """

    spec: LayerSpec
    slots: torch.Tensor
    heads: torch.Tensor
    change: Change

    def layer(self, layer: LayerKV) -> LayerKV:
        """Returns the layer with changed keys."""
        return dataclasses.replace(layer, keys=self.keys(layer.keys, layer.positions))

    def keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns keys ``[kv_head, slot, dim]`` of the first slots, changed.

        Args:
            keys: as attention reads them.
            positions: ``[slot]``, where they stand.
        """
        index = self.slots[: keys.shape[1]].to(keys.device).nonzero().squeeze(1)
        old = keys[:, index]
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        at = positions[index.to(positions.device)]
        added = rotate(self.change(unrotate(wide, self.spec.rope, at)), self.spec.rope, at)
        chosen = self.heads.to(old.device)[:, None, None]
        changed = keys.clone()
        changed[:, index] = torch.where(chosen, (wide + added).to(old.dtype), old)
        return changed


def held_masks(
    memory: KVMemory, spans: SpanLike | tuple[SpanLike, ...], layers: Iterable[int]
) -> dict[int, torch.Tensor]:
    """Returns bool masks ``[slot]`` of all spans together, for layers that hold a slot of them.

    Raises:
        SpanNotFound: if a span is not there, or no layer holds a slot of it any more.
    """
    chosen = list(layers)
    union = held_union(memory, as_spans(spans), chosen)
    masks = {index: union.mask(memory.layers[index]) for index in chosen}
    return {index: mask for index, mask in masks.items() if bool(mask.any())}


def edit_keys(
    memory: KVMemory, edits: Mapping[int, KeyEdit], phase: Phase, reader: Reader | None
) -> KVMemory:
    """Returns the memory with keys that are changed in a phase.

    Args:
        memory: the memory.
        edits: what is done, by layer.
        phase: ``"decode"`` changes the keys that the memory holds. ``"prefill"`` lets the context
            read itself anew with changed keys, each layer's made from what the layers below then
            hand on, and keeps them unchanged; ``"both"`` keeps the changed ones.
        reader: the model; needed unless the phase is ``"decode"``.

    Raises:
        InvalidArgument: as :func:`~kvedit.editors.phases.read_anew`.
    """
    if phase != "decode":
        memory = read_anew(memory, reader, keys={i: partial(_read, e) for i, e in edits.items()})
    if phase == "prefill":
        return memory
    return memory.with_layers({i: edit.layer(memory.layers[i]) for i, edit in edits.items()})


def _read(edit: KeyEdit, keys: torch.Tensor) -> torch.Tensor:
    # What is read anew holds one slot per token, at its own position.
    return edit.keys(keys, torch.arange(keys.shape[1]))
