"""Document: all of a memory that is no tensor, as JSON, and the names of its tensors.

The hub folder and the plain safetensors file hold a memory whole: positions, bias and rules
included. Only the source text may be left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory import KVMemory, LayerKV, Lineage, LineageNode, ModelSpec, Source
from kvedit.store.parsing import SHAPE_ERRORS

__all__ = ["FORMAT", "document", "tensors", "to_memory", "without_source"]

FORMAT = "kvedit.open.1"
"""Name and version of the document."""

_KINDS = ("keys", "values", "positions", "source", "bias")
_SOURCE = ("tokens", "offsets")


def without_source(memory: KVMemory) -> KVMemory:
    """Returns the memory without its tokens and text; its slots are then nobody's."""
    memory.check_unmodified()  # new layers note the counters anew
    if memory.source is None:
        return memory
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in memory.layers.items()
    }
    return dataclasses.replace(memory, layers=layers, source=None)


def tensors(memory: KVMemory) -> dict[str, torch.Tensor]:
    """Returns all tensors of a memory by name: ``layers.{i}.keys``, …, ``source.tokens``."""
    found = {
        f"layers.{index}.{kind}": tensor
        for index, layer in memory.layers.items()
        for kind, tensor in layer.tensors()
    }
    if memory.source is not None:
        found |= {f"source.{kind}": tensor for kind, tensor in memory.source.tensors()}
    return found


def document(memory: KVMemory, licence: str = "") -> dict[str, Any]:
    """Returns what is no tensor, as plain data.

    Args:
        memory: the memory.
        licence: of the text that it stands for.
    """
    return {
        "format": FORMAT,
        "content": memory.digest,
        "fingerprint": memory.model.to_json()["fingerprint"],
        "model": memory.model.to_json(),
        "next_position": memory.next_position,
        "rules": list(memory.rules),
        "source": None if memory.source is None else memory.source.to_json(),
        "lineage": [node.to_json() for node in memory.lineage.nodes],
        "licence": licence,
    }


def to_memory(facts: Mapping[str, Any], found: Mapping[str, torch.Tensor], where: str) -> KVMemory:
    """Returns the memory of a document and its tensors, compared with the digest it names.

    Args:
        facts: the document.
        found: the tensors by name.
        where: the file, for messages.

    Raises:
        CorruptMemory: if they do not make a memory, or another one than the document says.
        InvalidArgument: if the document is of another format.
    """
    if facts.get("format") != FORMAT:
        raise InvalidArgument(
            f"{where}: expected the format {FORMAT}, found {str(facts.get('format'))[:40]!r}"
        )
    try:
        memory = _built(facts, dict(found))
        digest = memory.digest
    except (*SHAPE_ERRORS, RuntimeError) as error:  # ours are among them
        raise CorruptMemory(f"{where} holds no memory: {error}") from error
    if digest != facts.get("content"):
        raise CorruptMemory(
            f"{where} was changed: it names the content {str(facts.get('content'))[:12]}, and "
            f"holds {digest[:12]}"
        )
    return memory


def _built(facts: Mapping[str, Any], left: dict[str, torch.Tensor]) -> KVMemory:
    layers: dict[int, LayerKV] = {}
    model = ModelSpec.from_json(facts["model"])
    for index in range(len(model.layers)):
        names = {kind: f"layers.{index}.{kind}" for kind in _KINDS}
        parts = {kind: left.pop(name) for kind, name in names.items() if name in left}
        if parts:
            layers[index] = LayerKV(**parts)
    source = None
    if facts["source"] is not None:
        source = Source.from_json(facts["source"], *(left.pop(f"source.{k}") for k in _SOURCE))
    if left:
        raise ValueError(f"nobody knows what {sorted(left)[0]!r} is")
    lineage = Lineage(tuple(LineageNode.from_json(node) for node in facts["lineage"]))
    if type(facts["next_position"]) is not int:
        raise ValueError("next_position is no whole number")
    # Reading them out finds nodes that are not made of what nodes are made of.
    [node.id for node in lineage.nodes]
    return KVMemory(layers, model, facts["next_position"], source, lineage, tuple(facts["rules"]))
