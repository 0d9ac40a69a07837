"""Objects: one suite for RAM, folders and a real S3 server; then what only servers can do wrong."""

import random
import socket
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound, RaceLost, TierUnavailable
from kvedit.store.remote import Objects, spans
from kvedit.store.remote.keys import LOCK
from kvedit.testing.servers import free_ports

MIB = 1024 * 1024
THREADS = 16
BAD_KEYS = ["", "/a", "a/", "a//b", "../a", "a/../b", "a..b", ".a", "a/.b"]
BAD_KEYS += ["A", "ä", "a b", "a\n", "a\0", "a%2e", "a\\b"]
KEYS = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1", "allow_http": True}


def race(call):
    """Calls ``call(i)`` in all threads at once; returns the result or the error of each."""
    barrier = threading.Barrier(THREADS)

    def one(index):
        barrier.wait()
        try:
            return call(index)
        except RaceLost as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


class ObjectsSuite:
    """What every place must do. A subclass gives the fixture ``reopen``: Objects at one place."""

    rounds = 8

    @pytest.fixture
    def objects(self, reopen):
        return reopen()

    def test_create_once(self, objects, reopen, tmp_path):
        assert objects.size("packs/ab") is None
        assert objects.create("packs/ab", b"first")
        assert not reopen().create("packs/ab", memoryview(b"first"))
        assert reopen().read("packs/ab") == b"first"
        assert reopen().size("packs/ab") == 5
        with pytest.raises(CorruptMemory, match="5 bytes"):
            objects.create("packs/ab", b"other content")
        (tmp_path / "file").write_bytes(b"from a file")
        assert objects.create("packs/cd", tmp_path / "file")
        assert objects.read("packs/cd") == b"from a file"
        assert objects.create("empty", b"")
        assert (objects.read("empty"), objects.read("empty", 0, 9)) == (b"", b"")
        assert (objects.size("empty"), bytes(objects.read_whole("empty", 0))) == (0, b"")

    def test_create_race(self, reopen):
        for turn in range(self.rounds):
            places = [reopen() for _ in range(THREADS)]
            made = race(lambda i, t=turn, p=places: p[i].create(f"race/{t}", bytes([i]) * 100_000))
            assert sorted(made) == [False] * (THREADS - 1) + [True]
            assert places[0].read(f"race/{turn}") == bytes([made.index(True)]) * 100_000

    def test_reads_are_slices(self, objects):
        data = noise(20 * MIB + 7)
        objects.create("big", data)
        size, piece = len(data), spans.PIECE
        edges = [0, 1, 5, piece - 1, piece, piece + 1, size - 1, size, size + 1, 2 * size]
        for start in (0, 3, size - 1, size, size + 9):
            assert objects.read("big", start) == data[start:]
            for stop in (stop for stop in edges if stop >= start):
                assert objects.read("big", start, stop) == data[start:stop]
        assert objects.read_whole("big", size) == data
        ends = [edge for edge in edges if edge <= size]
        wanted = [(a, b) for a in ends for b in ends if a <= b]
        random.shuffle(wanted)
        found = objects.read_many("big", wanted)
        assert all(view == data[a:b] for view, (a, b) in zip(found, wanted, strict=True))
        assert objects.read_many("big", []) == []

    def test_reads_find_what_is_wrong(self, objects):
        objects.create("small", b"12345")
        for size in (0, 4, 6):
            with pytest.raises(CorruptMemory, match="5 bytes"):
                objects.read_whole("small", size)
        for ranges in ([(0, 6)], [(0, 2), (7, 9)]):
            with pytest.raises(CorruptMemory, match="5 bytes"):
                objects.read_many("small", ranges)
        for start, stop in ((-1, 2), (3, 2)):
            with pytest.raises(InvalidArgument):
                objects.read("small", start, stop)
            with pytest.raises(InvalidArgument):
                objects.read_many("small", [(start, stop)])
        gone = (
            lambda: objects.read("gone"),
            lambda: objects.read("gone", 2, 2),
            lambda: objects.read("gone", 1, 2),
            lambda: objects.read_many("gone", [(0, 1)]),
            lambda: objects.read_many("gone", []),
            lambda: objects.read_whole("gone", 5),
            lambda: objects.read_whole("gone", 0),
        )
        for read in gone:
            with pytest.raises(NotFound, match="gone"):
                read()

    def test_refs(self, objects, reopen):
        assert objects.get_ref("refs/a") is None
        first = objects.set_ref("refs/a", b"1", None)
        assert reopen().get_ref("refs/a") == (b"1", first)
        second = reopen().set_ref("refs/a", b"2", first)
        for stale in (None, first, "no token"):
            with pytest.raises(RaceLost, match=r"refs/a|token"):
                objects.set_ref("refs/a", b"3", stale)
        with pytest.raises(RaceLost, match="found none"):
            objects.set_ref("refs/b", b"3", first)
        assert objects.get_ref("refs/a") == (b"2", second)
        objects.delete(["refs/a"])
        with pytest.raises(RaceLost):
            objects.set_ref("refs/a", b"3", second)
        objects.set_ref("refs/a", b"4", None)

    def test_ref_race(self, reopen):
        token = None
        for turn in range(self.rounds):
            places = [reopen() for _ in range(THREADS)]

            def move(i, places=places, turn=turn, token=token):
                return places[i].set_ref("refs/race", f"{turn}.{i}".encode(), token)

            moved = race(move)
            winners = [i for i, result in enumerate(moved) if not isinstance(result, RaceLost)]
            assert len(winners) == 1
            token = moved[winners[0]]
            assert places[0].get_ref("refs/race") == (f"{turn}.{winners[0]}".encode(), token)

    def test_list_and_delete(self, objects, reopen):
        sizes = {"packs/ab1": 3, "packs/ab2": 4, "packs/b": 0, "packs-2/x": 1, "top": 2}
        for key, size in sizes.items():
            objects.create(key, bytes(size))
        objects.set_ref("refs/r", b"12345", None)
        sizes["refs/r"] = 5
        for prefix in ("", "packs/", "packs", "packs/ab", "to", "nothing/here"):
            found = {key: size for key, size, _ in reopen().list(prefix)}
            assert found == {k: v for k, v in sizes.items() if k.startswith(prefix)}
        ages = [datetime.now(UTC) - when for _, _, when in objects.list()]
        assert all(abs(age) < timedelta(hours=1) for age in ages)
        objects.delete(["packs/ab1", "never/was", "top"])
        objects.delete([])
        assert {key for key, _, _ in objects.list()} == set(sizes) - {"packs/ab1", "top"}
        assert objects.create("top", b"12")

    def test_many_keys(self, objects):
        keys = {f"many/{i:04}" for i in range(1100)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: objects.create(key, b"x"), keys))
        assert {key for key, _, _ in objects.list("many/")} == keys
        objects.delete(keys)
        assert list(objects.list("many/")) == []

    @pytest.mark.parametrize(
        "key",
        [*BAD_KEYS, None, b"a", "a" * 800],
    )
    def test_bad_keys(self, objects, key):
        objects.create("kept", b"1")
        calls = (
            lambda: objects.create(key, b""),
            lambda: objects.read(key),
            lambda: objects.size(key),
            lambda: objects.get_ref(key),
            lambda: objects.set_ref(key, b"", None),
            lambda: objects.delete(["kept", key]),
        )
        for call in calls:
            with pytest.raises(InvalidArgument, match="can't be a key"):
                call()
        assert objects.size("kept") == 1

    def test_check(self, objects):
        objects.check()
        assert list(objects.list()) == []


