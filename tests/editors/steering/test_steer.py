"""Steer: against indexing by hand, over families; scopes, masks, refusals, composition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Chain, Drop, Emphasize, Shift, Steer, Suppress, Truncate
from kvedit.errors import IncompatibleModel, InvalidArgument, SpanNotFound, UnknownName
from kvedit.memory import HeadSet, KVMemory
from kvedit.testing import tiny_model
from kvedit.testing.steering import random_delta

FAMILIES = ("llama", "qwen3", "gemma3", "gpt_neox", "glm4", "gpt_oss", "cohere2", "gpt2")


def turned(model: Any, spec: Any, vector: torch.Tensor, position: int) -> torch.Tensor:
    """``vector`` [kv_head, dim] turned pair by pair, with Python's own numbers as angles."""
    out = vector.double().clone()
    if spec.rope is None:
        return out
    count = spec.rope.rotated // 2
    for pair, frequency in enumerate(spec.rope.inv_freq):
        i, j = (pair, pair + count) if spec.rope.layout == "half" else (2 * pair, 2 * pair + 1)
        angle = torch.tensor(position * frequency, dtype=torch.float64)
        x, y = vector[:, i].double(), vector[:, j].double()
        out[:, i] = (x * angle.cos() - y * angle.sin()) * spec.rope.scaling
        out[:, j] = (y * angle.cos() + x * angle.sin()) * spec.rope.scaling
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_get_values_and_keys_at_their_own_position(family: str, subject: Any) -> None:
    found = subject(family)
    delta = random_delta(found.model, found.tokenizer)
    editor = Steer(keys=0.6, values=-2.0, at={"tokens": (-5, -2)}, kv_heads={0: [1], 2: [0, 1]})
    edited = editor(found.memory, delta.operand())
    count = found.memory.tokens_count
    for index, layer in edited.layers.items():
        old, spec = found.memory.layers[index], found.memory.model.layers[index]
        heads = {0: [1], 2: [0, 1]}.get(index, [])
        keys, values = old.keys.double().clone(), old.values.double().clone()
        for slot in range(old.slots):
            if count - 5 <= int(old.source[slot]) < count - 2:
                added = turned(
                    found.model, spec, delta.vectors["keys"][index], int(old.positions[slot])
                )
                for head in heads:
                    keys[head, slot] += 0.6 * added[head]
                    values[head, slot] -= 2.0 * delta.vectors["values"][index][head].double()
        assert (layer.keys.double() - keys).abs().max() <= 1e-6
        assert (layer.values.double() - values).abs().max() <= 1e-6
        assert all(getattr(layer, n) is getattr(old, n) for n in ("source", "positions"))
        if not heads:
            assert layer is old
    assert edited.next_position == found.memory.next_position
    assert edited.source is found.memory.source


@pytest.mark.parametrize(
    ("at", "slots"),
    [
        ("last", [-1]),
        (-1, [-1]),
        (-3, [-3]),
        ({"slots": (2, 4)}, [2, 3]),
        ([{"tokens": (0, 2)}, {"tokens": (1, 3)}], [0, 1, 2]),
        ("all", None),
    ],
)
def test_where_it_acts(at: Any, slots: list[int] | None, subject: Any) -> None:
    found = subject("llama")
    edited = Steer(at=at)(found.memory, random_delta(found.model, found.tokenizer).operand())
    for index, layer in edited.layers.items():
        moved = (layer.values != found.memory.layers[index].values).any(dim=2).all(dim=0)
        wanted = torch.zeros(layer.slots, dtype=torch.bool)
        wanted[slice(None) if slots is None else slots] = True
        assert torch.equal(moved, wanted)
        assert layer.keys is found.memory.layers[index].keys


def test_ways_to_write_the_last_slot_are_one_editor() -> None:
    assert Steer(at=-1) == Steer(at="last") == Steer()
    assert Steer(at={"text": "x"}) == Steer(at=[{"text": "x"}])


