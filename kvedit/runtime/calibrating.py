"""kv.calibrate: a sample of a model's queries on generic text, as an operand that a store keeps.

An edit of a key acts on every later query at once, so what it does to attention is known once the
queries are: their mean, their spread, and how both turn with the position. The sample is taken
before RoPE. Whoever uses it rotates it to the positions at which queries will stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Lineage, LineageNode
from kvedit.memory.digest import canonical_json, digest_tensor
from kvedit.memory.lineage import environment
from kvedit.memory.operand import make_operand
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.generic_text import generic_texts
from kvedit.runtime.tapping import tap
from kvedit.runtime.text import Context, encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["calibrate"]

LEAD = 64
"""First tokens of a text whose queries are left out: the first few are attention sinks (Xiao et al.
2024, StreamingLLM, arXiv 2309.17453), and a token that reads a memory has a context behind it."""

CHUNK = 1024


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[Context] | None = None,
    held_out: Sequence[Context] | None = None,
    samples: int = 630,
    seed: int = 0,
) -> KVMemory:
    """Returns queries of every layer and query head on generic text, before RoPE.

    Each text is read from its beginning, and gives equally many queries, so that a long one does
    not drown a short one. All layers and heads are sampled at the same tokens. Layers without
    RoPE, and models with learned positions, give their queries as attention gets them.

    Args:
        model: a decoder-only model in eval mode.
        tokenizer: its tokenizer; may be None if texts are token ids.
        texts: what to fit on: texts, chats or ids. None takes the library's own generic text.
        held_out: what to certify on. None takes the generic text's other part.
        samples: queries per query head to fit on; half as many are held out.
        seed: of the choice of tokens.

    Returns:
        An operand of kind ``"queries"``: layer to ``[kv_head, (group sample), dim]``, in the
        model's dtype. Its facts name ``fit``, the samples per query head to fit on, which come
        first and are sorted by text; ``held_out``, those that follow; ``texts``, how many texts
        each part has; and ``positions``, where each sample stood in its text.

    Raises:
        InvalidArgument: if the texts are too short for the samples, or a number is out of range.
        UnsupportedModel: if the model has a mechanism that is not understood.
    """
    if samples < 2:
        raise InvalidArgument(f"samples must be at least 2, found {samples}")
    chat = bool(getattr(tokenizer, "chat_template", None))
    parts: dict[str, Sequence[Context]] = {
        "fit": generic_texts("fit", chat) if texts is None else texts,
        "held": generic_texts("held", chat) if held_out is None else held_out,
    }
    found = inspect(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    rows: list[dict[int, torch.Tensor]] = []
    places: list[torch.Tensor] = []
    digests = []
    for wanted, part in zip((samples, max(samples // 2, 1)), parts.values(), strict=True):
        sources = [_readable(found, encode(tokenizer, text).tokens) for text in part]
        digests.append([digest_tensor(ids) for ids in sources])
        for ids, count in zip(sources, _shares(wanted, len(sources)), strict=True):
            places.append(_chosen(len(ids), count, generator))
            rows.append(_queries(model, found, ids, places[-1]))
    node = _node(model, found, digests, samples, seed)
    counts = [len(digest) for digest in digests]
    fit = sum(map(len, places[: counts[0]]))
    facts: dict[str, Any] = {
        "fit": fit,
        "held_out": sum(map(len, places)) - fit,
        "texts": counts,
        "positions": torch.cat(places).tolist(),
    }
    vectors = {i: _layout(found, i, [row[i] for row in rows]) for i in rows[0]}
    return make_operand("queries", vectors, found.spec_now(), Lineage((node,)), **facts)


def _readable(found: Inspection, ids: torch.Tensor) -> torch.Tensor:
    """Returns as many tokens as the model reads with one set of frequencies."""
    ropes = [spec.rope for spec in found.spec.layers if spec.rope is not None]
    limits = [rope.switch for rope in ropes if rope.switch is not None]
    if found.spec.max_position is not None:
        limits.append(found.spec.max_position)
    return ids[: min(limits, default=len(ids))]


def _shares(samples: int, texts: int) -> list[int]:
    """Returns equal shares: what does not divide evenly is left out."""
    if not 1 <= texts <= samples:
        raise InvalidArgument(f"expected 1 to {samples} texts for {samples} samples, found {texts}")
    return [samples // texts] * texts


def _chosen(tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns positions in ascending order, none twice; a short text gives all that it has."""
    if tokens - LEAD < count:
        raise InvalidArgument(
            f"a text of {tokens} tokens is too short for {count} samples after the first {LEAD} "
            "tokens (a text is read up to where RoPE changes its frequencies): pass longer texts, "
            "or samples= a smaller number"
        )
    order = torch.randperm(tokens - LEAD, generator=generator)
    return LEAD + order[:count].sort().values


@torch.no_grad()
def _queries(
    model: PreTrainedModel, found: Inspection, ids: torch.Tensor, places: torch.Tensor
) -> dict[int, torch.Tensor]:
    """Returns layer to ``[query_head, sample, dim]``, read in pieces at natural positions."""
    rows: dict[int, list[torch.Tensor]] = {}
    with open_session(model, found, [None], None, strict=True) as session:
        session.cache.reserve(len(ids))
        for start, piece in _pieces(ids):
            inside = places[(places >= start) & (places < start + len(piece))] - start
            with tap(model, ["queries_pre"]) as tapped:
                session.forward(piece[None], keep=1)
            for layer in tapped.layers:
                queries = tapped["queries_pre", layer][0]
                rows.setdefault(layer, []).append(queries[:, inside.to(queries.device)].cpu())
    return {layer: torch.cat(pieces, dim=1) for layer, pieces in rows.items()}


def _pieces(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(ids), CHUNK):
        yield start, ids[start : start + CHUNK]


def _layout(found: Inspection, layer: int, rows: list[torch.Tensor]) -> torch.Tensor:
    group = found.spec.layers[layer].group
    pattern = "(kv_head group) sample dim -> kv_head (group sample) dim"
    return rearrange(torch.cat(rows, dim=1), pattern, group=group)


def _node(
    model: PreTrainedModel, found: Inspection, digests: list[list[str]], samples: int, seed: int
) -> LineageNode:
    parameters = {
        "model": found.spec.identity()["fingerprint"],
        "texts": digests[0],
        "held_out": digests[1],
        "samples": samples,
    }
    return LineageNode(
        operation="calibrate",
        name="calibrate",
        version=1,
        parameters=canonical_json(parameters).decode(),
        reproducibility="reader",
        seed=seed,
        environment=environment(model.dtype),
    )
