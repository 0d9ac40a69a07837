"""Boost against InstABoost's own lines: columns of the pattern times M, divided by their sum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Boost, Pasta, build
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.testing.tolerances import FP32_BIAS, FP64_ORACLE, VISIBLE_EFFECT

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
SPANS = ({"sentence": "That is"}, {"text": "you would"}, {"tokens": (-6, -2)})
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_columns_times_m_and_normalised(family: str, subject: Any) -> None:
    found, multiplier = subject(family, torch.float32), 7.0
    edited = found.apply(Boost(SPANS, multiplier, phase="decode"))
    patterns = []
    for memory in (found.memory, edited):
        with kv.tap(found.model, "pattern", [0]) as tap, kv.attach(found.model, memory) as session:
            session.forward(found.continuation[None, :4])
        patterns.append(tap["pattern", 0])
    plain, boosted = patterns
    inside = torch.zeros(plain.shape[-1], dtype=torch.bool)
    for span in SPANS:
        inside[: found.memory.slots] |= found.memory.resolve(span).mask(found.memory.layers[0])
    plain[..., inside] *= multiplier
    expected = torch.nn.functional.normalize(plain, p=1, dim=-1)
    assert (boosted - expected).abs().max() <= FP32_BIAS


@every_family
@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_every_phase_equals_one_full_pass(
    phase: Any, family: str, subject: Any, continued: Any, full_pass: Any
) -> None:
    found = subject(family)
    edited = found.apply(Boost(SPANS, 9.0, layers=(0, -1), phase=phase))
    inside = torch.zeros(found.memory.tokens_count, dtype=torch.bool)
    for span in SPANS:
        for start, stop in found.memory.resolve(span).ranges:
            inside[start:stop] = True
    last = len(found.memory.model.layers) - 1
    bias = {layer: torch.where(inside, math.log(9.0), 0.0).expand(4, -1) for layer in (0, last)}
    before, after = ({} if phase == "decode" else bias), ({} if phase == "prefill" else bias)
    logits = continued(found.model, edited, found.continuation)
    expected = full_pass(found.model, found.memory.tokens, found.continuation, before, after)
    assert (logits - expected).abs().max() <= FP64_ORACLE
    assert (logits - found.logits).abs().max() > VISIBLE_EFFECT


def test_it_is_pasta_against_all_others(subject: Any) -> None:
    memory = subject("llama").memory
    boosted = Boost(SPANS, 8.0, heads={0: [1], 2: [2]}, phase="decode")(memory)
    pasta = Pasta(SPANS, 1 / 8, {0: [1], 2: [2]}, "all_others", phase="decode")(memory)
    for index, layer in boosted.layers.items():
        assert (layer.bias is None) == (index == 1) == (pasta.layers[index].bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, pasta.layers[index].bias)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"multiplier": 0.5}, "1 or above, found 0.5; Suppress"),
        ({"multiplier": math.inf}, "multiplier: expected a finite number, found inf"),
        ({"multiplier": None}, "multiplier: expected a finite number, found None"),
        ({"layers": (0,), "heads": {0: [1]}}, "give layers, or heads"),
        ({"layers": ()}, "layers: expected a list of numbers"),
        ({"spans": None}, "a text or a mapping of .*found None"),
        ({"phase": "now"}, "'prefill', 'decode' or 'both', found 'now'"),
    ],
    ids=str,
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"spans": "box", "multiplier": 2.0, "phase": "decode", **parameters}
    with pytest.raises(InvalidArgument, match=message):
        Boost(**given)


def test_a_layer_that_is_not_there(subject: Any) -> None:
    with pytest.raises(UnknownName, match="unknown layer '5'"):
        Boost("box", 2.0, layers=(5,), phase="decode")(subject("llama").memory)
    with pytest.raises(InvalidArgument, match="phase"):
        build("boost", spans="box", multiplier=2.0)
