"""A folder with little room: what goes, what stays, and that nothing is ever only gone."""

import time

import pytest

from kvedit.errors import CapacityExceeded, InvalidArgument
from kvedit.store import Store

from .conftest import assert_same, build_memory, files, pack_bytes, small, temporaries, with_bias


def memory(seed):
    """About 40 KB; of other memories it shares only the positions."""
    made = build_memory(seed, layers=2, slots=150)
    return with_bias(made, value=float(seed + 1))


@pytest.fixture(scope="module")
def size(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("size") / "s", "none")
    store.put(memory(0), "m")
    store.put(memory(1), "n")
    return max(path.stat().st_size for path in files(store, "packs/*"))


@pytest.fixture
def remote(tmp_path):
    (tmp_path / "r").mkdir()
    return f"file://{tmp_path / 'r'}"


@pytest.fixture
def make(tmp_path, remote, size):
    def build(count, **how):
        return Store(tmp_path / "s", "process", capacity=int(count * size), remote=remote, **how)

    return build


def here(store):
    """Names whose keys lie in the folder."""
    held = {path.stem for path in files(store, "packs/*")}
    found = []
    for name in store.names():
        manifest = store._finder.manifest(store.log(name)[0].record, "")
        blocks = {block.digest for block in manifest.parts[0, "keys"].blocks}
        packs = {pack for pack, _, _ in store._shelf.index.locate(blocks).values()}
        found += [name] if packs <= held else []
    return found


def pause():
    time.sleep(0.02)  # the clock of file systems is coarse


def test_it_never_holds_more_than_it_may(make, size):
    store = make(3.2)
    for seed in range(8):
        store.put(memory(seed), f"m{seed}")
        assert pack_bytes(store) <= 3.2 * size
        assert store.stats().local == store.du().local == pack_bytes(store)
    stats = store.stats()
    assert stats.bytes > 7 * size * 0.9 and stats.names == stats.packs == 8
    assert stats.counters.evicted == 8 - len(files(store, "packs/*"))
    for seed in range(8):
        assert_same(store.get(f"m{seed}"), memory(seed))
        assert pack_bytes(store) <= 3.2 * size
    assert store.fsck().ok and temporaries(store) == []


def test_the_least_recently_used_goes_first(make):
    store = make(3.2)
    for seed in range(3):
        store.put(memory(seed), f"m{seed}")
        pause()
    store.get("m0")
    pause()
    store.peek("m2")
    pause()
    store.put(memory(3), "m3")
    assert here(store) == ["m0", "m2", "m3"]
    pause()
    store.put(memory(4), "m4")
    assert here(store) == ["m2", "m3", "m4"]


def test_the_order_of_use_outlives_the_process(make):
    store = make(3.2)
    for seed in range(3):
        store.put(memory(seed), f"m{seed}")
        pause()
    store.get("m0")
    store.close()
    pause()
    store = make(3.2)
    store.put(memory(3), "m3")
    assert here(store) == ["m0", "m2", "m3"]


def test_a_read_brings_it_back_and_pushes_another_out(make):
    store = make(2.2)
    for seed in range(3):
        store.put(memory(seed), f"m{seed}")
        pause()
    assert here(store) == ["m1", "m2"]
    before = store.counters.fetched
    assert_same(store.get("m0"), memory(0))
    assert store.counters.fetched == before + 1
    assert here(store) == ["m0", "m2"]
    read = store.counters.fetched
    assert_same(store.get("m0"), memory(0))
    assert store.counters.fetched == read


def test_pinned_names_stay(make):
    store = make(3.2)
    store.put(memory(0), "m0")
    store.pin("m0")
    for seed in range(1, 6):
        pause()
        store.put(memory(seed), f"m{seed}")
        assert "m0" in here(store)
    assert store.evict("1GiB") > 0
    assert here(store) == ["m0"]
    store.unpin("m0")
    store.evict("1GiB")
    assert here(store) == [] and pack_bytes(store) == 0
    assert_same(store.get("m0"), memory(0))


