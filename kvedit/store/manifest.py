"""Manifest: the canonical document that says which blocks make a memory, and how it came to be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, UnknownName
from kvedit.memory import KVMemory, Lineage, LineageNode, ModelSpec
from kvedit.memory.blocks import BLOCK_SLOTS, SLOT_AXIS, Block, content_document
from kvedit.memory.blocks import FORMAT as CONTENT_FORMAT
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.codecs import CODECS
from kvedit.store.dtypes import DTYPES, dtype_name
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.refs import is_digest

__all__ = ["BlockRef", "Manifest", "Part", "encode_manifest"]

FORMAT = "kvedit.manifest.1"
"""Name and version of the manifest."""

_LAYER_KINDS = {"keys", "positions", "source", "values"}
_SOURCE_KINDS = {"offsets", "tokens"}


@dataclass(frozen=True)
class BlockRef:
    """A block as a manifest names it.

    Args:
        digest: its BLAKE3, hex.
        dtype: name of its dtype.
        shape: its axes.
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Part:
    """One tensor of a memory: blocks that lie one behind the other along the slots.

    Args:
        layer: layer index, or -1 for tokens and their offsets.
        kind: ``"keys"``, ``"values"``, …
        blocks: its blocks in order.
    """

    layer: int
    kind: str
    blocks: tuple[BlockRef, ...]

    @property
    def axis(self) -> int:
        """Axis of the slots."""
        return SLOT_AXIS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes of the whole tensor."""
        shape = list(self.blocks[0].shape)
        shape[self.axis] = sum(block.shape[self.axis] for block in self.blocks)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return self.blocks[0].dtype

    def covering(self, start: int, stop: int) -> Part:
        """Returns the part with only the blocks that slots ``start`` to ``stop`` lie in.

        Past its end, it is the last block.
        """
        slots = self.shape[self.axis]
        first = min(start, max(slots - 1, 0)) // BLOCK_SLOTS
        last = max(min(stop, slots) - 1, 0) // BLOCK_SLOTS
        return Part(self.layer, self.kind, self.blocks[first : max(last, first) + 1])

    def check(self) -> None:
        """Raises ValueError unless the blocks fit together as a memory is cut."""
        *full, last = (block.shape[self.axis] for block in self.blocks)
        kinds = {
            (block.dtype, block.shape[: self.axis], block.shape[self.axis + 1 :])
            for block in self.blocks
        }
        if len(kinds) != 1 or set(full) - {BLOCK_SLOTS} or last > BLOCK_SLOTS:
            raise ValueError(f"blocks of layer {self.layer} {self.kind} do not fit together")


@dataclass(frozen=True)
class Manifest:
    """A manifest whose digests were checked and whose structure is sound.

    Args:
        record: record digest: BLAKE3 of the whole.
        content: content digest: BLAKE3 of the content document.
        document: the content document.
        model: facts of the model that made the memory.
        parts: ``(layer, kind)`` to the tensor's blocks.
        lineage: the steps that made the memory.
        codec: how blocks are stored.
    """

    record: str
    content: str
    document: Mapping[str, Any]
    model: ModelSpec
    parts: Mapping[tuple[int, str], Part]
    lineage: Lineage
    codec: str

    @property
    def layers(self) -> list[int]:
        """Layers that the memory has."""
        return sorted({layer for layer, _ in self.parts if layer >= 0})

    def choose(self, layers: Iterable[int] | None) -> list[int]:
        """Returns ``layers`` with negative numbers counted from the end; None means all.

        Raises:
            UnknownName: if the memory lacks one of them.
            InvalidArgument: if there is none.
        """
        if layers is None:
            return self.layers
        total = len(self.model.layers)
        wanted = [index + total if index < 0 else index for index in layers]
        if not wanted:
            raise InvalidArgument("layers is empty: name at least one, or None for all")
        for index in wanted:
            if index not in self.layers:
                raise UnknownName("layer", str(index), map(str, self.layers))
        return wanted

    def parts_of(self, layers: Iterable[int], slots: tuple[int, int] | None) -> list[Part]:
        """Returns the tensors of some layers, with the blocks that some slots need.

        Args:
            layers: layer indices; tokens and offsets always come along.
            slots: first slot and one past the last, or None for all.

        Raises:
            InvalidArgument: if the slots are no range of this memory.
        """
        wanted = {-1, *layers}
        parts = [part for part in self.parts.values() if part.layer in wanted]
        if slots is None:
            return parts
        longest = max(part.shape[part.axis] for part in parts if part.layer >= 0)
        if not 0 <= slots[0] < slots[1] <= longest:
            raise InvalidArgument(
                f"slots are (first, one past the last) within 0 to {longest}, found {slots}"
            )
        return [part if part.layer < 0 else part.covering(*slots) for part in parts]

    def narrowed(
        self, tensors: Mapping[tuple[int, str], torch.Tensor], slots: tuple[int, int]
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Returns the tensors of :meth:`parts_of`, cut to the slots themselves.

        Args:
            tensors: layer and kind to tensor.
            slots: first slot and one past the last.
        """
        found = {}
        for (layer, kind), tensor in tensors.items():
            if layer >= 0:
                axis = SLOT_AXIS[kind]
                whole = self.parts[layer, kind].shape[axis]
                start, stop = min(slots[0], whole), min(slots[1], whole)
                skip = start - start // BLOCK_SLOTS * BLOCK_SLOTS if start < whole else 0
                size = min(stop - start, tensor.shape[axis])
                tensor = tensor.narrow(axis, min(skip, tensor.shape[axis]), size).clone()
            found[layer, kind] = tensor.contiguous()
        return found

    @classmethod
    def parse(cls, data: bytes, record: str, where: str) -> Manifest:
        """Returns the manifest that these bytes are.

        Args:
            data: the canonical bytes.
            record: their digest, as it is known from elsewhere.
            where: what to call them in an error.

        Raises:
            CorruptMemory: if they are changed or do not describe a memory.
            InvalidArgument: if a newer version of the library wrote them.
        """
        if digest_bytes(data) != record:
            raise CorruptMemory(f"{where}: its bytes are not those that were put")
        try:
            return cls._parse(json.loads(data), record)
        except InvalidArgument as error:
            raise InvalidArgument(f"{where}: {error}") from error
        except SHAPE_ERRORS as error:
            raise CorruptMemory(f"{where} does not describe a memory: {error!r}") from error

    @classmethod
    def _parse(cls, data: dict[str, Any], record: str) -> Manifest:
        document = data["content"]
        versions = (data["format"], document["format"], document["block_slots"])
        known = (FORMAT, CONTENT_FORMAT, BLOCK_SLOTS)
        if versions != known or data["codec"] not in CODECS:
            raise InvalidArgument(
                f"has {versions} and codec {data['codec']!r}, this kvedit reads {known} and "
                f"{', '.join(CODECS)}: use a newer kvedit"
            )
        facts = (document["next_position"], document["rules"], document["source"])
        if tuple(map(type, facts[:2])) != (int, list) or not isinstance(facts[2], dict | None):
            raise ValueError("next_position, rules or source are not what they should be")
        if not 0 <= facts[0] < 1 << 48 or not all(isinstance(rule, dict) for rule in facts[1]):
            raise ValueError("next_position is no position, or a rule no object")
        if facts[2] is not None and not isinstance(facts[2]["text"], str):
            raise ValueError("the source text is no text")
        return cls(
            record=record,
            content=digest_bytes(canonical_json(document)),
            document=document,
            model=ModelSpec.from_json({**document["model"], "name": str(data["model_name"])}),
            parts=_parts(document, data["blocks"]),
            lineage=Lineage(tuple(map(_step, data["lineage"]))),
            codec=data["codec"],
        )


