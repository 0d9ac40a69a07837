"""Forecast: whether loading a memory will be faster than computing it again, from what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.errors import InvalidArgument
from kvedit.store.finder import Finder
from kvedit.store.recipes import is_recipe
from kvedit.store.records import Record
from kvedit.store.shelf import Shelf

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """What a memory will cost, by the speeds that this store object has seen.

    Args:
        local: bytes that lie in the folder.
        below: bytes of packs that have to come from the remote store.
        load: seconds to load it; None where a speed was never seen.
        prefill: seconds to compute it again.
    """

    local: int
    below: int
    load: float | None
    prefill: float

    @property
    def recompute(self) -> bool:
        """Whether computing it again is expected to be faster."""
        return self.load is not None and self.load > self.prefill

    def __str__(self) -> str:
        """One line."""
        load = "not known yet" if self.load is None else f"{self.load:.3g} s"
        verdict = "compute it again" if self.recompute else "load it"
        return f"loading {load}, prefill {self.prefill:.3g} s: {verdict}"


def forecast(shelf: Shelf, finder: Finder, record: Record, tokens_per_second: float) -> Forecast:
    """Returns what loading a memory will cost beside a prefill.

    Args:
        shelf: the store's parts; its counters have the speeds.
        finder: finds its packs.
        record: the memory.
        tokens_per_second: prefill speed of the model here.

    Raises:
        InvalidArgument: if the speed is not positive, or the memory is a recipe or has no tokens.
    """
    if not tokens_per_second > 0:
        raise InvalidArgument(f"tokens per second are positive, found {tokens_per_second!r}")
    if is_recipe(record) or not record.tokens:
        raise InvalidArgument(
            f"{record.name} can't be computed again by a prefill: it is a recipe, or no tokens "
            "made it"
        )
    parts = finder.manifest(record.record, record.content).parts.values()
    blocks = {block.digest: block.nbytes for part in parts for block in part.blocks}
    places = shelf.index.locate(blocks)
    packs = {pack: size for pack, size, _ in places.values()}
    missing = {pack for pack in packs if shelf.layout.pack_size(pack) < 0}
    local = sum(size for block, size in blocks.items() if places[block][0] not in missing)
    below = sum(packs[pack] for pack in missing)
    seconds = [
        0.0 if not size else size / rate if rate else None
        for size, rate in ((sum(blocks.values()), _read(shelf)), (below, _fetched(shelf)))
    ]
    known = [one for one in seconds if one is not None]
    load = sum(known) if len(known) == len(seconds) else None
    return Forecast(local, below, load, record.tokens / tokens_per_second)


def _read(shelf: Shelf) -> float:
    counters = shelf.counters
    return counters.bytes_read * 1e9 / counters.read_ns if counters.read_ns else 0.0


def _fetched(shelf: Shelf) -> float:
    counters = shelf.counters
    return counters.bytes_fetched * 1e9 / counters.fetch_ns if counters.fetch_ns else 0.0
