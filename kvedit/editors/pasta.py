"""Pasta: post-hoc attention steering (Zhang et al. 2024, arXiv 2311.02262), as one bias.

The paper multiplies the attention to all tokens but the emphasised ones by alpha and renormalises
(eq. 2). Softmax does not change when all logits shift, so this is ``-log alpha`` on the union of
the emphasised spans, or ``log alpha`` on the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from kvedit.editors.base import Reader, SpanLike
from kvedit.editors.phases import Phased, bias_memory, push
from kvedit.editors.target import as_heads, as_number, as_spans, held_union
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet

__all__ = ["Pasta", "Reference"]

Reference = Literal["rest_of_memory", "all_others"]


@dataclass(frozen=True)
class Pasta(Phased):
    """Attention of chosen heads, moved to the union of several spans.

    What the two references mean:

    * In the decode phase they differ. ``"rest_of_memory"`` takes ``log alpha`` to the memory's
      other slots; prompts and generated tokens keep their logits, as the published code leaves
      generated ones. ``"all_others"`` adds ``-log alpha`` to the spans, which moves attention from
      every other key, as the paper's equation does for the keys of a prompt.
    * In the prefill phase every key that a context token sees, itself included, is of the memory.
      Both give one distribution, unless the layer has attention sinks: a sink's logit is another
      one of all others, and none of the rest of the memory. Tokens before the first span see only
      the rest and read as before.

    Args:
        spans: what to emphasise, one span or several; a token in several counts once.
        alpha: factor on what is not emphasised, in (0, 1]; the paper uses 0.01.
        heads: query or KV heads, as :meth:`HeadSet.of` reads them; None means all heads of all
            layers, with which the paper found steering worse than none on some tasks. A head file
            of pastalib is read by :meth:`HeadSet.read_pasta`.
        reference: against what attention is moved.
        phase: when the bias acts; the paper steers in both.

    Raises:
        InvalidArgument: if a parameter is out of range.
    """

    spans: tuple[SpanLike, ...]
    alpha: float = 0.01
    heads: HeadSet | None = None
    reference: Reference = "rest_of_memory"

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        super().__post_init__()
        object.__setattr__(self, "spans", as_spans(self.spans))
        object.__setattr__(self, "heads", as_heads(self.heads))
        alpha = as_number("alpha", self.alpha)
        if not 0 < alpha <= 1:
            raise InvalidArgument(f"alpha must lie in (0, 1], found {self.alpha!r}")
        object.__setattr__(self, "alpha", alpha)
        if self.reference not in ("rest_of_memory", "all_others"):
            raise InvalidArgument(
                f"reference must be 'rest_of_memory' or 'all_others', found {self.reference!r}"
            )

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the steered memory."""
        memory = memories[0]
        heads = self.heads or HeadSet.all(memory.model)
        span = held_union(
            memory, self.spans, [layer for layer, _ in heads.to_query(memory.model).heads]
        )
        strength = -math.log(self.alpha) + 0.0

        def bias(layer: int, source: torch.Tensor) -> torch.Tensor:
            chosen, inside = heads.mask(memory.model, layer), span.inside(source)
            if self.reference == "rest_of_memory":
                return push(chosen, ~inside, -strength)
            return push(chosen, inside, strength)

        return bias_memory(memory, bias, self.phase, reader)
