"""The hook that keeps a session's cache told: it sits on the model's forward while attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import InvalidArgument
from kvedit.models.cache_argument import is_given
from kvedit.models.route import routed
from kvedit.runtime.cache import MemoryCache
from kvedit.runtime.gating import pass_gate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["announcing"]


@contextmanager
def announcing(model: PreTrainedModel, cache: MemoryCache) -> Iterator[None]:
    """Routes the model, and tells ``cache`` of every forward pass that is given it.

    Where the cache's rows have a gate, the pass itself is the unsteered one, and the gate's trials
    follow it.

    Positions must be explicit; the 2D attention mask is taken for the new tokens and kept from
    the model, since each layer's mask is the cache's to make.
    """
    names = list(inspect.signature(model.forward).parameters)

    def before(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if not is_given(cache, given):
            return None
        if cache.steered.gated and not cache.steered.trying:
            cache.steered.trial([None] * cache.rows)
        _announce(cache, given)
        given.update(attention_mask=None, use_cache=True)
        return (), given

    def after(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not is_given(cache, kwargs):
            return None
        cache.end()
        if not cache.steered.gated or cache.steered.trying:
            return None
        return pass_gate(model, cache, kwargs, output)

    with routed(model):
        handles = (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _announce(cache: MemoryCache, given: dict[str, Any]) -> None:
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeddings
    if tokens is None:
        raise InvalidArgument("expected input_ids or inputs_embeds")
    rows, queries = tokens.shape[:2]
    if rows != cache.rows:
        raise InvalidArgument(
            f"expected {cache.rows} rows, one per memory of this session, found {rows}"
        )
    positions = given.get("position_ids")
    if positions is None:
        raise InvalidArgument(
            "pass position_ids: a memory's slots are not its positions, and transformers' default "
            f"counts slots. The next positions are {cache.next_positions.tolist()}"
        )
    if positions.ndim != 2:
        raise InvalidArgument(f"expected 2D position_ids, found shape {list(positions.shape)}")
    positions = positions.to(torch.int64).expand(rows, queries)
    cache.begin(ids, positions, _validity(given.get("attention_mask"), rows, queries, tokens))


def _validity(mask: Any, rows: int, queries: int, tokens: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return torch.ones(rows, queries, dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[1] < queries:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise InvalidArgument(
            f"expected a 2D attention_mask of at least {queries} columns, found {shape}; masks per "
            "head or layer are the memory's bias"
        )
    return mask[:, -queries:].bool()
