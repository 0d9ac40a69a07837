"""Budgets, identities, memories that were edited before, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.editors import (
    TOVA,
    Drop,
    Duplicate,
    Emphasize,
    ExpectedAttention,
    KeyDiff,
    Knorm,
    KVZip,
    RandomKeep,
    Shift,
    SnapKV,
    StreamingLLM,
    Truncate,
    build,
)
from kvedit.editors.base import registered_name
from kvedit.editors.compacting.budget import slots_kept
from kvedit.errors import InvalidArgument, KVEditError
from kvedit.memory import KVMemory
from kvedit.runtime import ModelReader

ALL = [
    Truncate, RandomKeep, Knorm, KeyDiff, StreamingLLM, TOVA, SnapKV, ExpectedAttention, KVZip,
]  # fmt: skip
named = {"ids": lambda cls: cls.__name__}
every_method = pytest.mark.parametrize("cls", ALL, **named)


@every_method
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("rerotate", [False, True])
def test_the_whole_budget_changes_no_bit(
    cls: Any, family: str, rerotate: bool, subject: Any
) -> None:
    found = subject(family)
    whole = found.memory
    if family == "gemma3":  # what lies before a window goes when slots move
        whole = subject(family, window="windowed").memory
    for budget in (1.0, whole.tokens_count):
        for layout in ("masked", "packed"):
            editor = cls(budget, layout=layout, rerotate=rerotate)
            edited = found.apply(editor, whole)
            assert all(edited.layers[i] is layer for i, layer in whole.layers.items())
            assert edited.digest == whole.digest
            assert edited.lineage.head.name == registered_name(cls)


@every_method
def test_a_float_stays_a_float_in_the_lineage(cls: Any, subject: Any) -> None:
    """1.0 keeps all, and 1 would be equal to it: it is refused."""
    found = subject("llama")
    for budget in (1.0, 0.5, 20):
        editor = cls(budget, **({"window": 4} if cls is SnapKV else {}))
        node = found.apply(editor).lineage.head
        again = build(node.name, **json.loads(node.parameters))
        assert again == editor and hash(again) == hash(editor)
        assert type(again.budget) is type(budget)
    with pytest.raises(InvalidArgument, match="whole number from 2"):
        cls(1)


@pytest.mark.parametrize(
    "budget", [True, False, 0, 1, -3, 0.0, 1.5, -0.1, float("nan"), "0.5", None]
)
def test_a_budget_is_a_ratio_or_a_number(budget: Any) -> None:
    with pytest.raises(InvalidArgument, match="budget: expected a ratio in"):
        Knorm(budget)


def test_ratios_are_rounded_down_without_float_noise() -> None:
    slots = torch.tensor([100, 10, 3, 1, 0])
    assert slots_kept(0.29, slots).tolist() == [29, 2, 1, 1, 0]
    assert slots_kept(0.7, slots).tolist() == [70, 7, 2, 1, 0]
    assert slots_kept(1.0, slots).tolist() == slots.tolist()
    assert slots_kept(8, slots).tolist() == [8, 8, 3, 1, 0]


def test_more_slots_than_there_are(subject: Any) -> None:
    memory = subject("llama").memory
    with pytest.raises(InvalidArgument, match=r"budget of 55 slots.*memory has 54"):
        Knorm(55)(memory)
    few = Drop({"tokens": [0, 30]}, layers=(0,))(memory)
    edited = Knorm(40, heads="shared")(few)
    assert [layer.slots for layer in edited.layers.values()] == [24, 40, 40]
    assert edited.layers[0] is few.layers[0]


@pytest.mark.parametrize(
    ("editor", "told"),
    [
        (Knorm(5, sinks=4, recent=2), r"6 slots.*sinks=4, recent=2.*budget of 5"),
        (StreamingLLM(3), r"4 slots.*budget of 3"),
        (SnapKV(0.1, window=6), r"6 slots.*window=6.*budget of 5"),
        (KVZip(0.05), r"4 slots.*budget of 2"),
    ],
)
def test_what_is_kept_anyway_must_fit(editor: Any, told: str, subject: Any) -> None:
    with pytest.raises(InvalidArgument, match=told):
        subject("llama").apply(editor)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Knorm(0.5, sinks=-1), "sinks: expected a whole number from 0"),
        (lambda: Knorm(0.5, recent=1.5), "recent: expected a whole number from 0"),
        (lambda: Knorm(0.5, layers=()), "layers: expected a list"),
        (lambda: Knorm(0.5, heads="all"), r"heads must be one of \['each', 'shared'\]"),
        (lambda: Truncate(0.5, heads="each"), r"heads must be one of \['shared'\]"),
        (lambda: StreamingLLM(0.5, heads="each"), r"heads must be one of \['shared'\]"),
        (lambda: Knorm(0.5, layout="dense"), "layout must be 'masked' or 'packed'"),
        (lambda: Knorm(0.5, rerotate=1), "rerotate must be true or false"),
        (lambda: Truncate(0.5, keep="middle"), "keep must be 'first' or 'last'"),
        (lambda: RandomKeep(0.5, seed=-1), "seed: expected a whole number from 0"),
        (lambda: TOVA(0.5, prompt=""), "prompt: expected a text"),
        (lambda: SnapKV(0.5, window=0), "window: expected a whole number from 1"),
        (lambda: SnapKV(0.5, kernel=4), "kernel: expected an odd number"),
        (lambda: SnapKV(0.5, pooling="min"), r"pooling must be one of \['average', 'max'\]"),
        (lambda: ExpectedAttention(0.5, future=0), "future: expected a whole number from 1"),
        (lambda: ExpectedAttention(0.5, epsilon=-0.1), "epsilon: expected a finite number"),
        (lambda: ExpectedAttention(0.5, covariance=0), "covariance must be true or false"),
        (lambda: KVZip(0.5, pool="all"), "pool must be 'model', 'layer' or 'head'"),
        (lambda: KVZip(0.5, chunk=0), "chunk: expected a whole number from 1"),
        (lambda: KVZip(0.5, suffix=None), "suffix: expected a text"),
    ],
)
def test_bad_parameters_say_what_was_expected(make: Any, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        make()


def test_a_model_that_only_slides_has_nothing_to_choose(subject: Any) -> None:
    found = subject("mistral")
    with pytest.raises(
        InvalidArgument, match=r"every layer of this memory attends within a window"
    ):
        found.apply(Knorm(0.5))
    edited = found.apply(Knorm(3, layers=(0, 1, 2), heads="shared"))
    assert {layer.slots for layer in edited.layers.values()} == {3}


def without_tokens(memory: KVMemory) -> KVMemory:
    layers = {
        i: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for i, layer in memory.layers.items()
    }
    return dataclasses.replace(memory, layers=layers, source=None)


def test_memories_that_cannot_be_read_say_so(subject: Any) -> None:
    found = subject("llama")
    bare = without_tokens(found.memory)
    for editor in (TOVA(0.5), SnapKV(0.5, window=4), ExpectedAttention(0.5), KVZip(0.5)):
        with pytest.raises(InvalidArgument, match=r"reader="):
            editor(found.memory)
        with pytest.raises(InvalidArgument, match=r"has none|found 0"):
            found.apply(editor, bare)
    asked = " and who would wait?"
    for query_aware in (TOVA(9, prompt=asked), SnapKV(9, prompt=asked),
                        ExpectedAttention(9, prompt=asked)):  # fmt: skip
        for layer in found.apply(query_aware, bare).layers.values():
            assert 9 <= layer.slots <= 18
        with pytest.raises(InvalidArgument, match=r"make ModelReader\(model, tokenizer\)"):
            query_aware(bare, reader=ModelReader(found.model))
    with pytest.raises(InvalidArgument, match=r"54 slots are kept in any case.*window=54"):
        found.apply(SnapKV(0.9, window=54))
    with pytest.raises(InvalidArgument, match=r"1 tokens are to observe.*has 1 tokens"):
        one = kv.capture(found.model, None, [5])
        found.apply(TOVA(2), Duplicate({"tokens": [0, 1]}, 3)(one))
    packed = Knorm(40, recent=6, layout="packed")(found.memory)
    with pytest.raises(InvalidArgument, match="do not stand alone right before"):
        found.apply(SnapKV(20, window=4), packed)
    assert found.apply(SnapKV(20, window=4, prompt=asked), packed).layers[0].slots >= 20
    moved = StreamingLLM(30, rerotate=True)(found.memory)
    assert found.apply(TOVA(20), moved).layers[0].slots == 20  # its last tokens moved as one


def test_the_last_tokens_are_read_over_what_an_edit_left(
    subject: Any, own_pass: Any, kept_sets: Any
) -> None:
    """Dropped tokens are hidden from the window's queries alone, as at an edit of the memory."""
    found, window = subject("llama"), 5
    tokens, count = found.memory.tokens, found.memory.tokens_count
    memory = Shift(7)(Drop({"tokens": [12, 30]})(found.memory))
    own = own_pass(found.model, tokens, (12, 30, count - window))
    plain = own_pass(found.model, tokens)
    edited = found.apply(SnapKV(14, window=window, kernel=1), memory)
    early = [*range(12), *range(30, count - window)]
    differs = False
    for layer in edited.layers:
        for head, kept in enumerate(kept_sets(edited, layer)):
            sets = []
            for one in (own, plain):
                seen = one.attention[layer][2 * head : 2 * head + 2, -window:][:, :, early]
                order = np.argsort(-seen.mean((0, 1)), kind="stable")[: 14 - window]
                sets.append({early[i] for i in order} | set(range(count - window, count)))
            assert kept == sets[0]
            differs |= sets[0] != sets[1]
    assert differs


