"""JsonlTracker: one JSON object per event, in the run's folder. The default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.tracking.base import RunFacts, Tracker, plain_number

__all__ = ["JsonlTracker"]


class JsonlTracker(Tracker):
    """Appends events to a file. Each line is written out at once, so a crash loses none.

    The first event, ``start``, has the resolved config and library versions.

    Args:
        folder: the run's folder; it is made if need be.
        facts: what is known before the run begins.
        file: name of the file.
    """

    def __init__(self, folder: Path, facts: RunFacts, file: str = "events.jsonl") -> None:
        """Opens the file and writes the first event."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / file
        self._file = self.path.open("a", encoding="utf-8")
        self._write("start", task=facts.task, config=facts.config, versions=facts.versions)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes an event ``log``."""
        self._write("log", step=step, metrics=metrics)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes an event ``table``."""
        self._write("table", name=name, columns=list(columns), rows=[list(row) for row in rows])

    def artifact(self, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Writes an event ``artifact`` with the path; the file is not copied."""
        self._write("artifact", name=name, path=str(path), metadata=metadata)

    def close(self) -> None:
        """Writes an event ``end`` and closes the file."""
        if not self._file.closed:
            self._write("end")
            self._file.close()

    def _write(self, event: str, **fields: Any) -> None:
        if self._file.closed:
            raise InvalidArgument(f"{self.path} is closed: open a new tracker")
        head = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = json.dumps(_plain({**head, **fields}), ensure_ascii=False, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return plain_number(value)
    if value is None or isinstance(value, str | int):
        return value
    return str(value)
