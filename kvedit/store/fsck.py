"""fsck: reads a whole store, finds what is damaged, puts it aside, and brings back what it can."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from kvedit.errors import CorruptMemory, KVEditError
from kvedit.memory import KVMemory
from kvedit.memory.show import human_bytes
from kvedit.store.finder import Finder
from kvedit.store.holding import MappedPack
from kvedit.store.journal import Position
from kvedit.store.packing import build_pack, finish
from kvedit.store.recipes import is_recipe
from kvedit.store.records import Record
from kvedit.store.repack import copy_blocks, copy_manifests, damaged_blocks, damaged_manifests
from kvedit.store.salvage import salvage_log
from kvedit.store.shelf import Shelf
from kvedit.store.tables import SCHEMA, apply_event
from kvedit.store.writer import Writer

__all__ = ["Bring", "Checkup", "Health", "Problem"]

Bring = Callable[[Record], KVMemory | None]
"""Brings a memory from elsewhere: another store, a replay; None if it can't."""

_TABLES = ("packs", "blocks", "manifests", "names", "versions", "nodes")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in a store.

    Args:
        what: what it is and where.
        repaired: what was done about it; empty where nothing was.
    """

    what: str
    repaired: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.what}: {self.repaired}" if self.repaired else self.what


@dataclass(frozen=True)
class Health:
    """What fsck found.

    Args:
        packs: packs that were read.
        blocks: blocks whose digest was checked.
        bytes: bytes that were read.
        memories: versions whose blocks are all sound.
        problems: what is wrong, or was before the repair.
        lost: versions that can't be read, as ``name v3``.
    """

    packs: int
    blocks: int
    bytes: int
    memories: int
    problems: tuple[Problem, ...]
    lost: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be now."""
        return not self.lost and all(problem.repaired for problem in self.problems)

    def __str__(self) -> str:
        """What was read, then one line per problem."""
        head = (
            f"{self.packs} packs, {self.blocks} blocks, {human_bytes(self.bytes)} read; "
            f"{self.memories} versions sound, {len(self.lost)} can't be read"
        )
        lines = [head, *map(str, self.problems), *(f"can't be read: {name}" for name in self.lost)]
        return "\n".join(lines)


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
    packs: int = 0
    blocks: int = 0
    bytes: int = 0

    def run(self) -> Health:
        """Returns what is wrong, after the repair where there was one."""
        if self.repair and self.shelf.layout.log.exists():
            self.shelf.layout.create()
        with self.shelf.layout.lock:
            self._check_log()
            self._check_index()
            for name, size, pushed in self.shelf.index.packs():
                self._check_pack(name, size, pushed)
            self._check_strays()
            lost = self._check_memories()
            sound = sum(len(self.shelf.index.versions(n)) for n in self.shelf.index.names())
            found = tuple(self.problems)
            return Health(
                self.packs, self.blocks, self.bytes, sound - len(lost), found, tuple(lost)
            )

    # The log and the index

    def _check_log(self) -> None:
        try:
            for _ in self.shelf.journal.read(Position()):
                pass
            self.shelf.index.catch_up()
        except CorruptMemory as error:
            if not self.repair:
                self.problems.append(Problem(str(error)))
                return
            said = salvage_log(self.shelf, self.finder)
            self.problems.append(Problem(str(error), "; ".join(said)))

    def _check_index(self) -> None:
        path = self.shelf.layout.index
        try:
            wrong = _differs(self.shelf)
        except (CorruptMemory, sqlite3.Error, OSError) as error:
            wrong = f"{path} can't be read: {error}"
        if not wrong:
            return
        repaired = ""
        if self.repair:
            self.shelf.index.rebuild()
            repaired = "made again from the log"
        self.problems.append(Problem(wrong, repaired))

    # Packs

    def _check_pack(self, name: str, size: int, pushed: bool) -> None:
        path = self.shelf.layout.pack(name)
        if not path.exists():
            if not pushed:
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
            return
        path = self.shelf.layout.pack(name)
        if path.exists():
            self.shelf.layout.quarantine.mkdir(exist_ok=True)
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
        self._put_aside(name)
        self.problems.append(Problem(what, "put aside in quarantine; its sound blocks are kept"))

    def _put_aside(self, name: str) -> None:
        path = self.shelf.layout.pack(name)
        if path.exists():
            path.rename(self.shelf.layout.quarantine / path.name)

    def _fetched(self, name: str, held: MappedPack | None) -> bool:
        self._put_aside(name)
        try:
            if self.finder.below.fetch(name):
                again = self.finder.open(name)
                if not damaged_blocks(again, self.shelf.cipher):
                    return True
                self._put_aside(name)
        except KVEditError:
            pass
        except FileNotFoundError:
            pass
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
        lost = []
        held = {name for name, _, pushed in self.shelf.index.packs() if pushed}
        held |= {path.stem for path in self.shelf.layout.packs.glob("*.safetensors")}
        seen: dict[str, bool] = {}
        for name in self.shelf.index.names():
            for record in self.shelf.index.versions(name):
                if record.record not in seen:
                    seen[record.record] = self._sound(record, held) or self._brought(record)
                if not seen[record.record]:
                    lost.append(f"{record.name} v{record.version}")
        return lost

    def _sound(self, record: Record, held: set[str]) -> bool:
        try:
            if is_recipe(record):
                self.finder.paper(record.record)
                return True
            manifest = self.finder.manifest(record.record, record.content)
        except (KVEditError, OSError):
            return False
        parts = manifest.parts.values()
        blocks = {block.digest for part in parts for block in part.blocks}
        places = self.shelf.index.locate(blocks)
        return blocks == places.keys() and all(pack in held for pack, _, _ in places.values())

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
                said = Problem(f"{record.name} v{record.version} was not whole", "brought back")
                self.problems.append(said)
                return True
        return False

    def _restore(self, record: Record, memory: KVMemory) -> None:
        from kvedit.store.manifest import encode_manifest

        cut = memory.to("cpu").cut()
        places = self.shelf.index.locate(block.digest for block in cut)
        missing = {b.digest: b for b in cut if b.digest not in places}
        paper, _ = encode_manifest(memory, cut, record.codec)
        papers = {}
        if self.shelf.index.manifest_pack(record.record) is None:
            papers[record.record] = paper
        with ExitStack() as undo:
            pack = build_pack(list(missing.values()), papers, cipher=self.shelf.cipher)
            self.writer.publish(pack, undo)
            self.writer.record({"event": "collect", "gone": [], "packs": [pack.digest]})
            undo.pop_all()


