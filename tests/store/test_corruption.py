"""A byte that is not the one that was put is found, named and never handed out."""

import json
import os
import random
import shutil

import pytest

from kvedit.errors import CorruptMemory, InvalidArgument, KVEditError
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.store import Store
from kvedit.store.layout import Layout
from kvedit.store.pack import Pack
from kvedit.store.packing import checksum, finish, paper_piece
from kvedit.store.repack import copy_blocks
from kvedit.store.salvage import chain

from .conftest import assert_same, build_memory, files, with_bias


@pytest.fixture
def memory():
    return build_memory(layers=2, slots=260, dim=4, bias=True)


@pytest.fixture
def filled(store, memory):
    store.put(memory, "m")
    store.put(build_memory(1, layers=2, slots=260, dim=4), "other")
    return store


def pack_of(store, ref="m"):
    (digest,) = store.show(ref).packs
    return store.path / "packs" / f"{digest}.safetensors"


DAMAGED = r"pack [0-9a-f]{64}: the (stored )?bytes of block [0-9a-f]{64}"


def events(store):
    return [json.loads(line) for line in (store.path / "log.jsonl").read_bytes().splitlines()]


def replace_pack(store, old, data):
    """Puts a pack in the place of another, log and all, as its author would have."""
    store.close()
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    new = digest_bytes(head)
    (store.path / "packs" / f"{old}.safetensors").unlink()
    (store.path / "packs" / f"{new}.safetensors").write_bytes(data)
    log = store.path / "log.jsonl"
    swapped = [
        {**event, "packs": [new if pack == old else pack for pack in event["packs"]]}
        for event in events(store)
    ]
    log.write_bytes(chain(swapped))
    store.rebuild_index()
    return new


def manifest_place(store, ref="m"):
    path = pack_of(store, ref)
    record = store.show(ref).record.record
    place = Pack.open(path).manifests[record]
    return path, record, place


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def header_size(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.5, 0.9, 0.999, "all but one"])
def test_truncated_packs(filled, share):
    path = pack_of(filled)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if share == "all but one" else data[: int(share * len(data))])
    for verify in ("full", "off"):
        with pytest.raises(CorruptMemory, match=path.name):
            filled.get("m", verify=verify)


@pytest.mark.parametrize("change", [lambda data: data[:-1000], lambda data: data + b"x"])
def test_a_size_that_changes_after_the_header_was_read(filled, change):
    path = pack_of(filled)
    held = filled._finder.open(path.stem)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptMemory, match=f"{path.name}.*cut off or extended"):
        held.data(0, 1)


@pytest.mark.parametrize("tail", [b"\0", b"x", b"\0" * 4096])
def test_extended_packs(filled, tail):
    path = pack_of(filled)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(CorruptMemory, match=path.name):
        filled.get("m")


def test_flipped_bits_in_the_payload(filled, memory):
    path = pack_of(filled)
    _, _, place = manifest_place(filled)
    size, start = place.offset, header_size(path)
    draw = random.Random(0)
    for offset in [start, size - 1, *(draw.randrange(start, size) for _ in range(20))]:
        bit = draw.randrange(8)
        flip(path, offset, bit)
        for verify in ("full", "deep", "fast"):
            with Store(filled.path) as again, pytest.raises(CorruptMemory, match=DAMAGED):
                again.get("m", verify=verify)
        flip(path, offset, bit)
    assert_same(filled.get("m"), memory)


def test_flipped_bits_in_what_was_read_before(filled, memory):
    assert_same(filled.get("m"), memory)  # from now on "full" takes the checksums
    path = pack_of(filled)
    places = [extent.offset for extent in Pack.open(path).extents if extent.size]
    for offset in places:
        flip(path, offset)
        os.utime(path, ns=(1, 1))
        for verify in ("full", "deep", "fast"):
            with pytest.raises(CorruptMemory, match=DAMAGED):
                filled.get("m", verify=verify)
        flip(path, offset)
    assert_same(filled.get("m"), memory)


