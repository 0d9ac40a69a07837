"""Shared pieces of the steering tests."""

from __future__ import annotations

from functools import lru_cache

import pytest

from kvedit.models.tiny import tiny_model


@lru_cache(maxsize=32)
def cached_model(family, seed=0, rope=None):
    return tiny_model(family, seed=seed, rope=rope)


@pytest.fixture
def tiny():
    """``tiny(family="llama", seed=0, rope=None)``: a model and its tokenizer, built once."""

    def build(family="llama", seed=0, rope=None):
        return cached_model(family, seed, rope)

    return build
