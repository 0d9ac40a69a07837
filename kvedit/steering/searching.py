"""find_condition: the layer, threshold and direction at which a condition tells prompts apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import Delta, KVMemory
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import open_session
from kvedit.runtime.tapping import tap
from kvedit.runtime.text import encode, encode_turn, is_messages
from kvedit.steering.conditions import Condition, read_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FoundCondition", "Point", "find_condition"]


@dataclass(frozen=True)
class Point:
    """One layer's best decision.

    Args:
        layer: the layer.
        threshold: of the similarity.
        above: whether it is met above it.
        f1: harmonic mean of precision and recall on the labelled prompts.
        margin: distance from the threshold to the nearest similarity.
    """

    layer: int
    threshold: float
    above: bool
    f1: float
    margin: float


@dataclass(frozen=True, eq=False)
class FoundCondition:
    """What a search found.

    Args:
        condition: the best condition.
        best: where it stands.
        points: the best decision of each layer.
        always: F1 of a condition that is always met, what a search must beat.
    """

    condition: Condition
    best: Point
    points: tuple[Point, ...]
    always: float


def find_condition(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    delta: Delta | KVMemory,
    labelled: Sequence[tuple[Any, bool]],
    *,
    layers: Iterable[int] | None = None,
    read: Literal["mean", "last"] = "mean",
    memory: KVMemory | None = None,
    batch: int = 8,
) -> FoundCondition:
    """Returns the condition with the best F1 on labelled prompts (arXiv 2409.05907, appendix).

    All thresholds between two neighbouring similarities are tried, in both directions. Among equals
    the wider margin wins, then the earlier layer. F1 is of these prompts: hold others out to know
    how it holds.

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None for token ids.
        delta: candidate condition vectors, residual, by layer; or an operand that holds them.
        labelled: prompts (texts, chats or ids), each with whether the condition should be met.
        layers: layers to try, negative from the end; None tries all that the delta has.
        read: see :class:`~kvedit.steering.conditions.Condition`.
        memory: what the prompts will follow; None reads each from nothing.
        batch: prompts per pass.

    Raises:
        InvalidArgument: without prompts of both kinds, or without residual vectors.
        IncompatibleModel: if another model made the delta.
    """
    found = inspect(model, tokenizer)
    delta = Delta.of(delta).only(sites="residual", layers=layers)
    delta.require_same_model(found.spec)
    labels = torch.tensor([bool(label) for _, label in labelled])
    if not len(labels) or bool(labels.all()) or not bool(labels.any()):
        raise InvalidArgument(
            f"expected prompts of both kinds, found {int(labels.sum())} that should meet the "
            f"condition and {int((~labels).sum())} that should not"
        )
    probes = {layer: Condition(delta, layer, 0.0, read=read) for layer in delta.layers}
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in probes}
    prompts = [prompt for prompt, _ in labelled]
    for start in range(0, len(prompts), batch):
        states = _states(model, tokenizer, prompts[start : start + batch], list(probes), memory)
        for layer, (hidden, given) in states.items():
            state = read_states(hidden, given).state(read)
            parts[layer].append(probes[layer].similarity(state).double().cpu())
    points = tuple(_best(layer, torch.cat(parts[layer]), labels) for layer in probes)
    best = max(points, key=lambda point: (point.f1, point.margin, -point.layer))
    condition = Condition(delta, best.layer, best.threshold, best.above, read)
    return FoundCondition(condition, best, points, _f1(torch.ones_like(labels), labels))


def _states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Any],
    layers: list[int],
    memory: KVMemory | None,
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Returns layer to hidden states ``[batch, token, hidden]``, and which tokens are real."""
    start = None if memory is None else memory.source
    known = 0 if start is None else len(start)
    rows = [
        (encode(tokenizer, p) if memory is None and not is_messages(p)
         else encode_turn(tokenizer, start, p)).tokens[known:]
        for p in prompts
    ]  # fmt: skip
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    valid = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    found = inspect(model, tokenizer)
    with (
        open_session(model, found, [memory] * len(rows), tokenizer, strict=True) as session,
        tap(model, ("hidden",), layers) as seen,
    ):
        session.forward(ids, valid, keep=1)
    return {layer: (seen["hidden", layer], valid) for layer in layers}


def _best(layer: int, similarities: torch.Tensor, labels: torch.Tensor) -> Point:
    values = torch.unique(similarities)
    edge = torch.tensor([1e-3], dtype=values.dtype)
    cuts = torch.cat((values[:1] - edge, (values[1:] + values[:-1]) / 2, values[-1:] + edge))
    points = []
    for cut in cuts.tolist():
        margin = float((similarities - cut).abs().min())
        for above in (True, False):
            met = similarities > cut if above else similarities < cut
            points.append(Point(layer, cut, above, _f1(met, labels), margin))
    return max(points, key=lambda point: (point.f1, point.margin))


def _f1(met: torch.Tensor, labels: torch.Tensor) -> float:
    right = float((met & labels).sum())
    return 2 * right / float(met.sum() + labels.sum())
