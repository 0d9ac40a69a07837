"""compare(a, b): distances over shared slots, and counts of the others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from kvedit.errors import IncompatibleModel
from kvedit.memory import KVMemory, LayerKV, compare


def with_layer(
    memory: KVMemory, index: int, layer: LayerKV | None = None, **parts: Any
) -> KVMemory:
    return memory.with_layers({index: layer or dataclasses.replace(memory.layers[index], **parts)})


def test_a_memory_is_identical_to_itself(toy: Any) -> None:
    found = compare(toy(), toy())
    assert found.identical
    assert found.layers == (0, 1, 2)
    assert found.keys.shape == found.values.shape == (3, 2)
    assert found.bias.shape == (3, 4)
    torch.testing.assert_close(found.keys_cosine, torch.ones(3, 2))
    assert repr(found) == "Comparison: no difference"


def test_distances_are_relative_and_per_head(toy: Any) -> None:
    memory = toy()
    keys = memory.layers[0].keys.clone()
    keys[1] *= 1.5
    values = -memory.layers[2].values
    changed = with_layer(with_layer(memory, 0, keys=keys), 2, values=values)
    found = compare(memory, changed)
    torch.testing.assert_close(found.keys, torch.tensor([[0, 0.5], [0, 0], [0, 0]]))
    torch.testing.assert_close(found.values, torch.tensor([[0.0, 0], [0, 0], [2, 2]]))
    torch.testing.assert_close(found.keys_cosine, torch.ones(3, 2))
    torch.testing.assert_close(found.values_cosine[2], -torch.ones(2))
    assert not found.identical
    assert [line.split()[0] for line in repr(found).splitlines()] == ["layer", "0", "2"]


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bf16", "fp16"]
)
def test_rounding_is_seen_and_is_small(dtype: torch.dtype, bits: int, toy: Any) -> None:
    memory = toy()
    rough = with_layer(memory, 0, keys=memory.layers[0].keys + 0.123456)
    found = compare(rough, rough.to(dtype=dtype))
    assert 0 < float(found.keys.max()) <= 2**-bits
    assert not bool(found.bias.any())
    assert found.only_a == found.only_b == found.moved == (0, 0, 0)


def test_missing_slots_are_counted_and_the_rest_compared(toy: Any) -> None:
    memory = toy()
    dropped = with_layer(memory, 0, memory.layers[0].select(torch.tensor([0, 1, 5, 21])))
    found = compare(memory, dropped)
    assert (found.only_a, found.only_b) == ((18, 0, 0), (0, 0, 0))
    assert compare(dropped, memory).only_b == (18, 0, 0)
    assert not bool(found.keys.any())
    assert not found.identical
    assert "18" in repr(found)


def test_duplicated_slots_are_counted(toy: Any) -> None:
    memory = toy()
    twice = with_layer(memory, 0, memory.layers[0].select(torch.tensor([*range(22), 3, 3])))
    found = compare(memory, twice)
    assert (found.only_a, found.only_b) == ((0, 0, 0), (2, 0, 0))
    assert not bool(found.keys.any())


def test_order_does_not_count(toy: Any) -> None:
    memory = toy()
    turned = with_layer(memory, 2, memory.layers[2].select(torch.arange(21, -1, -1)))
    assert compare(memory, turned).identical


def test_slots_without_tokens_match_by_order(toy: Any) -> None:
    memory = toy()
    bare = with_layer(memory, 0, source=torch.full((22,), -1))
    assert compare(bare, bare).identical
    other = with_layer(bare, 0, keys=bare.layers[0].keys * 2)
    torch.testing.assert_close(compare(bare, other).keys[0], torch.ones(2))


def test_moved_slots_are_counted(toy: Any) -> None:
    memory = toy()
    positions = memory.layers[1].positions.clone()
    positions[:2] -= 3
    found = compare(memory, with_layer(memory, 1, positions=positions))
    assert found.moved == (0, 2, 0)
    assert not found.identical


def test_bias_differs_by_its_largest_gap(toy: Any) -> None:
    memory = toy()
    assert memory.layers[2].bias[2, 0] == -math.inf
    assert bool((compare(memory, memory).bias == 0).all())  # -inf on both sides is no difference
    without = with_layer(memory, 2, bias=None)
    assert compare(memory, without).bias[2].tolist() == [0.0, 1.5, math.inf, 0.0]
    assert compare(without, memory).bias[2].tolist() == [0.0, 1.5, math.inf, 0.0]
    assert not compare(memory, without).identical
    assert "inf" in repr(compare(memory, without))


def test_nothing_in_common_is_no_distance(toy: Any) -> None:
    memory = toy()
    early = with_layer(memory, 0, memory.layers[0].select(torch.arange(3)))
    late = with_layer(memory, 0, memory.layers[0].select(torch.arange(3, 9)))
    found = compare(early, late)
    assert (found.only_a[0], found.only_b[0]) == (3, 6)
    assert found.keys[0].tolist() == [0.0, 0.0]
    assert not bool(found.keys_cosine.isnan().any())


def test_only_shared_layers_are_compared(toy: Any) -> None:
    memory = toy()
    some = dataclasses.replace(memory, layers={2: memory.layers[2]})
    assert compare(memory, some).layers == (2,)
    other = dataclasses.replace(memory, layers={0: memory.layers[0]})
    with pytest.raises(IncompatibleModel, match="no layer in common"):
        compare(some, other)


def test_models_of_another_shape_are_refused(toy: Any) -> None:
    memory = toy()
    spec = dataclasses.replace(memory.model, name="bigger", layers=(*memory.model.layers,) * 2)
    with pytest.raises(IncompatibleModel, match="toy and bigger: layers, heads or dims differ"):
        compare(memory, dataclasses.replace(memory, model=spec))
