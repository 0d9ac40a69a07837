"""kvedit.testing is public: light to import, complete, and its oracle notices a wrong memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import kvedit.testing
from kvedit.editors import Drop, Shift
from kvedit.errors import InvalidArgument
from kvedit.testing import (
    CONTEXT,
    EDITOR_CASES,
    EDITOR_FAMILIES,
    closed_form_bias,
    recompute,
    tolerances,
)
from kvedit.testing.tolerances import FP64_ORACLE, VISIBLE_EFFECT


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import json, sys, kvedit.testing; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "kvedit.testing" in loaded
    assert not loaded & {"torch", "transformers", "kvedit.testing.oracle", "kvedit.models"}


def test_every_name_resolves() -> None:
    assert all(getattr(kvedit.testing, name) is not None for name in kvedit.testing.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tiny_modle'"):
        kvedit.testing.tiny_modle  # noqa: B018


def test_tolerances_are_small_and_ordered() -> None:
    values = {name: getattr(tolerances, name) for name in tolerances.__all__}
    assert all(0 < value < 1 for value in values.values())
    assert values["FP32_BIAS"] < values["FP32_ORACLE"] < values["FP32_LOGITS"]
    assert values["FP64_ORACLE"] * 100 <= values["VISIBLE_EFFECT"]


def test_rows_are_plain_data() -> None:
    for case in EDITOR_CASES:
        assert json.loads(json.dumps(case.parameters)) == case.parameters
        assert not (case.identity and case.slots)
    assert CONTEXT.isascii()
    assert set(EDITOR_FAMILIES) <= set(kvedit.testing.family_names())


@pytest.mark.parametrize("wrong", ["one slot more", "one bias more", "another head"])
def test_the_oracle_notices_a_wrong_memory(wrong: str, subject: Any, continued: Any) -> None:
    found = subject("gemma3")
    right = Drop({"tokens": [-6, -2]}, kv_heads=(1,))(found.memory)
    layer = right.layers[2]
    assert layer.bias is not None
    bias = layer.bias.clone()
    if wrong == "one slot more":
        bias[2:, -6] = 0
    elif wrong == "one bias more":
        bias[0, -1] = 0.1
    else:
        bias = bias.flip(0)
    other = right.with_layers({2: dataclasses.replace(layer, bias=bias)})
    logits = continued(found.model, right, found.continuation)
    error = (logits - recompute(found.model, other, found.continuation)).abs().max()
    assert error > VISIBLE_EFFECT
    again = recompute(found.model, right, found.continuation)
    assert (logits - again).abs().max() <= FP64_ORACLE


def test_the_oracle_leaves_the_model_as_it_was(subject: Any) -> None:
    found = subject("llama")
    hooks = sum(len(m._forward_pre_hooks) for m in found.model.modules())
    before = found.weights()
    recompute(found.model, found.memory, found.continuation)
    assert found.model.config._attn_implementation == "sdpa"
    assert sum(len(m._forward_pre_hooks) for m in found.model.modules()) == hooks
    assert found.weights() == before


def test_the_oracle_refuses_what_it_cannot_certify(subject: Any) -> None:
    found = subject("llama")
    with pytest.raises(InvalidArgument, match="not at their tokens' positions"):
        recompute(found.model, Shift(3)(found.memory), found.continuation)
    layers = {
        index: dataclasses.replace(layer, source=torch.full_like(layer.source, -1))
        for index, layer in found.memory.layers.items()
    }
    bare = dataclasses.replace(found.memory, layers=layers, source=None)
    with pytest.raises(InvalidArgument, match="this memory has none"):
        recompute(found.model, bare, found.continuation)


def test_the_closed_form_is_softmax_with_a_bias() -> None:
    """Multiplying weights by e**b and renormalising is adding b to logits."""
    query, keys = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    values, bias = torch.randn(3, 6, 5), torch.randn(3, 6)
    bias[0, 2] = -torch.inf
    visible = torch.ones(4, 6).tril(2).bool()
    logits = (query.double() @ keys.double().transpose(1, 2)) * 0.3 + bias.double()[:, None]
    expected = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values.double()
    found = closed_form_bias(query, keys, values, bias, 0.3, visible)
    assert (found - expected).abs().max() < 1e-12
