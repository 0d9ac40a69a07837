"""What every editor promises, over the editor matrix and one family per mechanism."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from kvedit.editors import REGISTRY, Emphasize, build
from kvedit.editors.base import registered_name
from kvedit.errors import MutatedMemory, UnsupportedModel
from kvedit.memory import KVMemory
from kvedit.testing import EDITOR_CASES, EDITOR_FAMILIES, EditorCase, make_test_operand

by_name = {"ids": lambda case: case.name}
every_case = pytest.mark.parametrize("case", EDITOR_CASES, **by_name)
every_pair = pytest.mark.parametrize(
    ("case", "family"),
    [(c, f) for c in EDITOR_CASES for f in EDITOR_FAMILIES if c.learned or f != "gpt2"],
    ids=lambda value: getattr(value, "name", value),
)


def fresh_digest(memory: KVMemory) -> str:
    """The content digest, not taken from what an earlier call kept."""
    return dataclasses.replace(memory).digest


def test_every_registered_editor_has_a_row() -> None:
    assert {case.editor for case in EDITOR_CASES} == set(REGISTRY)
    assert len({case.name for case in EDITOR_CASES}) == len(EDITOR_CASES)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_the_registry_and_the_class_agree_on_the_name(name: str) -> None:
    assert registered_name(REGISTRY.load(name)) == name


@every_pair
def test_an_edit_changes_neither_its_input_nor_the_model(
    case: EditorCase, family: str, subject: Any
) -> None:
    found = subject(family)
    editor = case.build()
    operands = [make_test_operand(k, found.model, found.tokenizer) for k in editor.operands]
    before = (fresh_digest(found.memory), found.weights(), found.memory.lineage)
    kept = [fresh_digest(operand) for operand in operands]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    found.apply(editor)
    found.memory.check_unmodified()
    assert (fresh_digest(found.memory), found.weights(), found.memory.lineage) == before
    assert torch.equal(random, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert [fresh_digest(operand) for operand in operands] == kept


@every_pair
def test_content_changes_exactly_where_the_row_says(
    case: EditorCase, family: str, subject: Any
) -> None:
    memory = subject(family).memory
    edited = subject(family).apply(case.build())
    assert (edited.digest == memory.digest) == case.identity
    counts = [[layer.slots for layer in m.layers.values()] for m in (edited, memory)]
    assert (counts[0] != counts[1]) == case.slots
    assert (edited.rules != memory.rules) == case.rules
    if case.identity or case.rules:
        for old, new in zip(memory.layers.values(), edited.layers.values(), strict=True):
            assert dict(new.tensors()).keys() == dict(old.tensors()).keys()
            assert all(getattr(new, name) is tensor for name, tensor in old.tensors())


@every_case
def test_layers_that_an_edit_leaves_alone_are_shared(case: EditorCase, subject: Any) -> None:
    memory = subject("llama").memory
    edited = subject("llama").apply(case.build())
    named = case.parameters.get("layers")
    for index, layer in edited.layers.items():
        if named is not None and index not in memory.layer_indices(named):
            assert layer is memory.layers[index]
    if named is not None and not case.identity and not case.rules:
        assert all(edited.layers[i] is not memory.layers[i] for i in memory.layer_indices(named))


@every_case
def test_only_shift_moves_slots(case: EditorCase, subject: Any) -> None:
    memory = subject("gemma3").memory
    edited = subject("gemma3").apply(case.build())
    moved = edited.next_position - memory.next_position
    assert (moved != 0) == ("shift" in case.name and not case.identity)
    for index, layer in edited.layers.items():
        old = memory.layers[index]
        pairs = dict(zip(old.source.tolist(), old.positions.tolist(), strict=True))
        held = zip(layer.positions.tolist(), layer.source.tolist(), strict=True)
        found = [pair for pair in held if pair[1] >= 0]  # slots of no token stand where they may
        assert [p for p, _ in found] == [pairs[s] + moved for _, s in found]


@every_case
def test_equal_configuration_is_equal_identity(case: EditorCase, subject: Any) -> None:
    first, second = case.build(), case.build()
    assert first == second
    assert hash(first) == hash(second)
    one, two = subject("llama").apply(first), subject("llama").apply(second)
    assert one.digest == two.digest
    assert one.lineage.head.id == two.lineage.head.id


@every_case
def test_lineage_replays_from_its_own_parameters(case: EditorCase, subject: Any) -> None:
    found = subject("gemma3")
    editor = case.build()
    edited = found.apply(editor)
    operands = [make_test_operand(k, found.model, found.tokenizer) for k in editor.operands]
    inputs = [m.lineage.head.id for m in (found.memory, *operands)]
    before = dict.fromkeys(n.id for m in (found.memory, *operands) for n in m.lineage.nodes)
    node = edited.lineage.head
    assert [n.id for n in edited.lineage.nodes] == [*before, node.id]
    assert (node.operation, node.inputs) == ("edit", tuple(inputs))
    known = (case.editor, editor.reproducibility, editor.version)
    assert (node.name, node.reproducibility, node.version) == known
    rebuilt = build(node.name, **json.loads(node.parameters))
    assert rebuilt == editor
    again = found.apply(rebuilt)
    assert again.digest == edited.digest
    assert again.lineage.head.id == node.id


@every_case
def test_a_chain_is_one_edit_after_the_other(case: EditorCase, subject: Any) -> None:
    found = subject("qwen3")
    first, second = case.build(), Emphasize({"slots": [0, 4]}, strength=0.7, layers=(0,))
    apart = second(found.apply(first))
    chained = found.apply(build("chain", editors=[first, second]))
    assert chained.digest == apart.digest
    assert [node.name for node in apart.lineage.nodes[-2:]] == [case.editor, "emphasize"]
    assert len(chained.lineage.nodes) == len(apart.lineage.nodes) - 1
    assert chained.lineage.head.name == "chain"
    assert chained.lineage.head.id != apart.lineage.head.id


@pytest.mark.parametrize("case", [c for c in EDITOR_CASES if not c.learned], **by_name)
def test_learned_positions_are_refused_by_name(case: EditorCase, subject: Any) -> None:
    with pytest.raises(UnsupportedModel, match="learned absolute positions"):
        subject("gpt2").apply(case.build())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_case
def test_dtype_and_verification_survive(case: EditorCase, dtype: torch.dtype, subject: Any) -> None:
    memory = subject("llama").memory.to(dtype=dtype)
    edited = subject("llama").apply(case.build(), memory)
    for layer in edited.layers.values():
        assert (layer.keys.dtype, layer.values.dtype) == (dtype, dtype)
        assert layer.bias is None or layer.bias.dtype == torch.float32
    assert edited.verified is memory.verified


@every_case
def test_a_memory_that_was_written_to_is_refused(case: EditorCase, subject: Any) -> None:
    memory = subject("llama").memory
    copies = {i: layer.select(torch.arange(layer.slots)) for i, layer in memory.layers.items()}
    copy = memory.with_layers(copies)
    copy.layers[1].values[0, 0, 0] += 1
    with pytest.raises(MutatedMemory, match="values were changed in place"):
        subject("llama").apply(case.build(), copy)
