"""What can't be said in plain keys and values is refused with the reason and the way out."""

import dataclasses
import re

import pytest
import torch

import kvedit as kv
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.interop import from_peft, to_hazy, to_peft
from kvedit.interop.prefix import prefix_of
from kvedit.memory import KVMemory
from kvedit.memory.operand import make_operand
from kvedit.models.rope import unrotate
from kvedit.testing.operands import apply_editor

SPAN = {"tokens": [8, 20]}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (kv.editors.Emphasize(span=SPAN, strength=1.0), "bias, which.*Compile"),
        (kv.editors.Suppress(span=SPAN, strength=float("inf"), heads=[0]), "-inf.*packed"),
        (kv.editors.Drop(span=SPAN, layers=[1]), "differ in slots .layer 1: "),
        (kv.editors.SpotLight(spans=[SPAN], target=0.4), "rules .mass.*edit without"),
    ],
    ids=["bias", "evicted", "ragged", "rules"],
)
@pytest.mark.parametrize("write", [to_peft, to_hazy])
def test_edits_that_need_more_than_keys(llama, tmp_path, edit, says, write):
    with pytest.raises(InvalidArgument, match=says):
        write(edit(llama.whole), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_all_reasons_are_said_at_once(llama, tmp_path):
    memory = kv.editors.Emphasize(span=SPAN, strength=1.0)(
        kv.editors.Drop(span={"tokens": [0, 4]}, layers=[0])(llama.whole)
    )
    with pytest.raises(InvalidArgument, match=r"differ in slots.*bias"):
        to_peft(memory, tmp_path / "a")


def test_memories_that_are_not_whole(llama, case_of, tmp_path):
    some = kv.capture(llama.model, llama.tokenizer, "The thing.", layers=[0, 2])
    with pytest.raises(InvalidArgument, match=r"layers \[0, 2\] of 3: capture all"):
        to_peft(some, tmp_path / "a")
    gemma = case_of("gemma3")
    windowed = kv.capture(gemma.model, None, gemma.whole.tokens, window="windowed")
    with pytest.raises(InvalidArgument, match="window='whole'"):
        to_peft(windowed, tmp_path / "a")
    empty = {index: layer.select(torch.arange(0)) for index, layer in llama.whole.layers.items()}
    with pytest.raises(InvalidArgument, match="no slots"):
        to_peft(llama.whole.with_layers(empty), tmp_path / "a")
    operand = make_operand(
        "queries", {i: one.keys for i, one in llama.whole.layers.items()}, llama.whole.model,
        llama.whole.lineage,
    )  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"operand of editors .queries"):
        to_peft(operand, tmp_path / "a")


def with_shapes(memory, **shapes):
    """The same memory of a model whose middle layer has another shape."""
    layers = list(memory.model.layers)
    layers[1] = dataclasses.replace(layers[1], **shapes)
    spec = dataclasses.replace(memory.model, layers=tuple(layers))
    sizes = layers[1].kv_heads, memory.slots
    middle = dataclasses.replace(
        memory.layers[1],
        keys=torch.ones(*sizes, layers[1].key_dim),
        values=torch.ones(*sizes, layers[1].value_dim),
    )
    return KVMemory({**memory.layers, 1: middle}, spec, memory.next_position)


@pytest.mark.parametrize(
    "shapes", [{"kv_heads": 1}, {"key_dim": 8, "value_dim": 8}, {"value_dim": 8}]
)
def test_layers_of_different_shapes(llama, tmp_path, shapes):
    bare = dataclasses.replace(llama.whole, source=None, layers={
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in llama.whole.layers.items()
    })  # fmt: skip
    memory = with_shapes(bare, **shapes)
    with pytest.raises(InvalidArgument, match="one number of KV heads and one head size"):
        to_peft(memory, tmp_path / "a")
    to_peft(llama.whole, tmp_path / "b")
    with pytest.raises(InvalidArgument, match="different KV shapes"):
        from_peft(tmp_path / "b", memory.model, strict=False)


def test_positions_that_can_not_move(case_of, tmp_path):
    for family in ("gpt2", "opt"):
        case = case_of(family)
        with pytest.raises(UnsupportedModel, match="learned absolute positions"):
            to_peft(case.compact, tmp_path / family)
        to_peft(case.whole, tmp_path / family)  # nothing has to move
    llama4 = case_of("llama4_text")
    with pytest.raises(UnsupportedModel, match="chunks of 16"):
        to_peft(llama4.compact, tmp_path / "a")
    to_peft(llama4.whole, tmp_path / "a")


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_changes_with_length(rope, tmp_path):
    from kvedit.models.tiny import tiny_model

    model, tokenizer = tiny_model("llama", rope=rope)
    ids = tokenizer("The thing in the box is the answer. " * 8, return_tensors="pt").input_ids[0]
    if rope == "longrope":  # dynamic NTK ends at the 64 positions of this toy
        long = kv.editors.Drop(span={"tokens": [4, 40]})(kv.capture(model, None, ids[:80]))
        with pytest.raises(UnsupportedModel, match="changes its frequencies at position 64"):
            to_peft(long, tmp_path / "a")
    short = kv.editors.Drop(span={"tokens": [4, 20]})(kv.capture(model, None, ids[:50]))
    assert to_peft(short, tmp_path / "b").moved == -16


