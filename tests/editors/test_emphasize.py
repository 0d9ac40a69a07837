"""Emphasize and Suppress against the formula of PASTA and the softmax written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize, Suppress
from kvedit.errors import SpanNotFound
from kvedit.memory import KVMemory, SpanQuery
from kvedit.models.attention_call import AttentionCall
from kvedit.models.route import observing
from kvedit.testing import closed_form_bias
from kvedit.testing.tolerances import BF16_BIAS, FP32_BIAS, FP32_LOGITS, FP64_ORACLE

SPAN = SpanQuery(tokens=(-6, -2))
NATS = 2.3


class Calls:
    """Keeps attention calls of one forward pass, with what they returned, by layer."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[AttentionCall, Any]] = {}

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Any]) -> Any:
        found = run(call)
        self.seen[call.layer] = (call, found)
        return found


def attention(found: Any, memory: KVMemory, attn: str = "eager") -> Calls:
    """Feeds the first new tokens and returns every layer's attention call."""
    calls = Calls()
    found.model.set_attn_implementation(attn)
    try:
        with kv.attach(found.model, memory) as session, observing(calls):
            session.forward(found.continuation[None, :3])
    finally:
        found.model.set_attn_implementation("sdpa")
    return calls


def weights(found: Any, memory: KVMemory, layer: int = 0) -> torch.Tensor:
    """Attention weights [query_head, query, slot] of new tokens; layer 0 sees equal queries."""
    kept: torch.Tensor = attention(found, memory).seen[layer][1][1][0]
    return kept


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gemma3", "gpt2"])
def test_weights_are_pasta_s(family: str, subject: Any) -> None:
    """T(A)_ij = A_ij / C_i in G and alpha A_ij / C_i elsewhere (arXiv 2311.02262, eq. 2)."""
    found = subject(family, torch.float32)
    alpha, memory = 0.01, found.memory
    before = weights(found, memory)
    after = weights(found, Emphasize(SPAN, alpha=alpha, heads=(0, 2))(memory))
    inside = torch.zeros(before.shape[-1], dtype=torch.bool)
    inside[: memory.slots] = memory.resolve(SPAN).mask(memory.layers[0])
    scaled = torch.where(inside, before, alpha * before)
    expected = scaled / scaled.sum(dim=-1, keepdim=True)
    assert (after[[0, 2]] - expected[[0, 2]]).abs().max() <= FP32_BIAS
    assert torch.equal(after[[1, 3]], before[[1, 3]])
    assert (after[[0, 2]] - before[[0, 2]]).abs().max() > 0.1


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize(
    "editor",
    [
        Emphasize(SPAN, strength=NATS),
        Emphasize(SPAN, strength=NATS, reference="rest_of_memory", kv_heads=(1,)),
        Suppress(SPAN, strength=NATS, heads=(1,)),
        Suppress(SPAN, strength=math.inf, kv_heads=(0,)),
    ],
    ids=["emphasize", "rest", "suppress", "evict"],
)
def test_every_layer_equals_the_closed_form(
    editor: Any, family: str, attn: str, subject: Any
) -> None:
    found = subject(family, torch.float32)
    edited = editor(found.memory)
    plain = attention(found, found.memory, "eager")
    for index, (call, (output, _)) in attention(found, edited, attn).seen.items():
        heads, slots = call.query.shape[1], call.key.shape[2]
        bias = torch.zeros(heads, slots)
        bias[:, : edited.slots] = edited.layers[index].bias
        group = heads // call.key.shape[1]
        mask = plain.seen[index][0].mask  # the same slots and positions, without bias
        visible = torch.isfinite(mask[0, 0])
        expected = closed_form_bias(
            call.query[0],
            call.key[0].repeat_interleave(group, 0),
            call.value[0].repeat_interleave(group, 0),
            bias,
            call.scale,
            visible,
        )
        error = (output[0].transpose(0, 1) - expected).abs().max()
        assert error <= FP32_BIAS * call.value.abs().max()  # weights err by FP32_BIAS


