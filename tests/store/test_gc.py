"""gc: what names can reach stays, bit by bit; all else goes; nothing goes where it can't tell."""

import random
import shutil

import pytest

from kvedit.errors import CorruptMemory, InvalidArgument
from kvedit.store import Store

from .conftest import (
    assert_same,
    build_memory,
    every_byte,
    files,
    flip,
    pack_bytes,
    small,
    temporaries,
    with_bias,
)


def test_gc_of_nothing(store):
    assert store.gc().freed == 0
    assert not store.path.exists()
    store.put(small(), "m")
    before = every_byte(store.path / "packs")
    done = store.gc(waste=0)
    assert (done.packs, done.freed, done.repacked, done.kept, done.expired) == (0, 0, 0, 0, 0)
    assert every_byte(store.path / "packs") == before


@pytest.mark.parametrize("waste", [-0.1, 1, 2, float("nan")])
def test_waste_is_a_share(store, waste):
    with pytest.raises(InvalidArgument, match="share"):
        store.gc(waste)


@pytest.mark.parametrize("trial", range(4))
def test_any_history_keeps_what_names_reach(store, trial):
    """Random puts, edits, branches and removals against a model in a dict."""
    draw = random.Random(trial)
    held = {}
    for step in range(25):
        name = f"n{draw.randrange(5)}"
        action = draw.choice(["put", "many", "edit", "branch", "rm", "rm", "gc"])
        if action == "put":
            held.setdefault(name, []).append(build_memory(draw.randrange(4), slots=300, layers=2))
            store.put(held[name][-1], name)
        elif action == "many":
            made = {f"n{n}": build_memory(10 + draw.randrange(6), layers=1) for n in range(3)}
            store.put_many(made)
            for key, memory in made.items():
                held.setdefault(key, []).append(memory)
        elif action == "edit" and name in held:
            held[name].append(with_bias(held[name][-1], value=float(step + 1)))
            store.put(held[name][-1], name)
        elif action == "branch" and name in held:
            store.branch(name, f"b{step}")
            held[f"b{step}"] = [held[name][-1]]
        elif action == "rm" and name in held:
            store.rm(name)
            del held[name]
        elif action == "gc":
            store.gc(draw.choice([0, 0.25, 0.9]))
    store.gc(waste=0)
    for one in (store, Store(store.path)):
        assert one.names() == sorted(held)
        for name, memories in held.items():
            assert one.get(name).digest == memories[-1].digest
    usage = store.du()
    assert usage.garbage == 0  # waste=0 leaves none
    assert usage.packs == usage.local == pack_bytes(store)
    health = store.fsck()
    assert health.ok and not health.problems
    store.rebuild_index()
    for name, memories in held.items():
        assert_same(store.get(name), memories[-1])


def test_garbage_is_what_du_says_and_freed_is_what_the_folder_lost(store):
    store.put_many({f"m{n}": build_memory(n) for n in range(4)})
    for n in range(3):
        store.rm(f"m{n}")
    garbage, before = store.du().garbage, pack_bytes(store)
    done = store.gc()
    assert done.freed == before - pack_bytes(store)
    assert garbage <= done.freed <= garbage + 0.05 * before  # the header of the old pack
    assert store.gc(waste=0).freed == 0


def test_waste_decides_what_is_packed_anew(store):
    store.put_many({f"m{n}": build_memory(n) for n in range(4)})
    store.rm("m0")
    before = every_byte(store.path / "packs")
    done = store.gc(waste=0.5)
    assert done.packs == done.repacked == 0 and done.kept > 0
    assert every_byte(store.path / "packs") == before
    done = store.gc(waste=0.1)
    assert (done.packs, done.repacked, done.kept) == (1, 1, 0)


def test_removed_content_is_in_no_file(store):
    secret = build_memory(7)
    needles = [bytes(t.numpy().tobytes()[:64]) for _, t in secret.layers[0].tensors()][:2]
    store.put_many({"secret": secret, "other": build_memory(1)})
    assert any(needles[0] in data for data in every_byte(store.path).values())
    store.rm("secret")
    store.gc(waste=0)
    for path, data in every_byte(store.path).items():
        assert not any(needle in data for needle in needles), path


