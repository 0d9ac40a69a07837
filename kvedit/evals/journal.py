"""Journal: results of a long run, one JSON line per case, so that it can be cut and go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json

__all__ = ["Journal"]

_FORMAT = "kvedit-evals/1"


class Journal:
    """A file of results. Its first line says what made them; another maker is refused.

    A line is written in one piece and flushed. A last line that is not whole, as a killed run
    leaves it, is cut off and its case done again.

    Args:
        path: the file; None keeps nothing.
        facts: what the results depend on, as plain data.

    Raises:
        InvalidArgument: if the file holds something else.
    """

    def __init__(self, path: str | Path | None, facts: dict[str, Any]) -> None:
        """Opens the file and reads what is there."""
        self._path = None if path is None else Path(path)
        self.done: dict[str, dict[str, Any]] = {}
        header = {"format": _FORMAT, **facts}
        if self._path is None:
            return
        lines = self._whole_lines()
        if not lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(canonical_json(header) + b"\n")
            return
        if lines[0] != header:
            differing = {
                key: (lines[0].get(key), header.get(key))
                for key in sorted({*lines[0], *header})
                if lines[0].get(key) != header.get(key)
            }
            raise InvalidArgument(
                f"{self._path} holds results of something else, (found, expected): {differing}; "
                "choose another file, or remove it"
            )
        self.done = {line["key"]: line for line in lines[1:] if "key" in line}

    def _whole_lines(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            return [dict(json.loads(line)) for line in whole.splitlines() if line.strip()]
        except (ValueError, TypeError) as error:
            raise InvalidArgument(f"{self._path} is no journal of results: {error}") from error

    def add(self, record: dict[str, Any]) -> None:
        """Appends one result, which has a ``key``."""
        self.done[record["key"]] = record
        if self._path is None:
            return
        with self._path.open("ab") as file:
            file.write(canonical_json(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
