"""Controls by their formulas: slots that stand m times, scaled keys and values, extended keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Chain, Drop, Duplicate, Emphasize, ScaleKeys, ScaleValues
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.memory.heads import HeadSet
from kvedit.models.attention_call import AttentionCall
from kvedit.models.extension import extend
from kvedit.models.route import observing
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT

FAMILIES = ("llama", "gemma3", "qwen3", "gpt_neox")
SPANS = ({"sentence": "That is"}, {"text": "you would"}, {"tokens": (-6, -2)})
SITES = ("queries", "keys", "values", "output")
every_family = pytest.mark.parametrize("family", FAMILIES)


def union(memory: Any) -> Any:
    a, b, c = (memory.resolve(span) for span in SPANS)
    return a | b | c


@every_family
@pytest.mark.parametrize("times", [2, 7])
@pytest.mark.parametrize("layers", [None, (0, -1)])
def test_m_slots_are_a_bias_of_log_m(
    times: int, layers: Any, family: str, subject: Any, continued: Any
) -> None:
    found = subject(family)
    copied = Duplicate(SPANS, times, layers)(found.memory)
    biased = Emphasize(union(found.memory), strength=math.log(times), layers=layers)(found.memory)
    logits = continued(found.model, copied, found.continuation)
    expected = continued(found.model, biased, found.continuation)
    assert (logits - expected).abs().max() <= FP64_ORACLE
    assert (logits - found.logits).abs().max() > VISIBLE_EFFECT
    assert all(layer.bias is None for layer in copied.layers.values())


def test_copies_are_the_slot_itself(subject: Any) -> None:
    memory = Emphasize("box", strength=2.0, heads=(1,))(subject("gemma3").memory)
    copied = Duplicate(({"tokens": (2, 4)}, {"tokens": (3, 5)}), 3)(memory)
    for index, layer in copied.layers.items():
        old = memory.layers[index]
        of = [token for token in range(old.slots) for _ in range(3 if 2 <= token < 5 else 1)]
        assert layer.source.tolist() == layer.positions.tolist() == of
        for name, tensor in layer.tensors():
            axis = {"keys": 1, "values": 1, "bias": 1}.get(name, 0)
            assert torch.equal(tensor, getattr(old, name).index_select(axis, torch.tensor(of)))
    assert copied.next_position == memory.next_position
    assert Drop({"tokens": (2, 5)})(copied).digest == Drop({"tokens": (2, 5)})(memory).digest


def test_windowed_layers_copy_what_they_hold(subject: Any, continued: Any) -> None:
    found = subject("gemma3", window="windowed")
    edited = Duplicate(SPANS, 3)(found.memory)
    biased = Emphasize(union(found.memory), strength=math.log(3))(found.memory)
    logits = continued(found.model, edited, found.continuation)
    expected = continued(found.model, biased, found.continuation)
    assert (logits - expected).abs().max() <= FP64_ORACLE


@every_family
def test_copies_in_a_batch_with_padding(family: str, subject: Any) -> None:
    found = subject(family)
    short = kv.capture(found.model, found.tokenizer, "That is all.")
    memories = [Duplicate("That is", 4)(found.memory), Duplicate("That is", 2)(short)]
    alike = [Emphasize("That is", strength=math.log(m))(memory)
             for m, memory in ((4, found.memory), (2, short))]  # fmt: skip
    rows = found.continuation[None, :4].repeat(2, 1)
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1, :2] = False
    logits = []
    for each in (memories, alike):
        with kv.attach(found.model, each) as session:
            logits.append(session.forward(rows, valid))
    assert ((logits[0] - logits[1]).abs() * valid[..., None]).max() <= FP64_ORACLE


def attended(found: Any, memory: Any) -> Any:
    with kv.tap(found.model, SITES) as tap, kv.attach(found.model, memory) as session:
        session.forward(found.continuation[None, :4])
    return tap


def by_hand(tap: Any, memory: Any, layer: int, logit: Any, value: Any) -> torch.Tensor:
    """Output [query_head, query, dim] with factors [head, slot] on logits and on values."""
    facts, held = memory.model.layers[layer], memory.layers[layer]
    queries, keys, values = (tap[site, layer][0].double() for site in SITES[:3])
    new = torch.arange(queries.shape[1]) + memory.next_position
    slots = torch.cat((held.positions, new))
    seen = slots[None, :] <= new[:, None]
    if facts.window:
        seen &= slots[None, :] > new[:, None] - facts.window
    rows = []
    for head in range(facts.query_heads):
        group = head // facts.group
        scores = queries[head] @ keys[group].T * facts.scale * logit[group]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(weights @ (values[group] * value[group][:, None]))
    return torch.stack(rows)


@every_family
@pytest.mark.parametrize("factor", [2.5, -1.0, 0.0])
@pytest.mark.parametrize("kind", [ScaleKeys, ScaleValues])
def test_scaled_keys_and_values_by_hand(
    kind: Any, factor: float, family: str, subject: Any
) -> None:
    """Layer 0 sees equal queries, so its output is a function of the unscaled memory."""
    found = subject(family, torch.float32)
    edited = kind(SPANS, factor, {0: [1], 1: [0]})(found.memory)
    plain, scaled = attended(found, found.memory), attended(found, edited)
    slots = plain["keys", 0].shape[2]
    factors = torch.ones(found.memory.layers[0].heads, slots, dtype=torch.float64)
    inside = union(found.memory).mask(found.memory.layers[0])
    factors[1, : found.memory.slots][inside] = factor
    ones = torch.ones_like(factors)
    pair = (factors, ones) if kind is ScaleKeys else (ones, factors)
    expected = by_hand(plain, found.memory, 0, *pair)
    gap = scaled["output", 0][0].transpose(0, 1) - expected
    assert gap.abs().max() <= 1e-5 * max(1.0, float(plain["values", 0].abs().max()))
    assert edited.layers[2] is found.memory.layers[2]
    untouched = edited.layers[0].keys if kind is ScaleKeys else edited.layers[0].values
    before = found.memory.layers[0].keys if kind is ScaleKeys else found.memory.layers[0].values
    assert torch.equal(untouched[0], before[0])


@every_family
def test_scaled_values_are_pasta_without_its_normaliser(family: str, subject: Any) -> None:
    """A diag(c) V = C T(A) V: weights stay, the output grows by what PASTA divides by."""
    found, factor = subject(family, torch.float32), 4.0
    span = union(found.memory)
    scaled = attended(found, ScaleValues(span, factor)(found.memory))
    steered = attended(found, Emphasize(span, strength=math.log(factor))(found.memory))
    with (
        kv.tap(found.model, "mass", [0], groups={"span": span}) as tap,
        kv.attach(found.model, found.memory) as session,
    ):
        session.forward(found.continuation[None, :4])
    normaliser = 1 + (factor - 1) * tap["mass", 0][0, 0]
    expected = steered["output", 0][0].transpose(0, 1) * normaliser[..., None]
    gap = scaled["output", 0][0].transpose(0, 1) - expected
    assert gap.abs().max() <= 1e-5 * max(1.0, factor * float(scaled["values", 0].abs().max()))


def test_scaling_undone_is_the_identity(subject: Any) -> None:
    memory = subject("llama").memory
    for kind, name in ((ScaleKeys, "keys"), (ScaleValues, "values")):
        back = Chain((kind(SPANS, 4.0), kind(SPANS, 0.25)))(memory)
        for index, layer in back.layers.items():
            assert torch.equal(getattr(layer, name), getattr(memory.layers[index], name))


class Extended:
    """Computes every biased call by key extension, with a kernel that is given no bias."""

    def __init__(self, memory: Any) -> None:
        self.memory, self.seen = memory, 0

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Any]) -> Any:
        layer = self.memory.layers[call.layer]
        bias = torch.zeros(1, call.query.shape[1], 1, call.key.shape[2], dtype=call.query.dtype)
        bias[0, :, 0, : layer.slots] = layer.bias
        visible = call.mask > torch.finfo(call.mask.dtype).min / 2
        wide = extend(replace(call, mask=None, bias=bias))
        assert wide.bias is None
        assert wide.query.shape[-1] % 8 == 0
        self.seen += 1
        output = torch.nn.functional.scaled_dot_product_attention(
            wide.query, wide.key, wide.value, attn_mask=visible, scale=wide.scaling
        )
        return output[..., : call.value.shape[-1]].transpose(1, 2).contiguous(), None


@every_family
def test_key_extension_is_the_bias(family: str, subject: Any, continued: Any) -> None:
    found = subject(family)
    edited = Emphasize(union(found.memory), strength=3.0, heads=(0, 3))(found.memory)
    extended = Extended(edited)
    with observing(extended):
        logits = continued(found.model, edited, found.continuation)
    expected = continued(found.model, edited, found.continuation)
    assert extended.seen > 0
    assert (logits - expected).abs().max() <= FP64_ORACLE
    assert (logits - found.logits).abs().max() > VISIBLE_EFFECT


def test_random_heads_are_a_control_with_a_seed(subject: Any) -> None:
    spec = subject("llama").memory.model
    one, two = (HeadSet.random(spec, 5, seed) for seed in (1, 2))
    assert len(one) == len(two) == 5
    assert one == HeadSet.random(spec, 5, 1) != two
    assert HeadSet.random(spec, 12, 3) == HeadSet.all(spec)


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        (Duplicate, {"times": 0}, "times: expected a whole number from 1, found 0"),
        (Duplicate, {"times": 2.0}, "times: expected a whole number from 1, found 2.0"),
        (Duplicate, {"times": True}, "times: expected a whole number from 1, found True"),
        (Duplicate, {"times": 2, "layers": 3}, "layers: expected a list of numbers"),
        (ScaleKeys, {"factor": math.nan}, "factor: expected a finite number, found nan"),
        (ScaleValues, {"factor": "2"}, "factor: expected a finite number, found '2'"),
        (ScaleKeys, {"factor": 2, "kv_heads": HeadSet.of({0: [3]})}, "found query heads"),
        (ScaleValues, {"factor": 2, "kv_heads": {"heads": {0: [3]}, "kind": "query"}}, "to_kv"),
    ],
    ids=str,
)
def test_bad_parameters(kind: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        kind("box", **parameters)


def test_what_the_model_lacks(subject: Any) -> None:
    memory = subject("llama").memory
    with pytest.raises(UnknownName, match="unknown layer '7'"):
        Duplicate("box", 2, (7,))(memory)
    with pytest.raises(InvalidArgument, match="2 kv heads, found head 2"):
        ScaleKeys("box", 2.0, {0: [2]})(memory)
