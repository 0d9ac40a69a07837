"""Objective: what training minimises, a weighted sum of losses per supervised token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvedit.cartridges.distillation import token_losses
from kvedit.cartridges.mappings import known_keys
from kvedit.cartridges.outputs import keeping_outputs, output_errors
from kvedit.cartridges.packed_model import PackedModel
from kvedit.cartridges.packing import Batch
from kvedit.cartridges.prefix import Prefix
from kvedit.errors import InvalidArgument

__all__ = ["Losses", "Objective"]


@dataclass(frozen=True, eq=False)
class Losses:
    """Sums over the supervised tokens of a batch.

    Args:
        total: what is minimised, with gradient.
        kl: to the teacher's stored distribution.
        nll: of the answers' own tokens.
        attention: relative error of attention outputs; 0 where it is not asked for.
    """

    total: torch.Tensor
    kl: torch.Tensor
    nll: torch.Tensor
    attention: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """Weights of the losses; each is a mean over supervised tokens.

    Context distillation generalises where predicting the next token memorises (Eyuboglu et al.
    2025, arXiv 2506.06266, section 4), hence the defaults.

    Args:
        distill: of the KL to the teacher's stored top-k with tail.
        next_token: of the negative log-likelihood of the answers' tokens.
        attention: of the relative squared error of attention outputs to those that the model has
            over a teacher's memory, which is read in every step.

    Raises:
        InvalidArgument: if a weight is negative, or all are zero.
    """

    distill: float = 1.0
    next_token: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        """Checks the weights."""
        weights = (self.distill, self.next_token, self.attention)
        good = all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights)
        if not good or not any(weights):
            raise InvalidArgument(
                f"an objective needs weights from 0, one of them above it, found {self}"
            )

    @classmethod
    def of(cls, given: Objective | Mapping[str, Any]) -> Objective:
        """Returns a mapping, as a config file holds it, as an Objective."""
        if isinstance(given, Objective):
            return given
        return cls(**known_keys("objective", cls, given))

    def losses(
        self, base: PackedModel, prefix: Prefix, batch: Batch, teacher: Prefix | None = None
    ) -> Losses:
        """Returns the losses of one pass.

        Args:
            base: the open model.
            prefix: the student.
            batch: packed rows on the model's device.
            teacher: the full memory, for attention outputs.

        Raises:
            InvalidArgument: if attention outputs are asked for and there is no teacher.
        """
        if not self.attention:
            logits, error = base.logits(prefix, batch), None
        else:
            logits, error = self._observed(base, prefix, batch, teacher)
        found = token_losses(logits, batch)
        kl, nll = found.kl.sum(), found.nll.sum()
        attention = torch.zeros_like(kl) if error is None else error.to(kl)
        total = torch.zeros_like(kl)
        # A loss of weight 0 stays out of the graph: 0 times an infinite gradient is NaN.
        for weight, part in (
            (self.distill, kl), (self.next_token, nll), (self.attention, attention)
        ):  # fmt: skip
            total = total + weight * part if weight else total
        return Losses(total, kl.detach(), nll.detach(), attention.detach())

    def _observed(
        self, base: PackedModel, prefix: Prefix, batch: Batch, teacher: Prefix | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if teacher is None:
            raise InvalidArgument(
                "an objective with attention needs teacher=, the memory whose attention outputs "
                "are matched"
            )
        with torch.no_grad(), keeping_outputs(batch) as wanted:
            base.logits(teacher, batch)
        with keeping_outputs(batch) as kept:
            logits = base.logits(prefix, batch)
        return logits, output_errors(kept, wanted).sum()
