"""Interop: memories as other libraries keep them, both ways. docs/interop.md has the contracts."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Exported": "kvedit.interop.exported",
    "FORMATS": "kvedit.interop.formats",
    "ReadBack": "kvedit.interop.checking",
    "check": "kvedit.interop.checking",
    "detect": "kvedit.interop.formats",
    "from_hazy": "kvedit.interop.hazy",
    "from_hub": "kvedit.interop.hub",
    "from_peft": "kvedit.interop.peft",
    "from_safetensors": "kvedit.interop.plain",
    "push_folder": "kvedit.interop.hub",
    "push_to_hub": "kvedit.interop.hub",
    "to_hazy": "kvedit.interop.hazy",
    "to_hub": "kvedit.interop.hub",
    "to_peft": "kvedit.interop.peft",
    "to_safetensors": "kvedit.interop.plain",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    # Telling one format from another must not import what reads them.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvedit.interop' has no attribute {name!r}")