class TestMemory(ObjectsSuite):
    @pytest.fixture
    def reopen(self):
        store = MemoryStore()
        return lambda: Objects(store, "some/prefix")

    def test_opened_apart(self):
        one, other = Objects.open("memory:///"), Objects.open("memory:///")
        one.create("a", b"1")
        assert other.size("a") is None


class TestFolder(ObjectsSuite):
    @pytest.fixture
    def reopen(self, tmp_path):
        return lambda: Objects.open(f"file://{tmp_path}/a%20folder")

    def test_large_file(self, objects, tmp_path):
        data = noise(40 * MIB)
        (tmp_path / "source").write_bytes(data)
        assert objects.create("large", tmp_path / "source")
        assert not objects.create("large", data)
        assert (tmp_path / "a folder" / "large").read_bytes() == data

    def test_no_folder(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(TierUnavailable, match="file/below"):
            Objects.open(f"file://{tmp_path}/file/below")

    def test_held_lock(self, tmp_path):
        objects = Objects.open(f"file://{tmp_path}", retry_seconds=0)
        with FileLock(tmp_path / LOCK), pytest.raises(TierUnavailable, match=LOCK):
            objects.set_ref("a", b"1", None)
        objects.set_ref("a", b"1", None)
        assert [key for key, _, _ in objects.list()] == ["a"]


class TestSeaweed(ObjectsSuite):
    # A put that meets another put of the same key waits whole seconds in this server.
    rounds = 2

    @pytest.fixture
    def reopen(self, open_bucket):
        return open_bucket

    def test_upload_in_parts(self, objects, tmp_path):
        data = noise(64 * MIB + 5)
        (tmp_path / "source").write_bytes(data)
        assert objects.create("large", tmp_path / "source")
        assert '-9\\"' in objects.get_ref("large")[1], "an etag that says: nine parts"
        assert not objects.create("large", memoryview(data))
        assert objects.read_whole("large", len(data)) == data
        with pytest.raises(CorruptMemory):
            objects.create("large", data[:-1])

    def test_lost_answers(self, open_bucket, relay):
        objects = open_bucket(endpoint=relay.endpoint)
        relay.losing = 1
        assert objects.create("a", b"12345"), "stored by the first try, acknowledged by the next"
        assert objects.read("a") == b"12345"
        relay.losing = 2
        token = objects.set_ref("r", b"1", None)
        relay.losing = 1
        token = objects.set_ref("r", b"2", token)
        assert open_bucket().get_ref("r") == (b"2", token)
        relay.losing = 1
        with pytest.raises(RaceLost):
            objects.set_ref("r", b"3", None)
        relay.losing = 1
        assert objects.read_whole("a", 5) == b"12345"

    def test_killed_in_a_transfer(self, server, open_bucket):
        objects = open_bucket(timeout=5)
        blobs = {f"blob/{i:02}": noise(2 * MIB, i) for i in range(32)}
        blobs["blob/large"] = noise(48 * MIB, 99)
        whole = noise(64 * MIB, 100)
        objects.create("whole", whole)
        with ThreadPoolExecutor(4) as pool:
            reads = pool.submit(objects.read_whole, "whole", len(whole))
            jobs = {pool.submit(objects.create, key, data): key for key, data in blobs.items()}
            wait(jobs, return_when=FIRST_COMPLETED)
            server.kill()
            before = sum(job.done() for job in jobs)
            server.start()
        assert 0 < before < len(blobs), "killed in the middle"
        acknowledged = [key for job, key in jobs.items() if job.exception() is None]
        errors = [job.exception() for job in [*jobs, reads] if job.exception() is not None]
        assert all(isinstance(error, TierUnavailable) for error in errors), errors
        assert len(acknowledged) >= before
        for key in acknowledged:
            assert objects.read_whole(key, len(blobs[key])) == blobs[key]
        for key, data in blobs.items():
            objects.create(key, data)
            assert objects.read_whole(key, len(data)) == data
        assert reads.exception() or reads.result() == whole
        assert objects.read_whole("whole", len(whole)) == whole

    def test_wrong_credentials(self, open_bucket):
        objects = open_bucket(secret_access_key="wrong", retry_seconds=600)
        for call in (lambda: objects.create("a", b""), objects.check, lambda: objects.size("a")):
            with pytest.raises(TierUnavailable, match="credentials"):
                call()

    def test_no_bucket(self, server):
        objects = Objects.open("s3://no-such-bucket", **server.options, retry_seconds=600)
        for call in (lambda: objects.read("a"), lambda: list(objects.list())):
            with pytest.raises(TierUnavailable, match="bucket"):
                call()


# --- servers that fail -----------------------------------------------------------------------


def every_call(objects, tmp_path):
    (tmp_path / "large").write_bytes(bytes(33 * MIB))
    return (
        lambda: objects.create("a", b"1"),
        lambda: objects.create("a", tmp_path / "large"),
        lambda: objects.read("a"),
        lambda: objects.read_many("a", [(0, 1), (9 * MIB, 10 * MIB)]),
        lambda: objects.read_whole("a", 20 * MIB),
        lambda: objects.size("a"),
        lambda: objects.get_ref("a"),
        lambda: objects.set_ref("a", b"1", None),
        lambda: objects.delete(["a"]),
        lambda: list(objects.list()),
        objects.check,
    )


def test_nobody_listens(tmp_path):
    endpoint = f"http://127.0.0.1:{free_ports(1)[0]}"
    objects = Objects.open("s3://bucket", endpoint=endpoint, retry_seconds=0.3, **KEYS)
    for call in every_call(objects, tmp_path):
        with pytest.raises(TierUnavailable, match=r"refused|error sending"):
            call()


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = {"endpoint": endpoint, "retry_seconds": 0.5, "timeout": 0.2, **KEYS}
        objects = Objects.open("s3://bucket", **options)
        for call in (lambda: objects.read("a"), lambda: objects.set_ref("a", b"1", None)):
            with pytest.raises(TierUnavailable, match=r"timed out|error sending"):
                call()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_is_tried_again(scripted, status):
    endpoint, script, seen = scripted
    script += [status] * 3
    assert Objects.open("s3://bucket", endpoint=endpoint, **KEYS).read("a") == b"hello"
    assert len(seen) == 4


@pytest.mark.parametrize("status", [301, 400, 401, 403, 501])
def test_refused_is_not_tried_again(scripted, status):
    endpoint, script, seen = scripted
    script.append(status)
    with pytest.raises(TierUnavailable, match="read a at s3://bucket"):
        Objects.open("s3://bucket", endpoint=endpoint, retry_seconds=600, **KEYS).read("a")
    assert len(seen) == 1


def test_server_without_ranges(scripted):
    with pytest.raises(TierUnavailable, match="ignores ranges"):
        Objects.open("s3://bucket", endpoint=scripted[0], **KEYS).read("a", 1, 3)


def test_server_without_conditions(monkeypatch):
    """A server that takes every put is found out before anybody trusts it."""
    import obstore

    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *a, mode=None, **named: put(*a, **named))
    with pytest.raises(TierUnavailable, match="If-None-Match"):
        Objects.open("memory:///").check()


