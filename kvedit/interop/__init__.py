"""Interop: memories and deltas as other libraries keep them. docs/interop.md has the contracts."""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "Answers": "kvedit.interop.answering",
    "DeltaReadBack": "kvedit.interop.directions",
    "Exported": "kvedit.interop.exported",
    "FORMATS": "kvedit.interop.formats",
    "ReadBack": "kvedit.interop.checking",
    "check": "kvedit.interop.checking",
    "check_delta": "kvedit.interop.directions",
    "detect": "kvedit.interop.formats",
    "evaluated": "kvedit.interop.lm_eval",
    "from_delta": "kvedit.interop.delta_file",
    "from_gguf": "kvedit.interop.gguf",
    "from_hazy": "kvedit.interop.hazy",
    "from_hub": "kvedit.interop.hub",
    "from_peft": "kvedit.interop.peft",
    "from_repeng": "kvedit.interop.dictionaries",
    "from_safetensors": "kvedit.interop.plain",
    "from_steering_vectors": "kvedit.interop.dictionaries",
    "from_svec": "kvedit.interop.svec",
    "push_folder": "kvedit.interop.hub",
    "push_to_hub": "kvedit.interop.hub",
    "to_delta": "kvedit.interop.delta_file",
    "to_gguf": "kvedit.interop.gguf",
    "to_hazy": "kvedit.interop.hazy",
    "to_hub": "kvedit.interop.hub",
    "to_lm_eval": "kvedit.interop.lm_eval_steered",
    "to_peft": "kvedit.interop.peft",
    "to_safetensors": "kvedit.interop.plain",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    # Telling one format from another must not import what reads them.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvedit.interop' has no attribute {name!r}")
