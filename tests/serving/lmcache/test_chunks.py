"""What of a memory LMCache can hold, and why not the rest."""

import dataclasses
import math

import pytest
import torch

import kvedit as kv
from kvedit.cartridges.initial import random_vectors
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import Lineage
from kvedit.models.tiny import tiny_model
from kvedit.serving.lmcache.chunks import chunked

SIZE = 16


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def ids():
    torch.manual_seed(0)
    return torch.randint(3, 90, (40,)).tolist()


@pytest.fixture(scope="module")
def memory(tiny, ids):
    return kv.capture(*tiny, ids)


def edited(memory):
    """The same slots, made by an edit."""
    return kv.editors.Emphasize(span={"tokens": [2, 5]}, strength=0.0)(memory)


def test_whole_chunks_and_tail(memory, ids):
    cut = chunked(memory, SIZE)
    assert (cut.count, cut.slots, cut.tail) == (2, 32, 8)
    assert cut.tokens == tuple(ids)
    assert cut.salt == memory.digest
    keys, values = cut.chunk(1)
    for number, layer in memory.layers.items():
        assert torch.equal(keys[number], layer.keys[:, 16:32])
        assert torch.equal(values[number], layer.values[:, 16:32])


def test_salt_tells_memories_over_the_same_tokens_apart(memory):
    layer = memory.layers[0]
    other = memory.with_layers({0: dataclasses.replace(layer, values=layer.values + 1)})
    assert chunked(other, SIZE).salt != chunked(memory, SIZE).salt


def test_tail_of_an_edited_memory_is_refused_unless_asked_for(tiny, memory, ids):
    with pytest.raises(InvalidArgument, match=r"8 of its 40 tokens.*Use 32 or 48 tokens"):
        chunked(edited(memory), SIZE)
    assert chunked(edited(memory), SIZE, recompute_tail=True).tail == 8
    whole = kv.capture(*tiny, ids[:32])
    assert chunked(edited(whole), SIZE).tail == 0


def test_tail_of_a_memory_of_unknown_making_is_refused(memory):
    unknown = dataclasses.replace(memory, lineage=Lineage())
    with pytest.raises(InvalidArgument, match="behind the last whole chunk"):
        chunked(unknown, SIZE)


def test_tail_of_a_grown_memory_is_what_the_model_computes(tiny, memory):
    with kv.attach(tiny[0], memory, tiny[1]) as session:
        session.forward(torch.tensor([[11, 45]]))
        grown = session.memory()
    assert chunked(grown, SIZE).tail == 10


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda m, tiny: random_vectors(*tiny, 32, seed=1), "have no tokens"),
        (
            lambda m, tiny: kv.editors.Drop(span={"tokens": [3, 9]})(m),
            "34 slots are not its 40 tokens",
        ),
        (lambda m, tiny: kv.editors.Shift(offset=5)(m), "positions are not 0 to 39"),
        (
            lambda m, tiny: dataclasses.replace(m, next_position=41),
            "positions are not 0 to 39",
        ),
        (lambda m, tiny: kv.capture(*tiny, [5, 6, 7]), "3 tokens, less than a chunk of 16"),
    ],
    ids=["cartridge", "dropped", "shifted", "gap before the query", "short"],
)
def test_refused_by_name(tiny, memory, make, told):
    with pytest.raises(InvalidArgument, match=told):
        chunked(make(memory, tiny), SIZE)


@pytest.mark.parametrize(
    ("size", "told"), [(0.3, "attention bias"), (math.log(2), "becomes 43 slots for 40 tokens")]
)
def test_bias_is_never_dropped(memory, size, told):
    changed = {}
    for index, layer in memory.layers.items():
        bias = torch.zeros(memory.model.layers[index].query_heads, layer.slots)
        bias[:, 2:5] = size
        changed[index] = layer.add_bias(bias)
    with pytest.raises(InvalidArgument, match=told):
        chunked(memory.with_layers(changed), SIZE)


def test_windows_are_refused():
    tiny = tiny_model("mistral")
    with pytest.raises(UnsupportedModel, match="layers that see the whole context"):
        chunked(kv.capture(*tiny, list(range(5, 40)), window="whole"), SIZE)
