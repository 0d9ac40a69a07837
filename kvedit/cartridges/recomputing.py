"""Recompute blocks in the backward pass instead of keeping what they computed.

transformers' own gradient checkpointing takes the cache away from the layers, and the prefix is in
the cache. So each block's forward is wrapped here, for the time of training (Chen et al. 2016,
arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from kvedit.errors import UnsupportedModel
from kvedit.models.inspection import Inspection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["recomputing"]


@contextmanager
def recomputing(model: PreTrainedModel, found: Inspection) -> Iterator[None]:
    """Wraps every block within the code block; backward must run within it as well.

    Raises:
        UnsupportedModel: if a layer's attention stands in no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [_block(model, names[id(module)]) for module in found.attention.values()]
    with ExitStack() as stack:
        for block in dict.fromkeys(blocks):
            if "forward" in vars(block):
                raise UnsupportedModel(
                    f"{type(block).__name__}.forward was replaced (by offloading hooks?); "
                    "train without recompute"
                )
            block.forward = _wrapped(block.forward)
            stack.callback(delattr, block, "forward")
        yield


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # No randomness in eval mode, so there is no random state to bring back.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputed


def _block(model: PreTrainedModel, name: str) -> torch.nn.Module:
    """Returns the item of a list of modules that holds the module of that name."""
    parts = name.split(".")
    for stop in range(len(parts), 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: stop - 1])), torch.nn.ModuleList):
            block: torch.nn.Module = model.get_submodule(".".join(parts[:stop]))
            return block
    raise UnsupportedModel(f"{name} stands in no list of layers; train without recompute")
