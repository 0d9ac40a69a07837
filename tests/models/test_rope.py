"""Rotation: a group, equal to a capture at the offset, for every RoPE type and layout."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import kvedit as kv
from kvedit.editors import Shift
from kvedit.errors import ContextTooLong, UnsupportedModel
from kvedit.models import inspect
from kvedit.models.cache_argument import cache_argument
from kvedit.models.rope import angles, rotate, shift, unrotate
from kvedit.models.tiny import family_names, tiny_model

ROPES = ("default", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional")
ROPE_FAMILIES = [f for f in family_names() if f not in ("gpt2", "opt")]
OFFSETS = (1, 17, 256, 1000, 8000)


def _capture_at(model, ids, offset):
    """Keys of a plain forward pass whose positions start at ``offset``: the reference."""
    from transformers import DynamicCache

    cache = DynamicCache()
    at = torch.arange(offset, offset + len(ids))[None]
    with torch.no_grad():
        model(ids[None], **{cache_argument(model): cache}, position_ids=at)
    return [layer.keys[0] for layer in cache.layers]


def _fp32_angle_error(rope, positions):
    """How far fp32 angles (position times frequency, rounded) are from fp64 ones, in radians."""
    exact = angles(rope, positions)
    frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32)
    rounded = positions.to(torch.float32)[:, None] * frequencies
    return float((rounded.double() - exact).abs().max())


def _tolerance(rope, keys, start, stop):
    """A key turns by the angle's error: at most ``|key| * error``, plus rounding of the product."""
    if rope is None:
        return 1e-5
    error = _fp32_angle_error(rope, torch.arange(start, stop))
    return 1e-5 + 2 * error * float(keys.norm(dim=-1).max())


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_keys_before_rope_are_the_projection(family):
    """unrotate(post-RoPE keys) equals what the key projection (and key norm) put out."""
    model, tokenizer = tiny_model(
        family,
        dtype=torch.float64
        if family not in ("gpt_oss", "qwen3_moe", "llama4_text")
        else torch.float32,
    )
    ids = torch.arange(20, 32)
    first = kv.capture(model, None, ids)
    spec = first.model
    for layer in (0, len(spec.layers) - 1):
        rope = spec.layers[layer].rope
        at = first.layers[layer].positions
        raw = unrotate(first.layers[layer].keys, rope, at)
        again = rotate(raw, rope, at)
        torch.testing.assert_close(again, first.layers[layer].keys, atol=1e-5, rtol=0)
    # In layer 0 a token's raw key depends on the token alone: repeat it at other positions.
    twice = kv.capture(model, None, torch.cat((ids, ids)))
    raw = unrotate(twice.layers[0].keys, spec.layers[0].rope, twice.layers[0].positions)
    torch.testing.assert_close(raw[:, :12], raw[:, 12:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("rope", ROPES)
def test_shift_forth_and_back_restores_keys(rope):
    spec = inspect(tiny_model("llama", rope=rope)[0]).spec.layers[0].rope
    keys = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0))
    for offset in OFFSETS:
        there = shift(keys, spec, offset)
        assert (there - keys).abs().max() > 1e-3
        assert (shift(there, spec, -offset) - keys).abs().max() <= 1e-5
        halves = shift(shift(keys, spec, offset // 2), spec, offset - offset // 2)
        assert (halves - there).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rope", ["default", "yarn", "llama3"])
def test_rotation_against_complex_numbers(rope, layout):
    """The definition: a pair as a complex number, times e^(i * position * frequency)."""
    spec = inspect(tiny_model("llama", rope=rope)[0]).spec.layers[0].rope
    spec = dataclasses.replace(spec, layout=layout)
    states = torch.randn(3, 9, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = torch.tensor([0, 1, 5, 9, 100, 1000, 4000, 8000, 8001])
    pairs = states[..., :16]
    if layout == "half":
        z = torch.complex(pairs[..., :8], pairs[..., 8:])
    else:
        z = torch.complex(pairs[..., 0::2], pairs[..., 1::2])
    z = z * torch.polar(torch.full((9, 8), spec.scaling, dtype=torch.float64), angles(spec, at))
    found = rotate(states, spec, at)
    real, imaginary = (
        (found[..., :8], found[..., 8:16])
        if layout == "half"
        else (found[..., 0:16:2], found[..., 1:16:2])
    )
    torch.testing.assert_close(torch.complex(real, imaginary), z, atol=1e-12, rtol=0)
    assert torch.equal(found[..., 16:], states[..., 16:])


def _offsets(family):
    # Llama 4 attends in chunks of 16 positions, so a memory of it moves by whole chunks.
    return (16, 256, 1008, 8000) if family == "llama4_text" else OFFSETS


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_shift_equals_a_float64_reference(family):
    """Raw keys of layer 0 (each token alone, at position 0), turned by exact angles in float64."""
    model, _ = tiny_model(family)
    ids = torch.arange(30, 42)
    alone = kv.capture(model, None, [[int(token)] for token in ids])
    raw = torch.cat([memory.layers[0].keys for memory in alone], dim=1).double()
    memory = kv.capture(model, None, ids)
    rope = memory.model.layers[0].rope
    for offset in _offsets(family):
        theta = angles(rope, torch.arange(offset, offset + 12))
        reference = raw.clone()
        first, second = (
            (slice(0, rope.rotated // 2), slice(rope.rotated // 2, rope.rotated))
            if rope.layout == "half"
            else (slice(0, rope.rotated, 2), slice(1, rope.rotated, 2))
        )
        x, y = raw[..., first], raw[..., second]
        reference[..., first] = x * theta.cos() - y * theta.sin()
        reference[..., second] = y * theta.cos() + x * theta.sin()
        found = Shift(offset)(memory).layers[0].keys.double()
        assert (found - reference).abs().max() <= 1e-5, offset


@pytest.mark.parametrize("family", ROPE_FAMILIES)
def test_shift_equals_capture_at_the_offset(family):
    model, _ = tiny_model(family)
    ids = torch.arange(30, 42)
    memory = kv.capture(model, None, ids)
    ropes = [layer.rope for layer in memory.model.layers]
    for offset in _offsets(family):
        moved = Shift(offset)(memory)
        assert moved.next_position == memory.next_position + offset
        reference = _capture_at(model, ids, offset)
        worst = max(
            _tolerance(rope, keys, offset, offset + 12)
            for rope, keys in zip(ropes, reference, strict=True)
        )
        for layer, keys in enumerate(reference):
            if family == "llama4_text" and layer > 0:
                continue  # a plain pass cuts its chunks by slot, so later layers differ
            # Later layers hand on what fp32 angles did to earlier outputs, and grow it.
            own = _tolerance(ropes[layer], keys, offset, offset + 12)
            allowed = own if layer == 0 else 10 * worst
            error = float((moved.layers[layer].keys - keys).abs().max())
            assert error <= allowed, (offset, layer, error, allowed)


@pytest.mark.parametrize("rope", [r for r in ROPES if r not in ("dynamic", "longrope")])
@pytest.mark.parametrize("offset", OFFSETS)
def test_shift_of_every_type_equals_capture_at_the_offset(rope, offset):
    model, _ = tiny_model("llama", rope=rope)
    ids = torch.arange(30, 42)
    memory = kv.capture(model, None, ids)
    if memory.model.max_position and offset + 12 > memory.model.max_position:
        with pytest.raises(ContextTooLong):
            Shift(offset)(memory)
        return
    keys = _capture_at(model, ids, offset)[0]
    error = (Shift(offset)(memory).layers[0].keys - keys).abs().max()
    allowed = _tolerance(memory.model.layers[0].rope, keys, offset, offset + 12)
    assert error <= allowed, (float(error), allowed)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_types_that_change_with_length_are_kept_on_one_side(rope):
    model, _ = tiny_model("llama", rope=rope)
    memory = kv.capture(model, None, torch.arange(30, 50))
    switch = memory.model.layers[0].rope.switch
    inside = Shift(10)(memory)
    keys = _capture_at(model, torch.arange(30, 50), 10)[0]
    assert (inside.layers[0].keys - keys).abs().max() <= 1e-5
    with pytest.raises(ContextTooLong, match=r"RoPE changes|positions"):
        Shift(switch)(memory)
    with kv.attach(model, memory, strict=False) as session:
        with pytest.raises(ContextTooLong, match=rope.replace("dynamic", "dynamic NTK")):
            session.forward(torch.full((1, switch), 30))


def test_longrope_past_its_switch_is_captured_in_one_pass_and_continued():
    model, _ = tiny_model("llama", rope="longrope")
    ids = torch.randint(10, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[:, 80:]
    memory = kv.capture(model, None, ids[0, :80], chunk=16)
    short = kv.capture(model, None, ids[0, :20])
    assert memory.model.layers[0].rope.inv_freq != short.model.layers[0].rope.inv_freq
    with kv.attach(model, memory) as session:
        found = session.forward(ids[:, 80:])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    raw = unrotate(memory.layers[0].keys, memory.model.layers[0].rope, memory.layers[0].positions)
    at_short = unrotate(short.layers[0].keys, short.model.layers[0].rope, short.layers[0].positions)
    torch.testing.assert_close(raw[:, :20], at_short, atol=1e-5, rtol=0)


def test_nope_layers_keep_their_keys():
    model, _ = tiny_model("smollm3")
    memory = kv.capture(model, None, torch.arange(30, 42))
    moved = Shift(40)(memory)
    nope = [i for i, layer in enumerate(memory.model.layers) if layer.rope is None]
    assert nope
    for index in nope:
        assert torch.equal(moved.layers[index].keys, memory.layers[index].keys)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_cannot_be_shifted(family):
    memory = kv.capture(tiny_model(family)[0], None, torch.arange(30, 42))
    with pytest.raises(UnsupportedModel, match="learned absolute positions"):
        Shift(1)(memory)


def test_a_shifted_memory_continues_like_the_unshifted_one():
    """RoPE only tells differences of positions, so logits stay (up to fp32 angles)."""
    for family in ("llama", "gemma3", "glm4", "smollm3"):
        model, _ = tiny_model(family)
        memory = kv.capture(model, None, torch.arange(30, 50))
        logits = []
        for one in (memory, Shift(200)(memory)):
            with kv.attach(model, one) as session:
                logits.append(session.forward(torch.tensor([[60, 61, 62]])))
        torch.testing.assert_close(*logits, atol=5e-3, rtol=0)


def test_half_precision_keys_are_turned_in_float32():
    spec = inspect(tiny_model("llama")[0]).spec.layers[0].rope
    keys = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = shift(keys.float(), spec, 3000)
    assert torch.equal(shift(keys, spec, 3000), exact.bfloat16())
