"""What somebody else wrote is refused with an error of ours; it runs no code, it takes no RAM.

Each attack is read in every way there is: as a store, as an exported file, from a remote store.
"""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, KVEditError
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store import Store
from kvedit.store.carry import open_file
from kvedit.store.codecs import encode
from kvedit.store.pack import KEY, Pack, read_head
from kvedit.store.packing import Piece, checksum, finish, paper_piece
from kvedit.store.repack import copy_blocks
from kvedit.store.salvage import chain
from kvedit.store.sealed import open_buffer

from .conftest import assert_same, build_memory, every_byte

MORE = 3 << 29  # bytes of address space that an attack may cost; each asks for far more
SECONDS = 30
SMALL = {"layers": 1, "slots": 6, "heads": 2, "dim": 4}


@pytest.fixture(autouse=True)
def limits():
    """An attack that takes RAM or time ends in an error that is not ours, and so in a failure."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE, before[1]))
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def world(tmp_path):
    """A place with a file outside of all stores; nothing in it may change."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_bytes(b"precious")
    modules = set(sys.modules)
    yield tmp_path
    assert every_byte(outside) == {outside / "precious.txt": b"precious"}
    assert not (tmp_path / "pwned").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "s", "f", "remote", "t"}
    fresh = {name.split(".")[0] for name in set(sys.modules) - modules}
    assert fresh <= {"kvedit", "zstandard", "obstore", "backports", "_cffi_backend"}, fresh


def fill(folder):
    with Store(folder, "process") as store:
        store.put(build_memory(1, **SMALL), "m", message="the memory")
        store.put(build_memory(2, layers=1, slots=3, heads=1, dim=2, source=None), "other")
    return folder


def refused(action):
    """Whatever is read: an error of ours, or nothing bad."""
    with contextlib.suppress(KVEditError):
        return action()
    return None


def parts(data):
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    return header, json.loads(header["__metadata__"][KEY]), bytearray(data[size:])


def joined(header, facts, payload):
    if isinstance(header, dict) and facts is not None:
        header["__metadata__"] = {KEY: facts if isinstance(facts, str) else json.dumps(facts)}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + bytes(payload)


def plant(folder, data, name="m"):
    """Puts a pack in the place of that of a name, log and all, and forgets the index."""
    with Store(folder, "process") as store:
        old = store._shelf.index.manifest_pack(store.log(name)[0].record)
    size = min(8 + int.from_bytes(data[:8], "little"), len(data))
    new = digest_bytes(data[:size])
    (folder / "packs" / f"{old}.safetensors").unlink()
    (folder / "packs" / f"{new}.safetensors").write_bytes(data)
    log = folder / "log.jsonl"
    lines = log.read_bytes().replace(old.encode(), new.encode()).splitlines()
    log.write_bytes(chain(map(json.loads, lines)))
    forget(folder)
    return new


def forget(folder):
    for path in folder.glob("index.sqlite*"):
        path.unlink()


def use(folder, **options):
    """Everything that reads a store; what it gives is checked by its digest inside."""
    with Store(folder, "process", **options) as store:
        for name in ("m", "other"):
            for verify in ("full", "fast", "off"):
                refused(lambda name=name, verify=verify: store.get(name, verify=verify))
            refused(lambda name=name: store.peek(name, slots=(0, 2)))
            refused(lambda name=name: store.show(name))
        for verb in (store.ls, store.names, store.du, store.fsck, store.gc, store.stats):
            refused(verb)
        refused(lambda: store.fsck(repair=True))
        refused(lambda: store.put(build_memory(5, layers=1, slots=2), "new"))


HARMLESS = ("another kind", "a kind of other axes")
"""They say wrong things of right bytes, which come out as they were put."""


def all_ways(world, data):
    """Reads a hostile pack as a store, a file, and what a remote store sends."""
    folder = fill(world / "s")
    new = plant(folder, data)
    (world / "f").write_bytes(data)
    for verify in ("full", "fast"):
        with Store(folder, "process") as store:
            with pytest.raises(KVEditError):
                store.get("m", verify=verify)
            assert store.get("other").slots == 3
    with pytest.raises(KVEditError):
        open_file(world / "f", None, None)
    with contextlib.suppress(KVEditError):
        held = open_buffer(data, "a remote pack")
        assert held.pack.digest == new
    use(folder)


