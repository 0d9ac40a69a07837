"""Matched memories of tiny models, and attention written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvedit.memory import KVMemory, LayerKV, LayerSpec
from kvedit.runtime import ModelReader


def _attended(
    layer: LayerKV, spec: LayerSpec, queries: torch.Tensor, head: int
) -> tuple[np.ndarray, np.ndarray]:
    keys, values = (x[head // spec.group].double().numpy() for x in (layer.keys, layer.values))
    s = spec.scale * queries[head].double().numpy() @ keys.T
    if spec.softcap is not None:
        s = spec.softcap * np.tanh(s / spec.softcap)
    if layer.bias is not None:
        s = s + layer.bias[head].double().numpy()
    e = np.exp(s)
    return e @ values / e.sum(axis=1, keepdims=True), np.log(e.sum(axis=1))


@pytest.fixture(scope="session")
def attended() -> Any:
    """``attended(layer, spec, queries, query_head)``: local output [query, dim], log-mass."""
    return _attended


@pytest.fixture(scope="session")
def reader(subject: Any) -> Any:
    """``reader(family)``: the subject's model as editors may use it."""

    def of(family: str) -> ModelReader:
        found = subject(family)
        return ModelReader(found.model, found.tokenizer)

    return of


@pytest.fixture(scope="session")
def full_layers() -> Any:
    """``full_layers(memory)``: layers that attention matching changes."""

    def of(memory: KVMemory) -> list[int]:
        return [i for i in memory.layers if memory.model.layers[i].window is None]

    return of
