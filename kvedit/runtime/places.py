"""Where tapped tokens stand: positions, padding and sources, in sessions and in plain calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvedit.errors import UnsupportedModel
from kvedit.models.attention_call import AttentionCall
from kvedit.models.route import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvedit.runtime.cache import MemoryCache
    from kvedit.runtime.tapping import Tap

__all__ = ["Places", "block_of", "hidden_hooks"]


class Places:
    """Positions and padding of the forward pass that runs.

    A session's cache knows them. For a plain call they are taken from what the model was given.
    """

    def __init__(self) -> None:
        """Knows nothing before the first pass."""
        self._positions: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Notes positions and mask of every forward pass within the block."""

        def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._positions = kwargs.get("position_ids")
            mask = kwargs.get("attention_mask")
            self._mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def queries(self, call: AttentionCall) -> torch.Tensor:
        """Returns positions ``[batch, query]`` of the new tokens."""
        cache = _cache(call)
        count = call.query.shape[2]
        if cache is not None:
            return cache.positions[:, -count:]
        if self._positions is not None and self._positions.ndim == 2:
            return self._positions[:, -count:].expand(call.query.shape[0], count)
        start = call.key.shape[2] - count
        return torch.arange(start, start + count).expand(call.query.shape[0], count)

    def slots(self, call: AttentionCall) -> torch.Tensor:
        """Returns positions ``[batch, slot]`` of all slots.

        Raises:
            UnsupportedModel: for a plain call over another cache, which keeps no positions.
        """
        cache = _cache(call)
        if cache is not None:
            held = cache.layers[call.layer].positions
            return torch.cat((held, cache.positions.to(held.device)), dim=1)
        if call.key.shape[2] != call.query.shape[2]:
            raise UnsupportedModel(
                "keys before RoPE need each slot's position, and transformers' own caches keep "
                "none: tap within kv.attach, or a call without a cache"
            )
        return self.queries(call)

    def valid(self, call: AttentionCall) -> torch.Tensor:
        """Returns which new tokens are real ``[batch, query]``, rather than padding."""
        cache = _cache(call)
        batch, _, count, _ = call.query.shape
        if cache is not None:
            return cache.valid[:, -count:].to(call.query.device)
        if self._mask is not None and self._mask.shape[1] >= count:
            return self._mask[:, -count:].bool().to(call.query.device)
        return torch.ones(batch, count, dtype=torch.bool, device=call.query.device)

    def source(self, call: AttentionCall) -> torch.Tensor:
        """Returns the token index of each slot ``[batch, slot]``; new tokens count on."""
        cache = _cache(call)
        batch, _, slots, _ = call.key.shape
        if cache is None:
            return torch.arange(slots).expand(batch, slots)
        held = cache.layers[call.layer].source
        # Tokens of a session beyond its memory belong to no span of the memory.
        return torch.nn.functional.pad(held, (0, slots - held.shape[1]), value=-1)


def _cache(call: AttentionCall) -> MemoryCache | None:
    return getattr(call.key, MARK, None)


@contextmanager
def hidden_hooks(model: PreTrainedModel, tap: Tap) -> Iterator[None]:
    """Hooks the output of each tapped layer's block: the list item that holds its attention."""
    handles = []
    try:
        for layer in tap.layers:
            block = block_of(model, tap.inspection.attention[layer])
            handles.append(block.register_forward_hook(_keeper(tap, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_of(model: PreTrainedModel, attention: torch.nn.Module) -> torch.nn.Module:
    """Returns a layer's block: the item of a list of layers that its attention stands in.

    Raises:
        UnsupportedModel: if it stands in no list.
    """
    name = next(name for name, module in model.named_modules() if module is attention)
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: stop - 1])), torch.nn.ModuleList):
            block: torch.nn.Module = model.get_submodule(".".join(parts[:stop]))
            return block
    raise UnsupportedModel(f"{name} stands in no list of layers; its block can't be found")


def _keeper(tap: Tap, layer: int) -> Any:
    def hook(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (tap.keep("hidden", layer, output[0]), *output[1:])
        return tap.keep("hidden", layer, output)

    return hook
