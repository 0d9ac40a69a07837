"""Scopes: which tokens are steered, by what they are, not by where a pass happens to begin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, Span
from kvedit.steering.tokens import Tokens

__all__ = ["All", "Generation", "Last", "Positions", "Prompt", "Scope", "as_scope"]


@dataclass(frozen=True)
class Scope(ABC):
    """A set of tokens. ``a | b`` is the union, ``a - b`` what of a is not in b; padding is in none.

    Attributes:
        needs_end: whether it must know where a prompt ends.
    """

    needs_end: ClassVar[bool] = False

    @abstractmethod
    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns which tokens of a pass are in it, bool ``[batch, query]``."""

    def __or__(self, other: Any) -> Scope:
        """Returns the union with another scope, or the name of one."""
        return Either(self, as_scope(other))

    def __sub__(self, other: Any) -> Scope:
        """Returns what is in this scope and not in the other."""
        return Without(self, as_scope(other))


@dataclass(frozen=True)
class All(Scope):
    """Every token."""

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns all tokens."""
        return tokens.valid


@dataclass(frozen=True)
class Prompt(Scope):
    """Tokens that the model is given: prompts of every turn, and what callers feed themselves."""

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns tokens that were given."""
        return tokens.valid & ~tokens.said


@dataclass(frozen=True)
class Generation(Scope):
    """Tokens that the model chose, from the moment when it reads them.

    The first of them is chosen from what the prompt's last token gives, which is in
    ``Last(1)``: ``Last(1) | "generation"`` steers every choice.
    """

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns tokens that were said."""
        return tokens.valid & tokens.said


@dataclass(frozen=True)
class Last(Scope):
    """The last tokens of each prompt, in whatever pieces it is read.

    Args:
        count: how many, 1 at least; a shorter prompt is in it as a whole.

    Raises:
        InvalidArgument: if the count is below 1.
    """

    needs_end: ClassVar[bool] = True

    count: int = 1

    def __post_init__(self) -> None:
        """Checks the count."""
        if type(self.count) is not int or self.count < 1:
            raise InvalidArgument(f"Last: expected 1 or more tokens, found {self.count!r}")

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns the prompt's last tokens."""
        return tokens.valid & ~tokens.said & (tokens.left <= self.count)


@dataclass(frozen=True, init=False)
class Positions(Scope):
    """Tokens at RoPE positions ``start`` to ``stop - 1``, the memory's counted; given or said.

    Args:
        start: first position.
        stop: the one behind the last; None has no end.
        more: further ``(start, stop)`` ranges.

    Raises:
        InvalidArgument: if a range is empty or begins below 0.
    """

    ranges: tuple[tuple[int, int | None], ...]

    def __init__(self, start: int, stop: int | None = None, *more: tuple[int, int | None]) -> None:
        """Checks the ranges."""
        ranges: list[tuple[int, int | None]] = [(start, stop), *((a, b) for a, b in more)]
        for low, high in ranges:
            whole = type(low) is int and (high is None or type(high) is int)
            if not whole or low < 0 or (high is not None and high <= low):
                raise InvalidArgument(
                    f"Positions: expected 0 <= start < stop (or None), found {low!r}, {high!r}. "
                    "Positions from a prompt's end are Last(k), or Last(k) - Last(j)"
                )
        object.__setattr__(self, "ranges", tuple(ranges))

    @classmethod
    def of(cls, memory: KVMemory, span: Any) -> Positions:
        """Returns the positions of a span's slots in a memory.

        Read unsteered once, a prompt is a memory in which spans can be found by text or role.

        Args:
            memory: what a prompt became, or will become, token by token.
            span: as :meth:`~kvedit.memory.memory.KVMemory.resolve` takes it.

        Raises:
            SpanNotFound: if nothing matches.
        """
        found = memory.resolve(span)
        layer = max(memory.layers.values(), key=lambda layer: layer.slots)
        at = layer.positions[found.mask(layer).to(layer.positions.device)].tolist()
        ranges = Span(tuple((place, place + 1) for place in at)).ranges
        return cls(*ranges[0], *ranges[1:])

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns tokens in one of the ranges."""
        inside = torch.zeros_like(tokens.valid)
        for low, high in self.ranges:
            within = tokens.positions >= low
            inside |= within if high is None else within & (tokens.positions < high)
        return tokens.valid & inside


@dataclass(frozen=True)
class Either(Scope):
    """A union."""

    one: Scope
    other: Scope

    @property
    def needs_end(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return self.one.needs_end or self.other.needs_end

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns tokens in either."""
        return self.one.mask(tokens) | self.other.mask(tokens)


@dataclass(frozen=True)
class Without(Scope):
    """A difference."""

    one: Scope
    other: Scope

    @property
    def needs_end(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return self.one.needs_end or self.other.needs_end

    def mask(self, tokens: Tokens) -> torch.Tensor:
        """Returns tokens in the one and not in the other."""
        return self.one.mask(tokens) & ~self.other.mask(tokens)


_NAMED: dict[str, Scope] = {"all": All(), "prompt": Prompt(), "generation": Generation()}


def as_scope(value: Any) -> Scope:
    """Returns a scope, the scope of a name, or the positions of a span of tokens.

    A span that was found counts tokens from the beginning of the context, and is taken to stand at
    these positions; where slots were moved, :meth:`Positions.of` asks the memory.

    Raises:
        InvalidArgument: if it is none.
    """
    if isinstance(value, Scope):
        return value
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    if isinstance(value, Span) and value.unit == "token":
        return Positions(*value.ranges[0], *value.ranges[1:])
    raise InvalidArgument(
        f"scope: expected one of {', '.join(map(repr, _NAMED))}, Last(k), Positions(start, stop), "
        f"or a span of tokens that memory.find gave; found {value!r}"
    )
