"""Attention matching on the packaged model: next tokens over a tenth of the slots."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import kvedit as kv
from kvedit.editors import AttentionMatching
from kvedit.editors.matching import match
from kvedit.evals import divergence
from kvedit.runtime import ModelReader

DOCUMENT = Path(__file__).parents[3] / "docs" / "store.md"
PROMPTS = (
    "\n\nQuestion: What does a put do first?\nAnswer: It writes one pack and fsyncs it.",
    "\n\nQuestion: How are blocks named?\nAnswer: By the BLAKE3 digest of their content.",
    "\n\nIn one sentence, the store is a folder that holds",
)


@pytest.mark.slow
def test_a_tenth_of_the_slots_stands_for_the_whole(smollm: Any) -> None:
    model, tokenizer = smollm
    ids = tokenizer(DOCUMENT.read_text(encoding="utf-8")).input_ids[:1000]
    memory = kv.capture(model, tokenizer, tokenizer.decode(ids))
    reader = ModelReader(model, tokenizer)
    found, seconds = {}, 0.0
    for name, options in (
        ("both", {}),
        ("keys", {"bias": False, "values": False}),
        ("first", {"keys": "first", "bias": False, "values": False}),
    ):
        started = time.process_time()
        edited, report = match(memory, AttentionMatching(0.1, **options), reader)
        seconds = max(seconds, time.process_time() - started)
        found[name] = divergence(model, tokenizer, memory, edited, PROMPTS, batch_size=1).kl
        assert edited.slots == memory.slots // 10
        if name == "both":
            assert report.output_error < 0.3 and report.mass_error < 0.2
    assert found["both"] < found["keys"] < 0.6 * found["first"]
    assert seconds < 20  # CPU; about 7 on an idle machine
