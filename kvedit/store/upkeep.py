"""Upkeep: collecting garbage, checking and repairing, measuring, exporting and importing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory, InvalidArgument, KVEditError, NotFound, UntrustedMemory
from kvedit.memory import KVMemory
from kvedit.store.carry import open_file, travelling, write_file
from kvedit.store.codecs import LOSSY
from kvedit.store.crypt import Cipher
from kvedit.store.draft import Draft, Labels, Prepared, put_event
from kvedit.store.du import Usage, measure_usage
from kvedit.store.family import Family
from kvedit.store.fsck import Bring, Checkup, Health
from kvedit.store.gc import Collected, collect
from kvedit.store.packing import Piece, finish, paper_piece
from kvedit.store.recipes import is_recipe
from kvedit.store.records import Record
from kvedit.store.repack import copy_blocks
from kvedit.store.sealed import seal
from kvedit.store.sign import Signature, check

__all__ = ["Upkeep"]


class Upkeep(Family):
    """The verbs of a store that look after its files."""

    def gc(self, waste: float = 0.25) -> Collected:
        """Returns what went: all that no name can reach, and versions whose time is over.

        Args:
            waste: share of a pack that may be garbage before the rest is packed anew.

        Raises:
            InvalidArgument: if ``waste`` is no share.
            CorruptMemory: if a manifest that a name needs can't be read; nothing is removed then:
                see :meth:`fsck`.
        """
        if not 0 <= waste < 1:
            raise InvalidArgument(f"waste is a share from 0 to below 1, found {waste!r}")
        if not self._shelf.layout.exists():
            return Collected(0, 0, 0, 0, 0)
        return collect(self._shelf, self._finder, self._writer, waste)

    def fsck(self, repair: bool = False, sources: Sequence[Upkeep] = ()) -> Health:
        """Returns what is wrong after reading every byte of the folder.

        A repair puts damaged packs aside in ``quarantine``, keeps their sound blocks, and brings
        the others back: from the remote tier, from other stores, or by replay, whatever gives the
        same bytes. A damaged log and index are made whole from each other and from the packs.

        Args:
            repair: whether to change anything.
            sources: other stores that may hold the same memories.

        Raises:
            InvalidArgument: if it should repair packs of another key.
        """
        if not self._shelf.layout.exists():
            return Health(0, 0, 0, 0, (), ())
        if repair:
            with suppress(CorruptMemory):  # a damaged log: the repair comes first
                self._check_key()
        ways: list[Bring] = [*map(_bring_from, sources), self._bring_by_replay]
        return Checkup(self._shelf, self._finder, self._writer, repair, ways).run()

    def du(self) -> Usage:
        """Returns which bytes belong to whom.

        Raises:
            CorruptMemory: if a manifest can't be read.
        """
        return measure_usage(self._shelf, self._finder)

    def export(
        self,
        ref: str,
        path: str | os.PathLike[str],
        key: bytes | str | Path | None = None,
        plain: bool = False,
    ) -> int:
        """Returns the bytes of a file that it writes: one memory with all it needs.

        Message, tags, source, licence, metrics and signature travel along.

        Args:
            ref: the memory.
            path: the file, which must not exist.
            key: encrypts the file.
            plain: say so, where an encrypted memory is to leave in the clear.

        Raises:
            NotFound: if there is no such memory.
            CorruptMemory: if it is damaged; no file is left then.
            InvalidArgument: if the file exists, or it would be in the clear unasked.
        """
        record = self._resolve(ref)
        if is_recipe(record):
            raise InvalidArgument(
                f"{ref} is stored as a recipe, which needs this store: get it, put it under "
                "another name, and export that"
            )
        if self._shelf.cipher is not None and key is None and not plain:
            raise InvalidArgument(
                f"{ref} is encrypted: export it with key=..., or in the clear with plain=True"
            )
        memory = self._read(record)
        paper = self._finder.paper(record.record)
        note = travelling(self._shelf.index.event(record.record) | self._labels(record))
        if self._shelf.cipher is None and key is None:
            pieces = self._stored_pieces(record)
            pack = finish(pieces, [paper_piece(record.record, paper)], note=note)
        else:
            pack = seal(memory, paper, None if key is None else Cipher.from_key(key, ""), note)
        return write_file(Path(path), pack)

    def import_(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        record: str | None = None,
        key: bytes | str | Path | None = None,
        force: bool = False,
    ) -> Record:
        """Returns the version that the memory of an exported file has become.

        Args:
            path: the file.
            name: where to put it; None for the name that it had.
            record: the record digest that it must have.
            key: opens the file.
            force: put wherever the name points.

        Raises:
            CorruptMemory: if the file is damaged, or holds another record.
            UntrustedMemory: if the store has trusted keys and none of them signed it.
            InvalidArgument: if it has no name, or a key is missing or another one.
            RaceLost: if somebody else moved the name meanwhile.
        """
        self._check_key()
        cipher = None if key is None else Cipher.from_key(key, "")
        found = open_file(Path(path), record, cipher)
        note = dict(found.note)
        target = name or note.get("name")
        if not target:
            raise InvalidArgument(f"{path} does not say what it is called: import it with name=...")
        named = ("message", "tags", "source", "licence", "metrics")
        labels = Labels.of(**{key: note[key] for key in named if key in note})
        # What a lossy codec made is encoded only once: again, it would come out as another memory.
        codec = "raw" if found.manifest.codec in LOSSY else found.manifest.codec
        draft = Draft(found.memory, target, labels, codec, None, force)
        cut = found.memory.cut()
        event = put_event(target, labels, found.manifest.record, found.memory, cut)
        event |= {"content": found.manifest.content, "codec": found.manifest.codec}
        event |= {"signature": self._trusted(found.manifest.record, note.get("signature"))}
        stored = found.held if cipher is None else None
        put = Prepared(draft, found.memory, cut, {}, found.paper, event, None, stored)
        current = self._shelf.index.entry(target)
        return self._commit([put], {target: current.record if current else ""})[0]

    # Inside

    def _stored_pieces(self, record: Record) -> list[Piece]:
        """Returns the blocks of a memory as they are stored."""
        manifest = self._finder.manifest(record.record, record.content)
        parts = manifest.parts.values()
        blocks = {block.digest for part in parts for block in part.blocks}
        packs = self._finder.hold(record.record, blocks, partial=False)
        held = {id(pack): pack for pack in packs.values()}.values()
        return [
            piece
            for pack in held
            for piece in copy_blocks(pack, {b for b in blocks if packs[b] is pack})
        ]

    def _trusted(self, record: str, data: Any) -> dict[str, str] | None:
        """Returns the signature to keep: the one that came, or our own."""
        signature = None
        if data is not None:
            try:
                signature = Signature.from_json(data)
                check(signature, record, self._shelf.namespace, [signature.key])
            except (ValueError, UntrustedMemory):
                signature = None
        if self._shelf.trusted:
            check(signature, record, self._shelf.namespace, self._shelf.trusted)
        if signature is None and self._shelf.signer is not None:
            signature = self._shelf.signer.sign(record, self._shelf.namespace)
        return signature.to_json() if signature else None

    def _labels(self, record: Record) -> dict[str, Any]:
        labels = Labels(record.message, record.tags, record.source, record.licence, record.metrics)
        return {"name": record.name, **labels.to_json()}

    def _bring_by_replay(self, record: Record) -> KVMemory | None:
        if self._replay is None:
            return None
        lineage = self.lineage(record.record)

        def fetch(node: str) -> KVMemory:
            for one in self._shelf.index.made_of(node, head=True):
                if one.record != record.record and not is_recipe(one):
                    with suppress(CorruptMemory):  # another name may have a sound one
                        return self._read(one)
            raise NotFound(f"no sound memory of step {node}")  # a replay makes it, then

        return self._replay(lineage, fetch)


def _bring_from(store: Upkeep) -> Bring:
    def bring(record: Record) -> KVMemory | None:
        try:
            return store._read(store._finder.resolve(record.record))
        except KVEditError:
            return None

    return bring
