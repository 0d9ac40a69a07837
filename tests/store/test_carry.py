"""Files that carry one memory: whole, checked, and harmless whoever wrote them."""

import os

import pytest
import torch
from safetensors import safe_open

from kvedit.editors import Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.errors import CorruptMemory, InvalidArgument, NotFound, RaceLost, UnknownName
from kvedit.store import Signer, Store
from kvedit.store.packing import build_pack

from .conftest import assert_same, build_memory, every_byte, files, small, with_bias

KEY, OTHER = os.urandom(32), os.urandom(32)
LOSSY = ("int8", "int4", "int2")
CODECS = ("raw", "planes-zstd", *LOSSY)


@pytest.fixture
def other(tmp_path):
    with Store(tmp_path / "other", "process") as opened:
        yield opened


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", ["plain", "key", "from a sealed store", "into a sealed store"])
def test_every_codec_arrives_as_it_was(tmp_path, codec, way):
    memory = build_memory(1, slots=300, dtype=torch.bfloat16, bias=True, source="chat")
    key = KEY if way == "from a sealed store" else None
    store = Store(tmp_path / "a", "process", key=key, namespace="x" if key else "")
    record = store.put(memory, "m", codec=codec)
    file_key = OTHER if way == "key" else None
    store.export("m", tmp_path / "f", key=file_key, plain=True)
    other = Store(tmp_path / "b", "process", key=KEY if way.startswith("into") else None)
    found = other.import_(tmp_path / "f", key=file_key)
    assert (found.record, found.content, found.codec) == (record.record, record.content, codec)
    assert_same(other.get("m"), store.get("m"))
    other.export("m", tmp_path / "g", plain=True)
    third = Store(tmp_path / "c", "process")
    assert third.import_(tmp_path / "g").record == record.record
    assert_same(third.get("m"), store.get("m"))
    assert other.fsck().ok and third.fsck().ok


def test_a_file_of_several_packs_is_one_memory(store, other, tmp_path):
    base = build_memory(1, slots=700)
    store.put(base, "base")
    store.put(build_memory(9), "noise")
    edit = with_bias(with_bias(base), layer=1)
    store.put(edit, "edit")
    size = store.export("edit", tmp_path / "f")
    assert size < 1.05 * edit.nbytes + 50_000
    other.import_(tmp_path / "f")
    assert_same(other.get("edit"), edit)
    with safe_open(tmp_path / "f", "pt") as file:  # a plain safetensors file
        assert file.keys()


def test_labels_travel_and_secrets_of_the_store_do_not(store, other, tmp_path):
    store.put(small(1), "older", "hidden message", ["hidden"])
    store.put(small(0), "m", "old words")
    labels = {"source": "book", "licence": "CC0", "metrics": {"kl": 0.5}}
    record = store.put(small(2), "m", "said", ["t"], ttl=1000, **labels)
    store.export("m", tmp_path / "f")
    assert b"hidden" not in (tmp_path / "f").read_bytes()
    assert b"old words" not in (tmp_path / "f").read_bytes()
    found = other.import_(tmp_path / "f")
    kept = ("record", "content", "message", "tags", "source", "licence", "metrics", "codec")
    assert [getattr(found, k) for k in kept] == [getattr(record, k) for k in kept]
    assert found.expires is None
    assert len(other.log("m")) == 1
    assert len(other.ls()) == 1


@pytest.mark.parametrize("ref", ["m", "m@{1}"])
def test_versions_and_names_of_the_file(store, other, tmp_path, ref):
    store.put(small(0), "m")
    store.put(small(1), "m")
    store.export(ref, tmp_path / "f")
    other.import_(tmp_path / "f", name=None)
    other.import_(tmp_path / "f", name="another/name")
    for name in ("m", "another/name"):
        assert_same(other.get(name), store.get(ref))
    assert len(files(other, "packs/*")) == 1
    with pytest.raises(InvalidArgument):
        other.import_(tmp_path / "f", name="../x")


def test_the_same_again_is_nothing_and_another_is_a_version(store, other, tmp_path):
    store.put(small(0), "m")
    store.export("m", tmp_path / "f")
    first = other.import_(tmp_path / "f")
    assert other.import_(tmp_path / "f") == first
    other.put(small(1), "m")
    assert other.import_(tmp_path / "f").version == 3
    other.tag("m", "v")
    with pytest.raises(InvalidArgument, match="is a tag"):
        other.put(small(1), "x") and store.put(small(1), "y") and store.export("y", tmp_path / "g")
        other.import_(tmp_path / "g", name="v")