def test_edits_add_up_and_norms_can_stay(subject: Any) -> None:
    found = subject("qwen3")
    operand = random_delta(found.model, found.tokenizer).operand()
    once = Steer(keys=0.5, values=3.0, at="all")(found.memory, operand)
    half = Steer(keys=0.25, values=1.5, at="all")
    twice = half(half(found.memory, operand), operand)
    chained = Chain((half, half))(found.memory, operand)
    back = Steer(keys=-0.5, values=-3.0, at="all")(once, operand)
    kept = Steer(keys=0.5, values=3.0, at="all", preserve_norm=True)(found.memory, operand)
    for index, old in found.memory.layers.items():
        for site in ("keys", "values"):
            a, b = (getattr(m.layers[index], site) for m in (once, twice))
            assert (a - b).abs().max() <= 1e-6
            assert torch.equal(getattr(chained.layers[index], site), b)
            assert (getattr(back.layers[index], site) - getattr(old, site)).abs().max() <= 1e-6
            same = getattr(kept.layers[index], site)
            assert not torch.equal(same, getattr(old, site))
            ratio = same.norm(dim=-1) / getattr(old, site).norm(dim=-1)
            assert (ratio - 1).abs().max() <= 1e-6
            parallel = torch.cosine_similarity(same, a, dim=-1)
            assert (parallel - 1).abs().max() <= 1e-6


def test_a_moved_delta_equals_moving_what_was_steered(subject: Any) -> None:
    """Keys turned to place: steer then shift is shift then steer."""
    for family in ("llama", "gemma3", "gpt_neox", "glm4"):
        found = subject(family)
        operand = random_delta(found.model, found.tokenizer).operand()
        steer = Steer(keys=1.0, values=1.0, at="all")
        one = Shift(37)(steer(found.memory, operand))
        two = steer(Shift(37)(found.memory), operand)
        for index in one.layers:
            assert (one.layers[index].keys - two.layers[index].keys).abs().max() <= 1e-5
            assert torch.equal(one.layers[index].values, two.layers[index].values)


def test_masked_heads_keep_their_slots(subject: Any) -> None:
    found = subject("llama")
    operand = random_delta(found.model, found.tokenizer).operand()
    # One KV head loses the slot altogether, of the other only one of its query heads does.
    evicted = Suppress({"tokens": (-3, -1)}, strength=float("inf"), heads=(0, 2, 3))(found.memory)
    edited = Steer(keys=1.0, values=1.0, at="all")(evicted, operand)
    for index, layer in edited.layers.items():
        for site in ("keys", "values"):
            old, new = getattr(evicted.layers[index], site), getattr(layer, site)
            moved = (old != new).any(dim=2)
            assert moved[0].all()
            assert not moved[1, -3:-1].any()
            assert moved[1, :-3].all() and moved[1, -1]


def test_windowed_layers_are_skipped_and_nothing_left_is_refused(subject: Any) -> None:
    found = subject("gemma3", None, "windowed")
    operand = random_delta(found.model, found.tokenizer).operand()
    windows = [i for i, s in enumerate(found.memory.model.layers) if s.window is not None]
    edited = Steer(at={"tokens": (0, 2)})(found.memory, operand)
    changed = [i for i in edited.layers if edited.layers[i] is not found.memory.layers[i]]
    assert changed == [i for i in edited.layers if i not in windows]
    with pytest.raises(SpanNotFound, match="holds a slot of the span"):
        Steer(at={"tokens": (0, 2)}, layers=tuple(windows))(found.memory, operand)
    short = Drop({"tokens": (-1, found.memory.tokens_count)})(found.memory)
    with pytest.raises(SpanNotFound, match="holds the slot at='last'"):
        Steer()(short, operand)
    with pytest.raises(SpanNotFound, match="at=-999"):
        Steer(at=-999)(found.memory, operand)


def test_packed_slots_take_values_and_no_keys(subject: Any) -> None:
    from kvedit.editors import Knorm

    found = subject("llama")
    operand = random_delta(found.model, found.tokenizer).operand()
    packed = Knorm(budget=8, layout="packed", rerotate=False)(found.memory)
    assert all(bool((layer.source == -1).any()) for layer in packed.layers.values())
    slots = {"slots": (0, 3)}
    for given in (packed, Chain((Knorm(budget=8, layout="packed"),))(found.memory)):
        with pytest.raises(InvalidArgument, match="another position in every head"):
            Steer(keys=1.0, at=slots)(given, operand)
    edited = Steer(values=2.0, at=slots)(packed, operand)
    moved = edited.layers[0].values - packed.layers[0].values
    assert (moved[:, 1] - 2.0 * operand.layers[0].values[:, 0]).abs().max() <= 1e-6
    rotated = Knorm(budget=8, layout="packed", rerotate=True)(found.memory)
    Steer(keys=1.0, at=slots)(rotated, operand)
    # What is read behind packed slots has its own position.
    ids = found.continuation[:3]
    with kv.attach(found.model, packed) as session:
        session.forward(ids[None])
        grown = session.memory()
    Steer(keys=1.0, at="last")(grown, operand)


