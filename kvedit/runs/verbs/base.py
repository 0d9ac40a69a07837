"""What a verb is, and what it hands back: data for machines, text for people."""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "Verb", "plain", "table", "to_json"]


@dataclass(frozen=True)
class Outcome:
    """What a verb found or did.

    Args:
        data: for ``--json``: dataclasses, mappings, sequences and scalars.
        text: for people; empty where everything was printed already.
        code: exit status.
    """

    data: Any
    text: str
    code: int = 0


@dataclass(frozen=True)
class Verb:
    """One verb of the command line.

    Args:
        name: what the user types.
        summary: one line for the list of verbs.
        add: adds the verb's arguments to its parser.
        run: does it. It imports what it needs, so that other verbs start without that.
        example: a command line to copy, shown under the verb's help.
    """

    name: str
    summary: str
    add: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Outcome]
    example: str


def to_json(data: Any) -> str:
    """Returns ``data`` as one JSON document; numbers that JSON lacks are spelled as text."""
    return json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)


def plain(data: Any) -> Any:
    """Returns ``data`` made of what JSON has: inf and NaN become ``"inf"`` and ``"nan"``."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {f.name: plain(getattr(data, f.name)) for f in dataclasses.fields(data)}
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [plain(item) for item in data]
    if isinstance(data, datetime):
        return data.isoformat()
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns rows under a header, columns aligned; columns without any value are left out."""
    cells = [[str(cell) for cell in row] for row in rows]
    kept = [i for i in range(len(header)) if any(row[i] for row in cells)]
    lines = [[line[i] for i in kept] for line in [list(header), *cells]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
