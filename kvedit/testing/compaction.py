"""Rows of the editor matrix for compaction: selections, and attention matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["COMPACTION_ROWS"]

COMPACTION_ROWS: tuple[Mapping[str, Any], ...] = (
    {"name": "truncate", "editor": "truncate", "parameters": {"budget": 0.3}, "slots": True},
    {
        "name": "truncate-last",
        "editor": "truncate",
        "parameters": {"budget": 0.5, "sinks": 2, "keep": "last", "layers": [0, -1]},
        "slots": True,
    },
    {
        "name": "random-keep",
        "editor": "random_keep",
        "parameters": {"budget": 16, "seed": 3},
        "slots": True,
    },
    {
        "name": "random-keep-all",
        "editor": "random_keep",
        "parameters": {"budget": 1.0, "recent": 5},
        "identity": True,
    },
    {
        "name": "knorm",
        "editor": "knorm",
        "parameters": {"budget": 5, "layers": [0, -1]},
        "slots": True,
    },
    {
        "name": "key-diff",
        "editor": "key_diff",
        "parameters": {"budget": 0.4, "heads": "shared", "recent": 3},
        "slots": True,
    },
    {
        "name": "streaming-llm",
        "editor": "streaming_llm",
        "parameters": {"budget": 12},
        "slots": True,
    },
    {"name": "tova", "editor": "tova", "parameters": {"budget": 0.3}, "slots": True},
    {
        "name": "snap-kv",
        "editor": "snap_kv",
        "parameters": {"budget": 16, "window": 6, "kernel": 3},
        "slots": True,
    },
    {
        "name": "expected-attention",
        "editor": "expected_attention",
        "parameters": {"budget": 0.3},
        "slots": True,
    },
    {
        "name": "kv-zip",
        "editor": "kv_zip",
        "parameters": {"budget": 0.3, "chunk": 20, "overlap": 4},
        "slots": True,
    },
    {
        "name": "attention-matching",
        "editor": "attention_matching",
        "parameters": {"budget": 0.3},
        "slots": True,
        "oracle": False,
    },
    {
        "name": "attention-matching-on-policy",
        "editor": "attention_matching",
        "parameters": {
            "budget": 12,
            "keys": "omp",
            "refine": -5.0,
            "queries": ["Who is in the box?", "How long?"],
            "answer_tokens": 3,
            "on_policy": True,
            "sinks": 1,
            "recent": 2,
            "allocate": "peak",
        },
        "slots": True,
        "oracle": False,
    },
    {
        "name": "attention-matching-folded",
        "editor": "attention_matching",
        "parameters": {
            "budget": 0.4,
            "queries": "calibrated",
            "chunk": 20,
            "fold_bias": True,
            "ridge": 0.01,
        },
        "slots": True,
        "oracle": False,
    },
    {
        "name": "attention-matching-all",
        "editor": "attention_matching",
        "parameters": {"budget": 1.0},
        "identity": True,
    },
)
"""Rows of :data:`~kvedit.testing.editor_cases.EDITOR_CASES`, as arguments of its dataclass."""
