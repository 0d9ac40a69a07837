"""The text of a stream: pieces that nothing later takes back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.models.tiny_tokenizer import tiny_tokenizer
from kvedit.serving.openai.spelling import Speller, cut

TOKENIZER = tiny_tokenizer()
TOKENS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30)


def said(tokens, stop):
    speller = Speller(TOKENIZER, stop)
    pieces = [speller.feed(token) for token in tokens]
    whole = cut(TOKENIZER.decode(tokens, skip_special_tokens=True), stop)
    return pieces, speller.finish(whole), whole


@settings(max_examples=150, deadline=None)
@given(TOKENS, st.lists(st.text("the ands", min_size=1, max_size=4), max_size=3))
def test_pieces_make_up_the_text(tokens, stop):
    pieces, rest, whole = said(tokens, stop)
    assert "".join(pieces) + rest == whole


@pytest.mark.parametrize("text", ["grün 😀 – fertig", "a😀", "the end", "then they"])
def test_characters_and_stop_strings_are_held_back(text):
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    pieces, rest, whole = said(tokens, ["they never", "end"])
    assert "".join(pieces) + rest == whole == text.split("end")[0]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "th" not in pieces[-1]


def test_text_comes_as_soon_as_it_is_certain():
    tokens = TOKENIZER("one two three", add_special_tokens=False)["input_ids"]
    pieces, rest, _ = said(tokens, [])
    assert all(pieces)
    assert rest == ""
