"""Drop and Keep: which slots are left, where they stand, and for which heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kvedit.editors import Drop, Keep, Suppress
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory import SpanQuery
from kvedit.testing.tolerances import FP64_ORACLE

SPAN = SpanQuery(tokens=(-9, -3))


def sources(memory: Any) -> list[set[int]]:
    return [set(layer.source.tolist()) for layer in memory.layers.values()]


@pytest.mark.parametrize("window", ["whole", "windowed"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_drop_and_keep_are_complements(family: str, window: str, subject: Any) -> None:
    memory = subject(family, window=window).memory
    dropped, kept = Drop(SPAN)(memory), Keep(SPAN)(memory)
    for whole, left, right in zip(*map(sources, (memory, dropped, kept)), strict=True):
        assert left | right == whole
        assert not left & right
        assert right == whole & set(range(memory.tokens_count - 9, memory.tokens_count - 3))


def test_what_is_left_is_untouched(subject: Any) -> None:
    memory = subject("llama").memory
    dropped = Drop(SPAN)(memory)
    keep = [i for i in range(memory.slots) if not memory.slots - 9 <= i < memory.slots - 3]
    for index, layer in dropped.layers.items():
        old = memory.layers[index]
        assert layer.positions.tolist() == keep == layer.source.tolist()
        assert torch.equal(layer.keys, old.keys[:, keep])
        assert torch.equal(layer.values, old.values[:, keep])
        assert layer.bias is None
    assert dropped.next_position == memory.next_position
    assert dropped.source is memory.source
    assert dropped.nbytes * memory.slots == memory.nbytes * (memory.slots - 6)


def test_dropping_in_pieces_is_dropping_at_once(subject: Any) -> None:
    memory = subject("llama").memory
    once = Drop(SPAN)(memory)
    pieces = Drop({"tokens": [-5, -3]})(Drop({"tokens": [-9, -5]})(memory))
    assert pieces.digest == once.digest
    assert Drop(SPAN)(once).digest == once.digest


def test_keeping_one_part_is_dropping_the_others(subject: Any) -> None:
    memory = subject("llama").memory
    size = memory.tokens_count
    others = memory.find(tokens=(0, size - 9)) | memory.find(tokens=(size - 3, size))
    assert Keep(SPAN)(memory).digest == Drop(others)(memory).digest


def test_layers_may_become_ragged(subject: Any) -> None:
    memory = subject("llama").memory
    ragged = Drop(SPAN, layers=(0, -1))(memory)
    total = memory.slots
    assert [layer.slots for layer in ragged.layers.values()] == [total - 6, total, total - 6]
    assert ragged.layers[1] is memory.layers[1]
    assert not ragged.servable()
    assert any("differ in slots" in reason for reason in ragged.servable().reasons)
    assert memory.servable()


def test_eviction_leaves_slots_and_bytes_for_other_heads(subject: Any) -> None:
    memory = subject("llama").memory
    evicted = Drop(SPAN, layers=(1,), kv_heads=(1,))(memory)
    bias = evicted.layers[1].bias
    assert bias is not None
    inside = memory.resolve(SPAN).mask(memory.layers[1])
    assert bool((bias[:2] == 0).all())
    assert bool((bias[2:][:, inside] == -math.inf).all())
    assert bool((bias[2:][:, ~inside] == 0).all())
    assert evicted.layers[1].keys is memory.layers[1].keys
    assert evicted.layers[0].bias is None
    by_keep = Keep(SPAN, layers=(1,), heads=(0,))(memory).layers[1].bias
    assert by_keep is not None
    assert bool((by_keep[0, ~inside] == -math.inf).all())
    assert not bool(by_keep[0, inside].any())
    assert not bool(by_keep[1:].any())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_evicting_for_all_heads_is_dropping(family: str, subject: Any, continued: Any) -> None:
    found = subject(family)
    heads = tuple(range(found.memory.model.layers[0].query_heads))
    gone = continued(found.model, Drop(SPAN)(found.memory), found.continuation)
    evicted = continued(found.model, Drop(SPAN, heads=heads)(found.memory), found.continuation)
    assert (gone - evicted).abs().max() <= FP64_ORACLE


def test_bias_travels_with_its_slot(subject: Any) -> None:
    memory = subject("llama").memory
    biased = Suppress({"tokens": [-4, -1]}, strength=1.5)(memory)
    dropped = Drop(SPAN)(biased)
    expected = dict.fromkeys(range(memory.slots - 4, memory.slots - 1), -1.5)
    for layer in dropped.layers.values():
        assert layer.bias is not None
        found = dict(zip(layer.source.tolist(), layer.bias[3].tolist(), strict=True))
        assert found == {source: expected.get(source, 0.0) for source in found}
        assert memory.slots - 4 not in found


@pytest.mark.parametrize("heads", [{}, {"heads": (0,)}, {"kv_heads": (1,)}])
def test_a_layer_never_loses_all_slots(heads: dict[str, Any], subject: Any) -> None:
    memory = subject("llama").memory
    everything = {"slots": [0, memory.slots]}
    with pytest.raises(InvalidArgument, match=rf"lose all of its {memory.slots} slots"):
        Drop(everything, **heads)(memory)
    only_late = Keep({"tokens": [-3, -1]})(memory)
    with pytest.raises(InvalidArgument, match="lose all of its 2 slots"):
        Keep({"tokens": [0, 3]}, **heads)(only_late)


def test_a_span_of_another_memory_must_fit(subject: Any) -> None:
    memory = subject("llama").memory
    span = memory.find("you would")
    assert Drop(span)(memory).digest == Drop("you would")(memory).digest
    longer = SpanQuery(slots=(0, memory.slots)).resolve(memory)
    with pytest.raises(SpanNotFound, match=f"this memory has {memory.slots - 6} slots"):
        Drop(longer)(Drop(SPAN)(memory))
