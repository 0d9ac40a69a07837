"""The packaged model, its memories in a store, and what HF says over each, made once a session."""

import importlib.util
from functools import cache

import pytest

import kvedit as kv
from tests.serving.vllm.harness import Ask, as_request, said_by_hf


def pytest_runtest_setup(item):
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM lives in an environment of its own: run make test-vllm")


@pytest.fixture(scope="session")
def folder(smollm):
    from kvedit.models.packaged import packaged_folder

    return packaged_folder()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """The folder of the store."""
    return tmp_path_factory.mktemp("served") / "memories"


@pytest.fixture(scope="session")
def store(place):
    return kv.Store(place)


@pytest.fixture(scope="session")
def model(folder):
    """SmolLM2 in float32 and its tokenizer, as files know it."""
    import torch

    return kv.load("smollm2-135m", dtype=torch.float32)


@pytest.fixture(scope="session")
def asks(store, model):
    """Everything that is asked, by name: a request for each memory, and plain texts."""
    from kvedit.serving import request
    from tests.serving.vllm.cases import QUESTIONS, TEXTS, memories

    found = {}
    for name, text, memory in memories(*model):
        store.put(memory, name)
        made = request(store, name, QUESTIONS[text], model[1])
        found[name] = as_request(Ask(name, (), (), memory), made)
    for name, text in TEXTS.items():
        ids = tuple(model[1](text + QUESTIONS[name]).input_ids)
        found[f"{name}-plain"] = Ask(f"{name}-plain", ids, ())
    return found


@pytest.fixture(scope="session")
def expected(model, asks):
    """``expected(name)``: what HF says."""
    return cache(lambda name: said_by_hf(model[0], asks[name]))
