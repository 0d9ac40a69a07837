"""gc: takes away what no name can reach, and keeps what shares a pack with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from kvedit.errors import CorruptMemory
from kvedit.memory.show import human_bytes
from kvedit.store.finder import Finder
from kvedit.store.pack import Pack
from kvedit.store.packing import Encoded, Piece, finish
from kvedit.store.recipes import is_recipe
from kvedit.store.repack import copy_blocks, copy_manifests, damaged_blocks, damaged_manifests
from kvedit.store.shelf import Shelf
from kvedit.store.writer import Writer

__all__ = ["Collected", "Reach", "collect", "reach"]


@dataclass(frozen=True)
class Collected:
    """What a collection of garbage did.

    Args:
        packs: how many packs went.
        freed: bytes that the folder lost.
        repacked: how many packs were written anew, without what nobody needs.
        kept: bytes of garbage that stay, in packs that are mostly needed or damaged.
        expired: how many versions went because their time was over.
    """

    packs: int
    freed: int
    repacked: int
    kept: int
    expired: int

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.packs} packs gone, {self.repacked} packed anew, {human_bytes(self.freed)} "
            f"freed, {human_bytes(self.kept)} of garbage kept, {self.expired} versions expired"
        )


@dataclass(frozen=True)
class Reach:
    """What names can reach.

    Args:
        records: record digests.
        blocks: block digests.
    """

    records: frozenset[str]
    blocks: frozenset[str]


def reach(shelf: Shelf, finder: Finder) -> Reach:
    """Returns everything that names can reach, and what recipes start from.

    Raises:
        CorruptMemory: if a manifest can't be read: what it needs is not known then.
    """
    blocks: set[str] = set()
    records = frozenset(shelf.index.records())
    for record in records:
        found = shelf.index.by_digest(record)
        if found is not None and is_recipe(found):
            finder.paper(record)
            continue
        manifest = finder.manifest(record, "")
        for part in manifest.parts.values():
            blocks.update(block.digest for block in part.blocks)
    return Reach(records, frozenset(blocks))


def collect(shelf: Shelf, finder: Finder, writer: Writer, waste: float = 0.25) -> Collected:
    """Returns what it did to take away what no name can reach.

    Readers beside it go on: what they have open stays readable, and who comes too late is led to
    the new place. Writers wait.

    Args:
        shelf: the store's parts.
        finder: opens what has to be moved.
        writer: writes down what happened.
        waste: share of a pack that may be garbage before the rest is packed anew.

    Raises:
        CorruptMemory: if a manifest that a name needs can't be read; nothing is removed then.
    """
    shelf.layout.create()
    with shelf.layout.lock:
        shelf.index.catch_up()
        expired = _expire(shelf, writer)
        reached = reach(shelf, finder)
        gone, fresh, kept = _sort(shelf, finder, reached, waste)
        before = sum(max(shelf.layout.pack_size(pack), 0) for pack in gone)
        freed = before - sum(pack.size for pack in fresh)
        if gone:
            _replace(shelf, writer, gone, fresh)
        freed += _strays(shelf, reached)
        return Collected(len(gone), freed, len(fresh), kept, expired)


def _expire(shelf: Shelf, writer: Writer) -> int:
    versions: dict[str, list[int]] = defaultdict(list)
    for name, version in shelf.index.expired():
        versions[name].append(version)
    for name, numbers in versions.items():
        writer.record({"event": "drop", "name": name, "versions": numbers})
    return sum(map(len, versions.values()))


def _sort(
    shelf: Shelf, finder: Finder, reached: Reach, waste: float
) -> tuple[list[str], list[Encoded], int]:
    """Returns packs to remove, packs to write instead, and bytes of garbage that stay."""
    placed = shelf.index.contents()
    gone: list[str] = []
    fresh: list[Encoded] = []
    kept = 0
    for name, _, _ in shelf.index.packs():
        blocks, records = placed.get(name, (set(), set()))
        blocks, records = blocks & reached.blocks, records & reached.records
        if not blocks and not records:
            gone.append(name)
            continue
        header = finder.header(name)
        dead = header.size - _live_bytes(header, blocks, records)
        if not dead:
            continue
        worth = dead > waste * header.size
        again = _again(shelf, finder, name, blocks, records) if worth else None
        if again is None:
            kept += dead
        else:
            gone.append(name)
            fresh.append(again)
    return gone, fresh, kept


def _live_bytes(header: Pack, blocks: Collection[str], records: Collection[str]) -> int:
    extents = sum(
        extent.size * sum(block in blocks for block in extent.blocks) // len(extent.blocks)
        for extent in header.extents
    )
    papers = sum(p.size for record, p in header.manifests.items() if record in records)
    data = sum(e.size for e in header.extents) + sum(p.size for p in header.manifests.values())
    return header.size - data + extents + papers


def _again(
    shelf: Shelf, finder: Finder, name: str, blocks: set[str], records: set[str]
) -> Encoded | None:
    """Returns the pack with only what is needed; None if it is damaged or lies below."""
    with suppress(FileNotFoundError, CorruptMemory):
        held = finder.open(name)
        bad = damaged_blocks(held, shelf.cipher) & blocks
        bad |= damaged_manifests(held, shelf.cipher) & records
        if not bad:
            pieces: list[Piece] = copy_blocks(held, blocks)
            return finish(pieces, copy_manifests(held, records), held.pack.cipher)
    return None


def _replace(shelf: Shelf, writer: Writer, gone: list[str], fresh: list[Encoded]) -> None:
    names = [pack.digest for pack in fresh]
    with shelf.layout.intent([*gone, *names]):
        with ExitStack() as undo:
            for pack in fresh:
                writer.publish(pack, undo)
            writer.record({"event": "collect", "gone": gone, "packs": names})
            undo.pop_all()
        for name in gone:
            shelf.layout.pack(name).unlink(missing_ok=True)
            shelf.layout.header(name).unlink(missing_ok=True)


def _strays(shelf: Shelf, reached: Reach) -> int:
    """Removes files that the index does not know; returns their bytes."""
    known = {name for name, _, _ in shelf.index.packs()}
    freed = 0
    for folder, keep in (
        (shelf.layout.packs, known),
        (shelf.layout.headers, known),
        (shelf.layout.manifests, reached.records),
    ):
        for path in folder.glob("*.*") if folder.is_dir() else ():
            if path.stem not in keep:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
    return freed
