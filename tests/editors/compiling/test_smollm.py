"""The bias compiler on a trained model: it compiles, the certificate holds, no head is dropped."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.editors.compiling import Compile, certify
from kvedit.store.codecs import approximate

CONTEXT = (
    "The handbook of the library. Books are lent for four weeks. The refund window is 60 days. "
    "Late books cost ten cents a day. The reading room is open from nine to five, and on Saturdays "
    "until noon. Children under twelve need a card that a parent has signed."
)
SPAN = "The refund window is 60 days"
QUESTION = "\nQuestion: How long is the refund window?\nAnswer: The refund window is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def steered(smollm):
    model, tokenizer = smollm
    memory = kv.capture(model, tokenizer, CONTEXT)
    biased = kv.editors.Emphasize(SPAN, strength=4.6)(memory)
    return memory, biased, kv.calibrate(model, tokenizer)


def test_it_compiles_at_pastas_strength_within_a_thousand_positions(steered):
    memory, biased, queries = steered
    certificate = certify(biased, queries, Compile(on_fail="refuse"))
    assert certificate.ok, str(certificate)
    assert len(certificate.heads) == 270
    assert certificate.share(by="kv")[0] > 0.95  # KV heads with a mean within 0.97 to 1.03
    assert certificate.share(mean=0.07)[0] == 1.0
    assert certificate.share()[1] > 0.85
    edited = Compile(on_fail="refuse")(biased, queries)
    assert edited.servable()
    for ours, theirs in zip(edited.layers.values(), memory.layers.values(), strict=True):
        assert (ours.keys.shape, ours.bias) == (theirs.keys.shape, None)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_storage_does_not_change_the_verdict(steered, storage):
    _, biased, queries = steered
    assert certify(biased, queries, Compile(storage=storage)).ok


def test_the_compiled_memory_steers_as_the_exact_bias_does(smollm, steered):
    model, tokenizer = smollm
    memory, biased, queries = steered
    edited = Compile()(biased, queries)
    rounded = edited.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    ids = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    logs = []
    for kept in (memory, biased, edited, rounded, approximate(edited, "int8")[0]):
        with kv.attach(model, kept) as session:
            logs.append(session.forward(ids)[0].log_softmax(-1))
    plain, exact, *compiled = logs
    moved = float((exact.exp() * (exact - plain)).sum(-1).mean())
    for found in compiled:
        # What is left between compiled and exact is a small part of what the bias does.
        assert float((exact.exp() * (exact - found)).sum(-1).mean()) < 0.1 * moved
