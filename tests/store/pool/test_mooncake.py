"""A pool gives the right bytes or none, whatever happens to masters, clients and values."""

import importlib.util
import os
import signal
import threading
import time

import pytest
from blake3 import blake3

from kvedit.errors import InvalidArgument, MissingDependency, TierUnavailable
from kvedit.store.pool import MooncakeConfig, MooncakePool
from kvedit.store.pool.heads import Head, head_key

MIB = 1 << 20


def digest(data):
    return blake3(data).hexdigest()


def plant(pool, key, data):
    """Puts a raw value behind the pool's back."""
    client = pool._values.client
    client.scratch[: len(data)] = data
    assert client.call("put", key=key, size=len(data)) == 0


def names(pool, key, data):
    head = Head(digest(data), len(data), pool.config.value_bytes)
    return head.part_keys(pool._values.prefix, key)


def kill(pool):
    process = pool._values.client._process
    process.kill()
    process.wait()


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 5])
def test_round_trip(shared, size):
    data = os.urandom(size)
    key = f"round/{size}"
    assert shared.get(key) is None and not shared.contains(key)
    assert shared.put(key, memoryview(data))
    assert shared.put(key, bytearray(data)), "the same bytes again"
    assert shared.contains(key)
    assert shared.get(key) == data == shared.get(key, digest(data))
    assert shared.delete(key) and not shared.delete(key)
    assert shared.get(key) is None


def test_another_client_reads_the_same_bytes(shared, join, master):
    data = os.urandom(2 * MIB + 7)
    assert shared.put("far", data)
    with join(master, "shared", segment_bytes=0) as reader:
        assert reader.get("far", digest(data)) == data
        assert reader.put("back", data)
    assert shared.get("back") == data, "it lies in the segment of the other client"


def test_other_bytes_under_a_key_are_refused(shared):
    first, second = os.urandom(MIB + 1), os.urandom(MIB + 1)
    assert shared.put("same", first)
    before = shared.usage()
    assert not shared.put("same", second)
    assert shared.get("same", digest(second)) is None
    assert shared.get("same", digest(first)) == first
    assert not any(shared._values._exist(names(shared, "same", second))), "no orphans"
    after = shared.usage()
    assert after.refused - before.refused == 1 == after.wrong - before.wrong


def test_a_lost_part_means_not_there_until_it_is_put_again(shared):
    data = os.urandom(3 * MIB)
    assert shared.put("torn", data)
    shared._values._remove(names(shared, "torn", data)[1:2])
    torn = shared.usage().torn
    assert shared.get("torn") is None
    assert not shared.contains("torn")
    assert shared.usage().torn == torn + 1
    assert shared.put("torn", data)
    assert shared.get("torn") == data


def test_parts_with_other_bytes_are_found_by_the_read_back(shared):
    data = os.urandom(2 * MIB)
    plant(shared, names(shared, "planted", data)[0], os.urandom(MIB))
    assert not shared.put("planted", data), "the pool said success and kept other bytes"
    assert shared.get("planted") is None
    assert shared.put("planted", data), "the wrong part is out of the way"
    assert shared.get("planted") == data


def test_wrong_bytes_behind_a_good_head_are_not_returned(shared):
    data = os.urandom(2 * MIB)
    assert shared.put("swapped", data)
    part = names(shared, "swapped", data)[1]
    shared._values._remove([part])
    plant(shared, part, bytes(MIB))
    assert shared.get("swapped") is None
    assert not shared.contains("swapped")


LIES = [b"{", b"x" * 5000, *(Head("0" * 64, size, 1024).to_bytes() for size in (1 << 25, 1 << 60))]


@pytest.mark.parametrize("head", LIES)
def test_a_head_that_is_none_or_lies(shared, head):
    key = f"lie/{len(head)}"
    plant(shared, head_key(shared._values.prefix, key), head)
    assert shared.get(key) is None
    assert not shared.put(key, b"bytes")
    assert shared.delete(key)
    assert shared.put(key, b"bytes") and shared.get(key) == b"bytes"


def test_namespaces_do_not_see_each_other(shared, join, master):
    other = join(master, "other")
    assert shared.put("name", b"shared")
    assert other.get("name") is None and not other.contains("name") and not other.delete("name")
    assert other.put("name", b"other")
    assert (shared.get("name"), other.get("name")) == (b"shared", b"other")


