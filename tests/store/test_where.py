"""Where: SQL and Python mean the same, and no text does anything else than search."""

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvedit.errors import InvalidArgument
from kvedit.store.where import parse_where

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
TEXTS = ["name", "message", "model", "dtype", "record", "content", "source", "licence"]
NUMBERS = ["bytes", "slots", "tokens", "layers", "version", "versions"]
COLUMNS = [*TEXTS, *NUMBERS, "created", "tags", "metrics", "pinned"]
ORDER = ["=", "!=", "<", "<=", ">", ">="]


def entry(**fields):
    given = dict.fromkeys(TEXTS, "x") | dict.fromkeys(NUMBERS, 1)
    given |= {"created": NOW, "tags": (), "metrics": {}, "pinned": False}
    return SimpleNamespace(**given | fields)


def listed(where, entries):
    """What SQLite answers."""
    rows = []
    for number, item in enumerate(entries):
        row = vars(item) | {"created": item.created.isoformat(), "pinned": int(item.pinned)}
        row |= {"tags": json.dumps(item.tags), "metrics": json.dumps(item.metrics)}
        rows.append([number, *(row[name] for name in COLUMNS)])
    sql, values = where.sql()
    with closing(sqlite3.connect(":memory:")) as connection:
        kinds = dict.fromkeys([*NUMBERS, "pinned"], "INTEGER")
        columns = ", ".join(f"{name} {kinds.get(name, 'TEXT')}" for name in COLUMNS)
        connection.execute(f"CREATE TABLE rows (number INTEGER, {columns})")
        marks = ", ".join("?" * (len(COLUMNS) + 1))
        connection.executemany(f"INSERT INTO rows VALUES ({marks})", rows)
        query = f"SELECT number, {sql} FROM rows AS v ORDER BY number"
        found = connection.execute(query, values).fetchall()
        assert {value for _, value in found} <= {0, 1}  # never NULL: `not` would lose rows
        return [number for number, value in found if value]


def matched(text, *entries):
    where = parse_where(text, NOW)
    found = [number for number, item in enumerate(entries) if where.matches(item)]
    assert listed(where, entries) == found, text
    return found


# Few letters, so that things meet; and what is special to SQL, globs and quoting.
words = st.text("aAbBé-%_*?[]^!'\"\\(), \ud7ff\U0001f600", max_size=6)
amounts = st.integers(-3, 5) | st.sampled_from([1024, 2**20, 2**62])
floats = st.sampled_from([0, 1, -1, 0.5, 1.5, 1e-9, 1e300])
keys = st.sampled_from(["recall", "a.b", 'q"uote', "é", "$", "x y", "[0]"])
# Whole seconds are written without a fraction: the text of two times then differs in length.
moments = st.builds(
    lambda days, micros: NOW + timedelta(days=days, microseconds=micros),
    st.integers(-10, 1),
    st.sampled_from([0, 1, 100_000, 43_200_000_000]),
)
entries = st.builds(
    entry,
    **dict.fromkeys(TEXTS[:-2], words),
    **dict.fromkeys(TEXTS[-2:], st.none() | words),
    **dict.fromkeys(NUMBERS, amounts),
    created=moments,
    tags=st.lists(words, max_size=3).map(tuple),
    metrics=st.dictionaries(keys, floats, max_size=2),
    pinned=st.booleans(),
)


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


def written(moment):
    zone = timezone(timedelta(hours=2))
    return st.sampled_from(
        [moment.date().isoformat(), moment.isoformat(), moment.astimezone(zone).isoformat()]
    )


def joined(fields, ops, values):
    return st.tuples(fields, st.sampled_from(ops), values).map(" ".join)


