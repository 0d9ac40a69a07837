"""The user's cache folder, and how files get into it whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_atomically"]


def cache_folder() -> Path:
    """Returns ``$KVEDIT_CACHE``, or ``kvedit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("KVEDIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvedit"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
