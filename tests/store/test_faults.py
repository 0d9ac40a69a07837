"""A disk that is full or broken at the n-th call: a clear error, and the store as it was."""

import errno
import os

import pytest

from kvedit.errors import CorruptMemory, KVEditError, NotFound, RaceLost, TierUnavailable
from kvedit.store import Store

from .conftest import assert_same, build_memory, files, with_bias

VERBS = ("put", "put_many", "gc", "tag", "rm", "annotate", "export", "import", "push", "evict")
CALLS = ("write", "fsync", "replace", "ftruncate", "open", "lseek", "mkdir")


def small(seed=0):
    return build_memory(seed, layers=1, slots=4)


def snapshot(store):
    packs = {path.name: path.read_bytes() for path in files(store, "packs/*")}
    names = {name: [r.record for r in store.log(name)] for name in store.names()}
    return packs, names, (store.path / "log.jsonl").read_bytes()


def verbs(tmp_path):
    return {
        "put": lambda s: s.put(small(5), "new"),
        "put_many": lambda s: s.put_many({"new": small(5), "newer": small(6)}),
        "gc": lambda s: s.gc(waste=0.0),
        "tag": lambda s: s.tag("m", "t"),
        "rm": lambda s: s.rm("m"),
        "annotate": lambda s: s.annotate("m", metrics={"kl": 1.0}),
        "export": lambda s: s.export("m", tmp_path / "out.kv"),
        "import": lambda s: s.import_(tmp_path / "in.kv", name="imported"),
        "push": lambda s: s.push("m"),
        "evict": lambda s: s.evict("1GiB"),
    }


def prepared(folder, verb=""):
    remote = f"file://{folder}.remote" if verb in ("push", "evict") else None
    store = Store(folder, remote=remote, write="back")
    store.put_many({"m": build_memory(1), "gone": build_memory(2)})
    store.rm("gone")
    if verb == "evict":
        store.push("m")
    return store


def remote_of(store):
    place = store.path.with_name(f"{store.path.name}.remote")
    return f"file://{place}" if place.exists() else None


