"""SampleSet: what was written is read again, damage is named, splits share no question."""

import dataclasses
import os

import pytest
import torch

from kvedit.cartridges.sample import Sample
from kvedit.cartridges.study import SampleSet, merge, save_samples
from kvedit.cartridges.study import rows as rows_module
from kvedit.cartridges.study.filters import normalised
from kvedit.cartridges.study.shards import Shards
from kvedit.errors import (
    CorruptMemory,
    IncompatibleModel,
    InvalidArgument,
    MissingDependency,
    NotFound,
)

FACTS = {"model": {"weights": "w", "dtype": "float32"}}


def sample(number, question=None, k=4, tokens=5, seed=None):
    draw = torch.Generator().manual_seed(number if seed is None else seed)
    logprobs = torch.randn(tokens, k, generator=draw).log_softmax(-1).sort(descending=True).values
    for row in range(tokens):  # rows keep one token to all, as a cut by mass leaves them
        logprobs[row, 1 + row % k :] = -torch.inf
    ids = torch.randint(1, 2**20, (tokens, k), generator=draw)
    return Sample(
        key=f"key {number}",
        document="döc",
        kind="question",
        question=question or f"Question {number}?",
        answer=f"“{number}”",
        tokens=torch.randint(0, 250_000, (3 + number % 4 + tokens,), generator=draw),
        start=3 + number % 4,
        top_ids=ids.masked_fill(logprobs.isinf(), 0),
        top_logprobs=logprobs,
        tail=torch.cat((torch.randn(tokens - 1, generator=draw), torch.tensor([-torch.inf]))),
    )


def assert_same(a, b):
    for field in dataclasses.fields(Sample):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.fixture
def saved(tmp_path):
    def save(name="set", count=9, **options):
        made = [sample(number, **options) for number in range(count)]
        return made, save_samples(tmp_path / name, made, FACTS)

    return save


def test_samples_come_back_bit_by_bit(saved, monkeypatch):
    from kvedit.cartridges.study import writing

    monkeypatch.setattr(writing, "_PER_SHARD", 4)
    made, found = saved()
    assert len(list(found.folder.glob("*.parquet"))) == 3
    assert len(found) == 9 and found.k == 4
    for a, b in zip(made, found, strict=True):
        assert_same(a, b)
    assert_same(found[-1], made[-1])
    assert [s.key for s in found[2:6]] == ["key 2", "key 3", "key 4", "key 5"]
    assert [s.key for s in found.select([8, 0])[::-1]] == ["key 0", "key 8"]
    assert found.column("question") == [s.question for s in made]
    with pytest.raises(IndexError):
        found[9]
    with pytest.raises(InvalidArgument, match="no column 'questions'"):
        found.column("questions")


def test_nothing_is_read_before_a_sample_is_asked_for(saved, monkeypatch):
    from kvedit.cartridges.study import shards, writing

    monkeypatch.setattr(writing, "_PER_SHARD", 3)
    _, found = saved()
    read = []
    real = shards._read_table
    monkeypatch.setattr(
        shards, "_read_table", lambda shard: read.append(shard.first) or real(shard)
    )
    again = SampleSet(found.folder)
    assert len(again) == 9 and again.select(range(4)) and read == []
    assert again[4].key == "key 4" and again[5].key == "key 5"
    assert read == [3]
    # Tables beyond the budget go, but for the one in use.
    monkeypatch.setattr(shards, "_HELD_BYTES", 1)
    assert [s.key for s in again] == [f"key {i}" for i in range(9)]
    assert read == [3, 0, 3, 6]


def test_the_digest_is_of_what_is_said_not_of_files(saved, monkeypatch):
    from kvedit.cartridges.study import writing

    made, whole = saved("whole")
    monkeypatch.setattr(writing, "_PER_SHARD", 2)
    _, cut = saved("cut")
    assert cut.digest == whole.digest
    moved = made[4].top_logprobs.clone()
    moved[2, 0] = torch.nextafter(moved[2, 0], torch.tensor(0.0))
    changed = [*made[:4], dataclasses.replace(made[4], top_logprobs=moved), *made[5:]]
    assert save_samples(whole.folder.parent / "x", changed, FACTS).digest != whole.digest
    assert whole[::-1].digest != whole.digest


def test_splits_share_no_question_and_lose_no_sample(tmp_path):
    questions = ["Which one?", "which  ONE", "How much?", "Where?", "Who?", "When?", "Why?"]
    made = [sample(i, questions[i % 7]) for i in range(42)]
    found = save_samples(tmp_path / "set", made, FACTS)
    for seed in range(5):
        train, held = found.split(0.2, seed)
        keys = [{s.key for s in part} for part in (train, held)]
        assert keys[0] | keys[1] == {s.key for s in made} and not keys[0] & keys[1]
        asked = [{normalised(q) for q in part.column("question")} for part in (train, held)]
        assert not asked[0] & asked[1]
        assert 0.2 * 42 <= len(held) < 0.2 * 42 + 12
        assert held.digest == found.split(0.2, seed)[1].digest
    assert len({found.split(0.2, seed)[1].digest for seed in range(5)}) > 1
    train, held = found.split(0.999)
    assert len({normalised(q) for q in train.column("question")}) == 1
    for share in (0, 1, 1.5):
        with pytest.raises(InvalidArgument, match="held_out"):
            found.split(share)
    with pytest.raises(InvalidArgument, match="two different questions"):
        found.select([0, 1, 7]).split(0.5)


