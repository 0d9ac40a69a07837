"""Family: what a memory was made of, and everything that was made of it."""

from __future__ import annotations

from kvedit.memory import KVMemory, Lineage
from kvedit.store.naming import Naming
from kvedit.store.recipes import Recipe, is_recipe
from kvedit.store.records import Listing, Record

__all__ = ["Family"]


class Family(Naming):
    """The verbs of a store that follow lineage."""

    def lineage(self, ref: str) -> Lineage:
        """Returns the steps that made a memory, without reading its blocks.

        Raises:
            NotFound: if there is no such memory.
        """
        record = self._resolve(ref)
        if is_recipe(record):
            return Recipe.parse(self._finder.paper(record.record), record.record).lineage
        return self._finder.manifest(record.record, record.content).lineage

    def ancestors(self, ref: str) -> list[Record]:
        """Returns the stored memories that a memory was made of, the newest first.

        Args:
            ref: the memory.

        Raises:
            NotFound: if there is no such memory.
        """
        record = self._resolve(ref)
        found: dict[tuple[str, int], Record] = {}
        for node in self.lineage(ref).nodes[:-1]:
            for one in self._shelf.index.made_of(node.id, head=True):
                found[one.name, one.version] = one
        return _sorted(found, record)

    def descendants(self, ref: str) -> list[Record]:
        """Returns every stored version that was made of a memory, the newest first.

        All that holds, or was computed from, its tokens is among them: captures of the same
        source, edits, merges, what was trained on it. This is what to remove when a source has to
        go.

        Args:
            ref: the memory, or the ``source`` that memories were put with.

        Raises:
            NotFound: if there is no such memory or source.
        """
        bases = self._of_source(ref) or [self._resolve(ref)]
        found: dict[tuple[str, int], Record] = {}
        for base in bases:
            head = self.lineage(base.record).head
            for one in self._shelf.index.made_of(head.id if head else base.content):
                found[one.name, one.version] = one
            if bases[0].source == ref:
                found[base.name, base.version] = base
        if bases[0].source == ref:
            return _sorted(found, None)
        return _sorted(found, bases[0])

    def _of_source(self, source: str) -> list[Record]:
        return self._shelf.index.of_source(source) if source else []

    def memory_of(self, node: str) -> KVMemory | None:
        """Returns a stored memory that a step made, or None; for a replay.

        Args:
            node: id of the step.
        """
        for record in self._stored(node):
            return self._read(record)
        return None


def _sorted(found: dict[tuple[str, int], Record], without: Record | None) -> list[Record]:
    records = [r for r in found.values() if without is None or r.record != without.record]
    return Listing(sorted(records, key=lambda r: (r.created, r.name, r.version), reverse=True))
