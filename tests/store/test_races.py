"""Many at once: one winner, no lost update, nothing confused."""

import dataclasses
import multiprocessing
import os
import threading
import time

import pytest

from kvedit.errors import NotFound, RaceLost
from kvedit.store import Store

from .conftest import assert_same, build_memory, with_bias

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def small(seed=0):
    return build_memory(seed, layers=1, slots=4)


def _race(folder, number, expect, seed, barrier, results):
    store = Store(folder, "none")
    memory = small(seed + number)
    barrier.wait()
    try:
        results.put((number, store.put(memory, "name", expect=expect).record))
    except RaceLost as error:
        results.put((number, None if "expected at" in str(error) else "unclear"))


def race(folder, expect, seed):
    barrier, results = FORK.Barrier(16), FORK.Queue()
    jobs = [
        FORK.Process(target=_race, args=(folder, n, expect, seed, barrier, results))
        for n in range(16)
    ]
    for job in jobs:
        job.start()
    found = dict(results.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
    return {number: record for number, record in found.items() if record is not None}


def test_sixteen_create_and_move_one_name(tmp_path):
    for number in range(10):
        folder = tmp_path / str(number)
        Store(folder, "none").put(small(), "other")
        (created,) = race(folder, "", 1000).items()
        store = Store(folder)
        assert store.log("name")[0].record == created[1]
        assert_same(store.get("name"), small(1000 + created[0]))
        (moved,) = race(folder, created[1], 2000).items()
        assert [record.record for record in store.log("name")] == [moved[1], created[1]]
        assert_same(store.get("name"), small(2000 + moved[0]))


def _updates(folder, number, force, barrier, results):
    store = Store(folder, "none")
    barrier.wait()
    for turn in range(3):
        try:
            results.put(store.put(small(100 * number + turn), "name", force=force).record)
        except RaceLost:
            assert not force
            results.put(None)


@pytest.mark.parametrize("force", [False, True])
def test_no_update_is_lost(tmp_path, force):
    barrier, results = FORK.Barrier(16), FORK.Queue()
    arguments = [(tmp_path / "s", n, force, barrier, results) for n in range(16)]
    jobs = [FORK.Process(target=_updates, args=args) for args in arguments]
    for job in jobs:
        job.start()
    told = [results.get(timeout=60) for _ in range(48)]
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 16
    won = [record for record in told if record]
    assert len(won) == 48 if force else len(won) > 0
    store = Store(tmp_path / "s")
    for _ in range(2):
        log = store.log("name")
        assert sorted(record.record for record in log) == sorted(won)
        assert [record.version for record in log] == list(range(len(won), 0, -1))
        store.rebuild_index()
    assert store.fsck().problems == ()


def test_two_stores_in_threads(tmp_path):
    stores = [Store(tmp_path / "s", "none") for _ in range(2)]
    stores[0].put(small(), "shared")
    won, errors = [], []

    def work(number):
        try:
            for turn in range(12):
                seed = 1000 * (number + 1) + turn
                stores[number % 2].put(small(seed), f"own/{number}")
                try:
                    record = stores[number % 2].put(small(seed), "shared")
                    won.append(record.record)
                except RaceLost:
                    pass
                assert_same(stores[number % 2].get(f"own/{number}"), small(seed))
        except Exception as error:
            errors.append(repr(error))

    jobs = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not errors
    log = stores[1].log("shared")
    assert sorted(record.record for record in log[:-1]) == sorted(won) and won
    assert all(len(stores[0].log(f"own/{number}")) == 12 for number in range(4))


def test_tenants_share_no_file(tmp_path):
    memory = build_memory(1)
    tenants = {name: Store(tmp_path / "s", namespace=name) for name in ("", "a", "b")}
    for name, store in tenants.items():
        store.put(with_bias(memory) if name == "a" else memory, "m")
    for name, store in tenants.items():
        assert_same(store.get("m"), with_bias(memory) if name == "a" else memory)
    inner = [
        {(path.stat().st_dev, path.stat().st_ino) for path in tenants[name].path.rglob("*")}
        for name in ("a", "b")
    ]
    assert inner[0] and inner[1] and not inner[0] & inner[1]
    tenants["a"].rm("m")
    assert tenants["a"].gc().packs == 1
    with pytest.raises(NotFound):
        tenants["a"].get("m")
    for name in ("", "b"):  # equal bytes, and none of them a's
        assert_same(tenants[name].get("m"), memory)
        assert tenants[name].gc().packs == 0
        assert_same(Store(tmp_path / "s", namespace=name).get("m"), memory)


def test_same_tokens_other_memories(store, tmp_path):
    base = build_memory(1)
    edit = with_bias(base)
    prints = dataclasses.replace(base.model.fingerprint, adapters="a" * 64)
    adapted = dataclasses.replace(base, model=dataclasses.replace(base.model, fingerprint=prints))
    store.put_many({"base": base, "edit": edit, "adapted": adapted})
    for name, memory in {"base": base, "edit": edit, "adapted": adapted}.items():
        assert_same(store.get(name), memory)
    assert len({store.show(name).record.content for name in store.names()}) == 3
    store.put(edit, "one")
    store.put(base, "one")
    assert_same(store.get("one"), base)
    assert_same(store.get("one@{1}"), edit)


def test_garbage_goes_beside_readers_and_writers(tmp_path):
    memories = {seed: build_memory(seed, layers=1, slots=300) for seed in range(6)}
    digests = {memory.digest for memory in memories.values()}
    errors, reads, stop = [], [], time.monotonic() + 2.5
    Store(tmp_path / "s", "none").put(memories[0], "m/0")

    def work(job):
        store = Store(tmp_path / "s", "none")
        turn = 0
        while time.monotonic() < stop:
            turn += 1
            name = f"m/{turn % 6}"
            try:
                if job == "write":
                    store.put(memories[turn % 6], name, force=True)
                    if turn % 5 == 0:
                        store.rm(name)
                elif job == "gc":
                    store.gc(waste=0.0)
                else:
                    reads.append(store.get(name).digest)
            except NotFound:
                pass
            except Exception as error:
                errors.append((job, repr(error)))
                return

    jobs = [threading.Thread(target=work, args=(j,)) for j in ("write", "gc", "read", "read")]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert not errors
    assert len(reads) > 20 and set(reads) <= digests
    assert Store(tmp_path / "s").fsck().ok
