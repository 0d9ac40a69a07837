"""More than 5,000 ways to damage a store; each is found, or changes nothing that is read.

What "found" means: a memory that needs a damaged byte of a pack raises CorruptMemory, and every
other memory comes as it was put. A damaged log changes no answer, and fsck tells. A damaged index
gives the same answers, or an error, never other bytes; made again, it gives the same answers.
"""

import json
import math
import random
from functools import partial
from itertools import combinations

import pytest

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store import Store
from kvedit.store.pack import KEY, Pack
from kvedit.store.salvage import chain, good_lines

from .conftest import build_memory, files, with_bias

COUNTED = {"cases": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "s"
    with Store(folder, "process") as store:
        memory = build_memory(1, layers=1, slots=6, heads=1, dim=4, bias=True)
        digests = {}
        for name, one in (("m", memory), ("edit", with_bias(memory)), ("other", small(7))):
            digests[name] = store.put(one, name).content
        packs = {name: needs(store, name) for name in digests}
    return folder, digests, packs


def needs(store, name):
    """Pack to the blocks and manifests that a memory needs of it."""
    record = store.show(name).record.record
    parts = store._finder.manifest(record, "").parts.values()
    index = store._shelf.index
    found = {index.manifest_pack(record): {record}}
    for block, (pack, _, _) in index.locate(b.digest for p in parts for b in p.blocks).items():
        found.setdefault(pack, set()).add(block)
    return found


def small(seed):
    return build_memory(seed, layers=1, slots=3, heads=1, dim=4, source=None)


def answers(folder, verify="full"):
    """What each name gives: its digest, or the error."""
    found = {}
    with Store(folder, "process") as store:
        for name in ("m", "edit", "other"):
            try:
                found[name] = store.get(name, verify=verify).digest
            except (CorruptMemory, InvalidArgument) as error:
                found[name] = type(error)
    return found


def damaged(path, data, folder, verify="full"):
    """The answers while a file holds other bytes."""
    before = path.read_bytes()
    COUNTED["cases"] += 1
    try:
        path.write_bytes(data)
        return answers(folder, verify)
    finally:
        path.write_bytes(before)


def check(found, digests, hit):
    for name, digest in digests.items():
        assert found[name] is CorruptMemory if name in hit else found[name] == digest, name


def owners(packs, pack, offset=0):
    """The memories that need a byte of a pack; the first is of the header, which all need."""
    wanted = None
    for extent in pack.extents:
        if extent.offset <= offset < extent.offset + extent.size:
            wanted = set(extent.blocks)
    for record, paper in pack.manifests.items():
        if paper.offset <= offset < paper.offset + paper.size:
            wanted = {record}
    return {
        name
        for name, held in packs.items()
        if pack.digest in held and (wanted is None or wanted & held[pack.digest])
    }


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_a_pack_flipped(place, stride):
    folder, digests, packs = place
    draw = random.Random(0)
    hits = set()
    for path in sorted(folder.glob("packs/*")):
        data, pack = path.read_bytes(), Pack.open(path)
        for offset in range(0, len(data), stride):
            other = bytearray(data)
            other[offset] ^= 1 << draw.randrange(8)
            hit = owners(packs, pack, offset)
            check(damaged(path, bytes(other), folder), digests, hit)
            hits.add(frozenset(hit))
    assert hits == {frozenset(hit) for hit in (["m"], ["edit"], ["m", "edit"], ["other"])}


@pytest.mark.parametrize("verify", ["deep", "fast"])
def test_payload_flips_by_other_ways_to_check(place, verify):
    folder, digests, packs = place
    for path in sorted(folder.glob("packs/*")):
        data, pack = path.read_bytes(), Pack.open(path)
        for extent in pack.extents:
            for offset in {*range(extent.offset, extent.offset + extent.size, 16), extent.offset}:
                other = bytearray(data)
                other[offset] ^= 0x10
                hit = owners(packs, pack, offset)
                if extent.size:
                    assert hit
                    check(damaged(path, bytes(other), folder, verify), digests, hit)


def test_every_truncation_and_extension(place):
    folder, digests, packs = place
    for path in sorted(folder.glob("packs/*")):
        data, pack = path.read_bytes(), Pack.open(path)
        for size in range(0, len(data), 11):
            check(damaged(path, data[:size], folder), digests, owners(packs, pack))
        for tail in (b"\0", b"x", b"\0" * 4096, data):
            check(damaged(path, data + tail, folder), digests, owners(packs, pack))


def test_swapped_and_missing_packs(place):
    folder, digests, packs = place
    paths = sorted(folder.glob("packs/*"))
    for path in paths:
        data, pack = path.read_bytes(), Pack.open(path)
        for other in paths:
            if other != path:
                check(damaged(path, other.read_bytes(), folder), digests, owners(packs, pack))
        path.unlink()
        check(answers(folder), digests, owners(packs, pack))
        path.write_bytes(data)
        COUNTED["cases"] += 1


def rewritten(folder, old, change):
    """Another pack in the place of one, its name, header and log all in accord; with an undo."""
    data = old.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    facts = json.loads(header["__metadata__"][KEY])
    payload = bytearray(data[size:])
    change(header, facts, payload)
    header["__metadata__"][KEY] = canonical_json(facts).decode()
    text = canonical_json(header)
    text += b" " * (-(len(text) + 8) % 64)
    head = len(text).to_bytes(8, "little") + text
    fresh = folder / "packs" / f"{digest_bytes(head)}.safetensors"
    kept = {path: path.read_bytes() for path in (old, folder / "log.jsonl")}
    old.unlink()
    fresh.write_bytes(head + payload)
    lines = kept[folder / "log.jsonl"].replace(old.stem.encode(), fresh.stem.encode()).splitlines()
    (folder / "log.jsonl").write_bytes(chain(map(json.loads, lines)))

    def undo():
        fresh.unlink()
        for path, data in kept.items():
            path.write_bytes(data)

    return undo


def lies(path):
    """Changes of a pack by somebody who makes its header fit, with the blocks that they hit."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    extents = json.loads(header.pop("__metadata__")[KEY])["extents"]
    for one, two in combinations(extents, 2):
        blocks = {*extents[one]["blocks"], *extents[two]["blocks"]}
        if header[one]["shape"] == header[two]["shape"]:
            yield blocks, partial(swap_bytes, one=one, two=two)
            yield blocks, partial(swap_names, one=one, two=two)
    for one, facts in extents.items():
        size = header[one]["data_offsets"][1] - header[one]["data_offsets"][0]
        shape = header[one]["shape"]
        for code, width in (("F32", 4), ("I32", 4), ("F16", 2), ("I64", 8), ("U8", 1)):
            if code != header[one]["dtype"] and size and "encoding" not in facts:
                outer = math.prod(shape[:-1])
                if size % (outer * width) == 0:
                    fitting = [*shape[:-1], size // outer // width]
                    yield set(facts["blocks"]), partial(retype, one=one, code=code, shape=fitting)
        if shape != shape[::-1]:
            yield set(facts["blocks"]), partial(retype, one=one, shape=shape[::-1])


def swap_bytes(header, facts, payload, one, two):
    (a, b), (c, d) = (header[name]["data_offsets"] for name in (one, two))
    payload[a:b], payload[c:d] = payload[c:d], payload[a:b]
    sums = [facts["extents"][name]["checksum"] for name in (one, two)]
    facts["extents"][two]["checksum"], facts["extents"][one]["checksum"] = sums


def swap_names(header, facts, payload, one, two):
    names = [facts["extents"][name]["blocks"] for name in (one, two)]
    facts["extents"][two]["blocks"], facts["extents"][one]["blocks"] = names


def retype(header, facts, payload, one, shape, code=None):
    header[one] |= {"shape": shape, "dtype": code or header[one]["dtype"]}


def test_a_header_that_lies(place):
    """Swapped blocks, other dtypes and shapes of the same size, with checksums that fit."""
    folder, digests, packs = place
    cases = 0
    for path in sorted(folder.glob("packs/*")):
        for blocks, change in list(lies(path)):
            hit = {name for name, held in packs.items() if blocks & held.get(path.stem, set())}
            undo = rewritten(folder, path, change)
            try:
                with Store(folder, "process") as store:
                    store.rebuild_index()
                found = answers(folder)
            finally:
                undo()
            COUNTED["cases"] += 1
            cases += 1
            check(found, digests, hit)
    with Store(folder, "process") as store:
        store.rebuild_index()
    assert answers(folder) == digests
    assert cases > 30


def log_variants(data):
    lines = data.splitlines(keepends=True)
    yield from (bytes((*data[:at], data[at] ^ 2, *data[at + 1 :])) for at in range(0, len(data), 9))
    yield from (data[:size] for size in range(0, len(data) - 1, 41))
    for n, line in enumerate(lines):
        yield b"".join(lines[:n] + lines[n + 1 :])
        yield b"".join([*lines[:n], line, *lines[n:]])
        yield b"".join([*lines[:n], line[: len(line) // 2], *lines[n + 1 :]])
        yield b"".join([*lines[:n], b"\n", *lines[n:]])
        for other in range(n):
            swapped = list(lines)
            swapped[n], swapped[other] = swapped[other], swapped[n]
            yield b"".join(swapped)
    yield b"".join(lines[::-1])


def test_a_damaged_log(place):
    folder, digests, _ = place
    path = folder / "log.jsonl"
    data = path.read_bytes()
    for other in log_variants(data):
        # The index has seen all of it: reading goes on.
        check(damaged(path, other, folder), digests, ())
        path.write_bytes(other)
        with Store(folder, "process") as store:
            health = store.fsck()
        path.write_bytes(data)
        # Only the newline at the very end says nothing.
        assert not health.ok or other[:-1] == data[:-1], good_lines(other)
        assert health.lost == ()
    assert answers(folder) == digests


def same_or_told(folder, digests):
    """A damaged index may name a wrong place or none: an error then; never other bytes."""
    for name, digest in digests.items():
        try:
            with Store(folder, "process") as store:
                assert store.get(name).digest == digest
        except (CorruptMemory, InvalidArgument, NotFound):
            continue


def test_a_damaged_wal(place):
    """The index as a process that was killed leaves it: with lines that lie in the WAL alone."""
    folder, digests, _ = place
    names = [folder / f"index.sqlite{suffix}" for suffix in ("", "-wal")]
    with Store(folder, "process") as store:
        store.rebuild_index()
        sound = {path: path.read_bytes() for path in names}
    size = len(sound[names[1]])
    assert size > 10_000
    draw = random.Random(2)
    for number in range(120):
        other = bytearray(sound[names[1]])
        if number % 3 == 0:
            other[draw.randrange(size)] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            frame = 32 + draw.randrange(size // 4120) * 4120
            other[frame : frame + 4120] = bytes(4120)
        else:
            other = other[: draw.randrange(size)]
        for extra in folder.glob("index.sqlite-*"):
            extra.unlink()
        names[0].write_bytes(sound[names[0]])
        names[1].write_bytes(other)
        COUNTED["cases"] += 1
        same_or_told(folder, digests)
        with Store(folder, "process") as store:
            store.rebuild_index()
        assert answers(folder) == digests


def test_a_damaged_index(place):
    folder, digests, _ = place
    path = folder / "index.sqlite"
    answers(folder)
    for extra in folder.glob("index.sqlite-*"):
        extra.unlink()
    data = path.read_bytes()
    draw = random.Random(1)
    for number in range(250):
        other = bytearray(data)
        if number % 3 == 0:
            for _ in range(30):
                other[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif number % 3 == 1:
            page = draw.randrange(len(data) // 4096) * 4096
            other[page : page + 4096] = bytes(4096)
        else:
            other = other[: draw.randrange(len(data))]
        COUNTED["cases"] += 1
        path.write_bytes(other)
        for extra in folder.glob("index.sqlite-*"):
            extra.unlink()
        same_or_told(folder, digests)
        with Store(folder, "process") as store:
            store.rebuild_index()
        assert answers(folder) == digests


def test_a_missing_index_and_log_lines_are_made_again(place):
    folder, digests, _ = place
    (folder / "index.sqlite").unlink()
    assert answers(folder) == digests
    log = (folder / "log.jsonl").read_bytes()
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    (folder / "log.jsonl").write_bytes(b"{broken\n" + log.split(b"\n", 1)[1])
    with Store(folder, "process") as store:
        health = store.fsck(repair=True)
        assert health.ok, health
        contents = {store.log(name)[0].content for name in store.names()}
        assert contents == set(digests.values())
        assert any(name.startswith("recovered/") for name in store.names())
        assert store.fsck().ok
    assert files(store, "quarantine/*")


@pytest.mark.parametrize("least", [5000, pytest.param(9900, marks=pytest.mark.slow)])
def test_there_were_that_many(least):
    if COUNTED["cases"] < 250:
        pytest.skip("counts what the other tests of this file did")
    assert COUNTED["cases"] >= least, COUNTED
