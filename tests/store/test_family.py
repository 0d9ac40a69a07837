"""Lineage: ancestors and descendants against the graph that the test drew itself."""

import dataclasses
import random

import pytest

from kvedit.errors import NotFound
from kvedit.memory import Lineage, LineageNode
from kvedit.store import Store

from .conftest import build_memory, small, with_bias, with_message


def merged(a, b, bias):
    """A memory of two parents."""
    inputs = (a.lineage.head.id, b.lineage.head.id)
    node = LineageNode("edit", "concat", 1, f'{{"bias":{bias}}}', inputs=inputs)
    made = with_bias(a, value=float(bias))
    return dataclasses.replace(made, lineage=Lineage.join([a.lineage, b.lineage], node))


def names(records):
    return {record.name for record in records}


@pytest.mark.parametrize("trial", range(3))
def test_any_graph(store, trial):
    draw = random.Random(trial)
    memories, parents = [], {}
    for number in range(14):
        count = min(draw.randrange(3), len(memories))
        chosen = draw.sample(range(len(memories)), count)
        if not chosen:
            memory = small(number)
        elif len(chosen) == 1:
            memory = with_bias(memories[chosen[0]], value=float(number))
        else:
            memory = merged(*(memories[one] for one in chosen), number)
        memories.append(memory)
        parents[number] = set(chosen)
        store.put(memory, f"n{number}")
    above = {}
    for number in range(14):
        above[number] = set(parents[number]).union(*(above[p] for p in parents[number]))
    for number in range(14):
        wanted = {f"n{one}" for one in above[number]}
        assert names(store.ancestors(f"n{number}")) == wanted
        below = {f"n{one}" for one in range(14) if number in above[one]}
        assert names(store.descendants(f"n{number}")) == below
        assert store.lineage(f"n{number}") == memories[number].lineage
    store.rebuild_index()
    assert names(store.descendants("n0")) == {f"n{n}" for n in range(14) if 0 in above[n]}


def test_the_newest_come_first(store):
    base = small()
    store.put(base, "base")
    for number in range(4):
        store.put(with_bias(base, value=float(number + 1)), f"e{number}")
    assert [record.name for record in store.descendants("base")] == ["e3", "e2", "e1", "e0"]


def test_versions_branches_and_codecs_are_all_found(store):
    base = build_memory(1)
    store.put(base, "base")
    store.put(with_bias(base), "edit")
    store.put(with_bias(base, value=2.0), "edit")
    store.branch("edit", "branch")
    store.put(base, "small", codec="int8")
    store.put(base.to(dtype=base.layers[0].keys.dtype), "again")  # the same memory
    found = {(r.name, r.version) for r in store.descendants("base")}
    assert found == {("edit", 1), ("edit", 2), ("branch", 1), ("small", 1)}
    assert names(store.ancestors("small")) == {"base", "again"}
    assert store.descendants(store.log("edit")[0].content[:12]) == []


def test_a_source_brings_all_that_was_made_of_it(store):
    first, second = small(1), small(2)
    store.put(first, "a", source="book.txt")
    store.put(second, "b", source="book.txt")
    store.put(small(3), "c", source="other.txt")
    store.put(with_bias(first), "edit")  # without a source of its own
    store.put(merged(second, small(3), 4), "both")
    wanted = {"a", "b", "edit", "both"}
    assert names(store.descendants("book.txt")) == wanted
    assert names(store.descendants("other.txt")) == {"c", "both"}
    for record in store.descendants("book.txt"):
        store.rm(record.name)
    assert store.names() == ["c"]
    with pytest.raises(NotFound):
        store.descendants("book.txt")
    store.gc(waste=0)
    text = first.layers[0].keys.numpy().tobytes()[:64]
    assert not any(text in path.read_bytes() for path in store.path.rglob("*") if path.is_file())


def test_removed_ancestors_are_not_listed_and_the_lineage_stays(store):
    base = small()
    edit = with_bias(base)
    store.put(base, "base")
    store.put(edit, "edit")
    store.rm("base")
    store.gc()
    assert store.ancestors("edit") == []
    assert store.lineage("edit") == edit.lineage
    store.put(base, "base")
    assert names(store.ancestors("edit")) == {"base"}
    assert names(store.descendants("base")) == {"edit"}


def test_lineage_reads_no_blocks(store):
    memory = with_message(build_memory(1, slots=2000), "{}")
    record = store.put(memory, "m")
    fresh = Store(store.path)
    assert fresh.lineage("m") == memory.lineage
    assert fresh.ancestors("m") == []
    assert fresh.counters.bytes_read == len(fresh._finder.paper(record.record))


def test_memory_of_a_step(store):
    base = small()
    store.put(base, "base")
    store.put(with_bias(base), "edit")
    assert store.memory_of(base.lineage.head.id).digest == base.digest
    assert store.memory_of("0" * 64) is None
    bare = dataclasses.replace(small(4), lineage=Lineage())
    store.put(bare, "bare")
    assert store.memory_of(bare.digest).digest == bare.digest
    assert store.ancestors("bare") == store.descendants("bare") == []


def test_descendants_of_a_memory_without_history(store):
    bare = dataclasses.replace(small(4), lineage=Lineage())
    node = LineageNode("edit", "bias", 1, "{}", inputs=(bare.digest,))
    store.put(bare, "bare")
    store.put(dataclasses.replace(with_bias(small(4)), lineage=Lineage((node,))), "edit")
    assert names(store.descendants("bare")) == {"edit"}


def test_what_is_not_there(store):
    for ask in (store.ancestors, store.descendants, store.lineage):
        for ref in ("nothing", "0" * 64):
            with pytest.raises(NotFound):
                ask(ref)
