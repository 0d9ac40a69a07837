"""Names, versions, references, compare-and-swap, removal."""

import re
import sqlite3
from datetime import UTC, datetime

import pytest

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound, RaceLost
from kvedit.store import Record, Store

from .conftest import assert_same, build_memory, files, with_bias, with_message


def small(seed=0):
    return build_memory(seed, layers=1, slots=4)


def test_versions(store):
    memories = [small(seed) for seed in range(3)]
    records = [store.put(m, "m", message=f"no {i}") for i, m in enumerate(memories)]
    assert [record.version for record in records] == [1, 2, 3]
    for back in range(3):
        assert_same(store.get(f"m@{{{back}}}"), memories[2 - back])
    assert store.log("m") == records[::-1]
    assert_same(store.get("m"), memories[2])
    with pytest.raises(NotFound, match=r"m has 3 versions: m@\{0\} to @\{2\}"):
        store.get("m@{3}")


def test_an_older_memory_can_be_the_newest_version_again(store):
    store.put(small(0), "m")
    store.put(small(1), "m")
    assert store.put(small(0), "m").version == 3
    assert_same(store.get("m"), small(0))


def test_digests_and_prefixes(store):
    record = store.put(small(), "m")
    for digest in (record.record, record.content):
        for ref in (digest, digest[:6], digest[:20], digest.upper()):
            assert store.show(ref).record == record
    with pytest.raises(NotFound):
        store.get("0" * 64)
    with pytest.raises(NotFound):  # too short for a prefix
        store.get(record.record[:5])


def test_an_ambiguous_prefix(store, monkeypatch):
    monkeypatch.setattr("kvedit.store.refs._PREFIX", re.compile("[0-9a-f]{1,64}"))
    seen = {}
    for seed in range(17):  # two of 17 digests begin with the same character
        digest = store.put(small(seed), f"m{seed}").content
        first, seen[digest[0]] = seen.get(digest[0]), digest
        if first:
            break
    with pytest.raises(InvalidArgument, match="fits several digests") as raised:
        store.get(digest[0])
    assert first[:16] in str(raised.value)
    assert digest[0] not in store


def test_a_content_digest_with_several_records_means_the_newest(store):
    memory = small()
    first = store.put(with_message(memory, "{}"), "a")
    second = store.put(with_message(memory, '{"again":1}'), "b")
    assert first.content == second.content
    assert first.record != second.record
    assert store.show(first.content).record == second


def test_a_name_goes_before_a_prefix(store):
    record = store.put(small(0), "m")
    store.put(small(1), record.content[:8])
    assert_same(store.get(record.content[:8]), small(1))
    assert_same(store.get(record.content[:9]), small(0))


def test_expect(store):
    first = store.put(small(0), "m", expect="")
    with pytest.raises(RaceLost, match=f"expected at no version and is at {first.record}"):
        store.put(small(1), "m", expect="")
    second = store.put(small(1), "m", expect=first.record)
    with pytest.raises(RaceLost):
        store.put(small(2), "m", expect=first.record)
    with pytest.raises(RaceLost, match="is at no version"):
        store.put(small(2), "n", expect=first.record)
    assert store.put(small(1), "m", expect=second.record) == second
    assert [record.version for record in store.log("m")] == [2, 1]


@pytest.mark.parametrize(
    "name",
    ["", "/", "a/", "/a", "a//b", "..", "a/../b", ".", "./a", "a b", "a@b", "a@{1}", "é", "a\n",
     "a\0", "a\\b", "x" * 201, "0" * 64, None, 3, "C:"],
)  # fmt: skip
def test_bad_names(store, name):
    with pytest.raises(InvalidArgument, match="ASCII letters, digits"):
        store.put(small(), name)
    assert not store.path.exists()


@pytest.mark.parametrize("name", ["a", "A.b_c-d", "team/handbook/v1.2", "...", "x" * 200, "-"])
def test_good_names(store, name):
    store.put(small(), name)
    assert store.names() == [name]
    assert name in store


@pytest.mark.parametrize("ref", ["m@", "m@{}", "m@{-1}", "m@1", "@{1}", 3, None])
def test_bad_references(store, ref):
    store.put(small(), "m")
    with pytest.raises(InvalidArgument):
        store.get(ref)
    assert ref not in store


def test_bad_labels(store):
    for labels in ({"tags": "text"}, {"tags": ["", "a"]}, {"tags": [1]}, {"message": "\ud800"}):
        with pytest.raises(InvalidArgument):
            store.put(small(), "m", **labels)


def test_not_found_names_what_is_near(store):
    store.put(small(), "handbook")
    with pytest.raises(NotFound, match="Did you mean handbook"):
        store.get("handbok")
    with pytest.raises(NotFound, match="It has: handbook"):
        store.log("zzz")