def first(header):
    return next(name for name, place in header.items() if place["dtype"] == "F32")


def paper_name(facts):
    return next(iter(facts["manifests"]))


def header(change):
    """An attack on an entry of the header."""

    def attack(h, f, p):
        h[first(h)] |= change
        return h, f, p

    return attack


def paper(change):
    """An attack on the entry of the manifest, which is no extent."""

    def attack(h, f, p):
        h[paper_name(f)] |= change
        return h, f, p

    return attack


def extent(change):
    """An attack on what the header says of an extent."""

    def attack(h, f, p):
        f["extents"][first(h)] |= change
        return h, f, p

    return attack


def facts(**change):
    return lambda h, f, p: (h, {**f, **change}, p)


def blocks(*names):
    return extent({"blocks": list(names)})


def bomb(encoding, stored, shape, kind="keys"):
    """An attack with a block that says it is far larger than its bytes."""

    def attack(h, f, p):
        name = first(h)
        start, stop = h[name]["data_offsets"]
        assert len(stored) <= stop - start
        p[start:stop] = stored.ljust(stop - start, b"\0")
        h[name] |= {"dtype": "U8", "shape": [stop - start]}
        f["extents"][name] |= {
            "encoding": encoding,
            "dtype": "float32",
            "shape": shape,
            "kind": kind,
            "checksum": checksum([p[start:stop]]),
        }
        return h, f, p

    return attack


