"""Journal: the append-only log of commits and removals, from which the index can be rebuilt."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvedit.errors import CorruptMemory
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store.layout import Layout, write_all
from kvedit.store.parsing import SHAPE_ERRORS

__all__ = ["Journal", "Position"]


@dataclass(frozen=True)
class Position:
    """A place between two lines.

    Args:
        offset: bytes before it.
        sequence: lines before it.
        checksum: of the line before it; each line names it, so none can go missing unseen.
    """

    offset: int = 0
    sequence: int = 0
    checksum: str = ""


class Journal:
    """The log of one store. Each line is canonical JSON with its own checksum.

    Args:
        layout: the store's files.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._path = layout.log

    def read(self, since: Position) -> Iterator[tuple[dict[str, Any], Position]]:
        """Yields each line after ``since`` with the position behind it.

        An unfinished last line is what a writer that died left of a put that it never
        acknowledged; it is passed over.

        Raises:
            CorruptMemory: if a line is damaged, missing or out of order.
        """
        data = self._tail(since)
        while data:
            line, newline, rest = data.partition(b"\n")
            event = _parse(line, since)
            if event is None and not newline:
                line = line[:-1]  # the line may be whole and only its end damaged
                event = _parse(line, since)
                if event is None:
                    return
            if event is None:
                raise CorruptMemory(
                    f"{self._path}: line {since.sequence + 1} is damaged, or a line before it is "
                    "missing: restore the log from a backup"
                )
            since = Position(since.offset + len(line) + 1, since.sequence + 1, event["checksum"])
            yield event, since
            data = rest

    def append(self, body: dict[str, Any], after: Position) -> Position:
        """Returns the position behind a line that it writes behind ``after``.

        The caller holds the lock and has read all lines up to ``after``; what lies behind it is
        an unfinished line and is cut off. On failure the log is as it was.
        """
        line = {**body, "sequence": after.sequence + 1, "previous": after.checksum}
        checksum = digest_bytes(canonical_json(line))
        data = canonical_json({**line, "checksum": checksum}) + b"\n"
        file = os.open(self._path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.ftruncate(file, after.offset)
            if after.offset:  # writes the newline that a damaged end may lack
                os.lseek(file, after.offset - 1, os.SEEK_SET)
                data = b"\n" + data
            write_all(file, data)
            self._layout.sync(file)
        except BaseException:
            os.ftruncate(file, after.offset)
            raise
        finally:
            os.close(file)
        end = max(after.offset - 1, 0) + len(data)
        return Position(end, after.sequence + 1, checksum)

    def cut(self, after: Position) -> None:
        """Takes back the lines behind ``after``, which nobody was told of."""
        os.truncate(self._path, after.offset)

    def _tail(self, since: Position) -> bytes:
        try:
            with self._path.open("rb") as file:
                # One byte less is a lost newline, which the next append writes again.
                if os.fstat(file.fileno()).st_size < since.offset - 1:
                    raise CorruptMemory(
                        f"{self._path} is shorter than the {since.offset} bytes that the index "
                        "has seen of it: restore it from a backup, or call Store.rebuild_index() "
                        "to go on with the lines that are left"
                    )
                file.seek(since.offset)
                return file.read()
        except FileNotFoundError:
            raise CorruptMemory(f"{self._path} is missing: restore it from a backup") from None


def _parse(line: bytes, since: Position) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        checksum = event.pop("checksum")
        whole = digest_bytes(canonical_json(event)) == checksum
        # Canonical bytes: one line has one spelling, so that no flipped byte is harmless.
        whole = whole and canonical_json({**event, "checksum": checksum}) == line
    except SHAPE_ERRORS:
        return None
    expected = (since.sequence + 1, since.checksum)
    if not whole or (event.get("sequence"), event.get("previous")) != expected:
        return None
    return {**event, "checksum": checksum}
