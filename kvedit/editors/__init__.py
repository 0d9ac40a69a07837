"""Editors: one per file, found by name through the registry."""

from __future__ import annotations

import importlib
from typing import Any

from kvedit.registry import Registry

REGISTRY = Registry(
    "editor",
    {
        "ada_seka": "kvedit.editors.seka.adaptive:AdaSeka",
        "auto_pasta": "kvedit.editors.autopasta:AutoPasta",
        "boost": "kvedit.editors.boost:Boost",
        "chain": "kvedit.editors.chain:Chain",
        "compile": "kvedit.editors.compiling.compile:Compile",
        "directer": "kvedit.editors.directer:Directer",
        "drop": "kvedit.editors.selection:Drop",
        "duplicate": "kvedit.editors.duplicate:Duplicate",
        "emphasize": "kvedit.editors.emphasis:Emphasize",
        "gate": "kvedit.editors.directer:Gate",
        "keep": "kvedit.editors.selection:Keep",
        "seka": "kvedit.editors.seka.edit:Seka",
        "llm_steer": "kvedit.editors.llmsteer:LLMSteer",
        "pasta": "kvedit.editors.pasta:Pasta",
        "scale_keys": "kvedit.editors.scaling:ScaleKeys",
        "scale_values": "kvedit.editors.scaling:ScaleValues",
        "shift": "kvedit.editors.shift:Shift",
        "spot_light": "kvedit.editors.spotlight:SpotLight",
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
