"""Editors: one per file, found by name through the registry."""

from __future__ import annotations

import importlib
from typing import Any

from kvedit.registry import Registry

REGISTRY = Registry(
    "editor",
    {
        "ada_seka": "kvedit.editors.seka.adaptive:AdaSeka",
        "attention_matching": "kvedit.editors.matching.editor:AttentionMatching",
        "auto_pasta": "kvedit.editors.autopasta:AutoPasta",
        "boost": "kvedit.editors.boost:Boost",
        "chain": "kvedit.editors.chain:Chain",
        "compile": "kvedit.editors.compiling.compile:Compile",
        "concat": "kvedit.editors.concat:Concat",
        "directer": "kvedit.editors.directer:Directer",
        "drop": "kvedit.editors.selection:Drop",
        "duplicate": "kvedit.editors.duplicate:Duplicate",
        "emphasize": "kvedit.editors.emphasis:Emphasize",
        "expected_attention": "kvedit.editors.compacting.expectedattention:ExpectedAttention",
        "gate": "kvedit.editors.directer:Gate",
        "kv_zip": "kvedit.editors.compacting.kvzip:KVZip",
        "keep": "kvedit.editors.selection:Keep",
        "key_diff": "kvedit.editors.compacting.keydiff:KeyDiff",
        "knorm": "kvedit.editors.compacting.knorm:Knorm",
        "seka": "kvedit.editors.seka.edit:Seka",
        "llm_steer": "kvedit.editors.llmsteer:LLMSteer",
        "pasta": "kvedit.editors.pasta:Pasta",
        "random_keep": "kvedit.editors.compacting.randomkeep:RandomKeep",
        "scale_keys": "kvedit.editors.scaling:ScaleKeys",
        "scale_values": "kvedit.editors.scaling:ScaleValues",
        "shift": "kvedit.editors.shift:Shift",
        "snap_kv": "kvedit.editors.compacting.snapkv:SnapKV",
        "spot_light": "kvedit.editors.spotlight:SpotLight",
        "steer": "kvedit.editors.steering.edit:Steer",
        "streaming_llm": "kvedit.editors.compacting.streamingllm:StreamingLLM",
        "suppress": "kvedit.editors.emphasis:Suppress",
        "tova": "kvedit.editors.compacting.tova:TOVA",
        "truncate": "kvedit.editors.compacting.truncate:Truncate",
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
