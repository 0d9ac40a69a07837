"""Hand-built memories: random tensors, no model."""

import dataclasses

import pytest
import torch

from kvedit.memory import (
    ChatState,
    Fingerprint,
    KVMemory,
    LayerKV,
    LayerSpec,
    Lineage,
    LineageNode,
    Message,
    ModelSpec,
    RopeSpec,
    Source,
)
from kvedit.store import Store


def build_spec(layers, heads=2, dim=8, name="hand-built"):
    rope = RopeSpec("default", tuple(1e4 ** (-i / dim) for i in range(dim // 2)), 1.0, "half")
    layer = LayerSpec("full", 2 * heads, heads, dim, dim, dim**-0.5, rope=rope)
    prints = Fingerprint(config="c" * 64, weights="w" * 64, tokenizer="t" * 64)
    return ModelSpec("llama", name, (layer,) * layers, "rope", 2048, 1000, prints)


def build_memory(
    seed=0,
    layers=3,
    slots=300,
    dtype=torch.float32,
    heads=2,
    dim=8,
    ragged=False,
    bias=False,
    source="text",
):
    """A memory of random tensors; ``source`` is "text", "chat" or None."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for index in range(layers):
        count = max(slots - 97 * index, 0) if ragged else slots
        own = torch.arange(slots - count, slots)
        added = None
        if bias and index % 2 == 0:
            added = torch.randn(2 * heads, count, generator=draw)
            added[:, ::7] = -torch.inf
        parts[index] = LayerKV(
            keys=torch.randn(heads, count, dim, generator=draw).to(dtype),
            values=torch.randn(heads, count, dim, generator=draw).to(dtype),
            positions=own,
            source=own if source else torch.full_like(own, -1),
            bias=added,
        )
    parameters = f'{{"seed":{seed}}}'
    node = LineageNode("capture", "capture", 1, parameters, environment=(("threads", "1"),))
    return KVMemory(
        layers=parts,
        model=build_spec(layers, heads, dim),
        next_position=slots,
        source=build_source(slots, source, draw),
        lineage=Lineage((node,)),
        rules=({"kind": "mass", "version": 1, "target": 0.25},) if bias else (),
    )


def build_source(slots, kind, draw):
    if kind is None:
        return None
    start = torch.arange(slots) * 2
    return Source(
        tokens=torch.randint(0, 1000, (slots,), generator=draw),
        text="é " * slots,
        offsets=torch.stack([start, start + 1], dim=1),
        messages=(Message("system", "é é", 0, 3), Message("user", "é")) if kind == "chat" else (),
        chat=ChatState("d" * 64, slots) if kind == "chat" else None,
    )


def with_bias(memory, layer=0, value=1.5):
    """What an editor does: the bias of one layer, one step more of lineage."""
    heads, slots = memory.model.layers[layer].query_heads, memory.layers[layer].slots
    node = LineageNode("edit", "bias", 1, f'{{"value":{value}}}', inputs=(memory.lineage.head.id,))
    changed = memory.layers[layer].add_bias(torch.full((heads, slots), value))
    return memory.with_layers({layer: changed}, lineage=Lineage.join([memory.lineage], node))


def with_message(memory, parameters):
    """Equal content, another lineage."""
    node = LineageNode("edit", "noop", 1, parameters, inputs=(memory.lineage.head.id,))
    return dataclasses.replace(memory, lineage=Lineage.join([memory.lineage], node))


def assert_same(a, b):
    """Bit-equal tensors, equal everything else."""
    assert list(a.layers) == list(b.layers)
    for index in a.layers:
        left, right = dict(a.layers[index].tensors()), dict(b.layers[index].tensors())
        assert left.keys() == right.keys()
        for kind in left:
            assert left[kind].dtype == right[kind].dtype
            assert right[kind].is_contiguous()
            assert torch.equal(left[kind].view(torch.uint8), right[kind].view(torch.uint8)), kind
    assert (a.model, a.next_position, a.rules) == (b.model, b.next_position, b.rules)
    assert a.lineage == b.lineage
    assert (a.source is None) == (b.source is None)
    if a.source is not None:
        assert torch.equal(a.source.tokens, b.source.tokens)
        assert torch.equal(a.source.offsets, b.source.offsets)
        assert a.source.to_json() == b.source.to_json()
    assert a.digest == b.digest


def files(store, pattern="**/*"):
    return sorted(path for path in store.path.glob(pattern) if path.is_file())


def temporaries(store):
    return list(store.path.glob("**/.tmp-*"))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "memories", durability="process") as opened:
        yield opened


def small(seed=0, **how):
    """A memory of a few hundred bytes."""
    return build_memory(seed, **{"layers": 1, "slots": 4, **how})


def pack_bytes(store):
    return sum(path.stat().st_size for path in files(store, "packs/*"))


def every_byte(root):
    """The bytes of every file below a folder, by path."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