def test_half_precision_keeps_the_weights(subject: Any) -> None:
    found = subject("llama", torch.bfloat16)
    before = weights(found, found.memory).float()
    after = weights(found, Emphasize(SPAN, strength=NATS)(found.memory)).float()
    factor = torch.ones(before.shape[-1])
    factor[: found.memory.slots][found.memory.resolve(SPAN).mask(found.memory.layers[0])] = (
        math.exp(NATS)
    )
    expected = before * factor / (before * factor).sum(dim=-1, keepdim=True)
    assert (after - expected).abs().max() <= BF16_BIAS


def test_alpha_is_a_spelling_of_strength(subject: Any) -> None:
    memory = subject("llama").memory
    by_alpha = Emphasize(SPAN, alpha=0.01)
    assert by_alpha.strength == pytest.approx(4.605, abs=2e-4)
    assert by_alpha == Emphasize(SPAN, strength=-math.log(0.01))
    assert by_alpha(memory).digest == Emphasize(SPAN, strength=-math.log(0.01))(memory).digest
    span = memory.resolve(SPAN).mask(memory.layers[0])
    bias = by_alpha(memory).layers[0].bias
    assert bias is not None
    assert torch.equal(bias, span.float().expand(4, -1) * torch.tensor(math.log(100)))
    assert Suppress(SPAN, alpha=0.5).strength == math.log(2)


def test_references_differ_by_a_constant_on_the_memory(subject: Any) -> None:
    """Among memory slots both references give one softmax; they part on tokens that follow.

    Softmax doesn't change if every logit gets the same number: b on the span is -b on the rest of
    what is attended to. Later tokens are in "all others" and not in "rest of memory".
    """
    found = subject("llama", torch.float32)
    memory, slots = found.memory, found.memory.slots
    others = Emphasize(SPAN, strength=NATS)(memory)
    rest = Emphasize(SPAN, strength=NATS, reference="rest_of_memory")(memory)
    for index in memory.layers:
        gap = others.layers[index].bias - rest.layers[index].bias
        assert torch.equal(gap, torch.full_like(gap, NATS))
    plain, by_others, by_rest = (weights(found, m) for m in (memory, others, rest))

    def within_memory(found: torch.Tensor) -> torch.Tensor:
        return found[..., :slots] / found[..., :slots].sum(dim=-1, keepdim=True)

    assert (within_memory(by_others) - within_memory(by_rest)).abs().max() <= FP32_BIAS
    span = memory.resolve(SPAN).mask(memory.layers[0]).nonzero()[:, 0]
    rest_of = [i for i in range(slots) if i not in span.tolist()]

    def own_against(found: torch.Tensor, group: Any) -> torch.Tensor:
        return found[:, 0, slots] / found[:, 0, group].sum(dim=-1)  # the first new token on itself

    kept = {"rtol": 1e-4, "atol": 0.0}
    torch.testing.assert_close(own_against(by_rest, span), own_against(plain, span), **kept)
    torch.testing.assert_close(own_against(by_others, rest_of), own_against(plain, rest_of), **kept)
    factor = torch.full((4,), math.exp(NATS))
    torch.testing.assert_close(
        own_against(by_rest, rest_of) / own_against(plain, rest_of), factor, **kept
    )


def test_kv_heads_stand_for_their_group_of_query_heads(subject: Any) -> None:
    memory = subject("llama").memory
    spec = memory.model.layers[0]
    assert (spec.query_heads, spec.kv_heads) == (4, 2)
    for kv_head, group in ((0, (0, 1)), (1, (2, 3)), (-1, (2, 3))):
        by_kv = Emphasize(SPAN, strength=NATS, kv_heads=(kv_head,))(memory)
        assert by_kv.digest == Emphasize(SPAN, strength=NATS, heads=group)(memory).digest
        for layer in by_kv.layers.values():
            touched = [head for head in range(4) if bool(layer.bias[head].any())]
            assert tuple(touched) == group
    single = Emphasize(SPAN, strength=NATS, heads=(1,))(memory)
    assert [bool(row.any()) for row in single.layers[0].bias] == [False, True, False, False]


def test_gpt2_has_a_kv_head_per_query_head(subject: Any) -> None:
    memory = subject("gpt2").memory
    by_kv = Emphasize(SPAN, strength=NATS, kv_heads=(1,))(memory)
    assert by_kv.digest == Emphasize(SPAN, strength=NATS, heads=(1,))(memory).digest


