"""Conditions: steer only what a prompt calls for (CAST), decided once per prompt and row.

Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv 2409.05907),
section 3: a condition vector c is met if ``sim(h, proj_c h)`` is beyond a threshold, where
``proj_c h = (c c^T / c.c) h`` passes through tanh and sim is the cosine; h is the mean of the
prompt's hidden states at a layer. Steering then holds for the whole reply.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from kvedit.editors.target import as_number
from kvedit.errors import InvalidArgument
from kvedit.memory import Delta, KVMemory, ModelSpec
from kvedit.steering.tokens import Tokens

__all__ = ["AllOf", "AnyOf", "Condition", "Judge", "Rule", "cast_similarity", "read_states"]

Read = Literal["mean", "last"]


def cast_similarity(states: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Returns ``cos(h, tanh(proj_c h))`` of states ``[..., hidden]``; 0 for a state of zeros."""
    wide = torch.promote_types(states.dtype, torch.float32)
    states, vector = states.to(wide), vector.to(states.device, wide)
    share = (states @ vector) / vector.square().sum()
    return torch.cosine_similarity(states, (share[..., None] * vector).tanh(), dim=-1)


class Rule(ABC):
    """What may be asked of a prompt; ``a & b`` asks both, ``a | b`` one of them."""

    @property
    @abstractmethod
    def conditions(self) -> tuple[Condition, ...]:
        """All conditions in it."""

    @abstractmethod
    def met(self, found: Mapping[Condition, torch.Tensor]) -> torch.Tensor:
        """Returns bool ``[batch]``, given each condition's similarities ``[batch]``."""

    def __and__(self, other: Rule) -> Rule:
        """Returns the rule that both are met."""
        return AllOf((self, other))

    def __or__(self, other: Rule) -> Rule:
        """Returns the rule that one of them is met."""
        return AnyOf((self, other))


@dataclass(frozen=True, eq=False)
class Condition(Rule):
    """A prompt's similarity to a condition vector, beyond a threshold.

    Args:
        delta: residual vectors of conditions, or an operand that holds them.
        layer: layer at whose output it is decided; negative from the end.
        threshold: of the similarity, in [-1, 1].
        above: True: met above the threshold; False: below.
        read: ``"mean"`` of the prompt's hidden states, as the paper does, or the ``"last"`` one.

    Raises:
        InvalidArgument: if a parameter is out of range, or the delta has no residual vector, or a
            zero one, at that layer.
    """

    delta: Delta
    layer: int
    threshold: float
    above: bool = True
    read: Read = "mean"

    def __post_init__(self) -> None:
        """Checks ranges."""
        delta = Delta.of(self.delta) if isinstance(self.delta, KVMemory) else self.delta
        total = len(delta.model.layers)
        layer = self.layer + total if self.layer < 0 else self.layer
        vector = delta.vectors.get("residual", {}).get(layer)
        if vector is None or not bool(vector.any()):
            known = list(delta.vectors.get("residual", {}))
            raise InvalidArgument(
                f"a condition needs a residual vector other than zero at layer {self.layer}; this "
                f"delta has some at {known or 'none'}"
            )
        if self.read not in ("mean", "last"):
            raise InvalidArgument(f"read must be 'mean' or 'last', found {self.read!r}")
        object.__setattr__(self, "delta", delta)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "threshold", as_number("threshold", self.threshold, -2.0, 2.0))

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Itself."""
        return (self,)

    def similarity(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the similarity ``[...]`` of states ``[..., hidden]``, what ``read`` made."""
        return cast_similarity(states, self.delta.vectors["residual"][self.layer])

    def met(self, found: Mapping[Condition, torch.Tensor]) -> torch.Tensor:
        """Returns which rows are beyond the threshold; rows without a prompt (NaN) are not."""
        similarity = found[self]
        return similarity > self.threshold if self.above else similarity < self.threshold


