"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Returns ``$KVEDIT_CACHE``, or ``kvedit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("KVEDIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvedit"
