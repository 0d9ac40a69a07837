"""capture → edit → store → load → attach is bit-equal to capture → edit → attach."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kvedit as kv
from kvedit.testing import CONTEXT, EDITOR_CASES, tiny_model

PROMPT = torch.tensor([[40, 51, 62, 73]])


def _logits(model, memory):
    with kv.attach(model, memory) as session:
        return torch.cat([session.forward(PROMPT), session.forward(PROMPT[:, :1])], dim=1)


@pytest.mark.parametrize("case", EDITOR_CASES, ids=lambda case: case.name)
def test_every_editor_survives_the_store_bit_for_bit(tmp_path, case):
    model, tokenizer = tiny_model("llama")
    memory = case.apply(kv.capture(model, tokenizer, CONTEXT), model, tokenizer)
    store = kv.Store(tmp_path)
    store.put(memory, "one")
    again = store.get("one")
    assert again.digest == memory.digest
    assert again.lineage == memory.lineage
    assert torch.equal(_logits(model, again), _logits(model, memory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "gpt2", "cohere2", "llama4_text"])
def test_every_kind_of_layer_survives_the_store(tmp_path, family, dtype):
    model, tokenizer = tiny_model(family, dtype=dtype)
    memory = kv.capture(model, tokenizer, CONTEXT, window="windowed")
    store = kv.Store(tmp_path)
    store.put(memory, "one")
    assert torch.equal(_logits(model, store.get("one")), _logits(model, memory))


FRESH = """
import sys
import torch
torch.set_num_threads(1)
import kvedit as kv
from kvedit.memory.digest import digest_tensor
from kvedit.testing import tiny_model

model, tokenizer = tiny_model("gemma3")
with kv.attach(model, kv.Store(sys.argv[1]).get("one")) as session:
    print(digest_tensor(session.forward(torch.tensor([[40, 51, 62, 73]]))))
"""


def test_a_fresh_process_gets_bit_equal_logits(tmp_path):
    from kvedit.memory.digest import digest_tensor

    model, tokenizer = tiny_model("gemma3")
    memory = kv.capture(model, tokenizer, CONTEXT)
    memory = kv.editors.Emphasize(span="60 days", strength=1.3, heads=(0, 2))(memory)
    memory = kv.editors.Drop(span="would not wait", layers=(1,))(memory)
    kv.Store(tmp_path).put(memory, "one")
    with kv.attach(model, memory) as session:
        here = digest_tensor(session.forward(PROMPT))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == here
