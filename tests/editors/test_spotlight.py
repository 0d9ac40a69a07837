"""SpotLight, end to end: every layer's output against attention by hand, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize, SpotLight
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import MassRule, read_rules

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
SPANS = ({"sentence": "That is"}, {"text": "you would"}, {"tokens": (-6, -2)})
SITES = ("queries", "keys", "values", "output")
OUTPUT = 1e-5  # relative to the largest value of the layer


def by_hand(tap: Any, memory: Any, layer: int, editor: SpotLight) -> torch.Tensor:
    """A layer's output [query_head, query, dim] of new tokens, from what attention was given."""
    facts, held = memory.model.layers[layer], memory.layers[layer]
    queries, keys, values = (tap[site, layer][0].double() for site in SITES[:3])
    count = queries.shape[1]
    new = torch.arange(count) + memory.next_position
    slots = torch.cat((held.positions, new))
    seen = slots[None, :] <= new[:, None]
    if facts.window:
        seen &= slots[None, :] > new[:, None] - facts.window
    inside = torch.zeros(len(slots), dtype=torch.bool)
    for span in editor.spans:
        inside[: held.slots] |= memory.resolve(span).mask(held)
    heads = (editor.heads or HeadSet.all(memory.model)).mask(memory.model, layer)
    bias = torch.zeros(facts.query_heads, len(slots))
    if held.bias is not None:
        bias[:, : held.slots] = held.bias
    rows = []
    for head in range(facts.query_heads):
        logits = queries[head] @ keys[head // facts.group].T * facts.scale + bias[head]
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        mass = weights[:, inside].sum(-1, keepdim=True)
        wanted = torch.full_like(mass, editor.target)
        if editor.form == "spotlight":
            wanted = editor.target / (editor.target + 1 - mass)
        if editor.raise_only:
            wanted = torch.where(mass < editor.target, wanted, mass)
        if bool(heads[head]):
            factors = torch.where(inside, wanted / mass, (1 - wanted) / (1 - mass))
            weights = torch.where(mass > 0, weights * factors, weights)
        rows.append(weights @ values[head // facts.group])
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "editor",
    [
        SpotLight(SPANS, 0.6),
        SpotLight(SPANS, 0.6, "spotlight"),
        SpotLight("That is", 0.05, raise_only=False),
        SpotLight(SPANS, 0.7, heads={0: [1], 2: [0, 3]}),
        SpotLight(SPANS, 0.7, "spotlight", raise_only=False, heads=HeadSet.of({1: [0]}, "kv")),
    ],
    ids=["exact", "spotlight", "both ways", "heads", "kv heads"],
)
def test_every_layer_equals_attention_by_hand(editor: SpotLight, family: str, subject: Any) -> None:
    found = subject(family, torch.float32)
    biased = Emphasize("in the box", strength=0.8, heads=(0,))(found.memory)
    for memory in (found.memory, biased):
        edited = editor(memory)
        with kv.tap(found.model, SITES) as tap, kv.attach(found.model, edited) as session:
            for piece in (found.continuation[:5], found.continuation[5:6]):
                session.forward(piece[None])
                if len(piece) == 5:
                    for layer in edited.layers:
                        expected = by_hand(tap, edited, layer, editor)
                        gap = tap["output", layer][0].transpose(0, 1) - expected
                        size = max(1.0, float(tap["values", layer].abs().max()))
                        assert gap.abs().max() <= OUTPUT * size


@pytest.mark.parametrize("form", ["exact", "spotlight"])
def test_the_mass_becomes_what_the_form_says(form: Any, subject: Any) -> None:
    found, target = subject("llama", torch.float32), 0.5
    span = found.memory.resolve(SPANS[0]) | found.memory.resolve(SPANS[2])
    masses = []
    for memory in (found.memory, SpotLight((SPANS[0], SPANS[2]), target, form)(found.memory)):
        with (
            kv.tap(found.model, "mass", [0], groups={"span": span}) as tap,
            kv.attach(found.model, memory) as session,
        ):
            session.forward(found.continuation[None, :4])
        masses.append(tap["mass", 0])
    before, after = masses
    wanted = torch.full_like(before, target)
    if form == "spotlight":
        wanted = target / (target + 1 - before)
    wanted = torch.where(before < target, wanted, before)
    assert bool((before < target).any())
    assert (after - wanted).abs().max() <= 1e-5


def test_it_appends_one_rule_and_leaves_the_layers(subject: Any) -> None:
    memory = subject("llama").memory
    once = SpotLight(SPANS, 0.3, heads=HeadSet.of({0: [1]}, "kv"))(memory)
    twice = SpotLight("box", 0.1, "spotlight", False)(once)
    assert all(twice.layers[index] is layer for index, layer in memory.layers.items())
    first, second = read_rules(twice.rules)
    assert isinstance(first, MassRule)
    a, b, c = (memory.resolve(span) for span in SPANS)
    assert first.span.ranges == (a | b | c).ranges
    assert (first.target, first.form, first.raise_only) == (0.3, "exact", True)
    assert first.heads == HeadSet.of({0: [2, 3]})
    assert (second.target, second.form, second.raise_only) == (0.1, "spotlight", False)
    assert second.heads is None
    assert len({memory.digest, once.digest, twice.digest}) == 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"target": 0}, r"target must lie in \(0, 1\), found 0"),
        ({"target": 1.0}, r"target must lie in \(0, 1\), found 1.0"),
        ({"target": "half"}, "target: expected a finite number, found 'half'"),
        ({"form": "log"}, "'exact' or 'spotlight', found 'log'"),
        ({"raise_only": "yes"}, "true or false, found 'yes'"),
        ({"spans": []}, "at least one span"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"spans": "box", "target": 0.5, **parameters}
    with pytest.raises(InvalidArgument, match=message):
        SpotLight(**given)


def test_what_memory_and_model_lack(subject: Any) -> None:
    memory = subject("llama").memory
    with pytest.raises(InvalidArgument, match="3 layers, found 4"):
        SpotLight("box", 0.5, heads={4: [0]})(memory)
    with pytest.raises(InvalidArgument, match="2 kv heads, found head 3"):
        SpotLight("box", 0.5, heads=HeadSet.of({0: [3]}, "kv"))(memory)
    with pytest.raises(SpanNotFound, match="none of the layers"):
        SpotLight("60 days", 0.5)(Drop("60 days")(memory))