def test_memories_without_tokens_count_slots(subject: Any) -> None:
    found = subject("llama")
    bare = dataclasses.replace(
        found.memory,
        source=None,
        layers={
            i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
            for i, layer in found.memory.layers.items()
        },
    )
    edited = Steer(at=-2)(bare, random_delta(found.model, found.tokenizer).operand())
    moved = (edited.layers[1].values != bare.layers[1].values).any(dim=2).all(dim=0)
    assert moved.nonzero().flatten().tolist() == [bare.slots - 2]


def test_layers_of_the_delta_are_what_is_steered(subject: Any) -> None:
    found = subject("llama")
    some = random_delta(found.model, found.tokenizer, layers=(1,)).operand()
    edited = Steer()(found.memory, some)
    assert [i for i in edited.layers if edited.layers[i] is not found.memory.layers[i]] == [1]
    with pytest.raises(UnknownName, match="layer of the delta '2'"):
        Steer(layers=(-1,))(found.memory, some)


def test_refusals_say_what_to_do(subject: Any) -> None:
    found = subject("llama")
    stream = random_delta(found.model, found.tokenizer, sites=("residual",))
    with pytest.raises(InvalidArgument, match=r"steering\.steered\).*compile_residual"):
        Steer()(found.memory, stream.operand())
    values = random_delta(found.model, found.tokenizer, sites=("values",))
    with pytest.raises(InvalidArgument, match="keys=1, and this delta has no keys"):
        Steer(keys=1.0)(found.memory, values.operand())
    with pytest.raises(InvalidArgument, match=r"pass delta\.operand\(\)"):
        Steer()(found.memory, values)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="operand of kind 'delta'"):
        Steer()(found.memory)
    other, tokenizer = tiny_model("llama", seed=3)
    with pytest.raises(IncompatibleModel) as caught:
        Steer()(found.memory, random_delta(other, tokenizer).operand())
    ours = found.memory.model.fingerprint.weights[:12]
    theirs = kv.capture(other, tokenizer, "x").model.fingerprint.weights[:12]
    assert ours in str(caught.value) and theirs in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"at": 0}, "counts from the end"),
        ({"at": True}, "counts from the end"),
        ({"at": 2.5}, "a span is a text"),
        ({"keys": float("nan")}, "keys: expected a finite number"),
        ({"values": "1"}, "values: expected a finite number"),
        ({"kv_heads": HeadSet.of({0: [1]})}, "found query heads"),
        ({"layers": []}, "layers: expected a list"),
        ({"preserve_norm": 1}, "expected a bool"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        Steer(**parameters)


def test_partial_memories_and_ragged_ones(subject: Any) -> None:
    found = subject("llama")
    operand = random_delta(found.model, found.tokenizer).operand()
    some = kv.capture(found.model, found.tokenizer, "The thing is in the box", layers=[1])
    edited = Steer()(some, operand)
    assert (edited.layers[1].values - some.layers[1].values)[:, -1].abs().max() > 0.1
    cut = Truncate(budget=5)(found.memory)
    moved = Steer(keys=1.0, at="all")(cut, operand)
    assert (moved.layers[0].keys != cut.layers[0].keys).any(dim=2).all()


def test_bias_stays_and_emphasis_composes(subject: Any, continued: Any) -> None:
    """Bias and steering touch different tensors: either order gives one memory."""
    found = subject("gemma3")
    operand = random_delta(found.model, found.tokenizer).operand()
    steer, bias = Steer(keys=0.5, values=2.0), Emphasize({"tokens": (-4, -1)}, strength=1.5)
    one, two = bias(steer(found.memory, operand)), steer(bias(found.memory), operand)
    assert one.digest == two.digest
    logits = [continued(found.model, m, found.continuation) for m in (one, found.memory)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert (logits[0] - continued(found.model, two, found.continuation)).abs().max() == 0


def test_a_delta_in_one_memory_is_in_its_row_only(subject: Any) -> None:
    found = subject("gpt_neox")
    steer = Steer(keys=0.5, values=2.0)
    operand = random_delta(found.model, found.tokenizer).operand()
    rows: list[KVMemory] = [found.memory, steer(found.memory, operand)]
    ids = found.continuation[:4]
    with kv.attach(found.model, rows) as session:
        both = session.forward(ids[None].expand(2, 4))
    for row, memory in enumerate(rows):
        with kv.attach(found.model, memory) as session:
            alone = session.forward(ids[None])
        assert (both[row] - alone[0]).abs().max() <= 1e-6
    assert (both[0] - both[1]).abs().max() > 1e-3