def test_ls_and_show(store):
    before = datetime.now(UTC)
    memory = with_bias(build_memory(layers=2, slots=300))
    store.put(small(), "b/one")
    store.put(memory, "a", message="first", tags=["x"])
    edited = with_bias(memory, value=2.0)
    record = store.put(edited, "a", message="second", tags=["x", "y", "x"])
    entry, other = store.ls()
    assert (entry.name, entry.versions, entry.version) == ("a", 2, 2)
    assert (entry.record, entry.content) == (record.record, edited.digest)
    assert (entry.message, entry.tags) == ("second", ("x", "y"))
    assert (entry.slots, entry.tokens, entry.layers) == (300, 300, 2)
    assert (entry.model, entry.dtype) == ("hand-built", "float32")
    assert entry.bytes == edited.nbytes + edited.source.tokens.nbytes + edited.source.offsets.nbytes
    assert before <= entry.created <= datetime.now(UTC)
    assert store.ls("b/*") == [other]
    assert store.ls(lambda entry: "y" in entry.tags) == [entry]
    assert "#x #y" in repr(store.ls())

    details = store.show("a@{0}")
    assert details.record == record
    assert isinstance(details.record, Record)
    assert details.biased == (0,)
    assert details.codec == "raw"
    assert len(details.packs) == 2
    assert details.text == edited.source.text
    assert [line.split()[2] for line in details.lineage] == ["bias", "bias", "capture"]
    assert record.record in str(details)


def test_collection_manners(store):
    assert len(store) == 0
    assert store
    assert "m" not in store
    store.put(small(), "m")
    store.put(small(1), "m")
    assert len(store) == 1
    assert "m@{1}" in store
    assert "m@{2}" not in store
    assert "1 names" in repr(store)


def test_rm(store):
    record = store.put(small(0), "m")
    store.put(small(1), "m")
    kept = store.put(small(0), "other")
    store.rm("m")
    assert store.names() == ["other"]
    for ref in ("m", "m@{1}", small(1).digest):
        with pytest.raises(NotFound):
            store.get(ref)
    assert kept.record == record.record
    assert_same(store.get(record.record), small(0))
    store.rm("other")
    with pytest.raises(NotFound):
        store.get(record.record)
    with pytest.raises(NotFound):
        store.rm("m")
    assert len(files(store, "packs/*")) == 2
    assert store.put(small(0), "m").version == 1


def history(store):
    return {name: store.log(name) for name in store.names()}


def test_rebuild_resurrects_nothing(store):
    for seed in range(3):
        store.put(small(seed), "gone", message=str(seed))
        store.put(small(seed), "kept", tags=[f"t{seed}"])
    store.rm("gone")
    store.put(small(5), "gone")
    store.put(small(6), "gone-too")
    store.rm("gone-too")
    before = history(store)
    store.rebuild_index()
    assert history(store) == before
    assert [record.version for record in store.log("gone")] == [1]
    assert_same(store.get("kept@{2}"), small(0))


@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "half", "old"])
def test_a_lost_index_is_made_again(store, damage):
    store.put(small(0), "m", message="one", tags=["t"])
    store.put(small(1), "m")
    store.put(small(1), "n")
    store.rm("n")
    before = history(store)
    store.close()
    index = store.path / "index.sqlite"
    if damage == "missing":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"no database" * 1000)
    elif damage == "empty":
        index.write_bytes(b"")
    elif damage == "half":
        index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    else:
        connection = sqlite3.connect(index)
        connection.execute("PRAGMA user_version = 0")
        connection.close()
    with Store(store.path) as again:
        assert history(again) == before
        assert_same(again.get("m@{1}"), small(0))
        assert again.put(small(2), "m").version == 3


def test_an_index_deleted_under_an_open_store(store):
    store.put(small(0), "m")
    (store.path / "index.sqlite").unlink()
    with Store(store.path) as other:
        other.put(small(1), "m")
    assert len(store.log("m")) == 2
    assert store.put(small(2), "m").version == 3


def test_an_index_without_its_log_is_refused(store):
    store.put(small(0), "m")
    (store.path / "log.jsonl").unlink()
    assert_same(store.get("m"), small(0))
    with pytest.raises(CorruptMemory, match=r"log\.jsonl is missing"):
        store.put(small(1), "m")


def test_nothing_is_made_before_the_first_put(tmp_path):
    store = Store(tmp_path / "a" / "b")
    assert store.ls() == []
    assert store.names() == []
    with pytest.raises(NotFound):
        store.get("m")
    with pytest.raises(NotFound):
        store.rm("m")
    store.rebuild_index()
    assert not (tmp_path / "a").exists()


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="is no store"):
        Store(tmp_path)
    with pytest.raises(InvalidArgument, match="is no store"):
        Store(tmp_path / "notes.txt")


def test_other_places_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KVEDIT_CACHE", str(tmp_path))
    with pytest.raises(InvalidArgument, match="expected one of s3://bucket/prefix"):
        Store("https://host/x")
    with pytest.raises(InvalidArgument, match="remote already"):
        Store("memory:///", remote="memory:///")


def test_newer_formats_are_refused(store):
    store.put(small(), "m")
    marker = store.path / "kvedit-store.json"
    marker.write_text(marker.read_text().replace('"version":2', '"version":3'))
    with pytest.raises(InvalidArgument, match=r"version 3; .* use a newer kvedit"):
        Store(store.path)
    marker.write_text("{}")
    with pytest.raises(CorruptMemory, match=r"kvedit-store\.json is damaged"):
        Store(store.path)


def test_durability(tmp_path):
    for durability in ("full", "process", "none"):
        with Store(tmp_path / durability, durability=durability) as store:
            store.put(small(), "m")
            assert_same(store.get("m"), small())
    with pytest.raises(InvalidArgument, match="durability"):
        Store(tmp_path, durability="some")
