"""Passes: what one forward pass, one call of ``generate`` and one cache tell of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.runtime.cache import MemoryCache
from kvedit.runtime.saying import is_said
from kvedit.steering.tokens import Tokens

__all__ = ["Call", "Pass", "Trail", "begin_call", "read_pass"]


@dataclass(eq=False)
class Call:
    """A running call of ``generate``.

    Args:
        columns: columns of the ids that it was given, padding included.
        full: whether these ids include what the cache holds already.
        start: column of the first token that is fed; of the cache, as all columns.
        end: column behind the prompt's last; 0 before the first pass.
        trail: of the cache that it goes on with.
    """

    columns: int
    full: bool
    start: int = 0
    end: int = 0
    trail: Trail | None = None

    def measure(self, running: Pass) -> None:
        """Finds out, with the first pass, which columns the prompt has."""
        if self.end:
            return
        start = running.start
        plain = running.cache is not None and not isinstance(running.cache, MemoryCache)
        held = start if plain and self.full and start < self.columns else 0
        self.start, self.end = start, start + self.columns - held


@dataclass(eq=False)
class Trail:
    """What is known of a cache, or of a pass without one.

    Args:
        said: ids that ``generate`` said last, by row; the last of them was not read.
        end: column where they begin.
        next: column of the first pass after that, or -1 before it came.
        given_until: column behind the last pass of given tokens, or -1.
    """

    said: list[list[int]] = field(default_factory=list)
    end: int = 0
    next: int = -1
    given_until: int = -1


@dataclass(eq=False)
class Pass:
    """A running forward pass.

    Args:
        arguments: what the model was given, by name.
        cache: the cache among them, or None.
        query: new tokens per row.
        held: slots that a plain cache held before.
        trail: what is known of the cache.
    """

    arguments: dict[str, Any]
    cache: Any
    query: int
    held: int
    trail: Trail
    tokens: Tokens | None = None

    @property
    def start(self) -> int:
        """Column of the first new token; a session's cache has counted them already."""
        return self.cache.fed - self.query if isinstance(self.cache, MemoryCache) else self.held


def begin_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Returns a call of ``generate`` with these arguments.

    Raises:
        InvalidArgument: if it is given no token ids.
    """
    ids = next((kwargs[n] for n in ("inputs", "input_ids") if kwargs.get(n) is not None), None)
    if ids is None and args:
        ids = args[0]
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise InvalidArgument(
            "steered generation needs token ids [batch, query], which tell the prompt from what "
            "is said; embeddings alone do not"
        )
    mask = kwargs.get("attention_mask")
    return Call(ids.shape[1], mask is None or mask.shape[1] == ids.shape[1])


def read_pass(running: Pass, call: Call | None) -> Tokens:
    """Returns what the tokens of a running pass are.

    Args:
        running: the pass.
        call: the call of ``generate`` that it belongs to, or None.
    """
    valid, positions = _places(running)
    trail, start = running.trail, running.start
    columns = start + torch.arange(running.query, device=valid.device)
    said = _said(running, valid, columns, call)
    given = valid & ~said
    if call is None:
        left = given.flip(1).cumsum(dim=1).flip(1)
        behind = start == trail.given_until and bool(given.any())
        return Tokens(valid, positions, said, left, True, behind, behind, trail)
    # Prompts of generate are padded on the left, if at all.
    left = (call.end - columns).expand_as(positions)
    whole = start + running.query >= call.end
    behind = start == call.start == trail.given_until
    continues = behind or call.start < start < call.end
    return Tokens(valid, positions, said, left, whole, continues, behind, trail)


def _said(
    running: Pass, valid: torch.Tensor, columns: torch.Tensor, call: Call | None
) -> torch.Tensor:
    """Returns which tokens the model chose, bool ``[batch, query]``."""
    if is_said():
        return torch.ones_like(valid)
    said = torch.zeros_like(valid)
    if call is not None:
        call.measure(running)
        said = (columns >= call.end).expand_as(valid)
    trail = running.trail
    if not trail.said:
        return said
    if trail.next < 0:
        trail.next = running.start
    if isinstance(running.cache, MemoryCache):
        return said | _owed(running, valid) if running.start == trail.next else said
    reach = trail.end + max(map(len, trail.said))
    return said | ((columns >= trail.end) & (columns < reach))


def _owed(running: Pass, valid: torch.Tensor) -> torch.Tensor:
    """Marks the last token that a session's row said: it is read in front of its next turn."""
    cache, trail, start = running.cache, running.trail, running.start
    owed = torch.zeros_like(valid)
    for row, ids in enumerate(trail.said[: len(valid)]):
        read = int(cache.valid[row, trail.end : start].sum())
        real = valid[row].nonzero().flatten()
        if start >= trail.end and read < len(ids) and len(real):
            first = int(real[0])
            owed[row, first] = int(cache.ids[row, start + first]) == ids[read]
    return owed


def _places(running: Pass) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``valid`` and ``positions`` ``[batch, query]`` of the new tokens."""
    count, cache, given = running.query, running.cache, running.arguments
    if isinstance(cache, MemoryCache):
        return cache.valid[:, -count:], cache.positions[:, -count:]
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    rows, device = tokens.shape[0], tokens.device
    valid = torch.ones(rows, count, dtype=torch.bool, device=device)
    positions = running.held + torch.arange(count, device=device)
    mask, explicit = given.get("attention_mask"), given.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] >= count:
        valid = mask[:, -count:].bool()
        positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -count:]
    if isinstance(explicit, torch.Tensor) and explicit.ndim == 2:
        positions = explicit[:, -count:]
    return valid, positions.expand(rows, count)
