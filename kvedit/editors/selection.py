"""Drop and Keep: slots gone, positions of the rest kept; per layer, or per head by eviction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvedit.editors.base import Editor, Reader, SpanLike
from kvedit.editors.target import freeze_target, head_mask
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV

__all__ = ["Drop", "Keep"]


@dataclass(frozen=True)
class Drop(Editor):
    """Removes a span's slots. What is left keeps its positions, so nothing else moves.

    Without heads, slots leave the chosen layers and bytes are saved. With ``heads`` or
    ``kv_heads`` the slots stay for other heads and are evicted (bias -inf) for these.

    Args:
        span: what to drop.
        layers: layers to touch; None means all. Layers may end up with different slots.
        heads: query heads that lose the span.
        kv_heads: KV heads that lose the span, each with its whole group of query heads.

    Raises:
        InvalidArgument: if heads don't exist, or nothing would be left in a layer.
    """

    span: SpanLike
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Makes everything hashable."""
        freeze_target(self)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory without the span."""
        return _without(memories[0], self, drop_inside=True)


@dataclass(frozen=True)
class Keep(Editor):
    """Removes every slot outside of a span; the counterpart of :class:`Drop`.

    Args:
        span: what to keep.
        layers: layers to touch; None means all.
        heads: query heads that lose the rest.
        kv_heads: KV heads that lose the rest, each with its whole group of query heads.

    Raises:
        InvalidArgument: if heads don't exist, or nothing would be left in a layer.
    """

    span: SpanLike
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Makes everything hashable."""
        freeze_target(self)

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with only the span."""
        return _without(memories[0], self, drop_inside=False)


def _without(memory: KVMemory, editor: Drop | Keep, drop_inside: bool) -> KVMemory:
    span = memory.resolve(editor.span)
    per_head = editor.heads is not None or editor.kv_heads is not None
    changed = {}
    for index in memory.layer_indices(editor.layers):
        layer = memory.layers[index]
        inside = span.mask(layer)
        gone = inside if drop_inside else ~inside
        if not bool(gone.any()):
            continue
        if bool(gone.all()) and layer.slots:
            raise InvalidArgument(
                f"layer {index} would lose all of its {layer.slots} slots; keep at least one"
            )
        if per_head:
            changed[index] = _evicted(memory, index, layer, gone, editor)
        else:
            changed[index] = layer.select(~gone)
    return memory.with_layers(changed)


def _evicted(
    memory: KVMemory, index: int, layer: LayerKV, gone: torch.Tensor, editor: Drop | Keep
) -> LayerKV:
    chosen = head_mask(memory, index, editor.heads, editor.kv_heads).to(gone.device)
    touched = chosen[:, None] & gone[None, :]
    return layer.add_bias(
        torch.zeros(touched.shape, device=gone.device).masked_fill(touched, -math.inf)
    )
