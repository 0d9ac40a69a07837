"""Exported: what an export wrote, and what there is to say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Exported"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        path: the file or folder.
        format: name of the format.
        slots: slots per layer.
        moved: positions by which keys were turned; 0 where they are as the memory has them.
        notes: what the reader on the other side should know, one sentence each.
    """

    path: Path
    format: str
    slots: int
    moved: int = 0
    notes: tuple[str, ...] = ()
