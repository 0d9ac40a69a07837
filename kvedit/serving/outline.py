"""Outline: what a server needs to know of a stored memory before its keys are read."""

from __future__ import annotations

import dataclasses

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV
from kvedit.store import Store

__all__ = ["outline"]


def outline(store: Store, digest: str) -> KVMemory:
    """Returns a stored memory with zeros for keys and values, all else as it is.

    One block of slots per layer is read, checked as always. The zeros take no room.

    Args:
        store: the store.
        digest: record digest of the memory.

    Raises:
        NotFound: if the store has no such memory.
        InvalidArgument: if it is stored as a recipe, which only its model can follow.
        CorruptMemory: if stored bytes are not those that were put.
    """
    details = store.show(digest)
    if details.codec == "recipe":
        raise InvalidArgument(
            f"{details.record.name} is stored as a recipe: put it with its bytes to serve it"
        )
    head = store.get(digest, slots=(0, 1))
    kinds = ("positions", "source", "bias")
    found = store.peek(digest, kinds=kinds)
    layers = {index: _hollow(layer, found[index]) for index, layer in head.layers.items()}
    return dataclasses.replace(head, layers=layers)


def _hollow(one: LayerKV, parts: dict[str, torch.Tensor]) -> LayerKV:
    slots = len(parts["positions"])
    keys = one.keys.new_zeros(one.heads, 1, one.keys.shape[-1]).expand(-1, slots, -1)
    values = one.values.new_zeros(one.heads, 1, one.values.shape[-1]).expand(-1, slots, -1)
    return LayerKV(keys, values, parts["positions"], parts["source"], parts.get("bias"))