DEEP = b"[" * 200_000
ZSTD = b"\x1c\0\0\0\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\1\0\0\0" * 5
ATTACKS = {
    "a shape of texts": header({"shape": ["a", 3_000_000_000]}),
    "a shape of lists": header({"shape": [[1], 2_000_000_000]}),
    "a shape of many axes": header({"shape": [3] * 200_000}),
    "a shape of long numbers": header({"shape": [10**4000] * 3000}),
    "a shape of pebibytes": header({"shape": [1 << 20, 1 << 20, 1 << 12]}),
    "a negative shape": header({"shape": [-2, -6, 4]}),
    "a shape of floats": header({"shape": [2.0, 6.0, 4.0]}),
    "a shape of truths": header({"shape": [True, 48]}),
    "no shape": header({"shape": None}),
    "an object for a shape": header({"shape": {"a": 1}}),
    "offsets that are negative": header({"data_offsets": [-192, 0]}),
    "offsets of floats": header({"data_offsets": [0.0, 192.0]}),
    "offsets of texts": header({"data_offsets": ["0", "192"]}),
    "offsets past the end": header({"data_offsets": [0, 1 << 40]}),
    "offsets the wrong way": header({"data_offsets": [192, 0]}),
    "one offset": header({"data_offsets": [0]}),
    "three offsets": header({"data_offsets": [0, 192, 192]}),
    "no offsets": header({"data_offsets": None}),
    "an offset of a manifest in floats": lambda h, f, p: paper(
        {"data_offsets": [float(n) for n in h[paper_name(f)]["data_offsets"]]}
    )(h, f, p),
    "a dtype that is a list": header({"dtype": []}),
    "a dtype of no tensor": header({"dtype": "os.system"}),
    "a dtype of another size": header({"dtype": "F64"}),
    "no dtype": header({"dtype": None}),
    "no extents": facts(extents={}),
    "a list of extents": facts(extents=[]),
    "extents of numbers": facts(extents=dict.fromkeys("0123456789", 1)),
    "a format of the future": facts(format="kvedit.pack.9"),
    "no format": facts(format=None),
    "a cipher that is none": facts(cipher="0" * 16),
    "a cipher that is an object": facts(cipher={"a": 1}),
    "a note that is a list": facts(note=[1]),
    "manifests in a list": facts(manifests=[]),
    "a manifest that is a path": lambda h, f, p: (
        h,
        {**f, "manifests": {paper_name(f): "../../outside/precious"}},
        p,
    ),
    "a manifest that is a number": lambda h, f, p: (h, {**f, "manifests": {paper_name(f): 1}}, p),
    "a block that is a path": blocks("../../outside/precious.txt"),
    "a block that is absolute": blocks("/etc/passwd"),
    "a block with an end of line": blocks("0" * 64 + "\n"),
    "blocks of numbers": blocks(1),
    "many blocks": blocks(*["0" * 64] * 10_000),
    "no blocks": blocks(),
    "a text for blocks": extent({"blocks": "0" * 64}),
    "no kind": extent({"kind": None}),
    "a kind that is a list": extent({"kind": ["keys"]}),
    "another kind": extent({"kind": "tokens"}),
    "a kind of other axes": extent({"kind": "bias"}),
    "a checksum that is a number": extent({"checksum": 5}),
    "an encoding that is a module": extent({"encoding": "pickle", "dtype": "float32"}),
    "an encoding that is a list": bomb([], b"", [2, 6, 4]),
    "an unknown encoding": bomb("gzip", b"\x1f\x8b", [2, 6, 4]),
    "a repeated slot of pebibytes": bomb("constant", b"\1", [2, 1 << 46, 4]),
    "a repeated slot of gibibytes": bomb("constant", b"\1", [2, 1 << 26, 4]),
    "a repeated slot of no axis": bomb("constant", b"\xff", [2, 6, 4]),
    "a frame of pebibytes": bomb("planes-zstd", ZSTD, [2, 6, 4]),
    "a frame that is none": bomb("planes-zstd", b"\xff" * 192, [2, 6, 4]),
    "many axes to decode": bomb("constant", b"\0", [1] * 5000),
    "integers that are none": bomb("int4-kivi", b"\xff" * 192, [2, 6, 4]),
    "integers of other kinds": bomb("int8-g32", b"\xff" * 192, [2, 6, 4], "positions"),
    "nested lists": lambda h, f, p: (DEEP, f, p),
    "nested facts": lambda h, f, p: (h, DEEP.decode(), p),
    "nested objects": lambda h, f, p: (b'{"a":' * 200_000, f, p),
    "facts that are a number": lambda h, f, p: (h, "1", p),
    "no facts": lambda h, f, p: ({**h, "__metadata__": {}}, None, p),
    "no metadata": lambda h, f, p: (h, None, p),
    "a list for a header": lambda h, f, p: (b"[]", f, p),
    "a number that is none": lambda h, f, p: (b'{"__metadata__": NaN}', f, p),
    "a long number": lambda h, f, p: (b'{"__metadata__": ' + b"9" * 100_000 + b"}", f, p),
    "no UTF-8": lambda h, f, p: (b'{"\xff": 1}', f, p),
    "nothing": lambda h, f, p: (b"", f, b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_packs(world, attack):
    folder = fill(world / "t")
    with Store(folder) as store:
        pack = store._shelf.index.manifest_pack(store.log("m")[0].record)
    whole = (folder / "packs" / f"{pack}.safetensors").read_bytes()
    h, f, p = parts(whole)
    del h["__metadata__"]
    data = joined(*ATTACKS[attack](h, f, p))
    if attack in HARMLESS:
        plant(folder, data)
        with Store(folder) as store:
            assert_same(store.get("m"), build_memory(1, **SMALL))
    else:
        all_ways(world, data)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100_000_001, 1 << 40, 9, 0])
def test_lengths_of_headers(world, length):
    folder = fill(world / "s")
    with Store(folder) as store:
        (pack,) = store.show("other").packs
    path = folder / "packs" / f"{pack}.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CorruptMemory):
        read_head(path) if length > 9 else Pack.open(path)
    shutil.copy(path, world / "f")
    with pytest.raises(CorruptMemory):
        open_file(world / "f", None, None)
    with Store(folder) as store:
        with pytest.raises(CorruptMemory):
            store.get("other")
        assert_same(store.get("m"), build_memory(1, **SMALL))


def with_manifest(world, change, more=()):
    """A store and a file whose manifest is another one, with digests that fit."""
    folder = fill(world / "s")
    with Store(folder, "process") as store:
        record = store.log("m")[0].record
        held = store._finder.open(store._shelf.index.manifest_pack(record))
        data = json.loads(store._finder.paper(record))
        change(data)
        text = canonical_json(data)
        digest, content = digest_bytes(text), digest_bytes(canonical_json(data.get("content")))
        pieces = [*copy_blocks(held, set(held.pack.entries)), *more]
        pack = finish(pieces, [paper_piece(digest, text)])
    data = b"".join(pack.chunks)
    plant(folder, data)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    lines[0] |= {"record": digest, "content": content}
    (folder / "log.jsonl").write_bytes(chain(lines))
    forget(folder)
    (world / "f").write_bytes(data)
    return folder


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


