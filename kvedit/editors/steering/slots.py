"""Which slots are steered, layer by layer, and whether their positions are their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from kvedit.editors.base import SpanLike
from kvedit.editors.target import as_spans, held_union
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory import KVMemory, Span

__all__ = ["At", "as_at", "check_own_positions", "slot_masks"]

At = Literal["last", "all"] | int | SpanLike | tuple[SpanLike, ...]
"""The last token, all slots, an offset from the end (-1 is the last token), or spans."""


def as_at(value: Any) -> At:
    """Returns a way to choose slots in its one form: ``"last"``, ``"all"``, below -1, or spans.

    Raises:
        InvalidArgument: if it is none.
    """
    if value in ("last", "all"):
        return value  # type: ignore[no-any-return]
    if isinstance(value, int):
        if isinstance(value, bool) or value >= 0:
            raise InvalidArgument(
                f"at: an offset counts from the end, -1 is the last token; found {value!r}. A "
                'token counted from the beginning is {"tokens": [start, stop]}'
            )
        return "last" if value == -1 else value
    return as_spans(value)


def slot_masks(memory: KVMemory, at: At, layers: Iterable[int]) -> dict[int, torch.Tensor]:
    """Returns bool masks ``[slot]`` of the chosen slots, for the layers that hold one of them.

    An offset counts tokens of the memory's source; in a memory that no tokens made it counts each
    layer's slots. A sliding layer that no longer holds a slot is left out.

    Raises:
        SpanNotFound: if no layer holds a chosen slot.
    """
    chosen = [index for index in layers if index in memory.layers]
    masks = {index: _mask(memory, at, index) for index in chosen}
    if not isinstance(at, str | int):
        union = held_union(memory, as_spans(at), chosen)
        masks = {index: union.mask(memory.layers[index]) for index in chosen}
    found = {index: mask.cpu() for index, mask in masks.items() if bool(mask.any())}
    if not found:
        raise SpanNotFound(
            f"none of the layers {chosen} holds the slot at={at!r}: it was dropped, lies before a "
            "window, or was packed, by which slots lose their tokens. Name slots that are there, "
            'for example at={"slots": [-1, n]} with n = memory.slots'
        )
    return found


def _mask(memory: KVMemory, at: At, index: int) -> torch.Tensor:
    layer = memory.layers[index]
    if at == "all":
        return torch.ones(layer.slots, dtype=torch.bool)
    mask = torch.zeros(layer.slots, dtype=torch.bool)
    if not isinstance(at, str | int):
        return mask
    offset = -1 if at == "last" else int(at)
    if memory.tokens_count:
        token = memory.tokens_count + offset
        return Span(((token, token + 1),)).mask(layer).cpu() if token >= 0 else mask
    if layer.slots + offset >= 0:
        mask[offset] = True
    return mask


def check_own_positions(memory: KVMemory, masks: Mapping[int, torch.Tensor]) -> None:
    """Checks that the chosen slots' keys stand at the positions that the memory names.

    Heads that keep different slots side by side (packed) share one nominal position, unless they
    were re-rotated in the same step. Such slots are of no token, and the lineage tells the step.

    Raises:
        InvalidArgument: if a chosen slot was packed.
    """
    edits = [node for node in memory.lineage.nodes if node.operation == "edit"]
    packed = [node.name for node in edits if _packs_in_place(node.name, node.parameters)]
    if not packed:
        return
    for index, mask in masks.items():
        source = memory.layers[index].source.cpu()
        if memory.model.layers[index].rope is not None and bool((source[mask] < 0).any()):
            raise InvalidArgument(
                f"layer {index}: {packed[-1]} packed its slots, whose keys stand at another "
                "position in every head, and a key's delta is turned to its position. Steer with "
                "keys=0 (values have no position), steer before packing, or pack with rerotate=True"
            )


def _packs_in_place(name: str, parameters: str) -> bool:
    return name == "attention_matching" or _packs(json.loads(parameters))


def _packs(parameters: Any) -> bool:
    if isinstance(parameters, list):
        return any(map(_packs, parameters))
    if not isinstance(parameters, dict):
        return False
    if parameters.get("editor") == "attention_matching":
        return True
    packs = parameters.get("layout") == "packed" and parameters.get("rerotate") is False
    return packs or any(map(_packs, parameters.values()))
