"""Where training starts from: functions that return a memory of so many slots.

Measured in the Cartridges paper (Eyuboglu et al. 2025, arXiv 2506.06266, LongHealth): random
vectors 29.9 %, keys and values of unrelated text 51.3 %, of the corpus's first tokens 55.3 %. A
memory of the whole corpus that was compacted or matched is better still, and needs the corpus to
fit the model's context.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {
    "edited": "editing",
    "first_tokens": "texts",
    "random_vectors": "vectors",
    "sampled_chunks": "texts",
    "stand_for": "standing",
    "summary": "summarised",
    "text_tokens": "texts",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module = importlib.import_module(f"kvedit.cartridges.initial.{_LAZY[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'kvedit.cartridges.initial' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
