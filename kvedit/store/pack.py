"""Pack: one safetensors file of extents (runs of blocks) and manifests, named by its header."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory
from kvedit.memory.blocks import BLOCK_SLOTS, SLOT_AXIS
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.dtypes import DTYPES, NAMES
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.refs import is_digest

__all__ = [
    "FORMAT",
    "HEADER_LIMIT",
    "KEY",
    "EXPANSION",
    "Extent",
    "ManifestPlace",
    "Pack",
    "read_head",
]

FORMAT = "kvedit.pack.2"
"""Name and version of the pack format."""

KEY = "kvedit"
"""The only key of a pack's metadata; its value is canonical JSON."""

HEADER_LIMIT = 100_000_000
"""Bytes of the longest header; safetensors reads no longer one."""

EXPANSION = 256
"""How many bytes one stored byte may become, beyond a few KiB; bounds what a hostile file costs."""

_FIRST_FORMAT = "kvedit.pack.1"
_SMALL = 4096
_MOST_AXES = 16


@dataclass(frozen=True)
class Extent:
    """A run of neighbouring blocks of one tensor, stored as one tensor.

    Args:
        blocks: their digests, in order of their slots.
        kind: what the tensor is; empty in packs of the first format.
        dtype: name of the dtype of the blocks.
        shape: axes of all the blocks together.
        encoding: how the bytes are stored; ``"raw"`` for the bytes themselves.
        sealed: whether the stored bytes are encrypted.
        offset: first byte in the file.
        size: bytes in the file.
        checksum: XXH3-128 of the stored bytes, hex; empty in packs of the first format.
    """

    blocks: tuple[str, ...]
    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    sealed: bool
    offset: int
    size: int
    checksum: str

    @property
    def plain(self) -> bool:
        """Whether the file holds the bytes of the tensor as they are."""
        return self.encoding == "raw" and not self.sealed

    def block_shape(self, index: int) -> tuple[int, ...]:
        """Returns the axes of one block."""
        if len(self.blocks) == 1:
            return self.shape
        axis = SLOT_AXIS[self.kind]
        size = min(BLOCK_SLOTS, self.shape[axis] - index * BLOCK_SLOTS)
        return (*self.shape[:axis], size, *self.shape[axis + 1 :])

    def check(self) -> None:
        """Raises ValueError unless sizes, blocks and encoding fit each other."""
        numbers = (*self.shape, self.offset, self.size)
        if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            raise ValueError("a size is no number")
        nbytes = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        slots = self.shape[SLOT_AXIS[self.kind]] if self.kind else 0
        if len(self.blocks) != (max(-(-slots // BLOCK_SLOTS), 1) if self.plain else 1):
            raise ValueError("an extent has not as many blocks as its slots make")
        if not all(is_digest(block) for block in self.blocks):
            raise ValueError("a block is not named by its digest")
        if self.plain and nbytes != self.size:
            raise ValueError(f"{self.size} bytes can't be {self.dtype} {self.shape}")
        if nbytes > EXPANSION * self.size + _SMALL:
            raise ValueError(f"{self.size} bytes may not expand to {nbytes}")


@dataclass(frozen=True)
class ManifestPlace:
    """Where a manifest lies in a pack.

    Args:
        offset: first byte in the file.
        size: bytes in the file.
        sealed: whether they are encrypted.
    """

    offset: int
    size: int
    sealed: bool


@dataclass(frozen=True)
class Pack:
    """What the header of a pack says, checked against the name and the size of the file.

    Args:
        digest: name of the pack.
        size: bytes of the file.
        extents: its extents.
        entries: block digest to its extent and its number in there.
        manifests: record digest to the place of its manifest.
        cipher: fingerprint of the key that it is sealed with, or empty.
        note: what else its writer wrote down, for a pack that travels alone.
        seen: offsets of extents whose blocks were checked in full since the file was opened.
    """

    digest: str
    size: int
    extents: tuple[Extent, ...]
    entries: dict[str, tuple[Extent, int]]
    manifests: dict[str, ManifestPlace]
    cipher: str = ""
    note: Mapping[str, Any] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path, header_only: bool = False) -> Pack:
        """Returns the pack of a file that is named by the pack's digest.

        Args:
            path: the file.
            header_only: whether the file has nothing but the header.

        Raises:
            CorruptMemory: if it is cut off, extended, damaged or another pack.
            FileNotFoundError: if it is missing.
        """
        head, size = read_head(path)
        return cls.parse(head, path.stem, None if header_only else size, str(path))

    @classmethod
    def parse(cls, head: bytes, digest: str, size: int | None, where: str) -> Pack:
        """Returns the pack that begins with these bytes.

        Args:
            head: length and header.
            digest: name of the pack.
            size: bytes of the whole file; None where only the header is at hand.
            where: what to call it in an error.

        Raises:
            CorruptMemory: if the header is not the one of that pack, or the size another.
        """
        try:
            pack = cls._parse(head, digest)
        except SHAPE_ERRORS as error:
            raise CorruptMemory(f"{where}: cut off, extended or damaged: {error}") from error
        if size is not None and pack.size != size:
            raise CorruptMemory(
                f"{where} should have {pack.size} bytes and has {size}: it was cut off or extended"
            )
        return pack

    @classmethod
    def _parse(cls, head: bytes, digest: str) -> Pack:
        header = json.loads(head[8:])
        meta = header.pop("__metadata__")
        if meta == {"format": _FIRST_FORMAT}:
            return cls._first(header, digest, len(head))
        if digest_bytes(head) != digest:
            raise ValueError("its header is not the one that was written")
        facts = json.loads(meta[KEY])
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, this kvedit reads {FORMAT}")
        extents, manifests = [], {}
        end = len(head)
        for name, place in _in_order(header):
            first, end = _place(place, len(head), end)
            sealed = bool(facts["cipher"])
            if name in facts["manifests"]:
                manifests[facts["manifests"][name]] = ManifestPlace(first, end - first, sealed)
            else:
                extent = _extent(facts["extents"][name], place, sealed, first, end - first)
                extents.append(extent)
        if not all(is_digest(record) for record in manifests):
            raise ValueError("a manifest is not named by its digest")
        note = facts.get("note", {})
        if not isinstance(note, dict) or not isinstance(facts["cipher"], str):
            raise ValueError("its note or its cipher is not what it should be")
        entries = _entries(extents)
        return cls(digest, end, tuple(extents), entries, manifests, facts["cipher"], note)

    @classmethod
    def _first(cls, header: dict[str, Any], digest: str, start: int) -> Pack:
        """Returns a pack of the first format: one raw tensor a block, named by its digest."""
        extents = []
        end = start
        for name, place in _in_order(header):
            first, end = _place(place, start, end)
            dtype, shape = NAMES[place["dtype"]], tuple(place["shape"])
            extent = Extent((name,), "", dtype, shape, "raw", False, first, end - first, "")
            extent.check()
            extents.append(extent)
        names = sorted(block for extent in extents for block in extent.blocks)
        if digest_bytes(canonical_json({"format": _FIRST_FORMAT, "blocks": names})) != digest:
            raise ValueError("it holds the blocks of another pack")
        return cls(digest, end, tuple(extents), _entries(extents), {})


def read_head(path: Path) -> tuple[bytes, int]:
    """Returns length and header of a file, and the bytes of the whole file.

    Raises:
        CorruptMemory: if it is shorter than its header.
        FileNotFoundError: if it is missing.
    """
    # Opening a pipe that somebody put there would wait for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise CorruptMemory(f"{path} is no file: something else lies in its place")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if length > min(size - 8, HEADER_LIMIT):
            raise CorruptMemory(f"{path} is cut off or its header is damaged")
        return head + file.read(length), size


def _in_order(header: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))


def _place(place: dict[str, Any], start: int, expected: int) -> tuple[int, int]:
    numbers = (*place["shape"], *place["data_offsets"])
    # Before any product is taken: numbers only, and not too many, whoever wrote the header.
    if len(numbers) > _MOST_AXES or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a shape or an offset is no number")
    first, last = (start + offset for offset in place["data_offsets"])
    # The dtype and shape of safetensors must agree as well, so that its own reader takes the file.
    count = math.prod(place["shape"]) * DTYPES[NAMES[place["dtype"]]].itemsize
    if first != expected or last - first != count:
        raise ValueError("its tensors do not lie one behind the other")
    return first, last


def _extent(
    facts: dict[str, Any], place: dict[str, Any], sealed: bool, offset: int, size: int
) -> Extent:
    dtype, shape = NAMES[place["dtype"]], place["shape"]
    encoding = facts.get("encoding", "raw")
    if encoding != "raw" or sealed:
        dtype, shape = facts["dtype"], facts["shape"]
    extent = Extent(
        tuple(facts["blocks"]),
        facts["kind"],
        dtype,
        tuple(shape),
        encoding,
        sealed,
        offset,
        size,
        facts["checksum"],
    )
    # Without a kind: a single block that was copied from a pack of the first format.
    if facts["kind"] not in {"", *SLOT_AXIS} or not isinstance(encoding, str):
        raise ValueError(f"an extent is of the unknown kind {facts['kind']!r} or encoding")
    if not isinstance(facts["checksum"], str):
        raise ValueError("a checksum is no text")
    extent.check()
    return extent


def _entries(extents: Iterable[Extent]) -> dict[str, tuple[Extent, int]]:
    return {
        block: (extent, number) for extent in extents for number, block in enumerate(extent.blocks)
    }
