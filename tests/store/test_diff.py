"""What a diff says of two stored memories, against sums over their blocks and tensors."""

import dataclasses

import pytest
import torch

from kvedit.errors import IncompatibleModel, NotFound
from kvedit.store import Store
from kvedit.store.diff import diff_blocks, diff_memories

from .conftest import build_memory, with_bias


def with_keys(memory, layer, slots, delta):
    keys = memory.layers[layer].keys.clone()
    keys[:, slots] += delta
    changed = dataclasses.replace(memory.layers[layer], keys=keys)
    return memory.with_layers({layer: changed}, lineage=memory.lineage)


def test_blocks_add_up(store):
    a = build_memory(slots=600)
    b = with_keys(a, 1, [300], 1.0)
    store.put(a, "a")
    store.put(b, "b")
    sizes = [{block.digest: block.tensor.nbytes for block in m.cut()} for m in (a, b)]
    found = diff_blocks(store, "a", "b")
    assert (found.shared, found.only_a, found.only_b) == (len(sizes[0]) - 1, 1, 1)
    assert found.shared_bytes + found.only_a_bytes == sum(sizes[0].values())
    assert found.shared_bytes + found.only_b_bytes == sum(sizes[1].values())
    assert found.only_b_bytes == 2 * 256 * 8 * 4
    same = diff_blocks(store, "a", "a")
    assert (same.shared, same.only_a, same.only_b) == (len(sizes[0]), 0, 0)


def test_blocks_read_no_tensors(store):
    store.put(build_memory(), "a")
    store.put(with_bias(build_memory()), "b")
    with Store(store.path) as fresh:
        diff_blocks(fresh, "a", "b")
        assert fresh.counters.bytes_read < 100_000


def test_the_largest_changes_come_first(store):
    a = build_memory(slots=40)
    b = with_keys(with_keys(a, 0, [3], 0.1), 2, [5, 7], 10.0)
    store.put(a, "m")
    store.put(b, "m")
    found = diff_memories(store, "m@{1}", "m")
    assert [(one.layer, one.slot_a, one.token) for one in found.slots[2:]] == [(0, 3, 3)]
    assert {one.slot_a for one in found.slots[:2]} == {5, 7}
    assert found.changed == 3
    for one in found.slots:
        keys = [m.layers[one.layer].keys[:, one.slot_a] for m in (a, b)]
        norm = float((keys[0] - keys[1]).norm())
        assert one.keys == pytest.approx(norm)
        assert one.relative == pytest.approx(norm / float(keys[0].norm()))
        assert (one.values, one.bias) == (0.0, 0.0)
        start, stop = a.source.offsets[one.token].tolist()
        assert one.text == a.source.text[start:stop]
    short = diff_memories(store, "m@{1}", "m", slots=1)
    assert short.slots == found.slots[:1]
    assert short.changed == 3


def test_bias_steps_and_shifted_slots(store):
    a = build_memory(slots=30)
    edited = with_bias(a, layer=1, value=-torch.inf)
    kept = torch.arange(10, 30)
    layers = {index: layer.select(kept) for index, layer in edited.layers.items()}
    b = edited.with_layers(layers, lineage=edited.lineage)
    store.put(a, "a")
    store.put(b, "b")
    found = diff_memories(store, "a", "b", slots=100)
    assert found.changed == 20
    assert {one.layer for one in found.slots} == {1}
    assert all(one.slot_a - one.slot_b == 10 and one.bias == torch.inf for one in found.slots)
    assert found.comparison.only_a == (10, 10, 10)
    assert found.steps_a == ()
    assert len(found.steps_b) == 1
    # Evicted on both sides is no change.
    assert diff_memories(store, "b", "b").changed == 0


def test_what_cannot_be_compared(store):
    store.put(build_memory(), "a")
    store.put(build_memory(heads=4), "b")
    with pytest.raises(IncompatibleModel):
        diff_memories(store, "a", "b")
    with pytest.raises(NotFound):
        diff_blocks(store, "a", "c")
