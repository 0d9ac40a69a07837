"""One tiny model for all tests of this folder, a delta for it, and prompts."""

from __future__ import annotations

import pytest
import torch

import kvedit as kv
from kvedit.evals.steering import Asker, Bystanders
from kvedit.models import tiny_model
from kvedit.models.inspection import inspect

PROMPTS = [f"The thing number {i} was in the box of {w}" for i, w in enumerate("abcdefghij")]


@pytest.fixture(scope="session")
def tiny():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def delta(tiny):
    spec = inspect(*tiny).spec
    drawn = torch.Generator().manual_seed(3)
    vectors = {
        "keys": {1: torch.randn(2, spec.layers[1].key_dim, generator=drawn)},
        "values": {i: torch.randn(2, spec.layers[i].value_dim, generator=drawn) for i in (1, 2)},
        "residual": {1: torch.randn(64, generator=drawn)},
    }
    return kv.Delta(vectors, spec)


@pytest.fixture(scope="session")
def once(tiny):
    return Asker(*tiny, hold="prompt", offset="\n", chat=True, max_new_tokens=5, batch_size=4)


@pytest.fixture(scope="session")
def always(tiny):
    return Asker(*tiny, offset="\n", chat=True, max_new_tokens=5, batch_size=4)


@pytest.fixture(scope="session")
def bystanders(once):
    return Bystanders(once, PROMPTS)
