"""Manifest: the canonical document that says which blocks make a memory, and how it came to be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument, UnknownName
from kvedit.memory import KVMemory, Lineage, LineageNode, ModelSpec
from kvedit.memory.blocks import BLOCK_SLOTS, Block, content_document
from kvedit.memory.blocks import FORMAT as CONTENT_FORMAT
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.pack import DTYPES, dtype_name
from kvedit.store.refs import is_digest

__all__ = ["BlockRef", "Manifest", "Part", "encode_manifest"]

FORMAT = "kvedit.manifest.1"
"""Name and version of the manifest."""

CODEC = "raw"
"""How blocks are stored: as their bytes."""

_SLOT_AXIS = {
    "bias": 1,
    "keys": 1,
    "offsets": 0,
    "positions": 0,
    "source": 0,
    "tokens": 0,
    "values": 1,
}
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
        return _SLOT_AXIS[self.kind]

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

    @classmethod
    def read(cls, path: Path, record: str) -> tuple[Manifest, int]:
        """Returns the manifest of a file, and the file's size.

        Raises:
            CorruptMemory: if it is missing, changed or does not describe a memory.
            InvalidArgument: if a newer version of the library wrote it.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise CorruptMemory(f"{path} is missing") from None
        if digest_bytes(data) != record:
            raise CorruptMemory(f"{path}: its bytes are not those that were put")
        try:
            return cls._parse(json.loads(data), record), len(data)
        except InvalidArgument as error:
            raise InvalidArgument(f"{path}: {error}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptMemory(f"{path} does not describe a memory: {error!r}") from error

    @classmethod
    def _parse(cls, data: dict[str, Any], record: str) -> Manifest:
        document = data["content"]
        versions = (data["format"], data["codec"], document["format"], document["block_slots"])
        known = (FORMAT, CODEC, CONTENT_FORMAT, BLOCK_SLOTS)
        if versions != known:
            raise InvalidArgument(f"has {versions}, this kvedit reads {known}: use a newer kvedit")
        facts = (document["next_position"], document["rules"], document["source"])
        if tuple(map(type, facts[:2])) != (int, list) or not isinstance(facts[2], dict | None):
            raise ValueError("next_position, rules or source are not what they should be")
        return cls(
            record=record,
            content=digest_bytes(canonical_json(document)),
            document=document,
            model=ModelSpec.from_json({**document["model"], "name": str(data["model_name"])}),
            parts=_parts(document, data["blocks"]),
            lineage=Lineage(tuple(LineageNode.from_json(node) for node in data["lineage"])),
            codec=data["codec"],
        )


def encode_manifest(memory: KVMemory, cut: list[Block]) -> tuple[bytes, str]:
    """Returns the canonical bytes of a memory's manifest, and the memory's content digest.

    The BLAKE3 of the bytes is the record digest.

    Args:
        memory: the memory.
        cut: its blocks, from ``memory.cut()``.
    """
    table = {
        block.digest: [dtype_name(block.tensor.dtype), list(block.tensor.shape)] for block in cut
    }
    content = content_document(memory, cut)
    manifest = {
        "format": FORMAT,
        "codec": CODEC,
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


def _block(digest: str, dtype: str, shape: list[int]) -> BlockRef:
    sizes = all(type(size) is int and 0 <= size < 1 << 48 for size in shape)
    if not is_digest(digest) or dtype not in DTYPES or not sizes:
        raise ValueError(f"block {digest} is {dtype} {shape}")
    return BlockRef(digest, dtype, tuple(shape))