def test_equal_checksums_are_not_equal_bytes(filled):
    """What a forger can do, "fast" can't see and "full" does, at the first read."""
    path = pack_of(filled)
    data = bytearray(path.read_bytes())
    pack = Pack.open(path)
    extent = next(extent for extent in pack.extents if extent.kind == "keys")
    data[extent.offset] ^= 1
    forged = data[extent.offset : extent.offset + extent.size]
    head = bytes(data).replace(extent.checksum.encode(), checksum([forged]).encode())
    replace_pack(filled, pack.digest, head)
    with Store(filled.path) as again:
        again.get("m", verify="fast")
        for verify in ("full", "deep"):
            with pytest.raises(CorruptMemory, match=DAMAGED):
                again.get("m", verify=verify)


def test_flipped_bits_in_the_header(filled, memory):
    path = pack_of(filled)
    draw = random.Random(0)
    offsets = [*range(8), *(draw.randrange(8, header_size(path)) for _ in range(60))]
    for offset in offsets:
        bit = draw.randrange(8)
        flip(path, offset, bit)
        for verify in ("full", "off"):
            with pytest.raises(CorruptMemory, match=path.name):
                filled.get("m", verify=verify)
        flip(path, offset, bit)
    assert_same(filled.get("m"), memory)


def test_flipped_bits_in_the_manifest(filled, memory):
    path, record, place = manifest_place(filled)
    for offset in random.Random(0).sample(range(place.size), 30):
        flip(path, place.offset + offset)
        for verify in ("full", "off"):
            with Store(filled.path) as again:  # a manifest is kept once it was read
                with pytest.raises(CorruptMemory, match=f"manifest {record}"):
                    again.get("m", verify=verify)
                with pytest.raises(CorruptMemory, match=f"manifest {record}"):
                    again.show("m")
        flip(path, place.offset + offset)
    assert_same(filled.get("m"), memory)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"\n", lambda _: b""]
)
def test_resized_manifests(filled, change):
    path, record, _ = manifest_place(filled)
    held = filled._finder.open(path.stem)
    whole = filled._finder.paper(record)
    pack = finish(copy_blocks(held, set(held.pack.entries)), [paper_piece(record, change(whole))])
    replace_pack(filled, path.stem, b"".join(pack.chunks))
    with Store(filled.path) as again, pytest.raises(CorruptMemory, match=f"manifest {record}"):
        again.get("m")


def test_swapped_files(filled):
    one, two = files(filled, "packs/*")
    spare = filled.path / "spare"
    one.rename(spare)
    two.rename(one)
    spare.rename(two)
    for name in ("m", "other"):
        for verify in ("full", "off"):
            with pytest.raises(CorruptMemory):
                filled.get(name, verify=verify)


def test_missing_files(filled):
    for path in files(filled, "packs/*"):
        path.unlink()
    with pytest.raises(CorruptMemory, match="is missing"):
        filled.get("m")
    filled.rebuild_index()
    assert filled.names() == ["m", "other"]
    with pytest.raises(CorruptMemory):
        filled.get("m")


def test_a_put_heals_a_pack_that_is_missing_or_cut(filled, memory):
    path = pack_of(filled)
    for damage in (path.unlink, lambda: path.write_bytes(path.read_bytes()[:-1])):
        damage()
        filled.put(memory, "again")
        assert_same(filled.get("m"), memory)
        filled.rm("again")


def test_swapped_blocks_of_one_shape(filled):
    path = pack_of(filled)
    data = bytearray(path.read_bytes())
    big = [e for e in Pack.open(path).extents if e.shape == (2, 260, 4)][:2]
    one, two = (slice(extent.offset, extent.offset + extent.size) for extent in big)
    data[one], data[two] = data[two], data[one]
    path.write_bytes(data)
    for verify in ("full", "fast"):
        with pytest.raises(CorruptMemory, match=DAMAGED):
            filled.get("m", verify=verify)


