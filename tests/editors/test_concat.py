"""Concat against attention over separate captures, and against a capture at the offset."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvedit as kv
from kvedit.editors import Concat, Drop, Emphasize, Shift, SpotLight, build
from kvedit.editors.llmsteer import LLMSteer
from kvedit.errors import ContextTooLong, IncompatibleModel, InvalidArgument, UnsupportedModel
from kvedit.models.tiny import tiny_model
from kvedit.runtime import ModelReader
from kvedit.testing.tolerances import SHIFT_KEYS

TEXTS = ("The refund window is 60 days. ", "Keep the receipt.", " You would wait.")


def parts_of(family, texts=TEXTS, **options):
    model, tokenizer = tiny_model(family, **options)
    return model, tokenizer, [kv.capture(model, tokenizer, text) for text in texts]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "cohere2"])
def test_parts_stand_behind_each_other_as_if_captured_there(family):
    model, tokenizer, parts = parts_of(family)
    made = Concat()(*parts)
    assert made.next_position == made.slots == sum(part.slots for part in parts)
    assert made.tokens.tolist() == [token for part in parts for token in part.tokens.tolist()]
    start = 0
    for part in parts:
        moved = Shift(offset=start)(part)
        for index, layer in made.layers.items():
            piece = slice(start, start + part.slots)
            assert layer.positions[piece].tolist() == list(range(start, start + part.slots))
            assert layer.source[piece].tolist() == list(range(start, start + part.slots))
            wanted = moved.layers[index].keys
            assert (layer.keys[:, piece] - wanted).abs().max() <= SHIFT_KEYS * wanted.abs().max()
            assert torch.equal(layer.values[:, piece], part.layers[index].values)
        start += part.slots
    with kv.attach(model, made) as session:
        assert session.forward(parts[0].tokens[None, :4]).isfinite().all()


def test_spans_resolve_in_every_part_and_texts_are_joined():
    _, _, parts = parts_of("llama")
    made = Concat(order=(1, 2, 0))(*parts)
    assert made.source.text == "".join(parts[place].source.text for place in (1, 2, 0))
    found = Emphasize(span="60 days", strength=1.0)(made)
    alone = Emphasize(span="60 days", strength=1.0)(parts[0])
    assert torch.equal(found.layers[0].bias[:, -parts[0].slots :], alone.layers[0].bias)
    assert not found.layers[0].bias[:, : -parts[0].slots].any()


def test_bias_gaps_and_positions_of_each_part_are_kept():
    _, _, (one, two, _) = parts_of("llama")
    one = Drop(span="window")(one)
    two = Drop(span="Keep", layers=(1,))(Emphasize(span="receipt", strength=2.0)(two))
    made = Concat()(one, two)
    for index, layer in made.layers.items():
        a, b = one.layers[index], two.layers[index]
        at = torch.cat((a.positions, b.positions + one.next_position))
        assert torch.equal(layer.positions, at)
        assert torch.equal(layer.bias[:, a.slots :], b.bias)
        assert not layer.bias[:, : a.slots].any()
    assert made.next_position == one.next_position + two.next_position


def test_without_rotation_keys_stay_and_overlap():
    _, _, parts = parts_of("gpt2")
    made = Concat(rotate=False)(*parts)
    at = [p for part in parts for p in part.layers[0].positions.tolist()]
    assert made.layers[0].positions.tolist() == at
    whole = torch.cat([part.layers[0].keys for part in parts], dim=1)
    assert torch.equal(made.layers[0].keys, whole)
    assert made.next_position == sum(part.next_position for part in parts)
    with pytest.raises(UnsupportedModel, match="learned"):
        Concat()(*parts)


def test_lineage_names_every_input_and_the_step_replays():
    _, _, parts = parts_of("llama")
    made = Concat(order=(2, 0, 1))(*parts)
    node = made.lineage.head
    assert node.inputs == tuple(part.lineage.head.id for part in parts)
    given = {part.lineage.head.id: part for part in parts}
    assert kv.replay(made, inputs=given).digest == made.digest
    assert build("concat", order=[2, 0, 1]) == Concat(order=(2, 0, 1))


def test_a_chat_at_the_end_goes_on():
    model, tokenizer, (first, *_) = parts_of("llama")
    chat = kv.capture(model, tokenizer, [{"role": "system", "content": "Answer in one word."}])
    made = Concat()(first, chat)
    assert made.source.chat == chat.source.chat
    assert set(made.layers[0].source[: first.slots].tolist()) == {-1}
    assert made.layers[0].source[first.slots :].tolist() == list(range(chat.slots))
    with kv.attach(model, made, tokenizer) as session:
        session.feed("How long?")
    turned = Concat()(chat, first)
    assert turned.source.chat is None
    assert turned.tokens_count == first.tokens_count + chat.tokens_count
    role = turned.find(role="system")
    assert role.ranges == chat.find(role="system").ranges


def test_parts_are_not_read_anew_as_one():
    model, tokenizer, parts = parts_of("llama")
    made = Concat()(*parts)
    with pytest.raises(InvalidArgument, match="Concat changed"):
        LLMSteer(alpha=2.0, k=3, apply="baked")(made, reader=ModelReader(model, tokenizer))


def test_memories_that_can_not_stand_together_are_refused():
    _, _, (one, two, _) = parts_of("llama")
    other = parts_of("llama", seed=1)[2][0]
    with pytest.raises(IncompatibleModel, match="weights"):
        Concat()(one, other)
    with pytest.raises(IncompatibleModel, match="can't stand together"):
        Concat()(one, parts_of("qwen3")[2][0])
    with pytest.raises(InvalidArgument, match="dtypes"):
        Concat()(one, two.to(dtype=torch.float16))
    with pytest.raises(InvalidArgument, match="run-time rules"):
        Concat()(one, SpotLight(spans=["receipt"], target=0.5)(two))
    with pytest.raises(InvalidArgument, match="at least one"):
        Concat()()
    with pytest.raises(InvalidArgument, match="found"):
        Concat()(one, "text")
    with pytest.raises(InvalidArgument, match="names 2 memories, 1"):
        Concat(order=(0, 1))(one)
    with pytest.raises(InvalidArgument, match="each number from 0 to 1"):
        Concat(order=(0, 2))
    far = Shift(offset=16300)(one)
    with pytest.raises(ContextTooLong, match="16384"):
        Concat()(far, far)
    some = dataclasses.replace(two, layers={0: two.layers[0]})
    with pytest.raises(InvalidArgument, match="the same"):
        Concat()(one, some)
    assert Concat()(one).digest == one.digest
