"""encode and decode: a block's tensor to bytes and back, by the name of a codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory.blocks import BLOCK_SLOTS
from kvedit.store.codecs import exact
from kvedit.store.codecs.groups import FLOATS, SCHEMES, pack, unpack
from kvedit.store.codecs.tensors import check_shape

__all__ = ["CODECS", "LOSSLESS", "LOSSY", "QUANTISED", "Encoded", "decode", "encode", "quantise"]

LOSSLESS = ("raw", "planes-zstd")
"""Codecs that give back every bit."""

LOSSY = ("int8", "int4", "int2")
"""Codecs that round keys and values; everything else is kept exactly."""

CODECS = LOSSLESS + LOSSY
"""All codecs."""

QUANTISED = ("keys", "values")
"""The kinds of tensors that a lossy codec rounds."""

_ENCODING = {"int8": "int8-g32", "int4": "int4-kivi", "int2": "int2-kivi"}
_EXACT = {
    "raw": exact.from_raw,
    "constant": exact.from_constant,
    "planes-zstd": exact.from_planes,
}


@dataclass(frozen=True)
class Encoded:
    """A block at rest.

    Args:
        encoding: ``"raw"``, ``"constant"``, ``"planes-zstd"``, ``"int8-g32"``, ``"int4-kivi"`` or
            ``"int2-kivi"``.
        data: its bytes.
    """

    encoding: str
    data: bytes


def encode(tensor: torch.Tensor, kind: str, codec: str, slot_axis: int) -> Encoded:
    """Returns a block's tensor as bytes.

    A codec is what to try: slots that are all equal are kept once, and where a codec would not
    make a block smaller, a simpler encoding is used.

    Args:
        tensor: the block, with the axes of its kind and at most 256 slots.
        kind: ``"keys"``, ``"values"``, ``"bias"``, ``"positions"``, …
        codec: one of :data:`CODECS`.
        slot_axis: the axis that counts slots.

    Raises:
        InvalidArgument: if the codec is lossy and keys or values hold NaN, infinity or a number
            beyond 8.5e37, or the block has more than 256 slots.
        UnknownName: if there is no such codec.
        MissingDependency: if zstandard is not installed and the codec is not ``"raw"``.
    """
    check_codec(codec)
    _check_slots(tensor, slot_axis)
    quantised = _quantised(tensor, kind, codec)
    if quantised is not None:
        return quantised
    repeated = exact.constant(tensor, slot_axis)
    if repeated is not None:
        return Encoded("constant", repeated)
    if codec != "raw" and tensor.nbytes:
        data = exact.planes(tensor)
        if len(data) < tensor.nbytes:
            return Encoded("planes-zstd", data)
    return Encoded("raw", exact.raw(tensor))


def decode(
    encoding: str, data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...], kind: str
) -> torch.Tensor:
    """Returns the tensor of an :class:`Encoded`, contiguous and not shared with ``data``.

    Nothing here is trusted: at most 256 times the length of ``data`` and 4096 bytes are allocated
    for the tensor, and work space in proportion.

    Args:
        encoding: as :class:`Encoded` names it.
        data: the bytes.
        dtype: of the tensor.
        shape: of the tensor.
        kind: of the tensor.

    Raises:
        ValueError: if the bytes are no such tensor.
        MissingDependency: if zstandard is needed and not installed.
    """
    shape = tuple(shape)
    size = check_shape(shape, dtype)
    if len(data) < exact.least_bytes(size):
        raise ValueError(f"{len(data)} bytes can't stand for a tensor of {size} bytes")
    if encoding in _EXACT:
        return _EXACT[encoding](data, dtype, shape)
    if encoding not in SCHEMES:
        raise ValueError(f"unknown encoding {encoding!r}: it may need a newer kvedit")
    if kind not in QUANTISED or len(shape) != 3 or dtype not in FLOATS:
        raise ValueError(
            f"{encoding} holds keys or values [head, slot, dim] in floating point, not {kind} of "
            f"{dtype} and shape {shape}"
        )
    return unpack(data, dtype, shape, kind, SCHEMES[encoding])


def quantise(tensor: torch.Tensor, kind: str, codec: str) -> torch.Tensor:
    """Returns what a lossy codec makes of a block: what decode gives for what encode gave.

    Args:
        tensor: the block; keys and values are ``[head, slot, dim]``.
        kind: its kind; all but keys and values are returned as they are.
        codec: one of :data:`CODECS`; a lossless one returns ``tensor`` itself.

    Raises:
        InvalidArgument: as :func:`encode`.
        UnknownName: if there is no such codec.
    """
    check_codec(codec)
    found = _quantised(tensor, kind, codec)
    if found is None:
        return tensor
    return decode(found.encoding, found.data, tensor.dtype, tuple(tensor.shape), kind)


def check_codec(codec: str) -> None:
    """Raises UnknownName unless ``codec`` is one of :data:`CODECS`."""
    if codec not in CODECS:
        raise UnknownName("codec", str(codec), CODECS)


def _quantised(tensor: torch.Tensor, kind: str, codec: str) -> Encoded | None:
    # None where the block stays exact: its slots are all equal, or integers would save nothing.
    if codec in LOSSLESS or kind not in QUANTISED or tensor.dtype not in FLOATS:
        return None
    if tensor.dim() != 3:
        raise InvalidArgument(f"{kind} are [head, slot, dim], found shape {list(tensor.shape)}")
    _check_slots(tensor, 1)
    try:
        data = pack(tensor, kind, SCHEMES[_ENCODING[codec]])
    except ValueError as error:
        raise InvalidArgument(f"codec {codec!r}: {error}; use a lossless codec") from error
    if data is None or exact.constant(tensor, 1) is not None:
        return None
    return Encoded(_ENCODING[codec], data)


def _check_slots(tensor: torch.Tensor, slot_axis: int) -> None:
    if tensor.shape[slot_axis] > BLOCK_SLOTS:
        raise InvalidArgument(
            f"a block has at most {BLOCK_SLOTS} slots, found {tensor.shape[slot_axis]}: cut it "
            "with memory.cut()"
        )
