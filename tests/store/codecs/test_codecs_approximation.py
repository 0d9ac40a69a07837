"""A lossy memory: what the store would give back, its error, and edits that the error hides."""

import dataclasses
import json

import pytest
import torch

from kvedit.errors import InvalidArgument, MutatedMemory, UnknownName
from kvedit.memory import Lineage
from kvedit.store.codecs import (
    CODECS,
    LOSSLESS,
    LOSSY,
    approximate,
    check_against_edit,
    decode,
    encode,
)
from tests.store.conftest import build_memory, with_bias


def through_blocks(memory, codec):
    """Every block of keys and values encoded and decoded, joined again."""
    joined = {}
    for block in memory.cut():
        if block.kind in ("keys", "values"):
            made = encode(block.tensor, block.kind, codec, 1)
            shape = tuple(block.tensor.shape)
            found = decode(made.encoding, made.data, block.tensor.dtype, shape, block.kind)
            joined.setdefault((block.layer, block.kind), []).append(found)
    return {place: torch.cat(pieces, dim=1) for place, pieces in joined.items()}


def edited(memory, amount, slots=slice(10, 20), layer=1, kind="values"):
    changed = getattr(memory.layers[layer], kind).clone()
    changed[:, slots] += amount
    return memory.with_layers({layer: dataclasses.replace(memory.layers[layer], **{kind: changed})})


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_the_blocks_decode_to(codec, dtype):
    memory = build_memory(slots=300, dtype=dtype, ragged=True, bias=True, dim=48)
    found, error = approximate(memory, codec)
    for (layer, kind), expected in through_blocks(memory, codec).items():
        tensor = getattr(found.layers[layer], kind)
        assert torch.equal(tensor, expected) and tensor.is_contiguous()
        assert (codec in LOSSY) == (not torch.equal(tensor, getattr(memory.layers[layer], kind)))
    for layer in memory.layers:
        for name in ("positions", "source", "bias"):
            assert getattr(found.layers[layer], name) is getattr(memory.layers[layer], name)
    assert (found.digest != memory.digest) == (codec in LOSSY)
    assert approximate(memory, codec)[0].digest == found.digest
    assert error.codec == codec


@pytest.mark.parametrize("codec", LOSSY)
def test_error_is_measured(codec):
    memory = build_memory(slots=300, dim=48)
    found, error = approximate(memory, codec)
    for kind in ("keys", "values"):
        pairs = [
            (getattr(memory.layers[i], kind), getattr(found.layers[i], kind)) for i in (0, 1, 2)
        ]
        gaps = [float((a - b).abs().max()) for a, b in pairs]
        assert error.max_abs[kind] == pytest.approx(max(gaps))
        ratios = [float((a - b).norm() / a.norm()) for a, b in pairs]
        assert error.relative[kind] == pytest.approx(max(ratios), rel=1e-5)
    plain = error.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["codec"] == codec and set(plain["max_abs"]) == {"keys", "values"}


def test_more_bits_less_error():
    memory = build_memory(slots=300, dim=64)
    errors = [approximate(memory, codec)[1].relative for codec in LOSSY]
    for kind in ("keys", "values"):
        int8, int4, int2 = (error[kind] for error in errors)
        assert 0 < int8 < int4 / 5 < int2 / 10


@pytest.mark.parametrize("codec", LOSSY)
def test_lineage_gets_one_step(codec):
    memory = build_memory()
    found, _ = approximate(memory, codec)
    node = found.lineage.head
    assert found.lineage.nodes[:-1] == memory.lineage.nodes
    assert (node.operation, node.name, node.version) == ("edit", "codec", 1)
    assert json.loads(node.parameters) == {"codec": codec}
    assert node.inputs == (memory.lineage.head.id,) and node.reproducibility == "pure"
    bare = dataclasses.replace(memory, lineage=Lineage())
    assert approximate(bare, codec)[0].lineage.head.inputs == (memory.digest,)


@pytest.mark.parametrize("codec", LOSSLESS)
def test_lossless_changes_nothing(codec):
    memory = build_memory()
    found, error = approximate(memory, codec)
    assert found is memory
    assert error.max_abs == {} and error.relative == {}
    check_against_edit(error, edited(memory, 1e-6), memory, force=False)


