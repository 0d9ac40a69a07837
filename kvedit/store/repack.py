"""Repacking: some blocks and manifests of a pack, checked and copied as they are stored."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby

import torch

from kvedit.errors import CorruptMemory
from kvedit.memory.blocks import BLOCK_SLOTS, SLOT_AXIS, block_digest, rows
from kvedit.memory.digest import digest_bytes
from kvedit.store.crypt import Cipher
from kvedit.store.dtypes import DTYPES
from kvedit.store.holding import HeldPack
from kvedit.store.pack import Extent
from kvedit.store.packing import Piece, checksum
from kvedit.store.reader import decoded
from kvedit.store.sealed import read_paper

__all__ = ["copy_blocks", "copy_manifests", "damaged_blocks", "damaged_manifests"]


def copy_blocks(held: HeldPack, blocks: Collection[str]) -> list[Piece]:
    """Returns the wanted blocks of a pack for another pack, neighbours still together.

    Nothing is checked here: see :func:`damaged_blocks`.

    Args:
        held: the pack.
        blocks: their digests.
    """
    wanted = frozenset(blocks)
    return [
        piece
        for extent in held.pack.extents
        if not wanted.isdisjoint(extent.blocks)
        for piece in _copied(held, extent, wanted)
    ]


def copy_manifests(held: HeldPack, records: Collection[str]) -> list[Piece]:
    """Returns the wanted manifests of a pack for another pack.

    Args:
        held: the pack.
        records: their digests.
    """
    found = []
    for record, place in held.pack.manifests.items():
        if record in records:
            data = _bytes(held, place.offset, place.size)
            found.append(Piece({"manifest": record}, "uint8", (place.size,), [data]))
    return found


def damaged_blocks(held: HeldPack, cipher: Cipher | None) -> set[str]:
    """Returns the blocks of a pack whose bytes are not those that were put.

    Without the key, sealed blocks are checked by their checksum alone.

    Args:
        held: the pack.
        cipher: opens what is sealed.
    """
    return {
        block
        for extent in held.pack.extents
        for block in extent.blocks
        if not _sound(held, extent, block, cipher)
    }


def damaged_manifests(held: HeldPack, cipher: Cipher | None) -> set[str]:
    """Returns the manifests of a pack whose bytes are not those that were put."""
    bad = set()
    for record, place in held.pack.manifests.items():
        if place.sealed and cipher is None:
            continue
        try:
            if digest_bytes(read_paper(held, record, cipher)) != record:
                bad.add(record)
        except CorruptMemory:
            bad.add(record)
    return bad


def _sound(held: HeldPack, extent: Extent, block: str, cipher: Cipher | None) -> bool:
    stored = held.data(extent.offset, extent.size)
    if not extent.plain:
        if checksum([_bytes(held, extent.offset, extent.size)]) != extent.checksum:
            return False
        if extent.sealed and cipher is None:
            return True
    try:
        if not extent.plain:
            found = decoded(extent, memoryview(stored.numpy()), cipher)  # type: ignore[arg-type]
            return block_digest(extent.dtype, extent.shape, rows(found, 0, 0, 1 << 62)) == block
    except CorruptMemory:
        return False
    number = extent.blocks.index(block)
    shape = extent.block_shape(number)
    return block_digest(extent.dtype, shape, _runs(stored, extent, number, 1)) == block


def _copied(held: HeldPack, extent: Extent, blocks: Collection[str]) -> Iterator[Piece]:
    stored = held.data(extent.offset, extent.size)
    if not extent.plain:
        facts = {
            "blocks": list(extent.blocks),
            "kind": extent.kind,
            "encoding": extent.encoding,
            "dtype": extent.dtype,
            "shape": list(extent.shape),
            "checksum": extent.checksum,
            "width": 1,
        }
        yield Piece(facts, "uint8", (extent.size,), [_bytes(held, extent.offset, extent.size)])
        return
    wanted = [number for number, block in enumerate(extent.blocks) if block in blocks]
    for _, run in groupby(enumerate(wanted), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        yield _plain(stored, extent, numbers[0], len(numbers))


def _plain(stored: torch.Tensor, extent: Extent, first: int, count: int) -> Piece:
    axis = SLOT_AXIS[extent.kind] if extent.kind else 0
    shape = list(extent.shape)
    if extent.kind:
        shape[axis] = sum(extent.block_shape(first + i)[axis] for i in range(count))
    buffers = _runs(stored, extent, first, count)
    facts = {
        "blocks": list(extent.blocks[first : first + count]),
        "kind": extent.kind,
        "checksum": checksum(buffers),
        "width": DTYPES[extent.dtype].itemsize,
    }
    return Piece(facts, extent.dtype, tuple(shape), buffers)


def _runs(stored: torch.Tensor, extent: Extent, first: int, count: int) -> list[memoryview]:
    if len(extent.blocks) == 1:
        return [memoryview(stored.numpy())]  # type: ignore[arg-type]
    axis = SLOT_AXIS[extent.kind]
    start = first * BLOCK_SLOTS
    size = min(count * BLOCK_SLOTS, extent.shape[axis] - start)
    whole = stored.view(*extent.shape[: axis + 1], -1)
    return rows(whole, axis, start, size)


def _bytes(held: HeldPack, offset: int, size: int) -> memoryview:
    return memoryview(held.data(offset, size).numpy())  # type: ignore[arg-type]