def test_what_was_put_after_a_removal_comes_back(store):
    memory = build_memory(1)
    store.put(memory, "m")
    store.rm("m")
    store.put(memory, "n")  # from the bytes that are still there
    store.gc(waste=0)
    assert_same(store.get("n"), memory)
    store.rm("n")
    store.gc()
    store.put(memory, "m")  # written anew
    assert_same(store.get("m"), memory)


def test_a_pack_with_a_flipped_live_block_is_left_as_evidence(store):
    store.put_many({"a": build_memory(1), "b": build_memory(2)})
    (path,) = files(store, "packs/*")
    place = store._shelf.index.locate([build_memory(1).cut()[0].digest])
    assert place
    extent = store._finder.header(path.stem).entries[build_memory(1).cut()[0].digest][0]
    flip(path, extent.offset + 5)
    damaged = path.read_bytes()
    store.rm("b")
    done = store.gc(waste=0)
    assert done.packs == 0 and done.kept > 0
    assert path.read_bytes() == damaged
    with pytest.raises(CorruptMemory):
        store.get("a")


def test_without_a_manifest_nothing_is_removed(store):
    store.put(build_memory(1), "keep")
    store.put(build_memory(2), "gone")
    paper = store._shelf.index.manifest_pack(store.log("keep")[0].record)
    store.rm("gone")
    path = store.path / "packs" / f"{paper}.safetensors"
    place = store._finder.header(paper).manifests[store.log("keep")[0].record]
    flip(path, place.offset + 9)
    before = every_byte(store.path / "packs")
    with pytest.raises(CorruptMemory):
        Store(store.path).gc()
    assert every_byte(store.path / "packs") == before


def test_strays_go_and_what_is_known_stays(store):
    store.put(small(), "m")
    (path,) = files(store, "packs/*")
    shutil.copy(path, path.with_name("0" * 64 + ".safetensors"))
    assert store.gc().freed == path.stat().st_size
    assert files(store, "packs/*") == [path]
    assert temporaries(store) == []


def test_memories_that_are_held_outlive_their_pack(store):
    memory = build_memory(1, bias=True)
    store.put(memory, "m")
    held, seen = store.get("m"), store.peek("m", kinds=("keys",))
    store.rm("m")
    store.gc()
    assert files(store, "packs/*") == []
    assert_same(held, memory)
    held.check_unmodified()
    assert (seen[0]["keys"] == memory.layers[0].keys).all()
    assert_same(Store(store.path, "process").put(held, "again") and store.get("again"), memory)


def test_other_objects_follow_to_the_new_pack(store):
    store.put_many({f"m{n}": build_memory(n) for n in range(3)})
    reader = Store(store.path)
    assert_same(reader.get("m0"), build_memory(0))  # its caches know the old pack now
    store.rm("m1")
    store.rm("m2")
    assert store.gc().repacked == 1
    assert_same(reader.get("m0"), build_memory(0))
    assert_same(reader.get("m0", verify="deep"), build_memory(0))
    assert reader.peek("m0", slots=(3, 5))[0]["keys"].shape[1] == 2


def test_both_codecs_and_bias_survive_repacking(store):
    memory = build_memory(1, bias=True, slots=600)
    store.put(build_memory(3, bias=True), "gone")
    store.put_many({"a": memory, "x": build_memory(5)}, codec="planes-zstd")
    store.put_many({"b": build_memory(2, slots=600), "y": build_memory(6)}, codec="int8")
    lossy = store.get("b").digest
    for name in ("gone", "x", "y"):
        store.rm(name)
    assert store.gc(waste=0).repacked >= 2
    assert_same(store.get("a"), memory)
    assert store.get("b", verify="deep").digest == lossy
    assert store.fsck().ok
