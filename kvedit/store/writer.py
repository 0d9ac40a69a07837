"""Writer: brings memories and other events into the files of a store, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from kvedit.errors import InvalidArgument, RaceLost
from kvedit.memory.blocks import Block
from kvedit.store.catalogue import now
from kvedit.store.draft import Prepared
from kvedit.store.journal import Position
from kvedit.store.packing import Encoded, build_pack, finish
from kvedit.store.records import Record
from kvedit.store.repack import copy_blocks, copy_manifests
from kvedit.store.shelf import Shelf

__all__ = ["Writer"]


class Writer:
    """Writes under the store's lock: pack, then log, then index.

    Args:
        shelf: the store's parts.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def put(self, puts: Sequence[Prepared], seen: Mapping[str, str]) -> list[Record]:
        """Returns the newest versions of names, which memories have become: all or none.

        Args:
            puts: what to store.
            seen: where each name pointed when its put began; ``""`` for nowhere.

        Raises:
            RaceLost: if a name points elsewhere than it should.
            InvalidArgument: if a name is a tag, which does not move.
        """
        layout, index = self._shelf.layout, self._shelf.index
        layout.create()
        with layout.lock:
            end = index.catch_up()
            todo = [put for put in puts if self._changes(put, seen)]
            if todo:
                self._commit(todo, end)
            found = [index.newest(put.draft.name) for put in puts]
            return [record for record in found if record is not None]

    def record(self, event: dict[str, Any], end: Position | None = None) -> None:
        """Writes down an event that brings no packs; the caller holds the lock.

        Args:
            event: what happened.
            end: where the log ends, if that is known.
        """
        self._write_down({**event, "time": now()}, end or self._shelf.index.catch_up())

    def append(self, event: dict[str, Any]) -> None:
        """Writes down an event that has its times already; the caller holds the lock."""
        self._write_down(event, self._shelf.index.catch_up())

    def publish(self, pack: Encoded, undo: ExitStack) -> None:
        """Writes the file of a pack; ``undo`` takes it back.

        Args:
            pack: what to write.
            undo: gets what is to be done if a later step fails.
        """
        path = self._shelf.layout.pack(pack.digest)
        if not path.exists():
            undo.callback(path.unlink, missing_ok=True)
        self._shelf.counters.add(bytes_written=self._shelf.layout.publish(path, pack.chunks))

    def _changes(self, put: Prepared, seen: Mapping[str, str]) -> bool:
        draft = put.draft
        current = self._shelf.index.entry(draft.name)
        found = current.record if current else ""
        expected = draft.expect
        if expected is None and not draft.force and found != put.event["record"]:
            expected = seen.get(draft.name, found)
        if expected is not None and found != expected:
            raise RaceLost(
                f"{draft.name} was expected at {expected or 'no version'} and is at "
                f"{found or 'no version'}: read it again and decide, or put with force=True"
            )
        if found == put.event["record"]:
            return False
        if current is not None and current.fixed and not draft.force:
            raise InvalidArgument(
                f"{draft.name} is a tag and stays where it is: choose another name, or force=True"
            )
        return True

    def _commit(self, puts: Sequence[Prepared], end: Position) -> None:
        pack = self._pack(puts)
        packs = [pack] if pack else []
        events = [{**put.event, "packs": [], "time": now()} for put in puts]
        events[0]["packs"] = [pack.digest for pack in packs]
        body = events[0] if len(events) == 1 else {"event": "batch", "events": events}
        for one in packs:
            self._shelf.make_room(one.size)
        # Whatever fails before the index has the line, the files that this put made go again.
        with self._shelf.layout.intent(one.digest for one in packs), ExitStack() as undo:
            for one in packs:
                self.publish(one, undo)
            # Blocks may be views of the memory: a change while they were written would show.
            for put in puts:
                put.draft.memory.check_unmodified()
            try:
                self._write_down(body, end)
            except Exception:
                raise
            except BaseException:
                undo.pop_all()  # interrupted: the index may have the line already
                raise
            undo.pop_all()

    def _pack(self, puts: Sequence[Prepared]) -> Encoded | None:
        fresh = self._fresh([block for put in puts for block in put.cut])
        manifests = {
            put.event["record"]: put.manifest
            for put in puts
            if not self._is_held(self._shelf.index.manifest_pack(put.event["record"]))
        }
        if not fresh and not manifests:
            return None
        stored = puts[0].stored
        if stored is not None and self._shelf.cipher is None:
            pieces = copy_blocks(stored, {block.digest for block in fresh})
            return finish(pieces, copy_manifests(stored, manifests))
        (codec,) = {put.draft.codec for put in puts}
        originals = {key: block for put in puts for key, block in put.originals.items()}
        return build_pack(fresh, manifests, codec, originals, self._shelf.cipher)

    def _fresh(self, cut: Sequence[Block]) -> list[Block]:
        """Returns the blocks, each once, that no pack holds, as far as its size tells."""
        different = {block.digest: block for block in cut}
        places = self._shelf.index.locate(different)
        whole = {
            pack
            for pack, size, pushed in set(places.values())
            if pushed or self._shelf.layout.pack_size(pack) == size
        }
        return [
            block
            for digest, block in different.items()
            if digest not in places or places[digest][0] not in whole
        ]

    def _is_held(self, pack: str | None) -> bool:
        if pack is None:
            return False
        ((_, size, pushed),) = self._shelf.index.packs_of([pack])
        return pushed or self._shelf.layout.pack_size(pack) == size

    def _write_down(self, body: dict[str, Any], end: Position) -> None:
        self._shelf.layout.create()
        after = self._shelf.journal.append(body, end)
        try:
            self._shelf.index.catch_up()
        except Exception:
            # The line would bring back at the next put what failed now.
            self._shelf.journal.cut(end)
            raise
        self._shelf.counters.add(bytes_written=after.offset - end.offset)