def test_an_import_beside_a_put_is_told(store, other, tmp_path, monkeypatch):
    store.put(small(0), "m")
    store.export("m", tmp_path / "f")
    other.put(small(1), "m")
    commit = other._writer.put

    def late(puts, seen):
        Store(other.path, "process").put(small(2), "m")
        return commit(puts, seen)

    monkeypatch.setattr(other._writer, "put", late)
    with pytest.raises(RaceLost):
        other.import_(tmp_path / "f")
    assert other.import_(tmp_path / "f", force=True).content == small(0).digest


# Files that are not what they should be


def test_an_existing_file_is_never_touched(store, tmp_path):
    store.put(small(), "m")
    path = tmp_path / "f"
    path.write_text("mine")
    (tmp_path / "folder").mkdir()
    for bad in (path, tmp_path / "folder", tmp_path / "no" / "such" / "folder"):
        with pytest.raises(InvalidArgument):
            store.export("m", bad)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")  # points to nothing
    with pytest.raises(InvalidArgument):
        store.export("m", path)
    assert not (tmp_path / "elsewhere").exists()
    path.unlink()
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("memories", "folder")] == []


def test_a_damaged_memory_leaves_no_file(store, tmp_path):
    store.put(build_memory(1), "m")
    (path,) = files(store, "packs/*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptMemory):
        Store(store.path).export("m", tmp_path / "f")
    with pytest.raises(NotFound):
        store.export("n", tmp_path / "f")
    assert [p.name for p in tmp_path.iterdir()] == ["memories"]


def test_what_is_no_file_of_ours(store, other, tmp_path):
    bad = tmp_path / "bad"
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing", tmp_path / "folder"):
        with pytest.raises(InvalidArgument):
            other.import_(path)
    for data in (
        b"",
        b"x",
        b"\xff" * 8,
        b"\0" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        b"{}" * 99,
    ):
        bad.write_bytes(data)
        with pytest.raises(CorruptMemory):
            other.import_(bad, name="m")
    store.put(build_memory(1), "m")
    store.export("m", tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[: len(whole) // 2], whole[1:]):
        bad.write_bytes(data)
        with pytest.raises(CorruptMemory):
            other.import_(bad, name="m")
    (pack,) = files(store, "packs/*")  # of a store: it has no name, and one manifest
    assert other.import_(pack, name="m").content == build_memory(1).digest
    store.put_many({"a": small(1), "b": small(2)})
    many = next(p for p in files(store, "packs/*") if p != pack)
    with pytest.raises(CorruptMemory, match="one memory"):
        other.import_(many, name="many")
    with pytest.raises(InvalidArgument, match="name="):
        other.import_(pack)
    assert other.names() == ["m"]


SURROGATE = "lonely!"
"""Becomes an escaped lone surrogate, which canonical JSON would not write."""

HOSTILE = [
    {"name": "../../etc/passwd"},
    {"name": "0" * 64},
    {"name": ["m"]},
    {"name": "m\n"},
    {"message": 3},
    {"message": SURROGATE},
    {"source": SURROGATE},
    {"message": {"a": 1}},
    {"tags": [["x"]]},
    {"tags": [""]},
    {"tags": {"a": 1}, "message": 5},
    {"tags": 3},
    {"source": []},
    {"licence": 7},
    {"metrics": [1]},
    {"metrics": {"kl": "high"}},
    pytest.param(
        {"metrics": {"kl": 10**400}},
        id="huge",
    ),
    {"metrics": {"": 1}},
]


@pytest.mark.parametrize("note", HOSTILE, ids=str)
@pytest.mark.parametrize("name", [None, "mine"])
def test_hostile_labels_are_refused(store, other, tmp_path, note, name):
    memory = small()
    record = store.put(memory, "m")
    paper = store._finder.paper(record.record)
    pack = build_pack(memory.cut(), {record.record: paper}, note={"name": "m", **note})
    data = b"".join(pack.chunks).replace(SURROGATE.encode(), rb"\\ud800")
    assert len(data) == pack.size
    (tmp_path / "f").write_bytes(data)
    with pytest.raises((CorruptMemory, InvalidArgument)):
        other.import_(tmp_path / "f", name=name)
    assert other.names() == []


def test_labels_that_mean_nothing_here_are_ignored(store, other, tmp_path):
    memory = small()
    record = store.put(memory, "m")
    paper = store._finder.paper(record.record)
    note = {"name": "m", "fixed": True, "expires": "2000-01-01", "packs": ["x"], "signature": "no"}
    note |= {"event": "remove", "record": "0" * 64, "base": "0" * 64, "pinned": True}
    pack = build_pack(memory.cut(), {record.record: paper}, note=note)
    (tmp_path / "f").write_bytes(b"".join(pack.chunks))
    found = other.import_(tmp_path / "f")
    assert (found.record, found.expires, found.signed_by) == (record.record, None, "")
    assert not other.ls()[0].fixed and not other.ls()[0].pinned
    assert_same(other.get("m"), memory)


def test_a_manifest_of_another_memory_is_refused(store, other, tmp_path):
    a, b = small(1), small(2)
    record = store.put(a, "a")
    paper = store._finder.paper(record.record)
    pack = build_pack(b.cut(), {record.record: paper}, note={"name": "m"})
    (tmp_path / "f").write_bytes(b"".join(pack.chunks))
    with pytest.raises(CorruptMemory):
        other.import_(tmp_path / "f")
    pack = build_pack(b.cut(), {"0" * 64: paper}, note={"name": "m"})
    (tmp_path / "f").write_bytes(b"".join(pack.chunks))
    with pytest.raises(CorruptMemory):
        other.import_(tmp_path / "f")


# Keys and signatures


def test_keys_of_files(store, other, tmp_path):
    memory = build_memory(1, source="chat")
    store.put(memory, "m", metrics={"kl": 1})
    store.export("m", tmp_path / "f", key=KEY)
    data = (tmp_path / "f").read_bytes()
    for secret in (KEY, "é é".encode(), b"system", memory.layers[0].keys.numpy().tobytes()[:48]):
        assert secret not in data
    for key in (None, OTHER):
        with pytest.raises((InvalidArgument, CorruptMemory), match="key"):
            other.import_(tmp_path / "f", key=key)
    with pytest.raises(InvalidArgument, match="32 bytes"):
        other.import_(tmp_path / "f", key=b"short")
    store.export("m", tmp_path / "plain")
    with pytest.raises(CorruptMemory, match="not encrypted"):
        other.import_(tmp_path / "plain", key=KEY)
    assert other.names() == []
    assert other.import_(tmp_path / "f", key=KEY).content == memory.digest


def test_a_signature_travels_and_can_not_be_lent(tmp_path, store, other):
    mine = Signer.generate()
    signed = Store(tmp_path / "signed", "process", signer=mine)
    record = signed.put(small(1), "m")
    signed.export("m", tmp_path / "f")
    assert other.import_(tmp_path / "f").signed_by == mine.public
    # The signature of one record beside another record.
    forged = small(2)
    fake = store.put(forged, "m")
    paper = store._finder.paper(fake.record)
    signature = signed._shelf.index.signature(record.record)
    note = {"name": "m", "signature": signature}
    pack = build_pack(forged.cut(), {fake.record: paper}, note=note)
    (tmp_path / "g").write_bytes(b"".join(pack.chunks))
    assert other.import_(tmp_path / "g", name="forged").signed_by == ""
    other.export("m", tmp_path / "h")
    strict = Store(tmp_path / "strict", trusted_keys=[mine.public])
    assert strict.import_(tmp_path / "h").signed_by == mine.public
    assert_same(strict.get("m"), small(1))
    before = every_byte(strict.path)
    from kvedit.errors import UntrustedMemory

    with pytest.raises(UntrustedMemory):
        strict.import_(tmp_path / "g", name="forged")
    assert {k: v for k, v in every_byte(strict.path).items() if "index" not in k.name} == {
        k: v for k, v in before.items() if "index" not in k.name
    }


def test_a_recipe_does_not_travel_alone(tmp_path):
    store = Store(tmp_path / "s", "process", replay=rebuild)
    base = build_memory(1)
    store.put(base, "base")
    store.put(Emphasize(span={"tokens": (3, 9)}, strength=1.0)(base), "edit", recipe=True)
    with pytest.raises(InvalidArgument, match="recipe"):
        store.export("edit", tmp_path / "f")
    with pytest.raises(UnknownName):
        store.put(base, "m", codec="no such codec")
