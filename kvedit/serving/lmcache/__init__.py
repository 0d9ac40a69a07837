"""LMCache: a memory's whole chunks in the cache that engines share, under the memory's digest."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "LMCacheExport": "exporting",
    "to_lmcache": "exporting",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.serving.lmcache.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvedit.serving.lmcache' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
