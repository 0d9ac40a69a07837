"""Names, garbage, usage, family, files, recipes: what the verbs of a store promise."""

import os
import time

import pytest
import torch

from kvedit.editors import Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.errors import (
    CapacityExceeded,
    CorruptMemory,
    InvalidArgument,
    NotFound,
    RaceLost,
    UntrustedMemory,
)
from kvedit.store import Signer, Store

from .conftest import assert_same, build_memory, files, with_bias


def small(seed=0):
    return build_memory(seed, layers=1, slots=4)


# Names


def test_branches_tags_rollbacks(store):
    first, second = small(1), small(2)
    store.put(first, "m", tags=["t"], metrics={"kl": 0.5})
    store.put(second, "m")
    before = len(files(store, "packs/*"))
    assert store.branch("m@{1}", "b").tags == ("t",)
    assert_same(store.get("b"), first)
    with pytest.raises(RaceLost):
        store.branch("m", "b")
    store.tag("m", "v1")
    with pytest.raises(InvalidArgument, match="is a tag"):
        store.put(first, "v1")
    assert store.put(first, "v1", force=True).version == 2
    record = store.rollback("m")
    assert (record.version, record.metrics) == (3, {"kl": 0.5})
    assert_same(store.get("m"), first)
    assert_same(store.get("m@{1}"), second)
    with pytest.raises(NotFound):
        store.rollback("m", to=9)
    assert len(files(store, "packs/*")) == before  # none of it costs bytes
    store.rebuild_index()
    assert_same(store.get("m"), first)
    assert store.ls("v1")[0].fixed


def test_labels_and_search(store):
    store.put(small(1), "a", source="book.txt", licence="CC0", metrics={"kl": 0.01}, tags=["x"])
    store.put(small(2), "b", metrics={"kl": 0.2})
    assert [e.name for e in store.ls("metric.kl < 0.1 and tag = x")] == ["a"]
    assert [e.name for e in store.ls("licence = CC0 or metric.kl > 0.1")] == ["a", "b"]
    store.annotate("b", metrics={"top1": 0.9}, tags=["y"], message="seen")
    (entry,) = store.ls("tag = y")
    assert (entry.metrics, entry.message) == ({"kl": 0.2, "top1": 0.9}, "seen")
    store.rebuild_index()
    assert store.ls("tag = y") == [entry]
    with pytest.raises(InvalidArgument):
        store.ls("metric.kl <")
    with pytest.raises(InvalidArgument):
        store.put(small(3), "c", metrics={"kl": float("nan")})
    for number in range(7):
        store.put(small(10 + number), f"n/{number}")
    page = store.ls("n/*", limit=3)
    assert [e.name for e in page] == ["n/0", "n/1", "n/2"]
    assert store.ls("n/*", limit=3, after=page[-1].name)[0].name == "n/3"


def test_what_expires_goes_and_what_is_pinned_stays(store):
    store.put(small(1), "a", ttl=0.05)
    store.put(small(2), "b", ttl=0.05)
    store.put(small(3), "c", ttl=100)
    store.pin("b")
    time.sleep(0.1)
    with pytest.raises(NotFound):
        store.get("a")
    assert store.names() == ["b", "c"]
    assert_same(store.get("b"), small(2))
    assert store.gc().expired == 1
    store.annotate("c", ttl=0)
    assert store.log("c")[0].expires is None


def test_many_at_once(store):
    memories = {f"m/{seed}": build_memory(seed) for seed in range(5)}
    records = store.put_many(memories, tags=["batch"])
    assert [record.name for record in records] == list(memories)
    assert len(files(store, "packs/*")) == 1
    for name, memory in memories.items():
        assert_same(store.get(name), memory)
    with pytest.raises(InvalidArgument):
        store.put_many({})
    store.tag("m/0", "fixed")
    with pytest.raises(InvalidArgument, match="is a tag"):
        store.put_many({"new": small(), "fixed": small()})
    assert "new" not in store  # all or none


def test_a_lost_race_is_told(store, monkeypatch):
    store.put(small(1), "m")
    other = Store(store.path, "process")
    commit = store._writer.put

    def late(puts, seen):
        other.put(small(2), "m")
        monkeypatch.undo()
        return commit(puts, seen)

    monkeypatch.setattr(store._writer, "put", late)
    with pytest.raises(RaceLost, match="force=True"):
        store.put(small(3), "m")
    assert_same(store.get("m"), small(2))
    assert store.put(small(3), "m", force=True).version == 3