@dataclass(frozen=True, eq=False)
class AllOf(Rule):
    """All parts are met."""

    parts: tuple[Rule, ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of all parts."""
        return tuple(c for part in self.parts for c in part.conditions)

    def met(self, found: Mapping[Condition, torch.Tensor]) -> torch.Tensor:
        """Returns which rows meet all parts."""
        return torch.stack([part.met(found) for part in self.parts]).all(dim=0)


@dataclass(frozen=True, eq=False)
class AnyOf(Rule):
    """One part at least is met."""

    parts: tuple[Rule, ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Those of all parts."""
        return tuple(c for part in self.parts for c in part.conditions)

    def met(self, found: Mapping[Condition, torch.Tensor]) -> torch.Tensor:
        """Returns which rows meet a part."""
        return torch.stack([part.met(found) for part in self.parts]).any(dim=0)


@dataclass(eq=False)
class _Read:
    """What was read of the prompts at one layer.

    Args:
        total: ``[batch, hidden]``, sum over the prompt's tokens so far.
        count: ``[batch]``.
        last: ``[batch, hidden]``, the last token's state.
    """

    total: torch.Tensor
    count: torch.Tensor
    last: torch.Tensor

    def state(self, read: Read) -> torch.Tensor:
        """Returns what the condition looks at, ``[batch, hidden]``; NaN without a prompt."""
        if read == "mean":
            return self.total / self.count[:, None]
        return torch.where(self.count[:, None] > 0, self.last, torch.nan)


def read_states(
    states: torch.Tensor, given: torch.Tensor, before: _Read | None = None, fresh: bool = True
) -> _Read:
    """Returns what was read of prompts after some more of their tokens.

    Args:
        states: ``[batch, token, hidden]``.
        given: bool ``[batch, token]``, tokens of the prompts.
        before: what was read before; None for nothing.
        fresh: whether a new prompt begins in the rows that have a token here.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    given, states = given.to(states.device), states.detach().to(wide)
    total = states.masked_fill(~given[..., None], 0).sum(dim=1)
    count = given.sum(dim=1)
    places = torch.arange(given.shape[1], device=given.device)
    at = torch.where(given, places, -1).amax(dim=1).clamp_min(0)
    last = states[torch.arange(len(states), device=at.device), at]
    if before is None or before.count.shape != count.shape:
        return _Read(total, count, last)
    here = count > 0
    stays = ~here if fresh else torch.ones_like(here)
    return _Read(
        torch.where(stays[:, None], before.total + total, total),
        torch.where(stays, before.count + count, count),
        torch.where(here[:, None], last, before.last),
    )


class Judge:
    """Decides for each row of each cache whether a rule is met, from prompts as they are read.

    Args:
        rule: what is asked.
        spec: facts of the model that runs.
        steered: what will be steered, which must come after the decision.

    Raises:
        InvalidArgument: if a steered layer comes before it.
        IncompatibleModel: if another model made a condition vector.
    """

    def __init__(self, rule: Rule, spec: ModelSpec, steered: Delta) -> None:
        """Checks that decisions come in time."""
        if not isinstance(rule, Rule):
            raise InvalidArgument(f"condition: expected a Condition, found {rule!r}")
        for condition in rule.conditions:
            condition.delta.require_same_model(spec)
        self.rule = rule
        self.layers = sorted({condition.layer for condition in rule.conditions})
        _check_order(self.layers[-1], steered)
        self._reads: WeakKeyDictionary[Any, dict[int, _Read]] = WeakKeyDictionary()
        self._decided: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()
        self._last: tuple[Tokens, torch.Tensor] | None = None

    def look(self, tokens: Tokens, layer: int, states: torch.Tensor) -> None:
        """Takes in what a layer hands on for a pass's tokens, ``[batch, query, hidden]``."""
        given = tokens.valid & ~tokens.said
        if bool(given.any()):
            kept = self._reads.setdefault(tokens.key, {})
            kept[layer] = read_states(states, given, kept.get(layer), not tokens.continues)

    def met(self, tokens: Tokens) -> torch.Tensor:
        """Returns which tokens' rows are steered, bool ``[batch, query]``.

        None before a prompt was read. What an earlier turn said and this pass reads in front of
        the next prompt is still of the decision before.
        """
        if self._last is not None and self._last[0] is tokens:
            return self._last[1]
        now = self._decide(tokens)
        before = self._decided.get(tokens.key)
        met = now[:, None].expand_as(tokens.valid)
        given = tokens.valid & ~tokens.said
        if before is not None and before.shape == now.shape and bool(given.any()):
            leading = tokens.said & (given.cumsum(dim=1) == 0) & given.any(dim=1, keepdim=True)
            met = torch.where(leading, before[:, None], met)
        self._decided[tokens.key] = now
        self._last = (tokens, met)
        return met

    def _decide(self, tokens: Tokens) -> torch.Tensor:
        kept = self._reads.get(tokens.key, {})
        if len(kept) < len(self.layers):
            return torch.zeros(len(tokens.valid), dtype=torch.bool, device=tokens.valid.device)
        found = {c: c.similarity(kept[c.layer].state(c.read)) for c in self.rule.conditions}
        return self.rule.met(found).to(tokens.valid.device)


def _check_order(decided: int, steered: Delta) -> None:
    for site, slack in (("residual", 0), ("attention", 1)):
        for layer in steered.vectors.get(site, {}):
            if layer < decided + slack:
                raise InvalidArgument(
                    f"the condition is decided at the output of layer {decided}, and {site} of "
                    f"layer {layer} comes before: steer later layers (delta.only(layers=...)) or "
                    "find a condition at an earlier one (find_condition(..., layers=...))"
                )
