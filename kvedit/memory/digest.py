"""Canonical bytes and their BLAKE3 digests: the identity of tensors, blocks and documents."""

from __future__ import annotations

import json
from typing import Any

import torch
from blake3 import blake3

__all__ = ["canonical_json", "digest_bytes", "digest_tensor", "tensor_bytes"]

_PARALLEL_FROM = 1 << 20


def canonical_json(data: Any) -> bytes:
    """Returns the one UTF-8 spelling of ``data``: sorted keys, no spaces, no NaN."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_bytes(data: bytes | memoryview) -> str:
    """Returns the BLAKE3 digest of ``data`` in hex (64 characters)."""
    threads = blake3.AUTO if len(data) >= _PARALLEL_FROM else 1
    return blake3(data, max_threads=threads).hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the row-major, little-endian bytes of ``tensor``; copies only if they must move."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data)


def digest_tensor(tensor: torch.Tensor) -> str:
    """Returns the digest of dtype, shape and canonical bytes, in hex."""
    data = tensor_bytes(tensor)
    threads = blake3.AUTO if len(data) >= _PARALLEL_FROM else 1
    dtype = str(tensor.dtype).removeprefix("torch.")
    head = canonical_json({"dtype": dtype, "shape": list(tensor.shape)})
    hasher = blake3(head + b"\n", max_threads=threads)
    hasher.update(data)
    return hasher.hexdigest()
