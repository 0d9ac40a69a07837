"""Mask and bias in the form that each backend takes."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvedit.errors import UnsupportedModel
from kvedit.models.attention_call import AttentionCall

__all__ = ["finish"]


def finish(
    call: AttentionCall, mask: torch.Tensor | None, causal: bool, bias: torch.Tensor | None
) -> AttentionCall:
    """Returns ``call`` as its backend takes it.

    Args:
        call: the call as the model made it.
        mask: bool ``[batch, 1, query, slot]``, or None where nothing is hidden.
        causal: whether None stands for a causal square.
        bias: ``[batch or 1, query_head, slot]`` or None.

    Raises:
        UnsupportedModel: if the backend can't carry it.
    """
    if call.backend.startswith("fa"):
        if mask is not None:
            raise UnsupportedModel(
                "FlashAttention takes no mask: padding, several chunks of new tokens over a memory "
                "with gaps, and windows need attn='sdpa' or 'eager'"
            )
        return replace(call, mask=None, bias=None if bias is None else bias[:, :, None, :])
    if bias is not None:
        additive = bias[:, :, None, :]
        if causal:
            size = call.query.shape[2]
            mask = torch.ones(size, size, dtype=torch.bool, device=call.query.device).tril()
            mask = mask[None, None]
        if mask is not None:
            additive = additive.masked_fill(~mask, -torch.inf)
        mask, causal = additive, False
    if mask is not None and call.backend != "sdpa" and mask.dtype == torch.bool:
        mask = _additive(mask, call.query.dtype)
    if call.backend == "eager" and mask is None and causal:
        size = call.query.shape[2]
        square = torch.ones(size, size, dtype=torch.bool, device=call.query.device).tril()
        mask = _additive(square[None, None], call.query.dtype)
    if call.backend == "flex":
        return _for_flex(call, mask, causal)
    return replace(call, mask=mask, causal=causal)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, -torch.inf))


def _for_flex(call: AttentionCall, mask: torch.Tensor | None, causal: bool) -> AttentionCall:
    # flex indexes its mask by head 0 only; its position_bias takes every head, fully shaped.
    batch, heads, queries, _ = call.query.shape
    slots = call.key.shape[2]
    if mask is None and causal:
        square = torch.ones(queries, slots, dtype=torch.bool, device=call.query.device).tril()
        mask = _additive(square[None, None], call.query.dtype)
    options = dict(call.options)
    if mask is not None:
        options["position_bias"] = mask.expand(batch, heads, queries, slots).contiguous()
    return replace(call, mask=None, causal=False, options=options)
