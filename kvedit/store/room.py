"""Room: keeps a folder within its bytes by letting packs go that a tier below has."""

from __future__ import annotations

import os
import re

from kvedit.errors import CapacityExceeded, InvalidArgument
from kvedit.memory.show import human_bytes
from kvedit.store.finder import Finder
from kvedit.store.recipes import is_recipe
from kvedit.store.remote.depot import Depot
from kvedit.store.shelf import Shelf

__all__ = ["Room", "parse_bytes"]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]iB|B|)\s*")


def parse_bytes(size: int | str) -> int:
    """Returns a number of bytes, also from a text like ``"10GiB"``.

    Raises:
        InvalidArgument: if it is none, or not positive.
    """
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    value = int(float(match[1]) * _UNITS[match[2]]) if match else size
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise InvalidArgument(f"bytes are a positive number or a text like '10GiB', found {size!r}")
    return value


class Room:
    """The bytes that a folder may hold.

    Nothing that is only here ever goes: a pack may go once the tier below has been seen to have
    it, and its header stays. Packs that a pinned name needs stay as well.

    Args:
        shelf: the folder's parts.
        finder: finds what pinned names need.
        depot: the tier below, or None.
        capacity: bytes of packs, or None for no limit.
    """

    def __init__(
        self, shelf: Shelf, finder: Finder, depot: Depot | None, capacity: int | None
    ) -> None:
        self._shelf = shelf
        self._finder = finder
        self._depot = depot
        self._capacity = capacity

    def make(self, size: int) -> None:
        """Lets packs go, the least recently used first, until ``size`` bytes fit.

        Raises:
            CapacityExceeded: if they do not fit all the same.
        """
        if self._capacity is None:
            return
        with self._shelf.layout.lock:
            excess = self._used() + size - self._capacity
            if excess > 0:
                excess -= self.evict(excess)
        if excess > 0:
            raise CapacityExceeded(
                f"{self._shelf.layout.root} may hold {human_bytes(self._capacity)} and "
                f"{human_bytes(size)} do not fit: {human_bytes(excess)} too much. Raise capacity, "
                "unpin or remove something and gc(), or push() to a remote store so that packs "
                "may go"
            )

    def evict(self, wanted: int) -> int:
        """Returns the bytes of packs that it let go, the least recently used first.

        Args:
            wanted: how many bytes to let go, if so many may.
        """
        freed = 0
        with self._shelf.layout.lock:
            keep = self._pinned()
            for pack in self._by_use():
                if freed >= wanted:
                    break
                if pack not in keep and self._is_below(pack):
                    freed += self._let_go(pack)
        return freed

    def _used(self) -> int:
        sizes = (self._shelf.layout.pack_size(pack) for pack, _, _ in self._shelf.index.packs())
        return sum(size for size in sizes if size > 0)

    def _by_use(self) -> list[str]:
        used = []
        for pack, _, pushed in self._shelf.index.packs():
            path = self._shelf.layout.pack(pack)
            if pushed and path.exists():
                used.append((path.stat().st_atime_ns, pack))
        return [pack for _, pack in sorted(used)]

    def _pinned(self) -> set[str]:
        index = self._shelf.index
        bases = index.bases()
        versions = [v for entry in index.entries("v.pinned") for v in index.versions(entry.name)]
        recipes = {version.record for version in versions if is_recipe(version)}
        whole = {version.record for version in versions} - recipes
        whole |= {bases[record] for record in recipes}
        blocks: set[str] = set()
        for record in whole:
            parts = self._finder.manifest(record, "").parts.values()
            blocks.update(block.digest for part in parts for block in part.blocks)
        papers = (index.manifest_pack(record) for record in whole | recipes)
        packs = {pack for pack in papers if pack is not None}
        return packs | {pack for pack, _, _ in index.locate(blocks).values()}

    def _is_below(self, pack: str) -> bool:
        size = self._shelf.layout.pack_size(pack)
        return self._depot is not None and self._depot.has_pack(pack) == size

    def _let_go(self, pack: str) -> int:
        layout = self._shelf.layout
        path = layout.pack(pack)
        with path.open("rb") as file:
            length = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            head = file.read(length)
        size = os.stat(path).st_size  # noqa: PTH116 - one name for fault injection
        layout.publish(layout.header(pack), [head])
        path.unlink()
        self._shelf.counters.add(evicted=1)
        return size