conditions = st.one_of(
    joined(st.sampled_from(TEXTS), [*ORDER, "~"], words.map(quoted)),
    joined(st.just("tag"), ["=", "!=", "~"], words.map(quoted)),
    joined(st.sampled_from(NUMBERS), ORDER, amounts.map(str) | floats.map(str)),
    joined(st.just("bytes"), ORDER, st.sampled_from(["1KiB", "1mib", "0.5GiB", "-1e-1TiB"])),
    joined(keys.map(lambda key: quoted(f"metric.{key}")), ORDER, floats.map(str)),
    joined(st.just("created"), ORDER, moments.flatmap(written)),
    joined(st.just("age"), ORDER[2:], st.sampled_from(["0s", "90m", "1.5d", "1w", "-1d", "36h"])),
    joined(st.just("pinned"), ["=", "!="], st.sampled_from(["true", "False", "1", "no"])),
)
searches = st.recursive(
    conditions,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or ", " AND "]), inner).map("".join),
        inner.map(lambda text: f"not {text}"),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(searches, st.lists(entries, min_size=1, max_size=4))
def test_sql_and_python_agree(text, items):
    matched(text, *items)


@settings(max_examples=300, deadline=None)
@given(st.text("aAb[]^!-*?é", max_size=8), st.text("aAb[]^!-é", max_size=5))
@example("[]-a]", "^")
@example("[^]x]", "a")
@example("[^]", "^")
@example("[!^]", "^")
@example("[z-a]", "z")
@example("[Z-a]", "b")
@example("[--a]", "^")
def test_globs_agree(pattern, name):
    matched(f"name ~ {quoted(pattern)}", entry(name=name))


@settings(max_examples=200, deadline=None)
@given(st.text("ab/[]!*?", max_size=8), st.text("ab/", max_size=6))
def test_a_word_is_a_glob_on_names(pattern, name):
    if pattern:
        assert matched(pattern, entry(name=name)) == [0] * fnmatchcase(name, pattern)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30) | st.text("nametag =<>!~'\"()and or not\0", max_size=30))
def test_any_text_is_a_search_or_refused(text):
    try:
        where = parse_where(text)
    except InvalidArgument:
        return
    listed(where, [entry()])


def test_meaning():
    a = entry(name="hand/a", tags=("red", "blue"), bytes=2**20, metrics={"kl": 0.1})
    b = entry(name="hand/b", licence=None, pinned=True, created=NOW - timedelta(days=9))
    cases = {
        "hand/*": [0, 1],
        "HAND/?": [0, 1],
        "name = hand/a": [0],
        "name = Hand/a": [],
        "tag = red": [0],
        "tag != red": [1],
        "tag ~ b*": [0],
        "bytes >= 1MiB": [0],
        "metric.kl < 0.5": [0],
        "metric.kl != 0.5": [0],  # b has none
        "not metric.kl = 0.5": [0, 1],
        "licence != mit": [0],
        "pinned = true": [1],
        "age < 7d": [0],
        "age > 1w and pinned = yes": [1],
        "tag = red or name = hand/b and version = 2": [0],
        "(tag = red or name = hand/b) and version = 2": [],
        "not tag = red and version = 1": [1],
        """name ~ "hand/*" and message='x'""": [0, 1],
    }
    assert {text: matched(text, a, b) for text in cases} == cases


def test_dates():
    noon = entry(created=datetime(2026, 3, 1, 12, tzinfo=UTC))
    late = entry(created=datetime(2026, 3, 1, 23, 59, 59, 999999, tzinfo=UTC))
    next_day = entry(created=datetime(2026, 3, 2, tzinfo=UTC))
    rows = (noon, late, next_day)
    assert matched("created = 2026-03-01", *rows) == [0, 1]
    assert matched("created != 2026-03-01", *rows) == [2]
    assert matched("created > 2026-03-01", *rows) == [2]
    assert matched("created <= 2026-03-01", *rows) == [0, 1]
    assert matched("created = 2026-03-01T12:00", *rows) == [0]
    assert matched("created <= 2026-03-01T14:00+02:00", *rows) == [0]
    assert matched("created > '2026-03-01 23:59:59.999'", *rows) == [1, 2]
    for text in ("created > 7d", "created = 2026-02-30", "created < 0001-01-01T00:00+02:00"):
        with pytest.raises(InvalidArgument, match=r"age < 7d\)"):
            parse_where(text)
    for text in ("age < 99999999w", "age > 1e300s"):
        with pytest.raises(InvalidArgument, match=r"calendar|2\^63"):
            parse_where(text)


