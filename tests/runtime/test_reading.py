"""ModelReader: what editors may ask of a model."""

from __future__ import annotations

import inspect as signatures

import pytest
import torch

import kvedit as kv
from kvedit.editors import Drop, Emphasize
from kvedit.errors import InvalidArgument, ShapeMismatch
from kvedit.models import inspect
from kvedit.runtime import ModelReader

TEXT = "The thing in the box is the answer. The refund window is 60 days, and you would not wait."


def masked_forward(model, tokens, bias):
    """Keys and values by one eager forward under an additive mask; no cache of kvedit."""
    from transformers import DynamicCache

    handles = []
    for index, module in inspect(model).attention.items():
        names = list(signatures.signature(module.forward).parameters)

        def hook(module, args, kwargs, index=index, names=names):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if index in bias:
                mask = given["attention_mask"]
                added = mask + bias[index][None, :, None, :].to(mask)
                given["attention_mask"] = added.clamp_min(torch.finfo(mask.dtype).min)
            return (), given

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    from kvedit.models.cache_argument import cache_argument

    cache = DynamicCache()
    try:
        with torch.no_grad():
            model(tokens[None], use_cache=True, **{cache_argument(model): cache})
    finally:
        for handle in handles:
            handle.remove()
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt_neox", "cohere2"])
def test_a_context_rereads_itself_under_bias(tiny, family, attn):
    model, tokenizer = tiny(family, attn)
    memory = kv.capture(model, tokenizer, TEXT)
    heads = memory.model.layers[0].query_heads
    drawn = torch.Generator().manual_seed(0)
    bias = {layer: torch.randn(heads, memory.tokens_count, generator=drawn) * 2 for layer in (0, 2)}
    baked = ModelReader(model, tokenizer).reread(memory, bias)
    plain, _ = tiny(family, "eager")
    for index, (keys, values) in enumerate(masked_forward(plain, memory.tokens, bias)):
        assert torch.allclose(baked.layers[index].keys, keys, atol=1e-5), index
        assert torch.allclose(baked.layers[index].values, values, atol=1e-5), index
        assert baked.layers[index].bias is None
    assert baked.digest != memory.digest
    # The first layer's keys come from embeddings alone: bias can't reach them.
    assert torch.equal(baked.layers[0].keys, memory.layers[0].keys)
    assert not torch.allclose(baked.layers[1].keys, memory.layers[1].keys, atol=1e-3)


def test_reading_again_without_bias_gives_the_same_bits(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    biased = Emphasize(span="60 days", strength=2.0)(memory)
    again = ModelReader(model).reread(biased, {})
    assert again.digest == memory.digest


def test_only_captured_memories_are_read_again(tiny):
    model, tokenizer = tiny("llama")
    memory = kv.capture(model, tokenizer, TEXT)
    reader = ModelReader(model, tokenizer)
    with pytest.raises(InvalidArgument, match="one slot per token"):
        reader.reread(Drop(span="60 days")(memory), {})
    with pytest.raises(ShapeMismatch, match="layer 1 bias"):
        reader.reread(memory, {1: torch.zeros(1, memory.tokens_count)})
    with pytest.raises(InvalidArgument, match="brings a text"):
        ModelReader(model).encode("a")
    with pytest.raises(InvalidArgument, match="asks a question"):
        ModelReader(model).ask(memory, "a", 1)


def test_reading_from_nothing_and_asking(tiny):
    model, tokenizer = tiny("llama")
    reader = ModelReader(model, tokenizer)
    ids = reader.encode(TEXT)
    seen = reader.read(None, ids, ("received", "keys_pre"))
    slots = len(ids)
    assert seen["received"][0].shape == (1, memory_heads(model), slots)
    # Every query's weights sum to one.
    assert seen["received"][1].sum(dim=-1).allclose(torch.tensor(float(slots)), atol=1e-3)
    memory = kv.capture(model, tokenizer, TEXT)
    wanted = kv.generate(model, tokenizer, memory, " so", max_new_tokens=5, do_sample=False)
    assert reader.ask(memory, " so", 5) == wanted


def memory_heads(model):
    return inspect(model).spec.layers[0].query_heads
