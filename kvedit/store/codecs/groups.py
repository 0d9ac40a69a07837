"""Group quantisation: keys and values as small integers with a scale for each group of 32.

int8 is symmetric and groups each token's dims. int4 and int2 follow KIVI (Liu et al. 2024,
arXiv 2402.02750): keys are grouped per channel, along the slots, since a key's outliers sit in
fixed channels; values are grouped per token, along the dims; both with a scale and a zero point.
KIVI keeps the newest tokens in full precision, for a cache that grows; a block at rest does not
grow, so nothing is kept here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvedit.store.codecs.tensors import as_float32, byte_view, contiguous_bytes, rounded

__all__ = ["FLOATS", "GROUP", "LARGEST", "SCHEMES", "Scheme", "pack", "unpack"]

GROUP = 32
"""Elements that share a scale; what is left at the end of an axis is a group of its own."""

LARGEST = 2.0**126
"""Numbers beyond this are refused: the width of a group would overflow float32."""

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Dtypes that can be quantised."""

Floats = np.ndarray[Any, Any]
Codes = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scheme:
    """How a lossy encoding makes integers of numbers.

    Args:
        bits: of one integer.
        keys_per_channel: whether keys are grouped along the slots.
        zero_point: whether a group has a zero point, its smallest number; without one it is
            symmetric about 0.
    """

    bits: int
    keys_per_channel: bool
    zero_point: bool

    @property
    def levels(self) -> int:
        """Largest integer."""
        return (1 << self.bits if self.zero_point else 1 << (self.bits - 1)) - 1


SCHEMES = {
    "int8-g32": Scheme(8, keys_per_channel=False, zero_point=False),
    "int4-kivi": Scheme(4, keys_per_channel=True, zero_point=True),
    "int2-kivi": Scheme(2, keys_per_channel=True, zero_point=True),
}
"""Lossy encodings by name."""


