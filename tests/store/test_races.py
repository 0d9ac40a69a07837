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
    for number in range(4):
        folder = tmp_path / str(number)
        Store(folder, "none").put(small(), "other")
        (created,) = race(folder, "", 1000).items()
        store = Store(folder)
        assert store.log("name")[0].record == created[1]
        assert_same(store.get("name"), small(1000 + created[0]))
        (moved,) = race(folder, created[1], 2000).items()
        assert [record.record for record in store.log("name")] == [moved[1], created[1]]
        assert_same(store.get("name"), small(2000 + moved[0]))


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
