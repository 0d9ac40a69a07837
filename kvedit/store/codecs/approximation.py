"""approximate: a memory as a lossy codec keeps it, with the error that this makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.blocks import BLOCK_SLOTS
from kvedit.memory.digest import canonical_json
from kvedit.memory.lineage import environment
from kvedit.store.codecs.codec import LOSSLESS, QUANTISED, check_codec, quantise
from kvedit.store.codecs.error import CodecError, PartError, measure
from kvedit.store.codecs.tensors import to_numpy

__all__ = ["approximate"]


def approximate(memory: KVMemory, codec: str) -> tuple[KVMemory, CodecError]:
    """Returns the memory as a codec keeps it, block by block, and how far it is from ``memory``.

    The store keeps what comes out of this as content; its digest is the one that is checked. To
    approximate an approximation again moves it a little further, so do it once, from the
    original.

    Args:
        memory: the memory; its bias, positions and tokens are shared.
        codec: one of :data:`~kvedit.store.codecs.CODECS`. A lossless one returns ``memory``.

    Raises:
        InvalidArgument: if the codec is lossy and keys or values hold NaN, infinity or a number
            beyond 8.5e37.
        MutatedMemory: if a tensor was written in place.
        UnknownName: if there is no such codec.
    """
    check_codec(codec)
    memory.check_unmodified()
    if codec in LOSSLESS:
        return memory, CodecError(codec)
    layers, parts = {}, dict[tuple[int, str], PartError]()
    for index, layer in memory.layers.items():
        changed = {}
        for kind in QUANTISED:
            given = getattr(layer, kind)
            changed[kind] = _by_block(given, kind, codec)
            parts[index, kind] = measure(given, changed[kind])
        layers[index] = dataclasses.replace(layer, **changed)
    lineage = Lineage.join([memory.lineage], _node(memory, codec))
    return memory.with_layers(layers, lineage=lineage), CodecError(codec, parts)


def _by_block(tensor: torch.Tensor, kind: str, codec: str) -> torch.Tensor:
    whole = tensor.detach().cpu()
    starts = range(0, max(whole.shape[1], 1), BLOCK_SLOTS)
    cut = [whole[:, start : start + BLOCK_SLOTS] for start in starts]
    made = [quantise(block, kind, codec) for block in cut]
    if all(block is given for block, given in zip(made, cut, strict=True)):
        return tensor
    raw = np.concatenate([to_numpy(block) for block in made], axis=1)
    flat = torch.from_numpy(raw.reshape(-1)).view(tensor.dtype)
    return flat.reshape(tensor.shape).to(tensor.device)


def _node(memory: KVMemory, codec: str) -> LineageNode:
    head = memory.lineage.head
    return LineageNode(
        operation="edit",
        name="codec",
        version=1,
        parameters=canonical_json({"codec": codec}).decode(),
        inputs=(head.id if head else memory.digest,),
        environment=environment(memory.dtype),
    )
