"""Blocks: a memory cut per layer, kind and slot range; the unit of identity and of storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from blake3 import blake3

from kvedit.memory.digest import canonical_json
from kvedit.memory.parallel import run_all

if TYPE_CHECKING:
    from kvedit.memory.memory import KVMemory

__all__ = [
    "BLOCK_SLOTS",
    "FORMAT",
    "Block",
    "SLOT_AXIS",
    "block_digest",
    "blocks",
    "content_document",
    "rows",
]

FORMAT = "kvedit.memory.1"
"""Name and version of the content document."""

BLOCK_SLOTS = 256
"""Slots of one block; part of the format, since the digests of blocks are part of identity."""

SLOT_AXIS = {
    "bias": 1,
    "keys": 1,
    "offsets": 0,
    "positions": 0,
    "source": 0,
    "tokens": 0,
    "values": 1,
}
"""Axis of the slots, by kind of tensor."""

_PARALLEL_FROM = 1 << 20


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A piece of a memory.

    Args:
        layer: layer index, or -1 for the tokens and their offsets.
        kind: ``"keys"``, ``"values"``, ``"positions"``, ``"source"``, ``"bias"``, ``"tokens"`` or
            ``"offsets"``.
        start: first slot.
        size: slots.
        whole: the tensor that it is cut from, on the CPU and contiguous.
        digest: BLAKE3 of dtype, shape and canonical bytes, hex.
    """

    layer: int
    kind: str
    start: int
    size: int
    whole: torch.Tensor
    digest: str

    @property
    def axis(self) -> int:
        """Axis of the slots."""
        return SLOT_AXIS[self.kind]

    @property
    def tensor(self) -> torch.Tensor:
        """The piece, with the axes of its kind; a view."""
        return self.whole.narrow(self.axis, self.start, self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of the piece."""
        shape = list(self.whole.shape)
        shape[self.axis] = self.size
        return tuple(shape)


def blocks(memory: KVMemory) -> list[Block]:
    """Returns all blocks of a memory, layer by layer, in one fixed order."""
    tensors = [
        (index, kind, tensor)
        for index, layer in memory.layers.items()
        for kind, tensor in layer.tensors()
    ]
    if memory.source is not None:
        tensors += [(-1, kind, tensor) for kind, tensor in memory.source.tensors()]
    # Layers often share positions and sources: each tensor is hashed once.
    different = {(id(tensor), kind): (index, kind, tensor) for index, kind, tensor in tensors}
    large = sum(tensor.nbytes for _, _, tensor in different.values()) > _PARALLEL_FROM
    cuts = dict(zip(different, run_all(_cut, list(different.values()), large), strict=True))
    return [
        block if block.layer == index else replace(block, layer=index)
        for index, kind, tensor in tensors
        for block in cuts[id(tensor), kind]
    ]


def rows(tensor: torch.Tensor, axis: int, start: int, size: int) -> list[memoryview]:
    """Returns the runs of bytes that make slots ``start`` to ``start + size`` of a tensor.

    A block of ``[head, slot, dim]`` is one run per head; of ``[slot, ...]`` it is one run.

    Args:
        tensor: contiguous and on the CPU.
        axis: axis of the slots.
        start: first slot.
        size: slots.
    """
    data = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    outer = tensor.shape[0] if axis else 1
    stride = len(data) // max(outer, 1)
    if not stride:
        return []
    if start == 0 and size >= tensor.shape[axis]:
        return [data]
    step = stride // tensor.shape[axis]
    first, length = start * step, size * step
    return [data[at : at + length] for at in range(first, outer * stride, stride)]


@lru_cache(maxsize=4096)
def digest_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns what a block's digest covers before its bytes, as ``digest_tensor`` has it."""
    return canonical_json({"dtype": dtype, "shape": list(shape)}) + b"\n"


def block_digest(dtype: str, shape: tuple[int, ...], runs: list[memoryview]) -> str:
    """Returns the digest of a block, from its runs of bytes.

    Args:
        dtype: its name, for example ``"bfloat16"``.
        shape: its axes.
        runs: its bytes in row-major order.
    """
    hasher = blake3(digest_head(dtype, shape))
    for run in runs:
        hasher.update(run)
    return hasher.hexdigest()


def _cut(item: tuple[int, str, torch.Tensor]) -> list[Block]:
    layer, kind, tensor = item
    axis = SLOT_AXIS[kind]
    whole = _packed(tensor.detach().cpu())
    dtype = str(whole.dtype).removeprefix("torch.")
    return list(_pieces(layer, kind, whole, axis, dtype))


def _pieces(layer: int, kind: str, whole: torch.Tensor, axis: int, dtype: str) -> Iterator[Block]:
    # An empty tensor is one empty block, so that its shape and dtype are kept.
    slots = whole.shape[axis]
    for start in range(0, max(slots, 1), BLOCK_SLOTS):
        size = min(BLOCK_SLOTS, slots - start)
        shape = (*whole.shape[:axis], size, *whole.shape[axis + 1 :])
        digest = block_digest(dtype, shape, rows(whole, axis, start, size))
        yield Block(layer, kind, start, size, whole, digest)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor with its elements side by side; itself where they are so already."""
    if tensor.is_contiguous() or tensor.ndim == 0 or tensor.stride(-1) != 1:
        return tensor.contiguous()
    # torch starts its thread pool for a copy of this size; numpy copies in this thread.
    raw = np.ascontiguousarray(tensor.view(torch.uint8).numpy())
    return torch.from_numpy(raw).view(tensor.dtype)


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
