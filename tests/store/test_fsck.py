"""fsck finds what is damaged, says what is lost, and brings back what can be had again."""

import json
import os
import shutil
import sqlite3
from itertools import pairwise

import pytest

from kvedit.editors import Drop, Emphasize
from kvedit.editors.replaying import rebuild
from kvedit.errors import CorruptMemory
from kvedit.store import Store
from kvedit.store.pack import Pack

from .conftest import assert_same, build_memory, every_byte, files, flip, with_bias

SPAN = {"tokens": (3, 20)}


def memories():
    """What is put, name by name; "other" shares no block with the rest."""
    base = build_memory(1, layers=2, slots=260, dim=4)
    other = build_memory(2, layers=1, slots=7, heads=1, dim=2, source=None)
    return [("m", base), ("m", with_bias(base)), ("a/b", with_bias(base, 1, 2.0)), ("other", other)]


def fill(folder, **options):
    with Store(folder, "process", **options) as store:
        for number, (name, memory) in enumerate(memories()):
            store.put(memory, name, message=f"number {number}", tags=["t"])
        store.put(build_memory(3, layers=1, slots=5, heads=1, dim=2, source=None), "gone")
        store.rm("gone")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("fsck") / "sound")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "s")


@pytest.fixture
def twin(sound, tmp_path):
    with Store(shutil.copytree(sound, tmp_path / "twin"), "process") as opened:
        yield opened


def open_at(folder, **options):
    return Store(folder, "process", **options)


def pack_of(folder, ref="m@{1}"):
    """The pack that a put brought: the one with the manifest."""
    with open_at(folder) as store:
        record = store.show(ref).record.record
        return folder / "packs" / f"{store._shelf.index.manifest_pack(record)}.safetensors"


def extent(path, kind="keys"):
    return next(e for e in Pack.open(path).extents if e.kind == kind and e.size)


def paper(path):
    return next(iter(Pack.open(path).manifests.values()))


def log(folder, change):
    path = folder / "log.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


def sql(folder, *statements):
    connection = sqlite3.connect(folder / "index.sqlite")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def cut_index(folder):
    path = folder / "index.sqlite"
    path.write_bytes(path.read_bytes()[:5000])


def bad_line(line):
    return line[:30] + bytes([line[30] ^ 1]) + line[31:]


def replace(path, data):
    path.unlink()
    if data == "link":
        path.symlink_to("/etc/hostname")
    elif data == "pipe":
        os.mkfifo(path)
    elif data == "folder":
        path.mkdir()
    else:
        path.write_bytes(data)


PACKS = {
    "a block": lambda f: flip(pack_of(f), extent(pack_of(f)).offset),
    "the last block": lambda f: flip(pack_of(f), extent(pack_of(f), "source").offset),
    "a bias": lambda f: flip(pack_of(f, "m"), extent(pack_of(f, "m"), "bias").offset),
    "a manifest": lambda f: flip(pack_of(f), paper(pack_of(f)).offset + 100),
    "a header": lambda f: flip(pack_of(f), 300),
    "a length": lambda f: flip(pack_of(f), 0),
    "a shorter pack": lambda f: replace(pack_of(f), pack_of(f).read_bytes()[:-1]),
    "a longer pack": lambda f: replace(pack_of(f), pack_of(f).read_bytes() + b"x"),
    "an empty pack": lambda f: replace(pack_of(f), b""),
    "a missing pack": lambda f: pack_of(f).unlink(),
    "two missing packs": lambda f: [p.unlink() for p in (pack_of(f), pack_of(f, "a/b"))],
    "a link": lambda f: replace(pack_of(f), "link"),
    "a pipe": lambda f: replace(pack_of(f), "pipe"),
    "a folder": lambda f: replace(pack_of(f), "folder"),
    "another pack": lambda f: replace(pack_of(f), pack_of(f, "other").read_bytes()),
}
LOGS = {
    "a line": lambda f: log(f, lambda x: [x[0], bad_line(x[1]), *x[2:]]),
    "the first line": lambda f: log(f, lambda x: [bad_line(x[0]), *x[1:]]),
    "all lines": lambda f: log(f, lambda x: map(bad_line, x)),
    "a lost line": lambda f: log(f, lambda x: [*x[:2], *x[3:]]),
    "a line twice": lambda f: log(f, lambda x: [*x[:2], x[1], *x[2:]]),
    "another order": lambda f: log(f, lambda x: x[::-1]),
    "the end": lambda f: log(f, lambda x: x[:2]),
    "half of a line": lambda f: log(f, lambda x: [*x[:3], x[3][:50]]),
    "no log": lambda f: (f / "log.jsonl").unlink(),
    "an empty log": lambda f: (f / "log.jsonl").write_bytes(b""),
}
INDEXES = {
    "a name": lambda f: sql(f, "UPDATE versions SET message = 'x' WHERE name = 'other'"),
    "a record": lambda f: sql(f, "UPDATE versions SET record = content"),
    "a head": lambda f: sql(f, "UPDATE names SET head = 1"),
    "a place": lambda f: sql(f, "UPDATE blocks SET pack = 1"),
    "no places": lambda f: sql(f, "DELETE FROM blocks", "DELETE FROM manifests"),
    "no packs": lambda f: sql(f, "DELETE FROM packs"),
    "a step": lambda f: sql(f, "DELETE FROM nodes"),
    "a removed name": lambda f: sql(
        f, "INSERT INTO names (name, head, last, versions) VALUES ('gone', 1, 1, 1)"
    ),
}
UNREADABLE = {"a cut index": cut_index, "no index": lambda f: (f / "index.sqlite").unlink()}
DAMAGE = {**PACKS, **LOGS, **INDEXES}


