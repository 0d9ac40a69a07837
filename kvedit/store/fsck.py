"""fsck: reads a whole store, finds what is damaged, puts it aside, and brings back what it can."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from kvedit.errors import CorruptMemory, KVEditError
from kvedit.memory import KVMemory
from kvedit.memory.digest import digest_bytes
from kvedit.store.finder import Finder
from kvedit.store.health import Health, Problem
from kvedit.store.holding import MappedPack
from kvedit.store.journal import Position
from kvedit.store.manifest import Manifest, encode_manifest
from kvedit.store.packing import build_pack, finish
from kvedit.store.recipes import Recipe, is_recipe
from kvedit.store.records import Record
from kvedit.store.repack import copy_blocks, copy_manifests, damaged_blocks, damaged_manifests
from kvedit.store.salvage import differs, salvage_log, unreadable
from kvedit.store.shelf import Shelf
from kvedit.store.writer import Writer

__all__ = ["Bring", "Checkup", "Health", "Problem"]

Bring = Callable[[Record], KVMemory | None]
"""Brings a memory from elsewhere: another store, a replay; None if it can't."""


@dataclass
class Checkup:
    """One run of fsck.

    Args:
        shelf: the store's parts.
        finder: opens packs.
        writer: writes down repairs.
        repair: whether to change anything.
        bring: ways to get a memory from elsewhere.
    """

    shelf: Shelf
    finder: Finder
    writer: Writer
    repair: bool
    bring: Sequence[Bring] = ()
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    packs: int = 0
    blocks: int = 0
    bytes: int = 0

    def run(self) -> Health:
        """Returns what is wrong, after the repair where there was one."""
        if self.repair and self.shelf.layout.log.exists():
            self.shelf.layout.create()
        # What the store has read before is no proof of what is on the disk.
        kept, self.finder = self.finder, Finder(self.shelf)
        self.finder.below = kept.below
        with self.shelf.layout.lock:
            readable = self._check_readable()
            if not self._check_log() and not readable:
                return self._health(0, [])  # neither log nor index says what there should be
            for name, pushed in self._packs():
                self._check_pack(name, pushed)
            self._check_index()
            self._check_strays()
            lost = self._check_memories()
            versions = sum(len(self.shelf.index.versions(n)) for n in self.shelf.index.names())
            return self._health(versions, lost)

    def _health(self, versions: int, lost: list[str]) -> Health:
        sound, found = versions - len(lost), tuple(self.problems)
        return Health(self.packs, self.blocks, self.bytes, sound, found, tuple(lost))

    # The log and the index

    def _check_readable(self) -> bool:
        """Looks at the index before a question to it makes an unreadable one again."""
        why = unreadable(self.shelf.layout)
        if why:
            self.problems.append(Problem(why, "made again from the log"))
        return not why

    def _check_log(self) -> bool:
        """Returns whether the log is whole, now."""
        try:
            for _ in self.shelf.journal.read(Position()):
                pass
            self.shelf.index.catch_up()
        except CorruptMemory as error:
            if not self.repair:
                self.problems.append(Problem(str(error)))
                return False
            said = salvage_log(self.shelf, self.finder)
            self.problems.append(Problem(str(error), "; ".join(said)))
        return True

    def _check_index(self) -> None:
        path = self.shelf.layout.index
        try:
            wrong = differs(self.shelf, self.broken)
        except (CorruptMemory, sqlite3.Error, ValueError, OSError) as error:
            wrong = f"{path} can't be compared with the log: {error}"
        if not wrong:
            return
        repaired = ""
        if self.repair:
            self.shelf.index.rebuild()
            repaired = "made again from the log"
        self.problems.append(Problem(wrong, repaired))

    # Packs

    def _packs(self) -> list[tuple[str, bool]]:
        """Returns the packs of the log and of the index, and whether a tier below has each.

        An index that was made while a pack was damaged does not know that pack.
        """
        named: dict[str, bool] = {}
        with suppress(CorruptMemory, TypeError, ValueError, AttributeError):
            for event, _ in self.shelf.journal.read(Position()):
                for part in event.get("events", [event]):
                    for name in part.get("gone", []):
                        named.pop(name, None)
                    if part.get("event") != "pushed":  # it may name what was collected meanwhile
                        named.update(dict.fromkeys(part.get("packs", []), False))
        named.update((name, pushed) for name, _, pushed in self.shelf.index.packs())
        return list(named.items())

    def _check_pack(self, name: str, pushed: bool) -> None:
        path = self.shelf.layout.pack(name)
        if not path.exists():
            if not (pushed and self._is_below(name)):
                self._report(name, f"pack {name} is missing", None, set(), set())
            return
        self.packs += 1
        try:
            held = self.finder.open(name)
            held.data(0, 0)
        except (CorruptMemory, FileNotFoundError) as error:
            self._report(name, str(error), None, set(), set())
            return
        bad = damaged_blocks(held, self.shelf.cipher)
        papers = damaged_manifests(held, self.shelf.cipher)
        self.blocks += len(held.pack.entries)
        self.bytes += held.pack.size
        if bad or papers:
            what = f"{path}: {len(bad)} blocks and {len(papers)} manifests are damaged"
            self._report(name, what, held, bad, papers)

    def _report(
        self, name: str, what: str, held: MappedPack | None, bad: set[str], papers: set[str]
    ) -> None:
        if not self.repair:
            self.problems.append(Problem(what))
            self.bad |= bad | papers
            if held is None:
                self.broken.add(name)
            return
        if self._fetched(name, held):
            self.problems.append(Problem(what, "fetched again from the tier below"))
            return
        with ExitStack() as undo:
            fresh = []
            if held is not None:
                pack = held.pack
                pieces = copy_blocks(held, pack.entries.keys() - bad)
                sheets = copy_manifests(held, pack.manifests.keys() - papers)
                if pieces or sheets:
                    fresh.append(finish(pieces, sheets, pack.cipher))
            for one in fresh:
                self.writer.publish(one, undo)
            names = [one.digest for one in fresh]
            self.writer.record({"event": "collect", "gone": [name], "packs": names})
            undo.pop_all()
        said = "its sound blocks are kept" if held else "without its header nothing in it is known"
        self.problems.append(Problem(what, f"put aside in quarantine; {said}"))

    def _is_below(self, name: str) -> bool:
        """Returns whether a pack that was let go has left its header, to be read from below."""
        try:
            self.finder.header(name)
        except CorruptMemory:
            return False
        return True

    def _put_aside(self, name: str) -> None:
        path = self.shelf.layout.pack(name)
        if os.path.lexists(path):
            self.shelf.layout.quarantine.mkdir(exist_ok=True)
            path.rename(self.shelf.layout.quarantine / path.name)

    def _fetched(self, name: str, held: MappedPack | None) -> bool:
        self._put_aside(name)
        try:
            if self.finder.below.fetch(name):
                if not self.shelf.index.knows_pack(name):
                    self.writer.record({"event": "collect", "gone": [], "packs": [name]})
                return True
        except (KVEditError, FileNotFoundError):
            self._put_aside(name)
        # Not to be had: what was put aside is looked at again where it lies.
        if held is not None:
            held.path = self.shelf.layout.quarantine / held.path.name
        return False

    def _check_strays(self) -> None:
        known = {name for name, _, _ in self.shelf.index.packs()}
        for path in sorted(self.shelf.layout.packs.glob("*")):
            if path.stem not in known:
                self.problems.append(
                    Problem(f"{path} is a pack that nothing names", "harmless; gc removes it")
                )

    # Memories

    def _check_memories(self) -> list[str]:
        index = self.shelf.index
        versions = [record for name in index.names() for record in index.versions(name)]
        broken = {v.record: v for v in versions if not self._sound(v)}
        lost = {record for record, version in broken.items() if not self._brought(version)}
        # What was brought back for one may be what another lacked.
        lost = {record for record in lost if not self._sound(broken[record])}
        return [f"{v.name} v{v.version}" for v in versions if v.record in lost]

    def _sound(self, record: Record) -> bool:
        try:
            if record.record in self.bad:
                return False
            if is_recipe(record):
                recipe = Recipe.parse(self.finder.paper(record.record), record.record)
                return self._whole(self.finder.manifest(recipe.base, ""))
            return self._whole(self.finder.manifest(record.record, record.content))
        except (KVEditError, OSError):
            return False

    def _whole(self, manifest: Manifest) -> bool:
        blocks = {block.digest for part in manifest.parts.values() for block in part.blocks}
        return not self._missing(blocks)

    def _missing(self, blocks: Iterable[str]) -> set[str]:
        """Returns those of the blocks that no sound pack holds, here or below."""
        wanted = set(blocks)
        held = {
            block
            for block, (pack, _, pushed) in self.shelf.index.locate(wanted).items()
            if pack not in self.broken and (pushed or self.shelf.layout.pack_size(pack) >= 0)
        }
        return (wanted - held) | (wanted & self.bad)

    def _brought(self, record: Record) -> bool:
        if not self.repair or is_recipe(record):
            return False
        for bring in self.bring:
            try:
                memory = bring(record)
            except KVEditError:
                continue
            if memory is not None and memory.digest == record.content:
                self._restore(record, memory)
                if self._sound(record):
                    what = f"{record.name} v{record.version} was not whole"
                    self.problems.append(Problem(what, "brought back"))
                    return True
        return False

    def _restore(self, record: Record, memory: KVMemory) -> None:
        cut = memory.to("cpu").cut()
        different = {block.digest: block for block in cut}
        missing = self._missing(different)
        paper, _ = encode_manifest(memory, cut, record.codec)
        papers = {}
        # Equal content may have come about in another way: that is another record.
        if digest_bytes(paper) == record.record and not self._has_paper(record):
            papers[record.record] = paper
        if not missing and not papers:
            return
        with ExitStack() as undo:
            fresh = [block for digest, block in different.items() if digest in missing]
            pack = build_pack(fresh, papers, cipher=self.shelf.cipher)
            self.writer.publish(pack, undo)
            self.writer.record({"event": "collect", "gone": [], "packs": [pack.digest]})
            undo.pop_all()

    def _has_paper(self, record: Record) -> bool:
        try:
            self.finder.manifest(record.record, "")
        except (KVEditError, OSError):
            return False
        return True
