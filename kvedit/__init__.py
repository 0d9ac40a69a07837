"""kvedit: capture, edit, store and reuse the KV memory of Hugging Face models.

Names are imported when they are first used, so that ``import kvedit`` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Delta": "kvedit.memory",
    "KVMemory": "kvedit.memory",
    "Signer": "kvedit.store",
    "Span": "kvedit.memory",
    "Store": "kvedit.store",
    "attach": "kvedit.runtime",
    "calibrate": "kvedit.runtime",
    "capture": "kvedit.runtime",
    "compare": "kvedit.memory",
    "compare_replay": "kvedit.editors.replaying",
    "divergence": "kvedit.evals",
    "estimate": "kvedit.runtime",
    "generate": "kvedit.runtime",
    "load": "kvedit.models",
    "rebuild": "kvedit.editors.replaying",
    "replay": "kvedit.editors.replaying",
    "score": "kvedit.runtime",
    "tap": "kvedit.runtime",
}
_MODULES = (
    "cartridges",
    "editors",
    "errors",
    "evals",
    "interop",
    "memory",
    "models",
    "plots",
    "runtime",
    "serving",
    "steering",
    "store",
    "testing",
)

__all__ = ["__version__", "editors", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"kvedit.{name}")
    raise AttributeError(f"module 'kvedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
