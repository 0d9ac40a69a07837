"""A stock vLLM that answers from memories of a store, through a connector outside of its tree.

Nothing here imports vLLM but ``connector``, which vLLM itself imports.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {"vllm_command": "command", "vllm_problems": "command"}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"kvedit.serving.vllm.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kvedit.serving.vllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
