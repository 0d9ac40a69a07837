"""Cache steering end to end, against transformers alone: DynamicCache, edited in place, greedy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvedit as kv
from kvedit.editors import Steer
from kvedit.errors import InvalidArgument, TemplateNotCuttable
from kvedit.models.inspection import inspect
from kvedit.models.tiny import tiny_model
from kvedit.steering import go_on, prompted
from kvedit.testing.steering import random_delta

FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox", "gpt2")
CHAT = [{"role": "user", "content": "The box is in the refund window. Is it?"}]
STEPS = 6


@lru_cache
def model_of(family: str) -> Any:
    return tiny_model(family, dtype=torch.float64)


def rotary(model: Any, layer: int) -> Any:
    """The model's own rotary module, and the kind of layer where it asks for one."""
    for module in model.modules():
        if "rotary" in type(module).__name__.lower():
            kinds = getattr(model.config, "layer_types", None)
            return module, kinds[
                layer
            ] if kinds and model.config.model_type == "gemma3_text" else None
    return None, None


def turned(model: Any, layer: int, vector: torch.Tensor, position: int) -> torch.Tensor:
    """``vector`` [kv_head, dim] turned by the model's own float32 cos and sin."""
    module, kind = rotary(model, layer)
    if module is None:
        return vector
    where = torch.tensor([[position]])
    arguments = (vector[None], where) if kind is None else (vector[None], where, kind)
    cos, sin = (part[0, 0] for part in module(*arguments))
    return mixed(vector, cos, sin)


def exactly_turned(model: Any, layer: int, vector: torch.Tensor, position: int) -> torch.Tensor:
    """The same by float64 angles, of the frequencies that the model uses."""
    rope = inspect(model).spec.layers[layer].rope
    if rope is None:
        return vector
    angles = position * torch.tensor([*rope.inv_freq] * 2, dtype=torch.float64)
    return mixed(vector, angles.cos(), angles.sin())


