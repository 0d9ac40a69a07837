"""divergence: against a recomputation with the model alone; zero, asymmetric, and never silent."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize, Shift, Suppress
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.evals import divergence, token_divergence
from kvedit.memory import KVMemory
from kvedit.testing import CONTEXT, tiny_model

PROMPTS = [" and the answer is", " you would not", " that", " for all of them, wait in the box"]
FAMILIES = ("llama", "gemma3", "qwen3")


@lru_cache
def captured(family: str) -> tuple[Any, Any, KVMemory]:
    model, tokenizer = tiny_model(family)
    return model, tokenizer, kv.capture(model, tokenizer, CONTEXT)


def recomputed(model: Any, context: str, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Log-probabilities [token, vocabulary] after each token of a prompt, from nothing."""
    before = tokenizer(context).input_ids
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + ids])).logits[0]
    return logits[len(before) :].double().log_softmax(dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_model_alone_gives_for_two_contexts(family: str, batch_size: int) -> None:
    model, tokenizer, a = captured(family)
    other = CONTEXT.replace("60 days", "30 days").replace("answer", "question")
    b = kv.capture(model, tokenizer, other)
    found = divergence(model, tokenizer, a, b, PROMPTS, batch_size=batch_size)
    for probe, prompt in zip(found.probes, PROMPTS, strict=True):
        p, q = (recomputed(model, text, tokenizer, prompt) for text in (CONTEXT, other))
        kl = (p.exp() * (p - q)).sum(dim=-1)
        assert probe.tokens == len(p)
        assert float(kl.mean()) > 1e-3
        assert probe.kl == pytest.approx(float(kl.mean()), rel=1e-3)
        assert probe.worst == pytest.approx(float(kl.max()), rel=1e-3)
        same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean()
        assert probe.agreement == float(same)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_is_at_no_distance_from_itself(family: str, batch_size: int) -> None:
    model, tokenizer, memory = captured(family)
    found = divergence(
        model, tokenizer, memory, memory, PROMPTS, max_new_tokens=3, batch_size=batch_size
    )
    assert [(p.kl, p.worst, p.agreement, p.flipped) for p in found.probes] == [(0, 0, 1, False)] * 4
    assert (found.kl, found.kl_interval, found.agreement, found.flipped) == (0, (0, 0), 1, 0)


def test_an_edit_is_seen_in_both_directions_and_not_equally() -> None:
    model, tokenizer, memory = captured("llama")
    edited = Emphasize("The refund window is 60 days", strength=3.0)(memory)
    there = divergence(model, tokenizer, memory, edited, PROMPTS)
    back = divergence(model, tokenizer, edited, memory, PROMPTS)
    assert there.kl > 1e-4
    assert back.kl > 1e-4
    assert there.kl != pytest.approx(back.kl, rel=1e-6)
    assert there.agreement == back.agreement


def test_more_bias_is_further_away() -> None:
    model, tokenizer, memory = captured("qwen3")
    span = "The refund window is 60 days"
    edits = [Emphasize(span, strength=s)(memory) for s in (0.1, 1.0)]
    near, far = (divergence(model, tokenizer, memory, edit, PROMPTS).kl for edit in edits)
    assert 0 < near < far


def test_a_shifted_memory_behaves_the_same() -> None:
    model, tokenizer, memory = captured("llama")
    found = divergence(model, tokenizer, memory, Shift(40)(memory), PROMPTS)
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1


def test_flips_are_the_answers_that_differ() -> None:
    model, tokenizer, memory = captured("gemma3")
    edited = Suppress({"tokens": [1, -1]}, strength="inf")(memory)
    found = divergence(model, tokenizer, memory, edited, PROMPTS, max_new_tokens=6)
    for probe in found.probes:
        texts = [
            kv.generate(model, tokenizer, side, probe.prompt, max_new_tokens=6)
            for side in (memory, edited)
        ]
        assert list(probe.answers) == texts
    assert found.flipped == sum(probe.answers[0] != probe.answers[1] for probe in found.probes) > 0


def test_the_interval_is_of_the_seed_and_around_the_mean() -> None:
    model, tokenizer, memory = captured("llama")
    edited = Emphasize("That is", strength=2.0)(memory)
    found = divergence(model, tokenizer, memory, edited, PROMPTS, seed=3)
    low, high = found.kl_interval
    values = [probe.kl for probe in found.probes]
    assert min(values) <= low < found.kl < high <= max(values)
    assert dataclasses.replace(found).kl_interval == found.kl_interval
    assert dataclasses.replace(found, seed=4).kl_interval != found.kl_interval
    state = torch.get_rng_state()
    _ = found.agreement_interval
    assert torch.equal(state, torch.get_rng_state())
    one = divergence(model, tokenizer, memory, edited, PROMPTS[:1])
    assert one.kl_interval is None
    assert "95 %" not in repr(one)


def test_it_reads_as_a_table_and_as_json() -> None:
    model, tokenizer, memory = captured("llama")
    edited = Emphasize("That is", strength=2.0)(memory)
    found = divergence(model, tokenizer, memory, edited, PROMPTS, max_new_tokens=2)
    lines = repr(found).splitlines()
    assert len(lines) == len(PROMPTS) + 2
    assert lines[0].split()[0] == "prompt"
    assert f"n={len(PROMPTS)}" in lines[-1]
    assert f"{found.flipped} of 4 answers flipped" in lines[-1]
    data = json.loads(json.dumps(found.to_json()))
    assert (data["n"], data["kl"], data["seed"]) == (4, found.kl, 0)
    assert [probe["prompt"] for probe in data["probes"]] == PROMPTS


def test_a_chat_goes_on_as_a_chat() -> None:
    model, tokenizer = tiny_model("qwen3")
    memory = kv.capture(model, tokenizer, [{"role": "system", "content": CONTEXT}])
    edited = Emphasize({"role": "system"}, strength=1.0)(memory)
    turn = divergence(model, tokenizer, memory, edited, ["How long?"]).probes[0]
    plain = divergence(model, tokenizer, memory, edited, ["How long?"], chat=False).probes[0]
    assert turn.tokens > plain.tokens


def test_what_it_can_not_compare_is_refused() -> None:
    model, tokenizer, memory = captured("llama")
    for prompts in ([], "a text"):
        with pytest.raises(InvalidArgument, match="list of prompts"):
            divergence(model, tokenizer, memory, memory, prompts)
    with pytest.raises(InvalidArgument, match="batch_size"):
        divergence(model, tokenizer, memory, memory, PROMPTS, batch_size=0)
    with pytest.raises(IncompatibleModel):
        divergence(model, tokenizer, memory, captured("qwen3")[2], PROMPTS)
    bare = dataclasses.replace(
        memory,
        source=None,
        layers={
            i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
            for i, layer in memory.layers.items()
        },
    )
    ids = tokenizer(PROMPTS[0], add_special_tokens=False).input_ids
    assert divergence(model, tokenizer, memory, bare, [ids]).kl == 0
    chat = kv.capture(model, tokenizer, [{"role": "system", "content": CONTEXT}])
    with pytest.raises(InvalidArgument, match="other tokens"):
        divergence(model, tokenizer, memory, chat, PROMPTS)


def test_ruled_out_tokens_count_as_they_should() -> None:
    inf = float("inf")
    a, b = torch.tensor([[0.0, 0.0, -inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    kl, same = token_divergence(a, b)
    assert kl.tolist() == pytest.approx([float(torch.tensor(1.5).log())])
    assert same.tolist() == [True]
    assert token_divergence(b, a)[0].tolist() == [inf]
