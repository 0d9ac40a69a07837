"""Compaction of the packaged model's memories: what is kept is worth more than chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import (
    TOVA,
    ExpectedAttention,
    KVZip,
    RandomKeep,
    SnapKV,
    StreamingLLM,
)
from kvedit.runtime import ModelReader

pytestmark = pytest.mark.slow

NAMES = ("Ada", "Boris", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Irina", "Jonas")
ROOMS = ("kitchen", "attic", "garden", "cellar", "library", "studio", "garage", "stable", "tower")
DOCUMENT = "\n".join(
    f"{name} works in the {ROOMS[i % 9]} and starts at {6 + i} o'clock. The badge of {name} has "
    f"the number {37 * i + 114}, and its colour is {('red', 'blue', 'green', 'white')[i % 4]}."
    for i, name in enumerate(NAMES)
)
QUESTION = "\n\nQuestion: Where does Chloe work?\nAnswer:"
ANSWER = " Chloe works in the garden."


@pytest.fixture(scope="module")
def document(smollm: Any) -> Any:
    return kv.capture(*smollm, DOCUMENT)


def answer_logits(smollm: Any, memory: Any) -> torch.Tensor:
    model, tokenizer = smollm
    asked, said = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for text in (QUESTION, ANSWER)
    )
    with kv.attach(model, memory) as session:
        session.forward(asked[None])
        return session.forward(said[None])[0].double().log_softmax(-1)


def test_selections_are_better_than_chance(smollm: Any, document: Any) -> None:
    """KL to the whole memory on an answer, at half of the slots; KVZip at a quarter as well."""
    reader, full = ModelReader(*smollm), answer_logits(smollm, document)
    assert document.tokens_count > 300

    def divergence(editor: Any) -> float:
        lossy = answer_logits(smollm, editor(document, reader=reader))
        return float((full.exp() * (full - lossy)).sum(-1).mean())

    def chance(budget: float) -> float:
        return min(divergence(RandomKeep(budget, seed=seed, sinks=4)) for seed in range(3))

    half = chance(0.5)
    for editor in (
        SnapKV(0.5, prompt=QUESTION), TOVA(0.5, prompt=QUESTION),
        ExpectedAttention(0.5, prompt=QUESTION), KVZip(0.5),
    ):  # fmt: skip
        assert divergence(editor) < half, editor
    assert divergence(KVZip(0.25)) < chance(0.25) / 2


def test_layouts_agree_turn_by_turn(smollm: Any) -> None:
    model, tokenizer = smollm
    chat = [{"role": "user", "content": DOCUMENT + "\n\nRemember this."}]
    memory = kv.capture(model, tokenizer, chat)
    reader, logits, said = ModelReader(model, tokenizer), [], []
    for layout in ("masked", "packed"):
        edited = KVZip(0.4, pool="head", layout=layout)(memory, reader=reader)
        with kv.attach(model, edited, tokenizer) as session:
            replies = [
                session.generate(text, max_new_tokens=12, do_sample=False)
                for text in ("Where does Hugo work?", "And Irina?")
            ]
            said.append([reply.tokens for reply in replies])
            logits.append(session.forward(torch.tensor([[28, 30]]))[0])
    assert said[0] == said[1]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_streaming_counts_positions_within_the_cache(smollm: Any, document: Any) -> None:
    edited = StreamingLLM(64, rerotate=True)(document)
    assert edited.next_position == 64
    logits = answer_logits(smollm, edited)
    assert logits.isfinite().all()
    grown = answer_logits(smollm, StreamingLLM(64)(document))
    assert (logits - grown).abs().max() > 1e-2  # the paper's positions are others
