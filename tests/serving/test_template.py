"""The template puts placeholders in front, cuts off what the memory holds, and is else the same."""

import pytest

from kvedit.errors import InvalidArgument
from kvedit.models.tiny import tiny_model
from kvedit.serving import chat_template
from kvedit.serving.template import placeholder

USER = {"role": "user", "content": "What is in the box?"}
PAST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi { % x }"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model("llama")[1]


def rendered(tokenizer, messages, template=None, **arguments):
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
    )


def test_without_a_memory_nothing_changes(tokenizer):
    ours = rendered(tokenizer, [*PAST, USER], chat_template(tokenizer))
    assert ours == rendered(tokenizer, [*PAST, USER])


def test_slots_stand_in_front(tokenizer):
    text, found = placeholder(tokenizer)
    ours = rendered(tokenizer, [USER], chat_template(tokenizer), memory_slots=7)
    assert ours == text * 7 + rendered(tokenizer, [USER])
    ids = tokenizer.encode(ours, add_special_tokens=False)
    assert ids[:7] == [found] * 7 and ids[7] != found


def test_a_conversation_goes_on(tokenizer):
    held = tokenizer.apply_chat_template(PAST, tokenize=False)
    ours = rendered(
        tokenizer, [USER], chat_template(tokenizer), memory_slots=2, memory_messages=PAST,
        memory_characters=len(held),
    )  # fmt: skip
    whole = rendered(tokenizer, [*PAST, USER])
    assert ours == placeholder(tokenizer)[0] * 2 + whole[len(held) :]


def test_another_placeholder_where_the_prompt_begins_with_it(tokenizer):
    _, first = placeholder(tokenizer)
    _, second = placeholder(tokenizer, first)
    assert second != first


@pytest.mark.parametrize(("found", "says"), [(None, "no chat"), ({"a": "b"}, "several chat")])
def test_tokenizers_without_one_template(found, says):
    tokenizer = tiny_model("llama")[1]
    tokenizer.chat_template = found
    with pytest.raises(InvalidArgument, match=says):
        chat_template(tokenizer)
