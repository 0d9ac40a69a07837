"""Recipes: the steps instead of the bytes, and never another memory than the one that was put."""

import dataclasses

import pytest
import torch

from kvedit.editors import Chain, Drop, Emphasize, Shift, Suppress
from kvedit.editors.replaying import rebuild
from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.memory import Lineage
from kvedit.store import Store

from .conftest import assert_same, build_memory, every_byte, flip, pack_bytes

SPAN = {"tokens": (3, 40)}
EDITORS = {
    "emphasize": Emphasize(span=SPAN, strength=1.5),
    "rest": Emphasize(span=SPAN, alpha=0.1, reference="rest_of_memory", layers=(0, -1)),
    "suppress": Suppress(span=SPAN, strength=float("inf"), heads=(1,)),
    "drop": Drop(SPAN),
    "shift": Shift(5),
    "chain": Chain([Drop({"tokens": (50, 60)}), Emphasize(span=SPAN, strength=2.0)]),
}


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "s", "process", replay=rebuild) as opened:
        yield opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("editor", EDITORS.values(), ids=EDITORS)
def test_what_comes_is_what_was_put(store, editor, dtype):
    base = build_memory(1, dtype=dtype)
    store.put(base, "base")
    edited = editor(base)
    before = pack_bytes(store)
    record = store.put(edited, "edit", recipe=True)
    assert pack_bytes(store) - before < 8000
    assert (record.codec, record.content, record.slots) == ("recipe", edited.digest, edited.slots)
    assert_same(store.get("edit"), edited)
    assert store.get("edit").verified
    assert store.lineage("edit") == edited.lineage
    assert {r.name for r in store.descendants("base")} == {"edit"}
    store.rebuild_index()
    assert_same(Store(store.path, replay=rebuild).get("edit"), edited)


def test_parts_of_a_recipe_are_those_of_its_memory(store):
    base = build_memory(1, layers=3, slots=600, ragged=True)
    store.put(base, "base")
    edited = EDITORS["emphasize"](base)
    store.put(edited, "bytes")
    store.put(edited, "recipe", recipe=True)
    for how in ({"layers": [0, -1]}, {"slots": (250, 260)}, {"layers": [1], "slots": (400, 503)}):
        assert_same(store.get("recipe", **how), store.get("bytes", **how))
        left, right = (
            store.peek(name, kinds=("keys", "bias"), **how) for name in ("recipe", "bytes")
        )
        assert left.keys() == right.keys()
        for layer in left:
            assert all(torch.equal(left[layer][kind], right[layer][kind]) for kind in right[layer])
    for slots in ((0, 601), (5, 5), (-1, 3)):
        for name in ("recipe", "bytes"):
            with pytest.raises(InvalidArgument, match="slots"):
                store.get(name, slots=slots)


def test_a_recipe_over_a_recipe_starts_from_the_bytes(store):
    base = build_memory(1)
    store.put(base, "base")
    first = EDITORS["emphasize"](base)
    second = EDITORS["drop"](first)
    store.put(first, "first", recipe=True)
    store.put(second, "second", recipe=True)
    for name in ("base", "first"):
        store.rm(name)
        store.gc(waste=0)
    assert_same(store.get("second"), second)
    store.rm("second")
    assert store.gc(waste=0).freed and pack_bytes(store) == 0


def test_the_base_stays_as_long_as_a_recipe_needs_it(store):
    base, other = build_memory(1), build_memory(2)
    store.put_many({"base": base, "other": other})
    edited = EDITORS["shift"](base)
    store.put(edited, "edit", recipe=True)
    store.rm("base")
    store.rm("other")
    store.gc(waste=0)
    assert_same(store.get("edit"), edited)
    assert_same(Store(store.path, replay=rebuild).get("edit"), edited)
    assert store.fsck().ok
    keys = other.layers[0].keys.numpy().tobytes()[:64]
    assert not any(keys in data for data in every_byte(store.path).values())
    with pytest.raises(NotFound):
        store.get(base.digest)  # kept, and not to be reached


def test_another_memory_of_the_same_step_does_not_disturb(store):
    """A cast leaves no step: both memories are the work of one."""
    base = build_memory(1)
    store.put(base, "base")
    edited = EDITORS["shift"](base)
    store.put(edited, "edit", recipe=True)
    store.put(base.to(dtype=torch.bfloat16), "half")
    assert_same(store.get("edit"), edited)
    store.put(edited, "again", recipe=True)
    assert_same(store.get("again"), edited)
    assert store.log("again")[0].record == store.log("edit")[0].record


def test_a_base_without_history(store):
    bare = dataclasses.replace(build_memory(1), lineage=Lineage())
    store.put(bare, "bare")
    edited = EDITORS["emphasize"](bare)
    store.put(edited, "edit", recipe=True)
    store.rm("bare")
    store.gc(waste=0)
    assert_same(store.get("edit"), edited)


