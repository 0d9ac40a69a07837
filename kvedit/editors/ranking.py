"""Ranking of layers, as Directer needs it: whom does steering in one layer disturb most?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from kvedit.editors.base import Reader
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Span
from kvedit.memory.heads import HeadSet
from kvedit.memory.rules import ScaleRule, write_rule

__all__ = ["rank_for_prompt"]

_SITES = ("attention_input", "attention_output")

Streams = dict[str, dict[int, torch.Tensor]]


def rank_for_prompt(
    reader: Reader, memory: KVMemory, span: Span, prompt: str, factor: float, layers: Iterable[int]
) -> list[int]:
    """Returns layers, first the one in which steering disturbs the others' attention most.

    Directer (arXiv 2603.06745) ranks once, at the prompt's last token: what stands before it is
    read unsteered, then that token once without steering and once with the span's logits scaled in
    each layer alone. Disturbance is that of ``kvedit.runtime.ranking.rank_layers``, which does the
    same with a model at hand: the mean over all other layers of the cosine distance between
    inputs of attention, plus that between outputs. Equal ones keep the order of ``layers``.

    Args:
        reader: the model.
        memory: a memory without a gate; its own bias and rules act in all passes.
        span: slots to steer.
        prompt: what will be asked, as it will follow the memory.
        factor: on the span's logits.
        layers: layers to rank.

    Raises:
        InvalidArgument: if the prompt has no token.
    """
    tokens = reader.encode(prompt)
    if not len(tokens):
        raise InvalidArgument(f"prompt: expected a text of one token at least, found {prompt!r}")
    before, last = tokens[:-1], tokens[-1:]
    grown = reader.grow(memory, before) if len(before) else memory
    plain = reader.read(grown, last, _SITES)
    disturbance = {}
    for layer in layers:
        rule = ScaleRule(span, factor, HeadSet.all(memory.model, [layer]))
        steered = replace(grown, rules=(*grown.rules, write_rule(rule)))
        disturbance[layer] = _disturbance(plain, reader.read(steered, last, _SITES), layer)
    return sorted(disturbance, key=lambda layer: -disturbance[layer])


def _disturbance(plain: Streams, steered: Streams, layer: int) -> float:
    others = [index for index in plain[_SITES[0]] if index != layer]
    moved = [
        sum(_distance(plain[site][index], steered[site][index]) for site in _SITES)
        for index in others
    ]
    return sum(moved) / max(1, len(others))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    similar = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    return float((1 - similar).mean().clamp_min(0))