@dataclass(frozen=True)
class _Layout:
    """Where things lie: scales (bfloat16), zero points, integers, in this order."""

    shape: tuple[int, ...]  # the grouped axis last
    dtype: torch.dtype
    scheme: Scheme

    @property
    def group(self) -> int:
        return max(1, min(GROUP, self.shape[-1]))

    @property
    def groups(self) -> tuple[int, ...]:
        return (*self.shape[:-1], -(-self.shape[-1] // self.group))

    @property
    def zero_dtype(self) -> torch.dtype:
        # A minimum is one of the tensor's own numbers: exact in its dtype, in half the bytes.
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        groups = math.prod(self.groups)
        zeros = groups * self.zero_dtype.itemsize if self.scheme.zero_point else 0
        return 2 * groups, zeros, -(-math.prod(self.shape) * self.scheme.bits // 8)


def pack(tensor: torch.Tensor, kind: str, scheme: Scheme) -> bytes | None:
    """Returns keys or values ``[head, slot, dim]`` as integers; None if that would save nothing.

    Raises:
        ValueError: if a number is NaN, infinite or beyond 2**126.
    """
    numbers = as_float32(tensor)
    if numbers.size and not float(np.abs(numbers).max()) <= LARGEST:
        raise ValueError(f"{kind} hold NaN, infinity or a number beyond 8.5e37")
    if scheme.keys_per_channel and kind == "keys":
        numbers = np.ascontiguousarray(numbers.swapaxes(1, 2))
    layout = _Layout(numbers.shape, tensor.dtype, scheme)
    if sum(layout.sizes) >= tensor.nbytes:
        return None
    scales, zeros, codes = _quantised(numbers, layout)
    parts = [_bfloat16_bits(scales).tobytes()]
    if scheme.zero_point:
        parts.append(contiguous_bytes(rounded(zeros, layout.zero_dtype)).tobytes())
    return b"".join([*parts, _joined(codes, scheme.bits).tobytes()])


def unpack(
    data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...], kind: str, scheme: Scheme
) -> torch.Tensor:
    """Returns the numbers that :func:`pack` kept: ``integer * scale + zero``, in float32.

    Each step is one rounding of IEEE arithmetic, so every machine gets the same bits.

    Raises:
        ValueError: if the length is wrong, or a scale or zero point is not finite.
    """
    turned = scheme.keys_per_channel and kind == "keys"
    layout = _Layout((shape[0], shape[2], shape[1]) if turned else shape, dtype, scheme)
    sizes = layout.sizes
    if len(data) != sum(sizes):
        raise ValueError(f"quantised {kind} need {sum(sizes)} bytes here, found {len(data)}")
    raw = np.frombuffer(data, np.uint8)
    scales, zeros = _parameters(raw[: sum(sizes[:2])], layout)
    codes = _split(raw[sum(sizes[:2]) :], scheme.bits, math.prod(shape))
    integers = codes if scheme.zero_point else codes.view(np.int8)
    numbers = integers.astype(np.float32).reshape(layout.shape)
    with np.errstate(over="ignore"):
        numbers *= _spread(scales, layout)
        if scheme.zero_point:
            numbers += _spread(zeros, layout)
    return rounded(numbers.swapaxes(1, 2) if turned else numbers, dtype)


def _quantised(numbers: Floats, layout: _Layout) -> tuple[Floats, Floats, Codes]:
    levels = layout.scheme.levels
    grouped = _grouped(numbers, layout)
    high, low = grouped.max(axis=-1), grouped.min(axis=-1)
    if layout.scheme.zero_point:
        width, zeros = high - low, low
    else:
        width, zeros = np.maximum(np.abs(high), np.abs(low)), np.zeros_like(low)
    # Rounded up: the largest number of a group is not cut off.
    scales = _rounded_up(width / np.float32(levels))
    steps = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint((grouped - zeros[..., None]) / steps[..., None])
    np.clip(codes, 0 if layout.scheme.zero_point else -levels, levels, out=codes)
    flat = codes.reshape(*layout.shape[:-1], layout.groups[-1] * layout.group)
    return scales, zeros, flat[..., : layout.shape[-1]].astype(np.int8).view(np.uint8).reshape(-1)


def _grouped(numbers: Floats, layout: _Layout) -> Floats:
    missing = layout.groups[-1] * layout.group - layout.shape[-1]
    if missing:
        # Repeats of a group's last number change neither its minimum nor its maximum.
        edges = [(0, 0)] * (numbers.ndim - 1) + [(0, missing)]
        numbers = np.pad(numbers, edges, mode="edge")
    return numbers.reshape(*layout.groups, layout.group)


def _spread(per_group: Floats, layout: _Layout) -> Floats:
    return np.repeat(per_group, layout.group, axis=-1)[..., : layout.shape[-1]]


def _rounded_up(numbers: Floats) -> Floats:
    # Of a positive float32, the upper half is a bfloat16.
    bits = (numbers.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _bfloat16_bits(scales: Floats) -> np.ndarray[Any, Any]:
    return (scales.view(np.uint32) >> np.uint32(16)).astype("<u2")


def _parameters(raw: Codes, layout: _Layout) -> tuple[Floats, Floats]:
    size = layout.sizes[0]
    bits = np.frombuffer(raw[:size].tobytes(), "<u2").astype(np.uint32) << np.uint32(16)
    scales = bits.view(np.float32).reshape(layout.groups)
    zeros = np.zeros(layout.groups, np.float32)
    if layout.scheme.zero_point:
        stored = torch.empty(layout.groups, dtype=layout.zero_dtype)
        byte_view(stored)[:] = raw[size:].reshape(-1, layout.zero_dtype.itemsize)
        zeros = as_float32(stored)
    if not (np.isfinite(scales).all() and np.isfinite(zeros).all()):
        raise ValueError("a scale or zero point of quantised numbers is not finite")
    return scales, zeros


def _joined(codes: Codes, bits: int) -> Codes:
    """Packs ``8 // bits`` integers into a byte, the first in the lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    padded[: codes.size] = codes
    result = padded[::per_byte].copy()
    for place in range(1, per_byte):
        result |= padded[place::per_byte] << np.uint8(bits * place)
    return result


def _split(packed: Codes, bits: int, count: int) -> Codes:
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    result = np.empty(packed.size * per_byte, np.uint8)
    for place in range(per_byte):
        result[place::per_byte] = (packed >> np.uint8(bits * place)) & np.uint8(2**bits - 1)
    return result[:count]