def mixed(vector: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated, rest = vector[:, : len(cos)], vector[:, len(cos) :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def reference(
    model: Any, ids: torch.Tensor, delta: Any, keys: float, values: float, offset: int, turn: Any
) -> Any:
    """Logits [step, vocabulary] and greedy ids behind the offset token, the paper's way."""
    cache = DynamicCache(config=model.config)
    logits, made = [], []
    with torch.no_grad():
        model(ids[None], cache=cache)
        for index, layer in enumerate(cache.layers):
            vector = delta.vectors["keys"][index].double()
            layer.keys[0, :, -1] += keys * turn(model, index, vector, len(ids) - 1)
            layer.values[0, :, -1] += values * delta.vectors["values"][index].double()
        token = offset
        for step in range(STEPS):
            at = torch.tensor([[len(ids) + step]])
            out = model(torch.tensor([[token]]), cache=cache, position_ids=at)
            logits.append(out.logits[0, -1])
            token = int(logits[-1].argmax())
            made.append(token)
    return torch.stack(logits), made


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_alone(family: str) -> None:
    model, tokenizer = model_of(family)
    delta = random_delta(model, tokenizer)
    memory = prompted(model, tokenizer, None, CHAT)
    ids = memory.tokens
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert memory.slots == len(ids)
    offset = tokenizer("\n", add_special_tokens=False).input_ids
    assert len(offset) == 1
    expected, made = reference(model, ids, delta, 0.7, 4.0, offset[0], exactly_turned)
    edited = Steer(keys=0.7, values=4.0)(memory, delta.operand())
    with kv.attach(model, edited, tokenizer) as session:
        fed = [offset[0], *made[:-1]]
        logits = torch.cat([session.forward(torch.tensor([[token]]))[0] for token in fed])
    assert (logits - expected).abs().max() <= 1e-6
    # What is left with the next is the model's own angles, of 24 bits: not an error of ours.
    theirs, same = reference(model, ids, delta, 0.7, 4.0, offset[0], turned)
    assert (logits - theirs).abs().max() <= 5e-6
    assert same == made
    plain, _ = reference(model, ids, delta, 0.0, 0.0, offset[0], turned)
    assert (plain - expected).abs().max() > 1e-3
    end = next((i + 1 for i, t in enumerate(made) if t == tokenizer.eos_token_id), STEPS)
    said = tokenizer.decode(made[:end], skip_special_tokens=True)
    assert go_on(model, tokenizer, edited, max_new_tokens=STEPS) == said


def test_a_list_of_memories_is_a_batch() -> None:
    model, tokenizer = model_of("gemma3")
    steer, operand = Steer(keys=0.5, values=3.0), random_delta(model, tokenizer).operand()
    chats = [
        CHAT,
        [{"role": "user", "content": "Why?"}],
        [{"role": "user", "content": "And so " * 9}],
    ]
    memories = prompted(model, tokenizer, None, chats)
    for chat, memory in zip(chats, memories, strict=True):
        alone = prompted(model, tokenizer, None, chat)
        assert torch.equal(alone.tokens, memory.tokens)
        for index, layer in alone.layers.items():
            assert (layer.keys - memory.layers[index].keys).abs().max() <= 1e-6
            assert (layer.values - memory.layers[index].values).abs().max() <= 1e-6
    edited = [steer(memory, operand) for memory in memories]
    together = go_on(model, tokenizer, edited, max_new_tokens=STEPS)
    assert together == [go_on(model, tokenizer, one, max_new_tokens=STEPS) for one in edited]
    assert together != go_on(model, tokenizer, memories, max_new_tokens=STEPS)


def test_behind_a_memory_and_its_turns() -> None:
    model, tokenizer = model_of("llama")
    context = kv.capture(model, tokenizer, [{"role": "user", "content": "The refund is 60 days."}])
    memory = prompted(model, tokenizer, context, "How long?")
    assert memory.tokens[: context.tokens_count].equal(context.tokens)
    assert memory.source.messages[-1].content == "How long?"
    whole = [
        {"role": "user", "content": "The refund is 60 days."},
        {"role": "user", "content": "How long?"},
    ]
    text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert memory.tokens.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    operand = random_delta(model, tokenizer).operand()
    edited = Steer(values=4.0)(memory, operand)
    assert [node.name for node in edited.lineage.nodes] == ["capture", "grow", "random", "steer"]
    changed = [
        i for i in edited.layers if not edited.layers[i].values.equal(memory.layers[i].values)
    ]
    assert changed == list(memory.layers)
    moved = (edited.layers[0].values != memory.layers[0].values).any(dim=2).all(dim=0)
    assert moved.nonzero().flatten().tolist() == [memory.tokens_count - 1]


def test_texts_begin_as_captured_ones_do() -> None:
    model, tokenizer = model_of("llama")
    text = "The thing in the box"
    one = prompted(model, tokenizer, None, text)
    assert one.digest == kv.capture(model, tokenizer, text).digest
    several = prompted(model, tokenizer, None, [text, "Why?"])
    assert [m.tokens.tolist() for m in several] == [
        kv.capture(model, tokenizer, t).tokens.tolist() for t in (text, "Why?")
    ]
    ids = prompted(model, None, None, one.tokens.tolist())
    assert torch.equal(ids.tokens, one.tokens)


def test_the_offset_is_spelled_by_itself_and_not_told() -> None:
    model, tokenizer = model_of("llama")
    memory = prompted(model, tokenizer, None, "The thing in the box\n")
    ids = tokenizer("\n", add_special_tokens=False).input_ids
    text = go_on(model, tokenizer, memory, max_new_tokens=4)
    assert go_on(model, tokenizer, memory, ids, max_new_tokens=4) == text
    raw = go_on(model, None, memory, ids, max_new_tokens=4)
    assert tokenizer.decode(raw, skip_special_tokens=True) == text
    assert go_on(model, tokenizer, memory, " ", max_new_tokens=4) != text


def test_what_cannot_be_is_refused() -> None:
    model, tokenizer = model_of("llama")
    memory = prompted(model, tokenizer, None, "The thing")
    with pytest.raises(InvalidArgument, match="has no token; a token must be read behind"):
        go_on(model, tokenizer, memory, "")
    with pytest.raises(InvalidArgument, match="needs a tokenizer"):
        go_on(model, None, memory)
    with pytest.raises(InvalidArgument, match="empty"):
        prompted(model, tokenizer, None, "")
    context = kv.capture(model, tokenizer, CHAT)
    other, renamed = tiny_model("llama", dtype=torch.float64)
    renamed.chat_template = renamed.chat_template + " "
    with pytest.raises(TemplateNotCuttable):
        prompted(other, renamed, context, "Why?")
