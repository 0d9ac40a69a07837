"""An OpenAI-compatible endpoint over memories of a store, on Starlette, pydantic and uvicorn.

``create_app`` makes the ASGI application, ``run`` serves it on a socket.
"""

from __future__ import annotations

import importlib
from typing import Any

from kvedit.errors import MissingDependency

_LAZY = {"Limits": "limits", "create_app": "app", "run": "running"}
_LIBRARIES = ("pydantic", "starlette", "uvicorn")

__all__ = [*sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvedit.serving.openai' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"kvedit.serving.openai.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        library = str(error.name).split(".", maxsplit=1)[0]
        if library not in _LIBRARIES:
            raise
        raise MissingDependency(library, "serve", "the OpenAI-compatible endpoint") from error


def __dir__() -> list[str]:
    return sorted(__all__)