def test_opening():
    refused = [
        ("ftp://host/x", {}),
        ("folder", {}),
        ("file:///", {}),
        ("file://host/x", {}),
        ("file:///x", {"region": "here"}),
        ("s3://bucket/../x", {}),
        ("s3://bucket/.x", {}),
        ("s3://key:secret@bucket/x", {}),
        ("s3://bucket/x?y", {}),
        ("s3://bucket", {"endpoint": "host:80"}),
        ("s3://bucket", {"no_such_option": "1"}),
        ("s3://", {}),
        ("memory:///", {"retry_seconds": -1}),
    ]
    for url, options in refused:
        with pytest.raises(InvalidArgument, match=r"^(?!.*secret)"):
            Objects.open(url, **options)
    with pytest.raises(TierUnavailable, match="allow_http"):
        Objects.open("s3://b", endpoint="http://127.0.0.1:1", **{**KEYS, "allow_http": False}).read(
            "a"
        )
    objects = Objects.open(
        "s3://bucket/x", endpoint="https://127.0.0.1", **KEYS | {"secret_access_key": "hush"}
    )
    assert "hush" not in repr(objects)


# --- which requests fetch which ranges ---------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60))), st.integers(0, 40))
def test_spans_cover_ranges(pairs, gap):
    data = noise(400)
    ranges = [(start, start + length) for start, length in pairs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "PIECE", 50)
        patch.setattr(spans, "GAP", gap)
        plan = spans.plan_spans(ranges)
        buffers = spans.fetch_spans(plan, lambda a, b: memoryview(data)[a:b])
    assert all(a[1] <= b[0] for a, b in pairwise(plan)), "nothing twice"
    assert all(spans.view_range(plan, buffers, a, b) == data[a:b] for a, b in ranges)
    asked = set().union(*(range(*pair) for pair in ranges))
    assert all({a, b - 1} <= asked for a, b in plan), "no request begins or ends unwanted"
