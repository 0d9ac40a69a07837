"""The editor matrix: one row per configuration of a registered editor, as data.

Every test that must hold for all editors runs over these rows: purity, identity, lineage, the
oracle, the store's round trip. A new editor enters all of them by adding rows here, an easy one and
a hard one. Rows fit a capture of :data:`CONTEXT` by any tiny model: at least three layers, four
query heads, two KV heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONTEXT", "CONTINUATION", "EDITOR_CASES", "EDITOR_FAMILIES", "EditorCase"]

CONTEXT = (
    "The thing in the box is the answer. The refund window is 60 days, and you would not wait for "
    "it. That is all."
)
"""The text whose capture the rows edit. Spans below stand near its end, in reach of windows."""

CONTINUATION = " and the answer is that you would wait"
"""What is fed after the edited memory."""


EDITOR_FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox", "cohere2", "gpt_oss", "gpt2")
"""Tiny models that the rows are tried on, one per mechanism: plain GQA, sliding and full layers
with a RoPE base each, QK norm, partial rotary, layers without RoPE, sinks and experts, learned
positions."""


@dataclass(frozen=True)
class EditorCase:
    """One configuration of one editor.

    Args:
        name: of the row; test ids use it.
        editor: registry name.
        parameters: plain data, as a config file would hold it.
        slots: whether some layer ends up with other slots than before.
        identity: whether the edit changes nothing.
        oracle: whether a recomputation under a changed mask gives the same logits. An edit
            that moves or rewrites keys or values needs an oracle of its own.
        learned: whether it works for models with learned absolute positions.
    """

    name: str
    editor: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    slots: bool = False
    identity: bool = False
    oracle: bool = True
    learned: bool = True

    def build(self) -> Any:
        """Returns the editor."""
        from kvedit.editors import build

        return build(self.editor, **self.parameters)


_NEAR = {"tokens": [-6, -2]}
_SENTENCE = {"sentence": "That is"}
_PARTS = [
    {"editor": "emphasize", "span": "you would", "strength": 1.5, "kv_heads": [1]},
    {"editor": "drop", "span": _NEAR, "layers": [0, -1]},
    {"editor": "suppress", "span": {"regex": r"wait\s+for"}, "strength": "inf", "heads": [0, -1]},
]

EDITOR_CASES: tuple[EditorCase, ...] = (
    EditorCase("chain-empty", "chain", identity=True),
    EditorCase("chain-of-three", "chain", {"editors": _PARTS}, slots=True),
    EditorCase(
        "chain-nested-shift",
        "chain",
        {"editors": [{"editor": "chain", "editors": _PARTS}, {"editor": "shift", "offset": 5}]},
        slots=True,
        oracle=False,
        learned=False,
    ),
    EditorCase("drop", "drop", {"span": _NEAR}, slots=True),
    EditorCase("drop-ragged", "drop", {"span": _SENTENCE, "layers": [1, -1]}, slots=True),
    EditorCase("drop-query-heads", "drop", {"span": _NEAR, "heads": [0, -1]}),
    EditorCase("drop-kv-head", "drop", {"span": _NEAR, "layers": [-1], "kv_heads": [1]}),
    EditorCase("emphasize", "emphasize", {"span": "That is", "strength": 2.3}),
    EditorCase(
        "emphasize-pasta",
        "emphasize",
        {"span": _NEAR, "alpha": 0.01, "layers": [0, -1], "heads": [1, 2]},
    ),
    EditorCase(
        "emphasize-rest",
        "emphasize",
        {"span": _SENTENCE, "strength": 3.0, "kv_heads": [0], "reference": "rest_of_memory"},
    ),
    EditorCase("emphasize-zero", "emphasize", {"span": _NEAR, "strength": 0.0}, identity=True),
    EditorCase("keep", "keep", {"span": {"tokens": [-9, -1]}}, slots=True),
    EditorCase("keep-ragged", "keep", {"span": _NEAR, "layers": [-1]}, slots=True),
    EditorCase("keep-kv-head", "keep", {"span": _SENTENCE, "kv_heads": [1]}),
    EditorCase("shift-zero", "shift", {"offset": 0}, identity=True),
    EditorCase("shift", "shift", {"offset": 37}, oracle=False, learned=False),
    EditorCase("suppress", "suppress", {"span": _NEAR, "strength": 1.0}),
    EditorCase(
        "suppress-evict", "suppress", {"span": _SENTENCE, "strength": "inf", "kv_heads": [0]}
    ),
    EditorCase(
        "suppress-zero", "suppress", {"span": _NEAR, "alpha": 1.0, "layers": [1]}, identity=True
    ),
)
"""The rows."""
