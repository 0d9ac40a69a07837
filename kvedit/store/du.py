"""du: which bytes of a store belong to whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from kvedit.memory.show import human_bytes
from kvedit.store.dtypes import DTYPES
from kvedit.store.finder import Finder
from kvedit.store.pack import Extent
from kvedit.store.recipes import is_recipe
from kvedit.store.shelf import Shelf

__all__ = ["NameUsage", "Usage", "measure_usage"]


@dataclass(frozen=True)
class NameUsage:
    """The bytes of one name, all versions together.

    Args:
        name: the name.
        versions: how many it has.
        logical: bytes of all tensors of all versions, as if nothing were shared.
        stored: bytes that its blocks and manifests take on the disk.
        own: of these, what no other name needs: what removing it would free.
    """

    name: str
    versions: int
    logical: int
    stored: int
    own: int


@dataclass(frozen=True)
class Usage:
    """The bytes of a store.

    Args:
        names: per name, the biggest first.
        logical: bytes of all versions, as if nothing were shared.
        packs: bytes of all packs.
        local: of these, what lies in the folder.
        garbage: bytes of blocks and manifests that no name needs.
        index: bytes of log and index.
    """

    names: tuple[NameUsage, ...]
    logical: int
    packs: int
    local: int
    garbage: int
    index: int

    def __str__(self) -> str:
        """A line per name, then the totals."""
        lines = [
            f"{human_bytes(one.stored):>10}  {human_bytes(one.own):>10} own  {one.name}"
            f"  ({one.versions} versions, {human_bytes(one.logical)} of tensors)"
            for one in self.names
        ]
        lines.append(
            f"{human_bytes(self.packs)} in packs ({human_bytes(self.local)} here) for "
            f"{human_bytes(self.logical)} of tensors; {human_bytes(self.garbage)} of garbage; "
            f"log and index {human_bytes(self.index)}"
        )
        return "\n".join(lines)


def measure_usage(shelf: Shelf, finder: Finder) -> Usage:
    """Returns which bytes belong to whom.

    Raises:
        CorruptMemory: if a manifest can't be read.
    """
    sizes = _sizes(shelf, finder)
    owners: Counter[str] = Counter()
    needs: dict[str, set[str]] = {}
    names = shelf.index.names()
    bases = shelf.index.bases()
    logical = {}
    for name in names:
        versions = shelf.index.versions(name)
        logical[name] = (len(versions), sum(version.bytes for version in versions))
        needs[name] = set()
        for record in {version.record: version for version in versions}.values():
            needs[name].add(record.record)
            base = bases.get(record.record, "") if is_recipe(record) else record.record
            needs[name].add(base)
            manifest = finder.manifest(base, "")
            parts = manifest.parts.values()
            needs[name].update(block.digest for part in parts for block in part.blocks)
        owners.update(needs[name])
    found = [
        NameUsage(
            name,
            *logical[name],
            sum(sizes.get(digest, 0) for digest in needs[name]),
            sum(sizes.get(digest, 0) for digest in needs[name] if owners[digest] == 1),
        )
        for name in names
    ]
    return _totals(shelf, found, sizes, set(owners))


def _totals(shelf: Shelf, names: list[NameUsage], sizes: dict[str, int], needed: set[str]) -> Usage:
    layout = shelf.layout
    packs = shelf.index.packs()
    files = [layout.log, *layout.root.glob(f"{layout.index.name}*")]
    return Usage(
        names=tuple(sorted(names, key=lambda one: -one.stored)),
        logical=sum(one.logical for one in names),
        packs=sum(size for _, size, _ in packs),
        local=sum(max(layout.pack_size(name), 0) for name, _, _ in packs),
        garbage=sum(size for digest, size in sizes.items() if digest not in needed),
        index=sum(path.stat().st_size for path in files if path.exists()),
    )


def _sizes(shelf: Shelf, finder: Finder) -> dict[str, int]:
    """Returns the stored bytes of every block and manifest."""
    sizes: dict[str, int] = {}
    for name, (blocks, records) in shelf.index.contents().items():
        pack = finder.header(name)
        for extent in pack.extents:
            for number, block in enumerate(extent.blocks):
                if block in blocks:
                    sizes[block] = _size(extent, number)
        sizes.update({r: place.size for r, place in pack.manifests.items() if r in records})
    return sizes


def _size(extent: Extent, number: int) -> int:
    if len(extent.blocks) == 1:
        return extent.size
    return prod(extent.block_shape(number)) * DTYPES[extent.dtype].itemsize