def test_an_object_without_room_leaves_nothing_behind(join, fragile):
    pool = join(fragile, segment_bytes=16 * MIB)
    data = os.urandom(24 * MIB)
    assert not pool.put("large", data)
    assert pool.get("large") is None
    assert not any(pool._values._exist(names(pool, "large", data)))
    assert pool.put("small", data[:MIB]) and pool.get("small") == data[:MIB]


def test_writers_that_race_for_a_key(shared, join, master):
    pools = [shared, join(master, "shared", segment_bytes=0)]
    own = [os.urandom(2 * MIB), os.urandom(2 * MIB)]
    kept = {}

    def write(index):
        for turn in range(10):
            kept[index, turn] = pools[index].put(f"race/{turn}", own[index])

    threads = [threading.Thread(target=write, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn in range(10):
        found = shared.get(f"race/{turn}")
        assert found is None or found in own
        assert not (kept[0, turn] and kept[1, turn]), "one key, two contents, both accepted"
        for index in range(2):
            if kept[index, turn]:
                assert found == own[index]
        shared.delete(f"race/{turn}")


@pytest.mark.parametrize("end", [MooncakePool.close, kill])
def test_a_writer_that_ends_takes_its_objects_along(join, fragile, end):
    reader = join(fragile, segment_bytes=0)
    writer = join(fragile)
    data = os.urandom(2 * MIB)
    assert all(writer.put(key, data) for key in "abc")
    assert reader.get("a") == data
    end(writer)
    assert [reader.get(key) for key in "abc"] == [None] * 3, "only the writer lent memory"
    with pytest.raises(TierUnavailable, match=r"[Oo]pen a new pool"):
        writer.get("a")
    writer.close()
    again = join(fragile)
    until = time.monotonic() + 30
    # Until the heartbeat of a killed client is missed, the master may choose its memory.
    while not (kept := again.put("a", data)) and time.monotonic() < until:
        time.sleep(0.2)
    assert kept and reader.get("a") == data


def test_a_client_that_hangs_is_given_up(join, fragile):
    pool = join(fragile, seconds=1.0)
    assert pool.put("key", b"bytes")
    process = pool._values.client._process
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(TierUnavailable, match="took longer"):
        pool.get("key")
    assert process.poll() is not None
    pool.close()


def test_a_master_that_dies_between_puts(join, fragile):
    pool = join(fragile)
    data = [os.urandom(MIB + index) for index in range(2000)]
    known, outcomes = threading.Event(), []

    def write():
        try:
            for index, item in enumerate(data):
                outcomes.append(pool.put(str(index % 12), item))
                pool.delete(str(index % 12))
                if index == 3:
                    known.set()
        except TierUnavailable as error:
            outcomes.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    known.wait(20)
    fragile.kill()
    thread.join(60)
    assert not thread.is_alive()
    assert isinstance(outcomes[-1], TierUnavailable)
    with pytest.raises(TierUnavailable):
        pool.get("0")
    fragile.start()
    with join(fragile) as fresh:
        assert fresh.get("0") is None, "a new master knows no object"
        assert fresh.put("0", data[0]) and fresh.get("0", digest(data[0])) == data[0]


def test_no_master(join):
    class Nobody:
        address = "127.0.0.1:9"

    with pytest.raises(TierUnavailable, match="no Mooncake master answers"):
        if importlib.util.find_spec("mooncake") is None:
            pytest.skip("needs mooncake")
        join(Nobody)


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"kvedit\[mooncake\]"):
        MooncakePool(MooncakeConfig(), "name")


@pytest.mark.parametrize("key", ["", "a b", "é", "a\n", "x" * 401, b"a", None])
def test_keys_that_are_none(shared, key):
    for call in (shared.get, shared.contains, shared.delete, lambda key: shared.put(key, b"")):
        with pytest.raises(InvalidArgument, match="a key is"):
            call(key)


def test_data_that_is_not_contiguous(shared):
    with pytest.raises(InvalidArgument, match="contiguous"):
        shared.put("strided", memoryview(b"abcd")[::2])


@pytest.mark.parametrize(
    "change",
    [
        {"master": "nowhere"},
        {"segment_bytes": 5},
        {"value_bytes": 0},
        {"value_bytes": 1 << 40},
        {"seconds": 0},
    ],
)
def test_settings_that_can_not_work(change):
    with pytest.raises(InvalidArgument):
        MooncakeConfig(**change)
