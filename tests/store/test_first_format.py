"""A store that the first version of the format wrote is read, and lives on as one of the second."""

import json
import shutil
from pathlib import Path

import pytest

from kvedit.errors import CorruptMemory
from kvedit.store import Store
from kvedit.store.pack import Pack

from .conftest import assert_same, build_memory, files, with_bias

WRITTEN = Path(__file__).parent / "data" / "store-v1"
HANDBOOK = "99dce3c33c06199ca80479e9973b78d9dd2303cab094df9c3316a70a49a0b352"
EARLIER = "214a0114b9302bd5786dc91afd85b6c27464d61e1e12697b5caa0a2410c6efff"
SMALL = "7d168c20c5da2a72dc499ac0817aca240bf75e973267d6fcb8abf41acff463f9"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "memories")
    with Store(tmp_path / "memories", durability="process") as opened:
        yield opened


def version(store):
    return json.loads((store.path / "kvedit-store.json").read_bytes())["version"]


def test_every_memory_is_readable(old):
    assert old.names() == ["handbook", "other/small"]
    for verify in ("full", "fast", "off"):
        assert old.get("handbook", verify=verify).digest == HANDBOOK
    assert old.get("handbook@{1}").digest == EARLIER
    assert old.get("other/small").digest == SMALL
    assert [record.message for record in old.log("handbook")] == ["edited", "first"]
    assert old.log("handbook")[-1].tags == ("a",)
    assert old.get(HANDBOOK, layers=[1]).layers[1].slots == 260
    assert version(old) == 1  # reading changes no format


def test_what_is_damaged_is_found(old):
    (name,) = old.show("other/small").packs
    path = old.path / "packs" / f"{name}.safetensors"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"x"):
        path.write_bytes(data)
        for verify in ("full", "fast"):
            with pytest.raises(CorruptMemory):
                old.get("other/small", verify=verify)
        assert not old.fsck().ok
        assert old.get("handbook").digest == HANDBOOK
    path.write_bytes(whole)
    assert old.get("other/small").digest == SMALL
    assert old.fsck().ok


def test_damaged_manifests_are_found(old):
    record = old.show("handbook").record.record
    path = old.path / "manifests" / f"{record}.json"
    whole = path.read_bytes()
    for damage in (whole[:-1], b"", whole.replace(b"handbook", b"handbooX", 1) + b" ", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with Store(old.path) as again:
            with pytest.raises(CorruptMemory):
                again.get("handbook")
            assert again.fsck().lost == ("handbook v2",)
            assert again.get("other/small").digest == SMALL


def test_puts_go_on(old):
    memory = old.get("handbook")
    edited = with_bias(memory, layer=1, value=0.5)
    old.put(edited, "handbook")
    fresh = build_memory(9, layers=1, slots=4)
    old.put(fresh, "fresh")
    assert version(old) == 2
    assert_same(old.get("handbook"), edited)
    assert_same(old.get("handbook@{1}"), memory)
    assert_same(old.get("fresh"), fresh)
    assert old.fsck().ok
    old.rebuild_index()
    assert [r.version for r in old.log("handbook")] == [3, 2, 1]
    assert_same(old.get("handbook"), edited)
    assert_same(old.get("handbook@{1}"), memory)


def test_equal_blocks_are_not_stored_again(old):
    before = {path.name for path in files(old, "packs/*")}
    old.put(old.get("handbook"), "copy")
    (fresh,) = [path for path in files(old, "packs/*") if path.name not in before]
    pack = Pack.open(fresh)
    assert (len(pack.extents), len(pack.manifests)) == (0, 1)  # blocks are shared
    assert old.get("copy").digest == HANDBOOK


def test_garbage_goes(old):
    wanted = {name: old.get(name) for name in old.names()}
    kept = {name: memory.to("cpu") for name, memory in wanted.items()}
    (gone,) = [p for p in files(old, "packs/*") if p.stem.startswith("4959fb50")]
    old.gc(waste=0.0)
    assert not gone.exists()
    for name, memory in kept.items():
        assert_same(old.get(name), memory)
    assert old.get("handbook@{1}").digest == EARLIER
    old.rm("handbook")
    old.gc(waste=0.0)
    assert old.fsck().ok
    assert old.names() == ["other/small"]
    assert old.get("other/small").digest == SMALL
    with Store(old.path) as again:
        assert again.get("other/small").digest == SMALL


def test_exported_and_imported(old, tmp_path):
    old.export("handbook", tmp_path / "one.kv")
    with Store(tmp_path / "other") as other:
        record = other.import_(tmp_path / "one.kv")
        assert (record.name, record.content, record.message) == ("handbook", HANDBOOK, "edited")
        assert_same(other.get("handbook"), old.get("handbook"))
        assert other.fsck().ok


def test_repaired_from_a_copy(old, tmp_path):
    expected = old.get("handbook")
    for path in files(old, "packs/*"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with Store(shutil.copytree(WRITTEN, tmp_path / "sound")) as sound:
        health = old.fsck(repair=True, sources=[sound])
    assert health.ok, health
    with Store(old.path) as again:
        assert_same(again.get("handbook"), expected)
        assert again.get("handbook@{1}").digest == EARLIER
        assert again.fsck().ok