def test_what_is_pinned_leaves_no_room(make):
    store = make(2.2)
    for name, seed in (("a", 0), ("b", 1)):
        store.put(memory(seed), name)
        store.pin(name)
    before = {p: p.read_bytes() for p in files(store, "packs/*")}
    with pytest.raises(CapacityExceeded, match="unpin"):
        store.put(memory(2), "c")
    assert store.names() == ["a", "b"]
    assert {p: p.read_bytes() for p in files(store, "packs/*")} == before
    assert store.put(memory(1), "d")  # costs a log line
    store.unpin("b")
    store.rm("d")
    assert_same(store.put(memory(2), "c") and store.get("c"), memory(2))


def test_without_a_remote_store_nothing_goes(tmp_path, size):
    store = Store(tmp_path / "s", "process", capacity=int(2.2 * size))
    store.put(memory(0), "a")
    store.put(memory(1), "b")
    with pytest.raises(CapacityExceeded, match="push"):
        store.put(memory(2), "c")
    with pytest.raises(CapacityExceeded):
        store.put_many({"x": small(5), "c": memory(2)})
    assert store.names() == ["a", "b"] and store.evict("1GiB") == 0
    assert_same(store.get("a"), memory(0))
    store.rm("a")
    store.gc()
    store.put(memory(2), "c")
    assert_same(store.get("c"), memory(2)) or store.fsck().ok


def test_what_was_not_pushed_stays(make, size):
    store = make(2.2, write="back")
    store.put(memory(0), "a")
    store.put(memory(1), "b")
    assert store.evict("1GiB") == 0
    with pytest.raises(CapacityExceeded, match="push"):
        store.put(memory(2), "c")
    store.push("a")
    store.put(memory(2), "c")
    assert here(store) == ["b", "c"]
    store.flush()
    assert_same(store.get("a"), memory(0))


def test_what_the_remote_store_lost_meanwhile_stays(make, tmp_path):
    store = make(2.2)
    store.put(memory(0), "a")
    (mine,) = files(store, "packs/*")
    for path in (tmp_path / "r").rglob("*"):
        if path.is_file() and mine.stem in path.name:
            path.unlink()
    assert store.evict("1GiB") == 0  # it looks before it lets go
    assert_same(store.get("a"), memory(0))


def test_headers_stay_and_an_edit_of_what_is_away_costs_what_it_changed(make, size):
    store = make(3.2)
    base = memory(0)
    store.put(base, "base")
    store.evict("1GiB")
    written = store.counters.bytes_written
    store.put(with_bias(base, layer=1), "edit")
    assert store.counters.bytes_written - written < 0.5 * size
    assert here(store) == []
    store.rebuild_index()  # from the headers
    assert_same(store.get("edit"), with_bias(base, layer=1))
    assert store.fsck().ok


def test_gc_of_what_is_away(make, size):
    store = make(3.2)
    store.put_many({"a": memory(0), "b": memory(1)})
    store.evict("1GiB")
    store.rm("a")
    assert store.gc(waste=0).kept > 0  # it lies below
    assert_same(store.get("b"), memory(1))
    store.rm("b")
    store.gc()
    assert files(store, "packs/*") == files(store, "headers/*") == []


def test_evict_lets_go_what_it_is_asked_for(make, size):
    store = make(9)
    for seed in range(4):
        store.put(memory(seed), f"m{seed}")
        pause()
    before = pack_bytes(store)
    freed = store.evict(int(1.5 * size))
    assert 1.5 * size <= freed < 2.5 * size
    assert pack_bytes(store) == before - freed
    assert here(store) == ["m2", "m3"]
    for bad in (0, -5, "ten", "1GB", 1.5, True, None):
        with pytest.raises(InvalidArgument):
            store.evict(bad)


def test_bad_capacities(tmp_path):
    for bad in (0, -1, "x", "1 TB", True):
        with pytest.raises(InvalidArgument):
            Store(tmp_path / "s", capacity=bad)
    assert list(tmp_path.iterdir()) == []


def test_a_memory_of_more_packs_than_there_is_room_for_is_still_read(make):
    """What is mapped stays readable while the next pack pushes its file out."""
    store = make(1.2)
    base = memory(0)
    half = base.with_layers({1: memory(5).layers[1]})
    store.put(base, "base")
    store.put(half, "half")
    before = store.counters.fetched
    assert_same(store.get("half"), half)
    assert_same(store.get("base"), base)
    assert store.counters.fetched - before <= 4
