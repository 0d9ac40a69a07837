"""Which tokens of a context receive most attention, whatever is asked: LLMSteer's selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import and_, or_
from typing import Literal

import torch

from kvedit.editors.base import Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Source

__all__ = ["PREFIXES", "received_attention", "select_tokens"]

PREFIXES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words. The following are given passages.",
    "Respond to the query using only the provided texts. Only return the answer. DO NOT return "
    "any extra words. Below are the provided texts.",
)
"""The two prefixes of LLMSteer (arXiv 2411.13009), under which a context is read."""


def select_tokens(
    memory: KVMemory,
    reader: Reader,
    *,
    k: int | None = None,
    fraction: float | None = None,
    prefixes: Sequence[str] = PREFIXES,
    combine: Literal["and", "or"] = "and",
    drop_sink: bool = True,
    drop_punctuation: bool = True,
) -> dict[int, torch.Tensor]:
    """Returns the tokens that receive most attention under every prefix, layer by layer.

    ``S_l = topk(As_1) ∩ topk(As_2)`` with ``As_p(j) = Σ_i A_p[i, j]``, summed over all query
    heads of the layer (arXiv 2411.13009). No query is involved: the selection belongs to the
    context.

    Args:
        memory: a memory with tokens; only these are read.
        reader: the model.
        k: tokens per prefix and layer, before they are combined.
        fraction: the same as a share of the context's tokens, in (0, 1], rounded up.
        prefixes: one or more texts.
        combine: ``"and"`` keeps what all prefixes chose, ``"or"`` what one did.
        drop_sink: whether tokens that take attention for their place are no candidates: the
            first token, tokens without text (BOS), and those of a chat outside of its messages.
        drop_punctuation: whether tokens without a letter or digit are no candidates.

    Returns:
        Layer to bool mask ``[token]``.

    Raises:
        InvalidArgument: if the memory has no tokens or no candidate, or a parameter is out of
            range.
    """
    if memory.source is None:
        raise InvalidArgument("tokens are selected by reading them; this memory has none")
    if combine not in ("and", "or") or isinstance(prefixes, str) or not prefixes:
        raise InvalidArgument(
            "expected combine 'and' or 'or' and a list of prefixes, found "
            f"{combine!r}, {prefixes!r}"
        )
    candidates = _candidates(memory.source, drop_sink, drop_punctuation)
    count = _count(len(memory.source), k, fraction)
    chosen: list[dict[int, torch.Tensor]] = []
    for prefix in prefixes:
        received = received_attention(memory, reader, prefix)
        chosen.append({i: _top(sums, candidates, count) for i, sums in received.items()})
    join = and_ if combine == "and" else or_
    return {i: reduce(join, (one[i] for one in chosen)) for i in memory.layers}


def received_attention(memory: KVMemory, reader: Reader, prefix: str) -> dict[int, torch.Tensor]:
    """Returns the attention that each token of a context receives while it is read anew.

    The prefix stands before the context's text, behind its BOS if there is one.

    Returns:
        Layer to float32 ``[token]``: sums over query heads and over all queries that come after.

    Raises:
        InvalidArgument: if the memory has no tokens.
    """
    source = memory.source
    if source is None:
        raise InvalidArgument("attention is seen by reading tokens; this memory has none")
    tokens = source.tokens.cpu()
    first = _leading(source)
    before = reader.encode(prefix)
    ids = torch.cat((tokens[:first], before, tokens[first:]))
    seen = reader.read(None, ids, ("received",))["received"]
    found = {}
    for layer, received in seen.items():
        sums = received[0].sum(dim=0).cpu()
        found[layer] = torch.cat((sums[:first], sums[first + len(before) :]))
    return found


def _leading(source: Source) -> int:
    """Returns how many tokens without text, such as BOS, the context begins with."""
    spelled = (source.offsets[:, 1] > source.offsets[:, 0]).nonzero()
    return int(spelled[0]) if len(spelled) else len(source)


def _candidates(source: Source, drop_sink: bool, drop_punctuation: bool) -> torch.Tensor:
    kept = torch.ones(len(source), dtype=torch.bool)
    pairs = source.offsets.tolist()
    if drop_sink:
        kept &= torch.tensor([stop > start for start, stop in pairs])
        kept[0] = False
        if source.messages:
            inside = [(m.start, m.stop) for m in source.messages]
            kept &= torch.tensor([any(a < q and b > p for p, q in inside) for a, b in pairs])
    if drop_punctuation:
        kept &= torch.tensor([any(map(str.isalnum, source.text[a:b])) for a, b in pairs])
    if not bool(kept.any()):
        raise InvalidArgument(
            f"none of the {len(source)} tokens is left to choose from: relax drop_sink or "
            "drop_punctuation"
        )
    return kept


def _count(tokens: int, k: int | None, fraction: float | None) -> int:
    if (k is None) == (fraction is None):
        raise InvalidArgument(f"expected one of k and fraction, found k={k}, fraction={fraction}")
    if (k is not None and k < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise InvalidArgument(
            f"k must be 1 or above, fraction lie in (0, 1]; found k={k}, fraction={fraction}"
        )
    return k if k is not None else math.ceil(tokens * (fraction or 0.0) - 1e-9)


def _top(sums: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    order = sums.masked_fill(~candidates, -torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(sums), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen & candidates
