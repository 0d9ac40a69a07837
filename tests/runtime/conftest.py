"""Shared pieces of the runtime's tests."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from kvedit.models.tiny import tiny_model

TEXT = (
    "The shop sells lamps, clocks and radios. The refund window is 60 days. Shipping is free for "
    "members. Please keep the receipt."
)


@lru_cache(maxsize=64)
def cached_model(family, attn=None, dtype=torch.float32, rope=None):
    """A tiny model, built once; None where transformers has no such backend for the family."""
    try:
        return tiny_model(family, attn=attn, dtype=dtype, rope=rope)
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            return None
        raise


@pytest.fixture
def tiny():
    """Builds tiny models; skips what transformers itself refuses."""

    def build(family="llama", attn=None, dtype=torch.float32, rope=None):
        found = cached_model(family, attn, dtype, rope)
        if found is None:
            pytest.skip(f"transformers has no {attn} attention for {family}")
        return found

    return build
