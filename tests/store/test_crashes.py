"""Puts that fail, writers that are killed, processes that write at once."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from kvedit.errors import MutatedMemory, NotFound
from kvedit.store import Store
from kvedit.store.journal import Position

from .conftest import assert_same, build_memory, files, temporaries

# A fork is quick to start; where there is none, the tests that need it are skipped.
FORK = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def small(seed=0):
    return build_memory(seed, layers=1, slots=4)


def fail_at(monkeypatch, name, call):
    """Makes the n-th call of an os function fail; returns a list that fills when it did."""
    real, seen, failed = getattr(os, name), [], []

    def failing(*arguments, **options):
        seen.append(1)
        if len(seen) == call:
            failed.append(1)
            raise OSError(errno.EIO, "injected")
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, failing)
    return failed


@pytest.mark.parametrize("name", ["fsync", "replace", "write", "lseek"])
@pytest.mark.parametrize("first", [True, False], ids=["first put", "later put"])
def test_a_put_that_fails_leaves_nothing(tmp_path, monkeypatch, name, first):
    calls = 0
    for call in range(1, 40):
        store = Store(tmp_path / f"{call}")
        if not first:
            store.put(small(0), "m")
        before = {path: path.read_bytes() for path in files(store, "*/*")}
        log = store.path / "log.jsonl"
        lines = log.read_bytes() if log.exists() else b""
        with monkeypatch.context() as patch:
            failed = fail_at(patch, name, call)
            try:
                store.put(small(1), "m")
                put = True
            except OSError:
                put = False
        assert put == (not failed)
        if put:
            break
        calls += 1
        assert temporaries(store) == []
        assert {path: path.read_bytes() for path in files(store, "*/*")} == before
        assert (log.read_bytes() if log.exists() else b"") == lines
        assert len(store.log("m") if "m" in store else []) == (not first)
        store.put(small(1), "m")  # what failed once works the next time
        assert_same(store.get("m"), small(1))
        store.rebuild_index()
        assert_same(store.get("m"), small(1))
        store.close()
    assert calls or name == "lseek"


def test_an_index_that_can_not_commit(store, monkeypatch):
    store.put(small(0), "m")
    before = (store.path / "log.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(
            store._shelf.index, "_apply", lambda *_: (_ for _ in ()).throw(OSError("injected"))
        )
        with pytest.raises(OSError, match="injected"):
            store.put(small(1), "m")
    assert (store.path / "log.jsonl").read_bytes() == before
    assert len(files(store, "packs/*")) == 1
    assert files(store, "tmp/*") == []
    assert_same(store.get("m"), small(0))
    assert store.put(small(1), "m").version == 2


def test_an_interrupt_leaves_a_put_done_or_not_done(store, monkeypatch):
    store.put(small(0), "m")
    real = store._shelf.index.catch_up
    for moment in ("before", "after"):
        calls = []

        def interrupted(calls=calls, moment=moment):
            calls.append(1)
            if len(calls) == 1:
                return real()
            if moment == "after":
                real()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store._shelf.index, "catch_up", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put(small(1), moment)
        store.put(small(2), "n")
        store.rebuild_index()
        assert_same(store.get(moment), small(1))


def test_a_memory_changed_while_it_is_written(store, monkeypatch):
    memory = small(0)
    publish = type(store._shelf.layout).publish

    def change(self, path, chunks):
        memory.layers[0].positions.add_(1)
        return publish(self, path, chunks)

    monkeypatch.setattr(type(store._shelf.layout), "publish", change)
    with pytest.raises(MutatedMemory):
        store.put(memory, "m")
    assert store.names() == []
    assert files(store, "packs/*") == []


def test_a_line_that_no_index_has_seen(store):
    """A writer that died between log and index: the next one takes up what it left."""
    store.put(small(0), "m")
    store.put(small(1), "n")
    before = (store.path / "log.jsonl").read_bytes()
    _, first = next(store._shelf.index._journal.read(Position()))
    with store._shelf.index._database.session() as connection:
        connection.execute("DELETE FROM versions WHERE name = 'n'")
        connection.execute(
            "UPDATE applied SET bytes = ?, sequence = ?, checksum = ?",
            (first.offset, first.sequence, first.checksum),
        )
    assert store.names() == ["m"]
    store.put(small(2), "m")
    assert store.names() == ["m", "n"]
    assert (store.path / "log.jsonl").read_bytes().startswith(before)
    assert_same(store.get("n"), small(1))


def test_orphans_are_swept_and_living_writers_are_not(store):
    store.put(small(0), "m")
    known = files(store, "packs/*")
    stray, unfinished = "a" * 64, [".tmp-1-ab", "intent-1-ab", "intent-2-ab"]
    store._shelf.layout.pack(stray).write_bytes(b"of a put that died before its line in the log")
    store._shelf.layout.header(stray).write_bytes(b"as well")
    names = [stray, known[0].stem, "../../log"]
    for name, data in zip(unfinished, (b"half a file", json.dumps(names), b"[half"), strict=True):
        (store.path / "tmp" / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with store._shelf.layout.lock, Store(store.path):
        assert len(files(store, "tmp/*")) == 3
        assert len(files(store, "packs/*")) == 2
    Store(store.path).close()
    assert files(store, "tmp/*") == files(store, "headers/*") == []
    assert files(store, "packs/*") == known
    assert_same(store.get("m"), small(0))


def put_for_ever(path, seed, told):
    store = Store(path)
    while True:
        record = store.put(build_memory(seed, layers=2, slots=300, dim=16), f"n{seed % 3}")
        os.write(told, f"{seed} {record.record}\n".encode())
        seed += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no kill -9 here")
def test_acknowledged_puts_survive_kill_9(tmp_path):
    path, acknowledged = tmp_path / "memories", {}
    for turn in range(5):
        read, write = os.pipe()
        writer = FORK.Process(target=put_for_ever, args=(path, turn * 10_000, write))
        writer.start()
        os.close(write)
        with os.fdopen(read) as told:
            lines = [told.readline()]
            threading.Timer(0.05 + 0.07 * turn, writer.kill).start()
            lines += told.readlines()
        writer.join(30)
        assert writer.exitcode == -signal.SIGKILL
        whole = [line.split() for line in lines if line.endswith("\n")]
        acknowledged |= {record: int(seed) for seed, record in whole}
    assert len(acknowledged) >= 5
    with Store(path) as store:
        assert temporaries(store) == []
        for rebuilt in (False, True):
            if rebuilt:
                store.rebuild_index()
            found = {record.record for name in store.names() for record in store.log(name)}
            assert set(acknowledged) <= found
            for record in found:
                store.get(record)  # whole and verified, acknowledged or not
        for record, seed in list(acknowledged.items())[:5]:
            assert_same(store.get(record), build_memory(seed, layers=2, slots=300, dim=16))


def put_some(path, worker, count):
    with Store(path, durability="process") as store:
        for turn in range(count):
            store.put(small(1000 * worker + turn), "shared", f"{worker} {turn}", force=True)
            store.put(small(turn), f"own/{worker}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_write_one_name_at_once(tmp_path):
    workers = [
        FORK.Process(target=put_some, args=(tmp_path / "s", worker, 8)) for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with Store(tmp_path / "s") as store:
        for rebuilt in (False, True):
            if rebuilt:
                store.rebuild_index()
            log = store.log("shared")
            assert [record.version for record in log] == list(range(24, 0, -1))
            told = [record.message for record in reversed(log)]
            assert sorted(told) == [f"{w} {t}" for w in range(3) for t in range(8)]
            for worker in range(3):  # each saw its own in order
                mine = [message for message in told if message.startswith(f"{worker} ")]
                assert mine == sorted(mine)
                assert len(store.log(f"own/{worker}")) == 8
            assert_same(store.get("own/0"), small(7))


def test_one_winner_in_a_race_of_threads(store):
    results = []

    def race(seed):
        try:
            results.append(store.put(small(seed), "m", expect=""))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=race, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not isinstance(result, Exception) for result in results) == 1
    assert {type(result).__name__ for result in results} == {"Record", "RaceLost"}
    assert len(store.log("m")) == 1


def test_readers_beside_a_writer_and_a_rebuild(store):
    memory = build_memory()
    store.put(memory, "m")
    stop, errors = time.monotonic() + 0.5, []

    def read():
        try:
            while time.monotonic() < stop:
                store.get("m")
                store.ls()
        except Exception as error:
            errors.append(error)

    def rebuild():
        with Store(store.path, durability="process") as other:
            while time.monotonic() < stop:
                other.rebuild_index()

    threads = [threading.Thread(target=target) for target in (read, read, rebuild)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        store.put(small(len(store.names())), f"n{len(store.names())}")
    for thread in threads:
        thread.join()
    assert errors == []
    assert_same(store.get("m"), memory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_reads_with_its_own_connection(store):
    store.put(small(0), "m")
    process = FORK.Process(target=store.put, args=(small(1), "m"))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert_same(store.get("m"), small(1))
    with pytest.raises(NotFound):
        store.get("n")
