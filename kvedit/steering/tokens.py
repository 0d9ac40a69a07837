"""Tokens: what the tokens of one forward pass are: given or said, where, how far from the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Tokens"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one forward pass.

    Args:
        valid: bool ``[batch, query]``; False for padding.
        positions: int64 ``[batch, query]``, RoPE positions.
        said: bool ``[batch, query]``: chosen by the model, rather than given to it.
        left: int64 ``[batch, query]``: tokens from this one to the end of its prompt, itself
            counted: 1 for the last. Of no meaning for tokens that were said.
        whole: whether the pass reaches the prompt's end, as far as can be told.
        continues: whether the prompt's beginning came in an earlier pass.
        misjudged: whether that pass took its own end for the prompt's.
        key: what the state of its rows is kept by: one per cache.
    """

    valid: torch.Tensor
    positions: torch.Tensor
    said: torch.Tensor
    left: torch.Tensor
    whole: bool
    continues: bool
    misjudged: bool
    key: object
