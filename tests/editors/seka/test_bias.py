"""The effective bias against attention scores that the model itself shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.editors import Emphasize, Seka
from kvedit.editors.seka import effective_bias
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.runtime import ModelReader
from kvedit.testing import CONTEXT, make_test_operand, tiny_model

PROMPTS = (" and the answer", " is that you would")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "llama4_text"])
def test_it_equals_the_change_of_the_scores(family: str) -> None:
    """Scores come from the tap, with scale, cap and window; only keys of the memory differ."""
    dtype = torch.float32 if family in ("gpt_oss", "llama4_text") else torch.float64
    model, tokenizer = tiny_model(family, dtype=dtype)
    reader = ModelReader(model, tokenizer)
    memory = kv.capture(model, tokenizer, CONTEXT)
    operand = make_test_operand("projectors", model, tokenizer)
    last = len(memory.model.layers) - 1
    edited = Seka("That is all", 2.0, min_difference=0.0, layers=(last,))(memory, operand)
    report = effective_bias(memory, edited, reader, PROMPTS)
    slots = memory.resolve("That is all").mask(memory.layers[last]).nonzero().flatten()
    values = []
    for prompt in PROMPTS:
        # The last layer's queries don't depend on its own keys, so both passes have the same.
        before, after = (
            reader.read(m, reader.encode(prompt), ("scores",))["scores"][last][0]
            for m in (memory, edited)
        )
        pair = torch.stack((before[:, :, slots], after[:, :, slots])).double()
        seen = pair.isfinite().all(dim=0).all(dim=0)
        values.append((pair[1] - pair[0])[:, seen])
    expected = torch.cat(values, dim=1)
    assert report.samples == {last: expected.shape[1]}
    for found, wanted in (
        (report.mean, expected.mean(dim=1)),
        (report.spread, expected.std(dim=1, correction=0)),
        (report.lowest, expected.amin(dim=1)),
        (report.highest, expected.amax(dim=1)),
    ):
        assert (found[last] - wanted).abs().max() <= 1e-5
    assert report.summary()["heads"] == memory.model.layers[last].query_heads
    assert report.spread[last].max() > 1e-3


def test_what_has_no_effective_bias_is_refused(bench: Any) -> None:
    found = bench("llama")
    edited = Seka("you would")(found.memory, found.projectors)
    with pytest.raises(InvalidArgument, match="changed keys in 0 layers"):
        biased = Emphasize("you would", strength=1.0)(found.memory)
        effective_bias(found.memory, biased, found.reader, PROMPTS)
    with pytest.raises(InvalidArgument, match="found 0 prompts"):
        effective_bias(found.memory, edited, found.reader, ())
    with pytest.raises(InvalidArgument, match="same slots"):
        effective_bias(found.memory, kv.editors.Drop("That")(edited), found.reader, PROMPTS)
    with pytest.raises(IncompatibleModel):
        effective_bias(found.memory, bench("qwen3").memory, found.reader, PROMPTS)
    gemma = bench("gemma3")
    far = Seka("refund window")(gemma.memory, gemma.projectors)
    with pytest.raises(InvalidArgument, match="out of reach"):
        effective_bias(gemma.memory, far, gemma.reader, PROMPTS)
