"""NoTracker: nothing is noted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvedit.tracking.base import RunFacts, Tracker

__all__ = ["NoTracker"]


class NoTracker(Tracker):
    """Drops everything that it is given.

    Args:
        folder: ignored.
        facts: ignored.
    """

    def __init__(self, folder: Path, facts: RunFacts) -> None:
        """Takes what every tracker takes."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Does nothing."""

    def artifact(self, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