def wrong_dtype(lineage, fetch):
    return rebuild(lineage, fetch).to(dtype=torch.float16)


def one_bit(lineage, fetch):
    memory = rebuild(lineage, fetch)
    layer = memory.layers[0]
    keys = layer.keys.clone()
    keys.view(torch.int32)[0, 0, 0] ^= 1
    return memory.with_layers({0: dataclasses.replace(layer, keys=keys)})


def the_base(lineage, fetch):
    return fetch(lineage.nodes[0].id)


@pytest.mark.parametrize("replay", [wrong_dtype, one_bit, the_base])
def test_other_libraries_are_noticed(store, replay):
    base = build_memory(1)
    store.put(base, "base")
    edited = EDITORS["emphasize"](base)
    store.put(edited, "edit", recipe=True)
    other = Store(store.path, "process", replay=replay, ram="10MiB")
    for read in (
        lambda: other.get("edit"),
        lambda: other.get("edit", verify="off"),
        lambda: other.get("edit", layers=[0]),
        lambda: other.peek("edit"),
    ):
        with pytest.raises(CorruptMemory, match="another memory"):
            read()
    before = every_byte(store.path / "packs")
    with pytest.raises(InvalidArgument, match="bit by bit"):
        other.put(EDITORS["drop"](base), "drop", recipe=True)
    assert "drop" not in other and every_byte(store.path / "packs") == before


def test_a_changed_library_is_noticed(store, monkeypatch):
    base = build_memory(1)
    store.put(base, "base")
    store.put(EDITORS["shift"](base), "edit", recipe=True)
    monkeypatch.setattr(Shift, "edit", lambda self, memory, reader=None: memory)
    with pytest.raises((CorruptMemory, InvalidArgument)):
        store.get("edit")


def test_a_damaged_base_or_recipe_is_noticed(store):
    base = build_memory(1)
    first = store.put(base, "base")
    second = store.put(EDITORS["shift"](base), "edit", recipe=True)
    assert len(store.log("edit")) == 1
    for record, offset in ((first, None), (second, 3)):
        pack = store._shelf.index.manifest_pack(record.record)
        header = store._finder.header(pack)
        at = header.extents[0].offset if offset is None else header.manifests[record.record].offset
        path = store.path / "packs" / f"{pack}.safetensors"
        flip(path, at + (offset or 0))
        with pytest.raises(CorruptMemory):
            Store(store.path, replay=rebuild).get("edit")
        flip(path, at + (offset or 0))
    assert Store(store.path, replay=rebuild).get("edit").digest == second.content


def test_without_a_stored_base_there_is_no_recipe(store):
    base = build_memory(1)
    edited = EDITORS["emphasize"](base)
    for memory in (base, edited):
        with pytest.raises((InvalidArgument, NotFound)):
            store.put(memory, "m", recipe=True)
    assert store.names() == []
    with pytest.raises(InvalidArgument, match="replay"):
        Store(store.path, "process").put(edited, "m", recipe=True)


def test_a_recipe_becomes_bytes_again(store, tmp_path):
    base = build_memory(1)
    store.put(base, "base")
    edited = EDITORS["drop"](base)
    store.put(edited, "edit", recipe=True)
    with pytest.raises(InvalidArgument, match="recipe"):
        store.export("edit", tmp_path / "m.kv")
    record = store.put(store.get("edit"), "edit")
    assert (record.version, record.codec, record.content) == (2, "raw", edited.digest)
    store.export("edit", tmp_path / "m.kv")
    assert_same(
        Store(tmp_path / "t").import_(tmp_path / "m.kv") and Store(tmp_path / "t").get("edit"),
        edited,
    )
    assert_same(store.get("edit@{1}"), edited)


@pytest.mark.parametrize("verb", ["branch", "tag"])
def test_a_recipe_under_another_name(store, verb):
    base = build_memory(1)
    store.put(base, "base")
    edited = EDITORS["shift"](base)
    store.put(edited, "edit", recipe=True)
    getattr(store, verb)("edit", "n")
    for name in ("base", "edit"):
        store.rm(name)
    store.gc(waste=0)
    assert_same(store.get("n"), edited)


def test_a_recipe_travels_with_its_base(tmp_path):
    (tmp_path / "r").mkdir()
    remote = f"file://{tmp_path / 'r'}"
    base = build_memory(1)
    edited = EDITORS["shift"](base)
    with Store(tmp_path / "a", "process", replay=rebuild, remote=remote) as store:
        store.put(base, "base")
        store.put(edited, "edit", recipe=True)
    for eager in (True, False):
        other = Store(tmp_path / f"b{eager}", "process", replay=rebuild, remote=remote)
        other.pull("edit", eager=eager)
        assert other.names() == ["edit"]
        assert_same(other.get("edit"), edited)
        other.gc()
        assert_same(other.get("edit"), edited)
