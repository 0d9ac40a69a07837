"""Encrypted stores: nothing readable in any file, one key a store, nobody else's packs."""

import os
import shutil

import pytest
import torch

from kvedit.editors import Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.store import Store

from .conftest import assert_same, build_memory, every_byte, files, flip, small, with_bias

KEY, OTHER = bytes(range(100, 132)), bytes(range(32))


def secrets(memory):
    """Pieces of what nobody may find: text, messages, tokens and every layer's tensors."""
    found = [b"\xc3\xa9 \xc3\xa9", b"system", b"user", KEY, KEY.hex().encode(), KEY[:16]]
    for layer in memory.layers.values():
        for kind, tensor in layer.tensors():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            if kind in ("keys", "values"):
                found += [data[at : at + 24] for at in (0, len(data) // 2, len(data) - 24)]
    return [*found, memory.source.tokens.numpy().tobytes()[:48]]


def assert_hidden(root, memory):
    needles = secrets(memory)
    everything = every_byte(root)
    assert len(everything) >= 4
    for path, data in everything.items():
        for needle in needles:
            assert needle not in data, (path, needle)


def open_store(path, key=KEY, **how):
    return Store(path, "process", key=key, **how)


@pytest.fixture
def sealed(tmp_path):
    with open_store(tmp_path / "s") as opened:
        yield opened


def test_needles_are_found_in_the_clear(store):
    """The search below can fail: without a key everything is there."""
    memory = build_memory(1, source="chat")
    store.put(memory, "m")
    everything = b"".join(every_byte(store.path).values())
    missing = [needle for needle in secrets(memory) if needle not in everything]
    assert all(needle in KEY or needle == KEY.hex().encode() for needle in missing)


@pytest.mark.parametrize("codec", ["raw", "planes-zstd", "int8", "int4"])
def test_nothing_readable_is_in_any_file(sealed, codec):
    memory = build_memory(1, slots=300, bias=True, source="chat")
    sealed.put(memory, "m", codec=codec)
    sealed.put(build_memory(2, source="chat"), "n")
    assert_hidden(sealed.path, memory)
    if codec not in ("int8", "int4"):
        assert_same(sealed.get("m"), memory)
    assert_hidden(sealed.path, sealed.get("m"))
    sealed.rm("n")
    sealed.gc(waste=0)
    sealed.rebuild_index()
    assert sealed.fsck(repair=True).ok
    assert_hidden(sealed.path, memory)


def test_equal_bytes_are_not_seen_to_be_equal(tmp_path):
    first, second = (open_store(tmp_path / name) for name in "ab")
    zeros = build_memory(1)
    layers = {
        i: type(layer)(torch.zeros_like(layer.keys), layer.values, layer.positions, layer.source)
        for i, layer in zeros.layers.items()
    }
    for one in (first, second):
        one.put(zeros.with_layers(layers), "m")
    left, right = (files(one, "packs/*")[0].read_bytes() for one in (first, second))
    size = 8 + int.from_bytes(left[:8], "little")
    assert left[size : size + 64] != right[size : size + 64]  # another nonce each
    assert b"\0" * 64 not in left[size:]


@pytest.mark.parametrize("verify", ["full", "deep", "fast", "off"])
def test_all_ways_to_read(sealed, verify):
    memory = build_memory(1, layers=2, slots=600, bias=True, ragged=True)
    sealed.put(memory, "m")
    fresh = open_store(sealed.path)
    for _ in range(2):
        found = fresh.get("m", verify=verify)
        assert found.digest == memory.digest
        assert found.verified == (verify != "off")
    part = fresh.get("m", layers=[1], slots=(200, 300), verify=verify)
    assert torch.equal(part.layers[1].keys, memory.layers[1].keys[:, 200:300])
    pack = fresh._finder.header(files(fresh, "packs/*")[0].stem)
    extent = next(e for e in pack.extents if e.kind == "values")
    flip(files(sealed, "packs/*")[0], extent.offset + 20)
    with pytest.raises(CorruptMemory):  # also without a check: it does not open
        open_store(sealed.path).get("m", verify=verify)


@pytest.mark.parametrize("key", [None, OTHER], ids=["no key", "another key"])
def test_without_the_key_nothing_is_read_or_put(sealed, key):
    memory = build_memory(1)
    record = sealed.put(memory, "m")
    other = open_store(sealed.path, key)
    for read in (
        lambda: other.get("m"),
        lambda: other.get("m", verify="off"),
        lambda: other.peek("m"),
        lambda: other.show("m"),
        lambda: other.lineage("m"),
        lambda: other.export("m", sealed.path.parent / "f", plain=True),
    ):
        with pytest.raises(InvalidArgument, match="encrypted with key"):
            read()
    assert other.names() == ["m"] and other.log("m") == [record]  # names are not hidden
    before = every_byte(sealed.path)
    # What it put would share blocks that it can't read.
    for put in (
        lambda: other.put(memory, "n"),
        lambda: other.put(with_bias(memory), "m"),
        lambda: other.put_many({"x": small()}),
    ):
        with pytest.raises(InvalidArgument, match="that key"):
            put()
    after = every_byte(sealed.path)
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"index.sqlite-shm", "index.sqlite-wal", "lock"}
    assert_same(sealed.get("m"), memory)


def test_a_key_for_a_store_in_the_clear_is_refused(tmp_path):
    plain = Store(tmp_path / "s", "process")
    plain.put(small(), "m")
    with pytest.raises(InvalidArgument, match="that key"):
        open_store(tmp_path / "s").put(small(), "n")
    with pytest.raises(CorruptMemory, match="not encrypted"):
        open_store(tmp_path / "s").get("m")


def test_a_pack_in_the_clear_that_somebody_planted(sealed, tmp_path):
    """Under the names that the index knows, and with a log that says that it belongs."""
    memory, evil = build_memory(1), build_memory(6)
    record = sealed.put(memory, "m")
    outside = Store(tmp_path / "outside", "process")
    outside.put(memory, "m")
    (ours,), (theirs,) = files(sealed, "packs/*"), files(outside, "packs/*")
    shutil.copy(theirs, ours)  # another header under our pack's name
    with pytest.raises(CorruptMemory):
        open_store(sealed.path).get("m")
    # An attacker who rewrites log and packs together.
    outside.put(evil, "evil")
    shutil.rmtree(sealed.path)
    shutil.copytree(outside.path, sealed.path)
    fresh = open_store(sealed.path)
    for name in ("m", "evil"):
        with pytest.raises(CorruptMemory, match="not encrypted"):
            fresh.get(name)
    assert record.content == memory.digest


def test_sealed_bytes_of_one_place_do_not_open_in_another(sealed):
    a, b = build_memory(1), build_memory(2)
    sealed.put_many({"a": a, "b": b})
    (path,) = files(sealed, "packs/*")
    pack = sealed._finder.header(path.stem)
    first, second = (pack.entries[m.cut()[0].digest][0] for m in (a, b))
    data = bytearray(path.read_bytes())
    left, right = (slice(e.offset, e.offset + e.size) for e in (first, second))
    data[left], data[right] = data[right], data[left]
    path.write_bytes(data)
    for verify in ("full", "off"):
        with pytest.raises(CorruptMemory):
            open_store(sealed.path).get("a", verify=verify)


def test_namespaces_have_keys_and_bytes_of_their_own(tmp_path):
    a, b = (open_store(tmp_path / "s", namespace=name) for name in "ab")
    memory = build_memory(1)
    a.put(memory, "m")
    b.put(with_bias(memory), "m")
    assert_same(a.get("m"), memory)
    assert_same(b.get("m"), with_bias(memory))
    assert len(files(b, "packs/*")) == 1
    for path in files(a, "packs/*"):  # one tenant's pack in the other's folder
        shutil.copy(path, b.path / "packs" / path.name)
    shutil.copy(a.path / "log.jsonl", b.path / "log.jsonl")
    for path in b.path.glob("index.sqlite*"):
        path.unlink()
    with pytest.raises(InvalidArgument, match="encrypted with key"):
        open_store(tmp_path / "s", namespace="b").get("m")
    assert_hidden(tmp_path / "s", memory)


def test_key_files(tmp_path, sealed):
    sealed.put(small(), "m")
    path = tmp_path / "key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    for key in (path, str(path), KEY.hex(), KEY):
        assert_same(open_store(sealed.path, key).get("m"), small())
    path.chmod(0o644)
    with pytest.raises(InvalidArgument, match="chmod"):
        open_store(sealed.path, path)


def test_gc_fsck_and_many_with_the_key(sealed):
    memories = {f"m{n}": build_memory(n, slots=300) for n in range(4)}
    sealed.put_many(memories)
    sealed.put(with_bias(memories["m0"]), "edit")
    for name in ("m1", "m2", "m3"):
        sealed.rm(name)
    assert sealed.gc().repacked == 1
    for one in (sealed, open_store(sealed.path)):
        assert_same(one.get("m0"), memories["m0"])
        assert_same(one.get("edit"), with_bias(memories["m0"]))
    health = sealed.fsck()
    assert health.ok and health.blocks
    blind = Store(sealed.path)  # without the key only checksums tell something
    assert blind.fsck().problems == ()
    for change in (lambda: blind.fsck(repair=True, sources=[sealed]), blind.gc):
        with pytest.raises(InvalidArgument, match="key"):
            change()
    assert sealed.du().packs == sum(p.stat().st_size for p in files(sealed, "packs/*"))
    pack = sealed._finder.header(files(sealed, "packs/*")[0].stem)
    flip(files(sealed, "packs/*")[0], pack.extents[0].offset + 30)
    for checker in (open_store(sealed.path), Store(sealed.path)):
        assert checker.fsck().problems


def test_a_repair_brings_sealed_blocks_back(sealed, tmp_path):
    memory = build_memory(1, bias=True)
    sealed.put(memory, "m")
    copy = Store(tmp_path / "copy", "process")
    copy.put(memory, "elsewhere")
    sealed.export("m", tmp_path / "f", key=OTHER)
    copy.import_(tmp_path / "f", key=OTHER)
    (path,) = files(sealed, "packs/*")
    pack = sealed._finder.header(path.stem)
    flip(path, pack.extents[1].offset + 30)
    fresh = open_store(sealed.path)
    assert fresh.fsck(repair=True, sources=[copy]).ok
    assert_same(open_store(sealed.path).get("m"), memory)
    assert_hidden(sealed.path, memory)


def test_a_recipe_is_sealed_too(tmp_path):
    store = open_store(tmp_path / "s", replay=rebuild)
    base = build_memory(1)
    edited = Emphasize(span={"tokens": (3, 40)}, strength=1.515625)(base)
    store.put(base, "base")
    store.put(edited, "edit", recipe=True)
    assert_same(store.get("edit"), edited)
    assert not any(b"1.515625" in data for data in every_byte(store.path).values())
    with pytest.raises(InvalidArgument, match="encrypted with key"):
        open_store(store.path, OTHER, replay=rebuild).get("edit")


def test_bad_keys_say_nothing_of_themselves(tmp_path):
    bad = os.urandom(16)
    for key in (bad, bad.hex(), b"", "x" * 64):
        with pytest.raises(InvalidArgument) as raised:
            Store(tmp_path / "s", key=key)
        assert not key or str(key) not in str(raised.value)
    assert not (tmp_path / "s").exists()
    with pytest.raises(NotFound):
        open_store(tmp_path / "s").get("m")
