"""capture → attach → continue equals a full prefill, on every family, backend and dtype."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.models.tiny import family_names

# bfloat16 has 8 bits of precision. Logits here reach about 12, where one step is 2^-4 = 0.0625;
# sdpa sums in another order for a block of queries than for one, over several layers.
FAMILIES = family_names()

BF16_LOGITS = 0.25
FP32_LOGITS = 1e-4
# Mixture-of-experts models choose experts by rounded scores: one flip moves logits by more than a
# rounding step, so their bfloat16 run is held to greedy agreement of most tokens only.
MIXTURES = {"gpt_oss", "qwen3_moe", "llama4_text"}


def _ids(tokens):
    return torch.randint(10, 300, (1, tokens), generator=torch.Generator().manual_seed(5))


def _continue(model, tokenizer, memory, ids):
    with kv.attach(model, memory, tokenizer) as session:
        block = session.forward(ids[:, :6])
        steps = [session.forward(ids[:, i : i + 1]) for i in range(6, ids.shape[1])]
    return torch.cat([block, *steps], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_a_memory_equals_a_full_prefill(tiny, family, attn, dtype):
    model, tokenizer = tiny(family, attn, dtype)
    ids = _ids(44)
    with torch.no_grad():
        expected = model(ids).logits[:, 32:].float()
    memory = kv.capture(model, tokenizer, ids[0, :32])
    found = _continue(model, tokenizer, memory, ids[:, 32:]).float()
    if dtype == torch.float32:
        assert (found - expected).abs().max() <= FP32_LOGITS
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    elif family in MIXTURES:
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.7
    else:
        assert (found - expected).abs().max() <= BF16_LOGITS


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_the_whole_prompt(tiny, family, attn):
    model, tokenizer = tiny(family, attn)
    ids = _ids(36)
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )[0, 36:].tolist()
    memory = kv.capture(model, tokenizer, ids[0, :30])
    with kv.attach(model, memory) as session:
        reply = session.generate(ids[0, 30:], max_new_tokens=12)
    assert list(reply.tokens) == plain


@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere2", "llama4_text", "gpt2", "mistral"])
def test_chunked_capture_equals_capture_in_one_pass(tiny, family):
    model, tokenizer = tiny(family)
    ids = _ids(40)[0]
    whole, chunked = kv.capture(model, tokenizer, ids), kv.capture(model, tokenizer, ids, chunk=7)
    for index, layer in whole.layers.items():
        other = chunked.layers[index]
        torch.testing.assert_close(layer.keys, other.keys, atol=2e-5, rtol=0)
        torch.testing.assert_close(layer.values, other.values, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2", "gpt_oss", "llama4_text"])
def test_windowed_capture_continues_as_the_whole_one(tiny, family):
    model, tokenizer = tiny(family)
    ids = _ids(50)
    whole = kv.capture(model, tokenizer, ids[0, :37])
    windowed = kv.capture(model, tokenizer, ids[0, :37], window="windowed")
    assert windowed.nbytes < whole.nbytes
    a = _continue(model, tokenizer, whole, ids[:, 37:])
    b = _continue(model, tokenizer, windowed, ids[:, 37:])
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
def test_captures_of_a_batch_equal_single_captures(tiny, family):
    model, tokenizer = tiny(family)
    texts = [
        "One short text.",
        "A text that is a good deal longer than the first of them.",
        "Third",
    ]
    batch = kv.capture(model, tokenizer, texts)
    for text, memory in zip(texts, batch, strict=True):
        single = kv.capture(model, tokenizer, text)
        assert torch.equal(single.tokens, memory.tokens)
        for index, layer in single.layers.items():
            torch.testing.assert_close(layer.keys, memory.layers[index].keys, atol=2e-5, rtol=0)
            torch.testing.assert_close(layer.values, memory.layers[index].values, atol=2e-5, rtol=0)


def test_capture_of_some_layers_holds_them_and_cannot_be_attached(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, "Some text", layers=[0, -1])
    assert list(memory.layers) == [0, 2]
    with pytest.raises(kv.errors.InvalidArgument, match="has layers"), kv.attach(model, memory):
        pass


def test_capture_in_another_dtype(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, "Some text", dtype=torch.bfloat16)
    assert memory.dtype == torch.bfloat16
    with kv.attach(model, memory) as session:  # widening is lossless
        session.forward(torch.tensor([[20]]))
    model16, _ = tiny("llama", dtype=torch.bfloat16)
    wide = kv.capture(model, tokenizer, "Some text")
    with pytest.raises(kv.errors.IncompatibleModel, match="dtype"), kv.attach(model16, wide):
        pass


def test_beam_search_and_several_samples_over_a_memory(tiny):
    model, tokenizer = tiny("llama")
    ids = _ids(30)
    plain = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False
    )[0, 30:].tolist()
    memory = kv.capture(model, None, ids[0, :20])
    found = kv.generate(model, None, memory, ids[0, 20:], max_new_tokens=8, num_beams=3)
    assert found == plain
    many = kv.generate(
        model,
        None,
        memory,
        ids[0, 20:],
        max_new_tokens=5,
        num_return_sequences=3,
        temperature=1.0,
        seed=3,
    )
    assert len(many) == 3
