"""Pack: one safetensors file of blocks, each named by its digest."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.blocks import Block
from kvedit.memory.digest import canonical_json, digest_bytes, tensor_bytes
from kvedit.store.refs import is_digest

__all__ = ["DTYPES", "Pack", "PackEntry", "encode", "pack_digest"]

FORMAT = "kvedit.pack.1"
"""Name and version of the pack format, also its only metadata: two keys have no fixed order."""

_HEADER_LIMIT = 100_000_000  # safetensors reads no longer one

_DTYPES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "complex64": "C64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "int8": "I8",
    "uint8": "U8",
}
_NAMES = {code: name for name, code in _DTYPES.items()}

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES}
"""Dtypes that a block can have, by name."""


@dataclass(frozen=True)
class PackEntry:
    """Where one block lies in a pack.

    Args:
        dtype: name of its dtype.
        shape: its axes.
        offset: first byte in the file.
        size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Pack:
    """What the header of a pack says, checked against the size and the name of the file.

    Args:
        path: the file.
        size: its bytes.
        entries: block digest to its place.
    """

    path: Path
    size: int
    entries: dict[str, PackEntry]

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Returns the pack of a file.

        Raises:
            CorruptMemory: if it is missing, cut off, extended, damaged or another pack.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(size - 8, _HEADER_LIMIT):
                    _refuse(path, "is cut off or its header is damaged")
                header = file.read(length)
        except FileNotFoundError:
            _refuse(path, "is missing")
        try:
            entries = _entries(json.loads(header), 8 + length, size)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptMemory(f"{path}: cut off, extended or damaged: {error}") from error
        if pack_digest(entries) != path.stem:
            _refuse(path, "holds the blocks of another pack")
        return cls(path, size, entries)


def pack_digest(blocks: Iterable[str]) -> str:
    """Returns the digest that names the pack of these blocks, whatever their order."""
    return digest_bytes(canonical_json({"format": FORMAT, "blocks": sorted(blocks)}))


def encode(blocks: Sequence[Block]) -> Iterator[bytes | memoryview]:
    """Yields the bytes of a pack: header first, then block by block, none of them copied.

    Raises:
        InvalidArgument: if a dtype has no name in the format.
    """
    # Wide types first keeps every block aligned; else the order of the layers stays, so that
    # some layers are read in one go.
    ordered = sorted(blocks, key=lambda block: -block.tensor.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    offset = 0
    for block in ordered:
        tensor = block.tensor
        name = dtype_name(tensor.dtype)
        if name not in _DTYPES:
            raise InvalidArgument(f"can't store {name}; known: {', '.join(_DTYPES)}")
        header[block.digest] = {
            "dtype": _DTYPES[name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for block in ordered:
        yield tensor_bytes(block.tensor)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as digests and manifests spell it."""
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=4096)
def digest_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Returns what a block's digest covers before its bytes, as ``digest_tensor`` has it."""
    return canonical_json({"dtype": dtype, "shape": list(shape)}) + b"\n"


def _entries(header: dict[str, Any], start: int, size: int) -> dict[str, PackEntry]:
    if header.pop("__metadata__") != {"format": FORMAT}:
        raise ValueError(f"its format is not {FORMAT}")
    found = {}
    end = start
    for digest, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _NAMES[facts["dtype"]], tuple(facts["shape"])
        numbers = (*shape, *facts["data_offsets"])
        first, last = (start + offset for offset in facts["data_offsets"])
        count = math.prod(shape) * DTYPES[dtype].itemsize
        plain = is_digest(digest) and all(type(n) is int and n >= 0 for n in numbers)
        if not plain or first != end or last - first != count:
            raise ValueError(f"block {digest} has no place in it")
        found[digest] = PackEntry(dtype, shape, first, count)
        end = last
    if end != size:
        raise ValueError(f"its blocks end at byte {end}, the file at {size}")
    return found


def _refuse(path: Path, what: str) -> NoReturn:
    raise CorruptMemory(f"{path} {what}")
