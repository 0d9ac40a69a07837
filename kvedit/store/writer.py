"""Writer: brings memories and removals into the files of a store, whole or not at all."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from kvedit.errors import RaceLost
from kvedit.memory import KVMemory
from kvedit.memory.blocks import Block
from kvedit.memory.digest import digest_bytes
from kvedit.store.index import Index
from kvedit.store.journal import Journal, Position
from kvedit.store.layout import Layout
from kvedit.store.manifest import encode_manifest
from kvedit.store.pack import dtype_name, encode, pack_digest
from kvedit.store.records import Counters, Record

__all__ = ["Writer"]


class Writer:
    """Writes under the store's lock: pack, then manifest, then log, then index.

    Args:
        layout: the store's files.
        journal: its log.
        index: its index.
        counters: where to count what is written.
    """

    def __init__(self, layout: Layout, journal: Journal, index: Index, counters: Counters) -> None:
        self._layout = layout
        self._journal = journal
        self._index = index
        self._counters = counters

    def put(
        self,
        memory: KVMemory,
        name: str,
        message: str,
        tags: tuple[str, ...],
        expect: str | None,
    ) -> Record:
        """Stores a memory as the newest version of a name; see ``Store.put``."""
        memory.check_unmodified()
        local = memory.to("cpu")
        cut = local.cut()
        manifest, content = encode_manifest(local, cut)
        body: dict[str, Any] = {"event": "put", "name": name}
        body |= {"message": message, "tags": list(tags)}
        body |= {"record": digest_bytes(manifest), "content": content}
        body |= {"facts": _facts(local, cut), "time": _now()}
        self._layout.create()
        with self._layout.lock:
            end = self._index.catch_up()
            current = self._index.newest(name)
            _check_expected(name, current, expect)
            if current is not None and current.record == body["record"]:
                return current
            self._commit(body, manifest, cut, end, memory)
            return self._index.versions(name)[0]

    def remove(self, name: str) -> bool:
        """Removes a name with its versions; returns False if there is no such name."""
        with self._layout.lock:
            end = self._index.catch_up()
            if self._index.newest(name) is None:
                return False
            self._write_down({"event": "remove", "name": name, "time": _now()}, end)
            return True

    def _commit(
        self,
        body: dict[str, Any],
        manifest: bytes,
        cut: list[Block],
        end: Position,
        memory: KVMemory,
    ) -> None:
        # Whatever fails before the index has the line, the files that this put made go again.
        with ExitStack() as undo:
            fresh = self._fresh(cut)
            packs = [pack_digest(block.digest for block in fresh)] if fresh else []
            written = 0
            files = [(self._layout.pack(pack), encode(fresh)) for pack in packs]
            path = self._layout.manifest(body["record"])
            if not (path.exists() and path.read_bytes() == manifest):
                files.append((path, iter([manifest])))
            for path, chunks in files:
                if not path.exists():
                    undo.callback(path.unlink, missing_ok=True)
                written += self._layout.publish(path, chunks)
            # Blocks may be views of the memory: a change while they were written would show.
            memory.check_unmodified()
            try:
                self._write_down({**body, "packs": packs}, end)
            except Exception:
                raise
            except BaseException:
                undo.pop_all()  # interrupted: the index may have the line already
                raise
            undo.pop_all()
        self._counters.add(bytes_written=written)

    def _write_down(self, body: dict[str, Any], end: Position) -> None:
        after = self._journal.append(body, end)
        try:
            self._index.catch_up()
        except Exception:
            self._journal.cut(end)  # the line would bring back at the next put what failed now
            raise
        self._counters.add(bytes_written=after.offset - end.offset)

    def _fresh(self, cut: list[Block]) -> list[Block]:
        """Returns the blocks, each once, that no pack holds, as far as its size tells."""
        different = {block.digest: block for block in cut}
        places = self._index.locate(different)
        whole = {
            pack
            for pack, size in dict(places.values()).items()
            if self._layout.pack_size(pack) == size
        }
        return [
            block
            for digest, block in different.items()
            if digest not in places or places[digest][0] not in whole
        ]


def _check_expected(name: str, current: Record | None, expect: str | None) -> None:
    found = current.record if current else ""
    if expect is not None and expect != found:
        raise RaceLost(
            f"{name} was expected at {expect or 'no version'} and is at {found or 'no version'}: "
            "read it again and decide"
        )


def _facts(memory: KVMemory, cut: list[Block]) -> dict[str, int | str]:
    return {
        "bytes": sum(block.tensor.nbytes for block in cut),
        "slots": memory.slots,
        "tokens": memory.tokens_count,
        "layers": len(memory.layers),
        "dtype": dtype_name(memory.dtype),
        "model": memory.model.name,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat()
