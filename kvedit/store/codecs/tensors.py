"""Tensors as numpy sees them: their bytes, and conversions that start no threads.

torch starts its thread pool for an operation on more than 32768 elements, about the size of one
block. On a busy machine that costs many times the operation, once per block.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

__all__ = ["as_float32", "byte_view", "check_shape", "contiguous_bytes", "rounded", "to_numpy"]

_CHUNK = 32768
# Far above any block; below what overflows in a stride.
_MOST_BYTES = 1 << 48


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns a uint8 array with the axes of ``tensor`` and one more, the bytes of an element.

    It is a view where the tensor is on the CPU and its last axis is not strided: only read it.
    """
    source = tensor.detach().cpu()
    if source.stride(-1) != 1:
        source = source.clone(memory_format=torch.contiguous_format)
    raw: Any = source.view(torch.uint8).numpy()
    size = tensor.element_size()
    strides = (*raw.strides[:-1], raw.strides[-1] * size, raw.strides[-1])
    return np.lib.stride_tricks.as_strided(raw, (*source.shape, size), strides)


def contiguous_bytes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns the row-major bytes of ``tensor``, ``[element, byte]``; a view where it can be."""
    return np.ascontiguousarray(to_numpy(tensor)).reshape(-1, tensor.element_size())


def byte_view(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns the bytes of a contiguous CPU tensor, ``[element, byte]``; writes go through."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return np.asarray(raw).reshape(-1, tensor.element_size())


def as_float32(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Returns ``tensor`` in float32, in a new array."""
    flat = torch.from_numpy(contiguous_bytes(tensor).reshape(-1)).view(tensor.dtype)
    result = torch.empty(tensor.shape, dtype=torch.float32)
    _copy(flat, result.reshape(-1))
    return np.asarray(result.numpy())


def rounded(numbers: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """Returns float32 numbers in ``dtype``, to nearest even, clamped to its finite range.

    Changes ``numbers``.
    """
    limit = min(torch.finfo(dtype).max, float(np.finfo(np.float32).max))
    np.clip(numbers, -limit, limit, out=numbers)
    result = torch.empty(numbers.shape, dtype=dtype)
    _copy(torch.from_numpy(np.ascontiguousarray(numbers)).reshape(-1), result.reshape(-1))
    return result


def check_shape(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns the bytes of a tensor; nothing is allocated.

    Raises:
        ValueError: if ``shape`` is no shape.
    """
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a shape holds whole numbers from 0 on, found {shape}")
    # Axes beside an empty one count as well: torch makes strides of them.
    if len(shape) > 8 or math.prod(max(size, 1) for size in shape) * dtype.itemsize > _MOST_BYTES:
        raise ValueError(f"no block has the shape {shape}")
    return math.prod(shape) * dtype.itemsize


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, source.shape[0], _CHUNK):
        target[start : start + _CHUNK].copy_(source[start : start + _CHUNK])
