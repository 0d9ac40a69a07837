"""Editors: one per file, found by name through the registry."""

from __future__ import annotations

import importlib
from typing import Any

from kvedit.registry import Registry

REGISTRY = Registry(
    "editor",
    {
        "chain": "kvedit.editors.chain:Chain",
        "drop": "kvedit.editors.selection:Drop",
        "emphasize": "kvedit.editors.emphasis:Emphasize",
        "keep": "kvedit.editors.selection:Keep",
        "shift": "kvedit.editors.shift:Shift",
        "suppress": "kvedit.editors.emphasis:Suppress",
    },
)
"""All editors by name."""

_CLASSES = {target.split(":")[1]: target.split(":")[0] for target in REGISTRY.targets.values()}
_BASE = ("Editor", "Reader")

__all__ = ["REGISTRY", "build", *_BASE, *sorted(_CLASSES)]


def build(editor: str, **parameters: Any) -> Any:
    """Returns the editor of that name, with its parameters, as configs and lineages name it.

    Raises:
        UnknownName: if no editor has that name.
        InvalidArgument: if a parameter does not exist or is out of range.
    """
    from kvedit.errors import InvalidArgument

    found = REGISTRY.load(editor)
    try:
        return found(**parameters)
    except TypeError as error:
        raise InvalidArgument(f"editor {editor}: {error}") from error


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return getattr(importlib.import_module(_CLASSES[name]), name)
    if name in _BASE:
        return getattr(importlib.import_module("kvedit.editors.base"), name)
    raise AttributeError(f"module 'kvedit.editors' has no attribute {name!r}")