def assert_whole(folder, **options):
    with open_at(folder, **options) as store:
        assert store.names() == ["a/b", "m", "other"]
        kept = dict(memories()[1:])
        for name, memory in kept.items():
            assert_same(store.get(name), memory)
        assert_same(store.get("m@{1}"), memories()[0][1])
        assert [r.message for r in store.log("m")] == ["number 1", "number 0"]
        assert [r.version for r in store.log("m")] == [2, 1]
        assert store.log("other")[0].tags == ("t",)
        health = store.fsck()
        assert health.ok and not health.problems, health
        assert health.memories == 4
        store.gc(waste=0.0)
        assert store.fsck().ok
        store.rebuild_index()
        for name, memory in kept.items():
            assert_same(store.get(name), memory)


def test_a_sound_store_has_no_problems(folder):
    before = every_byte(folder / "packs")
    for repair in (False, True):
        with open_at(folder) as store:
            health = store.fsck(repair=repair)
            assert health.ok and health.problems == () and health.lost == ()
            assert (health.packs, health.memories) == (5, 4)
            assert health.bytes == sum(map(len, before.values()))
    assert every_byte(folder / "packs") == before


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_found_and_repaired(folder, twin, damage):
    damage(folder)
    before = {path: data for path, data in every_byte(folder).items() if "index" not in path.name}
    with open_at(folder) as store:
        health = store.fsck()
        assert health.problems
        assert not health.ok
    after = {path: data for path, data in every_byte(folder).items() if "index" not in path.name}
    assert after == before  # looking changes nothing
    with open_at(folder) as store:
        health = store.fsck(repair=True, sources=[twin])
        assert health.problems
        assert health.ok, health
        assert all(problem.repaired for problem in health.problems)
        again = store.fsck(repair=True)
        assert again.ok and not again.problems, again
    assert_whole(folder)


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_an_index_that_can_not_be_read_makes_itself_again(folder, damage):
    with open_at(folder) as store:
        store.names()
        store.close()  # a store that stays open has it by heart
        damage(folder)
        for path in folder.glob("index.sqlite-*"):
            path.unlink()
        assert store.fsck().ok
    assert_whole(folder)