@pytest.mark.parametrize(
    "value",
    [
        "x' OR 1=1 --",
        '"; DROP TABLE rows; --',
        "%",
        "_",
        "*) OR (1",
        "?",
        "[",
        "$.a",
        "\\",
        "v.name",
    ],
)
def test_values_stay_values(value):
    other, same = entry(name="other", message="other"), entry(message=value, tags=(value,))
    same.metrics = {value: 1}
    assert matched(f"message = {quoted(value)}", other, same) == [1]
    assert matched(f"tag = {quoted(value)}", other, same) == [1]
    assert matched(f"{quoted('metric.' + value)} = 1", other, same) == [1]


def test_the_expression_is_made_of_constants():
    texts = ["{} ~ {}", "{} = {} and tag != {}", "not {} ~ {}"]
    for text in texts:
        sql = {parse_where(text.format("name", *map(quoted, (v, v)))).sql()[0] for v in ("?'", "a")}
        assert len(sql) == 1
    assert parse_where("'metric.a' = 1").sql()[0] == parse_where("'metric.\"' = 2").sql()[0]


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("", 1, "a condition"),
        ("name = x and", 13, "a condition"),
        ("nme = x", 1, r"a field \(name"),
        ("tag = x and license = mit", 13, r"\(licence"),
        ("v.name = x", 1, "a field"),
        ("metric. = 1", 1, "a field"),
        ("name x", 6, "an operator for name, = != < <= > >= ~"),
        ("bytes ~ 1*", 7, "an operator for bytes"),
        ("age = 7d", 5, "an operator for age"),
        ("name == x", 7, "a value"),
        ("bytes > 1MB", 9, "KiB MiB GiB TiB"),
        ("slots > 1KiB", 9, "a number;"),
        ("slots = 9223372036854775808", 9, r"2\^63"),
        ("slots = 1e999", 9, r"2\^63"),
        ("slots = ٣", 9, "a number"),
        ("pinned = maybe", 10, "true or false"),
        ("name = 'x", 8, "a closing quote"),
        ("(name = x", 10, r"'and', 'or' or '\)'"),
        ("name = x)", 9, "the end"),
        ("name = a b", 10, "the end"),
        ("name = '\0'", 9, "without NUL"),
        ("name = '\ud800'", 9, "valid Unicode"),
    ],
)
def test_refused_with_place_and_example(text, at, expected):
    with pytest.raises(InvalidArgument, match=rf"expected.*{expected}.*") as caught:
        parse_where(text)
    assert f"at character {at}" in str(caught.value) and "Example: " in str(caught.value)


def test_bounds():
    assert matched("(" * 32 + "name = x" + ")" * 32, entry()) == [0]
    assert matched("not " * 32 + "name = x", entry()) == [0]
    for text in ("(" * 3000, "not " * 900 + "name = x", "(" * 33 + "name = x" + ")" * 33):
        with pytest.raises(InvalidArgument, match="at most 32"):
            parse_where(text)
    for text in ("x" * 4001, "name = x or " * 10**5, 7):
        with pytest.raises(InvalidArgument, match=r"^where"):
            parse_where(text)


@pytest.mark.parametrize("word", ["and", "or"])
@pytest.mark.parametrize("piece", ["age<1d", "tag=''", "'metric.a'>0"])
def test_the_longest_search_runs(word, piece):
    many = f" {word} ".join([piece] * (4000 // (len(piece) + len(word) + 2)))
    matched(many, entry())


def test_no_pattern_takes_for_ever():
    # With backtracking this would be 40 nested loops over 2000 characters.
    assert matched("message ~ '" + "a*" * 40 + "b'", entry(message="a" * 2000)) == []
    matched("message ~ '" + "[" * 3000 + "'", entry(message="[" * 3000))


def test_what_an_entry_lacks_fulfils_nothing():
    bare = SimpleNamespace(name="x", tags=())
    fields = [*TEXTS[1:], *NUMBERS, "pinned", "metric.a"]
    assert not any(parse_where(f"{f} = 1").matches(bare) for f in fields)
    assert not any(parse_where(f"{f} != 1").matches(bare) for f in fields)
    assert not parse_where("age < 7d").matches(bare)
    assert not parse_where("metric.a != 1").matches(entry(metrics={"a": True}))