def test_a_header_that_lies_about_dtype(filled):
    path = pack_of(filled)
    data = path.read_bytes()
    start = header_size(path)
    lying = data[:start].replace(b'"F32"', b'"I32"') + data[start:]
    path.write_bytes(lying)
    with pytest.raises(CorruptMemory, match=path.name):
        filled.get("m", verify="off")
    replace_pack(filled, path.stem, lying)
    with Store(filled.path) as again, pytest.raises(CorruptMemory, match="has another shape"):
        again.get("m", verify="off")


def test_flipped_bits_in_the_log(store, memory):
    store.put(memory, "a")
    store.put(with_bias(memory), "a")
    store.put(memory, "b")
    store.rm("b")
    before = {name: store.log(name) for name in store.names()}
    store.close()
    log, index = store.path / "log.jsonl", store.path / "index.sqlite"
    size = log.stat().st_size
    offsets = random.Random(0).sample(range(size - 1), 40)
    for offset in offsets:
        flip(log, offset)
        index.unlink(missing_ok=True)
        for _ in range(2):  # what could not be made is not there for the next one to find
            with (
                Store(store.path) as again,
                pytest.raises(CorruptMemory, match=r"log\.jsonl: line"),
            ):
                again.names()
        flip(log, offset)
    flip(log, size - 1)  # the newline at the end: the line is whole without it
    index.unlink(missing_ok=True)
    with Store(store.path) as again:
        assert {name: again.log(name) for name in again.names()} == before


def test_the_end_of_the_log_is_written_again(store, memory):
    store.put(memory, "a")
    flip(store.path / "log.jsonl", -1)
    (store.path / "index.sqlite").unlink()
    store.put(memory, "b")
    store.rebuild_index()
    assert store.names() == ["a", "b"]


def test_a_damaged_log_harms_no_reader(store, memory):
    store.put(memory, "a")
    flip(store.path / "log.jsonl", 20)
    assert_same(store.get("a"), memory)


def test_lost_lines_of_the_log(store, memory):
    for name in ("a", "b", "c"):
        store.put(memory, name)
    log = store.path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for kept in ([0, 2], [1, 2], [1, 0, 2], [0, 1, 1, 2]):
        log.write_bytes(b"".join(lines[i] for i in kept))
        with pytest.raises(CorruptMemory, match="damaged, or a line before it is missing"):
            store.rebuild_index()
    log.write_bytes(b"".join(lines))
    store.rebuild_index()
    log.write_bytes(b"".join(lines[:2]))
    assert_same(store.get("c"), memory)
    with pytest.raises(CorruptMemory, match="is shorter than"):
        store.put(memory, "d")
    store.rebuild_index()
    assert store.names() == ["a", "b"]