# Garbage and usage


def test_garbage(store):
    base = build_memory(1, layers=3, slots=600)
    store.put(base, "base")
    store.put(with_bias(base), "edit")
    size = sum(path.stat().st_size for path in files(store, "packs/*"))
    store.rm("base")
    assert store.gc().packs == 0  # the edit needs nearly all of it
    assert_same(store.get("edit"), with_bias(base))
    store.rm("edit")
    assert store.du().garbage > 0
    done = store.gc()
    assert done.freed == size and files(store, "packs/*") == []
    assert store.fsck().ok


def test_what_is_still_needed_is_packed_anew(store):
    memories = {f"{seed}": build_memory(seed) for seed in range(4)}
    store.put_many(memories)
    (before,) = [path.stat().st_size for path in files(store, "packs/*")]
    held = store.get("0")  # mapped from the pack that will go
    for name in ("1", "2", "3"):
        store.rm(name)
    done = store.gc()
    (after,) = files(store, "packs/*")
    assert done.repacked == 1 and after.stat().st_size < 0.4 * before
    assert_same(held, memories["0"])
    for one in (store, Store(store.path)):
        assert_same(one.get("0"), memories["0"])
    store.rebuild_index()
    assert_same(store.get("0"), memories["0"])
    assert store.fsck().ok


def test_usage(store):
    base = build_memory(1)
    store.put(base, "base")
    store.put(with_bias(base), "edit")
    usage = store.du()
    names = {one.name: one for one in usage.names}
    assert names["edit"].own < 0.5 * names["edit"].stored
    assert usage.packs == sum(path.stat().st_size for path in files(store, "packs/*"))
    assert usage.garbage == 0 and "base" in str(usage)


# Family


def test_family(store):
    base = build_memory(1)
    edit = with_bias(base)
    again = with_bias(edit, value=2.0)
    store.put(base, "base", source="book.txt")
    store.put(edit, "edit")
    store.put(again, "again")
    store.put(build_memory(2), "stranger")
    assert {r.name for r in store.descendants("base")} == {"edit", "again"}
    assert {r.name for r in store.descendants("book.txt")} == {"base", "edit", "again"}
    assert [r.name for r in store.ancestors("again")] == ["edit", "base"]
    assert store.descendants("again") == [] and store.ancestors("base") == []
    for record in store.descendants("book.txt"):
        store.rm(record.name)
    assert store.names() == ["stranger"]


# Files


@pytest.mark.parametrize("codec", ["raw", "planes-zstd", "int8"])
def test_export_and_import(store, tmp_path, codec):
    memory = build_memory(1, bias=True, source="chat")
    record = store.put(memory, "m", "said", ["t"], source="s", metrics={"kl": 1}, codec=codec)
    size = store.export("m", tmp_path / "m.kv")
    assert size == (tmp_path / "m.kv").stat().st_size
    other = Store(tmp_path / "other", "process")
    found = other.import_(tmp_path / "m.kv")
    assert (found.record, found.message, found.tags) == (record.record, "said", ("t",))
    assert (found.metrics, found.source, found.codec) == ({"kl": 1.0}, "s", codec)
    assert_same(other.get("m"), store.get("m"))
    assert other.fsck().ok
    with pytest.raises(InvalidArgument, match="exists"):
        store.export("m", tmp_path / "m.kv")
    with pytest.raises(CorruptMemory):
        other.import_(tmp_path / "m.kv", name="n", record="0" * 64)
    data = bytearray((tmp_path / "m.kv").read_bytes())
    for offset in range(0, len(data), 997):
        data[offset] ^= 1
        (tmp_path / "bad.kv").write_bytes(data)
        with pytest.raises(CorruptMemory):
            other.import_(tmp_path / "bad.kv", name="bad")
        data[offset] ^= 1
    assert "bad" not in other


# Recipes