@pytest.mark.parametrize("damage", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("index", ["index", "no index"])
def test_repaired_from_below(sound, tmp_path, damage, index):
    remote = f"file://{tmp_path}/remote"
    folder = fill(tmp_path / "s", remote=remote)
    with open_at(folder, remote=remote) as store:
        store.push()
    damage(folder)
    if index == "no index":
        for path in folder.glob("index.sqlite*"):
            path.unlink()
    with open_at(folder, remote=remote) as store:
        health = store.fsck(repair=True)
        assert health.ok, health
        assert store.fsck().ok
    with open_at(folder) as store:  # without the remote: the bytes are here, or known to be there
        for name, memory in memories()[1:]:
            held = folder / "packs"
            if all((held / f"{pack}.safetensors").exists() for pack in store.show(name).packs):
                assert_same(store.get(name), memory)
    with open_at(folder, remote=remote) as store:
        for name, memory in memories()[1:]:
            assert_same(store.get(name), memory)


def test_lost_versions_are_named(folder):
    """One block of the bias of one version: the others stay readable, before and after."""
    path = pack_of(folder, "m")
    flip(path, extent(path, "bias").offset)
    with open_at(folder) as store:
        for repair in (False, True, True, False):
            health = store.fsck(repair=repair)
            assert health.lost == ("m v2",)
            assert not health.ok
            assert health.memories == 3
            with pytest.raises(CorruptMemory):
                store.get("m")
            assert_same(store.get("m@{1}"), memories()[0][1])
            assert_same(store.get("a/b"), memories()[2][1])
        with pytest.raises(CorruptMemory):
            store.gc()  # what a lost manifest or block needed is not guessed at
            store.get("m")
        store.rm("m")
        store.gc(waste=0.0)
        assert store.fsck().ok
        assert_same(store.get("a/b"), memories()[2][1])


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("place", ["keys", "manifest", "header"])
def test_what_shares_a_damaged_pack(tmp_path, place, read_before):
    pair = {"a": build_memory(1, slots=300), "b": build_memory(2, slots=290, source=None)}
    with Store(tmp_path / "s", "process") as store:
        store.put_many(pair)
        if read_before:  # what the store has in its head is not what is on the disk
            for name, memory in pair.items():
                assert_same(store.get(name), memory)
        path = pack_of(store.path, "a")
        digests = {digest for block in [pair["a"].cut()] for digest in (b.digest for b in block)}
        pack = Pack.open(path)
        offset = {
            "keys": next(e for e in pack.extents if e.kind == "keys" and e.blocks[0] in digests),
            "manifest": pack.manifests[store.log("a")[0].record],
        }
        flip(path, 200 if place == "header" else offset[place].offset)
        broken = path.read_bytes()
        lost = ("a v1", "b v1") if place == "header" else ("a v1",)
        assert store.fsck().lost == lost
        assert store.fsck(repair=True).lost == lost
        assert (store.path / "quarantine" / path.name).read_bytes() == broken
        assert not path.exists()
    with Store(store.path, "process") as again:
        with pytest.raises(CorruptMemory):
            again.get("a")
        if place != "header":
            assert_same(again.get("b"), pair["b"])
        again.put(pair["a"], "a", force=True)  # the same again is what heals
        again.put(pair["a"], "c")
        assert_same(again.get("c"), pair["a"])
        assert_same(again.get("a"), pair["a"])


def test_a_source_with_other_bytes_brings_nothing(folder, tmp_path):
    path = pack_of(folder, "other")
    flip(path, extent(path).offset)
    with Store(tmp_path / "liar", "process") as liar, open_at(folder) as store:
        liar.put(build_memory(9, layers=1, slots=7, heads=1, dim=2, source=None), "other")
        assert store.fsck(repair=True, sources=[liar]).lost == ("other v1",)


def test_a_damaged_source_brings_nothing(folder, twin):
    for where in (folder, twin.path):
        path = pack_of(where, "other")
        flip(path, extent(path).offset)
    with open_at(folder) as store:
        assert store.fsck(repair=True, sources=[twin]).lost == ("other v1",)


@pytest.mark.parametrize("editor", [Emphasize(span=SPAN, strength=1.5), Drop(SPAN)])
def test_repaired_by_replay(tmp_path, editor):
    base = build_memory(1, layers=2, slots=300)
    edited = editor(base)
    with Store(tmp_path / "s", "process", replay=rebuild) as store:
        store.put(base, "base")
        store.put(edited, "edit")
        path = pack_of(store.path, "edit")
        flip(path, next(e for e in Pack.open(path).extents if e.size).offset)
        assert store.fsck().lost == ("edit v1",)
        health = store.fsck(repair=True)
        assert health.ok, health
    with Store(tmp_path / "s", "process") as again:
        assert_same(again.get("edit"), edited)
        assert again.fsck().ok


def test_a_step_of_the_middle_is_replayed_too(tmp_path):
    base = build_memory(1, layers=2, slots=300)
    edited = Emphasize(span=SPAN, strength=1.5)(Drop({"tokens": (30, 40)})(base))
    with Store(tmp_path / "s", "process", replay=rebuild) as store:
        store.put(base, "base")
        store.put(edited, "edit")
        path = pack_of(store.path, "edit")
        flip(path, extent(path, "bias").offset)
        assert store.fsck(repair=True).ok
        assert_same(store.get("edit"), edited)


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_a_log_comes_back_from_the_index(folder, damage):
    damage(folder)
    with open_at(folder) as store:
        assert_same(store.get("m"), memories()[1][1])  # reading goes on
        health = store.fsck(repair=True)
        assert health.ok, health
        assert "gone" not in store.names()
        assert not [name for name in store.names() if name.startswith("recovered/")]
    assert_whole(folder)
    if damage is not LOGS["no log"] and damage is not LOGS["an empty log"]:
        assert list((folder / "quarantine").glob("log-*.jsonl"))


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_a_log_comes_back_from_the_packs(folder, damage):
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    damage(folder)
    with open_at(folder) as store:
        whole = damage in (LOGS["the end"], LOGS["half of a line"], LOGS["an empty log"])
        health = store.fsck(repair=True)
        assert health.ok, health
        assert store.fsck().ok
        if whole:  # a log that ends early is a log; what it does not name shows as stray packs
            assert any("nothing names" in str(problem) for problem in health.problems)
            return
        contents = {r.content for name in store.names() for r in store.log(name)}
        assert contents >= {memory.digest for _, memory in memories()}
        for name in store.names():
            for record in store.log(name):
                assert store.get(record.record).digest == record.content
        if damage is LOGS["all lines"]:
            assert all(name.startswith("recovered/") for name in store.names())
            assert {r.message for n in store.names() for r in store.log(n)} == {
                "its line in the log was lost"
            }
        store.put(memories()[0][1], "new")
        store.gc(waste=0.0)
        assert store.fsck().ok
    with open_at(folder) as again:
        assert_same(again.get("new"), memories()[0][1])


def test_lines_that_the_index_has_not_seen_stay(folder):
    index = (folder / "index.sqlite").read_bytes()
    fresh = build_memory(8, layers=1, slots=4)
    with open_at(folder) as store:
        store.put(fresh, "late")
        names = store.names()
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    (folder / "index.sqlite").write_bytes(index)
    log(folder, lambda lines: [lines[0], bad_line(lines[1]), *lines[2:]])
    with open_at(folder) as store:
        assert store.fsck(repair=True).ok
        assert store.names() == names
        assert_same(store.get("late"), fresh)
        assert_same(store.get("m"), memories()[1][1])


def test_pins_tags_and_labels_come_back(tmp_path):
    with Store(tmp_path / "s", "process") as store:
        base = build_memory(1, layers=1, slots=4)
        store.put(base, "a", tags=["x"], source="s", licence="l", metrics={"kl": 0.5}, ttl=1e6)
        store.put(build_memory(2, layers=1, slots=4), "b")
        store.pin("b")
        before = (store.log("a"), store.log("b"), list(store.ls()))
    log(tmp_path / "s", lambda lines: map(bad_line, lines))
    with Store(tmp_path / "s", "process") as store:
        assert store.fsck(repair=True).ok
        assert (store.log("a"), store.log("b"), list(store.ls())) == before
        store.rebuild_index()
        assert (store.log("a"), store.log("b"), list(store.ls())) == before


def test_what_was_pushed_is_still_known_to_be(tmp_path):
    remote = f"file://{tmp_path}/remote"
    folder = fill(tmp_path / "s", remote=remote)
    with open_at(folder, remote=remote) as store:
        store.push()
    log(folder, lambda lines: map(bad_line, lines))
    with open_at(folder, remote=remote) as store:
        assert store.fsck(repair=True).ok
        assert store._shelf.index.unpushed() == []
        store.evict("1GiB")
        assert not files(store, "packs/*")
        assert store.fsck().ok
        assert_same(store.get("m"), memories()[1][1])


def test_a_damaged_log_and_a_missing_index_are_told(folder):
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    log(folder, lambda lines: map(bad_line, lines))
    with open_at(folder) as store:
        health = store.fsck()
        assert not health.ok
        assert "log.jsonl" in str(health)


def test_strays_are_told_and_go(folder):
    stray = folder / "packs" / f"{'0' * 64}.safetensors"
    stray.write_bytes(b"x" * 100)
    with open_at(folder) as store:
        health = store.fsck()
        assert health.ok
        assert str(stray) in str(health)
        store.gc()
        assert not stray.exists()
        assert store.fsck().problems == ()


class Dying:
    """os.replace, until it is interrupted."""

    def __init__(self, steps):
        self.steps = steps
        self.replace = os.replace

    def __call__(self, *args, **kwargs):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt
        return self.replace(*args, **kwargs)


def test_a_repair_that_is_cut_off_goes_on(folder, twin, monkeypatch):
    """Wherever it dies, the next repair ends well."""
    path = pack_of(folder)
    flip(path, extent(path).offset)
    for step in range(1, 12):
        copy = shutil.copytree(folder, folder.with_name(f"copy{step}"))
        dying = Dying(step)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                with open_at(copy) as store:
                    store.fsck(repair=True, sources=[twin])
            except KeyboardInterrupt:
                pass
        with open_at(copy) as store:
            assert store.fsck(repair=True, sources=[twin]).ok
        assert_whole(copy)
        if dying.steps > 0:
            return
    pytest.fail("the repair replaces more files than expected")


def test_json_of_the_log_after_a_repair(folder):
    log(folder, lambda lines: [bad_line(lines[0]), *lines[1:]])
    with open_at(folder) as store:
        store.fsck(repair=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(a["checksum"] == b["previous"] for a, b in pairwise(lines))
