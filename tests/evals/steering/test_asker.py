"""Prompts in memory and prompts that are read now: the same tokens, answers and distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.evals.steering import Asker
from kvedit.evals.steering.entering import Entry
from kvedit.runtime.places import block_of
from kvedit.steering import steered

from .conftest import PROMPTS


def unedited(memory):
    return memory


def whole(model, *parts):
    ids = torch.tensor([[token for part in parts for token in part]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("chat", [True, False])
def test_both_holds_read_the_same_tokens(tiny, once, always, chat) -> None:
    model, tokenizer = tiny
    held = replace(once, chat=chat).places(PROMPTS[:3])
    now = replace(always, chat=chat).places(PROMPTS[:3])
    for a, b in zip(held, now, strict=True):
        assert (*a.memory.tokens.tolist(), *a.ids) == b.ids == tuple(b.source.tokens.tolist())
        assert a.ids == tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
    if not chat:
        assert list(now[0].ids[:-1]) == tokenizer(PROMPTS[0])["input_ids"]
    answers = [r.tokens for r in always.reply(now, unedited)]
    assert answers == [r.tokens for r in once.reply(held, unedited)]
    for a, b, place, ids in zip(
        once.along(held, answers, unedited), always.along(now, answers, unedited), now, answers,
        strict=True,
    ):  # fmt: skip
        expected = whole(model, place.ids, ids[:-1])[-len(ids) :]
        torch.testing.assert_close(b, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(a, expected, atol=2e-5, rtol=0)
        assert expected.argmax(-1).tolist() == list(ids)


def test_answers_of_different_lengths_stand_side_by_side(tiny, always) -> None:
    places = always.places(PROMPTS[:3])
    answers = [(7,), (8, 9, 10, 11), (12, 13)]
    for place, ids, found in zip(
        places, answers, always.along(places, answers, unedited), strict=True
    ):
        expected = whole(tiny[0], place.ids, ids[:-1])[-len(ids) :]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scope", ["all", "prompt", "generation"])
def test_an_answer_counts_as_said_while_it_is_read(tiny, always, delta, scope) -> None:
    model, _ = tiny
    residual = delta.only(sites="residual")
    (place,), ids = always.places(PROMPTS[:1]), (21, 22, 23, 24)
    with Entry(lambda: steered(model, residual, 2.0, scope=scope)).on() as change:
        (found,) = always.along([place], [ids], change)
    prompt = torch.arange(len(place.ids) + len(ids) - 1) < len(place.ids)
    where = {"all": torch.ones_like(prompt), "prompt": prompt, "generation": ~prompt}[scope]

    def add(module, args, output):
        added = 2.0 * where[:, None] * residual.vectors["residual"][1]
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    hook = block_of(model, always.inspection.attention[1]).register_forward_hook(add)
    expected = whole(model, place.ids, ids[:-1])[-len(ids) :]
    hook.remove()
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_a_context_stands_before_prompts(tiny) -> None:
    model, tokenizer = tiny
    memory = kv.capture(model, tokenizer, "There was a box of things on the table.")
    asker = Asker(model, tokenizer, memory, max_new_tokens=4)
    places = asker.places([" The thing was"])
    assert places[0].memory is memory
    ids = asker.reply(places, unedited)[0].tokens
    assert kv.generate(model, None, memory, list(places[0].ids), max_new_tokens=4) == list(ids)
    with Entry(lambda: kv.editors.Emphasize("the table", strength=3.0)).on() as change:
        (found,) = asker.along(places, [ids], change)
    loud = kv.editors.Emphasize("the table", strength=3.0)(memory)
    told = kv.score(model, None, loud, list(places[0].ids), [list(ids)])[0]
    each = found.gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(each, told.logprobs, atol=2e-5, rtol=0)


def test_an_opening_is_spelled_behind_the_prompt(tiny, always) -> None:
    (place,) = always.places(PROMPTS[:1])
    ids = always.spell(place, "First")
    assert tiny[1].decode(list(ids)) == "First"


def test_settings_are_checked(tiny) -> None:
    for wrong in ({"hold": "prompt"}, {"hold": "all"}, {"batch_size": 0}, {"max_new_tokens": 0}):
        with pytest.raises(InvalidArgument):
            Asker(*tiny, **wrong)
