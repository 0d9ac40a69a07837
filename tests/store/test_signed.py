"""Trusted keys: what none of them signed is not read, on whatever way it came."""

import pytest

from kvedit.editors import Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.errors import InvalidArgument, UntrustedMemory
from kvedit.store import Signer, Store

from .conftest import assert_same, build_memory, small

MINE, THEIRS = Signer.from_key(bytes(range(32))), Signer.from_key(bytes(range(1, 33)))


def strict(path, **how):
    return Store(path, "process", trusted_keys=[MINE.public], **how)


@pytest.fixture
def path(tmp_path):
    """A folder with what I signed, what somebody else signed, and what nobody did."""
    folder = tmp_path / "s"
    for name, seed, signer in (("mine", 1, MINE), ("theirs", 2, THEIRS), ("plain", 3, None)):
        Store(folder, "process", signer=signer).put(small(seed), name)
    return folder


READS = {
    "get": lambda store, name: store.get(name),
    "unverified": lambda store, name: store.get(name, verify="off"),
    "a part": lambda store, name: store.get(name, layers=[0], slots=(0, 2)),
    "peek": lambda store, name: store.peek(name),
    "show": lambda store, name: store.show(name),
    "lineage": lambda store, name: store.lineage(name),
    "export": lambda store, name: store.export(name, store.path.parent / "exported"),
    "prefetch": lambda store, name: store.prefetch(name).result(),
    "memory of a step": lambda store, name: (
        store.memory_of(small(0).lineage.head.id) or store.get(name)
    ),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("ram", [None, "1MiB"])
def test_every_way_to_read_asks_for_the_signature(path, read, ram):
    store = strict(path, ram=ram)
    read(store, "mine")
    for name in ("theirs", "plain"):
        for ref in (name, store.log(name)[0].record):
            with pytest.raises(UntrustedMemory):
                read(store, ref)
    assert [record.signed_by for record in store.ls()] == [MINE.public, "", THEIRS.public]


def test_both_keys_may_be_trusted_and_letters_do_not_matter(path):
    store = Store(path, trusted_keys=[MINE.public.upper(), THEIRS.public])
    assert_same(store.get("mine"), small(1))
    assert_same(store.get("theirs"), small(2))
    with pytest.raises(UntrustedMemory, match="not signed"):
        store.get("plain")


def test_a_store_puts_only_what_it_reads_back(path):
    for signer in (None, THEIRS):
        store = strict(path, signer=signer)
        for put in (
            lambda store=store: store.put(small(9), "new"),
            lambda store=store: store.put_many({"new": small(9)}),
            lambda store=store: store.put_async(small(9), "new").result(),
        ):
            with pytest.raises(InvalidArgument, match="trusted_keys"):
                put()
        assert "new" not in store
    store = strict(path, signer=MINE)
    assert store.put(small(9), "new").signed_by == MINE.public
    assert_same(store.get("new"), small(9))
    assert all(r.signed_by == MINE.public for r in store.put_many({"a": small(4), "b": small(5)}))
    assert_same(strict(path).get("b"), small(5))


def test_a_signature_of_the_same_record_makes_it_trusted(path):
    store = strict(path, signer=MINE)
    with pytest.raises(UntrustedMemory):
        store.get("plain")
    store.put(small(3), "mine/too")
    assert_same(store.get("plain"), small(3))  # the very record


@pytest.mark.parametrize("verb", ["branch", "tag"])
def test_names_are_not_signed_and_signatures_go_along(path, verb):
    store = strict(path)
    assert getattr(store, verb)("mine", "n").signed_by == MINE.public
    assert_same(store.get("n"), small(1))
    getattr(store, verb)("theirs", "o")
    with pytest.raises(UntrustedMemory):
        store.get("o")
    store.rebuild_index()
    assert_same(store.get("n"), small(1))


def test_a_signature_is_for_one_namespace(tmp_path):
    a = Store(tmp_path / "s", "process", namespace="a", signer=MINE)
    a.put(small(1), "m")
    a.export("m", tmp_path / "f")
    with pytest.raises(UntrustedMemory):
        strict(tmp_path / "s", namespace="b").import_(tmp_path / "f")
    found = Store(tmp_path / "s", "process", namespace="b", signer=MINE).import_(tmp_path / "f")
    assert found.signed_by == MINE.public  # signed anew, by who imported it
    assert_same(strict(tmp_path / "s", namespace="b").get("m"), small(1))


def test_what_is_pulled_is_asked_for_its_signature(tmp_path):
    (tmp_path / "r").mkdir()
    remote = f"file://{tmp_path / 'r'}"
    for name, seed, signer in (("mine", 1, MINE), ("theirs", 2, THEIRS), ("plain", 3, None)):
        with Store(tmp_path / name, "process", signer=signer, remote=remote) as store:
            store.put(small(seed), name)
    for eager in (True, False):
        store = strict(tmp_path / f"s{eager}", remote=remote)
        store.pull(eager=eager)
        assert_same(store.get("mine"), small(1))
        for name in ("theirs", "plain"):
            with pytest.raises(UntrustedMemory):
                store.get(name)
            with pytest.raises(UntrustedMemory):
                store.peek(name, slots=(0, 1))


def test_signatures_survive_gc_rebuild_and_repair(path):
    writer = Store(path, "process", signer=MINE)
    writer.put_many({"x": build_memory(1), "y": build_memory(2)})
    writer.rm("y")
    writer.gc(waste=0)
    writer.rebuild_index()
    assert writer.fsck(repair=True).ok
    assert_same(strict(path).get("x"), build_memory(1))


def test_a_signed_recipe(tmp_path):
    store = strict(tmp_path / "s", signer=MINE, replay=rebuild)
    base = build_memory(1)
    edited = Emphasize(span={"tokens": (3, 9)}, strength=1.5)(base)
    store.put(base, "base")
    assert store.put(edited, "edit", recipe=True).signed_by == MINE.public
    assert_same(store.get("edit"), edited)
    Store(tmp_path / "s", "process", replay=rebuild).put(edited, "unsigned", recipe=True)
    assert_same(store.get("unsigned"), edited)  # the same record, which is signed
    other = Store(tmp_path / "s", trusted_keys=[THEIRS.public], replay=rebuild)
    with pytest.raises(UntrustedMemory):
        other.get("edit")


def test_a_signed_recipe_outlives_the_name_of_its_base(tmp_path):
    store = strict(tmp_path / "s", signer=MINE, replay=rebuild)
    base = build_memory(1)
    edited = Emphasize(span={"tokens": (3, 9)}, strength=1.5)(base)
    store.put(base, "base")
    store.put(edited, "edit", recipe=True)
    store.rm("base")
    assert_same(store.get("edit"), edited)


def test_a_changed_pack_is_found_at_every_read(path):
    """Who can write to the folder can make checksums; a signature holds only with digests."""
    store = strict(path, ram=None)
    assert_same(store.get("mine"), small(1))
    before = store.counters.bytes_verified
    store.get("mine")
    assert store.counters.bytes_verified > before


@pytest.mark.parametrize("bad", [["x"], ["0" * 63], [3], MINE.public])
def test_bad_trusted_keys(path, bad):
    with pytest.raises(InvalidArgument):
        Store(path, trusted_keys=bad).get("mine")
