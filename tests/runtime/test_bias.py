"""The runtime's bias against the closed form: multiply a group's attention by e^b, renormalise."""

from __future__ import annotations

import math

import pytest
import torch
from einops import rearrange, repeat

import kvedit as kv
from kvedit.editors import Drop, Emphasize, Suppress
from kvedit.models.attention_call import AttentionCall
from kvedit.models.extension import EVICTED, extend
from kvedit.testing.oracle import closed_form_bias

TEXT = "Our refund window is 60 days. Please keep the receipt."
SITES = ("queries", "keys", "values", "output")
# Half precision rounds the bias, the logits and the weights to 8 bits each: a relative 2^-8 of
# outputs of order one, a few times over.
BF16_OUTPUT = 0.05


def _expected(call, memory, spec, layer, row, positions, next_position):
    """Closed form for one layer and row, from what attention was given."""
    queries, keys, values = (call[site, layer][row] for site in ("queries", "keys", "values"))
    facts = spec.layers[layer]
    keys, values = (repeat(x, "h s d -> (h g) s d", g=facts.group) for x in (keys, values))
    kept = memory.layers[layer]
    bias = torch.zeros(facts.query_heads, keys.shape[1])
    if kept.bias is not None:
        bias[:, : kept.slots] = kept.bias
    visible = (
        positions[None, :] <= torch.arange(next_position, next_position + queries.shape[1])[:, None]
    )
    if facts.window:
        last = torch.arange(next_position, next_position + queries.shape[1])[:, None]
        visible &= positions[None, :] > last - facts.window
    return closed_form_bias(queries, keys, values, bias, facts.scale, visible)