def test_empty_and_tiny_memories():
    for memory in (build_memory(slots=0, source=None), build_memory(slots=1, layers=1)):
        for codec in LOSSY:
            found, error = approximate(memory, codec)
            assert found.slots == memory.slots
            json.dumps(error.to_json(), allow_nan=False)


def test_what_is_refused():
    memory = build_memory()
    with pytest.raises(UnknownName):
        approximate(memory, "int3")
    with pytest.raises(InvalidArgument, match=r"int4.*values hold NaN"):
        approximate(edited(memory, torch.nan), "int4")
    memory.layers[0].keys[0, 0, 0] += 1
    with pytest.raises(MutatedMemory):
        approximate(memory, "int8")


@pytest.mark.parametrize("kind", ["keys", "values"])
@pytest.mark.parametrize("codec", LOSSY)
def test_an_edit_below_the_error_is_refused(codec, kind):
    before = build_memory(slots=300, dim=64)
    for amount, lost in ((1e-4, True), (20.0, False)):
        memory = edited(before, amount, kind=kind)
        _, error = approximate(memory, codec)
        if lost:
            with pytest.raises(InvalidArgument, match=rf"{codec}.*layer 1, {kind}, 10 slots"):
                check_against_edit(error, before, memory, force=False)
            check_against_edit(error, before, memory, force=True)
        else:
            check_against_edit(error, before, memory, force=False)
        check_against_edit(error, None, memory, force=False)


def test_the_bar_is_a_tenth_over_the_changed_slots_only():
    before = build_memory(slots=300, dim=64)
    base = edited(before, 1.0)
    _, error = approximate(base, "int8")
    at_slots = float(torch.tensor(error.parts[1, "values"].slots[10:20]).norm())
    everywhere = error.parts[1, "values"].error
    assert at_slots < 0.3 * everywhere
    for factor in (9.5, 10.5):
        # The same approximated memory, an edit of a chosen norm.
        step = torch.zeros_like(base.layers[1].values)
        step[:, 10:20] = torch.randn(2, 10, 64)
        step *= factor * at_slots / step.norm()
        layer = dataclasses.replace(base.layers[1], values=base.layers[1].values - step)
        original = base.with_layers({1: layer})
        if factor < 10:
            with pytest.raises(InvalidArgument, match="10 slots"):
                check_against_edit(error, original, base, force=False)
        else:
            check_against_edit(error, original, base, force=False)


def test_other_slots_and_edits_of_bias_are_not_compared():
    before = build_memory(slots=300, dim=64)
    _, error = approximate(before, "int2")
    check_against_edit(error, before, before, force=False)
    check_against_edit(error, before, with_bias(before), force=False)
    half = before.to(dtype=torch.bfloat16)
    check_against_edit(approximate(half, "int2")[1], before, half, force=False)


def test_slots_are_matched_by_their_tokens():
    before = build_memory(slots=300, dim=64)
    kept = torch.arange(300) % 3 != 0
    shorter = before.with_layers({i: layer.select(kept) for i, layer in before.layers.items()})
    check_against_edit(approximate(shorter, "int2")[1], before, shorter, force=False)
    memory = edited(shorter, 1e-4)
    with pytest.raises(InvalidArgument, match="layer 1, values, 10 slots"):
        check_against_edit(approximate(memory, "int8")[1], before, memory, force=False)


def test_slots_that_no_token_made_are_not_compared():
    first = build_memory(slots=50, source=None)
    head = torch.arange(50) < 40
    second = first.with_layers({i: layer.select(head) for i, layer in first.layers.items()})
    shorter = edited(second, 1e-4, slots=slice(0, 10))
    check_against_edit(approximate(shorter, "int8")[1], first, shorter, force=False)
    shifted = edited(second, 1e-4)
    with pytest.raises(InvalidArgument, match="layer 1, values, 10 slots"):
        check_against_edit(approximate(shifted, "int8")[1], second, shifted, force=False)


def test_memories_that_do_not_belong_together():
    memory, other = build_memory(dim=64), build_memory(dim=32)
    _, error = approximate(memory, "int8")
    with pytest.raises(InvalidArgument, match="pass the memory that was edited"):
        check_against_edit(error, other, memory, force=False)
    shorter = build_memory(dim=64, slots=200)
    with pytest.raises(InvalidArgument, match="pass the memory that was edited"):
        check_against_edit(error, memory, shorter, force=False)
