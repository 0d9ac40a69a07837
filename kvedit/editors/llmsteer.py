"""LLMSteer: tokens that matter whatever is asked, emphasised (arXiv 2411.13009)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from kvedit.editors.base import Editor, Reader
from kvedit.editors.phases import Phase, bias_memory, push
from kvedit.editors.receiving import PREFIXES, select_tokens
from kvedit.editors.target import as_heads, as_number
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory import KVMemory
from kvedit.memory.heads import HeadSet

__all__ = ["LLMSteer"]

_PHASES: dict[str, Phase] = {"baked": "prefill", "bias": "decode", "both": "both"}


@dataclass(frozen=True)
class LLMSteer(Editor):
    """Reads a context under prefixes and emphasises what received most attention under all.

    What the paper leaves open is decided here by name:

    * It edits attention, and speaks of the stored cache. ``apply`` says which: ``"baked"`` stores
      what the context becomes when it reads itself under the bias, and later queries see no bias,
      as with a cache that was filled offline; ``"bias"`` keeps the cache and biases later
      queries; ``"both"`` does both. For compiled keys, take ``"bias"`` and then ``Compile``.
    * ``A * M`` with M = alpha on the selection is renormalised: ``log alpha`` on its logits.
    * Attention received is summed over all query heads of a layer; each layer selects its own
      tokens, and is steered on these.
    * Tokens that attract attention for their place (sinks) and punctuation can be left out of the
      selection (:func:`~kvedit.editors.receiving.select_tokens`). The paper does not say; its
      only published re-implementation leaves them out.
    * The prefixes are for the selection alone. The memory is edited as it was captured, whereas
      the paper serves the context behind its first prefix.

    Args:
        alpha: factor on the attention to selected tokens, 1 or above.
        k: tokens per prefix and layer, before they are combined.
        fraction: the same as a share of the context's tokens; one of the two is given.
        heads: query or KV heads that are steered; None means all. The paper profiles them.
        prefixes: texts under which the context is read; the paper's two.
        combine: ``"and"``: tokens that all prefixes chose; ``"or"``: that one chose.
        drop_sink: whether sinks can't be selected.
        drop_punctuation: whether punctuation can't be selected.
        apply: what is done with the selection.

    Raises:
        InvalidArgument: if a parameter is out of range.
        SpanNotFound: if no layer selects a token that it holds.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    alpha: float
    k: int | None = None
    fraction: float | None = None
    heads: HeadSet | None = None
    prefixes: tuple[str, ...] = PREFIXES
    combine: Literal["and", "or"] = "and"
    drop_sink: bool = True
    drop_punctuation: bool = True
    apply: Literal["baked", "bias", "both"] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        alpha = as_number("alpha", self.alpha)
        if alpha < 1:
            raise InvalidArgument(f"alpha must be 1 or above, found {self.alpha!r}")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "heads", as_heads(self.heads))
        object.__setattr__(self, "prefixes", _texts(self.prefixes))
        if self.apply not in _PHASES:
            raise InvalidArgument(f"apply must be one of {list(_PHASES)}, found {self.apply!r}")
        self._check_selection()

    def _check_selection(self) -> None:
        if (self.k is None) == (self.fraction is None):
            raise InvalidArgument(
                f"expected one of k and fraction, found k={self.k}, fraction={self.fraction}"
            )
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise InvalidArgument(f"k: expected a whole number from 1, found {self.k!r}")
        if self.fraction is not None:
            fraction = as_number("fraction", self.fraction)
            if not 0 < fraction <= 1:
                raise InvalidArgument(f"fraction must lie in (0, 1], found {self.fraction!r}")
            object.__setattr__(self, "fraction", fraction)
        if self.combine not in ("and", "or"):
            raise InvalidArgument(f"combine must be 'and' or 'or', found {self.combine!r}")
        for name in ("drop_sink", "drop_punctuation"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(
                    f"{name} must be true or false, found {getattr(self, name)!r}"
                )

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """Whether the context is read anew."""
        return self.apply != "bias"

    def select(self, memory: KVMemory, reader: Reader) -> dict[int, torch.Tensor]:
        """Returns the tokens that this editor would emphasise, layer to bool mask ``[token]``."""
        return select_tokens(
            memory,
            reader,
            k=self.k,
            fraction=self.fraction,
            prefixes=self.prefixes,
            combine=self.combine,
            drop_sink=self.drop_sink,
            drop_punctuation=self.drop_punctuation,
        )

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the steered memory."""
        memory = memories[0]
        if reader is None:
            raise InvalidArgument("LLMSteer reads with the model: pass reader=")
        heads = self.heads or HeadSet.all(memory.model)
        heads.check(memory.model)
        selected = self.select(memory, reader)
        self._check_found(memory, heads, selected)

        def bias(layer: int, source: torch.Tensor) -> torch.Tensor:
            inside = (source >= 0) & selected[layer][source.clamp_min(0)]
            return push(heads.mask(memory.model, layer), inside, math.log(self.alpha))

        return bias_memory(memory, bias, _PHASES[self.apply], reader)

    def _check_found(
        self, memory: KVMemory, heads: HeadSet, selected: dict[int, torch.Tensor]
    ) -> None:
        for index, _ in heads.heads:
            layer = memory.layers.get(index)
            if layer is None:
                continue
            source = layer.source.cpu()
            if bool(((source >= 0) & selected[index][source.clamp_min(0)]).any()):
                return
        raise SpanNotFound(
            f"no steered layer has a token that all {len(self.prefixes)} prefixes chose: raise k "
            "or fraction, or take combine='or'"
        )


def _texts(value: Any) -> tuple[str, ...]:
    given = (value,) if isinstance(value, str) else tuple(value or ())
    if not given or not all(isinstance(text, str) and text for text in given):
        raise InvalidArgument(f"prefixes: expected one text or more, found {value!r}")
    return given
