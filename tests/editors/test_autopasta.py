"""AutoPasta: what the model names is found in the context, or one error says what it named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import AutoPasta, Pasta
from kvedit.editors.autopasta import key_sentences
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.runtime import ModelReader

TEXT = (
    "Our shop opened in 1998. The refund window is 60 days. Shipping is free for members.\n"
    "We don't repair radios."
)
REFUND = "The refund window is 60 days."


@pytest.fixture
def shop(subject: Any) -> Any:
    found = subject("llama")
    return kv.capture(found.model, found.tokenizer, TEXT)


class Named(ModelReader):
    """A reader whose model says what the test wants."""

    def __init__(self, found: Any, reply: str) -> None:
        super().__init__(found.model, found.tokenizer)
        object.__setattr__(self, "reply", reply)
        object.__setattr__(self, "asked", [])

    def ask(self, memory: Any, prompt: str, max_new_tokens: int) -> str:
        self.asked.append((memory, prompt, max_new_tokens))
        return self.reply


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (REFUND, [REFUND]),
        ("  the refund window is 60 days", [REFUND]),
        ('"The Refund  Window is 60 days."\n\nAnswer: 60.', [REFUND]),
        ("The refund window is 90 days.", [REFUND]),
        ("We do not repair radios! Shipping is free for members.", ["We don't repair radios."]),
    ],
)
def test_a_quote_is_matched_to_the_closest_sentence(
    reply: str, expected: list[str], shop: Any
) -> None:
    span = key_sentences(shop, reply)
    assert span.text == " … ".join(expected)
    assert span == shop.find(expected[0])


def test_several_sentences_of_a_reply(shop: Any) -> None:
    reply = "Shipping is free for all members. We don't repair radios. Our shop opened in 1998."
    span = key_sentences(shop, reply, sentences=2)
    wanted = shop.find("Shipping is free for members.") | shop.find("We don't repair radios.")
    assert span.ranges == wanted.ranges
    mixed = key_sentences(shop, "Certainly! " + REFUND, sentences=2)
    assert mixed.ranges == shop.find(REFUND).ranges


@pytest.mark.parametrize("reply", ["", "  \n", "Zzz qqq xxxx.", "?!"])
def test_what_matches_nothing_is_an_error(reply: str, shop: Any) -> None:
    with pytest.raises(SpanNotFound, match=r"no sentence of the memory: .* is 0\.6 alike"):
        key_sentences(shop, reply)


def test_verbatim_only(shop: Any) -> None:
    assert key_sentences(shop, REFUND, closeness=1.0).text == REFUND
    with pytest.raises(SpanNotFound, match=r"expected one that is 1 alike; the closest .* 0\.9"):
        key_sentences(shop, "The refund window is 90 days.", closeness=1.0)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_it_is_pasta_on_the_named_sentence(phase: Any, shop: Any, subject: Any) -> None:
    reader = Named(subject("llama"), REFUND)
    heads = {0: [1, 2], 2: [0]}
    editor = AutoPasta("How long?", 0.05, heads, "all_others", phase=phase)
    edited = editor(shop, reader=reader)
    pasta = Pasta(REFUND, 0.05, heads, "all_others", phase=phase)(shop, reader=reader)
    assert edited.digest == pasta.digest != shop.digest
    ((memory, prompt, count),) = reader.asked
    assert memory is shop
    assert prompt.startswith("\n\nQuestion: How long?\nQuote the sentence")
    assert count == 64


def test_braces_in_a_question_are_text(shop: Any, subject: Any) -> None:
    reader = Named(subject("llama"), REFUND)
    AutoPasta("What is {x}?", prompt="Q {question} {y}:", phase="decode")(shop, reader=reader)
    assert reader.asked[0][1] == "Q What is {x}? {y}:"


def test_the_model_itself_is_asked(shop: Any, subject: Any) -> None:
    found = subject("llama")
    editor = AutoPasta("How long?", closeness=0.01, max_new_tokens=7, phase="decode")
    edited = found.apply(editor, shop)
    reply = kv.generate(
        found.model, found.tokenizer, shop, editor.prompt.replace("{question}", "How long?"),
        max_new_tokens=7, do_sample=False,
    )  # fmt: skip
    span = key_sentences(shop, reply, closeness=0.01)
    assert edited.digest == Pasta(span, phase="decode")(shop).digest
    strict = AutoPasta("How long?", closeness=1.0, max_new_tokens=7, phase="decode")
    with pytest.raises(SpanNotFound, match="no sentence of the memory"):
        found.apply(strict, shop)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"question": " "}, "question: expected a text, found ' '"),
        ({"question": None}, "question: expected a text, found None"),
        ({"prompt": "Which?"}, "prompt: expected a text with {question}, found 'Which"),
        ({"sentences": 0}, "sentences: expected a whole number from 1, found 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: expected a whole number from 1, found 1.5"),
        ({"closeness": 0}, r"closeness must lie in \(0, 1\], found 0"),
        ({"closeness": 2}, r"closeness must lie in \(0, 1\], found 2"),
        ({"alpha": 0}, r"alpha must lie in \(0, 1\], found 0"),
        ({"phase": "later"}, "'prefill', 'decode' or 'both', found 'later'"),
        ({"reference": "rest"}, "found 'rest'"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"question": "How long?", "phase": "decode", **parameters}
    with pytest.raises(InvalidArgument, match=message):
        AutoPasta(**given)


def test_it_needs_a_model_and_a_tokenizer(shop: Any, subject: Any) -> None:
    editor = AutoPasta("How long?", phase="decode")
    with pytest.raises(InvalidArgument, match="reads with the model"):
        editor(shop)
    with pytest.raises(InvalidArgument, match=r"make ModelReader\(model, tokenizer\)"):
        editor(shop, reader=ModelReader(subject("llama").model))
    assert torch.is_grad_enabled()
