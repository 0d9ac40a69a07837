"""Branches, tags, rollbacks, notes, pins and time to live, beyond what test_verbs has."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from kvedit.errors import InvalidArgument, NotFound, RaceLost, UnknownName
from kvedit.store import Store

from .conftest import assert_same, every_byte, files, pack_bytes, small, with_message

VERBS = {
    "branch": lambda store: store.branch("m", "n"),
    "tag": lambda store: store.tag("m", "n"),
    "rollback": lambda store: store.rollback("m"),
    "annotate": lambda store: store.annotate("m", message="x"),
    "pin": lambda store: store.pin("m"),
    "unpin": lambda store: store.unpin("m"),
    "rm": lambda store: store.rm("m"),
    "log": lambda store: store.log("m"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("there", [False, True], ids=["no store", "no such name"])
def test_what_is_not_there_is_not_found_and_nothing_is_made(store, verb, there):
    if there:
        store.put(small(), "other")
    before = every_byte(store.path) if there else None
    with pytest.raises(NotFound):
        verb(store)
    assert (every_byte(store.path) if store.path.exists() else None) == before


@pytest.mark.parametrize("verb", ["branch", "tag"])
def test_a_second_name_costs_a_log_line(store, verb):
    memory = small()
    first = store.put(memory, "m", "said", ["t"], source="s", licence="l", metrics={"kl": 1.0})
    packs, written = pack_bytes(store), store.counters.bytes_written
    record = getattr(store, verb)(first.content[:10], "n", "why")
    assert pack_bytes(store) == packs
    assert store.counters.bytes_written - written < 2500
    kept = ("record", "content", "tags", "source", "licence", "metrics", "bytes", "dtype")
    assert [getattr(record, k) for k in kept] == [getattr(first, k) for k in kept]
    assert (record.name, record.version, record.message) == ("n", 1, "why")
    store.rm("m")
    store.gc(waste=0)
    assert_same(store.get("n"), memory)
    assert store.fsck().ok


def test_a_branch_moves_alone(store):
    store.put(small(0), "m")
    store.branch("m", "n")
    store.put(small(1), "n")
    assert_same(store.get("m"), small(0))
    assert_same(store.get("n@{1}"), small(0))


def test_a_tag_moves_only_by_force_and_stays_a_tag(store):
    store.put(small(0), "m")
    store.put(small(1), "m")
    store.tag("m@{1}", "v1")
    assert store.put(small(0), "v1").version == 1  # it is there already
    for move in (
        lambda: store.put(small(1), "v1"),
        lambda: store.put_many({"x": small(2), "v1": small(1)}),
        lambda: store.rollback("v1", 0),
    ):
        with pytest.raises(InvalidArgument, match="is a tag"):
            move()
    assert_same(store.get("v1"), small(0))
    assert store.put(small(1), "v1", force=True).version == 2
    with pytest.raises(InvalidArgument, match="is a tag"):
        store.put(small(2), "v1")
    store.rm("v1")
    assert store.put(small(2), "v1").version == 1
    store.put(small(3), "v1")  # a name as any other


def test_the_refs_survive_a_new_index(store):
    store.put(small(0), "m")
    store.put(small(1), "m", ttl=1000)
    store.branch("m", "b")
    store.tag("m", "t")
    store.rollback("m")
    store.annotate("m@{1}", tags=["x"], metrics={"kl": 0.5})
    store.pin("b")
    before = (store.ls(), store.log("m"), store.log("t"))
    store.rebuild_index()
    assert (store.ls(), store.log("m"), store.log("t")) == before
    assert [(e.name, e.pinned, e.fixed) for e in store.ls()] == [
        ("b", True, False),
        ("m", False, False),
        ("t", False, True),
    ]


# Rollback


def test_rollback_takes_numbers_and_digests_of_this_name(store):
    records = [store.put(small(seed), "m") for seed in range(3)]
    assert store.rollback("m", 2).content == records[0].content
    assert store.rollback("m", records[1].record).content == records[1].content
    assert store.rollback("m", records[2].content[:12]).content == records[2].content
    assert [record.version for record in store.log("m")] == [6, 5, 4, 3, 2, 1]
    assert store.log("m")[0].message == "back to v3"


def test_rollback_says_its_own_version_and_keeps_its_own_labels(store):
    """The newest version of a digest may be another name's."""
    for seed in range(2):
        store.put(small(9), f"filler{seed}")
    store.put(small(1), "m", tags=["mine"])
    store.put(small(2), "m")
    store.put(small(3), "n")
    theirs = store.put(small(1), "n", tags=["theirs"])
    record = store.rollback("m", theirs.record)
    assert (record.message, record.tags) == ("back to v1", ("mine",))


