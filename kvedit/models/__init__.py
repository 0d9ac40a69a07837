"""Models: load them, read their facts, rotate by their RoPE, build tiny ones for tests."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Inspection": "kvedit.models.inspection",
    "inspect": "kvedit.models.inspection",
    "load": "kvedit.models.loading",
    "rotate": "kvedit.models.rope",
    "shift": "kvedit.models.rope",
    "unrotate": "kvedit.models.rope",
    "tiny_model": "kvedit.models.tiny",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    # transformers is imported by what is asked for, not by this package.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvedit.models' has no attribute {name!r}")
