"""OpenStore: a store that is open, with what all of its verbs need."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.memory import KVMemory, Lineage
from kvedit.store.counters import Counters
from kvedit.store.crypt import Cipher
from kvedit.store.finder import Finder
from kvedit.store.index import Index
from kvedit.store.journal import Journal
from kvedit.store.layout import Durability, Layout
from kvedit.store.loader import Loader
from kvedit.store.manifest import Manifest, Part
from kvedit.store.reader import Verify, assemble
from kvedit.store.recipes import Recipe, is_recipe
from kvedit.store.records import Record
from kvedit.store.shelf import Shelf
from kvedit.store.sign import Signer
from kvedit.store.writer import Writer

__all__ = ["OpenStore", "Rebuild"]

Rebuild = Callable[[Lineage, Callable[[str], KVMemory]], KVMemory]
"""Makes a memory again from its lineage, given a way to get the memory of an earlier step."""


class OpenStore:
    """What every part of a store can reach.

    Args:
        path: the folder.
        durability: what an acknowledged put survives.
        namespace: the tenant.
        key: seals and opens memories, or None.
        signer: signs what is put, or None.
        trusted_keys: public keys that a record must be signed by; empty for no such demand.
        replay: rebuilds what is stored as a recipe, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        durability: Durability,
        namespace: str,
        key: bytes | str | Path | None,
        signer: Signer | None,
        trusted_keys: Collection[str],
        replay: Rebuild | None,
    ) -> None:
        layout = Layout(path, durability, namespace)
        journal = Journal(layout)
        cipher = None if key is None else Cipher.from_key(key, namespace)
        index = Index(layout, journal)
        self._shelf = Shelf(layout, journal, index, Counters(), cipher, signer, tuple(trusted_keys))
        self._finder = Finder(self._shelf)
        self._loader = Loader(self._shelf, self._finder)
        self._writer = Writer(self._shelf)
        self._replay = replay
        self._key_fits = False
        # Where the lock is taken, its writer is alive, and what it does is no litter.
        if layout.exists() and layout.try_lock():
            try:
                self._shelf.tidy()
            finally:
                layout.lock.release()

    @property
    def counters(self) -> Counters:
        """What this object read, checked and wrote."""
        return self._shelf.counters

    @property
    def path(self) -> Path:
        """The folder."""
        return self._shelf.layout.root

    def close(self) -> None:
        """Closes the index; using the store again opens it again."""
        self._shelf.index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _resolve(self, ref: object) -> Record:
        """Returns the version that a reference means."""
        self._ask(ref)
        return self._finder.resolve(ref)

    def _ask(self, ref: object) -> None:
        """Called before a reference is looked up; a store that follows another asks it first."""

    def _learn(self) -> None:
        """Called before names are listed; a store that follows another asks it first."""

    def _check_key(self) -> None:
        """Refuses another key than that of the packs, which new memories share blocks with."""
        for name, _, _ in [] if self._key_fits else self._shelf.index.packs()[:1]:
            own = self._shelf.cipher.fingerprint if self._shelf.cipher else ""
            with suppress(CorruptMemory):  # a damaged pack says nothing
                if (found := self._finder.header(name).cipher) != own:
                    raise InvalidArgument(
                        f"{self.path} has packs of {found or 'no key'} and this store has "
                        f"{own or 'no key'}: what it puts could be read with neither. Open it "
                        "with that key, or take another folder or namespace"
                    )
                self._key_fits = True

    def _read(
        self,
        record: Record,
        layers: list[int] | None = None,
        slots: tuple[int, int] | None = None,
        verify: Verify = "full",
    ) -> KVMemory:
        """Returns the memory of a record, from the folder or from below."""
        if is_recipe(record):
            memory = self._rebuilt(record)
            return _part_of(memory, layers, slots)
        manifest = self._finder.manifest(record.record, record.content)
        parts = manifest.parts_of(manifest.choose(layers), slots)
        tensors = self._tensors_of(manifest, parts, slots, verify)
        return assemble(manifest, tensors, verify != "off")

    def _tensors(
        self,
        record: Record,
        layers: list[int] | None,
        kinds: Collection[str],
        slots: tuple[int, int] | None,
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Returns some tensors of a record, by layer and kind."""
        if is_recipe(record):
            memory = _part_of(self._rebuilt(record), layers, slots)
            found = {(i, k): t for i, layer in memory.layers.items() for k, t in layer.tensors()}
            return {(i, k): t for (i, k), t in found.items() if k in kinds}
        manifest = self._finder.manifest(record.record, record.content)
        parts = manifest.parts_of(manifest.choose(layers), slots)
        chosen = [part for part in parts if part.layer >= 0 and part.kind in kinds]
        return self._tensors_of(manifest, chosen, slots, "full")

    def _tensors_of(
        self,
        manifest: Manifest,
        parts: list[Part],
        slots: tuple[int, int] | None,
        verify: Verify,
    ) -> dict[tuple[int, str], torch.Tensor]:
        whole = len(parts) == len(manifest.parts) and slots is None
        tensors = self._loader.read(manifest.record, parts, whole, verify)
        return tensors if slots is None else manifest.narrowed(tensors, slots)

    def _rebuilt(self, record: Record) -> KVMemory:
        if self._replay is None:
            raise InvalidArgument(
                f"{record.name} is stored as a recipe: open the store with "
                "Store(..., replay=kvedit.rebuild)"
            )
        recipe = Recipe.parse(self._finder.paper(record.record), record.record)
        memory = self._replay(recipe.lineage, lambda node: self._base(node, recipe.base))
        if memory.digest != record.content:
            raise CorruptMemory(
                f"{record.name} v{record.version}: its recipe gives another memory than the one "
                "that was put; other versions of the libraries may compute otherwise"
            )
        return memory

    def _stored(self, node: str) -> list[Record]:
        """Returns what is stored with its bytes and was made by a step, the newest first.

        A memory without history is asked for by its content digest.
        """
        found = self._shelf.index.made_of(node, head=True)
        if not found and (one := self._shelf.index.by_digest(node)) and one.content == node:
            found = [one]
        return [record for record in found if not is_recipe(record)]

    def _base(self, node: str, base: str) -> KVMemory:
        # By digest: its name may be gone, and the same step may have other memories, in another
        # dtype for example.
        manifest = self._finder.manifest(base, "")
        head = manifest.lineage.head
        if (head.id if head else manifest.content) != node:
            raise self._finder.unknown(node)
        tensors = self._tensors_of(manifest, list(manifest.parts.values()), None, "full")
        return assemble(manifest, tensors, True)


def _part_of(memory: KVMemory, layers: list[int] | None, slots: tuple[int, int] | None) -> KVMemory:
    kept = {index: memory.layers[index] for index in memory.layer_indices(layers)}
    if slots is not None:
        longest = max(layer.slots for layer in kept.values())
        if not 0 <= slots[0] < slots[1] <= longest:
            raise InvalidArgument(
                f"slots are (first, one past the last) within 0 to {longest}, found {slots}"
            )
        kept = {
            index: layer.select(torch.arange(*(min(slot, layer.slots) for slot in slots)))
            for index, layer in kept.items()
        }
    return dataclasses.replace(memory, layers=kept)
