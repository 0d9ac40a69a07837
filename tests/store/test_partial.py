"""Parts of memories: equal to slices of the whole, and only their blocks are read."""

import random

import pytest
import torch

from kvedit.errors import CorruptMemory, InvalidArgument, NotFound, UnknownName
from kvedit.memory.blocks import BLOCK_SLOTS
from kvedit.store import Store

from .conftest import build_memory, flip

KINDS = ("keys", "values", "positions", "source", "bias")
AXIS = {"keys": 1, "values": 1, "bias": 1, "positions": 0, "source": 0}


def sliced(tensor, kind, slots, heads=None):
    if slots is not None:
        start, stop = (min(slot, tensor.shape[AXIS[kind]]) for slot in slots)
        tensor = tensor.narrow(AXIS[kind], start, stop - start)
    return tensor[heads] if heads is not None and tensor.ndim > 1 else tensor


def blocks_bytes(tensor, kind, slots):
    """What the blocks of a tensor weigh that some slots lie in; behind its end it is the last."""
    count = tensor.shape[AXIS[kind]]
    row = tensor.nbytes // count if count else 0
    starts = range(0, count, BLOCK_SLOTS)
    low, high = slots
    wanted = [s for s in starts if s < high and s + BLOCK_SLOTS > low] or list(starts)[-1:]
    return sum(min(BLOCK_SLOTS, count - start) * row for start in wanted)


@pytest.fixture(scope="module", params=["raw", "planes-zstd", "sealed"])
def case(request, tmp_path_factory):
    memory = build_memory(1, layers=4, slots=900, heads=3, ragged=True, bias=True)
    key = bytes(range(32)) if request.param == "sealed" else None
    folder = tmp_path_factory.mktemp("partial") / "s"
    store = Store(folder, "none", key=key)
    store.put(memory, "m", codec="raw" if key else request.param)
    return store, memory


def test_any_part(case):
    store, memory = case
    draw = random.Random(0)
    borders = [0, 1, 255, 256, 257, 511, 512, 513, 609, 706, 803, 899, 900]
    for _ in range(60):
        low, high = sorted(draw.sample(borders, 2))
        layers = draw.choice([None, [0], [-1], [0, 2], [1, 3, -4]])
        kinds = draw.sample(KINDS, draw.randrange(1, 6))
        heads = draw.choice([None, [0], [2, 0], [-1], []])
        slots = draw.choice([None, (low, high)])
        chosen = range(4) if layers is None else sorted({layer % 4 for layer in layers})
        longest = max(memory.layers[layer].slots for layer in chosen)
        if slots is not None and slots[1] > longest:
            with pytest.raises(InvalidArgument, match="slots"):
                store.peek("m", layers, kinds, heads, slots)
            continue
        found = store.peek("m", layers, kinds, heads, slots)
        wanted = {
            (layer, kind): sliced(tensor, kind, slots, heads)
            for layer in chosen
            for kind, tensor in memory.layers[layer].tensors()
            if kind in kinds
        }
        assert {(i, k) for i, part in found.items() for k in part} == wanted.keys()
        for (layer, kind), tensor in wanted.items():
            assert torch.equal(found[layer][kind], tensor), (layer, kind, slots, heads)


@pytest.mark.parametrize(
    "slots", [(0, 1), (0, 256), (0, 257), (255, 257), (256, 512), (700, 710), (899, 900), (0, 900)]
)
def test_slots_of_a_memory(case, slots):
    store, memory = case
    part = store.get("m", slots=slots)
    assert part.tokens_count == memory.tokens_count and part.next_position == memory.next_position
    assert part.lineage == memory.lineage and part.verified
    for index, layer in memory.layers.items():
        found = dict(part.layers[index].tensors())
        for kind, tensor in layer.tensors():
            assert torch.equal(found[kind], sliced(tensor, kind, slots))
            assert found[kind].is_contiguous()
    part.check_unmodified()
    assert part.digest != memory.digest or slots == (0, 900)


