"""Plan: how the tensors of a memory come out of packs; made once, followed at every read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory.blocks import BLOCK_SLOTS
from kvedit.store.crypt import Cipher
from kvedit.store.dtypes import DTYPES
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import BlockRef, Part
from kvedit.store.pack import Extent, Pack

__all__ = ["Plan", "PlannedPart", "Source", "View", "check_sealed", "plan_parts"]


@dataclass(frozen=True)
class Source:
    """Where one block comes from.

    Args:
        pack: digest of the pack.
        extent: its extent.
        number: its number in there.
    """

    pack: str
    extent: Extent
    number: int


@dataclass(frozen=True)
class View:
    """Bytes of a pack that are a whole tensor as they lie.

    Args:
        pack: digest of the pack.
        offset: first byte.
        size: bytes.
        base: first byte of the extent that they lie in.
    """

    pack: str
    offset: int
    size: int
    base: int


@dataclass(frozen=True)
class PlannedPart:
    """One tensor.

    Args:
        part: what it is.
        shape: its axes.
        sources: where its blocks come from, in order.
        view: where it lies in one piece, or None.
        place: equal for tensors that are made of the same bytes in the same way.
    """

    part: Part
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    view: View | None
    place: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All tensors.

    Args:
        parts: how each comes about.
        packs: digest to header of the packs that it takes.
        size: bytes of all tensors.
    """

    parts: tuple[PlannedPart, ...]
    packs: Mapping[str, Pack]
    size: int


def plan_parts(parts: Sequence[Part], packs: Mapping[str, HeldPack], cipher: Cipher | None) -> Plan:
    """Returns how to read some tensors.

    Args:
        parts: what is wanted.
        packs: block digest to the pack that holds it.
        cipher: the store's key, or None.

    Raises:
        CorruptMemory: if a block is missing or has another shape.
        InvalidArgument: if the memory is sealed and the key is missing or another one.
    """
    places: dict[object, int] = {}
    planned = tuple(_plan(part, packs, places) for part in parts)
    used = {held.pack.digest: held.pack for held in packs.values()}
    for name, pack in used.items():
        check_sealed(name, pack.cipher, cipher)
    size = sum(block.nbytes for part in parts for block in part.blocks)
    return Plan(planned, used, size)


def check_sealed(name: str, sealed_with: str, cipher: Cipher | None) -> None:
    """Refuses what is sealed by another key, and beside a key what is not sealed at all.

    Args:
        name: digest of the pack.
        sealed_with: fingerprint of its key, or empty.
        cipher: the store's key, or None.

    Raises:
        InvalidArgument: if the key is missing or another one.
        CorruptMemory: if the store has a key and the pack is in the clear.
    """
    own = cipher.fingerprint if cipher else ""
    if sealed_with == own:
        return
    if not sealed_with:
        raise CorruptMemory(
            f"pack {name} is not encrypted, and this store has a key: somebody else wrote it, or "
            "it was put before there was a key"
        )
    raise InvalidArgument(
        f"pack {name} is encrypted with key {sealed_with}, this store has "
        f"{own or 'no key'}: open it with Store(..., key=...)"
    )


def _plan(part: Part, packs: Mapping[str, HeldPack], places: dict[object, int]) -> PlannedPart:
    sources = tuple(_find(block, packs) for block in part.blocks)
    shape = part.shape
    made_of = tuple((one.pack, one.extent.offset, one.number) for one in sources)
    place = places.setdefault((part.dtype, shape, made_of), len(places))
    return PlannedPart(part, shape, sources, _view(part, shape, sources), place)


def _find(block: BlockRef, packs: Mapping[str, HeldPack]) -> Source:
    held = packs.get(block.digest)
    if held is None:
        raise CorruptMemory(f"block {block.digest} is in no pack that can be read")
    entry = held.pack.entries.get(block.digest)
    # Shapes from the file bound what is allocated, whatever the manifest says.
    if entry is None or (entry[0].dtype, entry[0].block_shape(entry[1])) != (
        block.dtype,
        block.shape,
    ):
        raise CorruptMemory(
            f"pack {held.pack.digest}: block {block.digest} is missing or has another shape"
        )
    return Source(held.pack.digest, *entry)


def _view(part: Part, shape: tuple[int, ...], sources: Sequence[Source]) -> View | None:
    """Returns where the tensor lies in one piece, or None if it has to be put together."""
    first = sources[0]
    extent = first.extent
    neighbours = all(
        one.extent is extent and one.number == first.number + index
        for index, one in enumerate(sources)
    )
    whole = len(sources) == len(extent.blocks)
    if not (extent.plain and neighbours and (whole or part.axis == 0)):
        return None
    itemsize = DTYPES[part.dtype].itemsize
    row = math.prod(shape[1:]) * itemsize
    offset = extent.offset + first.number * BLOCK_SLOTS * row
    size = math.prod(shape) * itemsize
    if offset % itemsize or not size:
        return None
    return View(first.pack, offset, size, extent.offset)
