"""A delta as one safetensors file: tensors ``keys.3`` and so on, and its facts as JSON beside them.

Plain data only: other programs read the tensors, and nothing in the file is ever instantiated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.files import write_atomically
from kvedit.memory.lineage import Lineage, LineageNode
from kvedit.memory.spec import ModelSpec

__all__ = ["FORMAT", "read_delta", "write_delta"]

FORMAT = "kvedit-delta/1"
_HEADER = "kvedit"
_NAME = re.compile(r"(\w+)\.(\d+)")


def write_delta(
    path: str | os.PathLike[str],
    vectors: Mapping[str, Mapping[int, torch.Tensor]],
    model: ModelSpec,
    facts: Mapping[str, Any],
    lineage: Lineage,
    digest: str,
) -> Path:
    """Returns the path of the file that it wrote, whole or not at all; what is there is replaced.

    Raises:
        InvalidArgument: if its folder is missing, or a folder is in the way.
    """
    from safetensors.torch import save

    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise InvalidArgument(f"{target} is a folder, or its own is missing: choose another file")
    header: dict[str, Any] = {
        "record": None,
        "format": FORMAT,
        "digest": digest,
        "model": model.to_json(),
        "facts": dict(facts),
        "lineage": [node.to_json() for node in lineage.nodes],
    }
    header["record"] = digest_bytes(canonical_json(header))
    tensors = {f"{s}.{i}": v.clone() for s, each in vectors.items() for i, v in each.items()}
    # One entry: safetensors writes several in a random order, and one delta is one file.
    data = save(tensors, metadata={_HEADER: canonical_json(header).decode()})
    write_atomically(target, data, sync=True)
    return target


def read_delta(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[int, torch.Tensor]], ModelSpec, dict[str, Any], Lineage, str]:
    """Returns vectors, model, facts, lineage and the digest that the file says they have.

    Raises:
        InvalidArgument: if there is no such file, or it holds something else than a delta.
        CorruptMemory: if it is no safetensors file, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = Path(path)
    # Opening a pipe that somebody put there would wait for ever.
    if not file.is_file():
        raise InvalidArgument(f"{file} is missing, or no file")
    data = file.read_bytes()
    header = _header(data, file)
    if header.get("format") != FORMAT:
        raise InvalidArgument(
            f"{file} holds no delta of ours: expected the format {FORMAT!r} in its header, found "
            f"{header.get('format')!r}; other libraries' files are read by kvedit.interop"
        )
    if digest_bytes(canonical_json({**header, "record": None})) != header.get("record"):
        raise CorruptMemory(f"{file} is damaged: its header is not the one that was written")
    try:
        vectors = _by_site(load(data))
        model = ModelSpec.from_json(header["model"])
        nodes = tuple(LineageNode.from_json(node) for node in header["lineage"])
        return vectors, model, dict(header["facts"]), Lineage(nodes), str(header["digest"])
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise CorruptMemory(f"{file} is damaged: {type(error).__name__}: {error}") from error


def _header(data: bytes, file: Path) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    try:
        if not 2 <= size <= len(data) - 8:
            raise ValueError(f"a header of {size} bytes in a file of {len(data)}")
        found = json.loads(data[8 : 8 + size])
        texts = found.get("__metadata__", {})
        header = json.loads(texts[_HEADER]) if _HEADER in texts else {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMemory(f"{file} is no safetensors file, or damaged: {error}") from error
    return header if isinstance(header, dict) else {}


def _by_site(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[int, torch.Tensor]]:
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"a tensor named {name!r}")
        vectors.setdefault(match[1], {})[int(match[2])] = tensor
    return vectors
