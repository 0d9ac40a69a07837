"""What comes out of a store is what went in, bit by bit, in whatever process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from kvedit.errors import InvalidArgument, MutatedMemory, UnknownName
from kvedit.memory.blocks import blocks
from kvedit.memory.digest import digest_bytes
from kvedit.store import Store
from kvedit.store.pack import Pack

from .conftest import assert_same, build_memory, files, with_bias

SHAPES = {
    "plain": {},
    "ragged": {"ragged": True, "slots": 350, "bias": True},
    "an empty layer": {"ragged": True, "slots": 97},
    "one slot": {"slots": 1, "layers": 1},
    "no slots": {"slots": 0, "source": None},
    "whole blocks": {"slots": 512, "bias": True},
    "no source": {"source": None, "bias": True},
    "chat": {"source": "chat"},
    "odd heads": {"heads": 3, "dim": 2, "slots": 259},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_round_trip_is_bit_equal(store, dtype, shape):
    memory = build_memory(dtype=dtype, **shape)
    record = store.put(memory, "m")
    assert record.content == memory.digest
    assert_same(store.get("m"), memory)
    assert store.get("m").verified


def test_nan_and_negative_zero_keep_their_bits(store):
    memory = build_memory(layers=1)
    keys = memory.layers[0].keys.clone()
    keys.view(torch.int32)[0, 0, :3] = torch.tensor([0x7FC01234, -0x80000000, 0x7F800001])
    layer = {"keys": keys}
    memory = memory.with_layers(
        {0: type(memory.layers[0])(**dict(memory.layers[0].tensors()) | layer)}
    )
    store.put(memory, "m")
    assert_same(store.get("m"), memory)


def test_a_fresh_process_with_another_hash_seed_reads_it(store):
    memory = build_memory(bias=True, source="chat")
    store.put(memory, "m")
    code = (
        "import sys; from kvedit.store import Store; "
        "memory = Store(sys.argv[1]).get('m'); print(memory.digest, memory.lineage.head.id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [memory.digest, memory.lineage.head.id]


def test_some_layers(store):
    memory = build_memory(layers=4, ragged=True, slots=400, bias=True)
    store.put(memory, "m")
    part = store.get("m", layers=[-1, 1])
    assert list(part.layers) == [1, 3]
    assert not part.complete
    for index in part.layers:
        for kind, tensor in part.layers[index].tensors():
            assert torch.equal(tensor, getattr(memory.layers[index], kind))
    with pytest.raises(UnknownName, match="layer '9'"):
        store.get("m", layers=[9])
    with pytest.raises(UnknownName, match="layer '-1'"):
        store.get("m", layers=[-5])
    with pytest.raises(InvalidArgument, match="empty"):
        store.get("m", layers=[])


def test_some_layers_cost_only_their_blocks(store):
    memory = build_memory(layers=4)
    record = store.put(memory, "m")
    store.get("m", layers=[0])
    source = memory.source.tokens.nbytes + memory.source.offsets.nbytes
    expected = len(store._finder.paper(record.record)) + memory.layers[0].nbytes + source
    assert store.counters.bytes_read == expected


def test_a_memory_of_some_layers_is_stored_as_such(store):
    store.put(build_memory(layers=4), "m")
    part = store.get("m", layers=[2])
    store.put(part, "part")
    assert_same(store.get("part"), part)
    with pytest.raises(UnknownName):
        store.get("part", layers=[0])


def test_device_and_dtype(store):
    memory = build_memory()
    store.put(memory, "m")
    assert store.get("m", device="cpu").digest == memory.digest
    half = store.get("m", dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.digest == memory.to(dtype=torch.float16).digest


def test_unverified_is_marked(store):
    memory = build_memory()
    store.put(memory, "m")
    read = store.get("m", verify="off")
    assert not read.verified
    assert read.digest == memory.digest
    with pytest.raises(InvalidArgument, match="verify"):
        store.get("m", verify="some")


def test_views_and_tensors_with_gradients(store):
    memory = build_memory()
    wide = torch.randn(2, 300, 16)
    layers = dict(memory.layers)
    layer = dict(layers[0].tensors())
    layer |= {"keys": wide[..., ::2], "values": wide[..., 8:].requires_grad_()}
    memory = memory.with_layers({0: type(layers[0])(**layer)})
    store.put(memory, "m")
    assert store.get("m").digest == memory.digest


def test_a_memory_changed_in_place_is_refused(store):
    memory = build_memory()
    memory.layers[1].keys.mul_(2)
    with pytest.raises(MutatedMemory, match="keys"):
        store.put(memory, "m")
    assert store.names() == []


def test_an_edit_costs_what_it_changed(store):
    memory = build_memory(slots=512, dim=64)
    store.put(memory, "m")
    size = sum(path.stat().st_size for path in files(store, "packs/*"))
    store.put(with_bias(memory), "m")
    grown = sum(path.stat().st_size for path in files(store, "packs/*")) - size
    bias = store.get("m").layers[0].bias
    assert 0 < grown <= bias.nbytes + 1000
    assert_same(store.get("m@{1}"), memory)
    assert_same(store.get("m"), with_bias(memory))


def test_equal_blocks_are_stored_once(store):
    store.put(build_memory(), "a")
    written = store.counters.bytes_written
    store.put(build_memory(), "b")
    assert len(files(store, "packs/*")) == 1
    assert store.counters.bytes_written - written < 2000  # a line of the log


def test_the_same_record_again_writes_nothing(store):
    first = store.put(build_memory(), "m", message="one")
    written = store.counters.bytes_written
    assert store.put(build_memory(), "m", message="two") == first
    assert store.counters.bytes_written == written
    assert len(store.log("m")) == 1


def test_packs_are_safetensors_files(store):
    memory = build_memory(dtype=torch.bfloat16, bias=True, slots=301)
    store.put(memory, "m")
    (path,) = files(store, "packs/*")
    whole = {
        (index, kind): tensor
        for index, layer in memory.layers.items()
        for kind, tensor in layer.tensors()
    }
    stored = {block.digest: block.tensor for block in blocks(memory)}
    with safe_open(path, "pt") as pack:
        (facts,) = map(json.loads, pack.metadata().values())
        assert set(pack.keys()) == facts["extents"].keys() | facts["manifests"].keys()
        held = [b for extent in facts["extents"].values() for b in extent["blocks"]]
        assert sorted(held) == sorted(stored)
        for name, extent in facts["extents"].items():
            found = pack.get_tensor(name)
            if extent["kind"] in ("keys", "values", "positions"):  # whole, in one piece
                wanted = [t for (_, kind), t in whole.items() if kind == extent["kind"]]
                assert any(torch.equal(found, tensor) for tensor in wanted)


def test_a_record_digest_is_that_of_the_manifest(store):
    record = store.put(build_memory(), "m")
    assert record.record == digest_bytes(store._finder.paper(record.record))
    (path,) = files(store, "packs/*")
    assert record.record in Pack.open(path).manifests


def test_files_are_the_same_everywhere(tmp_path):
    contents = []
    for folder in ("a", "b"):
        store = Store(tmp_path / folder, durability="none")
        store.put(build_memory(bias=True), "m")
        contents.append({p.name: p.read_bytes() for p in files(store, "*/*")})
    assert contents[0] == contents[1]


def test_counters(store):
    memory = build_memory()
    store.put(memory, "m")
    written = store.counters.bytes_written
    assert written == sum(
        path.stat().st_size for path in [*files(store, "*/*"), *files(store, "log.jsonl")]
    )
    store.get("m")
    assert store.counters.hits == 1
    assert store.counters.bytes_verified == store.counters.bytes_read > memory.nbytes
    store.get("m", verify="off")
    assert store.counters.bytes_verified < store.counters.bytes_read
    with pytest.raises(LookupError):
        store.get("n")
    assert store.counters.misses == 1
