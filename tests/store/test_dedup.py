"""An edit costs what it changed: a 4,096-token memory of SmolLM2-135M's shape."""

import dataclasses

import pytest
import torch

from kvedit.memory import KVMemory, LayerKV, Lineage, LineageNode
from kvedit.store import Store

from .conftest import build_source, build_spec

LAYERS, HEADS, QUERY_HEADS, DIM, SLOTS = 30, 3, 9, 64, 4096
SPAN = slice(1000, 1040)


def big(dtype):
    draw = torch.Generator().manual_seed(0)
    spec = build_spec(LAYERS, HEADS, DIM)
    layers = tuple(dataclasses.replace(layer, query_heads=QUERY_HEADS) for layer in spec.layers)
    slot = torch.arange(SLOTS)
    shape = (HEADS, SLOTS, DIM)
    memory = {
        index: LayerKV(
            torch.randn(shape, generator=draw).to(dtype),
            torch.randn(shape, generator=draw).to(dtype),
            slot,
            slot,
        )
        for index in range(LAYERS)
    }
    return KVMemory(
        memory,
        dataclasses.replace(spec, layers=layers),
        SLOTS,
        build_source(SLOTS, "text", draw),
        Lineage((LineageNode("capture", "capture", 1, "{}"),)),
    )


def biased(memory, where, strength):
    changed = {}
    for index, layer in memory.layers.items():
        bias = torch.zeros(QUERY_HEADS, SLOTS)
        bias[:, where] = strength(index)
        changed[index] = layer.add_bias(bias)
    return memory.with_layers(changed)


def moved(memory, where, kinds):
    changed = {}
    for index, layer in memory.layers.items():
        tensors = {kind: getattr(layer, kind).clone() for kind in kinds}
        for tensor in tensors.values():
            tensor[:, where] += 0.5
        changed[index] = dataclasses.replace(layer, **tensors)
    return memory.with_layers(changed)


def per_head(index):
    return torch.linspace(0.1, 1.0 + index, QUERY_HEADS)[:, None]


REST = torch.ones(SLOTS, dtype=torch.bool)
REST[SPAN] = False
EDITS = {
    "bias on a span": (lambda m: biased(m, SPAN, lambda _: 1.5), 0.01),
    "bias on the rest": (lambda m: biased(m, REST, lambda _: -0.7), 0.01),
    "bias on the rest, per layer and head": (lambda m: biased(m, REST, per_head), 0.01),
    "keys of a span": (lambda m: moved(m, SPAN, ("keys",)), 0.10),
    "keys and values of one token": (lambda m: moved(m, slice(77, 78), ("keys", "values")), 0.10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_edit_costs_what_it_changed(tmp_path, dtype, record_property):
    store = Store(tmp_path / "s", "none")
    memory = big(dtype)
    store.put(memory, "base")
    base = store.counters.bytes_written
    for name, (edit, bar) in EDITS.items():
        before = store.counters.bytes_written
        edited = edit(memory)
        store.put(edited, "edit", force=True)
        share = (store.counters.bytes_written - before) / base
        record_property(name, f"{share:.4%}")
        print(f"{name}: {share:.3%} of {base / 1e6:.0f} MB")
        assert share <= bar, name
        assert store.get("edit").digest == edited.digest
