"""Tracking: what a run measured, written to nowhere, to a file, or to Weights & Biases."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.tracking.base import RunFacts, Tracker, library_versions

__all__ = ["TRACKERS", "RunFacts", "Tracker", "library_versions", "open_tracker"]

TRACKERS = {
    "none": "kvedit.tracking.none:NoTracker",
    "jsonl": "kvedit.tracking.jsonl:JsonlTracker",
    "wandb": "kvedit.tracking.wandb:WandbTracker",
}
"""All trackers by name; each is imported when it is opened."""


def open_tracker(tracker: str, folder: Path, facts: RunFacts, **options: Any) -> Tracker:
    """Returns an open tracker; close it, or use it in a ``with`` block.

    Args:
        tracker: its name.
        folder: the run's folder, for what is written locally.
        facts: what is known before the run begins.
        **options: the tracker's own options.

    Raises:
        UnknownName: if no tracker has that name.
        InvalidArgument: if an option does not exist or can't be used.
    """
    if tracker not in TRACKERS:
        raise UnknownName("tracker", tracker, TRACKERS)
    module, _, name = TRACKERS[tracker].partition(":")
    found = getattr(importlib.import_module(module), name)
    try:
        opened: Tracker = found(folder, facts, **options)
    except TypeError as error:
        raise InvalidArgument(f"tracker {tracker}: {error}") from error
    return opened
