"""The oracle: one full forward pass in which later tokens see what an edited memory holds.

It shares nothing with the runtime but the model: no cache, no memory's keys. A full pass over
context and continuation runs under eager attention; each layer's additive mask is changed for
the continuation's rows only. What a memory evicts or biases, those rows lose or are biased by;
rows of the context are as they were at capture. So it certifies Drop, Keep, bias, ragged layers
and per-head eviction, on every family whose eager attention takes a mask.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV
from kvedit.models.inspection import inspect
from kvedit.models.route import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["closed_form_bias", "recompute"]


def recompute(model: PreTrainedModel, memory: KVMemory, continuation: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a continuation by recomputing context and continuation in full.

    Args:
        model: the model that made the memory.
        memory: a captured memory after any of Drop, Keep, bias; not shifted.
        continuation: ``[query]`` token ids.

    Returns:
        Logits ``[query, vocabulary]``.

    Raises:
        InvalidArgument: if slots do not stand at their tokens' own positions.
    """
    if memory.tokens is None:
        raise InvalidArgument("the oracle recomputes from tokens; this memory has none")
    for index, layer in memory.layers.items():
        if not torch.equal(layer.source, layer.positions):
            raise InvalidArgument(f"layer {index}: slots are not at their tokens' positions")
    context = len(memory.tokens)
    ids = torch.cat((memory.tokens, continuation.cpu()))[None].to(model.device)
    modules = inspect(model).attention
    with _eager(model), _masked(modules, memory, context, ids.shape[1]), torch.no_grad():
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0, context:]


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    original = plain_name(model)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(original)


@contextmanager
def _masked(modules: Any, memory: KVMemory, context: int, total: int) -> Iterator[None]:
    handles = []
    for index, module in modules.items():
        heads = memory.model.layers[index].query_heads
        extra = _extra(memory.layers[index], heads, context, total)
        handles.append(module.register_forward_pre_hook(_adder(module, extra), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _extra(layer: LayerKV, heads: int, context: int, total: int) -> torch.Tensor:
    """Additive change ``[1, query_head, total, total]`` for rows of the continuation."""
    columns = torch.full((heads, total), -torch.inf)
    columns[:, context:] = 0
    columns[:, layer.source.cpu()] = 0 if layer.bias is None else layer.bias.cpu()
    extra = torch.zeros(1, heads, total, total)
    extra[0, :, context:, :] = columns[:, None, :]
    return extra


def _adder(module: torch.nn.Module, extra: torch.Tensor) -> Any:
    names = list(signatures.signature(module.forward).parameters)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given["attention_mask"]
        changed = mask + extra.to(mask)
        given["attention_mask"] = changed.clamp_min(torch.finfo(mask.dtype).min)
        return (), given

    return hook


def closed_form_bias(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Returns attention whose weights are multiplied by ``e**bias`` and renormalised, in float64.

    Args:
        query: ``[query_head, query, dim]``.
        keys: ``[query_head, slot, dim]``, repeated to query heads.
        values: ``[query_head, slot, dim]``, likewise.
        bias: ``[query_head, slot]`` nats; -inf removes a slot.
        scale: factor on query-key products.
        visible: ``[query, slot]`` bool.

    Returns:
        Output ``[query_head, query, dim]`` float64.
    """
    logits = torch.einsum("hqd,hsd->hqs", query.double(), keys.double()) * scale
    weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    weights = weights * bias.double().exp()[:, None, :]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("hqs,hsd->hqd", weights, values.double())
