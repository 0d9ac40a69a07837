"""Memories that stay in RAM: the same bits, within a budget, never an unchecked one."""

import pytest
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.store import Store

from .conftest import assert_same, build_memory, files, flip, with_bias


def weight(memory):
    return memory.nbytes + sum(t.nbytes for _, t in memory.source.tensors())


MEMORY = build_memory(0, slots=200)


@pytest.fixture
def filled(store):
    for seed in range(4):
        store.put(build_memory(seed, slots=200), f"m{seed}")
    return store


def live(store, count=2, **how):
    return Store(store.path, "process", ram=int(count * weight(MEMORY)), **how)


def held(store, tier="ram"):
    return store.stats().tiers[tier].records


def test_a_hit_reads_nothing_and_is_the_same_memory(filled):
    store = live(filled)
    first = store.get("m0")
    before = store.counters.to_json()
    second = store.get("m0")
    after = store.counters.to_json()
    assert after["live_hits"] == before["live_hits"] + 1 and after["hits"] == before["hits"] + 1
    assert after["bytes_read"] == before["bytes_read"]
    assert_same(first, second)
    assert_same(second, build_memory(0, slots=200))
    assert second.verified


def test_put_lifts_what_it_put(tmp_path):
    store = Store(tmp_path / "s", "process", ram="10MiB")
    memory = build_memory(1, bias=True)
    store.put(memory, "m")
    assert_same(store.get("m"), memory)
    assert (store.counters.live_hits, store.counters.bytes_read) == (1, 0)
    lossy = store.put(memory, "n", codec="int8")
    found = store.get("n")
    assert found.digest == lossy.content != memory.digest
    assert_same(Store(store.path).get("n"), found)


def test_the_budget_is_kept_and_the_last_used_stay(filled):
    store = live(filled, 2.5)
    for name in ("m0", "m1", "m0", "m2"):  # m1 goes
        store.get(name)
        usage = store.stats().tiers["ram"]
        assert usage.bytes <= usage.budget == int(2.5 * weight(MEMORY))
        assert usage.bytes == usage.records * weight(MEMORY)
    assert (held(store), store.counters.evicted) == (2, 1)
    hits = store.counters.live_hits
    store.get("m0")
    store.get("m2")
    assert store.counters.live_hits == hits + 2
    store.get("m1")
    assert store.counters.live_hits == hits + 2


def test_what_is_bigger_than_the_budget_is_read_each_time(filled):
    store = live(filled, 0.5)
    for _ in range(2):
        assert_same(store.get("m0"), MEMORY)
    assert held(store) == 0 and store.counters.live_hits == store.counters.evicted == 0


def test_a_memory_that_was_written_to_is_dropped_and_read_again(filled):
    store = live(filled)
    store.get("m0")
    hit = store.get("m0")
    hit.layers[1].values[0, 0, 0] += 1
    before = store.counters.live_hits
    assert_same(store.get("m0"), MEMORY)
    assert store.counters.live_hits == before
    assert_same(store.get("m0"), MEMORY)
    assert store.counters.live_hits == before + 1
    assert store.stats().tiers["ram"].bytes == weight(MEMORY)


def test_what_was_put_or_read_is_not_what_is_held(tmp_path, filled):
    """It owns its tensors: nobody's writes reach it, and no file is mapped into it."""
    memory = build_memory(7)
    store = Store(tmp_path / "own", "process", ram="10MiB")
    store.put(memory, "m")
    memory.layers[0].keys.zero_()
    memory.source.tokens.zero_()
    assert_same(store.get("m"), build_memory(7))
    assert store.counters.live_hits == 1
    other = live(filled)
    mapped = other.get("m0")
    mapped.layers[0].keys.zero_()
    again = other.get("m0")
    assert_same(again, MEMORY)
    sizes = {t.untyped_storage().nbytes() for _, t in again.layers[0].tensors()}
    assert max(sizes) <= again.layers[0].keys.nbytes