def test_rollback_to_a_content_that_another_name_has_newer(store):
    memory = small()
    mine = store.put(with_message(memory, "{}"), "m")
    store.put(small(2), "m")
    theirs = store.put(with_message(memory, '{"again":1}'), "n")
    assert theirs.content == mine.content
    assert store.rollback("m", mine.content).record == mine.record


def test_rollback_to_another_name_is_refused(store):
    store.put(small(1), "m")
    other = store.put(small(2), "n")
    for to in ("n", other.record, other.content[:20], 1, -1, "nothing"):
        with pytest.raises((NotFound, InvalidArgument)):
            store.rollback("m", to)
    assert len(store.log("m")) == 1


def test_a_rollback_beside_a_put_is_told(store, monkeypatch):
    store.put(small(0), "m")
    store.put(small(1), "m")
    other = Store(store.path, "process")
    point = store._point

    def late(*args):
        other.put(small(2), "m")
        return point(*args)

    monkeypatch.setattr(store, "_point", late)
    with pytest.raises(RaceLost):
        store.rollback("m")
    assert_same(store.get("m"), small(2))


def test_a_branch_of_what_goes_meanwhile_is_not_found(store, monkeypatch):
    store.put(small(0), "m")
    other = Store(store.path, "process")
    point = store._point

    def late(*args):
        other.rm("m")
        other.gc()
        return point(*args)

    monkeypatch.setattr(store, "_point", late)
    with pytest.raises(NotFound):
        store.branch("m", "n")
    assert store.names() == [] and store.fsck().ok


# Notes


def test_a_note_changes_what_it_names_and_nothing_else(store):
    store.put(small(0), "m", "one", ["a"], source="s", licence="l", metrics={"kl": 1}, ttl=1000)
    old = store.put(small(1), "m", "two")
    noted = store.annotate("m@{1}", message="first", metrics={"kl": 2, "top1": 0.5})
    before = store.log("m")[1]
    assert noted == before
    assert (noted.version, noted.message, noted.tags) == (1, "first", ("a",))
    assert (noted.source, noted.licence, noted.metrics) == ("s", "l", {"kl": 2.0, "top1": 0.5})
    assert noted.expires is not None
    assert store.log("m")[0] == old
    assert store.annotate("m@{1}", ttl=0).expires is None
    assert store.annotate("m@{1}", tags=[], source="", licence="").tags == ()
    digests = {record.record for record in store.log("m")}
    assert digests == {noted.record, old.record}  # labels are in no digest
    assert_same(store.get("m@{1}"), small(0))


def test_a_bad_note_changes_nothing(store):
    before = store.put(small(), "m", tags=["a"])
    for bad in (
        {"tags": "text"},
        {"tags": [""]},
        {"metrics": {"kl": float("inf")}},
        {"metrics": {"": 1.0}},
        {"metrics": {"kl": True}},
        {"ttl": -1},
        {"message": "\ud800"},
        {"source": 3},
    ):
        with pytest.raises(InvalidArgument):
            store.annotate("m", **bad)
        assert store.log("m") == [before]


# Time to live, pins


def expire(store, ref):
    store.annotate(ref, ttl=0.001)
    time.sleep(0.01)


def test_ttl_is_when_it_says(store):
    before = datetime.now(UTC)
    record = store.put(small(), "m", ttl=3600)
    assert record.expires - before - timedelta(hours=1) < timedelta(seconds=30)
    assert record.expires >= before + timedelta(hours=1)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="ttl"):
            store.put(small(), "n", ttl=bad)


def test_what_expired_is_gone_before_gc_and_its_bytes_after(store):
    store.put_many({"a": small(1), "b": small(2)}, ttl=1000)
    store.put(small(3), "c")
    expire(store, "a")
    expire(store, "b")
    assert "a" not in store and store.names() == ["c"] and [e.name for e in store.ls()] == ["c"]
    with pytest.raises(NotFound):
        store.log("a")
    held = pack_bytes(store)
    assert store.gc().expired == 2
    assert pack_bytes(store) < 0.5 * held
    assert store.put(small(4), "a").version == 1
    assert store.fsck().ok