@pytest.mark.parametrize("family", ["gemma3", "mistral", "cohere2"])
def test_windows_see_the_same_slots_or_it_is_refused(case_of, far, tmp_path, family):
    """The window is counted by slot over there: a gap within it would let old slots in."""
    case = case_of(family)
    slots = case.whole.slots
    near = kv.editors.Drop(span={"tokens": [slots - 6, slots - 3]})(case.whole)
    with pytest.raises(InvalidArgument, match=r"sees 8 positions.*keep the last 8 tokens whole"):
        to_peft(near, tmp_path / "near")
    # a gap just outside of the window of 8 is none
    edge = kv.editors.Drop(span={"tokens": [slots - 12, slots - 7]})(case.whole)
    to_peft(edge, tmp_path / "edge")
    back = from_peft(tmp_path / "edge", case.model)
    assert far(case.logits(back), case.logits(edge)) <= 1e-5
    # and one slot nearer, the memory over there is another one: the refusal is not idle
    spec = case.whole.model
    open_spec = dataclasses.replace(
        spec,
        layers=tuple(dataclasses.replace(one, window=None, kind="full") for one in spec.layers),
    )
    forced = prefix_of(dataclasses.replace(near, model=open_spec))
    layers = {
        index: dataclasses.replace(
            near.layers[index], keys=forced.keys[index], positions=torch.arange(near.slots)
        )
        for index in near.layers
    }
    moved = dataclasses.replace(near, layers=layers, next_position=near.slots)
    assert far(case.logits(moved), case.logits(near)) > 1e-3


def test_turning_keys_against_a_rotation_written_out(llama):
    """Keys un-rotated where they stood and rotated anew where they go, in float64."""
    prefix = prefix_of(llama.compact)
    moved = llama.compact.slots - llama.compact.next_position
    assert prefix.moved == moved < -4
    for index, layer in llama.compact.layers.items():
        rope = llama.compact.model.layers[index].rope
        bare = unrotate(layer.keys.double(), rope, layer.positions)
        angle = (layer.positions + moved)[:, None] * torch.tensor(rope.inv_freq).double()
        cos, sin = angle.cos(), angle.sin()
        first, second = bare.chunk(2, dim=-1)
        wanted = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        torch.testing.assert_close(prefix.keys[index].double(), wanted, atol=1e-5, rtol=0)


def test_bias_compiled_into_keys_can_be_exported(llama, far, tmp_path):
    biased = kv.editors.Emphasize(span=SPAN, strength=0.5)(llama.whole)
    compile_it = kv.editors.build("compile", mean_tolerance=1e3, spread_tolerance=1e3)
    compiled = apply_editor(compile_it, biased, llama.model, llama.tokenizer)
    to_peft(compiled, tmp_path / "a")
    back = from_peft(tmp_path / "a", llama.model)
    assert far(llama.logits(back), llama.logits(compiled)) <= 1e-5
    assert far(llama.logits(back), llama.logits(llama.whole)) > 1e-4


@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_heads_that_keep_different_slots(llama, far, tmp_path, layout):
    """Packed, each head has slots at positions of its own: one turn moves them all."""
    edit = kv.editors.build("knorm", budget=24, sinks=2, layout=layout)
    memory = edit(llama.whole)
    if layout == "masked":
        with pytest.raises(InvalidArgument, match=r"heads lack slots|differ in slots"):
            to_peft(memory, tmp_path / "a")
        return
    assert to_peft(memory, tmp_path / "a").slots == 24
    back = from_peft(tmp_path / "a", llama.model)
    assert far(llama.logits(back), llama.logits(memory)) <= 1e-5


@pytest.mark.parametrize("frozen", [-1, 21, True, 1.0])
def test_frozen_slots_are_counted(llama, tmp_path, frozen):
    with pytest.raises(InvalidArgument, match=re.escape(f"0 to 20, found {frozen!r}")):
        to_peft(llama.compact, tmp_path / "a", frozen=frozen)


def test_kinds_are_peft_s_own(llama, tmp_path):
    with pytest.raises(InvalidArgument, match="CARTRIDGE or PREFIX_TUNING, found 'LORA'"):
        to_peft(llama.compact, tmp_path / "a", kind="LORA")
