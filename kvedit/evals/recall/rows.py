"""Rows of data files: JSON or JSON lines, with errors that name the file and the row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.readers import load_json

__all__ = ["expect", "named_rows", "reading_row", "texts"]


def named_rows(path: str | Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns the objects of a JSON list, or of a ``.jsonl`` file, each with its place.

    Raises:
        InvalidArgument: if the file can't be read, or is no list of objects.
    """
    found = _lines(Path(path)) if str(path).endswith(".jsonl") else load_json(path)
    if not isinstance(found, list) or not found:
        raise InvalidArgument(
            f"data file {path}: expected a list of rows, found {_kind(found)}"
            + (" without rows" if isinstance(found, list) else "")
        )
    rows = [(f"data file {path}, row {index}", row) for index, row in enumerate(found)]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise InvalidArgument(f"{where}: expected an object, found {_kind(row)}")
    return rows


def _lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"data file {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InvalidArgument(f"data file {path}, line {number}: {error}") from error
    return rows


@contextmanager
def reading_row(where: str, shape: str) -> Iterator[None]:
    """Turns what goes wrong while a row is read into one error.

    Args:
        where: the file and the row.
        shape: what was expected there.

    Yields:
        Nothing.

    Raises:
        InvalidArgument: if the row has another shape.
    """
    try:
        yield
    except InvalidArgument as error:
        message = str(error)
        raise InvalidArgument(
            message if message.startswith(where) else f"{where}: {message}"
        ) from error
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InvalidArgument(
            f"{where}: expected {shape}; {type(error).__name__}: {error}"
        ) from error


def expect(value: Any, kind: type, name: str) -> Any:
    """Returns ``value`` if it is of a kind, and raises InvalidArgument otherwise."""
    if not isinstance(value, kind):
        raise InvalidArgument(f"{name}: expected {kind.__name__}, found {_kind(value)}")
    return value


def texts(value: Any, name: str) -> tuple[str, ...]:
    """Returns one text or a list of texts as different texts without space around them.

    Raises:
        InvalidArgument: if it is something else, or there is none.
    """
    given: Sequence[Any] = [value] if isinstance(value, str) else expect(value, list, name)
    found = tuple(dict.fromkeys(expect(text, str, name).strip() for text in given))
    if not found or not all(found):
        raise InvalidArgument(f"{name}: expected a text at least, and none empty, found {value!r}")
    return found


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
