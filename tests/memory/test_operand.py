"""Operands: stored like memories, given to editors, never attached."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.editors import Chain, Emphasize
from kvedit.editors.base import Editor
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import Lineage
from kvedit.memory.operand import make_operand, operand_facts, operand_kind
from kvedit.models.tiny import tiny_model

MODEL, TOKENIZER = None, None


@pytest.fixture(scope="module")
def found():
    model, tokenizer = tiny_model("llama")
    return model, tokenizer, kv.capture(model, tokenizer, "The refund window is 60 days.")


def operand_of(memory, kind="queries", **facts):
    drawn = torch.Generator().manual_seed(0)
    vectors = {
        i: torch.randn(layer.heads, 5, layer.keys.shape[2], generator=drawn)
        for i, layer in memory.layers.items()
    }
    return make_operand(kind, vectors, memory.model, Lineage(), **facts)


class AddFirst(Editor):
    """Adds the operand's first vector to every key."""

    operands = ("queries",)

    def edit(self, *memories, reader=None):
        memory, operand = memories
        changed = {
            i: type(layer)(
                layer.keys + operand.layers[i].keys[:, :1],
                layer.values,
                layer.positions,
                layer.source,
                layer.bias,
            )
            for i, layer in memory.layers.items()
        }
        return memory.with_layers(changed)


def test_an_operand_goes_through_a_store(found, tmp_path):
    operand = operand_of(found[2], samples=5, note="held")
    with kv.Store(tmp_path) as store:
        store.put(operand, "operands/queries")
        again = store.get("operands/queries")
    assert again.digest == operand.digest
    assert operand_kind(again) == "queries"
    facts = operand_facts(again, "queries")
    assert (facts["samples"], facts["note"]) == (5, "held")
    assert torch.equal(again.layers[1].keys, operand.layers[1].keys)
    assert operand_kind(found[2]) is None
    with pytest.raises(InvalidArgument, match="one of kind 'queries'"):
        operand_facts(again, "projectors")
    with pytest.raises(InvalidArgument, match="memory of a context"):
        operand_facts(found[2], "queries")


def test_attach_refuses_an_operand(found):
    model, tokenizer, memory = found
    with pytest.raises(UnsupportedModel, match=r"operand of editors.*'queries'"):
        kv.generate(model, tokenizer, operand_of(memory), " so", max_new_tokens=1)


def test_an_editor_gets_its_operand_and_the_lineage_names_it(found):
    memory = found[2]
    operand = operand_of(memory)
    edited = AddFirst()(memory, operand)
    assert edited.lineage.head.inputs == (memory.lineage.head.id, operand.digest)
    for given in ((memory,), (memory, memory), (operand, operand), (memory, operand, operand)):
        with pytest.raises(InvalidArgument, match="then an operand of kind 'queries'"):
            AddFirst()(*given)


def test_a_chain_hands_operands_on(found):
    memory = found[2]
    operand = operand_of(memory)
    first = Emphasize(span="60 days", strength=1.0)
    chain = Chain((first, AddFirst(), AddFirst()))
    assert chain.operands == ("queries",)
    whole = chain(memory, operand)
    steps = AddFirst()(AddFirst()(first(memory), operand), operand)
    assert whole.digest == steps.digest
    with pytest.raises(InvalidArgument, match="operand"):
        chain(memory)
