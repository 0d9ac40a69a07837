"""transfer_report: errors that can be told beforehand, and a moved delta that is what it says."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.editors import Shift, Steer
from kvedit.errors import InvalidArgument
from kvedit.models.tiny import tiny_model
from kvedit.runtime import ModelReader
from kvedit.steering import transfer_report
from kvedit.testing.steering import random_delta

CONTEXT, PROMPT = "The refund window is 60 days. That is all.", " and so it is"


def test_reports() -> None:
    model, tokenizer = tiny_model("gemma3", dtype=torch.float64)
    reader = ModelReader(model, tokenizer)
    memory = kv.capture(model, tokenizer, CONTEXT)
    delta = random_delta(model, tokenizer, scale=0.5)
    same = transfer_report(reader, memory, delta, PROMPT, other=Shift(50)(memory))
    assert same.worst <= 1e-5  # RoPE tells only distances: another place is the same effect
    assert list(same.error) == [0, 1, 2, 3]
    half = transfer_report(reader, memory, delta, PROMPT, dtype=torch.bfloat16)
    assert 1e-4 < half.worst < 0.1
    assert torch.equal(
        half.delta.vectors["values"][0], delta.vectors["values"][0].bfloat16().float()
    )
    part = transfer_report(reader, memory, delta, PROMPT, layers=[1])
    assert part.delta.layers == (1,)
    assert part.error[0] == pytest.approx(1.0)
    assert part.length[0] == 0.0
    longer = kv.capture(model, tokenizer, "We would wait for the thing in the box. " + CONTEXT)
    far = transfer_report(reader, memory, delta, PROMPT, other=longer)
    assert far.worst > 0.01
    assert all(-1 <= value <= 1 for value in far.cosine.values())
    # By hand, for one layer: what the last slot's change adds in both contexts.
    ids, found = reader.encode(PROMPT), []
    for base in (memory, longer):
        edited = Steer(keys=1.0, values=1.0)(base, delta.operand())
        reads = [reader.read(m, ids, ("output",))["output"][2] for m in (edited, base)]
        found.append(reads[0] - reads[1])
    assert far.error[2] == pytest.approx(
        float((found[1] - found[0]).norm() / found[0].norm()), abs=1e-9
    )


def test_refusals() -> None:
    model, tokenizer = tiny_model("llama")
    reader, memory = ModelReader(model, tokenizer), kv.capture(model, tokenizer, CONTEXT)
    delta = random_delta(model, tokenizer)
    with pytest.raises(InvalidArgument, match="transfer to what"):
        transfer_report(reader, memory, delta, PROMPT)
    with pytest.raises(InvalidArgument, match="no effect on this prompt here"):
        transfer_report(reader, memory, delta, PROMPT, layers=[0], steer=Steer(values=0.0))
