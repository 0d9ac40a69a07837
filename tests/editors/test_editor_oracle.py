"""Edited memories against a full recomputation that shares only the model with the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.testing import (
    EDITOR_CASES,
    EDITOR_FAMILIES,
    EditorCase,
    family_names,
    recompute,
)
from kvedit.testing.compaction import COMPACTION_ROWS
from kvedit.testing.tolerances import FP32_ORACLE, FP64_ORACLE, VISIBLE_EFFECT

CASES = [case for case in EDITOR_CASES if case.oracle]
by_name = {"ids": lambda case: case.name}
every_case = pytest.mark.parametrize("case", CASES, **by_name)
hard = [c for c in CASES if c.name in ("chain-of-three", "drop-kv-head", "emphasize-pasta")]
COMPACTED = {row["name"] for row in COMPACTION_ROWS}

Certify = Callable[[Any, KVMemory, bool], None]


@pytest.fixture
def certify(continued: Any) -> Certify:
    def run(found: Any, edited: KVMemory, effect: bool) -> None:
        logits = continued(found.model, edited, found.continuation)
        _compare(found, edited, logits, effect)

    return run


def _compare(found: Any, edited: KVMemory, logits: torch.Tensor, effect: bool) -> None:
    expected = recompute(found.model, edited, found.continuation)
    error = (logits - expected).abs().max()
    wide = found.model.dtype == torch.float64
    assert error <= (FP64_ORACLE if wide else FP32_ORACLE * expected.abs().max().clamp_min(1))
    change = (logits - found.logits).abs().max()
    if effect:
        assert change > VISIBLE_EFFECT
    else:
        assert change == 0


@pytest.mark.parametrize("family", EDITOR_FAMILIES)
@every_case
def test_edited_memory_equals_recomputation(
    case: EditorCase, family: str, subject: Any, certify: Certify
) -> None:
    found = subject(family)
    certify(found, found.apply(case.build()), not case.identity)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@every_case
def test_edited_memory_equals_recomputation_in_fp32(
    case: EditorCase, family: str, subject: Any, certify: Certify
) -> None:
    found = subject(family, torch.float32)
    certify(found, found.apply(case.build()), not case.identity)


@pytest.mark.parametrize("case", hard, **by_name)
def test_slots_that_windows_forgot_change_nothing(
    case: EditorCase, subject: Any, certify: Certify, continued: Any
) -> None:
    found = subject("gemma3", window="windowed")
    counts = {layer.slots for layer in found.memory.layers.values()}
    assert len(counts) == 2
    edited = found.apply(case.build())
    certify(found, edited, effect=True)
    whole = continued(found.model, subject("gemma3").apply(case.build()), found.continuation)
    windowed = continued(found.model, edited, found.continuation)
    assert (whole - windowed).abs().max() <= FP64_ORACLE


@pytest.mark.parametrize(
    "attn",
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # flex compiles: minutes
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("case", hard, **by_name)
def test_other_attention_backends_agree(
    case: EditorCase, family: str, attn: str, subject: Any, certify: Certify
) -> None:
    found = subject(family, torch.float32)
    found.model.set_attn_implementation(attn)
    try:
        certify(found, found.apply(case.build()), effect=True)
        assert found.model.config._attn_implementation == attn
    finally:
        found.model.set_attn_implementation("sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in family_names() if name not in EDITOR_FAMILIES])
@every_case
def test_all_other_families(case: EditorCase, family: str, subject: Any, certify: Certify) -> None:
    found = subject(family)
    windows = all(layer.window is not None for layer in found.memory.model.layers)
    if windows and case.name in COMPACTED and "layers" not in case.parameters:
        # Windows keep such a memory small by themselves; compaction says so and does nothing.
        with pytest.raises(InvalidArgument, match="window"):
            found.apply(case.build())
        return
    certify(found, found.apply(case.build()), not case.identity)
