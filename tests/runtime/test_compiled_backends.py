"""A compiled memory is plain keys and values: every backend gives the same logits over it."""

from __future__ import annotations

import subprocess
import sys

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


def read(model, memory, ids):
    with kv.attach(model, memory) as session:
        parts = [session.forward(ids[:, :-1]), session.forward(ids[:, -1:])]
    return torch.cat(parts, dim=1)[0]


def test_eager_agrees_over_a_compiled_memory(smollm, compiled):
    model, tokenizer = smollm
    memory, edited = compiled
    ids = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids
    before = model.config._attn_implementation
    wanted, plain = read(model, edited, ids), read(model, memory, ids)
    model.set_attn_implementation("eager")
    try:
        found = read(model, edited, ids)
    finally:
        model.set_attn_implementation(before)
    # Logits are of order 20; the edit moves them by more than a thousand times the tolerance.
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)
    assert float((wanted - plain).abs().max()) > 0.2


FLEX = """
import sys, torch
torch.set_num_threads(1)
import kvedit as kv
folder, question = sys.argv[1:]
model, tokenizer = kv.load("smollm2-135m")
with kv.Store(folder) as store:
    memory = store.get("compiled")
ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
logits = []
for name in ("sdpa", "flex_attention"):
    model.set_attn_implementation(name)
    with kv.attach(model, memory) as session:
        parts = [session.forward(ids[:, :-1]), session.forward(ids[:, -1:])]
        logits.append(torch.cat(parts, dim=1))
print("error", float((logits[0] - logits[1]).abs().max()))
"""


def test_flex_agrees_over_a_stored_compiled_memory(compiled, tmp_path):
    """In a process of its own: what was compiled before can break torch's compiler on CPUs."""
    with kv.Store(tmp_path / "store") as store:
        store.put(compiled[1], "compiled")
    command = [sys.executable, "-c", FLEX, str(tmp_path / "store"), QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if "error" not in done.stdout and "Inductor" in done.stderr:
        pytest.skip(f"this torch can't compile flex_attention here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) <= 2e-4


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
