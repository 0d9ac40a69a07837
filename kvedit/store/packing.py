"""Packing: blocks and manifests become the bytes of a pack, none of them copied where raw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from kvedit.errors import InvalidArgument
from kvedit.memory.blocks import Block, block_digest, rows
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.memory.parallel import run_all
from kvedit.store.codecs import LOSSLESS, decode, encode
from kvedit.store.crypt import Cipher
from kvedit.store.dtypes import dtype_code, dtype_name
from kvedit.store.pack import FORMAT, HEADER_LIMIT, KEY

__all__ = ["Encoded", "Originals", "Piece", "build_pack", "checksum", "finish", "paper_piece"]

Originals = Mapping[str, torch.Tensor]
"""Digest of a block to what it was before a lossy codec changed it."""

_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Encoded:
    """A pack that is not written yet.

    Args:
        digest: its name.
        size: its bytes.
        chunks: its bytes, in order.
    """

    digest: str
    size: int
    chunks: tuple[bytes | memoryview, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """One tensor of the file.

    Args:
        facts: what the header says of it; ``"width"``, bytes of an element, only orders them.
        dtype: as safetensors has it.
        shape: as safetensors has it.
        buffers: its bytes.
    """

    facts: dict[str, Any]
    dtype: str
    shape: tuple[int, ...]
    buffers: Sequence[bytes | memoryview]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(len(buffer) for buffer in self.buffers)


def build_pack(
    blocks: Sequence[Block],
    manifests: Mapping[str, bytes],
    codec: str = "raw",
    originals: Originals | None = None,
    cipher: Cipher | None = None,
    note: Mapping[str, Any] | None = None,
) -> Encoded:
    """Returns the pack of these blocks and manifests.

    Args:
        blocks: each once.
        manifests: record digest to bytes.
        codec: how to store the blocks, see ``kvedit.store.codecs``.
        originals: for a lossy codec, the blocks before it changed them.
        cipher: seals every block and manifest, or None.
        note: plain data to write down in the header.

    Raises:
        InvalidArgument: if a dtype has no name in the format, or the header gets too long.
    """

    def piece(run: list[Block]) -> Piece:
        return _piece(run, codec, originals or {}, cipher)

    large = sum(block.tensor.nbytes for block in blocks) > 1 << 20
    pieces = run_all(piece, list(_runs(blocks, codec == "raw" and cipher is None)), large)
    papers = [paper_piece(record, data, cipher) for record, data in manifests.items()]
    return finish(pieces, papers, cipher.fingerprint if cipher else "", note)


def finish(
    pieces: Iterable[Piece],
    papers: Sequence[Piece],
    cipher: str = "",
    note: Mapping[str, Any] | None = None,
) -> Encoded:
    """Returns the pack of these tensors.

    Args:
        pieces: runs of blocks.
        papers: manifests.
        cipher: fingerprint of the key that all are sealed with, or empty.
        note: plain data to write down in the header.
    """
    # Wide types first keeps every tensor aligned; else the order of the layers stays, so that
    # some layers are read in one go.
    ordered = sorted(pieces, key=lambda piece: -piece.facts["width"])
    header = _header(ordered, papers, cipher, note or {})
    buffers = [buffer for piece in (*ordered, *papers) for buffer in piece.buffers]
    chunks = (header, *buffers)
    return Encoded(digest_bytes(header), sum(map(len, chunks)), chunks)


def checksum(buffers: Iterable[bytes | memoryview]) -> str:
    """Returns XXH3-128 of bytes, hex: finds damage by accident, and no forgery."""
    hasher = xxhash.xxh3_128()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


def _runs(blocks: Sequence[Block], together: bool) -> Iterator[list[Block]]:
    """Yields neighbours of one tensor together; bias alone, for it is often constant."""
    run: list[Block] = []
    for block in blocks:
        joins = (
            run
            and together
            and block.kind != "bias"
            and block.whole is run[-1].whole
            and block.start == run[-1].start + run[-1].size
        )
        if run and not joins:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _piece(run: list[Block], codec: str, originals: Originals, cipher: Cipher | None) -> Piece:
    first = run[0]
    size = sum(block.size for block in run)
    shape = (*first.shape[: first.axis], size, *first.shape[first.axis + 1 :])
    dtype = dtype_name(first.whole.dtype)
    facts: dict[str, Any] = {"blocks": [block.digest for block in run], "kind": first.kind}
    facts["width"] = first.whole.itemsize
    buffers: Sequence[bytes | memoryview] = rows(first.whole, first.axis, first.start, size)
    encoding = "raw"
    if codec != "raw" or first.kind == "bias":
        original = originals.get(first.digest, first.tensor)
        encoding, buffers = _encoded(first, original, codec, buffers)
    if cipher is not None:
        buffers = [cipher.seal(b"".join(buffers), first.digest, "block")]
    if encoding != "raw" or cipher is not None:
        facts |= {"encoding": encoding, "dtype": dtype, "shape": list(shape), "width": 1}
        dtype, shape = "uint8", (sum(map(len, buffers)),)
    dtype_code(dtype)
    return Piece({**facts, "checksum": checksum(buffers)}, dtype, shape, buffers)


def _encoded(
    block: Block, original: torch.Tensor, codec: str, raw: Sequence[bytes | memoryview]
) -> tuple[str, Sequence[bytes | memoryview]]:
    dtype_code(dtype_name(block.whole.dtype))
    found = encode(original, block.kind, codec, block.axis)
    if found.encoding == "raw":
        return "raw", raw
    if codec not in LOSSLESS:
        again = decode(found.encoding, found.data, block.whole.dtype, block.shape, block.kind)
        digest = block_digest(
            dtype_name(again.dtype), block.shape, rows(again, 0, 0, again.shape[0])
        )
        if digest != block.digest:
            raise InvalidArgument(
                f"codec {codec} does not give layer {block.layer} {block.kind} back as it was "
                "approximated"
            )
    return found.encoding, [found.data]


def paper_piece(record: str, data: bytes, cipher: Cipher | None = None) -> Piece:
    """Returns a manifest as a tensor of a pack.

    Args:
        record: its digest.
        data: its bytes.
        cipher: seals it, or None.
    """
    stored = data if cipher is None else cipher.seal(data, record, "manifest")
    return Piece({"manifest": record}, "uint8", (len(stored),), [stored])


def _header(
    pieces: Sequence[Piece],
    papers: Sequence[Piece],
    cipher: str,
    note: Mapping[str, Any],
) -> bytes:
    header: dict[str, Any] = {}
    extents = {}
    names = {}
    offset = 0
    for number, piece in enumerate((*pieces, *papers)):
        name = str(number)
        header[name] = {
            "dtype": dtype_code(piece.dtype),
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.size],
        }
        offset += piece.size
        if "manifest" in piece.facts:
            names[name] = piece.facts["manifest"]
        else:
            extents[name] = {k: v for k, v in piece.facts.items() if k != "width"}
    facts = {
        "format": FORMAT,
        "cipher": cipher,
        "extents": extents,
        "manifests": names,
        **({"note": dict(note)} if note else {}),
    }
    text = canonical_json({**header, "__metadata__": {KEY: canonical_json(facts).decode()}})
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise InvalidArgument(
            f"a pack with {len(pieces)} tensors has too long a header: put fewer memories at once"
        )
    return len(text).to_bytes(8, "little") + text
