"""du: the bytes of names add up, and removing one frees what it says."""

import pytest

from kvedit.editors import Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.store import Store

from .conftest import build_memory, files, pack_bytes, small, with_bias


def headers(store):
    return sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in files(store, "packs/*"))


@pytest.fixture
def filled(store):
    base = build_memory(1, slots=700)
    store.put(base, "base")
    store.put(with_bias(base), "edit")
    store.put(with_bias(base, value=2.0), "edit")
    store.branch("base", "branch")
    store.put(build_memory(2), "alone", codec="planes-zstd")
    store.put(build_memory(3), "gone")
    store.rm("gone")
    return store


def test_bytes_add_up(filled):
    usage = filled.du()
    assert usage.packs == usage.local == pack_bytes(filled)
    own = sum(one.own for one in usage.names)
    # What two names share is counted once: base and branch hold the same, edit nearly so.
    names = {one.name: one for one in usage.names}
    shared = names["base"].stored - names["base"].own
    assert names["base"].own == names["branch"].own == 0
    assert own + shared + usage.garbage + headers(filled) == usage.packs
    assert usage.logical == sum(one.logical for one in usage.names)
    assert names["edit"].versions == 2
    assert names["edit"].logical == sum(record.bytes for record in filled.log("edit"))
    assert [one.stored for one in usage.names] == sorted(
        (one.stored for one in usage.names), reverse=True
    )


@pytest.mark.parametrize("name", ["base", "edit", "branch", "alone"])
def test_removing_frees_what_it_owns(filled, name):
    filled.gc(waste=0)
    own = {one.name: one.own for one in filled.du().names}[name]
    filled.rm(name)
    assert filled.du().garbage == own
    freed = filled.gc(waste=0).freed
    assert own <= freed <= own + 20_000  # with headers


def test_a_recipe_needs_its_base(tmp_path):
    store = Store(tmp_path / "s", "process", replay=rebuild)
    base = build_memory(1)
    store.put(base, "base")
    store.put(Emphasize(span={"tokens": (3, 9)}, strength=1.5)(base), "edit", recipe=True)
    names = {one.name: one for one in store.du().names}
    assert names["base"].own == 0  # removing it frees nothing
    assert names["edit"].stored > names["base"].stored
    store.rm("base")
    assert store.du().garbage == 0
    assert store.gc(waste=0).freed == 0


def test_an_empty_store_has_nothing(store):
    usage = store.du()
    assert (usage.names, usage.packs, usage.garbage, usage.index) == ((), 0, 0, 0)


def test_evicted_packs_count_and_are_not_here(tmp_path):
    (tmp_path / "r").mkdir()
    store = Store(tmp_path / "s", "process", remote=f"file://{tmp_path / 'r'}")
    store.put(build_memory(1), "m")
    whole = store.du()
    freed = store.evict("1GiB")
    usage = store.du()
    assert freed == whole.local == usage.packs and usage.local == 0
    assert usage.names == whole.names
    assert store.put(small(), "n") and store.du().local > 0
