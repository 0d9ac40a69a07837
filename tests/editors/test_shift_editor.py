"""Shift against captures that began at the offset, and as a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import kvedit as kv
from kvedit.editors import Drop, Shift
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.models.cache_argument import cache_argument
from kvedit.testing import CONTEXT, EDITOR_FAMILIES, tiny_model
from kvedit.testing.tolerances import FP32_ORACLE, SHIFT_KEYS

MOVABLE = [family for family in EDITOR_FAMILIES if family != "gpt2"]


def captured_at(found: Any, offset: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values that transformers' own cache holds of the context at an offset."""
    ids = found.memory.tokens[None]
    # No window's length: a sliding layer of this cache would keep the end only.
    cache = DynamicCache()
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None] + offset
        found.model(
            input_ids=ids,
            position_ids=positions,
            **{cache_argument(found.model): cache},
            use_cache=True,
        )
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("offset", [1, 900])
@pytest.mark.parametrize("family", MOVABLE)
def test_a_shifted_memory_equals_one_captured_there(family: str, offset: int, subject: Any) -> None:
    found = subject(family, torch.float32)
    moved = Shift(offset)(found.memory)
    at_offset = captured_at(found, offset)
    for index, (keys, values) in enumerate(at_offset):
        layer, old = moved.layers[index], found.memory.layers[index]
        assert (layer.keys - keys).abs().max() <= SHIFT_KEYS * keys.abs().max()
        assert (layer.values - values).abs().max() <= SHIFT_KEYS * values.abs().max()
        assert layer.values is old.values
        rotated = found.memory.model.layers[index].rope is not None
        assert bool((layer.keys - old.keys).abs().max() > 0.1) == rotated


@pytest.mark.parametrize("family", MOVABLE)
def test_moving_there_and_back_restores_the_keys(family: str, subject: Any) -> None:
    memory = subject(family).memory
    back = Shift(-123)(Shift(123)(memory))
    tolerance = 1e-12 if memory.dtype == torch.float64 else FP32_ORACLE
    for index, layer in back.layers.items():
        old = memory.layers[index]
        assert (layer.keys - old.keys).abs().max() <= tolerance * old.keys.abs().max()
        assert torch.equal(layer.positions, old.positions)
    assert back.next_position == memory.next_position
    once, twice = Shift(50)(memory), Shift(20)(Shift(30)(memory))
    for index, layer in once.layers.items():
        gap = (layer.keys - twice.layers[index].keys).abs().max()
        assert gap <= tolerance * layer.keys.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_what_follows_does_not_notice(family: str, subject: Any, continued: Any) -> None:
    """RoPE tells differences of positions only, so logits stay up to float32 angles."""
    found = subject(family)
    moved = Shift(500)(found.memory)
    assert moved.next_position == found.memory.next_position + 500
    logits = continued(found.model, moved, found.continuation)
    # An angle at position 500 errs by 500 * 2**-24, and logits by some of those.
    assert (logits - found.logits).abs().max() <= 1e-3


def test_gaps_stay_gaps(subject: Any) -> None:
    memory = subject("llama").memory
    apart = Shift(7)(Drop({"tokens": [3, 6]})(memory))
    other = Drop({"tokens": [3, 6]})(Shift(7)(memory))
    assert apart.digest == other.digest
    assert apart.layers[0].positions.tolist()[:4] == [7, 8, 9, 13]


def test_positions_stay_in_the_model(subject: Any) -> None:
    memory = subject("llama").memory
    limit = memory.model.max_position
    with pytest.raises(InvalidArgument, match="offset -1 would move position 0 below 0"):
        Shift(-1)(memory)
    fits = limit - memory.next_position
    assert Shift(fits)(memory).next_position == limit
    with pytest.raises(ContextTooLong, match=rf"has {limit} positions; .* end at {limit + 1}"):
        Shift(fits + 1)(memory)
    late = Drop({"tokens": [0, 4]})(memory)
    assert Shift(-4)(late).layers[0].positions[0] == 0


def test_learned_positions_cannot_move(subject: Any) -> None:
    memory = subject("gpt2").memory
    assert Shift(0)(memory).digest == memory.digest
    with pytest.raises(UnsupportedModel, match="learned absolute positions"):
        Shift(1)(memory)


def test_a_memory_stays_on_its_side_of_a_change_of_frequencies() -> None:
    model, tokenizer = tiny_model("llama", rope="longrope")
    memory = kv.capture(model, tokenizer, CONTEXT)
    switch = memory.model.layers[0].rope.switch
    assert memory.next_position < switch == 64
    room = switch - memory.next_position
    assert Shift(room)(memory).next_position == switch
    with pytest.raises(
        ContextTooLong, match="longrope RoPE changes its frequencies at position 64"
    ):
        Shift(room + 1)(memory)


def test_chunked_attention_moves_by_whole_chunks() -> None:
    model, tokenizer = tiny_model("llama4_text")
    memory = kv.capture(model, tokenizer, CONTEXT)
    assert {spec.window for spec in memory.model.layers if spec.kind == "chunked"} == {16}
    assert Shift(32)(memory).next_position == memory.next_position + 32
    with pytest.raises(InvalidArgument, match=r"chunks of 16 positions.* found offset 8"):
        Shift(8)(memory)


@pytest.mark.parametrize("offset", [True, 1.0, "1", None, float("nan")])
def test_an_offset_is_a_whole_number(offset: Any) -> None:
    with pytest.raises(InvalidArgument, match="whole number, found"):
        Shift(offset)
