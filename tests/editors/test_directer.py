"""Directer and Gate: which steering is kept, against the rule applied by hand to whole memories."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Boost, Chain, Directer, Emphasize, Gate, ScaleKeys, SpotLight
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, ScaleRule, read_rules
from kvedit.models.inspection import inspect
from kvedit.runtime import ModelReader, rank_layers
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
SPANS = ({"sentence": "That is"}, {"tokens": (-6, -2)})
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits_of(found: Any, memory: Any, count: int = 5) -> torch.Tensor:
    with kv.attach(found.model, memory) as session:
        return session.forward(found.continuation[None, :count])[0]


@every_family
@pytest.mark.parametrize("order", [None, (2, 0), (1,)])
def test_what_is_always_accepted_is_scaled_keys(family: str, order: Any, subject: Any) -> None:
    """Keys times c are logits times c; rotation and KV groups commute with it."""
    found = subject(family)
    edited = Directer(SPANS, 3.0, beta=1e-12, layers=order)(found.memory)
    layers = range(len(found.memory.layers)) if order is None else order
    heads = HeadSet.all(found.memory.model, layers).to_kv(found.memory.model)
    scaled = ScaleKeys(SPANS, 3.0, heads)(found.memory)
    gap = logits_of(found, edited) - logits_of(found, scaled)
    assert gap.abs().max() <= FP64_ORACLE
    assert (logits_of(found, edited) - logits_of(found, found.memory)).abs().max() > VISIBLE_EFFECT


def accepted_by_hand(found: Any, factor: float, beta: float, order: tuple[int, ...]) -> Any:
    """How many layers steer after halving, and the logits of that memory."""
    plain = logits_of(found, found.memory)
    raw = plain[-1].softmax(-1)
    count = len(order)
    while count:
        heads = HeadSet.all(found.memory.model, order[:count]).to_kv(found.memory.model)
        steered = logits_of(found, ScaleKeys(SPANS, factor, heads)(found.memory))
        if raw[steered[-1].argmax()] >= beta * raw.max():
            return count, steered
        count //= 2
    return 0, plain


@every_family
def test_the_gate_halves_layers_until_the_step_is_plausible(family: str, subject: Any) -> None:
    found, order = subject(family), (1, 2, 0)
    counts = set()
    for factor in (-60.0, -8.0, 8.0, 60.0):
        for beta in (0.05, 0.5, 1.0):
            count, expected = accepted_by_hand(found, factor, beta, order)
            edited = Directer(SPANS, factor, beta, order)(found.memory)
            assert (logits_of(found, edited) - expected).abs().max() <= FP64_ORACLE
            counts.add(count)
    assert len(counts) > 1  # more than one way out was taken


@every_family
def test_a_gate_takes_back_bias_too(family: str, subject: Any) -> None:
    found = subject(family)
    steered = Boost(SPANS, math.exp(9), phase="decode")(found.memory)
    plain = logits_of(found, found.memory)
    raw, choice = plain[-1].softmax(-1), logits_of(found, steered)[-1].argmax()
    share = float(raw[choice] / raw.max())
    kept = Gate(share * 0.99)(steered)
    assert (logits_of(found, kept) - logits_of(found, steered)).abs().max() <= FP64_ORACLE
    alone = Gate(1.0)(found.memory)
    assert (logits_of(found, alone) - plain).abs().max() <= FP64_ORACLE
    if share < 0.99:
        every = tuple(found.memory.layers)
        refused = logits_of(found, Gate(min(1.0, share * 1.01), layers=every)(steered))
        assert (refused - logits_of(found, steered)).abs().max() > VISIBLE_EFFECT


def test_rules_are_appended(subject: Any) -> None:
    memory = subject("llama").memory
    edited = Directer(SPANS, 7, 0.25, (-1, 0))(SpotLight("box", 0.5)(memory))
    _, scale, gate = read_rules(edited.rules)
    span = memory.resolve(SPANS[0]) | memory.resolve(SPANS[1])
    assert scale == ScaleRule(
        read_rules(edited.rules)[1].span, 7.0, HeadSet.all(memory.model, (0, 2))
    )
    assert scale.span.ranges == span.ranges
    assert gate == GateRule(0.25, (2, 0))
    whole = read_rules(Directer("box")(memory).rules)
    assert (whole[0].factor, whole[0].heads, whole[1]) == (100.0, None, GateRule(0.5))
    later = Chain((Gate(0.5), Emphasize("box", strength=1.0)))(memory)
    assert read_rules(later.rules) == (GateRule(0.5),)


PROMPT = " and the answer is that"


def ranked_by_runtime(found: Any, memory: Any, prompt: str, factor: float, layers: Any) -> Any:
    """rank_layers at the last token of a prompt that a session read up to there."""
    ids = found.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids[0]
    with kv.attach(found.model, memory, found.tokenizer) as session:
        session.forward(ids[None, :-1])
        grown = session.memory()
    span = memory.resolve(SPANS[0]) | memory.resolve(SPANS[1])
    return rank_layers(found.model, grown, span, ids[-1:], factor, layers)


@pytest.mark.parametrize("layers", [None, (2, 1)])
@pytest.mark.parametrize("factor", [3.0, 100.0, -20.0])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_it_ranks_layers_as_the_runtime_does(
    family: str, factor: float, layers: Any, subject: Any
) -> None:
    found = subject(family)
    memory = Emphasize("box", strength=0.5)(SpotLight("box", 0.3)(found.memory))
    edited = found.apply(Directer(SPANS, factor, layers=layers, prompt=PROMPT), memory)
    named = memory.layer_indices(layers)
    ranked = ranked_by_runtime(found, memory, PROMPT, factor, named)
    assert len(set(ranked.values())) > 1  # layers whose window ends before the span are equal
    _, scale, gate = read_rules(edited.rules)
    assert gate == GateRule(0.5, tuple(ranked))
    assert scale.heads == (None if layers is None else HeadSet.all(memory.model, named))


def test_the_order_is_not_the_given_one(subject: Any) -> None:
    """The last layer disturbs none that comes later; sliding layers may not reach the span."""
    found = subject("llama")
    given = read_rules(found.apply(Directer(SPANS, layers=(2, 1, 0), prompt=PROMPT)).rules)[1]
    assert given.layers[-1] == 2
    every = {
        read_rules(subject(family).apply(Directer(SPANS, prompt=PROMPT)).rules)[1].layers
        for family in FAMILIES
    }
    assert any(list(order) != sorted(order) for order in every)


def test_a_ranked_memory_serves_and_replays(subject: Any) -> None:
    found = subject("gemma3")
    editor = Directer(SPANS, 8.0, beta=0.05, prompt=PROMPT)
    edited = found.apply(editor)
    order = read_rules(edited.rules)[1].layers
    _, expected = accepted_by_hand(found, 8.0, 0.05, order)
    assert (logits_of(found, edited) - expected).abs().max() <= FP64_ORACLE
    assert (editor.reproducibility, Directer(SPANS).reproducibility) == ("reader", "pure")
    assert edited.lineage.head.reproducibility == "reader"
    assert found.apply(editor).digest == edited.digest


def test_ranking_needs_a_reader_and_a_token(subject: Any) -> None:
    found = subject("llama")
    with pytest.raises(InvalidArgument, match="reads with the model: pass reader="):
        Directer("box", prompt="a")(found.memory)
    for wrong in ("", 3):
        with pytest.raises(InvalidArgument, match="prompt: expected a text or None"):
            Directer("box", prompt=wrong)
    with pytest.raises(InvalidArgument, match="has a gate already"):
        found.apply(Directer("box", prompt="a"), Gate()(found.memory))


def test_streams_are_read_beside_other_sites(subject: Any) -> None:
    """What attention takes and returns, against hooks of its own."""
    found = subject("qwen3")
    ids, seen = found.continuation[:3], {}
    handles = [
        module.register_forward_hook(
            lambda m, a, k, out, at=layer: seen.update({at: (k["hidden_states"], out[0])}),
            with_kwargs=True,
        )
        for layer, module in inspect(found.model).attention.items()
    ]
    reader = ModelReader(found.model)
    got = reader.read(found.memory, ids, ("attention_input", "hidden", "attention_output"))
    for handle in handles:
        handle.remove()
    assert list(got) == ["attention_input", "hidden", "attention_output"]
    for layer, (entered, left) in seen.items():
        assert torch.equal(got["attention_input"][layer], entered)
        assert torch.equal(got["attention_output"][layer], left)
        assert got["hidden"][layer].shape == entered.shape
    with pytest.raises(UnknownName, match="unknown site 'attention'"):
        reader.read(found.memory, ids, ("attention",))


@pytest.mark.parametrize("gate", [Gate(0.1), Directer("box")], ids=["gate", "directer"])
def test_one_gate_is_enough(gate: Any, subject: Any) -> None:
    with pytest.raises(InvalidArgument, match="has a gate already"):
        gate(Gate()(subject("llama").memory))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"factor": math.inf}, "factor: expected a finite number, found inf"),
        ({"factor": "100"}, "factor: expected a finite number, found '100'"),
        ({"beta": 0}, r"beta must lie in \(0, 1\], found 0"),
        ({"beta": 1.5}, r"beta must lie in \(0, 1\], found 1.5"),
        ({"layers": ()}, "layers: expected a list of numbers"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Directer("box", **parameters)
    if "factor" not in parameters:
        with pytest.raises(InvalidArgument, match=message):
            Gate(**parameters)


def test_a_layer_that_is_not_there(subject: Any) -> None:
    for editor in (Directer("box", layers=(3,)), Gate(layers=(3,))):
        with pytest.raises(UnknownName, match="unknown layer '3'"):
            editor(subject("llama").memory)
