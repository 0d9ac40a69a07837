"""Shared pieces of the profiling tests: tiny models, built once, and a few probes."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from kvedit.evals.profiling import Probe
from kvedit.models import tiny_model

FACTS = (
    ("shop", "lamps", "clocks"),
    ("school", "boats", "trains"),
    ("farm", "apples", "carrots"),
    ("museum", "stones", "pictures"),
)


@lru_cache(maxsize=8)
def _model(family):
    # float64: rows of a batch and a row alone then differ by rounding that no one sees
    return tiny_model(family, dtype=torch.float64)


@pytest.fixture
def tiny():
    """Builds tiny models."""
    return _model


@pytest.fixture
def probes():
    """Four conflicts, each with a prompt about something else."""
    return [
        Probe(
            context=f"Previously, the {place} sold {old}. Now the {place} sells {new}. It is red.",
            span=f"Now the {place} sells {new}.",
            prompt=f" Today the {place} sells",
            wanted=f" {new}",
            rival=f" {old}",
            unrelated=" The colour of it is",
        )
        for place, old, new in FACTS
    ]
