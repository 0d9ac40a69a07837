"""What each way to verify promises, and that mapped tensors are nobody else's."""

import numpy as np
import pytest
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, MutatedMemory
from kvedit.store import Store
from kvedit.store.packing import checksum

from .conftest import assert_same, build_memory, every_byte, files, flip, with_bias

CODECS = ("raw", "planes-zstd", "int8")


def extents(store):
    (path,) = files(store, "packs/*")
    return path, store._finder.header(path.stem).extents


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("verify", ["full", "deep", "fast"])
def test_a_flip_of_any_stored_extent_is_found(store, codec, verify):
    store.put(build_memory(1, layers=2, slots=300, bias=True), "m", codec=codec)
    path, found = extents(store)
    for extent in found:
        for offset in (0, extent.size // 2, extent.size - 1):
            flip(path, extent.offset + offset)
            with pytest.raises(CorruptMemory):
                Store(store.path).get("m", verify=verify)
            with pytest.raises(CorruptMemory):  # an object that read it sound before
                store.get("m", verify=verify)
            flip(path, extent.offset + offset)
            assert store.get("m", verify=verify).verified


def forged(store):
    """Turns a bit of the keys and makes the pack's checksum fit, as damage never would."""
    path, found = extents(store)
    extent = next(e for e in found if e.kind == "keys")
    data = bytearray(path.read_bytes())
    data[extent.offset + 5] ^= 1
    stored = data[extent.offset : extent.offset + extent.size]
    assert checksum([bytes(stored)]) != extent.checksum
    path.write_bytes(data)
    return extent, checksum([bytes(stored)])


def test_a_forgery_is_found_by_digests_and_not_by_checksums(store, monkeypatch):
    memory = build_memory(1)
    store.put(memory, "m")
    extent, value = forged(store)
    fresh = Store(store.path)
    pack = fresh._finder.header(files(store, "packs/*")[0].stem)
    for one in pack.extents:  # as if the header said so
        if one.offset == extent.offset:
            object.__setattr__(one, "checksum", value)
    assert fresh.get("m", verify="fast").digest != memory.digest
    for verify in ("full", "deep"):
        with pytest.raises(CorruptMemory):
            fresh.get("m", verify=verify)


def test_full_checks_digests_at_the_first_read_and_deep_always(store, monkeypatch):
    memory = build_memory(1, bias=True)
    store.put(memory, "m")
    deep = []
    from kvedit.store import reader

    check = reader._check
    monkeypatch.setattr(reader, "_check", lambda piece: deep.append(piece) or check(piece))
    fresh = Store(store.path)
    for verify, counted in (("fast", False), ("full", True), ("full", False), ("deep", True)):
        deep.clear()
        assert_same(fresh.get("m", verify=verify), memory)
        assert bool(deep) == counted, verify
    deep.clear()
    Store(store.path).get("m")
    blocks = {block.digest for block in memory.cut()}
    assert {p.part.blocks[p.index].digest for p in deep} == blocks


def test_off_is_marked_and_counts_nothing_verified(store):
    memory = build_memory(1)
    store.put(memory, "m")
    path, found = extents(store)
    flip(path, found[0].offset)
    fresh = Store(store.path, ram="1MiB")
    fresh.show("m")
    before = fresh.counters.bytes_verified
    for how in ({}, {"layers": [0]}, {"slots": (0, 3)}, {"dtype": torch.float16}):
        assert not fresh.get("m", verify="off", **how).verified
    assert fresh.counters.bytes_verified == before
    with pytest.raises(CorruptMemory):
        fresh.get("m")


def test_off_still_checks_sizes_and_the_manifest(store):
    record = store.put(build_memory(1), "m")
    path, _ = extents(store)
    data = path.read_bytes()
    place = store._finder.header(path.stem).manifests[record.record]
    flip(path, place.offset + 3)
    with pytest.raises(CorruptMemory):
        Store(store.path).get("m", verify="off")
    for other in (data[:-1], data + b"\0", b""):
        path.write_bytes(other)
        with pytest.raises(CorruptMemory):
            Store(store.path).get("m", verify="off")


@pytest.mark.parametrize("verify", [None, "", "none", True, "FULL"])
def test_bad_ways_to_verify(store, verify):
    store.put(build_memory(1), "m")
    with pytest.raises(InvalidArgument, match="verify"):
        store.get("m", verify=verify)


# Mapped tensors


@pytest.mark.parametrize("codec", ["raw", "planes-zstd"])
def test_writing_into_what_was_returned_changes_nothing_else(store, codec):
    memory = build_memory(1, slots=600, bias=True, source="chat")
    store.put(memory, "m", codec=codec)
    before = every_byte(store.path / "packs")
    first, second = store.get("m"), store.get("m")
    peeked = store.peek("m", kinds=("keys", "values", "positions", "bias"))
    for layer in first.layers.values():
        for _, tensor in layer.tensors():
            tensor.fill_(1)
    first.source.tokens.zero_()
    first.source.offsets.zero_()
    for part in peeked.values():
        for tensor in part.values():
            tensor.fill_(2)
    assert every_byte(store.path / "packs") == before
    assert_same(second, memory)  # also what was handed out before
    for one in (store, Store(store.path)):
        assert_same(one.get("m"), memory)
    for use in (first.check_unmodified, lambda: store.put(first, "n"), lambda: first.digest):
        with pytest.raises(MutatedMemory):
            use()


def test_writing_through_numpy_changes_no_file(store):
    memory = build_memory(1)
    store.put(memory, "m")
    before = every_byte(store.path / "packs")
    array = store.get("m").layers[0].keys.numpy()
    array[...] = 0
    assert np.count_nonzero(array) == 0
    assert every_byte(store.path / "packs") == before
    assert_same(store.get("m"), memory)


def test_whole_memories_are_mapped_and_not_copied(store):
    memory = build_memory(1, slots=600)
    store.put(memory, "m")
    found = store.get("m")
    sizes = {t.untyped_storage().nbytes() for _, t in found.layers[0].tensors()}
    assert sizes == {extents(store)[0].stat().st_size}  # all lie in one mapping of the file
    for layer in found.layers.values():
        for _, tensor in layer.tensors():
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.data_ptr() % tensor.itemsize == 0


def test_a_memory_outlives_its_pack_and_its_store(store):
    memory = build_memory(1, slots=600, bias=True)
    store.put(memory, "m")
    found = store.get("m")
    edited = with_bias(found)
    store.rm("m")
    store.gc()
    store.close()
    assert files(store, "packs/*") == []
    assert_same(found, memory)
    assert_same(edited, with_bias(memory))
    assert torch.equal(found.layers[0].keys.clone() * 2, memory.layers[0].keys * 2)
    store.put(found, "again")
    del found, edited
    assert_same(store.get("again"), memory)


def test_a_mapped_memory_is_as_good_as_any(store):
    memory = build_memory(1, slots=300, bias=True)
    store.put(memory, "m")
    found = store.get("m")
    assert found.to(dtype=torch.float16).digest == memory.to(dtype=torch.float16).digest
    part = found.layers[0].select(torch.tensor([5, 3]))
    assert torch.equal(part.keys, memory.layers[0].keys[:, [5, 3]])
    assert store.put(found, "n").record == store.log("m")[0].record
    clone = found.layers[0].keys.clone().requires_grad_()
    (clone * 2).sum().backward()
    assert torch.equal(clone.grad, torch.full_like(clone, 2))
