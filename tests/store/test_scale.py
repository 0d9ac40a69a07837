"""What must not grow with the number of memories: look-ups, pages, puts."""

import sqlite3

import pytest

from kvedit.store import Store

from .conftest import build_memory


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("many") / "s", "none")
    for batch in range(4):
        memories = {
            f"n/{batch}/{n:04d}": build_memory(batch * 500 + n, layers=1, slots=2, heads=1, dim=2)
            for n in range(500)
        }
        store.put_many(memories, tags=[f"batch{batch}"])
    return store


def test_all_are_there(many):
    assert len(many) == 2000
    page = many.ls(limit=50, after="n/1/0499")
    assert [e.name for e in page][:2] == ["n/2/0000", "n/2/0001"] and len(page) == 50
    assert len(many.ls("tag = batch3", limit=10)) == 10
    record = many.log("n/3/0123")[0]
    assert many.get(record.record).digest == record.content
    assert many.show(record.content[:20]).record.record == record.record


def test_a_put_reads_only_the_end_of_the_log(many, monkeypatch):
    sizes = []
    tail = many._shelf.journal._tail

    def counted(since):
        data = tail(since)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(many._shelf.journal, "_tail", counted)
    many.put(build_memory(1, layers=1, slots=3), "one/more")
    assert max(sizes) < 2000 < (many.path / "log.jsonl").stat().st_size


def test_queries_use_indexes(many):
    asked = []
    connection = sqlite3.connect(many.path / "index.sqlite")
    with many._shelf.index._database.session() as own:
        own.set_trace_callback(asked.append)
    many.log("n/1/0001")
    many.ls(limit=50, after="n/1")
    many.show("n/2/0002")
    record = many.log("n/1/0001")[0].record
    many.show(record)
    many.show(record[:12])
    with many._shelf.index._database.session() as own:
        own.set_trace_callback(None)
    plans = [
        (query, row[3])
        for query in asked
        if query.startswith("SELECT")
        for row in connection.execute(f"EXPLAIN QUERY PLAN {query}")
    ]
    assert len(plans) > 8
    for query, step in plans:
        small = ("VIRTUAL TABLE", "CONSTANT ROW")  # json_each over the blocks of one memory
        assert not step.startswith("SCAN") or any(word in step for word in small), query