MANIFESTS = {
    "shapes of pebibytes": lambda d: [f.__setitem__(1, [1 << 46, 4]) for f in d["blocks"].values()],
    "many axes": lambda d: [f.__setitem__(1, [1] * 100_000) for f in d["blocks"].values()],
    "long numbers": lambda d: [f.__setitem__(1, [10**4000]) for f in d["blocks"].values()],
    "nested rules": lambda d: d["content"].update(rules=nested(500)),
    "a nested source": lambda d: d["content"]["source"].update(messages=nested(500)),
    "a source of other fields": lambda d: d["content"]["source"].update(chat={"__class__": "os"}),
    "a text of a number": lambda d: d["content"]["source"].update(text=5),
    "a name that is a list": lambda d: d.update(model_name=[]) or d["content"]["model"].clear(),
    "a class for a step": lambda d: d["lineage"][0].update(__class__="os.system"),
    "parameters of a step": lambda d: d["lineage"][0].update(parameters={"a": 1}),
    "a position of the far": lambda d: d["content"].update(next_position=10**400),
    "layers by the thousand": lambda d: d["content"]["blocks"].update(
        {str(n): d["content"]["blocks"]["0"] for n in range(1, 3000)}
    ),
    "a layer in other digits": lambda d: d["content"]["blocks"].update(
        {"\u0661": d["content"]["blocks"]["0"]}
    ),
    "a codec that is a list": lambda d: d.update(codec=[]),
    "a recipe": lambda d: d.update(format="kvedit.recipe.1"),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_hostile_manifests(world, change):
    folder = with_manifest(world, change)
    with Store(folder) as store:
        with pytest.raises(KVEditError):
            store.get("m")
        assert store.get("other").slots == 3
    with pytest.raises(KVEditError):
        open_file(world / "f", None, None)
    use(folder)


def test_one_block_a_hundred_thousand_times(world):
    """16 MiB from 64 KiB is as much as a codec may make; the sum is looked at before the first."""
    found = encode(torch.ones(64, 256, 256), "keys", "raw", 1)
    facts = {"blocks": ["a" * 64], "kind": "keys", "encoding": found.encoding, "width": 1}
    facts |= {"dtype": "float32", "shape": [64, 256, 256], "checksum": checksum([found.data])}

    def change(data):
        data["blocks"]["a" * 64] = ["float32", [64, 256, 256]]
        data["content"]["blocks"]["0"]["keys"] = ["a" * 64] * 100_000

    piece = Piece(facts, "uint8", (len(found.data),), [found.data])
    folder = with_manifest(world, change, [piece])
    with Store(folder) as store, pytest.raises(InvalidArgument, match="this machine has"):
        store.get("m")
    with pytest.raises(InvalidArgument, match="this machine has"):
        open_file(world / "f", None, None)


@pytest.mark.parametrize("place", ["pack", "log", "index", "marker", "manifest", "header", "file"])
def test_pickles_are_bytes(world, place):
    data = f"cos\nsystem\n(S'touch {world}/pwned'\ntR.".encode()  # what pickle would run
    folder = fill(world / "s")
    with Store(folder) as store:
        pack = store.show("m").packs[0]
    for sub in ("manifests", "headers"):
        (folder / sub).mkdir(exist_ok=True)
    paths = {
        "pack": folder / "packs" / f"{pack}.safetensors",
        "log": folder / "log.jsonl",
        "index": folder / "index.sqlite",
        "marker": folder / "kvedit-store.json",
        "manifest": folder / "manifests" / f"{'a' * 64}.json",
        "header": folder / "headers" / f"{pack}.safetensors",
        "file": world / "f",
    }
    paths[place].write_bytes(data)
    (world / "f").write_bytes(data)
    refused(lambda: use(folder))
    with pytest.raises(KVEditError):
        open_file(world / "f", None, None)


BAD_NAMES = [
    "../../outside/x",
    "/etc/passwd",
    "a\0b",
    "",
    "a" * 5000,
    "0" * 64,
    "..",
    "a//b",
    5,
    None,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_names_in_a_log_become_no_paths(world, name):
    folder = fill(world / "s")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    (folder / "log.jsonl").write_bytes(chain([*lines, {**lines[0], "name": name, "packs": []}]))
    forget(folder)
    refused(lambda: use(folder))
    with contextlib.suppress(KVEditError), Store(folder) as store:
        for entry in store.ls():
            refused(lambda entry=entry: store.export(entry.name, world / "f"))
            refused(lambda entry=entry: store.rm(entry.name))
            refused(lambda entry=entry: store.log(entry.name))


EVENTS = {
    "of the future": {"event": "branch"},
    "without fields": {"event": "put"},
    "that is a list": {"event": []},
    "without a kind": {"name": "m"},
    "in a batch of numbers": {"event": "batch", "events": [1, 2]},
    "in a batch that is none": {"event": "batch", "events": 5},
    "nested": {"event": "batch", "events": [{"event": "batch", "events": []}]},
    "with packs that are paths": {"event": "collect", "gone": [], "packs": ["../../outside/x"]},
    "with packs that are numbers": {"event": "collect", "gone": [1], "packs": [1]},
    "with texts for numbers": {"event": "drop", "name": "m", "versions": ["x", None]},
    "with an object for a name": {"event": "remove", "name": {"a": 1}},
    "with no time": {"event": "note", "name": "m"},
    "with a huge number": {"event": "drop", "name": "m", "versions": [10**30]},
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("index", ["index", "no index"])
def test_hostile_events(world, event, index):
    folder = fill(world / "s")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    (folder / "log.jsonl").write_bytes(chain([*lines, event]))
    if index == "no index":
        forget(folder)
    refused(lambda: use(folder))


LINKS = ["packs", "headers", "manifests", "tmp", "quarantine", "log.jsonl", "index.sqlite", "lock"]


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_the_store(world, name):
    """A folder from elsewhere may have links to anything; nothing there is changed or removed."""
    folder = fill(world / "s")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(world / "outside" / ("precious.txt" if "." in name or name == "lock" else ""))
    refused(lambda: use(folder))


def test_a_link_to_somebodys_database(tmp_path):
    folder = fill(tmp_path / "s")
    victim = tmp_path / "victim.sqlite"
    with contextlib.closing(sqlite3.connect(victim)) as connection:
        connection.execute("CREATE TABLE precious (a)")
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    before = victim.read_bytes()
    forget(folder)
    (folder / "index.sqlite").symlink_to(victim)
    refused(lambda: use(folder))
    assert victim.read_bytes() == before


@pytest.mark.parametrize("kind", ["pack", "text", "pipe", "folder", "device", "loop"])
def test_links_and_pipes_for_packs(world, kind):
    folder = fill(world / "s")
    with Store(folder) as store:
        (pack,) = store.show("other").packs
    path = folder / "packs" / f"{pack}.safetensors"
    whole = path.read_bytes()
    path.unlink()
    target = world / "t"
    if kind == "pack":
        target.write_bytes(whole)
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        places = {"text": world / "outside" / "precious.txt", "device": "/dev/zero", "loop": path}
        path.symlink_to(places[kind])
    with Store(folder) as store:
        assert_same(store.get("m"), build_memory(1, **SMALL))
        if kind == "pack":  # the same bytes, wherever they lie
            assert store.get("other").slots == 3
        else:
            with pytest.raises(KVEditError):
                store.get("other")
    use(folder)
    with Store(folder) as store:
        store.rm("other") if "other" in store else None
        store.gc(waste=0.0)
    if kind == "pack":
        assert target.read_bytes() == whole


# What a remote store says


@pytest.fixture
def remote(world):
    pytest.importorskip("obstore", reason="remote places need kvedit[s3]")
    url = f"file://{world}/remote"
    folder = fill(world / "t")
    with Store(folder, "process", remote=url) as store:
        store.push()
    fill(world / "s")
    with Store(world / "s", "process") as store:
        store.put(build_memory(7, layers=1, slots=4, source=None), "mine")
    return url


def document(world, name="m"):
    return world / "remote/default/refs" / f"{digest_bytes(name.encode())}.json"


def pulled(world, url, name="m"):
    """Pulls and reads whatever a remote store says; what is ours stays as it is."""
    folder = world / "s"
    with Store(folder, "process") as store:
        mine = store.get("mine").digest, store.get("other").digest
        kept = store.names()
        packs = {path.name for path in (folder / "packs").iterdir()}
    with Store(folder, "process", remote=url) as store:
        for eager in (True, False):
            refused(lambda eager=eager: store.pull(name, eager=eager))
            refused(lambda eager=eager: store.pull(name, eager=eager, force=True))
        refused(store.pull)
        refused(store.sync)
        refused(lambda: store.get(name))
        refused(store.fsck)
    with Store(folder, "process") as store:
        assert set(store.names()) >= set(kept)
        assert (store.get("mine").digest, store.get("other").digest) == mine
        assert {path.name for path in (folder / "packs").iterdir()} >= packs
        assert store.log("mine")[0].version == 1


def version(change):
    def attack(d):
        d["versions"][-1] |= {
            "record": "b" * 64,
            "time": "2030-01-01T00:00:00.000000+00:00",
            **change,
        }

    return attack


DOCUMENTS = {
    "a removal of another": version({"event": "remove", "name": "mine"}),
    "a collection": version({"event": "collect", "gone": []}),
    "a batch": version({"event": "batch", "events": []}),
    "an event of the future": version({"event": "branch"}),
    "another name": version({"name": "mine"}),
    "a path for a name": version({"name": "../../outside/x"}),
    "a path for a pack": version({"packs": ["../../outside/precious"]}),
    "a path for a record": version({"record": "../../outside/precious"}),
    "a pack that is not there": version({"packs": ["c" * 64]}),
    "no facts": version({"facts": None}),
    "facts of lists": version({"facts": {"bytes": [1], "slots": [1], "tokens": [1]}}),
    "tags of objects": version({"tags": {"a": 1}}),
    "a time that is a number": version({"time": 5}),
    "a time that is a list": version({"time": []}),
    "a text for packs": version({"packs": "c" * 64}),
    "nodes of objects": version({"nodes": [{"a": 1}]}),
    "a signature that is a text": version({"signature": "x"}),
    "an expiry that is a list": version({"expires": [1]}),
    "metrics that are a list": version({"metrics": [1]}),
    "a codec that is a list": version({"codec": []}),
    "a base that is a path": version({"base": "../../outside/x"}),
    "versions of numbers": lambda d: d.update(versions=[1]),
    "versions that are none": lambda d: d.update(versions=None),
    "no versions": lambda d: d.update(versions=[]),
    "the name of another": lambda d: d.update(name="mine"),
    "the name of a path": lambda d: d.update(name="../../outside/x"),
    "a format of the future": lambda d: d.update(format="kvedit.ref.9"),
    "removed": lambda d: d.update(removed=True, name="mine"),
}


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_of_names(world, remote, change):
    path = document(world)
    data = json.loads(path.read_bytes())
    change(data)
    path.write_bytes(canonical_json(data))
    pulled(world, remote)


def test_a_collection_of_our_packs(world, remote):
    """An event that says that our packs are gone."""
    with Store(world / "s") as store:
        gone = [pack for pack, _, _ in store._shelf.index.packs()]
    path = document(world)
    data = json.loads(path.read_bytes())
    version({"event": "collect", "gone": gone})(data)
    path.write_bytes(canonical_json(data))
    pulled(world, remote)


@pytest.mark.parametrize("data", [DEEP, b"", b"{", b"5", b"\xff" * 50, b'{"a":' * 100_000, b"NaN"])
def test_documents_that_are_none(world, remote, data):
    document(world).write_bytes(data)
    pulled(world, remote)


@pytest.mark.parametrize("attack", ["bytes", "header", "shorter", "longer", "another", "deep"])
def test_packs_of_a_remote(world, remote, attack):
    fresh = world / "remote/default/packs"
    with Store(world / "t", "process", remote=remote) as store:
        store.put(build_memory(9, layers=1, slots=5, source=None), "new")
        store.push()
        (pack,) = store.show("new").packs
    path = fresh / f"{pack}.safetensors"
    data = bytearray(path.read_bytes())
    other = next(one for one in fresh.iterdir() if one.stem != pack).read_bytes()
    data[-1 if attack == "bytes" else 200] ^= 1
    changed = {"shorter": data[:-1], "longer": data + b"x", "another": other}
    changed["deep"] = len(DEEP).to_bytes(8, "little") + DEEP
    path.write_bytes(changed.get(attack, data))
    pulled(world, remote, "new")
    with Store(world / "s", "process", remote=remote) as store, pytest.raises(KVEditError):
        store.pull("new")
        store.get("new")
