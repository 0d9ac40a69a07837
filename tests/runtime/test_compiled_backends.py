"""A compiled memory is plain keys and values: every backend gives the same logits over it."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv

TEXT = (
    "Books are lent for four weeks. The refund window is 60 days. Late books cost ten cents a day. "
    "The reading room is open from nine to five, and on Saturdays until noon."
)
SPAN = "The refund window is 60 days"
QUESTION = "\nQuestion: How long is the refund window?\nAnswer: The refund window is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, TEXT)
    biased = kv.editors.Emphasize(SPAN, strength=4.6)(memory)
    edited = kv.editors.Compile(on_fail="refuse")(biased, kv.calibrate(model, tokenizer))
    return memory, edited


@pytest.fixture
def backend(smollm):
    model, _ = smollm
    before = model.config._attn_implementation
    yield model.set_attn_implementation
    model.set_attn_implementation(before)


def read(model, memory, ids):
    with kv.attach(model, memory) as session:
        parts = [session.forward(ids[:, :-1]), session.forward(ids[:, -1:])]
    return torch.cat(parts, dim=1)[0]


@pytest.mark.parametrize("name", ["eager", "flex_attention"])
def test_backends_agree_over_a_compiled_memory(smollm, compiled, backend, name):
    model, tokenizer = smollm
    memory, edited = compiled
    ids = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    backend("sdpa")
    wanted, plain = read(model, edited, ids), read(model, memory, ids)
    backend(name)
    found = read(model, edited, ids)
    # Logits are of order 20; the edit moves them by more than a thousand times the tolerance.
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
    assert float((wanted - plain).abs().max()) > 0.2


def test_the_plain_model_reads_a_compiled_memory_from_its_own_cache(smollm, compiled):
    """No kvedit at run time: transformers' DynamicCache, filled by hand, and a plain call."""
    from transformers import DynamicCache

    from kvedit.models.cache_argument import cache_argument

    model, tokenizer = smollm
    _, edited = compiled
    ids = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    wanted = read(model, edited, ids)
    cache = DynamicCache()
    for index, layer in edited.layers.items():
        cache.update(layer.keys[None].clone(), layer.values[None].clone(), index)
    with torch.no_grad():
        found = model(ids, **{cache_argument(model): cache}).logits[0]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
