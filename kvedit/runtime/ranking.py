"""rank_layers: which layers disturb the others most when a span is steered in them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Span
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import GateRule, ScaleRule, write_rule
from kvedit.models.inspection import Inspection, inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.streams import Streams, attention_streams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["rank_layers"]


def rank_layers(
    model: PreTrainedModel,
    memory: KVMemory,
    span: Span,
    tokens: torch.Tensor,
    factor: float = 100.0,
    layers: Sequence[int] | None = None,
) -> dict[int, float]:
    """Ranks layers by how far scaling the span's keys in one moves attention in the others.

    Directer (arXiv 2603.06745) ranks once and halves its steered layers in this order. A layer's
    disturbance is the mean, over all other layers and tokens, of the cosine distance between
    unsteered and steered inputs of their attention, plus that of their outputs. One short pass per
    layer. (The published code averages over the layer that is steered, so that it ranks by how much
    a layer *is* disturbed, and compares raw inputs with steered outputs and the reverse.)

    Args:
        model: the model that made the memory.
        memory: the memory; its own bias and rules act in all passes but a gate.
        span: slots to steer.
        tokens: ``[query]`` ids that look at the memory; Directer takes the prompt's last one.
        factor: on the span's products of queries and keys.
        layers: layers to rank; None means all.

    Returns:
        Each layer's disturbance, the largest first: ``tuple(rank_layers(...))`` is what
        :class:`~kvedit.memory.rules.GateRule` takes as its layers.

    Raises:
        InvalidArgument: if there are no tokens or no layers.
    """
    found = inspect(model)
    chosen = list(range(len(found.spec.layers))) if layers is None else list(layers)
    if not chosen or not len(tokens):
        raise InvalidArgument("rank_layers needs at least one token and one layer")
    ungated = tuple(rule for rule in memory.rules if rule.get("rule") != GateRule.name)
    plain = _streams(model, found, replace(memory, rules=ungated), tokens)
    disturbance = {}
    for layer in chosen:
        rule = ScaleRule(span, float(factor), HeadSet.all(found.spec, [layer]))
        steered = replace(memory, rules=(*ungated, write_rule(rule)))
        moved = _streams(model, found, steered, tokens)
        others = [_distance(plain[i], moved[i]) for i in plain if i != layer]
        disturbance[layer] = sum(others) / max(1, len(others))
    return dict(sorted(disturbance.items(), key=lambda item: -item[1]))


def _distance(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> float:
    similar = [
        torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
        for x, y in zip(a, b, strict=True)
    ]
    return float(sum((1 - found).mean().clamp_min(0) for found in similar))


def _streams(
    model: PreTrainedModel, found: Inspection, memory: KVMemory, tokens: torch.Tensor
) -> Streams:
    """Returns each layer's attention input and output ``[batch, query, hidden]`` of one pass."""
    with (
        attention_streams(found) as streams,
        open_session(model, found, [memory], None, strict=True) as session,
    ):
        session.forward(tokens[None], keep=1)
    return streams
