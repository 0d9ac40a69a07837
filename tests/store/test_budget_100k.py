"""What must stay cheap with 100,000 memories, seen at 2,000: work is counted, not timed."""

import sqlite3

import pytest

from kvedit.errors import InvalidArgument
from kvedit.store import Store

from .conftest import small

COUNT = 2000
TINY = {"slots": 2, "heads": 1, "dim": 2, "source": None}


def name_of(number):
    return f"n/{number % 7}/{number:05d}"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("many") / "s", "none")
    for first in range(0, COUNT, 500):
        memories = {name_of(n): small(n, **TINY) for n in range(first, first + 500)}
        store.put_many(memories, tags=[f"batch{first}"])
    for number in range(0, COUNT, 500):
        store.annotate(name_of(number), metrics={"kl": number / COUNT}, source=f"book{number}")
    return store


@pytest.fixture
def few(tmp_path):
    store = Store(tmp_path / "few", "none")
    store.put_many({f"m{n}": small(n, **TINY) for n in range(20)})
    return store


class Cost:
    """Counts what a store asks of SQLite and reads of its log."""

    def __init__(self, store, monkeypatch):
        self.store, self.queries, self.steps, self.read = store, [], 0, 0
        tail = store._shelf.journal._tail

        def counted(since):
            data = tail(since)
            self.read += len(data)
            return data

        monkeypatch.setattr(store._shelf.journal, "_tail", counted)

    def __enter__(self):
        def step():
            self.steps += 1

        with self.store._shelf.index._database.session() as own:
            own.set_trace_callback(self.queries.append)
            own.set_progress_handler(step, 10)  # every 10 instructions of its machine
        return self

    def __exit__(self, *_):
        with self.store._shelf.index._database.session() as own:
            own.set_trace_callback(None)
            own.set_progress_handler(None, 10)


def both(few, many, monkeypatch, action):
    """What an action costs in a small and in a big store; a first time fills caches."""
    found = []
    for number, store in enumerate((few, many)):
        action(store, "warm")
        with Cost(store, monkeypatch) as cost:
            action(store, f"x{number}")
        found.append(cost)
    return found


def test_names_and_lookups(many):
    wanted = sorted(name_of(n) for n in range(COUNT))
    assert [name for name in many.names() if name.startswith("n/")] == wanted
    for number in (0, 1, 999, 1500, 1999):
        memory = small(number, **TINY)
        assert many.get(name_of(number)).digest == memory.digest
        for ref in (memory.digest, memory.digest[:16], many.log(name_of(number))[0].record):
            assert many.show(ref).record.name == name_of(number)
    assert name_of(COUNT) not in many


def test_pages_and_conditions(many):
    wanted = sorted(name_of(n) for n in range(COUNT))
    page = many.ls(limit=100, after=wanted[700])
    assert [entry.name for entry in page] == wanted[701:801]
    assert len(many.ls("tag = batch500", limit=10_000)) == 500
    assert [e.name for e in many.ls("metric.kl > 0.4 and source ~ book*")] == sorted(
        [name_of(1000), name_of(1500)]
    )
    third = [e.name for e in many.ls("n/3/*", limit=5)]
    assert third == [name for name in wanted if name.startswith("n/3/")][:5]


def test_a_put_costs_the_same(few, many, monkeypatch):
    def put(store, name):
        store.put(small(hash(name) % 1000 + 5000, **TINY), f"new/{name}")

    small_cost, big_cost = both(few, many, monkeypatch, put)
    assert len(big_cost.queries) == len(small_cost.queries)
    assert abs(big_cost.steps - small_cost.steps) <= 5
    assert big_cost.read <= small_cost.read + 64 < 4000


READS = {
    "get": lambda store, name: store.get(_first(store)),
    "show": lambda store, name: store.show(_first(store)),
    "log": lambda store, name: store.log(_first(store)),
    "digest": lambda store, name: store.show(_digest(store)),
    "prefix": lambda store, name: store.show(_digest(store)[:20]),
    "page": lambda store, name: store.ls(limit=10),
    "later page": lambda store, name: store.ls(limit=10, after=_first(store)),
    "exists": lambda store, name: _first(store) in store,
}


def _first(store):
    return name_of(1234) if store.path.name == "s" else "m1"


def _digest(store):
    return small(1234 if store.path.name == "s" else 1, **TINY).digest


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_costs_the_same(few, many, monkeypatch, read):
    small_cost, big_cost = both(few, many, monkeypatch, read)
    assert len(big_cost.queries) == len(small_cost.queries) > 0
    assert abs(big_cost.steps - small_cost.steps) <= 8
    assert big_cost.read == small_cost.read == 0


CHANGES = {
    "annotate": lambda store, name: store.annotate(_first(store), message=name),
    "pin": lambda store, name: store.pin(_first(store)),
    "branch": lambda store, name: store.branch(_first(store), f"b/{name}"),
    "rollback": lambda store, name: store.rollback(_first(store), 0, name),
    "rm": lambda store, name: store.put(small(7, **TINY), "gone") and store.rm("gone"),
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(action, id=name) for name, action in CHANGES.items()],
)
def test_a_change_costs_the_same(few, many, monkeypatch, change):
    small_cost, big_cost = both(few, many, monkeypatch, change)
    assert len(big_cost.queries) == len(small_cost.queries)
    assert abs(big_cost.steps - small_cost.steps) <= 8
    assert big_cost.read < 4000


def test_what_is_not_there_costs_the_same(few, many, monkeypatch):
    small_cost, big_cost = both(few, many, monkeypatch, lambda store, name: "nothing" in store)
    assert abs(big_cost.steps - small_cost.steps) <= 8


def test_descendants_of_a_source_use_an_index(many, monkeypatch):
    with Cost(many, monkeypatch) as cost:
        many.descendants("book500")
    assert not scans(many, cost.queries)


def scans(store, queries):
    connection = sqlite3.connect(store.path / "index.sqlite")
    found = []
    for query in queries:
        if query.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE", "INSERT")):
            for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"):
                tables = ("VIRTUAL TABLE", "CONSTANT ROW", "SCAN applied")
                if row[3].startswith("SCAN") and not any(word in row[3] for word in tables):
                    found.append((row[3], query))
    connection.close()
    return found


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_scan_no_table(many, monkeypatch, read):
    with Cost(many, monkeypatch) as cost:
        read(many, "")
    assert cost.queries and scans(many, cost.queries) == []


def test_the_search_for_scans_finds_one(many):
    assert scans(many, ["SELECT COUNT(*) FROM versions WHERE message = 'x'"])


def test_an_ambiguous_prefix_is_cheap_and_lists_few(many, monkeypatch):
    monkeypatch.setattr("kvedit.store.finder.parse_ref", _short_prefix)
    with pytest.raises(InvalidArgument, match="several digests") as raised:
        many.show("a")
    assert len(str(raised.value)) < 400


def _short_prefix(text):
    from kvedit.store.refs import Ref

    return Ref(text, "", None, text)
