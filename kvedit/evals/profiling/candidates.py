"""Candidates: the head sets that are tried one against the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import ModelSpec
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.heads import HeadSet, Kind

__all__ = ["candidates_digest", "head_masks", "join", "single_heads", "single_layers"]


def single_heads(
    spec: ModelSpec, kind: Kind, layers: Iterable[int] | None = None
) -> tuple[HeadSet, ...]:
    """Returns each head alone, layer by layer.

    Args:
        spec: the model's facts.
        kind: query heads, or KV heads with their groups.
        layers: layers to take; None takes all.
    """
    chosen = range(len(spec.layers)) if layers is None else sorted(set(layers))
    return tuple(
        HeadSet(((layer, (head,)),), kind)
        for layer in chosen
        for head in range(_heads(spec, layer, kind))
    )


def single_layers(spec: ModelSpec, kind: Kind) -> tuple[HeadSet, ...]:
    """Returns all heads of each layer, one set per layer."""
    return tuple(
        HeadSet(((layer, tuple(range(_heads(spec, layer, kind)))),), kind)
        for layer in range(len(spec.layers))
    )


def join(sets: Sequence[HeadSet]) -> HeadSet:
    """Returns the union of head sets of one kind.

    Raises:
        InvalidArgument: if there is none, or kinds differ.
    """
    kinds = {one.kind for one in sets}
    if len(kinds) != 1:
        raise InvalidArgument(f"expected head sets of one kind, found {sorted(kinds) or 'none'}")
    return HeadSet(tuple(pair for one in sets for pair in one.heads), kinds.pop())


def head_masks(sets: Sequence[HeadSet | None], spec: ModelSpec) -> dict[int, torch.Tensor]:
    """Returns which query heads each set steers, bool ``[row, query_head]`` per layer.

    Args:
        sets: one per row; None steers nothing.
        spec: the model's facts.

    Raises:
        InvalidArgument: if the model lacks a head.
    """
    masks = {
        index: torch.zeros(len(sets), layer.query_heads, dtype=torch.bool)
        for index, layer in enumerate(spec.layers)
    }
    for row, one in enumerate(sets):
        for layer, heads in () if one is None else one.to_query(spec).heads:
            masks[layer][row, list(heads)] = True
    return masks


def candidates_digest(sets: Sequence[HeadSet]) -> str:
    """Returns the digest of head sets in their order."""
    return digest_bytes(canonical_json([one.to_json() for one in sets]))


def _heads(spec: ModelSpec, layer: int, kind: Kind) -> int:
    return spec.layers[layer].query_heads if kind == "query" else spec.layers[layer].kv_heads
