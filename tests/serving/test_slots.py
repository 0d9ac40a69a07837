"""What an engine gets does what the memory does: HF over plain slots, counted from 0, agrees."""

import dataclasses
import math

import pytest
import torch

import kvedit as kv
from kvedit.cartridges.initial import random_vectors
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import KVMemory, LayerKV
from kvedit.memory.operand import make_operand
from kvedit.models.tiny import tiny_model
from kvedit.serving import multiplied, served
from kvedit.serving.multiplicity import MOST
from kvedit.testing.operands import apply_editor

TEXT = "The thing in the box is the answer. The refund window is 60 days, and you would wait."
NEXT = torch.tensor([[11, 45, 7, 80, 23]])
FAMILIES = ("llama", "qwen2", "qwen3", "phi3")
ROPES = ("linear", "yarn", "llama3")


def captured(family, **options):
    model, tokenizer = tiny_model(family, **options)
    return model, tokenizer, kv.capture(model, tokenizer, TEXT)


@pytest.fixture(scope="module")
def llama():
    return captured("llama")


def as_engine(memory):
    """The memory as an engine has it: plain slots at 0 to p - 1, and nothing else."""
    plain = served(memory)
    positions = torch.arange(plain.slots)
    nowhere = torch.full((plain.slots,), -1, dtype=torch.int64)
    layers = {
        index: LayerKV(key, value, positions, nowhere)
        for index, (key, value) in enumerate(zip(plain.keys, plain.values, strict=True))
    }
    return KVMemory(layers, memory.model, plain.slots)


def logits(model, memory):
    with kv.attach(model, memory) as session:
        return session.forward(NEXT)


def with_bias(memory, *rows):
    changed = {}
    for index, layer in memory.layers.items():
        bias = torch.zeros(memory.model.layers[index].query_heads, layer.slots)
        for start, stop, size in rows:
            bias[:, start:stop] = size
        changed[index] = layer.add_bias(bias)
    return memory.with_layers(changed)


def close(model, memory):
    found, wanted = logits(model, as_engine(memory)), logits(model, memory)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
    return wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_are_closed(family):
    model, _, memory = captured(family)
    dropped = kv.editors.Drop(span={"tokens": [4, 11]})(memory)
    assert served(dropped).moved == -7
    assert (close(model, dropped) - logits(model, memory)).abs().max() > 0.01


@pytest.mark.parametrize("rope", ROPES)
def test_gaps_are_closed_under_fixed_scalings(rope):
    model, _, memory = captured("llama", rope=rope)
    close(model, kv.editors.Drop(span={"tokens": [4, 11]})(memory))


@pytest.mark.parametrize(
    "edit",
    [
        kv.editors.Knorm(budget=9, heads="shared"),
        kv.editors.Knorm(budget=9, layout="packed", rerotate=True),
        kv.editors.Knorm(budget=9, layout="packed", rerotate=False),
        kv.editors.Shift(5),
        kv.editors.Duplicate(spans=({"tokens": [3, 6]},), times=3),
    ],
    ids=["shared", "packed", "packed in place", "shifted", "duplicated"],
)
def test_compacted_and_moved(llama, edit):
    model, tokenizer, memory = llama
    close(model, apply_editor(edit, memory, model, tokenizer))


def test_what_needs_no_change_is_left_alone(llama):
    model, tokenizer, memory = llama
    for one in (memory, random_vectors(model, tokenizer, 9)):
        found = served(one)
        assert found.moved == 0 and found.digest == one.digest and found.slots == one.slots
        assert all(torch.equal(k, one.layers[i].keys) for i, k in enumerate(found.keys))
        assert found.nbytes == sum(tensor.nbytes for tensor in (*found.keys, *found.values))
    assert served(memory, torch.bfloat16).keys[0].dtype == torch.bfloat16


def test_whole_multiples_equal_the_bias(llama):
    model, _, memory = llama
    biased = with_bias(memory, (3, 6, math.log(2)), (8, 9, math.log(5)))
    assert served(biased).slots == memory.slots + 3 + 4
    assert (close(model, biased) - logits(model, memory)).abs().max() > 0.01


def test_slots_that_all_heads_lack_are_left_out(llama):
    model, _, memory = llama
    evicted = with_bias(memory, (2, 7, -math.inf))
    assert served(evicted).slots == memory.slots - 5
    close(model, evicted)
    assert multiplied(with_bias(memory, (0, 1, 0.0))).layers[0].bias is None
    assert multiplied(memory) is memory


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (kv.editors.Emphasize(span={"tokens": [3, 6]}, strength=1.0), "1 is not log m.*Compile"),
        (kv.editors.Suppress(span={"tokens": [3, 6]}, strength=0.5), "-0.5 is not log m"),
        (kv.editors.Emphasize(span={"tokens": [3, 6]}, strength=math.log(2), heads=[0]), "differs"),
        (kv.editors.Emphasize(span={"tokens": [3, 6]}, strength=math.log(MOST + 1)), "up to 64"),
        (kv.editors.Knorm(budget=9, heads="each", layout="masked"), "some heads lack.*packed"),
        (kv.editors.SpotLight(spans=[{"tokens": [3, 6]}], target=0.4), "rules .mass.*--engine hf"),
        (kv.editors.Drop(span={"tokens": [3, 6]}, layers=[1]), "differ in slots"),
    ],
    ids=["bias", "negative", "one head", "too often", "masked", "rules", "ragged"],
)
def test_what_plain_slots_cannot_say(llama, edit, says):
    model, tokenizer, memory = llama
    with pytest.raises(InvalidArgument, match=says):
        served(apply_editor(edit, memory, model, tokenizer))


def test_bias_in_one_layer_alone_makes_layers_differ(llama):
    _, _, memory = llama
    layer = memory.layers[1]
    one = layer.add_bias(torch.full((memory.model.layers[1].query_heads, layer.slots), math.log(2)))
    with pytest.raises(InvalidArgument, match="differ in slots"):
        served(memory.with_layers({1: one}))


def test_operands_and_parts(llama):
    model, tokenizer, memory = llama
    keys = {index: layer.keys for index, layer in memory.layers.items()}
    with pytest.raises(InvalidArgument, match=r"operand of editors .queries"):
        served(make_operand("queries", keys, memory.model, memory.lineage))
    with pytest.raises(InvalidArgument, match="capture all layers"):
        served(kv.capture(model, tokenizer, TEXT, layers=[0, 2]))


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("mistral", "layer 0 of .* is a sliding layer over 8 positions.*--engine hf"),
        ("gemma2", "sliding layer"),
        ("smollm3", "has no RoPE while others have"),
    ],
)
def test_layers_that_do_not_see_everything(family, says):
    _, _, memory = captured(family)
    with pytest.raises(UnsupportedModel, match=says):
        served(memory)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length(rope):
    _, _, memory = captured("llama", rope=rope)
    with pytest.raises(UnsupportedModel, match=f"{rope} RoPE changes its frequencies"):
        served(memory)


def test_learned_positions_cannot_move():
    model, _, memory = captured("gpt2")
    close(model, memory)
    with pytest.raises(UnsupportedModel, match="learned absolute positions"):
        served(kv.editors.Drop(span={"tokens": [2, 4]})(memory))


def test_a_changed_memory_is_refused(llama):
    _, _, memory = llama
    layer = memory.layers[0]
    copied = memory.with_layers({0: dataclasses.replace(layer, keys=layer.keys.clone())})
    copied.layers[0].keys[0, 0, 0] = 1.0
    with pytest.raises(kv.errors.MutatedMemory):
        served(copied)