@pytest.mark.parametrize("slots", [(3, 4), (250, 260), (512, 513), (600, 899), (898, 900)])
@pytest.mark.parametrize("kinds", [("keys",), ("values", "positions"), ("bias",)])
def test_only_the_blocks_are_read(case, slots, kinds):
    store, memory = case
    store.peek("m")  # the manifest is known from here on
    for layers in (None, [0], [1, -1]):
        chosen = range(4) if layers is None else {layer % 4 for layer in layers}
        if slots[1] > max(memory.layers[layer].slots for layer in chosen):
            continue
        before = store.counters.bytes_read
        store.peek("m", layers, kinds, slots=slots)
        wanted = sum(
            blocks_bytes(tensor, kind, slots)
            for layer in chosen
            for kind, tensor in memory.layers[layer].tensors()
            if kind in kinds
        )
        assert store.counters.bytes_read - before == wanted


def test_a_part_of_a_remote_memory_costs_a_part(tmp_path):
    (tmp_path / "r").mkdir()
    remote = f"file://{tmp_path / 'r'}"
    memory = build_memory(1, layers=4, slots=900, bias=True)
    with Store(tmp_path / "a", "process", remote=remote) as store:
        store.put(memory, "m")
    far = Store(tmp_path / "b", "process", remote=remote)
    far.pull("m", eager=False)
    found = far.peek("m", layers=[1], kinds=("keys",), slots=(300, 310))
    assert torch.equal(found[1]["keys"], memory.layers[1].keys[:, 300:310])
    part = far.get("m", layers=[2], slots=(0, 5))
    assert torch.equal(part.layers[2].values, memory.layers[2].values[:, :5])
    assert far.counters.fetched == 0 and far.du().local == 0  # no whole pack came
    assert far.get("m").digest == memory.digest


def test_damage_elsewhere_does_not_matter_and_damage_here_does(tmp_path):
    memory = build_memory(1, layers=2, slots=900)
    store = Store(tmp_path / "s", "process")
    store.put(memory, "m", codec="planes-zstd")  # one block an extent
    (path,) = (store.path / "packs").iterdir()
    pack = store._finder.header(path.stem)
    blocks = {(b.layer, b.kind, b.start): b.digest for b in memory.cut()}
    extent, _ = pack.entries[blocks[1, "keys", 512]]
    flip(path, extent.offset + extent.size // 2)
    fresh = Store(store.path)
    for how in ({"layers": [0]}, {"layers": [1], "slots": (0, 512)}, {"slots": (768, 900)}):
        assert fresh.peek("m", kinds=("keys",), **how)
    assert fresh.peek("m", kinds=("values",))
    for how in ({}, {"layers": [1]}, {"slots": (600, 601)}, {"layers": [1], "heads": [0]}):
        with pytest.raises(CorruptMemory):
            fresh.peek("m", kinds=("keys",), **how)


def test_bad_parts(case):
    store, _ = case
    for slots in ((5, 5), (-1, 3), (0, 901), (9, 3)):
        for read in (store.get, store.peek):
            with pytest.raises(InvalidArgument, match="slots"):
                read("m", slots=slots)
    for layers in ([4], [-5], [0, 9]):
        with pytest.raises(UnknownName):
            store.peek("m", layers=layers)
    with pytest.raises(InvalidArgument, match="empty"):
        store.peek("m", layers=[])
    for kinds in (("key",), ("keys", "tokens"), "key"):
        with pytest.raises(UnknownName, match="kind"):
            store.peek("m", kinds=kinds)
    for heads in ([3], [-4], [0, 17]):
        with pytest.raises(InvalidArgument, match="heads"):
            store.peek("m", kinds=("keys",), heads=heads)
    with pytest.raises(NotFound):
        store.peek("n")
    assert list(store.peek("m", [0], "keys")[0]) == ["keys"]
