"""Which layers and heads an edit touches. Query heads and KV heads are never mixed silently."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["as_indices", "head_mask"]


def as_indices(name: str, values: Iterable[int] | None) -> tuple[int, ...] | None:
    """Returns ``values`` as a tuple of ints, or None for None.

    Raises:
        InvalidArgument: if it is empty or holds something else.
    """
    if values is None:
        return None
    found = tuple(values) if isinstance(values, Iterable) else ()
    if not found or not all(type(value) is int for value in found):
        raise InvalidArgument(
            f"{name}: expected a list of numbers, or None for all, found {values!r}"
        )
    return found


def head_mask(
    memory: KVMemory,
    layer: int,
    heads: tuple[int, ...] | None,
    kv_heads: tuple[int, ...] | None,
) -> torch.Tensor:
    """Returns the query heads of a layer that are chosen, as a bool mask ``[query_head]``.

    Args:
        memory: the memory.
        layer: layer index.
        heads: query heads, or None.
        kv_heads: KV heads, each standing for its whole group of query heads, or None.

    Raises:
        InvalidArgument: if both are given, or a head does not exist.
    """
    spec = memory.model.layers[layer]
    if heads is not None and kv_heads is not None:
        raise InvalidArgument("give heads (query heads) or kv_heads, not both")
    chosen = torch.zeros(spec.query_heads, dtype=torch.bool)
    if kv_heads is not None:
        for head in kv_heads:
            first = _within("KV head", head, spec.kv_heads, layer) * spec.group
            chosen[first : first + spec.group] = True
    elif heads is not None:
        for head in heads:
            chosen[_within("query head", head, spec.query_heads, layer)] = True
    else:
        chosen[:] = True
    return chosen


def _within(kind: str, head: int, total: int, layer: int) -> int:
    found = head + total if head < 0 else head
    if not 0 <= found < total:
        raise InvalidArgument(f"layer {layer} has {total} {kind}s, found {kind} {head}")
    return found