def test_evicted_slots_are_neither_chosen_nor_counted(subject: Any, kept_sets: Any) -> None:
    found = subject("qwen3")
    first = found.apply(RandomKeep(30, seed=1))
    before = {i: kept_sets(first, i) for i in first.layers}
    for editor in (
        RandomKeep(0.5, seed=2, sinks=2), Knorm(0.5), KeyDiff(0.5), TOVA(15, heads="each"),
        SnapKV(0.5, window=3, prompt=" who?"), ExpectedAttention(0.5), KVZip(0.5, pool="head"),
    ):  # fmt: skip
        second = found.apply(editor, first)
        for index in first.layers:
            for old, new in zip(before[index], kept_sets(second, index), strict=True):
                assert new < old
                assert len(new) == 15
                if isinstance(editor, RandomKeep):
                    assert set(sorted(old)[:2]) <= new  # its own first slots
    shared = found.apply(Truncate(10), first)
    assert kept_sets(shared, 0) == [{*sorted(set.union(*before[0]))[:10]} & s for s in before[0]]


def test_layers_are_named_from_either_end(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Knorm(9, layers=(-1, 0))(memory)
    assert edited.layers[1] is memory.layers[1]
    assert edited.layers[0].slots < 54 > edited.layers[2].slots
    with pytest.raises(KVEditError, match="unknown layer '7'"):
        Knorm(9, layers=(7,))(memory)


def test_keys_that_differ_by_dtype_are_scored_wide(subject: Any) -> None:
    memory = subject("llama").memory.to(dtype=torch.bfloat16)
    norms = memory.layers[0].keys.double().norm(dim=-1)
    kept = Knorm(9).select(memory)[0]
    assert kept.shape == (2, 54)
    for head in range(2):
        threshold = norms[head].sort().values[8]
        assert norms[head][kept[head]].max() <= threshold + 1e-6


def test_spans_and_bias_go_on_after_it(subject: Any) -> None:
    memory = Knorm(0.6)(subject("llama").memory)
    later = Emphasize("you would", strength=1.0)(memory)
    assert later.digest != memory.digest
    assert memory.tokens_count == 54
