"""safetensors files: tensors and a few texts, written and read with their digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.digest import digest_bytes

__all__ = ["HEADER_KEY", "TensorFile", "read_header", "read_tensors", "write_tensors"]

HEADER_KEY = "kvedit"
"""Under this name the header of a file has our own facts, as JSON; other readers skip them."""

_LONGEST_HEADER = 100_000_000  # of the format


@dataclass(frozen=True, eq=False)
class TensorFile:
    """A safetensors file that was read.

    Args:
        tensors: name to tensor, on the CPU.
        facts: our own facts from the header; empty where another library wrote the file.
        digest: BLAKE3 of the file, hex.
    """

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    digest: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], facts: Any) -> None:
    """Writes a safetensors file.

    Args:
        path: the file; what is there is replaced.
        tensors: name to tensor.
        facts: plain data for the header.
    """
    from safetensors.torch import save_file

    # Layers share positions, and safetensors wants every tensor on its own.
    alone = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    written = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # One entry: safetensors writes several in a random order, and one memory is one file.
    save_file(alone, path, metadata={HEADER_KEY: written})


def read_tensors(path: Path) -> TensorFile:
    """Returns what a safetensors file holds.

    Raises:
        InvalidArgument: if there is no such file.
        CorruptMemory: if it is no safetensors file, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _bytes_of(path)
    facts = _facts(data, path)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CorruptMemory(f"{path} is no safetensors file, or damaged: {error}") from error
    return TensorFile(tensors, facts, digest_bytes(data))


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file; empty if it is none.

    For telling files apart: nothing is checked but that it can be read.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(size)) if 2 <= size <= _LONGEST_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes_of(path: Path) -> bytes:
    # Opening a pipe that somebody put there would wait for ever.
    if not path.is_file():
        raise InvalidArgument(f"{path} is missing, or no file")
    return path.read_bytes()


def _facts(data: bytes, path: Path) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size]) if size <= _LONGEST_HEADER else None
        texts = header.get("__metadata__", {})  # type: ignore[union-attr]
        facts = json.loads(texts[HEADER_KEY]) if HEADER_KEY in texts else {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMemory(f"{path} is no safetensors file, or damaged: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptMemory(f"{path}: its facts under {HEADER_KEY!r} can't be read")
    return facts