def test_merged_sets_have_every_sample_once(saved, tmp_path):
    made, first = saved("a", 6)
    more = [*made[4:], *(sample(number) for number in range(20, 24))]
    second = save_samples(tmp_path / "b", more, FACTS)
    merged = merge([first, second[1:]], tmp_path / "c")
    assert [s.key for s in merged] == [f"key {i}" for i in (*range(6), *range(20, 24))]
    assert_same(merged[7], more[3])
    assert merged.facts["parts"] == [first.digest, second[1:].digest]
    assert merge([merged], tmp_path / "d").digest == merged.digest
    other = save_samples(tmp_path / "e", made, {"model": {"weights": "v", "dtype": "float32"}})
    with pytest.raises(IncompatibleModel, match=r"model\.weights: found 'w', asked for 'v'"):
        merge([first, other], tmp_path / "f")
    wide = save_samples(tmp_path / "g", [sample(50, k=5)], FACTS)
    with pytest.raises(InvalidArgument, match=r"one width, found \[4, 5\]"):
        merge([first, wide[:0], wide], tmp_path / "f")
    with pytest.raises(InvalidArgument, match="at least one set"):
        merge([], tmp_path / "f")
    with pytest.raises(InvalidArgument, match="not empty"):
        merge([first], tmp_path / "b")
    assert not (tmp_path / "f").exists() and not list(tmp_path.glob(".tmp-*"))


def test_saving_refuses_nothing_and_unequal_widths(tmp_path):
    for samples in ([], [sample(0), sample(1, k=3)]):
        with pytest.raises(InvalidArgument, match="one width"):
            save_samples(tmp_path / "set", samples, FACTS)
    assert not (tmp_path / "set").exists()


def test_a_failed_save_leaves_nothing(saved, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        saved()
    assert list(tmp_path.iterdir()) == []


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_every_kind_of_damage_is_named(saved, tmp_path, monkeypatch):
    from kvedit.cartridges.study import writing

    monkeypatch.setattr(writing, "_PER_SHARD", 3)
    _, found = saved()
    files = sorted(found.folder.glob("*.parquet"))
    good = {path: path.read_bytes() for path in files}
    size = len(good[files[1]])

    def restored():
        for path in found.folder.glob("*.parquet"):
            path.unlink()
        for path, data in good.items():
            path.write_bytes(data)

    def read():
        list(SampleSet(found.folder))

    for at in [0, 5, size // 3, size // 2, 2 * size // 3, size - 60, size - 5, size - 1]:
        restored()
        _flip(files[1], at)
        with pytest.raises(CorruptMemory, match=files[1].name[:9]):
            read()
    for data in (good[files[1]][:-7], good[files[1]] + b"x", b"", good[files[2]]):
        restored()
        files[1].write_bytes(data)
        with pytest.raises(CorruptMemory, match=files[1].name[:9]):
            read()
    restored()
    files[1].unlink()
    with pytest.raises(CorruptMemory, match="expected a shard that begins with attempt 3"):
        read()
    restored()
    (found.folder / "extra.parquet").write_bytes(good[files[0]])
    with pytest.raises(CorruptMemory, match="no shard of a set"):
        read()
    restored()
    files[2].rename(files[2].with_name(files[2].name.replace("000000009-", "000000012-")))
    with pytest.raises(CorruptMemory, match="was renamed"):
        read()
    restored()
    read()


def test_shards_of_another_set_are_refused(saved, tmp_path):
    _, first = saved("a", 3)
    other = save_samples(tmp_path / "b", [sample(i) for i in range(3)], {"model": "other"})
    for path in first.folder.glob("*.parquet"):
        path.unlink()
    for path in other.folder.glob("*.parquet"):
        path.rename(first.folder / path.name)
    with pytest.raises(CorruptMemory, match="belongs to another set"):
        SampleSet(first.folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "other"}', '{"format": "kvedit-study", "version": 2}',
             '{"format": "kvedit-study", "version": 1, "k": 0, "facts": {}}'],
)  # fmt: skip
def test_a_bad_manifest_is_named(saved, text):
    _, found = saved()
    (found.folder / "study.json").write_text(text)
    with pytest.raises(CorruptMemory, match=r"study\.json"):
        SampleSet(found.folder)


def test_no_set_at_all(tmp_path):
    with pytest.raises(NotFound, match="holds no set of samples"):
        SampleSet(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgument, match="not empty"):
        save_samples(tmp_path / "file", [sample(0)], FACTS)


def test_without_pyarrow_the_extra_is_named(saved, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"kvedit\[study\]"):
        rows_module.pyarrow()
    with pytest.raises(MissingDependency):
        saved()


def test_a_shard_that_covers_only_dropped_attempts_holds_its_counts(tmp_path):
    from kvedit.cartridges.study.shards import write_shard
    from kvedit.cartridges.study.writing import open_shards

    with open_shards(tmp_path / "set", FACTS, 4) as shards:
        write_shard(shards, 5, [], {"answer cut": 5})
        write_shard(shards, 7, [rows_module.Row(sample(1), "0:9", 6)], {"answer cut": 1})
    found = SampleSet(tmp_path / "set")
    assert (len(found), found.attempts, dict(found.dropped)) == (1, 7, {"answer cut": 6})
    assert found.row(0).attempt == 6 and found.row(0).chunk == "0:9"
    assert Shards(tmp_path / "set").attempts == 7
