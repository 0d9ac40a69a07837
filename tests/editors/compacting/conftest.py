"""What compaction is compared with: transformers' own passes, without kvedit."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvedit.memory import KVMemory
from kvedit.models.cache_argument import cache_argument


@dataclass(frozen=True, eq=False)
class Pass:
    """One eager pass of transformers over token ids."""

    attention: list[np.ndarray]  # [query_head, query, token] per layer
    keys: list[np.ndarray]  # [kv_head, token, dim], after RoPE
    values: list[np.ndarray]
    queries: list[np.ndarray]  # [query_head, token, dim], before RoPE


@functools.cache
def _run(model: Any, ids: tuple[int, ...], hidden: tuple[int, int, int] | None) -> Pass:
    from transformers import DynamicCache

    cache, queries, handles = DynamicCache(), [], []
    for name, module in model.named_modules():
        wanted = "q_norm" if any("q_norm" in n for n, _ in model.named_modules()) else "q_proj"
        if name.endswith(wanted):
            handles.append(module.register_forward_hook(lambda m, a, out: queries.append(out)))
    if hidden is not None:  # tokens from `hidden[2]` on don't see tokens hidden[0] to hidden[1]

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[:, :, hidden[2] :, hidden[0] : hidden[1]] = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask}

        for module in model.modules():
            if hasattr(module, "layer_idx") and "Attention" in type(module).__name__:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            options = {cache_argument(model): cache, "output_attentions": True}
            found = model(torch.tensor([ids]), **options)
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()
    heads, count = found.attentions[0].shape[1], len(ids)
    return Pass(
        [a[0].double().numpy() for a in found.attentions],
        [layer.keys[0].double().numpy() for layer in cache.layers],
        [layer.values[0].double().numpy() for layer in cache.layers],
        [_heads_first(q[0], heads, count) for q in queries],
    )


def _heads_first(queries: torch.Tensor, heads: int, count: int) -> np.ndarray:
    if queries.ndim == 2:  # straight from the projection
        queries = queries.reshape(count, heads, -1)
    if queries.shape[0] == count and queries.shape[1] == heads:
        queries = queries.transpose(0, 1)
    return queries.double().numpy()


@pytest.fixture(scope="session")
def own_pass() -> Any:
    """``own_pass(model, ids, hidden=None)``: what transformers computes, as numpy float64."""

    def run(model: Any, ids: Any, hidden: tuple[int, int, int] | None = None) -> Pass:
        return _run(model, tuple(int(token) for token in ids), hidden)

    return run


@pytest.fixture(scope="session")
def kept_sets() -> Any:
    """``kept_sets(memory, layer)``: for each KV head, the source tokens that it can read."""

    def run(memory: KVMemory, index: int) -> list[set[int]]:
        layer, group = memory.layers[index], memory.model.layers[index].group
        found = []
        for head in range(layer.heads):
            seen = torch.ones(layer.slots, dtype=torch.bool)
            if layer.bias is not None:
                seen = (layer.bias[head * group : (head + 1) * group] > -torch.inf).all(0)
            found.append(set(layer.source[seen].tolist()))
        return found

    return run