def _check(call, memory, spec, positions, next_position, tolerance):
    for layer in range(len(spec.layers)):
        for row in range(call["output", layer].shape[0]):
            expected = _expected(call, memory, spec, layer, row, positions, next_position)
            found = rearrange(call["output", layer][row], "query head dim -> head query dim")
            # An output is a mean of values, so its rounding is relative to their size.
            size = max(1.0, float(call["values", layer][row].abs().max()))
            error = float((found.double() - expected).abs().max()) / size
            assert error <= tolerance, (layer, row, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma3", "granite", "opt"])
@pytest.mark.parametrize(
    "editor",
    [
        Emphasize(span="60 days", strength=2.3),
        Emphasize(span="60 days", alpha=0.01, layers=(0, -1), heads=(1, 2)),
        Suppress(span="receipt", strength=math.inf, kv_heads=(0,)),
    ],
    ids=["all", "heads", "evict"],
)
def test_bias_is_exact_in_both_phases_and_in_a_batch(tiny, family, attn, dtype, editor):
    model, tokenizer = tiny(family, attn, dtype)
    plain = kv.capture(model, tokenizer, TEXT)
    memory = editor(plain)
    ids = torch.randint(10, 300, (2, 5), generator=torch.Generator().manual_seed(1))
    with kv.attach(model, memory, rows=2) as session, kv.tap(model, SITES) as tap:
        session.forward(ids)
        at = torch.cat((plain.layers[0].positions, torch.arange(5) + plain.next_position))
        _check(tap, memory, memory.model, at, plain.next_position, 1e-6)
        session.forward(ids[:, :1])
        at = torch.cat((at, torch.tensor([plain.next_position + 5])))
        _check(tap, memory, memory.model, at, plain.next_position + 5, 1e-6)


def test_bias_is_exact_under_left_padding(tiny):
    model, tokenizer = tiny("llama")
    memory = Emphasize(span="60 days", strength=1.5)(kv.capture(model, tokenizer, TEXT))
    ids = torch.randint(10, 300, (2, 6), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False
    with kv.attach(model, memory, rows=2) as session:
        padded = session.forward(ids, valid)
    with kv.attach(model, memory) as session:
        alone = session.forward(ids[1:, 2:])
    torch.testing.assert_close(padded[1:, 2:], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bias_in_half_precision(tiny, attn):
    model, tokenizer = tiny("llama", attn, torch.bfloat16)
    plain = kv.capture(model, tokenizer, TEXT)
    memory = Emphasize(span="60 days", strength=2.3)(plain)
    ids = torch.randint(10, 300, (1, 5), generator=torch.Generator().manual_seed(1))
    with kv.attach(model, memory) as session, kv.tap(model, SITES) as tap:
        session.forward(ids)
    at = torch.cat((plain.layers[0].positions, torch.arange(5) + plain.next_position))
    _check(tap, memory, memory.model, at, plain.next_position, BF16_OUTPUT)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_eviction_in_all_heads_equals_dropping_the_slots(tiny, family):
    model, tokenizer = tiny(family)
    memory = kv.capture(model, tokenizer, TEXT)
    ids = torch.randint(10, 300, (1, 6), generator=torch.Generator().manual_seed(3))
    logits = []
    for editor in (Suppress(span="the receipt", strength=math.inf), Drop(span="the receipt")):
        with kv.attach(model, editor(memory)) as session:
            logits.append(session.forward(ids))
    with kv.attach(model, memory) as session:
        untouched = session.forward(ids)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)
    assert (logits[0] - untouched).abs().max() > 1e-2


def test_sinks_keep_their_share_under_bias(tiny):
    """gpt-oss: e^b acts on the span's numerator only; the sink stays in the denominator."""
    model, tokenizer = tiny("gpt_oss")
    plain = kv.capture(model, tokenizer, TEXT)
    strength = 1.7
    memory = Emphasize(span="receipt", strength=strength)(plain)
    ids = torch.tensor([[40, 41, 42]])
    patterns = []
    for one in (plain, memory):
        # Layer 0 sees equal queries and keys in both runs.
        with kv.attach(model, one) as session, kv.tap(model, ("pattern",), [0]) as tap:
            session.forward(ids)
        patterns.append(tap["pattern", 0].double())
    inside = plain.find("receipt").mask(plain.layers[0])
    inside = torch.nn.functional.pad(inside, (0, 3))
    sink = 1 - patterns[0].sum(-1, keepdim=True)
    assert sink.min() > 0
    raised = patterns[0] * torch.where(inside, math.exp(strength), 1.0)
    expected = raised / (raised.sum(-1, keepdim=True) + sink)
    torch.testing.assert_close(patterns[1], expected, atol=1e-6, rtol=0)


def test_key_extension_equals_an_additive_bias():
    """What FlashAttention is given (it takes no bias): one more key dim, exact in fp32."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 12, generator=generator)
    key, value = (torch.randn(2, 2, 7, 12, generator=generator) for _ in range(2))
    bias = torch.randn(1, 4, 1, 7, generator=generator)
    bias[0, 1, 0, 2] = -torch.inf
    call = AttentionCall(torch.nn.Identity(), "fa2", query, key, value, None, False, 0.3, {}, bias)
    wide = extend(call)
    assert wide.query.shape[-1] % 8 == 0 and wide.bias is None
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found = sdpa(wide.query, wide.key, wide.value, scale=0.3)[..., :12]
    expected = sdpa(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        scale=0.3,
        attn_mask=bias.clamp_min(EVICTED),
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
def test_flash_attention_with_bias_equals_sdpa():
    pytest.importorskip("flash_attn")
    from kvedit.models.tiny import tiny_model

    logits = {}
    for attn in ("sdpa", "flash_attention_2"):
        model, tokenizer = tiny_model("llama", attn=attn, dtype=torch.bfloat16)
        model = model.cuda()
        memory = Emphasize(span="60 days", strength=2.0)(kv.capture(model, tokenizer, TEXT))
        with kv.attach(model, memory) as session:
            logits[attn] = session.forward(torch.tensor([[40, 41, 42]])).float()
    torch.testing.assert_close(*logits.values(), atol=0.25, rtol=0)


def test_flash_attention_refuses_what_it_cannot_mask(tiny):
    from dataclasses import replace

    from kvedit.runtime.finish import finish

    call = AttentionCall(
        torch.nn.Identity(),
        "sdpa",
        torch.zeros(1, 4, 2, 8),
        torch.zeros(1, 2, 5, 8),
        torch.zeros(1, 2, 5, 8),
        None,
        False,
        None,
    )
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    assert finish(call, mask, False, None).mask is mask
    with pytest.raises(kv.errors.UnsupportedModel, match="FlashAttention takes no mask"):
        finish(replace(call, backend="fa2"), mask, False, None)
