"""Serving: hand a memory to an engine, and ask that engine about it."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Request": "requesting",
    "Served": "slots",
    "chat_template": "template",
    "multiplied": "multiplicity",
    "request": "requesting",
    "served": "slots",
    "to_lmcache": "lmcache",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.serving.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvedit.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
