"""What SEKA's tests share: tiny models in float64, their reader, and an operand of each kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import kvedit as kv
from kvedit.memory import KVMemory, ModelSpec
from kvedit.models.inspection import inspect
from kvedit.runtime import ModelReader
from kvedit.testing import CONTEXT, make_test_operand, tiny_model


@dataclass(frozen=True, eq=False)
class Bench:
    """A tiny model, its memory of the matrix's context, and what was learned of it."""

    model: Any
    tokenizer: Any
    reader: ModelReader
    spec: ModelSpec
    memory: KVMemory
    projectors: KVMemory
    experts: KVMemory

    def rotation(self, layer: int, position: int) -> np.ndarray:
        """The matrix that turns a key of a layer to a position, built pair by pair."""
        spec = self.memory.model.layers[layer]
        matrix, rope = np.eye(spec.key_dim), spec.rope
        pairs = 0 if rope is None else len(rope.inv_freq)
        for pair in range(pairs):
            angle = position * rope.inv_freq[pair]
            x, y = (pair, pair + pairs) if rope.layout == "half" else (2 * pair, 2 * pair + 1)
            matrix[x, x] = matrix[y, y] = np.cos(angle)
            matrix[x, y], matrix[y, x] = -np.sin(angle), np.sin(angle)
        return matrix


@functools.cache
def _bench(family: str) -> Bench:
    model, tokenizer = tiny_model(family, dtype=torch.float64)
    return Bench(
        model,
        tokenizer,
        ModelReader(model, tokenizer),
        inspect(model, tokenizer).spec,
        kv.capture(model, tokenizer, CONTEXT),
        make_test_operand("projectors", model, tokenizer),
        make_test_operand("experts", model, tokenizer),
    )


@pytest.fixture
def bench() -> Any:
    """``bench(family)``; the same object for the same family."""
    return _bench