def encode_manifest(memory: KVMemory, cut: list[Block], codec: str = "raw") -> tuple[bytes, str]:
    """Returns the canonical bytes of a memory's manifest, and the memory's content digest.

    The BLAKE3 of the bytes is the record digest.

    Args:
        memory: the memory.
        cut: its blocks, from ``memory.cut()``.
        codec: how its blocks are to be stored.
    """
    table = {block.digest: [dtype_name(block.whole.dtype), list(block.shape)] for block in cut}
    content = content_document(memory, cut)
    manifest = {
        "format": FORMAT,
        "codec": codec,
        "content": content,
        "blocks": table,
        "lineage": [node.to_json() for node in memory.lineage.nodes],
        "model_name": memory.model.name,
    }
    return canonical_json(manifest), digest_bytes(canonical_json(content))


def _parts(document: dict[str, Any], table: dict[str, Any]) -> dict[tuple[int, str], Part]:
    refs = {digest: _block(digest, *facts) for digest, facts in table.items()}
    parts = {}
    for index, kinds in document["blocks"].items():
        layer = int(index)
        required = _SOURCE_KINDS if layer == -1 else _LAYER_KINDS
        if layer < -1 or str(layer) != index or set(kinds) - {"bias"} != required:
            raise ValueError(f"layer {index} has {sorted(kinds)}")
        for kind, digests in kinds.items():
            part = Part(layer, kind, tuple(refs[digest] for digest in digests))
            part.check()
            parts[layer, kind] = part
    if ((-1, "tokens") in parts) != (document["source"] is not None):
        raise ValueError("tokens and source text come together")
    return parts


def _step(data: dict[str, Any]) -> LineageNode:
    node = LineageNode.from_json(data)
    pairs = (text for pair in node.environment for text in pair)
    texts = (node.operation, node.name, node.parameters, node.reproducibility, *node.inputs, *pairs)
    numbers = (node.version, 0 if node.seed is None else node.seed)
    if not all(isinstance(text, str) for text in texts) or set(map(type, numbers)) != {int}:
        raise ValueError("a step of the lineage is not what it should be")
    return node


def _block(digest: str, dtype: str, shape: list[int]) -> BlockRef:
    sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
    if not is_digest(digest) or dtype not in DTYPES or not sizes:
        raise ValueError(f"block {digest} is {dtype} {shape}")
    return BlockRef(digest, dtype, tuple(shape))
