"""Seka against a few lines of numpy that rotate by hand, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Seka, Shift
from kvedit.editors.seka import dense_projectors, random_projectors
from kvedit.errors import IncompatibleModel, InvalidArgument, SpanNotFound, UnknownName
from kvedit.memory import KVMemory
from kvedit.memory.operand import operand_facts
from kvedit.testing import CONTEXT

FAMILIES = ("llama", "qwen3", "gpt_neox", "gemma3", "cohere2", "gpt2")
SPANS = ("refund window", {"tokens": [-8, -2]}, "you would")
TOLERANCE = 1e-5


def reference(
    found: Any, operand: KVMemory, memory: KVMemory, layer: int, plus: float, minus: float | None
) -> np.ndarray:
    """Keys [kv_head, slot, dim] after the edit, one slot at a time."""
    (entry,) = [e for e in operand_facts(operand, "projectors")["layers"] if e["layer"] == layer]
    positive, negative = (p.double().numpy() for p in dense_projectors(operand, layer))
    layer_kv = memory.layers[layer]
    keys = layer_kv.keys.double().numpy().copy()
    inside = np.zeros(keys.shape[1], dtype=bool)
    for span in SPANS:
        inside |= memory.resolve(span).mask(layer_kv).numpy()
    for head in range(keys.shape[0]):
        if entry["difference"][head] < 0.2:
            continue
        for slot in np.flatnonzero(inside):
            turn = found.rotation(layer, int(layer_kv.positions[slot]))
            k = turn.T @ keys[head, slot]
            if minus is None:
                k = k + plus * positive[head] @ k
            else:
                k = k + 0.5 * (plus * positive[head] @ k + minus * negative[head] @ k)
            keys[head, slot] = turn @ k
    return keys


@pytest.mark.parametrize("gains", [(0.8, 0.2), (2.5, -1.0), (0.8, None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_equal_the_reference(family: str, gains: Any, bench: Any) -> None:
    found = bench(family)
    edited = Seka(SPANS, *gains)(found.memory, found.projectors)
    touched = 0
    for layer, old in found.memory.layers.items():
        new = edited.layers[layer]
        if layer not in found.projectors.layers:
            assert new is old
            continue
        expected = reference(found, found.projectors, found.memory, layer, *gains)
        assert np.abs(new.keys.double().numpy() - expected).max() <= TOLERANCE
        touched += int((new.keys != old.keys).any())
        assert new.values is old.values
    assert touched >= 1


def test_a_moved_and_gappy_memory(bench: Any) -> None:
    """Positions are those of the slots, not their places."""
    found = bench("llama")
    memory = Drop({"tokens": [2, 5]})(Shift(700)(found.memory))
    edited = Seka(SPANS)(memory, found.projectors)
    expected = reference(found, found.projectors, memory, 2, 0.8, 0.2)
    assert np.abs(edited.layers[2].keys.numpy() - expected).max() <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_the_edit_does_not_depend_on_where_the_memory_stands(family: str, bench: Any) -> None:
    found = bench(family)
    one = Shift(300)(Seka("you would")(found.memory, found.projectors))
    two = Seka("you would")(Shift(300)(found.memory), found.projectors)
    for layer in one.layers:
        gap = (one.layers[layer].keys - two.layers[layer].keys).abs().max()
        assert gap <= 1e-9


def test_only_the_spans_and_the_heads_that_pass_change(bench: Any) -> None:
    found = bench("gpt_neox")
    facts = operand_facts(found.projectors, "projectors")["layers"][-1]
    floor = sorted(facts["difference"])[1]  # one of four heads stays below
    edited = Seka(SPANS, layers=(-1,), min_difference=floor)(found.memory, found.projectors)
    layer = facts["layer"]
    changed = (edited.layers[layer].keys != found.memory.layers[layer].keys).any(dim=-1)
    inside = torch.zeros(found.memory.slots, dtype=torch.bool)
    for span in SPANS:
        inside |= found.memory.resolve(span).mask(found.memory.layers[layer])
    passes = torch.tensor(facts["difference"]) >= floor
    assert passes.sum() == 3
    assert torch.equal(changed, passes[:, None] & inside[None])


def test_overlapping_spans_are_edited_once(bench: Any) -> None:
    found = bench("llama")
    one = Seka("refund window")(found.memory, found.projectors)
    two = Seka(["refund window", "window", "refund window"])(found.memory, found.projectors)
    assert one.digest == two.digest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_rounds_once(dtype: torch.dtype, bench: Any) -> None:
    found = bench("qwen3")
    memory = found.memory.to(dtype=dtype)
    edited = Seka(SPANS)(memory, found.projectors)
    wide = Seka(SPANS)(memory.to(dtype=torch.float64), found.projectors)
    step = torch.finfo(dtype).eps
    for layer, kept in edited.layers.items():
        exact = wide.layers[layer].keys
        gap = (kept.keys.double() - exact).abs()
        assert (gap <= step * exact.abs() + 1e-6).all()


def test_the_model_sees_it_and_no_hook_is_needed(bench: Any, continued: Any) -> None:
    found = bench("llama")
    edited = Seka("60 days", 3.0)(found.memory, found.projectors)
    assert bool(edited.servable())
    ids = found.reader.encode(" and the answer is that you would wait")
    before, after = (continued(found.model, m, ids) for m in (found.memory, edited))
    assert (before - after).abs().max() > 1e-3


def test_it_survives_a_store(bench: Any, tmp_path: Any) -> None:
    found = bench("llama")
    store = kv.Store(tmp_path)
    store.put(found.projectors, "operands/projectors")
    store.put(found.experts, "operands/experts")
    back = store.get("operands/projectors")
    assert back.digest == found.projectors.digest
    assert store.get("operands/experts").digest == found.experts.digest
    one, two = (Seka(SPANS)(found.memory, operand) for operand in (found.projectors, back))
    assert one.digest == two.digest
    assert "learn_projectors" in one.lineage.describe()


def test_random_projectors_are_a_drop_in(bench: Any) -> None:
    found = bench("llama")
    drawn = random_projectors(found.projectors, 0)
    edited = Seka(SPANS)(found.memory, drawn)
    expected = reference(found, drawn, found.memory, 2, 0.8, 0.2)
    assert np.abs(edited.layers[2].keys.numpy() - expected).max() <= TOLERANCE


def test_zero_gains_change_no_bit(bench: Any) -> None:
    found = bench("llama")
    for minus in (0.0, None):
        same = Seka(SPANS, 0.0, minus)(found.memory, found.projectors)
        assert same.digest == found.memory.digest


def test_wrong_operands_are_refused(bench: Any) -> None:
    found = bench("llama")
    edit = Seka("refund window")
    with pytest.raises(InvalidArgument, match=r"kind 'projectors', found \['KVMemory'\]"):
        edit(found.memory)
    with pytest.raises(InvalidArgument, match=r"found \['KVMemory', 'experts'\]"):
        edit(found.memory, found.experts)
    with pytest.raises(InvalidArgument, match=r"found \['KVMemory', 'KVMemory'\]"):
        edit(found.memory, found.memory)
    with pytest.raises(InvalidArgument, match=r"found \['projectors', 'projectors'\]"):
        edit(found.projectors, found.projectors)
    with pytest.raises(IncompatibleModel, match=r"differ in config .*weights"):
        edit(found.memory, bench("qwen3").projectors)


def test_what_would_do_nothing_is_refused(bench: Any) -> None:
    found = bench("llama")
    with pytest.raises(InvalidArgument, match="no head of the layers"):
        Seka("refund window", min_difference=1e6)(found.memory, found.projectors)
    with pytest.raises(UnknownName, match="layer of the projectors '0'"):
        Seka("refund window", layers=(0,))(found.memory, found.projectors)
    with pytest.raises(SpanNotFound):
        Seka("not in there")(found.memory, found.projectors)
    with pytest.raises(SpanNotFound, match="holds a slot of the span"):
        gone = Drop("refund window")(found.memory)
        Seka(["you would", "refund window"])(gone, found.projectors)


@pytest.mark.parametrize(
    "wrong",
    [
        {"spans": ()},
        {"spans": 3},
        {"gain_positive": float("nan")},
        {"gain_positive": None},
        {"gain_negative": "much"},
        {"layers": ()},
        {"min_difference": -0.1},
    ],
)
def test_wrong_parameters_are_refused(wrong: Any) -> None:
    with pytest.raises(InvalidArgument):
        Seka(**{"spans": "a", **wrong})


def test_equal_ways_to_write_one_edit_are_equal() -> None:
    assert Seka("a") == Seka(["a"]) == Seka({"text": "a"})
    assert hash(Seka("a", 1)) == hash(Seka(("a",), 1.0))
    again = dataclasses.replace(Seka("a", layers=[1, 2]))
    assert again.layers == (1, 2)
    assert CONTEXT.count("refund window") == 1