def test_an_older_version_without_ttl_is_the_newest_then(store):
    store.put(small(0), "m")
    store.put(small(1), "m")
    expire(store, "m")
    assert_same(store.get("m"), small(0))
    store.gc()
    assert_same(store.get("m"), small(0))
    assert store.names() == ["m"] and store.ls()[0].versions == 1
    assert store.put(small(2), "m").version == 3  # no number is given twice


@pytest.mark.parametrize("look", [Store.names, lambda s: [e.name for e in s.ls()]])
def test_listings_agree_with_get_before_gc(store, look):
    store.put(small(0), "m")
    store.put(small(1), "m")
    expire(store, "m")
    assert "m" in store
    assert look(store) == ["m"]


def test_a_pin_keeps_out_of_expiry(store):
    store.put(small(1), "m", ttl=1000)
    store.pin("m")
    expire(store, "m")
    assert store.gc().expired == 0
    assert_same(store.get("m"), small(1))
    assert store.names() == ["m"]
    store.unpin("m")
    assert "m" not in store
    assert store.gc().expired == 1


# Many, pages, conditions


def test_many_are_one_write_and_one_line(store):
    store.put(small(0), "a")
    lines = (store.path / "log.jsonl").read_text().count("\n")
    shared = small(1)
    records = store.put_many({"a": shared, "b": shared, "c": small(2)}, tags=["t"], ttl=1000)
    assert [(r.name, r.version, r.tags) for r in records] == [
        ("a", 2, ("t",)),
        ("b", 1, ("t",)),
        ("c", 1, ("t",)),
    ]
    assert (store.path / "log.jsonl").read_text().count("\n") == lines + 1
    assert len(files(store, "packs/*")) == 2
    again = store.put_many({"a": shared, "b": shared, "c": small(2)})
    assert again == records  # nothing changed, nothing written
    assert (store.path / "log.jsonl").read_text().count("\n") == lines + 1


@pytest.mark.parametrize("bad", [{"no name!": small()}, {"n": None}])
def test_many_are_put_or_none(store, bad):
    store.put(small(0), "a")
    before = every_byte(store.path / "packs")
    with pytest.raises((InvalidArgument, AttributeError, TypeError)):
        store.put_many({"new": small(3), **bad})
    assert store.names() == ["a"] and every_byte(store.path / "packs") == before


def test_pages_cover_everything_once(store):
    names = sorted(f"{kind}/{n}" for kind in ("a", "b") for n in range(8))
    store.put_many({name: small(n) for n, name in enumerate(names)})
    for where, wanted in (
        (None, names),
        ("b/*", [n for n in names if n[0] == "b"]),
        (lambda e: e.name[-1] in "135", [n for n in names if n[-1] in "135"]),
    ):
        found, after = [], ""
        while page := store.ls(where, limit=3, after=after):
            assert len(page) <= 3
            found += [entry.name for entry in page]
            after = page[-1].name
        assert found == wanted
    assert store.ls(limit=0) == [] and len(store.ls(limit=100)) == 16
    assert store.ls(after="b/7") == []


def test_conditions_and_functions_find_the_same(store):
    for seed in range(6):
        tags = ["even"] if seed % 2 == 0 else []
        store.put(small(seed, slots=seed + 1), f"m{seed}", tags=tags, metrics={"kl": seed / 10})
    store.pin("m3")
    pairs = [
        ("tag = even", lambda e: "even" in e.tags),
        ("tag != even and slots > 2", lambda e: "even" not in e.tags and e.slots > 2),
        ("metric.kl < 0.25 or pinned = true", lambda e: e.metrics["kl"] < 0.25 or e.pinned),
        ("not (name ~ m[0-2])", lambda e: e.name not in ("m0", "m1", "m2")),
    ]
    for text, test in pairs:
        assert [e.name for e in store.ls(text)] == [e.name for e in store.ls(test)], text
        assert 0 < len(store.ls(text)) < 6, text


def test_unknown_codec(store):
    with pytest.raises((UnknownName, InvalidArgument)):
        store.put(small(), "m", codec="zip")
    assert not store.path.exists()
