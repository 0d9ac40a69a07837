"""Blocks: a memory cut per layer, kind and slot range; the unit of identity and of storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvedit.memory.digest import digest_tensor

if TYPE_CHECKING:
    from kvedit.memory.memory import KVMemory

__all__ = ["BLOCK_SLOTS", "FORMAT", "Block", "blocks", "content_document"]

FORMAT = "kvedit.memory.1"
"""Name and version of the content document."""

BLOCK_SLOTS = 256
"""Slots of one block; part of the format, since the digests of blocks are part of identity."""

_SLOT_AXIS = {"keys": 1, "values": 1, "positions": 0, "source": 0, "bias": 1}


@dataclass(frozen=True, eq=False)
class Block:
    """A piece of a memory.

    Args:
        layer: layer index, or -1 for the tokens and their offsets.
        kind: ``"keys"``, ``"values"``, ``"positions"``, ``"source"``, ``"bias"``, ``"tokens"`` or
            ``"offsets"``.
        start: first slot.
        tensor: the piece, with the axes of its kind.
        digest: BLAKE3 of dtype, shape and canonical bytes, hex.
    """

    layer: int
    kind: str
    start: int
    tensor: torch.Tensor
    digest: str


def blocks(memory: KVMemory) -> Iterator[Block]:
    """Yields all blocks of a memory, layer by layer, in one fixed order."""
    for index, layer in memory.layers.items():
        for kind, tensor in layer.tensors():
            yield from _cut(index, kind, tensor, _SLOT_AXIS[kind])
    if memory.source is not None:
        yield from _cut(-1, "tokens", memory.source.tokens, 0)
        yield from _cut(-1, "offsets", memory.source.offsets, 0)


def _cut(layer: int, kind: str, tensor: torch.Tensor, axis: int) -> Iterator[Block]:
    # An empty tensor is one empty block, so that its shape and dtype are kept.
    for start in range(0, max(tensor.shape[axis], 1), BLOCK_SLOTS):
        size = min(BLOCK_SLOTS, tensor.shape[axis] - start)
        piece = _packed(tensor.narrow(axis, start, size))
        yield Block(layer, kind, start, piece, digest_tensor(piece))


def _packed(piece: torch.Tensor) -> torch.Tensor:
    """Returns ``piece`` with its elements side by side; a view where they are so already."""
    if piece.is_contiguous() or piece.device.type != "cpu" or piece.stride(-1) != 1:
        return piece.contiguous()
    # torch starts its thread pool for a copy of this size, once per block; on a busy machine that
    # costs many times the copy. numpy copies in this thread.
    raw = np.ascontiguousarray(piece.detach().view(torch.uint8).numpy())
    return torch.from_numpy(raw).view(piece.dtype)


def content_document(memory: KVMemory, cut: list[Block]) -> dict[str, Any]:
    """Returns the document whose digest is the memory's content digest.

    Args:
        memory: the memory.
        cut: its blocks, from :func:`blocks`.
    """
    layers: dict[str, dict[str, list[str]]] = {}
    for block in cut:
        layers.setdefault(str(block.layer), {}).setdefault(block.kind, []).append(block.digest)
    return {
        "format": FORMAT,
        "block_slots": BLOCK_SLOTS,
        "blocks": layers,
        "next_position": memory.next_position,
        "rules": list(memory.rules),
        "source": memory.source.to_json() if memory.source else None,
        "model": memory.model.identity(),
    }
