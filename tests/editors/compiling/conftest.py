"""Memories with bias, and the queries of the tiny models that made them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.memory import KVMemory
from kvedit.testing import tiny_model
from kvedit.testing.compiling import make_queries

CONTEXT = (
    "The thing in the box is the answer. The refund window is 60 days, and you would not wait for "
    "it. That is all."
)


@dataclass(frozen=True, eq=False)
class Subject:
    """A tiny model, its memory of the context, and its queries."""

    model: Any
    tokenizer: Any
    memory: KVMemory
    queries: KVMemory


@functools.cache
def _subject(family: str) -> Subject:
    model, tokenizer = tiny_model(family)
    memory = kv.capture(model, tokenizer, CONTEXT)
    return Subject(model, tokenizer, memory, make_queries(model, tokenizer))


@pytest.fixture(scope="session")
def compiling() -> Any:
    """``compiling(family)``; the same object for the same family."""
    return _subject


@pytest.fixture
def biased() -> Any:
    """``biased(memory, {(layer, query_head): nats}, slots)``: a memory with bias on some slots."""

    def make(memory: KVMemory, heads: dict[tuple[int, int], float], slots: Any) -> KVMemory:
        changed = {}
        for index, layer in memory.layers.items():
            bias = torch.zeros(memory.model.layers[index].query_heads, layer.slots)
            for (at, head), amount in heads.items():
                if at == index:
                    bias[head, slots] = amount
            if bool(bias.ne(0).any()):
                changed[index] = layer.add_bias(bias)
        return memory.with_layers(changed)

    return make
