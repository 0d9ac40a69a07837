"""Reader: puts a memory together from its blocks, each checked where it comes to lie."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from kvedit.errors import CorruptMemory, KVEditError
from kvedit.memory import KVMemory, LayerKV, Source
from kvedit.memory.digest import tensor_bytes
from kvedit.store.manifest import BlockRef, Manifest, Part
from kvedit.store.pack import DTYPES, Pack, PackEntry, digest_head

__all__ = ["read_memory"]

_ROWS_PER_READ = 512  # systems take at least 1024 buffers in one call


@dataclass(frozen=True)
class _Piece:
    """One block: where it lies and where its bytes go, row by row."""

    digest: str
    entry: PackEntry
    rows: Sequence[memoryview]


def read_memory(
    manifest: Manifest, parts: Sequence[Part], packs: Mapping[str, Path], verify: bool
) -> KVMemory:
    """Returns the memory of a manifest.

    Every tensor is allocated once. Each block is read straight to its place and its digest is
    taken there, so that the bytes that were checked are the bytes that are returned.

    Args:
        manifest: what to read.
        parts: those of its tensors that are wanted.
        packs: block digest to the file that holds it.
        verify: whether to check digests.

    Raises:
        CorruptMemory: if a block is missing or is not what was put; no tensor is returned then.
    """
    places = _find(parts, packs)
    tensors: dict[tuple[int, str], torch.Tensor] = {}
    work: dict[Path, list[_Piece]] = defaultdict(list)
    for part in parts:
        tensor = torch.empty(part.shape, dtype=DTYPES[part.dtype])
        tensors[part.layer, part.kind] = tensor
        for block, rows in zip(part.blocks, _rows(part, tensor), strict=True):
            pack, entry = places[block.digest]
            work[pack.path].append(_Piece(block.digest, entry, rows))
    for path, pieces in work.items():
        _fill(path, pieces, verify)
    try:
        return _assemble(manifest, tensors, verify)
    except (KVEditError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptMemory(
            f"the manifest {manifest.record} does not describe a memory: {error}"
        ) from error


def _find(parts: Sequence[Part], packs: Mapping[str, Path]) -> dict[str, tuple[Pack, PackEntry]]:
    opened: dict[Path, Pack] = {}
    found = {}
    for block in (block for part in parts for block in part.blocks):
        path = packs.get(block.digest)
        if path is None:
            raise CorruptMemory(f"block {block.digest} is in no pack that can be read")
        if path not in opened:
            opened[path] = Pack.open(path)
        found[block.digest] = (opened[path], _entry(opened[path], block))
    return found


def _entry(pack: Pack, block: BlockRef) -> PackEntry:
    entry = pack.entries.get(block.digest)
    # Shapes from the file bound what is allocated, whatever the manifest says.
    if entry is None or (entry.dtype, entry.shape) != (block.dtype, block.shape):
        raise CorruptMemory(f"{pack.path}: block {block.digest} is missing or has another shape")
    return entry


def _rows(part: Part, tensor: torch.Tensor) -> list[list[memoryview]]:
    # A block of [head, slot, dim] is one run of bytes per head; of [slot, ...] it is one run.
    data = tensor_bytes(tensor)
    outer = tensor.shape[0] if part.axis else 1
    stride = len(data) // max(outer, 1)
    step = stride // max(tensor.shape[part.axis], 1)
    placed, start = [], 0
    for block in part.blocks:
        size = step * block.shape[part.axis]
        placed.append(
            [data[at : at + size] for at in range(start, start + outer * stride, stride)]
            if stride
            else []
        )
        start += size
    return placed


def _fill(path: Path, pieces: list[_Piece], verify: bool) -> None:
    pieces.sort(key=lambda piece: piece.entry.offset)
    threads = min(_processors(), 8)
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        if threads == 1 or len(pieces) < 8 or not hasattr(os, "preadv"):
            _fill_some(file, path, pieces, verify)
            return
        # Reading and hashing let go of the interpreter; two neighbours read side by side.
        with ThreadPoolExecutor(threads) as pool:
            shares = [pieces[first::threads] for first in range(threads)]
            for done in [pool.submit(_fill_some, file, path, share, verify) for share in shares]:
                done.result()
    finally:
        os.close(file)


def _fill_some(file: int, path: Path, pieces: Iterable[_Piece], verify: bool) -> None:
    for piece in pieces:
        if _read_rows(file, piece.rows, piece.entry.offset) != piece.entry.size:
            raise CorruptMemory(f"{path} ends inside block {piece.digest}")
        if verify:
            hasher = blake3(digest_head(piece.entry.dtype, piece.entry.shape))
            for row in piece.rows:
                hasher.update(row)
            if hasher.hexdigest() != piece.digest:
                raise CorruptMemory(
                    f"{path}: the bytes of block {piece.digest} are not those that were put"
                )


def _read_rows(file: int, rows: Sequence[memoryview], offset: int) -> int:
    done = 0
    for first in range(0, len(rows), _ROWS_PER_READ):
        some = rows[first : first + _ROWS_PER_READ]
        if hasattr(os, "preadv"):
            done += os.preadv(file, some, offset + done)
        else:
            os.lseek(file, offset + done, os.SEEK_SET)
            for row in some:
                row[:] = os.read(file, len(row))
                done += len(row)
    return done


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _assemble(
    manifest: Manifest, tensors: Mapping[tuple[int, str], torch.Tensor], verify: bool
) -> KVMemory:
    document = manifest.document
    layers: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for (layer, kind), tensor in tensors.items():
        layers[layer][kind] = tensor
    words = layers.pop(-1, None)
    return KVMemory(
        layers={index: LayerKV(**kinds) for index, kinds in layers.items()},
        model=manifest.model,
        next_position=document["next_position"],
        source=Source.from_json(document["source"], **words) if words else None,
        lineage=manifest.lineage,
        rules=tuple(document["rules"]),
        verified=verify,
    )