def test_a_memory_that_is_written_to_while_it_is_put_is_not_held(tmp_path, monkeypatch):
    store = Store(tmp_path / "s", "process", ram="10MiB")
    memory = build_memory(1)
    commit = store._writer.put

    def late(puts, seen):
        records = commit(puts, seen)
        memory.layers[0].keys.zero_()
        return records

    monkeypatch.setattr(store._writer, "put", late)
    store.put(memory, "m")
    assert held(store) == 0
    assert_same(store.get("m"), build_memory(1))


@pytest.mark.parametrize("verify", ["off", "fast"])
def test_only_what_was_checked_in_full_is_held(filled, verify):
    store = live(filled)
    store.get("m0", verify=verify)
    assert held(store) == 0
    store.get("m0")
    assert held(store) == 1


def test_a_forged_memory_can_not_slip_in_by_a_quick_check(filled, monkeypatch):
    from kvedit.store import reader

    path = next(p for p in files(filled, "packs/*"))
    names = [n for n in filled.names() if path.stem in filled.show(n).packs]
    extent = filled._finder.header(path.stem).extents[0]
    flip(path, extent.offset)
    store = live(filled)
    monkeypatch.setattr(reader, "checksum", lambda buffers: extent.checksum)
    for name in names[:1]:
        with pytest.raises(CorruptMemory):
            store.get(name)
        with pytest.raises(CorruptMemory):
            store.get(name)
    assert held(store) == 0


def test_an_unverified_memory_is_verified_once_it_is_put(filled):
    store = live(filled)
    memory = store.get("m0", verify="off")
    edited = with_bias(memory)
    assert not memory.verified
    store.put(edited, "edit")
    assert store.get("edit").verified == live(filled).get("edit").verified is True


def test_device_and_dtype_are_made_of_what_is_held(filled):
    store = live(filled)
    store.get("m0")
    half = store.get("m0", dtype=torch.float16)
    assert half.digest == MEMORY.to(dtype=torch.float16).digest
    assert store.counters.live_hits == 1
    assert_same(store.get("m0", device="cpu"), MEMORY)


def test_two_tiers(filled):
    device = ("cpu", int(1.2 * weight(MEMORY)))
    store = live(filled, 3, device=device)
    for name in ("m0", "m1", "m2"):
        store.get(name)
    tiers = store.stats().tiers
    assert (tiers["cpu"].records, tiers["ram"].records) == (1, 3)
    assert tiers["cpu"].bytes <= device[1]
    assert "cpu: 1 memories" in str(store.stats())
    read = store.counters.bytes_read
    for name in ("m0", "m1", "m2"):
        store.get(name)
    assert store.counters.bytes_read == read and store.counters.live_hits == 3


def test_names_move_and_what_is_held_does_not_mislead(filled):
    store = live(filled, 4)
    store.get("m0")
    other = Store(filled.path, "process")
    other.put(build_memory(9, slots=200), "m0")
    assert_same(store.get("m0"), build_memory(9, slots=200))
    assert_same(store.get("m0@{1}"), MEMORY)
    other.rm("m0")
    with pytest.raises(NotFound):
        store.get("m0")
    with pytest.raises(NotFound):
        store.get(MEMORY.digest)


def test_parts_do_not_come_from_there_and_are_not_held(filled):
    store = live(filled)
    part = store.get("m0", layers=[1])
    assert held(store) == 0 and not part.complete
    store.get("m0")
    assert torch.equal(store.get("m0", slots=(3, 9)).layers[0].keys, MEMORY.layers[0].keys[:, 3:9])


def test_close_forgets(filled):
    store = live(filled)
    store.get("m0")
    store.close()
    assert held(store) == 0 and store.stats().tiers["ram"].bytes == 0
    assert_same(store.get("m0"), MEMORY)


@pytest.mark.parametrize("bad", [0, -1, "much", True])
def test_bad_budgets(tmp_path, bad):
    for how in ({"ram": bad}, {"device": ("cpu", bad)}):
        with pytest.raises(InvalidArgument):
            Store(tmp_path / "s", **how)
