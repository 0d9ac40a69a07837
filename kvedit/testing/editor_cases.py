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

from kvedit.testing.compaction import COMPACTION_ROWS
from kvedit.testing.seka import SEKA_ROWS
from kvedit.testing.steering import STEER_ROWS

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
        rules: whether the edit acts through run-time rules and leaves the layers as they are.
        oracle: whether a recomputation under a changed mask gives the same logits. An edit
            that moves or rewrites keys or values needs an oracle of its own, and so does a rule.
        learned: whether it works for models with learned absolute positions.
    """

    name: str
    editor: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    slots: bool = False
    identity: bool = False
    rules: bool = False
    oracle: bool = True
    learned: bool = True

    def build(self) -> Any:
        """Returns the editor."""
        from kvedit.editors import build

        return build(self.editor, **self.parameters)

    def apply(self, memory: Any, model: Any, tokenizer: Any) -> Any:
        """Returns ``memory`` after the edit, with operands and reader where it asks for them.

        Operands come from :data:`~kvedit.testing.operands.OPERAND_MAKERS`.
        """
        from kvedit.testing.operands import apply_editor

        return apply_editor(self.build(), memory, model, tokenizer)


_NEAR = {"tokens": [-6, -2]}
_SENTENCE = {"sentence": "That is"}
_SPANS = [_SENTENCE, {"text": "you would"}, _NEAR]
_SEVERAL_HEADS = {"0": [1, 2], "2": [0, 3]}
_PARTS = [
    {"editor": "emphasize", "span": "you would", "strength": 1.5, "kv_heads": [1]},
    {"editor": "drop", "span": _NEAR, "layers": [0, -1]},
    {"editor": "suppress", "span": {"regex": r"wait\s+for"}, "strength": "inf", "heads": [0, -1]},
]

EDITOR_CASES: tuple[EditorCase, ...] = (
    EditorCase(
        "auto-pasta",
        "auto_pasta",
        {"question": "How long?", "closeness": 0.01, "max_new_tokens": 6, "phase": "decode"},
    ),
    EditorCase(
        "auto-pasta-heads",
        "auto_pasta",
        {
            "question": "What is in the box?",
            "alpha": 0.2,
            "heads": _SEVERAL_HEADS,
            "reference": "all_others",
            "sentences": 2,
            "closeness": 0.01,
            "max_new_tokens": 9,
            "phase": "both",
        },
        oracle=False,
    ),
    EditorCase("boost", "boost", {"spans": ["That is"], "multiplier": 7.0, "phase": "decode"}),
    EditorCase(
        "boost-layers",
        "boost",
        {"spans": _SPANS, "multiplier": 3, "layers": [0, -1], "phase": "decode"},
    ),
    EditorCase(
        "boost-baked", "boost", {"spans": _SPANS, "multiplier": 9.0, "phase": "both"}, oracle=False
    ),
    EditorCase(
        "boost-one",
        "boost",
        {"spans": [_NEAR], "multiplier": 1.0, "phase": "decode"},
        identity=True,
    ),
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
    EditorCase(
        "chain-compile",
        "chain",
        {
            "editors": [
                {"editor": "emphasize", "span": "That is", "strength": 2.0},
                {"editor": "compile", "mean_tolerance": 1e3, "spread_tolerance": 1e3},
            ]
        },
        oracle=False,
    ),
    EditorCase("compile-without-bias", "compile", identity=True),
    EditorCase(
        "compile-options-without-bias",
        "compile",
        {"fit": "slot", "horizon": 64, "on_fail": "refuse", "storage": "int8"},
        identity=True,
    ),
    # Of one memory; tests of its own join several.
    EditorCase("concat-one", "concat", identity=True),
    EditorCase("concat-one-overlapping", "concat", {"rotate": False, "order": [0]}, identity=True),
    EditorCase("directer", "directer", {"spans": ["That is"]}, rules=True, oracle=False),
    EditorCase(
        "directer-layers",
        "directer",
        {"spans": _SPANS, "factor": 3.0, "beta": 0.1, "layers": [-1, 0]},
        rules=True,
        oracle=False,
    ),
    EditorCase(
        "directer-ranked",
        "directer",
        {"spans": _SPANS, "factor": 5.0, "prompt": " and who?"},
        rules=True,
        oracle=False,
    ),
    EditorCase("drop", "drop", {"span": _NEAR}, slots=True),
    EditorCase("drop-ragged", "drop", {"span": _SENTENCE, "layers": [1, -1]}, slots=True),
    EditorCase("drop-query-heads", "drop", {"span": _NEAR, "heads": [0, -1]}),
    EditorCase("drop-kv-head", "drop", {"span": _NEAR, "layers": [-1], "kv_heads": [1]}),
    EditorCase("duplicate", "duplicate", {"spans": [_NEAR], "times": 3}, slots=True, oracle=False),
    EditorCase(
        "duplicate-ragged",
        "duplicate",
        {"spans": _SPANS, "times": 2, "layers": [1, -1]},
        slots=True,
        oracle=False,
    ),
    EditorCase("duplicate-once", "duplicate", {"spans": [_NEAR], "times": 1}, identity=True),
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
    EditorCase("gate", "gate", {}, rules=True, oracle=False),
    EditorCase(
        "gate-layers", "gate", {"beta": 0.3, "layers": [-1, 0, 1]}, rules=True, oracle=False
    ),
    EditorCase("keep", "keep", {"span": {"tokens": [-9, -1]}}, slots=True),
    EditorCase("keep-ragged", "keep", {"span": _NEAR, "layers": [-1]}, slots=True),
    EditorCase("keep-kv-head", "keep", {"span": _SENTENCE, "kv_heads": [1]}),
    EditorCase("llm-steer", "llm_steer", {"alpha": 8.0, "fraction": 0.5, "apply": "bias"}),
    EditorCase(
        "llm-steer-baked",
        "llm_steer",
        {
            "alpha": 20,
            "k": 9,
            "heads": {"heads": {"0": [1], "1": [0], "2": [0, 1]}, "kind": "kv"},
            "prefixes": ["Read this.", "What follows matters:", "Once more:"],
            "combine": "or",
            "drop_sink": False,
            "drop_punctuation": False,
            "apply": "both",
        },
        oracle=False,
    ),
    EditorCase("pasta", "pasta", {"spans": ["That is"], "phase": "decode"}),
    EditorCase(
        "pasta-several",
        "pasta",
        {
            "spans": _SPANS,
            "alpha": 0.05,
            "heads": _SEVERAL_HEADS,
            "reference": "all_others",
            "phase": "decode",
        },
    ),
    EditorCase(
        "pasta-baked",
        "pasta",
        {"spans": _SPANS, "heads": {"heads": [[0, [1]], [1, [0]]], "kind": "kv"}, "phase": "both"},
        oracle=False,
    ),
    EditorCase(
        "pasta-one", "pasta", {"spans": _SPANS, "alpha": 1.0, "phase": "decode"}, identity=True
    ),
    EditorCase("scale-keys", "scale_keys", {"spans": [_NEAR], "factor": 2.0}, oracle=False),
    EditorCase(
        "scale-keys-heads",
        "scale_keys",
        {"spans": _SPANS, "factor": -0.5, "kv_heads": {"0": [1], "2": [0]}},
        oracle=False,
    ),
    EditorCase("scale-values", "scale_values", {"spans": [_NEAR], "factor": 3.0}, oracle=False),
    EditorCase(
        "scale-values-heads",
        "scale_values",
        {"spans": _SPANS, "factor": 0.0, "kv_heads": {"1": [0, 1]}},
        oracle=False,
    ),
    EditorCase("scale-values-one", "scale_values", {"spans": [_NEAR], "factor": 1}, identity=True),
    EditorCase("shift-zero", "shift", {"offset": 0}, identity=True),
    EditorCase("shift", "shift", {"offset": 37}, oracle=False, learned=False),
    EditorCase(
        "spot-light", "spot_light", {"spans": ["That is"], "target": 0.4}, rules=True, oracle=False
    ),
    EditorCase(
        "spot-light-heads",
        "spot_light",
        {
            "spans": _SPANS,
            "target": 0.6,
            "form": "spotlight",
            "raise_only": False,
            "heads": {"heads": {"0": [1], "2": [0]}, "kind": "kv"},
        },
        rules=True,
        oracle=False,
    ),
    EditorCase("suppress", "suppress", {"span": _NEAR, "strength": 1.0}),
    EditorCase(
        "suppress-evict", "suppress", {"span": _SENTENCE, "strength": "inf", "kv_heads": [0]}
    ),
    EditorCase(
        "suppress-zero", "suppress", {"span": _NEAR, "alpha": 1.0, "layers": [1]}, identity=True
    ),
    *(EditorCase(**row) for row in SEKA_ROWS),
    *(EditorCase(**row) for row in STEER_ROWS),
    *(EditorCase(**row) for row in COMPACTION_ROWS),
)
"""The rows."""
