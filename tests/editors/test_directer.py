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
