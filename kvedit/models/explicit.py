"""Attention written out: logits, weights and output.

For those who want to see the weights, which backends such as sdpa never hold, and for run-time
rules, which change logits by what the logits are. Scaling, softcap, mask, bias and sinks are those
of the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange

from kvedit.models.attention_call import AttentionCall, MaskRule, Output

__all__ = ["Weights", "attention_scores", "attention_weights", "run_explicit", "weighted_values"]

_SCORES_AT_ONCE = 1 << 26
"""Logits that are held at once: 256 MiB in float32. More queries are computed in parts."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Attention of one call.

    Args:
        scores: ``[batch, query_head, query, slot]`` logits: scaled, capped, masked, biased and
            adjusted by rules; -inf where a slot is not seen. Float32, or float64 where the model
            computes in it.
        pattern: ``[batch, query_head, query, slot]`` weights; below 1 in sum where the layer has
            sinks.
    """

    scores: torch.Tensor
    pattern: torch.Tensor


def attention_scores(call: AttentionCall) -> torch.Tensor:
    """Returns the logits ``[batch, query_head, query, slot]`` in float32 (float64 for float64)."""
    scores = _products(call)
    if call.adjust is not None:
        scores = call.adjust.products(scores)
    softcap = call.options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = _masked(call, scores)
    if call.adjust is not None:
        scores = call.adjust.logits(scores, call.options.get("s_aux"))
    return scores


def _products(call: AttentionCall) -> torch.Tensor:
    # Query heads that share a KV head become more queries of it, so that no key is repeated.
    query, key = (_wide(x) for x in (call.query, call.key))
    heads, queries = key.shape[1], query.shape[2]
    grouped = rearrange(
        query, "batch (head group) query dim -> batch head (group query) dim", head=heads
    )
    scores = (grouped * call.scale) @ key.transpose(2, 3)
    return rearrange(
        scores, "batch head (group query) slot -> batch (head group) query slot", query=queries
    )


def _wide(states: torch.Tensor) -> torch.Tensor:
    # Half precision is computed in float32; a wider dtype stays.
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _masked(call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
    mask = call.mask
    if isinstance(mask, MaskRule):
        mask = mask.build("eager")
    mask = call.options.get("position_bias") if mask is None else mask
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    if mask is None:
        if call.causal and scores.shape[2] > 1:
            seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            return scores.masked_fill(~seen.tril(scores.shape[3] - scores.shape[2]), -torch.inf)
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    # Masks written with the dtype's lowest number mean "not seen", as -inf does.
    lowest = torch.finfo(mask.dtype).min
    seen_bias = mask.to(scores.dtype).masked_fill(mask <= lowest, -torch.inf)
    masked: torch.Tensor = scores + seen_bias
    return masked


def attention_weights(call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
    """Returns the weights for logits ``[batch, query_head, query, slot]``, sinks included."""
    sinks = call.options.get("s_aux")
    if sinks is None:
        return scores.softmax(dim=-1)
    batch, _, queries, _ = scores.shape
    column = sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, queries, 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]


def weighted_values(call: AttentionCall, pattern: torch.Tensor) -> torch.Tensor:
    """Returns the output ``[batch, query, query_head, dim]`` for given weights."""
    heads, queries = call.value.shape[1], pattern.shape[2]
    grouped = rearrange(
        pattern, "batch (head group) query slot -> batch head (group query) slot", head=heads
    )
    output = (grouped @ call.value.to(pattern.dtype)).to(call.value.dtype)
    return rearrange(
        output, "batch head (group query) dim -> batch query (head group) dim", query=queries
    ).contiguous()


def run_explicit(call: AttentionCall) -> Output:
    """Computes attention from the call's logits, rules included, many queries in parts."""
    outputs = []
    for part in _parts(call):
        pattern = attention_weights(part, attention_scores(part))
        outputs.append(weighted_values(part, pattern))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _parts(call: AttentionCall) -> Iterator[AttentionCall]:
    batch, heads, queries, _ = call.query.shape
    slots = call.key.shape[2]
    step = max(1, _SCORES_AT_ONCE // (batch * heads * slots))
    if step >= queries:
        yield call
        return
    mask = call.mask
    if mask is None and call.causal:
        seen = torch.ones(queries, slots, dtype=torch.bool, device=call.query.device)
        mask = seen.tril(slots - queries)[None, None]
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        part = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
        yield replace(call, query=call.query[:, :, rows], mask=part, causal=False)