def test_a_recipe_costs_its_steps(tmp_path):
    store = Store(tmp_path / "s", "process", replay=rebuild)
    base = build_memory(1, slots=2000)
    edit = Emphasize(span={"tokens": (3, 9)}, strength=1.5)(base)
    store.put(base, "base")
    before = store.counters.bytes_written
    record = store.put(edit, "edit", recipe=True)
    assert store.counters.bytes_written - before < 6000
    assert (record.codec, record.content) == ("recipe", edit.digest)
    assert store.get("edit").digest == edit.digest
    assert store.get("edit", layers=[1], slots=(2, 5)).layers[1].slots == 3
    assert "recipe" in str(store.show("edit"))
    store.rm("base")
    store.gc()
    assert store.get("edit").digest == edit.digest  # its base was kept
    assert store.fsck().ok
    with pytest.raises(InvalidArgument, match="replay"):
        Store(tmp_path / "s").get("edit")
    wrong = Store(tmp_path / "s", replay=lambda lineage, fetch: fetch(lineage.nodes[0].id))
    with pytest.raises(CorruptMemory, match="another memory"):
        wrong.get("edit")


def test_what_does_not_replay_is_no_recipe(tmp_path):
    store = Store(tmp_path / "s", "process", replay=rebuild)
    base = build_memory(1)
    store.put(base, "base")
    with pytest.raises(Exception, match=r"edit|step|editor"):
        store.put(with_bias(base), "edit", recipe=True)  # no such editor
    assert "edit" not in store


# Keys and signatures


def test_encrypted(tmp_path):
    key = os.urandom(32)
    memory = build_memory(1, bias=True, source="chat")
    store = Store(tmp_path / "s", "process", key=key, namespace="a")
    store.put(memory, "m")
    store.put(memory, "z", codec="planes-zstd")
    assert_same(store.get("m"), memory)
    needles = [memory.layers[0].keys.numpy().tobytes()[:64], "é é".encode(), b"system"]
    for path in files(store):
        data = path.read_bytes()
        assert not any(needle in data for needle in needles), path
    assert store.fsck().ok
    store.rm("z")
    store.gc(waste=0)
    assert_same(Store(tmp_path / "s", key=key, namespace="a").get("m"), memory)
    for other in (None, os.urandom(32)):
        with pytest.raises(InvalidArgument, match="encrypted with key"):
            Store(tmp_path / "s", key=other, namespace="a").get("m")
    with pytest.raises(NotFound):
        Store(tmp_path / "s", key=key, namespace="b").get("m")
    with pytest.raises(InvalidArgument, match="encrypted"):
        store.export("m", tmp_path / "m.kv")
    store.export("m", tmp_path / "m.kv", key=key)
    assert_same(
        Store(tmp_path / "t").import_(tmp_path / "m.kv", key=key)
        and Store(tmp_path / "t").get("m"),
        memory,
    )


def test_what_is_in_the_clear_is_not_read_beside_a_key(tmp_path):
    Store(tmp_path / "s", "process").put(small(), "m")
    with pytest.raises(CorruptMemory, match="not encrypted"):
        Store(tmp_path / "s", key=os.urandom(32)).get("m")


def test_namespaces_share_nothing(tmp_path):
    a, b = (Store(tmp_path / "s", "process", namespace=name) for name in "ab")
    a.put(small(1), "m")
    b.put(with_bias(small(1)), "m")
    assert_same(a.get("m"), small(1))
    assert_same(b.get("m"), with_bias(small(1)))
    assert not {p.name for p in files(a, "packs/*")} & {p.name for p in files(b, "packs/*")}
    assert Store(tmp_path / "s").names() == []


def test_signatures(tmp_path):
    mine, other = Signer.generate(), Signer.generate()
    Store(tmp_path / "s", "process").put(small(1), "plain")
    Store(tmp_path / "s", "process", signer=mine).put(small(2), "mine")
    Store(tmp_path / "s", "process", signer=other).put(small(3), "other")
    store = Store(tmp_path / "s", trusted_keys=[mine.public], ram="1MiB")
    for _ in range(2):
        assert_same(store.get("mine"), small(2))
        for name in ("plain", "other"):
            with pytest.raises(UntrustedMemory):
                store.get(name)
    store.export("mine", tmp_path / "m.kv")
    fresh = Store(tmp_path / "t", "process", trusted_keys=[mine.public])
    fresh.import_(tmp_path / "m.kv")
    Store(tmp_path / "s").export("other", tmp_path / "o.kv")
    with pytest.raises(UntrustedMemory):
        fresh.import_(tmp_path / "o.kv")


# Codecs