def test_an_unfinished_line_is_cut_off(store, memory):
    store.put(memory, "a")
    log = store.path / "log.jsonl"
    whole = log.read_bytes()
    for torn in (b"{", whole[: len(whole) // 2], b"\0" * 100):
        log.write_bytes(whole + torn)
        store.rebuild_index()
        assert store.names() == ["a"]
    store.put(memory, "b")
    assert log.read_bytes().startswith(whole + b"{")
    store.rebuild_index()
    assert store.names() == ["a", "b"]


def test_unknown_events_are_refused(store, memory):
    store.put(memory, "a")
    journal, index = store._shelf.journal, store._shelf.index
    journal.append({"event": "branch"}, index.catch_up())
    with pytest.raises(InvalidArgument, match=r"'branch'.*use a newer kvedit"):
        store.put(memory, "b")


def hostile(store, memory, change):
    """Puts a manifest in place as its author would: changed, and with digests that fit."""
    record = store.put(memory, "m")
    (event,) = events(store)
    held = store._finder.open(event["packs"][0])
    data = json.loads(store._finder.paper(record.record))
    change(data)
    text = canonical_json(data)
    digest = digest_bytes(text)
    content = digest_bytes(canonical_json(data.get("content")))
    pack = finish(copy_blocks(held, set(held.pack.entries)), [paper_piece(digest, text)])
    event |= {"record": digest, "content": content}
    (store.path / "log.jsonl").write_bytes(chain([event]))
    replace_pack(store, held.pack.digest, b"".join(pack.chunks))
    return store


def rename_block(data, to):
    old, facts = data["blocks"].popitem()
    data["blocks"][to] = facts
    for kinds in data["content"]["blocks"].values():
        for digests in kinds.values():
            digests[:] = [to if digest == old else digest for digest in digests]


def facts(data, place, value):
    for of_block in data["blocks"].values():
        of_block[place] = value


def layers(data):
    return data["content"]["blocks"]


CHANGES = {
    "a path for a digest": lambda d: rename_block(d, "../../../etc/passwd"),
    "an absolute path": lambda d: rename_block(d, "/etc/passwd"),
    "an unknown block": lambda d: rename_block(d, "0" * 64),
    "huge shapes": lambda d: facts(d, 1, [1 << 40, 256, 4]),
    "negative shapes": lambda d: facts(d, 1, [-1]),
    "no shapes": lambda d: facts(d, 1, []),
    "another dtype": lambda d: facts(d, 0, "float64"),
    "a dtype from elsewhere": lambda d: facts(d, 0, "os"),
    "no blocks": lambda d: layers(d).clear(),
    "a missing kind": lambda d: layers(d)["0"].pop("keys"),
    "an unknown kind": lambda d: layers(d)["0"].update(extra=[]),
    "no layer": lambda d: layers(d).update(x=layers(d).pop("0")),
    "another layer": lambda d: layers(d).update({"7": layers(d).pop("0")}),
    "an empty kind": lambda d: layers(d)["0"].update(keys=[]),
    "blocks in another order": lambda d: layers(d)["0"]["keys"].reverse(),
    "keys for bias": lambda d: layers(d)["0"].update(bias=layers(d)["0"]["keys"]),
    "bias for tokens": lambda d: layers(d)["-1"].update(bias=layers(d)["0"]["bias"]),
    "no model": lambda d: d["content"].pop("model"),
    "a model of one field more": lambda d: d["content"]["model"]["fingerprint"].update(x=1),
    "positions past the end": lambda d: d["content"].update(next_position=1),
    "a text for a number": lambda d: d["content"].update(next_position="260"),
    "no source text": lambda d: d["content"].update(source=None),
    "a lineage of numbers": lambda d: d.update(lineage=[1]),
    "a list": lambda d: d.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hostile_manifests(store, memory, change):
    store = hostile(store, memory, change)
    with pytest.raises(CorruptMemory):
        store.get("m")


def test_newer_manifests(store, memory):
    hostile(store, memory, lambda data: data.update(codec="int1"))
    with pytest.raises(InvalidArgument, match=r"int1.*use a newer kvedit"):
        store.get("m")


def test_digests_alone_become_paths(tmp_path):
    layout = Layout(tmp_path / "s", "none")
    for digest in ("../x", "", "0" * 63, "0" * 63 + "G", "0" * 64 + "\n", None, "/" + "0" * 63):
        for path in (layout.pack, layout.header, layout.manifest):
            with pytest.raises(CorruptMemory, match="can't name a file"):
                path(digest)


def test_random_damage_to_any_file_is_never_served(filled, memory, tmp_path):
    """Whatever is flipped: the same memory comes out, or an error of the library's own."""
    filled.close()
    draw = random.Random(1)
    names = [path.relative_to(filled.path) for path in files(filled)]
    for turn in range(40):
        copy = tmp_path / f"copy{turn}"
        shutil.copytree(filled.path, copy)
        path = copy / draw.choice([name for name in names if (copy / name).stat().st_size])
        for _ in range(draw.choice([1, 8, 64])):
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
        try:
            with Store(copy) as store:
                read = store.get("m")
        except KVEditError:
            continue
        assert_same(read, memory)
