"""Keys: change the keys of a span before RoPE, whatever the layer's rotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch

from kvedit.editors.base import SpanLike
from kvedit.editors.target import as_spans, held_union
from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.models.rope import rotate, unrotate

__all__ = ["change_keys", "held_masks"]

Change = Callable[[torch.Tensor], torch.Tensor]
"""From keys before RoPE ``[kv_head, slot, dim]`` to what is added to them."""


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


def change_keys(
    layer: LayerKV, spec: LayerSpec, slots: torch.Tensor, heads: torch.Tensor, change: Change
) -> LayerKV:
    """Returns the layer with ``R(change(R^-1 k))`` added to the keys of some slots and heads.

    A rotation is linear, so only what is added is rotated; other keys keep their bits. Computed in
    float32 at least. A layer without RoPE, or of a model with learned positions, has its keys as
    they are.

    Args:
        layer: the layer.
        spec: its facts.
        slots: bool ``[slot]``.
        heads: bool ``[kv_head]``.
        change: from keys before RoPE ``[kv_head, slot, dim]`` of all heads and the chosen slots to
            what is added to them.
    """
    index = slots.to(layer.keys.device).nonzero().squeeze(1)
    old = layer.keys[:, index]
    wide = old.to(torch.promote_types(old.dtype, torch.float32))
    at = layer.positions[index.to(layer.positions.device)]
    added = rotate(change(unrotate(wide, spec.rope, at)), spec.rope, at)
    chosen = heads.to(old.device)[:, None, None]
    keys = layer.keys.clone()
    keys[:, index] = torch.where(chosen, (wide + added).to(old.dtype), old)
    return dataclasses.replace(layer, keys=keys)
