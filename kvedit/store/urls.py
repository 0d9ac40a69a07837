"""URLs of remote stores, and the folders through which they are worked on."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvedit.memory.digest import digest_bytes

__all__ = ["cache_folder", "is_url"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is the place of a remote store."""
    return _URL.match(os.fspath(path)) is not None


def cache_folder(url: str) -> Path:
    """Returns the folder that keeps what was read from a remote store.

    It lies in ``KVEDIT_CACHE``, or in the user's cache. Deleting it loses nothing that was put.
    """
    root = os.environ.get("KVEDIT_CACHE") or Path.home() / ".cache" / "kvedit"
    return Path(root) / "stores" / digest_bytes(url.rstrip("/").encode())[:32]
