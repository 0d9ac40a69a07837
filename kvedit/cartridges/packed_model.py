"""PackedModel: the frozen base model, open for passes of packed rows over a prefix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from kvedit.cartridges.packed_cache import PackedCache
from kvedit.cartridges.packing import Batch
from kvedit.cartridges.prefix import Prefix
from kvedit.cartridges.recomputing import recomputing
from kvedit.errors import ContextTooLong, InvalidArgument, UnsupportedModel
from kvedit.memory import ModelSpec
from kvedit.models.cache_argument import cache_argument
from kvedit.models.inspection import Inspection, inspect
from kvedit.models.route import routed
from kvedit.runtime.limits import check_switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PackedModel", "open_packed"]


@dataclass(frozen=True, eq=False)
class PackedModel:
    """The base model while it is open; :func:`open_packed` makes it.

    Args:
        model: the live model; its weights have no gradient.
        inspection: its facts.
    """

    model: PreTrainedModel
    inspection: Inspection

    @property
    def spec(self) -> ModelSpec:
        """The model's facts."""
        return self.inspection.spec

    def logits(self, prefix: Prefix, batch: Batch) -> torch.Tensor:
        """Returns logits ``[query, vocabulary]`` at the batch's supervised tokens.

        Each token sees the prefix, and its own sample up to itself. The output matrix is applied
        at supervised tokens only: it is the largest tensor of a pass.

        Args:
            prefix: what all tokens see; the gradient flows to it.
            batch: packed rows, on the model's device.
        """
        cache = PackedCache(self.spec, prefix, batch)
        head: torch.nn.Module | None = self.model.get_output_embeddings()
        taken: list[bool] = []

        def only_supervised(module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
            states = args[0] if args else None
            if isinstance(states, torch.Tensor) and states.shape[:2] == batch.ids.shape:
                taken.append(True)
                return (states[batch.rows, batch.columns][None], *args[1:])
            return None

        with ExitStack() as stack:
            if head is not None:
                handle = head.register_forward_pre_hook(only_supervised)
                stack.callback(handle.remove)
            output = self.model(
                input_ids=batch.ids,
                attention_mask=None,  # the cache makes every layer's mask
                position_ids=batch.offsets + prefix.next_position,
                use_cache=True,
                **{cache_argument(self.model): cache},
                **self._options(),
            )
        cache.end()
        logits: torch.Tensor = output.logits
        return logits[0] if taken else logits[batch.rows, batch.columns]

    def _options(self) -> dict[str, Any]:
        # Explicit, since a generation config or a subclass may have another default.
        known = signature(self.model.forward).parameters
        return {"logits_to_keep": 0} if "logits_to_keep" in known else {}

    def check_length(self, next_position: int, longest: int) -> None:
        """Raises unless samples of ``longest`` tokens fit behind ``next_position``.

        Raises:
            ContextTooLong: if they run past the model's positions, or to where its RoPE changes.
        """
        stop = next_position + longest
        limit = self.spec.max_position
        if limit is not None and stop > limit:
            raise ContextTooLong(
                f"{self.spec.name} has {limit} positions; the longest sample would end at {stop}: "
                "leave out long samples, or start from a memory that ends earlier"
            )
        check_switch(self.spec, next_position, stop)


@contextmanager
def open_packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recompute: bool = False,
) -> Iterator[PackedModel]:
    """Opens a model for packed passes: attention is routed, weights are frozen, then restored.

    Args:
        model: a decoder-only causal language model in eval mode.
        tokenizer: its tokenizer, for the fingerprint.
        recompute: whether blocks are computed again in the backward pass, to save memory.

    Yields:
        The model, open.

    Raises:
        UnsupportedModel: if the model is sharded (FSDP), or has a mechanism that is not
            understood.
        InvalidArgument: if it is in training mode.
    """
    _refuse_sharded(model)
    found = inspect(model, tokenizer)
    with ExitStack() as stack:
        stack.enter_context(routed(model))
        stack.enter_context(_frozen(model))
        if recompute:
            stack.enter_context(recomputing(model, found))
        yield PackedModel(model, found)


def _refuse_sharded(model: PreTrainedModel) -> None:
    kinds = {type(module).__name__ for module in model.modules()}
    sharded = any(kind.startswith("FSDP") or kind == "FullyShardedDataParallel" for kind in kinds)
    split = any(hasattr(weight, "placements") for weight in model.parameters())
    if sharded or split:
        raise UnsupportedModel(
            "the base model is sharded (FSDP or tensor parallel): kvedit reads facts and "
            "fingerprint off whole weights. Load it whole on every process, or over the devices of "
            "one process with device_map; gradients of a cartridge are small and are summed"
        )
    wrapped = next((k for k in kinds if k in ("DistributedDataParallel", "DataParallel")), None)
    if wrapped:
        raise InvalidArgument(
            f"the base model is wrapped in {wrapped}: pass the model itself; it is frozen, so "
            "there is nothing to synchronise"
        )


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Lets no weight collect a gradient within the block."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)
