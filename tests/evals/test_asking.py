"""Readings of prompts, against the model alone: one pass over the whole text for each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import InvalidArgument
from kvedit.evals.asking import Question, read_questions
from kvedit.memory import KVMemory
from kvedit.testing import CONTEXT, tiny_model

QUESTIONS = [
    Question(" and the answer is", (" that you would wait", " the")),
    Question(" you would not", (" wait for it", " be there")),
    Question(" that"),
    Question(" it is", (" the",)),
]
FAMILIES = ("llama", "gemma3", "gpt_neox", "gpt_oss")
SPAN = "The refund window is 60 days"


@lru_cache
def captured(family: str) -> tuple[Any, Any, KVMemory]:
    model, tokenizer = tiny_model(family)
    return model, tokenizer, kv.capture(model, tokenizer, CONTEXT)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_one_pass_over_everything(family: str, batch_size: int) -> None:
    model, tokenizer, memory = captured(family)
    found = read_questions(model, tokenizer, memory, QUESTIONS, batch_size=batch_size)
    before = memory.tokens.tolist()
    for index, question in enumerate(QUESTIONS):
        prompt = before + ids(tokenizer, question.prompt)
        expected = logprobs(model, prompt)[-1]
        assert torch.allclose(found.logprobs[index].double(), expected, atol=1e-4)
        assert len(found.answers[index]) == len(question.answers)
        for answer, text in zip(found.answers[index], question.answers, strict=True):
            tokens = ids(tokenizer, text)
            every = logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
            each = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert answer.token == tokens[0]
            assert answer.first == pytest.approx(float(each[0]), abs=1e-4)
            assert answer.whole == pytest.approx(float(each.sum()), abs=2e-4)
    assert found.mass is None


def test_answers_of_several_tokens_are_among_them() -> None:
    _, tokenizer, _ = captured("llama")
    lengths = {len(ids(tokenizer, text)) for q in QUESTIONS for text in q.answers}
    assert 1 in lengths and max(lengths) > 2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_biased_memory_is_read_as_kv_score_reads_it(family: str) -> None:
    model, tokenizer, memory = captured(family)
    edited = Emphasize(SPAN, strength=3.0)(memory)
    found = read_questions(model, tokenizer, edited, QUESTIONS[:2])
    for question, answers in zip(QUESTIONS, found.answers, strict=False):
        scores = kv.score(model, tokenizer, edited, question.prompt, list(question.answers))
        for answer, score in zip(answers, scores, strict=True):
            assert answer.whole == pytest.approx(score.logprob, abs=1e-4)
    plain = read_questions(model, tokenizer, memory, QUESTIONS[:2])
    assert not torch.allclose(plain.logprobs, found.logprobs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_mass_is_the_models_own_attention(family: str) -> None:
    model, tokenizer = tiny_model(family, attn="eager")
    memory = kv.capture(model, tokenizer, CONTEXT)
    span = memory.find(SPAN)
    found = read_questions(model, tokenizer, memory, QUESTIONS[:2], span=span)
    start, stop = span.ranges[0]
    for index, question in enumerate(QUESTIONS[:2]):
        tokens = memory.tokens.tolist() + ids(tokenizer, question.prompt)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([tokens]), output_attentions=True)
        for layer, weights in enumerate(output.attentions):
            expected = weights[0, :, -1, start:stop].sum(dim=-1)
            heads = found.mass[index, layer, : len(expected)]
            assert torch.allclose(heads, expected, atol=1e-5)


def test_mass_under_a_bias_has_the_closed_form_in_the_first_layer() -> None:
    # The first layer's queries don't depend on the bias; the later ones' do.
    model, tokenizer, memory = captured("llama")
    span = memory.find(SPAN)
    edited = Emphasize(span, strength=1.7)(memory)
    before, after = (
        read_questions(model, tokenizer, m, QUESTIONS, span=span).mass[:, 0]
        for m in (memory, edited)
    )
    raised = before * torch.tensor(1.7).exp()
    assert torch.allclose(after, raised / (raised + 1 - before), atol=1e-5)


def test_nothing_to_ask_is_an_error() -> None:
    model, tokenizer, memory = captured("llama")
    with pytest.raises(InvalidArgument, match="questions"):
        read_questions(model, tokenizer, memory, [])
    with pytest.raises(InvalidArgument, match="empty"):
        read_questions(model, tokenizer, memory, [Question("")])
