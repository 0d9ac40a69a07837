"""A disk that is full or broken at the n-th call: a clear error, and the store as it was."""

import errno
import os

import pytest

from kvedit.errors import KVEditError
from kvedit.store import Store

from .conftest import assert_same, build_memory, files, with_bias

VERBS = ("put", "put_many", "gc", "tag", "rm", "annotate", "export", "import")
CALLS = ("write", "fsync", "replace", "ftruncate")


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
    }


def prepared(folder):
    store = Store(folder)
    store.put_many({"m": build_memory(1), "gone": build_memory(2)})
    store.rm("gone")
    return store


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_that_can_fail(tmp_path, monkeypatch, verb, code):
    prepared(tmp_path / "source").export("m", tmp_path / "in.kv")
    action = verbs(tmp_path)[verb]
    failed_at = set()
    for name in CALLS:
        for call in range(1, 60):
            store = prepared(tmp_path / f"{name}{call}")
            before = snapshot(store)
            real, seen = getattr(os, name), []

            def failing(*args, real=real, seen=seen, call=call, **how):
                seen.append(1)
                if len(seen) == call:
                    raise OSError(code, os.strerror(code))
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
            with Store(store.path) as again:  # what failed once works the next time
                action(again)
                if verb != "rm":
                    assert_same(again.get("m"), build_memory(1))
                assert again.fsck().ok
            (tmp_path / "out.kv").unlink(missing_ok=True)
        (tmp_path / "out.kv").unlink(missing_ok=True)
    assert {"write", "fsync"} <= failed_at


def test_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[: max(len(data) // 3, 1)]))
    store = Store(tmp_path / "s")
    store.put(with_bias(build_memory(1)), "m")
    assert_same(store.get("m"), with_bias(build_memory(1)))
