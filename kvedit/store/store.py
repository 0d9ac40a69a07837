"""Store: memories under names that have versions, in a local folder."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.memory import KVMemory
from kvedit.memory.show import human_bytes
from kvedit.store.index import Index
from kvedit.store.journal import Journal
from kvedit.store.layout import Durability, Layout
from kvedit.store.manifest import Manifest
from kvedit.store.reader import read_memory
from kvedit.store.records import Counters, Details, Entry, Listing, Record, one_of
from kvedit.store.refs import Ref, check_labels, check_name, parse_ref
from kvedit.store.writer import Writer

__all__ = ["Store"]


class Store:
    """Named, versioned, content-addressed memories. The format is in ``docs/store.md``.

    Threads and processes may use one folder at once. It is no cache: nothing is ever dropped.

    Args:
        path: a local folder; it is made by the first put.
        durability: what an acknowledged put survives. ``"full"``: power loss. ``"process"``: the
            death of the process; after power loss recent puts may be gone. ``"none"``: as
            ``"process"``, and after power loss the index may need to be made again.

    Attributes:
        counters: what this object read, checked and wrote.

    Raises:
        InvalidArgument: if the path is no local folder, or holds something else or a newer format.
        CorruptMemory: if the folder's marker is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], durability: Durability = "full") -> None:
        self._layout = Layout(path, durability)
        journal = Journal(self._layout)
        self._index = Index(self._layout, journal)
        self.counters = Counters()
        self._writer = Writer(self._layout, journal, self._index, self.counters)
        # Where the lock is taken, its writer is alive, and what it does is no litter.
        if self._layout.exists() and self._layout.try_lock():
            try:
                self._layout.sweep()
            finally:
                self._layout.lock.release()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._layout.root

    def put(
        self,
        memory: KVMemory,
        name: str,
        message: str = "",
        tags: Iterable[str] = (),
        expect: str | None = None,
    ) -> Record:
        """Returns the newest version of ``name``, which ``memory`` has become.

        When it returns, the memory is as safe as the store's durability says; when it raises,
        nothing has changed (only a KeyboardInterrupt may leave it done). If the newest version is
        this very record, nothing is written and that version is returned.

        Args:
            memory: the memory.
            name: ASCII letters, digits and ``._-/``.
            message: what to say about this version.
            tags: labels of this version.
            expect: record digest that the name must point to, ``""`` for a name that must not
                exist; None puts on top of whatever is there.

        Raises:
            InvalidArgument: if name, message or tags can't be used.
            MutatedMemory: if a tensor of the memory was written in place.
            RaceLost: if the name points elsewhere than ``expect``.
        """
        check_name(name)
        labels = check_labels(message, tags)
        return self._writer.put(memory, name, message, labels, expect)

    def get(
        self,
        ref: str,
        layers: Iterable[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        verify: Literal["full", "off"] = "full",
    ) -> KVMemory:
        """Returns a memory, every byte of it checked.

        Args:
            ref: ``"name"``, ``"name@{k}"`` (k versions before the newest), a record or content
                digest, or at least six characters of one. A name goes before a prefix.
            layers: only these layers; negative numbers count from the end.
            device: where to put the tensors.
            dtype: dtype of keys and values; another dtype changes the content digest.
            verify: ``"off"`` does not check the digests of blocks and marks the memory as
                unverified.

        Raises:
            NotFound: if the store has no such memory.
            InvalidArgument: if several memories fit the prefix.
            CorruptMemory: if stored bytes are not those that were put.
            UnknownName: if the memory lacks one of the layers.
        """
        if verify not in ("full", "off"):
            raise InvalidArgument(f"verify must be 'full' or 'off', found {verify!r}")
        try:
            record = self._resolve(ref)
        except NotFound:
            self.counters.add(misses=1)
            raise
        manifest, size = self._manifest(record)
        memory, read = self._read(manifest, manifest.choose(layers), verify == "full")
        checked = size + (read if verify == "full" else 0)
        self.counters.add(hits=1, bytes_read=size + read, bytes_verified=checked)
        return memory if device is None and dtype is None else memory.to(device, dtype)

    def show(self, ref: str) -> Details:
        """Returns what is known of a memory without reading its blocks.

        Raises:
            NotFound: if the store has no such memory.
            CorruptMemory: if its manifest is damaged.
        """
        record = self._resolve(ref)
        manifest, _ = self._manifest(record)
        blocks = {block.digest: block for part in manifest.parts.values() for block in part.blocks}
        packs = {pack for pack, _ in self._index.locate(blocks).values()}
        source = manifest.document["source"]
        return Details(
            record=record,
            codec=manifest.codec,
            blocks=len(blocks),
            stored=sum(block.nbytes for block in blocks.values()),
            packs=tuple(sorted(packs)),
            next_position=manifest.document["next_position"],
            rules=len(manifest.document["rules"]),
            biased=tuple(layer for layer, kind in sorted(manifest.parts) if kind == "bias"),
            text=None if source is None else source["text"],
            lineage=tuple(manifest.lineage.describe().splitlines()),
        )

    def ls(self, where: str | Callable[[Entry], bool] | None = None) -> list[Entry]:
        """Returns every name with its newest version.

        Args:
            where: a pattern for names (``"handbook/*"``) or a condition on entries.
        """
        entries = self._index.entries()
        if isinstance(where, str):
            return Listing(entry for entry in entries if fnmatchcase(entry.name, where))
        return Listing(entry for entry in entries if where is None or where(entry))

    def log(self, name: str) -> list[Record]:
        """Returns the versions of a name, the newest first.

        Raises:
            NotFound: if there is no such name.
        """
        versions = self._index.versions(check_name(name))
        if not versions:
            raise self._unknown(name)
        return Listing(versions)

    def rm(self, name: str) -> None:
        """Removes a name with all its versions.

        They can't be reached any more, also not by digest unless another name has them. Their
        bytes stay in the folder.

        Raises:
            NotFound: if there is no such name.
        """
        if not (self._layout.exists() and self._writer.remove(check_name(name))):
            raise self._unknown(name)

    def names(self) -> list[str]:
        """Returns all names in order."""
        return self._index.names()

    def rebuild_index(self) -> None:
        """Makes the index again from the log; a missing or unreadable index does so by itself.

        Raises:
            CorruptMemory: if the log is damaged.
        """
        if self._layout.exists():
            with self._layout.lock:
                self._index.rebuild()

    def close(self) -> None:
        """Closes the index; using the store again opens it again."""
        self._index.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, ref: object) -> bool:
        """Whether ``ref`` names exactly one memory."""
        try:
            self._resolve(ref)
        except (NotFound, InvalidArgument):
            return False
        return True

    def __len__(self) -> int:
        """Number of names."""
        return len(self.names())

    def __bool__(self) -> bool:
        """True, also while empty."""
        return True

    def __repr__(self) -> str:
        """Folder, names and size."""
        entries = self._index.entries()
        size = human_bytes(sum(entry.bytes for entry in entries))
        return f"Store({str(self.path)!r}): {len(entries)} names, {size} in their newest versions"

    def _resolve(self, text: object) -> Record:
        ref = parse_ref(text)
        found = self._index.newest(ref.name, ref.back or 0) if ref.name else None
        if found is None and ref.prefix:
            found = self._by_prefix(ref)
        if found is None:
            raise self._unknown(ref.text, ref)
        return found

    def _by_prefix(self, ref: Ref) -> Record | None:
        digests = self._index.digests(ref.prefix)
        if len(digests) > 1:
            shown = one_of([digest[:16] for digest in digests])
            raise InvalidArgument(f"{ref.text!r} fits several digests, write more of it: {shown}")
        return self._index.by_digest(digests[0]) if digests else None

    def _unknown(self, text: str, ref: Ref | None = None) -> NotFound:
        if ref is not None and ref.back and (count := len(self._index.versions(ref.name))):
            return NotFound(
                f"{ref.name} has {count} versions: {ref.name}@{{0}} to @{{{count - 1}}}"
            )
        names = self.names()
        near = difflib.get_close_matches(ref.name if ref else text, names, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It has: {one_of(names)}"
        return NotFound(f"{self.path} has no memory {text!r}. {hint}")

    def _manifest(self, record: Record) -> tuple[Manifest, int]:
        manifest, size = Manifest.read(self._layout.manifest(record.record), record.record)
        if manifest.content != record.content:
            raise CorruptMemory(f"the index is damaged at {record.name}: call rebuild_index()")
        return manifest, size

    def _read(self, manifest: Manifest, layers: list[int], verify: bool) -> tuple[KVMemory, int]:
        parts = [part for part in manifest.parts.values() if part.layer in {-1, *layers}]
        places = self._index.locate(block.digest for part in parts for block in part.blocks)
        packs = {block: self._layout.pack(pack) for block, (pack, _) in places.items()}
        memory = read_memory(manifest, parts, packs, verify)
        return memory, sum(block.nbytes for part in parts for block in part.blocks)
