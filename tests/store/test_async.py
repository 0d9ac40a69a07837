"""Puts and reads in the background: the same as in the front, in order, and no error is lost."""

import threading

import pytest

from kvedit.errors import InvalidArgument, MutatedMemory, NotFound, RaceLost
from kvedit.store import Store
from kvedit.store.queue import PutQueue

from .conftest import assert_same, build_memory, small

WAIT = 30


@pytest.fixture
def gate(store, monkeypatch):
    """Holds every put of the store until the event is set."""
    event, commit = threading.Event(), store._writer.put

    def held(puts, seen):
        assert event.wait(WAIT)
        return commit(puts, seen)

    monkeypatch.setattr(store._writer, "put", held)
    yield event
    event.set()


def test_it_is_what_put_does(store):
    memory = build_memory(1, bias=True)
    how = {"source": "s", "licence": "l", "metrics": {"kl": 1}, "codec": "planes-zstd"}
    record = store.put_async(memory, "m", "said", ["t"], **how).result(WAIT)
    assert record == store.log("m")[0]
    assert (record.message, record.tags, record.codec) == ("said", ("t",), "planes-zstd")
    assert_same(store.get("m"), memory)


def test_it_returns_before_it_is_done(store, gate):
    future = store.put_async(small(), "m")
    assert not future.done() and "m" not in store
    gate.set()
    assert future.result(WAIT).name == "m" and "m" in store


def test_order_is_kept(store, gate):
    futures = [store.put_async(small(seed), "m") for seed in range(8)]
    gate.set()
    store.flush()
    assert [future.result().version for future in futures] == list(range(1, 9))
    assert_same(store.get("m"), small(7))


def test_errors_are_in_the_future_and_in_flush_once(store):
    good = store.put_async(small(1), "good")
    bad = [store.put_async(small(), "no name!"), store.put_async(small(), "m", expect="0" * 64)]
    after = store.put_async(small(2), "after")
    with pytest.raises(InvalidArgument):
        store.flush()
    assert isinstance(bad[0].exception(), InvalidArgument)
    assert isinstance(bad[1].exception(), RaceLost)
    assert good.result().version == after.result().version == 1  # the others were done
    store.flush()  # told once
    assert store.names() == ["after", "good"]


def test_a_memory_changed_before_its_turn_is_refused(store, gate):
    memory = small()
    future = store.put_async(memory, "m")
    memory.layers[0].keys.add_(1)
    gate.set()
    with pytest.raises(MutatedMemory):
        future.result(WAIT)
    with pytest.raises(MutatedMemory):
        store.flush()
    assert "m" not in store and store.fsck().ok


def test_who_adds_too_much_waits(tmp_path, monkeypatch):
    memory = small()
    store = Store(tmp_path / "s", "process", queue=2 * memory.nbytes)
    event, commit, added = threading.Event(), store._writer.put, []

    def held(puts, seen):
        assert event.wait(WAIT)
        return commit(puts, seen)

    monkeypatch.setattr(store._writer, "put", held)

    def add():
        for seed in range(5):
            store.put_async(small(seed), f"m{seed}")
            added.append(seed)

    thread = threading.Thread(target=add)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and added == [0, 1]  # two fit, the third waits
    assert store._queue._waiting == 2 * memory.nbytes
    event.set()
    thread.join(WAIT)
    assert not thread.is_alive() and len(added) == 5
    store.close()
    assert store._queue._waiting == 0
    assert len(store.names()) == 5


def test_what_is_bigger_than_the_queue_goes_alone(tmp_path):
    with Store(tmp_path / "s", "process", queue=1) as store:
        futures = [store.put_async(build_memory(seed), f"m{seed}") for seed in range(3)]
        assert [future.result(WAIT).version for future in futures] == [1, 1, 1]


def test_close_waits_and_raises_and_the_store_is_usable_again(store, gate):
    futures = [store.put_async(small(seed), f"m{seed}") for seed in range(3)]
    failed = store.put_async(small(), "no name!")
    threading.Timer(0.05, gate.set).start()
    with pytest.raises(InvalidArgument):
        store.close()
    assert all(future.done() for future in (*futures, failed))
    assert len(store.names()) == 3
    assert store.put_async(small(9), "again").result(WAIT).version == 1
    store.close()


def test_leaving_the_block_waits(tmp_path):
    with Store(tmp_path / "s", "process") as store:
        for seed in range(20):
            store.put_async(small(seed), f"m{seed}")
    assert len(Store(tmp_path / "s").names()) == 20
    with pytest.raises(InvalidArgument), Store(tmp_path / "s") as store:
        store.put_async(small(), "no name!")


def test_no_thread_stays(tmp_path):
    before = {thread.name for thread in threading.enumerate()}
    with Store(tmp_path / "s", "process") as store:
        store.put_async(small(), "m").result(WAIT)
        assert any("kvedit" in thread.name for thread in threading.enumerate())
    assert {thread.name for thread in threading.enumerate()} <= before


def test_many_threads_may_add(store):
    def add(first):
        for seed in range(first, first + 5):
            store.put_async(small(seed), f"m{seed}")

    threads = [threading.Thread(target=add, args=(first,)) for first in range(0, 20, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    store.flush()
    for seed in range(20):
        assert_same(store.get(f"m{seed}"), small(seed))


def test_prefetch_brings_it_up(store):
    memory = build_memory(1)
    store.put(memory, "m")
    live = Store(store.path, ram="10MiB")
    assert live.prefetch("m").result(WAIT) is None
    read = live.counters.bytes_read
    assert_same(live.get("m"), memory)
    assert (live.counters.live_hits, live.counters.bytes_read) == (1, read)
    assert isinstance(live.prefetch("nothing").exception(WAIT), NotFound)
    with pytest.raises(NotFound):
        live.close()


def test_prefetch_of_what_lies_below(tmp_path):
    (tmp_path / "r").mkdir()
    memory = build_memory(1)
    with Store(tmp_path / "s", "process", remote=f"file://{tmp_path / 'r'}") as store:
        store.put(memory, "m")
        store.evict("1GiB")
        store.prefetch("m").result(WAIT)
        assert store.counters.fetched == 1 and store.du().local > 0
        assert_same(store.get("m"), memory)
        assert store.counters.fetched == 1


def test_flush_pushes_what_was_put(tmp_path):
    (tmp_path / "r").mkdir()
    remote = f"file://{tmp_path / 'r'}"
    store = Store(tmp_path / "s", "process", remote=remote, write="back")
    for seed in range(3):
        store.put_async(small(seed), f"m{seed}")
    store.put_async(small(), "no name!")
    other = Store(tmp_path / "t", "process", remote=remote)
    assert other.pull() == []
    with pytest.raises(InvalidArgument):
        store.flush()
    assert sorted(other.pull()) == ["m0", "m1", "m2"]  # what was sound went all the same


def test_the_queue_counts_what_waits():
    queue, event = PutQueue(10), threading.Event()
    first = queue.add(lambda: event.wait(WAIT), 4)
    second = queue.add(lambda: 7, 6)
    assert queue._waiting == 10
    event.set()
    assert queue.wait() == [] and second.result() == 7 and first.result() is True
    assert queue._waiting == 0
    error = queue.add(lambda: 1 / 0, 3)
    assert [type(e) for e in queue.close()] == [ZeroDivisionError]
    assert isinstance(error.exception(), ZeroDivisionError) and queue.close() == []
