"""Tiny models with a captured memory, and samples with a made-up teacher, for training tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import kvedit as kv
from kvedit.cartridges import Sample
from kvedit.memory import KVMemory
from kvedit.models.tiny import tiny_model

TEXT = "The thing in the box is the answer. The refund window is 60 days, and you would wait."


@dataclass(frozen=True)
class Subject:
    """A model, its tokenizer, and a memory of a short text."""

    model: Any
    tokenizer: Any
    memory: KVMemory


@cache
def make_subject(family: str, attn: str | None, dtype: torch.dtype, seed: int) -> Subject:
    model, tokenizer = tiny_model(family, attn=attn, dtype=dtype, seed=seed)
    # flex compiles on the CPU for minutes; the memory is the same
    reads = tiny_model(family, attn="sdpa")[0] if attn == "flex_attention" else model
    return Subject(model, tokenizer, kv.capture(reads, tokenizer, TEXT))


@pytest.fixture(scope="session")
def subject():
    """``subject(family)``; models are shared, so tests must leave them as they are."""

    def get(
        family: str = "llama",
        attn: str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Subject:
        return make_subject(family, attn, dtype, seed)

    return get


@pytest.fixture(scope="session")
def sample_of():
    """``sample_of(number, tokens, start)``: random tokens, a random teacher with a tail."""

    def make(number: int, tokens: int = 9, start: int = 4, choices: int = 5) -> Sample:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(10, 300, (tokens,), generator=draw)
        logits = 2 * torch.randn(tokens - start, 300, generator=draw)
        top = logits.log_softmax(dim=1).topk(choices)
        tail = torch.log1p(-top.values.exp().sum(dim=1))
        return Sample(
            key=str(number), document="d", kind="question", question="?", answer="!",
            tokens=ids, start=start, top_ids=top.indices, top_logprobs=top.values, tail=tail,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def samples(sample_of):
    """Samples of several lengths."""
    sizes = [(9, 4), (14, 3), (6, 2), (20, 10), (11, 8), (7, 1), (16, 5), (5, 4)]
    return [sample_of(number, tokens, start) for number, (tokens, start) in enumerate(sizes)]


class Notes:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, step, metrics):
        self.logged.append((step, dict(metrics)))

    def table(self, name, columns, rows):
        raise AssertionError("training logs no table")

    def artifact(self, name, path, metadata):
        raise AssertionError("training logs no artifact")

    def close(self):
        raise AssertionError("the tracker belongs to the caller")

    def series(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.logged if name in metrics]


@pytest.fixture
def notes():
    return Notes()
