"""Finder: from a reference to the manifest and the packs of a memory, wherever they lie."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.store.holding import HeldPack, MappedPack
from kvedit.store.manifest import Manifest
from kvedit.store.pack import Extent, ManifestPlace, Pack
from kvedit.store.recent import Recent
from kvedit.store.records import Record, one_of
from kvedit.store.refs import Ref, parse_ref
from kvedit.store.sealed import read_paper
from kvedit.store.shelf import Shelf
from kvedit.store.sign import Signature, check

__all__ = ["Below", "Finder"]

Result = TypeVar("Result")
_NEAR = 1000  # names that an error looks through for near ones
_TRIES = 50  # a collection of garbage at each of them would have to be faster than we are


class Below:
    """Where packs are that the folder lacks. This one has nothing."""

    def fetch(self, pack: str, known: bool = False) -> bool:
        """Returns whether it brought a pack into the folder; False if it has none.

        Args:
            pack: its digest.
            known: whether to bring it only if the index knows it then.
        """
        return False

    def fetch_parts(self, pack: Pack, places: Iterable[Extent | ManifestPlace]) -> HeldPack | None:
        """Returns some tensors of a pack without bringing it, or None."""
        return None


class Finder:
    """Finds memories by name, version and digest, and opens what they are made of.

    Args:
        shelf: the store's parts.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.below = Below()
        self.note_use = False
        self._packs: Recent[tuple[str, int, int, int], Pack] = Recent(256)
        self._manifests: Recent[str, bytes] = Recent(32)
        self._parsed: Recent[str, Manifest] = Recent(32)
        self._places: Recent[str, dict[str, str]] = Recent(32)

    # Names

    def resolve(self, text: object) -> Record:
        """Returns the version that a reference means.

        Raises:
            NotFound: if the store has no such memory.
            InvalidArgument: if it is no reference, or several digests begin so.
        """
        found = self.find(text)
        if found is None:
            ref = parse_ref(text)
            raise self.unknown(ref.text, ref)
        return found

    def find(self, text: object) -> Record | None:
        """Returns the version that a reference means, or None.

        Raises:
            InvalidArgument: if it is no reference, or several digests begin so.
        """
        ref = parse_ref(text)
        found = self._look_up(ref)
        if found is None and self._shelf.index.is_behind():
            with self._shelf.layout.lock, suppress(CorruptMemory):
                self._shelf.index.catch_up()
            found = self._look_up(ref)
        return found

    def _look_up(self, ref: Ref) -> Record | None:
        index = self._shelf.index
        found = index.newest(ref.name, ref.back or 0) if ref.name else None
        return self._by_prefix(ref) if found is None and ref.prefix else found

    def _by_prefix(self, ref: Ref) -> Record | None:
        digests = self._shelf.index.digests(ref.prefix)
        if len(digests) > 1:
            shown = one_of([digest[:16] for digest in digests])
            raise InvalidArgument(f"{ref.text!r} fits several digests, write more of it: {shown}")
        return self._shelf.index.by_digest(digests[0]) if digests else None

    def unknown(self, text: str, ref: Ref | None = None) -> NotFound:
        """Returns the error for a reference that fits nothing, with near names."""
        index = self._shelf.index
        if ref is not None and ref.back and (count := len(index.versions(ref.name))):
            return NotFound(
                f"{ref.name} has {count} versions: {ref.name}@{{0}} to @{{{count - 1}}}"
            )
        names = index.names(_NEAR)
        near = difflib.get_close_matches(ref.name if ref else text, names, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has: {one_of(names)}"
        return NotFound(f"{self._shelf.layout.root} has no memory {text!r}. {hint}")

    # Manifests

    def paper(self, record: str) -> bytes:
        """Returns the bytes of a manifest, checked.

        Raises:
            CorruptMemory: if it is missing or is not what was put.
            UntrustedMemory: if the store asks for signatures and this one has none that it trusts.
        """
        self._check_trust(record)
        if (kept := self._manifests.get(record)) is not None:
            return kept
        data = self._again(lambda: self._read_paper(record))
        self._manifests.put(record, data)
        self._shelf.counters.add(bytes_read=len(data), bytes_verified=len(data))
        return data

    def manifest(self, record: str, content: str) -> Manifest:
        """Returns the manifest of a record.

        Args:
            record: its digest.
            content: the content digest that the index names; empty where none does.

        Raises:
            CorruptMemory: if it is missing or is not what was put.
            UntrustedMemory: if the store asks for signatures and this one has none that it trusts.
        """
        data = self.paper(record)
        found = self._parsed.get(record)
        if found is None:
            found = Manifest.parse(data, record, f"manifest {record}")
            self._parsed.put(record, found)
        if content and found.content != content:
            raise CorruptMemory(f"the index is damaged at {record}: call rebuild_index()")
        return found

    def _check_trust(self, record: str) -> None:
        if self._shelf.trusted:
            data = self._shelf.index.signature(record)
            signature = None if data is None else _signature(data)
            check(signature, record, self._shelf.namespace, self._shelf.trusted)

    def _read_paper(self, record: str) -> bytes:
        name = self._shelf.index.manifest_pack(record)
        if name is None:
            return self._old_paper(record)
        held: HeldPack | None = None
        if not self._shelf.layout.pack(name).exists():
            pack = self.header(name)
            if record in pack.manifests:  # a few KiB: no need to bring the whole pack
                held = self.below.fetch_parts(pack, [pack.manifests[record]])
        return read_paper(held or self.open(name), record, self._shelf.cipher)

    def _old_paper(self, record: str) -> bytes:
        path = self._shelf.layout.manifest(record)
        if self._shelf.cipher is not None:
            raise CorruptMemory(f"{path} is not encrypted, and this store has a key")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            self._check_named(record)
            raise CorruptMemory(
                f"manifest {record} is missing: fsck() or the log may tell of its pack"
            ) from None

    # Packs

    def open(self, name: str) -> MappedPack:
        """Returns a pack of the folder.

        Raises:
            FileNotFoundError: if the folder has no such pack.
            CorruptMemory: if it is damaged.
        """
        path = self._shelf.layout.pack(name)
        return MappedPack(self._cached(path, name), path)

    def header(self, name: str) -> Pack:
        """Returns what the header of a pack says, also of a pack that lies below.

        Raises:
            CorruptMemory: if neither is there.
        """
        try:
            return self._cached(self._shelf.layout.pack(name), name)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                return Pack.open(self._shelf.layout.header(name), header_only=True)
        raise CorruptMemory(f"pack {name} is missing")

    def _cached(self, path: Path, name: str) -> Pack:
        try:
            status = path.stat()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CorruptMemory(f"{path} can't be read: {error}") from error
        key = (name, status.st_size, status.st_mtime_ns, status.st_ino)
        pack = self._packs.get(key)
        if pack is None:
            pack = Pack.open(path)
            self._packs.put(key, pack)
        return pack

    def hold(self, record: str, blocks: set[str], partial: bool) -> dict[str, HeldPack]:
        """Returns the packs that hold these blocks, by block digest.

        Args:
            record: the memory that they belong to.
            blocks: their digests.
            partial: whether a pack that lies below may be read in parts.

        Raises:
            CorruptMemory: if a pack is damaged, or is nowhere.
            NotFound: if the memory was removed meanwhile.
        """
        # What is mapped stays, also where the next pack needs its room, or it is collected.
        held: dict[str, HeldPack] = {}
        return self._again(lambda: self._hold(record, blocks, partial, held), record)

    def _hold(
        self, record: str, blocks: set[str], partial: bool, held: dict[str, HeldPack]
    ) -> dict[str, HeldPack]:
        places = self._places.get(record)
        if places is None or not blocks <= places.keys():
            places = {b: pack for b, (pack, _, _) in self._shelf.index.locate(blocks).items()}
            self._places.put(record, places)
        found: dict[str, HeldPack] = {}
        for block in blocks & places.keys():
            name = places[block]
            if name not in held:
                held[name] = self._held(name, blocks, partial)
            found[block] = held[name]
        if len(found) < len(blocks):
            self._check_named(record)
        return found

    def _check_named(self, record: str) -> None:
        """Refuses what was removed, and collected, since its name was looked up."""
        if record not in self._shelf.index.records():
            raise NotFound(f"{record} was removed meanwhile: no name has it any more")

    def _held(self, name: str, blocks: set[str], partial: bool) -> HeldPack:
        path = self._shelf.layout.pack(name)
        if partial and not path.exists():
            pack = self.header(name)
            wanted = {id(e): e for b, (e, _) in pack.entries.items() if b in blocks}
            parts = self.below.fetch_parts(pack, wanted.values())
            if parts is not None:
                return parts
        return self.mapped(name)

    def mapped(self, name: str) -> MappedPack:
        """Returns a pack of the folder, mapped: from here on it can be unlinked and stays.

        Raises:
            FileNotFoundError: if the folder has no such pack.
            CorruptMemory: if it is damaged.
        """
        path = self._shelf.layout.pack(name)
        held = self.open(name)
        held.data(0, 0)
        if self.note_use:  # what was used last is evicted last
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        return held

    def _again(self, action: Callable[[], Result], record: str = "") -> Result:
        """Returns what the action returns; where a pack went elsewhere meanwhile, it is followed.

        Raises:
            CorruptMemory: if the pack is nowhere.
        """
        for _ in range(_TRIES):
            try:
                return action()
            except FileNotFoundError as error:
                missing = Path(str(error.filename or error.args[-1])).stem
                self._places.drop(record)
                if not self._shelf.index.knows_pack(missing):
                    continue  # garbage was collected: the index knows the new place
                self.below.fetch(missing, known=True)  # or a collection left a stray
        raise CorruptMemory(f"pack {missing} is missing")


def _signature(data: dict[str, Any]) -> Signature | None:
    try:
        return Signature.from_json(data)
    except ValueError:
        return None
