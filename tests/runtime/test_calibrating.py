"""kv.calibrate: which queries are sampled, in which order, and that they are the model's own."""

from __future__ import annotations

import json

import pytest
import torch
from einops import rearrange

import kvedit as kv
from kvedit.errors import InvalidArgument
from kvedit.memory.operand import operand_facts, operand_kind
from kvedit.models.rope import unrotate
from kvedit.runtime import calibrating
from kvedit.runtime.generic_text import generic_texts

FIT = (
    "A letter came on Monday. It said that the house by the river was for sale, and that the owner "
    "would be glad to show it to anyone who could pay. Nobody in the village could.",
    "First, wash the beans. Second, cook them for an hour. Third, add salt and oil. Wait until the "
    "kitchen smells of summer. Serve with bread; it feeds four people, or two twins.",
)
HELD = (
    "The train was late again, so they played cards on a suitcase and ate what was left of the "
    "cake. At half past nine the lamps went out. Someone laughed, and then everyone did.",
)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "cohere2")


def calibrated(tiny, family, **options):
    model, tokenizer = tiny(family)
    given = {"texts": FIT, "held_out": HELD, "samples": 12, **options}
    return model, tokenizer, kv.calibrate(model, tokenizer, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_queries_of_one_plain_pass(tiny, family):
    model, tokenizer, operand = calibrated(tiny, family)
    facts = operand_facts(operand, "queries")
    assert (facts["fit"], facts["held_out"], facts["texts"]) == (12, 6, [2, 1])
    places = torch.tensor(facts["positions"])
    parts = [places[:6], places[6:12], places[12:]]
    for layer, spec in enumerate(operand.model.layers):
        found = rearrange(
            operand.layers[layer].keys, "kv (group sample) dim -> (kv group) sample dim",
            group=spec.group,
        )  # fmt: skip
        for text, chosen, kept in zip((*FIT, *HELD), parts, found.split(6, dim=1), strict=True):
            ids = tokenizer(text, return_tensors="pt").input_ids
            # Reference: transformers' own pass, queries after RoPE, turned back.
            with torch.no_grad(), kv.tap(model, ["queries"]) as tap:
                model(ids, use_cache=False)
            turned = tap["queries", layer][0][:, chosen]
            torch.testing.assert_close(kept, unrotate(turned, spec.rope, chosen), atol=2e-5, rtol=0)


def test_the_start_of_a_text_is_left_out_and_no_token_comes_twice(tiny):
    _, _, operand = calibrated(tiny, "llama")
    places = torch.tensor(operand_facts(operand, "queries")["positions"])
    for part in places.split(6):
        assert int(part.min()) >= calibrating.LEAD
        assert bool((part.diff() > 0).all())


def test_reading_in_pieces_gives_the_same_queries(tiny, monkeypatch):
    _, _, whole = calibrated(tiny, "gemma3")
    monkeypatch.setattr(calibrating, "CHUNK", 17)
    _, _, pieces = calibrated(tiny, "gemma3")
    for layer in whole.layers:
        torch.testing.assert_close(
            whole.layers[layer].keys, pieces.layers[layer].keys, atol=1e-5, rtol=0
        )


def test_seed_decides_and_lineage_tells(tiny):
    _, _, first = calibrated(tiny, "llama")
    _, _, again = calibrated(tiny, "llama")
    _, _, other = calibrated(tiny, "llama", seed=1)
    assert first.digest == again.digest != other.digest
    node = first.lineage.head
    assert (node.operation, node.reproducibility, node.seed) == ("calibrate", "reader", 0)
    assert node.id == again.lineage.head.id != other.lineage.head.id
    assert json.loads(node.parameters)["samples"] == 12
    _, _, swapped = calibrated(tiny, "llama", held_out=FIT[:1])
    assert swapped.lineage.head.id != node.id


def test_an_operand_goes_through_the_store_and_not_into_a_session(tiny, tmp_path):
    model, _, operand = calibrated(tiny, "llama")
    store = kv.Store(tmp_path)
    store.put(operand, "queries")
    back = store.get("queries")
    assert back.digest == operand.digest
    assert operand_kind(back) == "queries"
    with pytest.raises(Exception, match="operand"), kv.attach(model, back):
        pass


def test_short_texts_and_bad_numbers_are_refused(tiny):
    with pytest.raises(InvalidArgument, match="too short for 300 samples after the first 64"):
        calibrated(tiny, "llama", samples=600)
    with pytest.raises(InvalidArgument, match="at least 2"):
        calibrated(tiny, "llama", samples=1)
    with pytest.raises(InvalidArgument, match="1 to 12 texts"):
        calibrated(tiny, "llama", texts=[])


def test_generic_text_has_two_parts_that_share_nothing():
    fit, held = generic_texts("fit", chat=True), generic_texts("held", chat=True)
    assert [type(text) for text in fit] == [str, list, list, *[str] * 11, list, list, *[str] * 5]
    assert [type(text) for text in held] == [str, list]
    chats = [text for text in (*fit, *held) if isinstance(text, list)]
    assert {turn["role"] for chat in chats for turn in chat} == {"user", "assistant"}
    plain = [generic_texts(part, chat=False) for part in ("fit", "held")]
    assert all(isinstance(text, str) and len(text) > 1000 for part in plain for text in part)
    lines = [
        {line for text in part for line in text.split("\n") if len(line) > 20} for part in plain
    ]
    assert not lines[0] & lines[1]
