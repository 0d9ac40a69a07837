"""Reference queries: what a memory is matched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from kvedit.editors.base import Reader
from kvedit.editors.compiling.queries import QuerySample, spread
from kvedit.editors.matching.study import passages, room
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory
from kvedit.models.rope import rotate

if TYPE_CHECKING:
    from kvedit.editors.matching.editor import AttentionMatching

__all__ = ["READ", "UNREAD", "QuerySet", "collect", "read_passages", "reference", "split"]

READ = ("repeat", "self_study", "self_study+repeat")
"""Sources of queries that read texts over the memory; so does a list of prompts."""

UNREAD = ("context", "calibrated", "random")
"""Sources of queries that read nothing over the memory."""

_BLOCK = 16
_PARTS = 8
_FEWEST = 8
_RANDOM = 1024
_HORIZON = 1024


@dataclass(frozen=True, eq=False)
class QuerySet:
    """Reference queries of some layers, after RoPE, at positions behind the memory.

    Blocks of 16 neighbours, fewer where queries are few, have one part: of eight blocks one is
    held out for the report, one is checked when a ridge is chosen and then fitted as well, six are
    fitted.

    Args:
        layers: layer to ``[query_head, token, dim]``.
        fitted: int64 ``[fit]``, tokens to fit on.
        checked: bool ``[fit]``, which of these a ridge is chosen on.
        held_out: int64 ``[held]``, tokens that no fit sees.
    """

    layers: Mapping[int, torch.Tensor]
    fitted: torch.Tensor
    checked: torch.Tensor
    held_out: torch.Tensor


def split(tokens: int, most: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns ``fitted``, ``checked`` and ``held_out`` of a :class:`QuerySet`.

    Args:
        tokens: queries per head that there are.
        most: queries per head that are fitted at most; a seeded choice among the others is left.
        seed: of that choice.

    Raises:
        InvalidArgument: if there are fewer than 8.
    """
    if tokens < _FEWEST:
        raise InvalidArgument(
            f"{tokens} reference queries per head: at least {_FEWEST} are needed to fit and to "
            "hold some out; read longer prompts"
        )
    size = max(1, min(_BLOCK, tokens // _PARTS))
    part = torch.arange(tokens) // size % _PARTS
    fitted = (part != _PARTS - 1).nonzero().flatten()
    held_out = (part == _PARTS - 1).nonzero().flatten()
    if len(fitted) > most:
        order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(seed))
        fitted = fitted[order[:most].sort().values]
        held_out = held_out[: max(1, most // _PARTS)]
    checked = part[fitted] == _PARTS // 2
    # Few queries: the choice may have hit no block that is checked.
    checked[-1] |= not bool(checked.any())
    return fitted, checked, held_out


def collect(
    memory: KVMemory, how: AttentionMatching, layers: Sequence[int], *, reader: Reader | None,
    operand: KVMemory | None,
) -> QuerySet:  # fmt: skip
    """Returns the queries that an editor fits on, all read over one memory.

    Args:
        memory: the memory.
        how: the editor.
        layers: layers whose queries are wanted.
        reader: the model, if the source reads.
        operand: queries of a calibration, for ``"calibrated"``.

    Raises:
        InvalidArgument: if a reader is missing.
    """
    if how.queries == "random":
        found = _random(memory, how, layers)
    elif how.queries == "calibrated" and operand is not None:
        found = _calibrated(memory, operand, layers)
    elif reader is None:
        raise InvalidArgument("AttentionMatching reads with the model: pass reader=")
    elif how.queries == "context":
        found = _context(memory, reader, layers)
    else:
        texts = passages(memory, reader, how.queries, how.answer_tokens)
        found = read_passages(memory, reader, texts, layers)
    return reference(memory, how, found)


def reference(
    memory: KVMemory, how: AttentionMatching, found: Mapping[int, torch.Tensor]
) -> QuerySet:
    """Returns queries ``[query_head, token, dim]`` by layer, split as the editor asks for."""
    tokens = min(states.shape[1] for states in found.values())
    group = max(memory.model.layers[index].group for index in found)
    most = tokens if how.max_queries is None else max(1, how.max_queries // group)
    return QuerySet(found, *split(tokens, most, how.seed))


def read_passages(
    memory: KVMemory, reader: Reader, texts: Sequence[torch.Tensor], layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Returns layer to the queries ``[query_head, token, dim]`` of texts read over a memory.

    Each text is read by itself, behind the memory.
    """
    parts: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    for tokens in texts:
        seen = reader.read(memory, tokens, ("queries",))["queries"]
        for index in layers:
            parts[index].append(seen[index][0])
    return {index: torch.cat(some, dim=1) for index, some in parts.items()}


def _context(memory: KVMemory, reader: Reader, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Returns the context's own queries, moved behind the memory.

    Where they stood, each saw only what came before it; those who will read the memory see all
    of it.

    Raises:
        InvalidArgument: if the memory has no tokens.
    """
    if memory.tokens is None:
        raise InvalidArgument(
            "queries='context' reads the context's tokens; this memory has none: take another "
            "source of queries"
        )
    seen = reader.read(None, memory.tokens.cpu(), ("queries_pre",))["queries_pre"]
    return {i: _placed(memory, i, seen[i][0], memory.tokens_count) for i in layers}


def _placed(memory: KVMemory, index: int, queries: torch.Tensor, tokens: int) -> torch.Tensor:
    left = room(memory)
    steps = torch.arange(tokens) % (tokens if left is None else max(1, left))
    spec = memory.model.layers[index]
    return rotate(queries, spec.rope, memory.next_position + steps)


def _calibrated(
    memory: KVMemory, operand: KVMemory, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    sample = QuerySample(operand)
    sample.check(memory)
    left = room(memory)
    reach = _HORIZON if left is None else max(1, min(_HORIZON, left))
    found = {}
    for index in layers:
        spec = memory.model.layers[index]
        queries = sample.layer(index, spec)
        every = rearrange(
            torch.cat((queries.fit, queries.held_out), dim=2),
            "kv_head group sample dim -> (kv_head group) sample dim",
        )
        at = memory.next_position + spread(every.shape[1], reach)
        found[index] = rotate(every, spec.rope, at)
    return found


def _random(
    memory: KVMemory, how: AttentionMatching, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Returns standard normal vectors, the control: they know nothing of the model."""
    generator = torch.Generator().manual_seed(how.seed)
    found = {}
    for index in layers:
        spec = memory.model.layers[index]
        shape = (spec.query_heads, _RANDOM, spec.key_dim)
        found[index] = torch.randn(shape, generator=generator)
    return found
