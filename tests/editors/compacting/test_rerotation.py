"""Kept slots moved to the front: against captures, fp64 rotation by hand, and unmoved memories."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors import Chain, Drop, Duplicate, Keep, Knorm, Shift, StreamingLLM, Truncate
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.testing import CONTEXT, tiny_model
from kvedit.testing.tolerances import FP64_ORACLE, SHIFT_KEYS, VISIBLE_EFFECT


def close(found: torch.Tensor, expected: Any) -> bool:
    expected = torch.as_tensor(expected).double()
    error = (found.double() - expected).abs().max()
    return bool(error <= SHIFT_KEYS * expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "glm4", "smollm3"])
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_first_layer_keys_are_those_of_a_capture_of_the_kept_tokens(
    family: str, layout: Any, subject: Any, kept_sets: Any
) -> None:
    """In the first layer a key depends on its token and position alone."""
    found = subject(family)
    plain = found.apply(Knorm(13, layout="masked"))
    moved = found.apply(Knorm(13, layout=layout, rerotate=True)).layers[0]
    union = plain.layers[0].source.tolist()
    for head, kept in enumerate(kept_sets(plain, 0)):
        chosen = sorted(kept) if layout == "packed" else union
        ids = found.memory.tokens[chosen]
        fresh = kv.capture(found.model, None, ids).layers[0]
        assert close(moved.keys[head], fresh.keys[head])
        assert not close(moved.keys[head], found.memory.layers[0].keys[head, chosen])
        assert torch.equal(moved.values[head], found.memory.layers[0].values[head, chosen])
    assert moved.positions.tolist() == list(range(moved.slots))


def turned(keys: np.ndarray, steps: np.ndarray, inverse: np.ndarray, interleaved: bool) -> Any:
    """Keys [slot, dim] un-rotated at m and rotated at n, with steps n - m, as complex numbers."""
    keys, rotated = keys.copy(), 2 * len(inverse)
    x, y = (
        (keys[:, :rotated:2], keys[:, 1:rotated:2])
        if interleaved
        else (keys[:, : rotated // 2], keys[:, rotated // 2 : rotated])
    )
    z = (x + 1j * y) * np.exp(1j * steps[:, None] * inverse)
    if interleaved:
        keys[:, :rotated:2], keys[:, 1:rotated:2] = z.real, z.imag
    else:
        keys[:, :rotated] = np.concatenate((z.real, z.imag), axis=1)
    return keys


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", None), ("llama", "llama3"), ("llama", "yarn"), ("llama", "linear"),
        ("qwen3", None), ("gpt_neox", None), ("glm4", None), ("gemma3", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_keys_of_all_layers_against_fp64_by_hand(
    family: str, rope: Any, layout: Any, kept_sets: Any
) -> None:
    model, tokenizer = tiny_model(family, rope=rope)
    memory = kv.capture(model, tokenizer, CONTEXT)
    plain = Knorm(12)(memory)
    moved = Knorm(12, layout=layout, rerotate=True)(memory)
    for index, layer in moved.layers.items():
        spec, whole = memory.model.layers[index], memory.layers[index]
        if spec.window is not None:
            continue
        inverse = np.array(spec.rope.inv_freq)
        for head, kept in enumerate(kept_sets(plain, index)):
            chosen = sorted(kept) if layout == "packed" else plain.layers[index].source.tolist()
            steps = np.arange(len(chosen)) - np.array(chosen)
            keys = whole.keys[head, chosen].double().numpy()
            expected = turned(keys, steps, inverse, spec.rope.layout == "interleaved")
            assert close(layer.keys[head], expected)
        assert layer.positions.tolist() == list(range(layer.slots))
    longest = max(
        layer.slots for i, layer in moved.layers.items() if memory.model.layers[i].window is None
    )
    assert moved.next_position == max(longest, 7 if family == "gemma3" else 0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_what_follows_reads_it_at_the_new_distance(family: str, subject: Any) -> None:
    """All heads keep a prefix: the moved memory is a capture of these tokens, and goes on so."""
    found = subject(family)
    tokens = found.memory.tokens
    shifted = Shift(9)(found.memory)  # a prefix that starts late; rerotate brings it to 0
    edited = found.apply(Truncate(20, rerotate=True), shifted)
    fresh = kv.capture(found.model, None, tokens[:20])
    assert edited.next_position == 20
    with kv.attach(found.model, edited) as one, kv.attach(found.model, fresh) as other:
        for turn in (found.continuation[:4], found.continuation[4:5], found.continuation[5:]):
            logits = one.forward(turn[None]), other.forward(turn[None])
            assert (logits[0] - logits[1]).abs().max() <= 1e-4  # fp32 angles, as SHIFT_KEYS


def test_layers_without_rope_keep_their_keys(subject: Any) -> None:
    found = subject("smollm3")
    moved = found.apply(StreamingLLM(12, rerotate=True))
    kept = [*range(4), *range(found.memory.tokens_count - 8, found.memory.tokens_count)]
    for index, layer in moved.layers.items():
        same = torch.equal(layer.keys, found.memory.layers[index].keys[:, kept])
        assert same == (found.memory.model.layers[index].rope is None)
        assert layer.positions.tolist() == list(range(12))
    assert [s.rope is None for s in found.memory.model.layers].count(True) == 1


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_windows_keep_their_distances(layout: Any, subject: Any, continued: Any) -> None:
    """Cohere 2's full layer has no RoPE and its sliding ones move as a whole, so nothing changes
    for what follows."""
    found = subject("cohere2")
    still = found.apply(Knorm(12, layout=layout))
    moved = found.apply(Knorm(12, layout=layout, rerotate=True))
    assert moved.next_position < still.next_position
    for index, layer in moved.layers.items():
        if found.memory.model.layers[index].window is not None:
            assert layer.slots == 7  # what the next token sees of a window of 8
            end = moved.next_position
            assert layer.positions.tolist() == list(range(end - 7, end))
            assert layer.source.tolist() == list(range(found.memory.tokens_count)[-7:])
    logits = [continued(found.model, m, found.continuation) for m in (still, moved)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-4  # fp32 angles, as SHIFT_KEYS
    assert (logits[0] - found.logits).abs().max() > VISIBLE_EFFECT


def test_a_window_makes_room_for_itself(subject: Any) -> None:
    found = subject("gemma3")
    moved = found.apply(Knorm(2, heads="shared", rerotate=True))
    assert moved.next_position == 7
    assert moved.layers[2].positions.tolist() == [0, 1]
    assert moved.layers[0].positions.tolist() == list(range(7))


def test_chunks_move_by_whole_chunks() -> None:
    model, tokenizer = tiny_model("llama4_text")
    memory = kv.capture(model, tokenizer, CONTEXT)
    moved = Knorm(4, heads="shared", rerotate=True)(memory)
    assert (memory.next_position - moved.next_position) % 16 == 0
    assert moved.next_position < memory.next_position
    for index, layer in moved.layers.items():
        if memory.model.layers[index].kind == "chunked":
            lost = memory.next_position - moved.next_position
            assert (layer.positions + lost).tolist() == layer.source.tolist()
            assert layer.slots == memory.next_position % 16
    with kv.attach(model, moved) as session:
        assert session.forward(memory.tokens[None, :3]).isfinite().all()


def test_gaps_close_and_copies_stay_together(subject: Any) -> None:
    found = subject("llama")
    holed = Drop({"tokens": [5, 25]})(found.memory)
    closed = Truncate(1.0, rerotate=True)(holed)
    count = found.memory.tokens_count - 20
    assert closed.next_position == count
    assert closed.layers[0].positions.tolist() == list(range(count))
    fresh = kv.capture(found.model, None, found.memory.tokens[holed.layers[0].source])
    assert close(closed.layers[0].keys, fresh.layers[0].keys)
    twice = Truncate(1.0, rerotate=True)(Duplicate({"tokens": [2, 4]}, 2)(found.memory))
    assert twice.layers[0].positions.tolist()[:7] == [0, 1, 2, 2, 3, 3, 4]
    again = Truncate(1.0, rerotate=True)(closed)
    assert all(again.layers[i] is layer for i, layer in closed.layers.items())
    ragged = Truncate(1.0, rerotate=True)(Keep({"tokens": [-9, -4]}, layers=(1,))(found.memory))
    assert ragged.next_position == found.memory.next_position
    assert ragged.layers[1].positions.tolist() == list(range(5))


def test_what_cannot_move_is_refused(subject: Any) -> None:
    with pytest.raises(UnsupportedModel, match="learned absolute positions"):
        subject("gpt2").apply(Knorm(0.5, rerotate=True))
    found = subject("llama")
    packed = Knorm(0.5, layout="packed")(found.memory)
    for memory in (packed, Chain((Knorm(0.5, layout="packed"),))(found.memory)):
        with pytest.raises(InvalidArgument, match="rerotate in the step that packs"):
            Truncate(0.5, rerotate=True)(memory)
    moved = Knorm(0.5, layout="packed", rerotate=True)(found.memory)
    assert Truncate(0.5, rerotate=True)(moved).next_position == 13
    model, tokenizer = tiny_model("llama", rope="longrope")  # changes beyond 64 positions
    memory = kv.capture(model, tokenizer, CONTEXT * 2)
    assert memory.next_position > 64
    with pytest.raises(ContextTooLong, match="changes its frequencies at position 64"):
        Truncate(0.2, rerotate=True)(memory)
    assert Truncate(0.2)(memory).layers[0].slots == int(0.2 * memory.tokens_count)


def test_a_bare_memory_moves_too(subject: Any) -> None:
    """Slots that no token made, and no bias lost."""
    memory = Shift(4)(subject("llama").memory)
    layers = {
        i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for i, layer in memory.layers.items()
    }
    bare = dataclasses.replace(memory, layers=layers, source=None)
    moved = Knorm(10, heads="shared", rerotate=True)(bare)
    same = Knorm(10, heads="shared", rerotate=True)(memory)
    assert torch.equal(moved.layers[1].keys, same.layers[1].keys)
    assert (moved.layers[1].keys.double() - same.layers[1].keys.double()).abs().max() <= FP64_ORACLE