def half_of(real, args, code):
    """What a full disk does: some of the bytes go out before the error comes."""
    if real.__name__ == "write":
        real(args[0], args[1][: len(args[1]) // 2])
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_that_can_fail(tmp_path, monkeypatch, verb, code):
    prepared(tmp_path / "source").export("m", tmp_path / "in.kv")
    action = verbs(tmp_path)[verb]
    failed_at = set()
    for name in CALLS:
        for call in range(1, 60):
            store = prepared(tmp_path / f"{name}{call}", verb)
            before = snapshot(store)
            real, seen = getattr(os, name), []

            def failing(*args, real=real, seen=seen, call=call, **how):
                seen.append(1)
                if len(seen) == call:
                    half_of(real, args, code)
                return real(*args, **how)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    action(store)
                    done = True
                except (OSError, KVEditError):
                    done = False
            if len(seen) < call:  # nothing failed: every call was had
                assert done
                break
            if done:  # the verb could do without that call
                assert store.fsck().ok
                (tmp_path / "out.kv").unlink(missing_ok=True)
                continue
            failed_at.add(name)
            assert snapshot(store) == before
            assert not list(tmp_path.glob("out.kv")) and not list(tmp_path.glob(".out*"))
            assert not list((store.path / "tmp").glob("*"))
            assert store.fsck().ok
            store.close()
            with Store(
                store.path, remote=remote_of(store), write="back"
            ) as again:  # what failed once works the next time
                action(again)
                if verb != "rm":
                    assert_same(again.get("m"), build_memory(1))
                assert again.fsck().ok
            (tmp_path / "out.kv").unlink(missing_ok=True)
        (tmp_path / "out.kv").unlink(missing_ok=True)
    assert {"write", "fsync"} <= failed_at or verb == "push"
    assert "open" in failed_at


def test_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: max(len(data) // 3, 1)]))
    store = Store(tmp_path / "s")
    store.put(with_bias(build_memory(1)), "m")
    assert_same(store.get("m"), with_bias(build_memory(1)))


@pytest.mark.parametrize("method", ["create", "get_ref", "set_ref", "size"])
def test_a_remote_store_that_fails(tmp_path, monkeypatch, method):
    failed = 0
    for call in range(1, 30):
        store = prepared(tmp_path / f"{call}", "push")
        before, objects = snapshot(store), store._sync.depot._objects
        real, seen = getattr(objects, method), []

        def failing(*args, real=real, seen=seen, call=call, **how):
            seen.append(1)
            if len(seen) == call:
                raise TierUnavailable("injected")
            return real(*args, **how)

        with monkeypatch.context() as patch:
            patch.setattr(objects, method, failing)
            try:
                store.push("m")
                done = True
            except TierUnavailable:
                done = False
        if not done:
            failed += 1
            assert snapshot(store) == before and store.fsck().ok
            assert not list((store.path / "tmp").glob("*"))
        store.push("m")  # goes on where it was
        with Store(tmp_path / f"clone{call}", remote=remote_of(store)) as clone:
            assert clone.pull() == ["m"]
            assert_same(clone.get("m"), build_memory(1))
        if len(seen) < call:
            break
    assert failed or method == "size"


def test_what_can_not_be_unlinked(tmp_path, monkeypatch):
    """A put that is done is done, also where its note stays; gc takes strays away later."""
    store = prepared(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *args, **how: (_ for _ in ()).throw(OSError(5, "EIO")))
        store.put(small(5), "new")
        with pytest.raises(OSError, match="EIO"):
            store.gc(waste=0.0)
    for one in (store, Store(store.path)):
        assert_same(one.get("new"), small(5))
        assert_same(one.get("m"), build_memory(1))
    store.gc(waste=0.0)
    assert store.fsck().problems == ()
    assert files(store, "tmp/*") == []


@pytest.mark.parametrize("how", ["gc", "evict", "removed", "lost"])
@pytest.mark.parametrize("moment", ["resolve", "open"])
def test_a_file_that_vanishes_on_the_way(tmp_path, monkeypatch, how, moment):
    """Between the look-up of a memory and the mapping of its pack."""
    store = prepared(tmp_path / "s", "evict")
    reader = Store(store.path, remote=remote_of(store), write="back")
    done = []

    def meanwhile():
        if not done:
            done.append(1)
            if how == "removed":
                store.rm("m")
            if how in ("gc", "removed"):
                store.gc(waste=0.0)
            if how == "evict":
                assert store.evict("1GiB") > 0
            if how == "lost":  # here and below
                for path in (*tmp_path.rglob("*.safetensors"),):
                    path.unlink()

    owner, name = (reader, "_resolve") if moment == "resolve" else (reader._finder, "_cached")
    real = getattr(owner, name)

    def watched(*args):
        found = real(*args)
        meanwhile()
        return found

    monkeypatch.setattr(owner, name, watched)
    if how in ("removed", "lost"):
        with pytest.raises(NotFound if how == "removed" else CorruptMemory):
            reader.get("m")
    else:
        assert_same(reader.get("m"), build_memory(1))
    assert done


def test_a_remote_store_has_what_it_names(tmp_path):
    """Garbage was collected between two pushes: the old versions lie in other packs now."""
    store = prepared(tmp_path / "s", "push")
    store.push("m")
    store.gc(waste=0.0)
    store.put(small(3), "m")
    store.push("m")
    with Store(tmp_path / "clone", remote=remote_of(store)) as clone:
        clone.pull()
        assert_same(clone.get("m@{1}"), build_memory(1))
        assert_same(clone.get("m"), small(3))


def test_a_push_that_loses_takes_back_only_its_own_put(tmp_path):
    ours = Store(tmp_path / "a", remote=f"file://{tmp_path / 'r'}", write="back")
    ours.put(small(1), "m")
    theirs = Store(tmp_path / "b", remote=f"file://{tmp_path / 'r'}")
    theirs.put(small(2), "m")
    through = Store(tmp_path / "a", remote=f"file://{tmp_path / 'r'}")
    for seed in (1, 3):  # the first one is there already
        with pytest.raises(RaceLost):
            through.put(small(seed), "m")
        assert [record.version for record in ours.log("m")] == [1]
        assert_same(ours.get("m"), small(1))


def test_a_put_beside_a_push_is_pushed_by_the_next(tmp_path, monkeypatch):
    store = prepared(tmp_path / "s", "push")
    real = store._sync.depot.set_name

    def beside(*args):
        result = real(*args)
        Store(store.path).put(small(4), "m")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(store._sync.depot, "set_name", beside)
        store.push("m")
    store.flush()
    with Store(tmp_path / "clone", remote=remote_of(store)) as clone:
        clone.pull()
        assert_same(clone.get("m"), small(4))
