"""Bias for kernels that take none: one more key dim holds it (exact; steering form C).

``q' = [q, 1/scale]`` and ``k' = [k, b]`` give ``scale * q'·k' = scale * q·k + b``. FlashAttention
takes no mask and no bias but computes this unchanged. The head size grows to the next multiple of
eight, values are padded alike and cut again.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch.nn.functional import pad

from kvedit.models.attention_call import AttentionCall, Output, without_bias

__all__ = ["EVICTED", "extend", "run_extended"]

EVICTED = -30000.0
"""Stands for -inf in an extended key: exp underflows to zero in every dtype, and fp16 holds it."""


def extend(call: AttentionCall) -> AttentionCall:
    """Returns the call with its bias moved into one more dim of queries and keys.

    Keys and values are repeated to query heads, since a bias belongs to a query head.

    Args:
        call: a call with ``bias`` ``[batch or 1, query_head, 1, slot]``.
    """
    bias = call.bias
    if bias is None:
        return call
    batch, heads, queries, dim = call.query.shape
    group = heads // call.key.shape[1]
    key, value = (
        repeat(x, "batch head slot dim -> batch (head group) slot dim", group=group)
        for x in (call.key, call.value)
    )
    grow = -(dim + 1) % 8
    bias = rearrange(bias, "batch head 1 slot -> batch head slot 1").clamp_min(EVICTED)
    bias = bias.expand(batch, heads, key.shape[2], 1).to(key.dtype)
    ones = call.query.new_full((batch, heads, queries, 1), 1.0 / call.scale)
    return without_bias(
        call,
        query=pad(torch.cat((call.query, ones), dim=-1), (0, grow)),
        key=pad(torch.cat((key, bias), dim=-1), (0, grow)),
        value=pad(value, (0, dim + 1 + grow - value.shape[-1])),
        scaling=call.scale,
    )


def run_extended(call: AttentionCall) -> Output:
    """Computes attention with the call's bias by key extension."""
    output, weights = extend(call).run()
    return output[..., : call.value.shape[-1]], weights
