"""Exact encodings: raw, one slot for all, byte planes under zstd."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch

from kvedit.errors import MissingDependency
from kvedit.store.codecs.tensors import byte_view, contiguous_bytes, to_numpy

__all__ = [
    "constant",
    "from_constant",
    "from_planes",
    "from_raw",
    "least_bytes",
    "planes",
    "raw",
]

_RATIO, _FREE = 256, 4096
_LENGTH = struct.Struct("<I")
_LEVEL = 1
_WINDOW = 1 << 20


def least_bytes(size: int) -> int:
    """Returns the fewest bytes that may stand for a tensor of ``size`` bytes.

    Shapes come from a manifest that anybody may have written, so a reader allocates at most 256
    times what it was given, and 4096 bytes.
    """
    return max(0, -((_FREE - size) // _RATIO))


def raw(tensor: torch.Tensor) -> bytes:
    """Returns the row-major, little-endian bytes of ``tensor``."""
    return contiguous_bytes(tensor).tobytes()


def from_raw(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns the tensor of :func:`raw`.

    Raises:
        ValueError: if the length is wrong.
    """
    _check_length(data, math.prod(shape) * dtype.itemsize)
    result = torch.empty(shape, dtype=dtype)
    byte_view(result)[:] = np.frombuffer(data, np.uint8).reshape(-1, dtype.itemsize)
    return result


def constant(tensor: torch.Tensor, slot_axis: int) -> bytes | None:
    """Returns one slot of a tensor whose slots are all equal, bit for bit; None for others.

    Layout: one byte with the slot axis, then the bytes of the slot.
    """
    if tensor.shape[slot_axis] < 2:
        return None
    found = np.moveaxis(to_numpy(tensor), slot_axis, 0)
    # Bytes are compared: NaN is equal to itself then, and -0 is not 0. Most blocks end here.
    if not np.array_equal(found[0], found[-1]) or not bool((found == found[:1]).all()):
        return None
    data = bytes([slot_axis]) + found[0].tobytes()
    smaller = least_bytes(tensor.nbytes) <= len(data) < tensor.nbytes
    return data if smaller else None


def from_constant(
    data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Returns the tensor of :func:`constant`.

    Raises:
        ValueError: if the length or the slot axis is wrong.
    """
    axis = data[0] if len(data) else len(shape)
    if axis >= len(shape):
        raise ValueError(f"a repeated slot names axis {axis} of a tensor of {len(shape)} axes")
    one = shape[:axis] + shape[axis + 1 :]
    _check_length(data, 1 + math.prod(one) * dtype.itemsize)
    result = torch.empty(shape, dtype=dtype)
    slot = np.frombuffer(data, np.uint8, offset=1).reshape(*one, dtype.itemsize)
    byte_view(result).reshape(*shape, dtype.itemsize)[:] = np.expand_dims(slot, axis)
    return result


def planes(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of ``tensor``, first bytes of all elements first, under zstd.

    Neighbouring keys and values agree in sign and exponent; apart from the mantissas, these
    compress. Layout: length of the frame (uint32), the frame, zeros up to :func:`least_bytes`.

    Raises:
        MissingDependency: if zstandard is not installed.
    """
    split = np.ascontiguousarray(contiguous_bytes(tensor).T)
    # One compressor per call: they are not safe to share between threads.
    frame = _zstandard().ZstdCompressor(level=_LEVEL).compress(split.data.cast("B"))
    data: bytes = _LENGTH.pack(len(frame)) + frame
    return data.ljust(least_bytes(tensor.nbytes), b"\0")


def from_planes(
    data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Returns the tensor of :func:`planes`.

    Raises:
        ValueError: if it is no such frame, or holds more or less than the tensor.
        MissingDependency: if zstandard is not installed.
    """
    size = math.prod(shape) * dtype.itemsize
    unpacked = np.frombuffer(_unpacked(_frame(data), size), np.uint8)
    result = torch.empty(shape, dtype=dtype)
    byte_view(result)[:] = unpacked.reshape(dtype.itemsize, -1).T
    return result


def _frame(data: bytes | memoryview) -> memoryview:
    view = memoryview(data).cast("B")
    length = _LENGTH.unpack_from(view)[0] if len(view) >= _LENGTH.size else len(view)
    stop = _LENGTH.size + length
    if len(view) < stop or any(view[stop:]):
        raise ValueError(f"{len(view)} bytes of a compressed tensor do not hold its one frame")
    return view[_LENGTH.size : stop]


def _unpacked(frame: memoryview, size: int) -> bytes:
    zstandard = _zstandard()
    try:
        facts = zstandard.get_frame_parameters(frame)
        # zstd allocates what the frame's head asks for, so the head is read first.
        if facts.content_size != size or facts.window_size > max(size, _WINDOW):
            raise ValueError(
                f"a compressed tensor of {size} bytes says that it has {facts.content_size} bytes "
                f"and needs a window of {facts.window_size}"
            )
        found: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a compressed tensor is damaged: {error}") from error
    _check_length(found, size)
    return found


def _check_length(data: bytes | memoryview, expected: int) -> None:
    if len(data) != expected:
        raise ValueError(f"a tensor needs {expected} bytes here, found {len(data)}")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency("zstandard", "codecs", "the codec planes-zstd") from error
    return zstandard
