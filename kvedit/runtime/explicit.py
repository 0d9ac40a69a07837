"""Attention written out: logits, weights and output, for those who want to see them.

Backends such as sdpa never hold the weights. This computes them from the same call, with the
same scaling, softcap, mask, bias and sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat

from kvedit.models.attention_call import AttentionCall, MaskRule

__all__ = ["Weights", "attention_scores", "attention_weights", "weighted_values"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Attention of one call.

    Args:
        scores: ``[batch, query_head, query, slot]`` float32 logits: scaled, capped, masked and
            biased; -inf where a slot is not seen.
        pattern: ``[batch, query_head, query, slot]`` float32 weights; below 1 in sum where the
            layer has sinks.
    """

    scores: torch.Tensor
    pattern: torch.Tensor


def attention_scores(call: AttentionCall) -> torch.Tensor:
    """Returns the logits ``[batch, query_head, query, slot]`` in float32."""
    group = call.query.shape[1] // call.key.shape[1]
    key = repeat(call.key, "batch head slot dim -> batch (head group) slot dim", group=group)
    scores = torch.einsum("bhqd,bhsd->bhqs", call.query.float(), key.float()) * call.scale
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return _masked(call, scores)


def _masked(call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
    mask = call.mask
    if isinstance(mask, MaskRule):
        mask = mask.build("eager")
    mask = call.options.get("position_bias") if mask is None else mask
    if call.bias is not None:
        scores = scores + call.bias.float()
    if mask is None:
        if call.causal and scores.shape[2] > 1:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            return scores.masked_fill(~seen.tril(scores.shape[3] - scores.shape[2]), -torch.inf)
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    # Masks written with the dtype's lowest number mean "not seen", as -inf does.
    lowest = torch.finfo(mask.dtype).min
    masked: torch.Tensor = scores + mask.float().masked_fill(mask <= lowest, -torch.inf)
    return masked


def attention_weights(call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
    """Returns the weights for logits ``[batch, query_head, query, slot]``, sinks included."""
    sinks = call.options.get("s_aux")
    if sinks is None:
        return scores.softmax(dim=-1)
    batch, _, queries, _ = scores.shape
    column = repeat(sinks.float(), "head -> batch head query 1", batch=batch, query=queries)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def weighted_values(call: AttentionCall, pattern: torch.Tensor) -> torch.Tensor:
    """Returns the output ``[batch, query, query_head, dim]`` for given weights."""
    group = call.query.shape[1] // call.value.shape[1]
    value = repeat(call.value, "batch head slot dim -> batch (head group) slot dim", group=group)
    output = torch.einsum("bhqs,bhsd->bhqd", pattern, value.float()).to(call.value.dtype)
    return rearrange(output, "batch head query dim -> batch query head dim").contiguous()
