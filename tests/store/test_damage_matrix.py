"""More than 5,000 ways to damage a store; each is found, or changes nothing that is read."""

import random

import pytest

from kvedit.errors import CorruptMemory, InvalidArgument, KVEditError
from kvedit.store import Store
from kvedit.store.pack import Pack
from kvedit.store.salvage import good_lines

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
        packs = {name: store.show(name).packs for name in digests}
    return folder, digests, packs


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
        if name in hit:
            assert found[name] in (CorruptMemory, InvalidArgument), name
        else:
            assert found[name] == digest, name


def owners(packs, path):
    return {name for name, held in packs.items() if path.stem in held}


def test_every_byte_of_a_pack_flipped(place):
    folder, digests, packs = place
    draw = random.Random(0)
    for path in sorted(folder.glob("packs/*")):
        data = path.read_bytes()
        alone = owners(packs, path)
        pack = Pack.open(path)
        shared = {p.offset: p.size for p in pack.manifests.values()}
        for offset in range(0, len(data), 2 if len(data) > 2000 else 1):
            other = bytearray(data)
            other[offset] ^= 1 << draw.randrange(8)
            found = damaged(path, bytes(other), folder)
            in_paper = any(at <= offset < at + size for at, size in shared.items())
            if in_paper:  # one manifest: the memory that put it
                assert any(found[name] is CorruptMemory for name in alone)
                assert all(found[n] in (d, CorruptMemory) for n, d in digests.items())
            else:
                # A block, the header: every memory that needs this block; none gets other bytes.
                assert any(found[name] in (CorruptMemory, InvalidArgument) for name in alone)
                assert all(
                    found[n] in (d, CorruptMemory, InvalidArgument) for n, d in digests.items()
                )
            for name in digests.keys() - alone:
                assert found[name] == digests[name]


@pytest.mark.parametrize("verify", ["deep", "fast"])
def test_payload_flips_by_other_ways_to_check(place, verify):
    folder, digests, packs = place
    for path in sorted(folder.glob("packs/*")):
        data = path.read_bytes()
        for extent in Pack.open(path).extents:
            for offset in range(extent.offset, extent.offset + extent.size, 16):
                other = bytearray(data)
                other[offset] ^= 0x10
                found = damaged(path, bytes(other), folder, verify)
                assert CorruptMemory in found.values()
                assert all(found[n] in (d, CorruptMemory) for n, d in digests.items())


def test_every_truncation_and_extension(place):
    folder, digests, packs = place
    for path in sorted(folder.glob("packs/*")):
        data = path.read_bytes()
        for size in range(0, len(data), 11):
            check(damaged(path, data[:size], folder), digests, owners(packs, path))
        for tail in (b"\0", b"x", b"\0" * 4096, data):
            check(damaged(path, data + tail, folder), digests, owners(packs, path))


def test_swapped_and_missing_packs(place):
    folder, digests, packs = place
    paths = sorted(folder.glob("packs/*"))
    for path in paths:
        for other in paths:
            if other != path:
                check(damaged(path, other.read_bytes(), folder), digests, owners(packs, path))
        data = path.read_bytes()
        path.unlink()
        check(answers(folder), digests, owners(packs, path))
        path.write_bytes(data)
        COUNTED["cases"] += 1


def test_a_damaged_log(place):
    folder, digests, _ = place
    path = folder / "log.jsonl"
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    variants = [bytes((*data[:at], data[at] ^ 2, *data[at + 1 :])) for at in range(0, len(data), 9)]
    variants += [data[:size] for size in range(0, len(data), 41)]
    variants += [b"".join(lines[:n] + lines[n + 1 :]) for n in range(len(lines))]
    variants += [b"".join([*lines, lines[0]]), b"".join(lines[::-1])]
    for other in variants:
        # The index has seen all of it: reading goes on.
        check(damaged(path, other, folder), digests, ())
        _, bad = good_lines(other)
        path.write_bytes(other)
        with Store(folder, "process") as store:
            health = store.fsck()
            assert not health.ok or (bad == 0 and len(other) >= len(data) - 1)
        path.write_bytes(data)
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
        # It may name a wrong place or none: then the answer is an error; never other bytes.
        try:
            found = answers(folder)
        except KVEditError:
            found = {}
        for name, answer in found.items():
            assert answer in (digests[name], CorruptMemory, InvalidArgument, *digests.values())
            assert answer not in set(digests.values()) - {digests[name]}
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


def test_there_were_more_than_five_thousand():
    if COUNTED["cases"] < 250:
        pytest.skip("counts what the other tests of this file did")
    assert COUNTED["cases"] >= 5000, COUNTED