def _differs(shelf: Shelf) -> str:
    """Returns in what the index differs from one made of the log, or nothing."""
    with closing(sqlite3.connect(":memory:")) as fresh:
        fresh.row_factory = sqlite3.Row
        for statement in SCHEMA:
            fresh.execute(statement)
        for event, _ in shelf.journal.read(Position()):
            apply_event(fresh, event, shelf.layout)
        shelf.index.catch_up()
        with closing(sqlite3.connect(f"file:{shelf.layout.index}?mode=ro", uri=True)) as own:
            if own.execute("PRAGMA integrity_check").fetchone()[0] != "ok":
                return f"{shelf.layout.index} is damaged"
            for table in _TABLES:
                columns = "*" if table != "packs" else "digest, bytes, pushed"
                if table in ("blocks", "manifests"):
                    key = "digest" if table == "blocks" else "record"
                    query = (
                        f"SELECT t.{key}, p.digest FROM {table} AS t JOIN packs AS p "
                        "ON p.id = t.pack ORDER BY 1"
                    )
                else:
                    query = f"SELECT {columns} FROM {table} ORDER BY 1, 2"
                ours = [tuple(row) for row in own.execute(query)]
                if ours != [tuple(row) for row in fresh.execute(query)]:
                    return f"{shelf.layout.index}: table {table} is not what the log says"
    return ""