def test_biases_add_up(subject: Any) -> None:
    memory = subject("llama").memory
    twice = Emphasize(SPAN, strength=2.0)(Emphasize(SPAN, strength=1.0)(memory))
    assert twice.digest == Emphasize(SPAN, strength=3.0)(memory).digest
    undone = Suppress(SPAN, strength=1.0)(Emphasize(SPAN, strength=1.0)(memory))
    assert not any(bool(layer.bias.any()) for layer in undone.layers.values())
    evicted = Emphasize(SPAN, strength=5.0)(Suppress(SPAN, strength=math.inf)(memory))
    assert evicted.digest == Suppress(SPAN, strength=math.inf)(memory).digest


@pytest.mark.parametrize(
    "other",
    [
        Emphasize(SPAN, strength=NATS + 1e-6),
        Emphasize(SpanQuery(tokens=(-6, -3)), strength=NATS),
        Emphasize(SPAN, strength=NATS, layers=(0, 1)),
        Emphasize(SPAN, strength=NATS, heads=(0, 1, 2)),
        Emphasize(SPAN, strength=NATS, reference="rest_of_memory"),
        Suppress(SPAN, strength=NATS),
    ],
)
def test_another_edit_is_another_identity(other: Any, subject: Any) -> None:
    memory = subject("llama").memory
    first, second = Emphasize(SPAN, strength=NATS)(memory), other(memory)
    assert first.digest != second.digest
    assert first.lineage.head.id != second.lineage.head.id


@pytest.mark.parametrize("zero", [0, 0.0, -0.0])
def test_zero_has_one_spelling(zero: float, subject: Any) -> None:
    memory = subject("llama").memory
    ids = {
        Emphasize(SPAN, strength=zero)(memory).lineage.head.id,
        Emphasize(SPAN, alpha=1)(memory).lineage.head.id,
    }
    assert len(ids) == 1
    assert Emphasize(SPAN, strength=zero)(memory).digest == memory.digest


def test_infinite_suppression_is_eviction(subject: Any, continued: Any) -> None:
    found = subject("gemma3")
    dropped = continued(found.model, Drop(SPAN)(found.memory), found.continuation)
    evicted = continued(
        found.model, Suppress(SPAN, strength=math.inf)(found.memory), found.continuation
    )
    assert (dropped - evicted).abs().max() <= FP64_ORACLE
    by_head = Suppress(SPAN, strength=math.inf, heads=(0, 3))(found.memory)
    assert by_head.digest == Drop(SPAN, heads=(0, 3))(found.memory).digest


def test_more_strength_gives_the_span_more_mass(subject: Any) -> None:
    found = subject("llama", torch.float32)
    span = found.memory.resolve(SPAN).mask(found.memory.layers[0])
    masses = []
    for editor in (
        Suppress(SPAN, strength=3.0),
        Suppress(SPAN, strength=1.0),
        Emphasize(SPAN, strength=0.0),
        Emphasize(SPAN, strength=1.0),
        Emphasize(SPAN, strength=30.0),
    ):
        seen = weights(found, editor(found.memory))
        masses.append(seen[..., : found.memory.slots][..., span].sum(dim=-1))
    for less, more in pairwise(masses):
        assert bool((more > less).all())
    assert bool((masses[-1] > 1 - FP32_LOGITS).all())


def test_a_span_that_no_layer_holds_is_an_error(subject: Any) -> None:
    """After a drop there is nothing left to emphasise; doing nothing silently would mislead."""
    memory = Drop({"tokens": [-9, -5]})(subject("llama").memory)
    with pytest.raises(SpanNotFound, match="would do nothing"):
        Emphasize({"tokens": [-9, -5]}, strength=1.0)(memory)
    Emphasize({"tokens": [-9, -4]}, strength=1.0)(memory)


def test_every_way_to_write_a_span_is_the_same_edit() -> None:
    ways = ("lamp", {"text": "lamp"}, SpanQuery(text="lamp"))
    assert len({Emphasize(way, strength=1.0) for way in ways}) == 1