def test_codecs(store):
    memory = build_memory(1, slots=300, dtype=torch.bfloat16)
    store.put(memory, "raw")
    assert store.put(memory, "zstd", codec="planes-zstd").content == memory.digest
    record = store.put(memory, "int8", codec="int8")
    found = store.get("int8")
    assert record.content == found.digest != memory.digest
    error = (found.layers[0].keys - memory.layers[0].keys).float().norm()
    assert 0 < error < 0.02 * memory.layers[0].keys.float().norm()
    assert found.lineage.head.name == "codec"
    tiny = memory.with_layers(
        {
            index: type(layer)(layer.keys * 1.004, layer.values, layer.positions, layer.source)
            for index, layer in memory.layers.items()
        }
    )
    from .conftest import with_message

    edit = with_message(tiny, '{"factor":1.004}')
    with pytest.raises(InvalidArgument, match="codec"):
        store.put(edit, "edit", codec="int4")  # the edit would drown in it
    store.put(edit, "edit", codec="int4", force=True)


# Parts


@pytest.mark.parametrize("slots", [(0, 1), (250, 260), (255, 257), (256, 600), (599, 600)])
def test_parts(store, slots):
    memory = build_memory(1, layers=3, slots=600, ragged=True, bias=True)
    store.put(memory, "m")
    part = store.get("m", layers=[0, -1], slots=slots)
    found = store.peek("m", kinds=("keys", "bias"), heads=[1], slots=slots)
    for index, layer in part.layers.items():
        whole = memory.layers[index]
        start, stop = (min(slot, whole.slots) for slot in slots)
        assert torch.equal(layer.keys, whole.keys[:, start:stop])
        assert torch.equal(layer.positions, whole.positions[start:stop])
        assert torch.equal(found[index]["keys"], whole.keys[[1], start:stop])
        if whole.bias is not None:
            assert torch.equal(found[index]["bias"], whole.bias[[1], start:stop])
    with pytest.raises(InvalidArgument):
        store.get("m", slots=(5, 5))


def test_writing_into_a_mapped_tensor_changes_no_file(store):
    memory = build_memory(1)
    store.put(memory, "m")
    found = store.get("m")
    found.layers[0].keys.add_(1)
    assert_same(store.get("m"), memory)
    assert store.fsck().ok


# Room


def test_room(tmp_path):
    memories = {f"m{seed}": build_memory(seed, slots=200) for seed in range(4)}
    size = Store(tmp_path / "x", "process").put(memories["m0"], "m").bytes
    alone = Store(tmp_path / "alone", "process", capacity=int(1.5 * size))
    alone.put(memories["m0"], "m0")
    with pytest.raises(CapacityExceeded, match="push"):
        alone.put(memories["m1"], "m1")
    assert alone.names() == ["m0"] and alone.fsck().ok
    (tmp_path / "r").mkdir()
    remote = f"file://{tmp_path / 'r'}"
    store = Store(tmp_path / "s", "process", capacity=int(3.5 * size), remote=remote)
    store.put(memories["m0"], "m0")
    store.pin("m0")
    for name, memory in memories.items():
        store.put(memory, name)
    pinned = set(store.show("m0").packs)
    assert pinned <= {path.stem for path in files(store, "packs/*")}
    assert store.stats().local <= 3.5 * size and store.counters.evicted
    for name, memory in memories.items():
        assert_same(store.get(name), memory)
    assert store.counters.fetched and store.fsck().ok
    store.rebuild_index()
    for name, memory in memories.items():
        assert_same(Store(tmp_path / "s", remote=remote).get(name), memory)


def test_live_memories(store):
    memory = build_memory(1)
    store.put(memory, "m")
    live = Store(store.path, ram=4 * memory.nbytes)
    assert_same(live.get("m"), memory)
    read = live.counters.bytes_read
    assert_same(live.get("m"), memory)
    assert live.counters.live_hits == 1 and live.counters.bytes_read == read
    live.get("m").layers[0].values.mul_(2)
    assert_same(live.get("m"), memory)  # dropped, and read again
    unchecked = Store(store.path, ram=4 * memory.nbytes)
    assert not unchecked.get("m", verify="off").verified
    assert unchecked.get("m").verified


def test_in_the_background(tmp_path):
    with Store(tmp_path / "s", "process", queue=1) as store:
        futures = [store.put_async(small(seed), f"m{seed}") for seed in range(5)]
        failed = store.put_async(small(), "not a name!")
        with pytest.raises(InvalidArgument):
            store.flush()
        assert [future.result().version for future in futures] == [1] * 5
        assert isinstance(failed.exception(), InvalidArgument)
        store.prefetch("m1").result()
        store.flush()
    assert len(Store(tmp_path / "s")) == 5
