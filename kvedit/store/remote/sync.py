"""Sync: brings names and what they need to a remote store and back, only what is missing."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from kvedit.errors import CorruptMemory, NotFound, RaceLost
from kvedit.store.finder import Below, Finder
from kvedit.store.holding import HeldPack
from kvedit.store.pack import Extent, ManifestPlace, Pack
from kvedit.store.packing import build_pack
from kvedit.store.recipes import Recipe
from kvedit.store.remote.depot import Depot, RefDocument
from kvedit.store.repack import damaged_blocks, damaged_manifests
from kvedit.store.sealed import open_buffer
from kvedit.store.shelf import Shelf
from kvedit.store.writer import Writer

__all__ = ["RemoteBelow", "Sync"]

Event = Mapping[str, Any]
_TRIES = 5


class RemoteBelow(Below):
    """A remote store as the place of packs that the folder lacks.

    Args:
        shelf: the folder's parts.
        depot: the remote store.
    """

    def __init__(self, shelf: Shelf, depot: Depot) -> None:
        self._shelf = shelf
        self._depot = depot

    def fetch(self, pack: str, known: bool = False) -> bool:
        """Returns whether it brought a pack into the folder, every byte checked.

        Args:
            pack: its digest.
            known: whether to bring it only if the index knows it then; garbage may have been
                collected meanwhile.

        Raises:
            CorruptMemory: if what is there is not that pack.
            TierUnavailable: if the remote store can't be reached.
        """
        start = time.perf_counter_ns()
        data = self._depot.read_pack(pack)
        if data is None:
            return False
        held = open_buffer(data, f"remote pack {pack}")
        cipher = self._shelf.cipher
        if (
            held.pack.digest != pack
            or damaged_blocks(held, cipher)
            or damaged_manifests(held, cipher)
        ):
            raise CorruptMemory(f"remote pack {pack} is damaged")
        layout = self._shelf.layout
        # Locked, or a store that is just opened would sweep the file away.
        with layout.lock, layout.intent([pack]):
            if known and not self._shelf.index.knows_pack(pack):
                return False
            self._shelf.make_room(len(data))
            layout.publish(layout.pack(pack), [data])
        took = time.perf_counter_ns() - start
        self._shelf.counters.add(fetched=1, bytes_fetched=len(data), fetch_ns=took)
        return True

    def fetch_parts(self, pack: Pack, places: Iterable[Extent | ManifestPlace]) -> HeldPack | None:
        """Returns some tensors of a pack, by ranged reads."""
        return self._depot.read_parts(pack, places)


class Sync:
    """Pushes and pulls names between a folder and a remote store.

    Args:
        shelf: the folder's parts.
        finder: finds what a memory needs.
        writer: writes down what came and went.
        depot: the remote store.
    """

    def __init__(self, shelf: Shelf, finder: Finder, writer: Writer, depot: Depot) -> None:
        self._shelf = shelf
        self._finder = finder
        self._writer = writer
        self.depot = depot
        self.below = RemoteBelow(shelf, depot)

    def push(self, name: str, force: bool = False) -> int:
        """Returns how many packs it sent so that the remote store has all versions of a name.

        What was sent stays sent: a push that fails goes on where it was when it is repeated.

        Args:
            name: the name.
            force: put our newest version on top of a history that went another way.

        Raises:
            NotFound: if neither side has the name.
            RaceLost: if the remote name went another way.
            TierUnavailable: if the remote store can't be reached.
        """
        for _ in range(_TRIES):
            ours = self._versions(name)
            packs = {pack for version in ours for pack in version["packs"]}
            with suppress(FileNotFoundError, CorruptMemory):
                return self._push(name, ours, packs, force)
            if len(self._shelf.index.packs_of(packs)) == len(packs):
                break  # none was collected meanwhile: it is as it says
        return self._push(name, ours, packs, force)

    def _push(self, name: str, ours: list[dict[str, Any]], packs: set[str], force: bool) -> int:
        found = self.depot.get_name(name)
        if not ours:
            return self._push_removal(name, found)
        theirs = [] if found is None or found[0].removed else list(found[0].versions)
        fresh = _after(ours, theirs)
        if fresh is None:
            if not force:
                raise RaceLost(
                    f"{name} went another way in the remote store, to {theirs[-1]['record']}: "
                    "pull it under another name, or push with force=True"
                )
            fresh = [ours[-1]]
        known = {_identity(version): version for version in ours}
        again = [known.get(_identity(old), old) for old in theirs]
        document = RefDocument(name, (*again, *fresh))
        # Also what lies in other packs than it did, since garbage was collected here.
        changed = [new for new, old in zip(again, theirs, strict=True) if new != old] + fresh
        sent = self._send({pack for version in changed for pack in version["packs"]})
        for version in changed:
            self.depot.put_record(version["record"], version)
        if found is None or document != found[0]:
            self.depot.set_name(document, found[1] if found else None)
        self._note(packs, name, self._version_of(name, ours[-1]))
        return sent

    def pull(self, name: str, eager: bool = True, force: bool = False) -> bool:
        """Returns whether the folder learnt something about a name.

        Args:
            name: the name.
            eager: bring the packs as well, or only their headers: the bytes come when read.
            force: put their newest version on top of a history that went another way.

        Raises:
            NotFound: if the remote store has no such name.
            RaceLost: if our name went another way.
            TierUnavailable: if the remote store can't be reached.
        """
        found = self.depot.get_name(name)
        if found is None:
            raise NotFound(f"the remote store has no name {name!r}")
        return self._take(found[0], eager, force)

    def pull_all(self, eager: bool = True) -> list[str]:
        """Returns the names of which the folder learnt something."""
        return [doc.name for doc in self.depot.names() if self._take(doc, eager, force=False)]

    # Out

    def _versions(self, name: str) -> list[dict[str, Any]]:
        """Returns the puts of a name, the oldest first, each with all the packs it needs."""
        events = self._shelf.index.events(name)
        return [{**event, "packs": self._needs(event)} for event in events]

    def _needs(self, event: Event) -> list[str]:
        record = event["record"]
        base = event.get("base")
        paper = self._paper_pack(record)
        if base:
            Recipe.parse(self._finder.paper(record), record)
            return sorted({paper, *self._needs({"record": base})})
        manifest = self._finder.manifest(record, "")
        blocks = {block.digest for part in manifest.parts.values() for block in part.blocks}
        places = self._shelf.index.locate(blocks)
        if blocks != places.keys():
            raise CorruptMemory(f"record {record} is not whole: fsync() tells more")
        return sorted({paper, *(pack for pack, _, _ in places.values())})

    def _paper_pack(self, record: str) -> str:
        pack = self._shelf.index.manifest_pack(record)
        if pack is not None:
            return pack
        # A store of version 1 kept manifests beside the packs.
        fresh = build_pack([], {record: self._finder.paper(record)}, cipher=self._shelf.cipher)
        with self._shelf.layout.lock, ExitStack() as undo:
            self._writer.publish(fresh, undo)
            self._writer.record({"event": "collect", "gone": [], "packs": [fresh.digest]})
            undo.pop_all()
        return fresh.digest

    def _send(self, packs: Iterable[str]) -> int:
        sent = 0
        for pack in sorted(packs):
            path = self._shelf.layout.pack(pack)
            if path.exists():
                sent += self.depot.put_pack(pack, path)
                self._shelf.counters.add(pushed=1)
            elif self.depot.has_pack(pack) is None:
                raise CorruptMemory(f"pack {pack} is neither here nor in the remote store")
        return sent

    def _version_of(self, name: str, event: Event) -> int:
        """Returns the number of the version that a put made; others may have come since."""
        for one in self._shelf.index.versions(name):
            created = one.created.isoformat(timespec="microseconds")
            if (one.record, created) == _identity(event):
                return one.version
        return 0

    def _note(self, packs: Collection[str], name: str, version: int | None = None) -> None:
        with self._shelf.layout.lock:
            self._shelf.index.catch_up()
            known = {pack for pack, _, pushed in self._shelf.index.packs_of(packs) if not pushed}
            if version is None:
                entry = self._shelf.index.entry(name)
                version = entry.version if entry else 0
            if known or self._shelf.index.pushed_version(name) != version:
                # A name that was removed meanwhile still has to be removed there.
                names = {name: version} if version or not packs else {}
                event = {"event": "pushed", "packs": sorted(known), "names": names}
                self._writer.record(event)

    def _push_removal(self, name: str, found: tuple[RefDocument, str] | None) -> int:
        if name not in self._shelf.index.removed() and found is None:
            raise self._finder.unknown(name)
        if found is not None and not found[0].removed:
            self.depot.set_name(RefDocument(name, found[0].versions, True), found[1])
        self._note((), name)
        return 0

    # In

    def _take(self, document: RefDocument, eager: bool, force: bool) -> bool:
        name = document.name
        ours = self._shelf.index.events(name)
        theirs = [] if document.removed else list(document.versions)
        if document.removed:
            return self._take_removal(name, ours, document.versions)
        fresh = _after(theirs, ours)
        if fresh is None:
            if not force:
                if _after(ours, theirs) is not None:
                    return False  # ours is ahead
                raise RaceLost(
                    f"{name} went another way here than in the remote store: push or pull it with "
                    "force=True"
                )
            fresh = [theirs[-1]]
        if not fresh:
            return False
        packs = sorted({pack for version in fresh for pack in version["packs"]})
        missing = [pack for pack in packs if not self._shelf.index.knows_pack(pack)]
        self._bring(missing, packs if eager else [])
        known = {key: version for version in fresh for key in [_identity(version)]}
        events = [{**version, "packs": []} for version in known.values()]
        events[0]["packs"] = missing
        with self._shelf.layout.lock:
            self._bring(missing, packs if eager else [])  # what a collection took meanwhile
            self._writer.append({"event": "batch", "events": events})
            self._note(packs, name)
        return True

    def _bring(self, headers: Sequence[str], packs: Sequence[str]) -> None:
        layout = self._shelf.layout
        layout.create()
        for pack in headers:
            if not layout.pack(pack).exists() and not layout.header(pack).exists():
                head = self.depot.read_header(pack)
                if head is None:
                    raise CorruptMemory(f"the remote store lacks pack {pack}")
                with layout.lock:
                    layout.publish(layout.header(pack), [head])
        for pack in packs:
            if not layout.pack(pack).exists() and not self.below.fetch(pack):
                raise CorruptMemory(f"the remote store lacks pack {pack}")

    def _take_removal(self, name: str, ours: Sequence[Event], theirs: Sequence[Event]) -> bool:
        known = {_identity(version) for version in theirs}
        if not ours or _identity(ours[-1]) not in known:
            return False
        with self._shelf.layout.lock:
            self._writer.record({"event": "remove", "name": name})
            self._note((), name)
        return True


def _identity(event: Event) -> tuple[str, str]:
    return (event["record"], event["time"])


def _after(longer: Sequence[Event], shorter: Sequence[Event]) -> list[Any] | None:
    """Returns what ``longer`` has behind the end of ``shorter``; None if it lacks that end."""
    if not shorter:
        return list(longer)
    identities = [_identity(version) for version in longer]
    last = _identity(shorter[-1])
    return list(longer[identities.index(last) + 1 :]) if last in identities else None
