"""Reader: puts tensors together as planned, each byte checked where it comes to lie."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, KVEditError
from kvedit.memory import KVMemory, LayerKV
from kvedit.memory import Source as Words
from kvedit.memory.blocks import BLOCK_SLOTS, block_digest, rows
from kvedit.memory.parallel import run_all
from kvedit.memory.show import human_bytes
from kvedit.store.codecs import decode
from kvedit.store.crypt import Cipher
from kvedit.store.dtypes import DTYPES
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import Manifest, Part
from kvedit.store.pack import Extent
from kvedit.store.packing import checksum
from kvedit.store.parsing import SHAPE_ERRORS
from kvedit.store.plan import Plan, PlannedPart, Source

__all__ = ["VERIFY", "Verify", "assemble", "decoded", "read_planned"]

Verify = Literal["full", "deep", "fast", "off"]
"""``"deep"``: BLAKE3 of every block. ``"fast"``: XXH3-128 of every stored byte. ``"full"``: deep
for what this object reads for the first time, fast from then on. ``"off"``: nothing."""

VERIFY = ("full", "deep", "fast", "off")

_PARALLEL_FROM = 1 << 20


@dataclass(frozen=True, eq=False)
class _Piece:
    """One block, and the slots of the tensor that it becomes."""

    part: Part
    index: int
    source: Source
    tensor: torch.Tensor
    mapped: bool

    @property
    def size(self) -> int:
        return self.part.blocks[self.index].shape[self.part.axis]

    @property
    def start(self) -> int:
        return self.index * BLOCK_SLOTS

    @property
    def nbytes(self) -> int:
        return self.part.blocks[self.index].nbytes


def read_planned(
    plan: Plan, held: Mapping[str, HeldPack], verify: Verify, cipher: Cipher | None
) -> dict[tuple[int, str], torch.Tensor]:
    """Returns the tensors of a plan, by layer and kind.

    A tensor that lies in one piece in a pack is a view of the mapped file; the others are put
    together from their blocks. Layers whose blocks are the same ones share the tensor.

    Args:
        plan: what to read.
        held: digest of each pack to its bytes.
        verify: what to check.
        cipher: opens what is sealed.

    Raises:
        CorruptMemory: if a block is not what was put; no tensor is returned then.
        InvalidArgument: if a tensor is too big for the machine.
    """
    tensors, pieces = _laid_out(plan, held, verify)
    large = plan.size > _PARALLEL_FROM
    stored, deep = _split(plan, pieces, verify) if verify != "off" else ([], set())
    run_all(lambda source: _check_stored(source, held), stored, large)

    def finish(piece: _Piece) -> None:
        if not piece.mapped:
            _fill(piece, held[piece.source.pack], cipher)
        if _place(piece.source) in deep:
            _check(piece)

    todo = [piece for piece in pieces if not piece.mapped or _place(piece.source) in deep]
    run_all(finish, todo, sum(piece.nbytes for piece in todo) > _PARALLEL_FROM)
    _remember(plan, todo, deep)
    return tensors


def assemble(
    manifest: Manifest, tensors: Mapping[tuple[int, str], torch.Tensor], verified: bool
) -> KVMemory:
    """Returns the memory of a manifest with these tensors.

    Raises:
        CorruptMemory: if they make no memory.
    """
    document = manifest.document
    layers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for (layer, kind), tensor in tensors.items():
        layers[layer][kind] = tensor
    words = layers.pop(-1, None)
    try:
        return KVMemory(
            layers={index: LayerKV(**kinds) for index, kinds in layers.items()},
            model=manifest.model,
            next_position=document["next_position"],
            source=Words.from_json(document["source"], **words) if words else None,
            lineage=manifest.lineage,
            rules=tuple(document["rules"]),
            verified=verified,
        )
    except (KVEditError, *SHAPE_ERRORS) as error:
        raise CorruptMemory(
            f"the manifest {manifest.record} does not describe a memory: {error}"
        ) from error


def decoded(extent: Extent, data: memoryview | bytes, cipher: Cipher | None) -> torch.Tensor:
    """Returns the block of an extent that is encoded or sealed.

    Raises:
        CorruptMemory: if the bytes are not such a block.
    """
    if extent.sealed and cipher is not None:
        data = cipher.open(data, extent.blocks[0], "block")
    try:
        dtype = DTYPES[extent.dtype]
        return decode(extent.encoding, data, dtype, extent.shape, extent.kind)
    except ValueError as error:
        raise CorruptMemory(f"block {extent.blocks[0]} can't be decoded: {error}") from error


def _laid_out(
    plan: Plan, held: Mapping[str, HeldPack], verify: Verify
) -> tuple[dict[tuple[int, str], torch.Tensor], list[_Piece]]:
    """Returns the tensors, mapped or empty, and the blocks that are to be filled or checked."""
    made: dict[int, torch.Tensor] = {}
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    pieces: list[_Piece] = []
    for one in plan.parts:
        tensor = made.get(one.place)
        known = tensor is not None
        if tensor is None:
            tensor = _viewed(one, held) if one.view else _empty(one.part, one.shape)
            made[one.place] = tensor
        tensors[one.part.layer, one.part.kind] = tensor
        if not known and (one.view is None or verify != "off"):
            mapped = one.view is not None
            pieces += (
                _Piece(one.part, index, source, tensor, mapped)
                for index, source in enumerate(one.sources)
            )
    return tensors, pieces


def _place(source: Source) -> tuple[str, int]:
    return (source.pack, source.extent.offset)


def _split(
    plan: Plan, pieces: list[_Piece], verify: Verify
) -> tuple[list[Source], set[tuple[str, int]]]:
    """Returns the extents whose stored bytes are checked, and those whose blocks are."""
    fast: dict[tuple[str, int], Source] = {}
    deep: set[tuple[str, int]] = set()
    for piece in pieces:
        source = piece.source
        seen = source.extent.offset in plan.packs[source.pack].seen
        # A pack of the first format has no checksum: its blocks are checked in full.
        quick = verify == "fast" or (verify == "full" and seen)
        # Other stored bytes than those that were written may decode to the same block.
        if source.extent.checksum and (quick or not source.extent.plain):
            fast[_place(source)] = source
        if not (source.extent.checksum and quick):
            deep.add(_place(source))
    return list(fast.values()), deep


def _remember(plan: Plan, checked: list[_Piece], deep: set[tuple[str, int]]) -> None:
    """Notes the extents of which every block was checked in full."""
    blocks: dict[tuple[str, int], set[int]] = defaultdict(set)
    for piece in checked:
        if _place(piece.source) in deep:
            blocks[_place(piece.source)].add(piece.source.number)
    for piece in checked:
        place = _place(piece.source)
        if place in deep and len(blocks[place]) == len(piece.source.extent.blocks):
            plan.packs[piece.source.pack].seen.add(piece.source.extent.offset)


def _viewed(one: PlannedPart, held: Mapping[str, HeldPack]) -> torch.Tensor:
    view = one.view
    if view is None:
        raise ValueError("the part lies in no one piece")
    extent = one.sources[0].extent
    data = held[view.pack].data(extent.offset, extent.size)
    if view.size != extent.size:
        data = data[view.offset - view.base :][: view.size]
    return data.view(DTYPES[one.part.dtype]).view(one.shape)


def _empty(part: Part, shape: tuple[int, ...]) -> torch.Tensor:
    size = math.prod(shape) * DTYPES[part.dtype].itemsize
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else size
    if size > limit:
        raise InvalidArgument(
            f"layer {part.layer} {part.kind} needs {human_bytes(size)}; this machine has "
            f"{human_bytes(limit)}: name fewer slots"
        )
    return torch.empty(shape, dtype=DTYPES[part.dtype])


def _fill(piece: _Piece, held: HeldPack, cipher: Cipher | None) -> None:
    """Copies one block to its place. numpy copies in this thread; torch would start its own."""
    extent, axis, size = piece.source.extent, piece.part.axis, piece.size
    dtype = DTYPES[extent.dtype]
    stored = held.data(extent.offset, extent.size)
    if extent.plain:
        aligned = not extent.offset % dtype.itemsize
        source = (stored if aligned else torch.from_numpy(stored.numpy().copy())).view(dtype)
        source = source.view(extent.shape)
        if len(extent.blocks) > 1:
            source = source.narrow(axis, piece.source.number * BLOCK_SLOTS, size)
    else:
        source = decoded(extent, memoryview(stored.numpy()), cipher)  # type: ignore[arg-type]
    target = piece.tensor.narrow(axis, piece.start, size)
    if target.numel():
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


def _check(piece: _Piece) -> None:
    block = piece.part.blocks[piece.index]
    runs = rows(piece.tensor, piece.part.axis, piece.start, piece.size)
    if block_digest(block.dtype, block.shape, runs) != block.digest:
        raise CorruptMemory(
            f"pack {piece.source.pack}: the bytes of block {block.digest} are not those that were "
            "put"
        )


def _check_stored(source: Source, held: Mapping[str, HeldPack]) -> None:
    stored = held[source.pack].data(source.extent.offset, source.extent.size)
    if checksum([memoryview(stored.numpy())]) != source.extent.checksum:  # type: ignore[arg-type]
        raise CorruptMemory(
            f"pack {source.pack}: the stored bytes of block {source.extent.blocks[0]} or a "
            "neighbour are damaged"
        )
