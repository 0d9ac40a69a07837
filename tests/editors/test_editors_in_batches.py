"""Rows of a batch with padding: every method, over two memories, acts as if each were alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import (
    AutoPasta,
    Boost,
    Directer,
    Duplicate,
    LLMSteer,
    Pasta,
    ScaleKeys,
    ScaleValues,
    SpotLight,
)
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT

SPANS = ({"text": "60 days"}, {"tokens": (-4, -2)}, {"sentence": "refund"})
HEADS = {0: (1, 2), 1: (0,)}
EDITORS = [
    Pasta(SPANS, 0.05, HEADS, phase="both"),
    AutoPasta("How long?", closeness=0.01, max_new_tokens=5, phase="decode"),
    Boost(SPANS, 8.0, phase="both"),
    LLMSteer(9.0, fraction=0.5, heads=HEADS, apply="both"),
    SpotLight(SPANS, 0.95, heads=HEADS),
    SpotLight(SPANS, 0.9, "spotlight"),
    Directer(SPANS, 4.0, 0.3),
    Duplicate(SPANS, 3),
    ScaleKeys(SPANS, 2.0, {0: [1]}),
    ScaleValues(SPANS, 2.0),
]
TEXTS = ("The refund window is 60 days. That is all.", "In short, refunds: within 60 days.")


def name(editor: Any) -> str:
    return type(editor).__name__ if not isinstance(editor, str) else editor


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("editor", EDITORS, ids=name)
def test_rows_are_as_if_alone(editor: Any, family: str, subject: Any) -> None:
    found = subject(family)
    captured = [kv.capture(found.model, found.tokenizer, text) for text in TEXTS]
    assert len({memory.slots for memory in captured}) == 2
    memories = [found.apply(editor, memory) for memory in captured]
    ids = found.continuation[:5]
    rows = torch.stack((ids, torch.cat((torch.zeros(2, dtype=torch.int64), ids[:3]))))
    valid = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    with kv.attach(found.model, memories) as session:
        first = session.forward(rows, valid)
        second = session.forward(ids[None, :1].expand(2, 1))
    for row, count in ((0, 5), (1, 3)):
        with kv.attach(found.model, memories[row]) as session:
            alone = session.forward(ids[None, :count])[0]
            then = session.forward(ids[None, :1])[0]
        assert (first[row, -count:] - alone).abs().max() <= FP64_ORACLE
        assert (second[row] - then).abs().max() <= FP64_ORACLE
        with kv.attach(found.model, captured[row]) as session:
            plain = session.forward(ids[None, :count])[0]
        if not isinstance(editor, Directer):  # whose gate may refuse
            assert (plain - alone).abs().max() > VISIBLE_EFFECT


@pytest.mark.parametrize("editor", EDITORS, ids=name)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_eager_and_sdpa_agree(editor: Any, family: str, subject: Any, continued: Any) -> None:
    found = subject(family, torch.float32)
    logits = []
    for attn in ("sdpa", "eager"):
        found.model.set_attn_implementation(attn)
        try:
            edited = found.apply(editor)
            logits.append(continued(found.model, edited, found.continuation))
        finally:
            found.model.set_attn_implementation("sdpa")
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


@pytest.mark.parametrize("editor", EDITORS, ids=name)
def test_parameters_are_json_and_build_the_editor(editor: Any) -> None:
    from kvedit.editors import build
    from kvedit.editors.base import registered_name

    plain = json.loads(json.dumps(editor.parameters()))
    again = build(registered_name(type(editor)), **plain)
    assert again == editor
    assert hash(again) == hash(editor)
