"""MassStep: one mass rule per row of a batch, by two log-sum-exps per (row, head, query)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

__all__ = ["MassStep"]

_SPARE = 64
"""New tokens that the laid-out masks have room for before they are laid out again."""


@dataclass(frozen=True, eq=False)
class _Laid:
    """A step's constants on the device and in the dtype of the logits.

    Args:
        window: slots from the first to the last one that is in a row's span.
        within: 0 in the span, -inf outside, over the window; None where a window is all span.
        without: -inf in the span, 0 outside, over all slots and spare ones.
        member: 1 in the span, 0 outside, over all slots and spare ones.
        goal: logit or logarithm of the target, ``[batch, 1, 1]``.
        shares: where the goal is a logarithm, bool ``[batch, 1, 1]``; None where it never is.
        floor: lowest bias, 0 or -inf ``[batch, 1, 1]``; None where it is -inf everywhere.
        heads: 1 or 0 ``[batch, query_head, 1]``; None where all are 1.
    """

    window: slice
    within: torch.Tensor | None
    without: torch.Tensor
    member: torch.Tensor
    goal: torch.Tensor
    shares: torch.Tensor | None
    floor: torch.Tensor | None
    heads: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class MassStep:
    """What one mass rule per row asks of a layer; see :class:`~kvedit.memory.rules.MassRule`.

    With ``l`` the log-odds of the span's mass among all that the query sees, sinks included, the
    exact form adds ``logit(target) - l`` to the span's logits; SpotLight's (arXiv 2505.12025) adds
    ``log(target) - log(sigmoid(l))``. A head that sees nothing of the span, or nothing else, is
    left alone.

    Args:
        inside: bool ``[batch, slot]``, over the memories' slots.
        heads: bool ``[batch, query_head]``; none in a row that has no rule.
        target: float64 ``[batch]``.
        exact: bool ``[batch]``, whether exact or SpotLight's form.
        raise_only: bool ``[batch]``.
    """

    inside: torch.Tensor
    heads: torch.Tensor
    target: torch.Tensor
    exact: torch.Tensor
    raise_only: torch.Tensor
    _kept: list[_Laid] = field(default_factory=list, init=False, repr=False)

    def apply(self, scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """Returns the logits ``[batch, query_head, query, slot]`` with the span's bias added.

        Args:
            scores: logits after static bias; -inf where a slot is not seen.
            sinks: ``[query_head]`` logits of the layer's sinks, or None.
        """
        laid = self._laid(scores)
        slots = scores.shape[3]
        span = scores[..., laid.window]
        inner = (span if laid.within is None else span + laid.within).logsumexp(dim=-1)
        outer = (scores + laid.without[..., :slots]).logsumexp(dim=-1)
        if sinks is not None:
            outer = torch.logaddexp(outer, sinks.to(outer.dtype)[None, :, None])
        bias = self._bias(inner - outer, laid)
        return torch.addcmul(scores, bias[..., None], laid.member[..., :slots])

    def _bias(self, odds: torch.Tensor, laid: _Laid) -> torch.Tensor:
        now = odds
        if laid.shares is not None:
            now = torch.where(laid.shares, torch.nn.functional.logsigmoid(odds), odds)
        bias = laid.goal - now
        if laid.floor is not None:
            bias = bias.maximum(laid.floor)
        # Nothing of the span, or nothing else, is seen: there is no mass to move.
        bias = bias.masked_fill(~odds.isfinite(), 0)
        return bias if laid.heads is None else bias * laid.heads

    def select_rows(self, rows: torch.Tensor) -> MassStep:
        """Returns the step whose row ``i`` is this one's row ``rows[i]``."""
        names = ("inside", "heads", "target", "exact", "raise_only")
        return MassStep(*(getattr(self, name)[rows] for name in names))

    def _laid(self, like: torch.Tensor) -> _Laid:
        if self._kept:
            kept = self._kept[0].without
            same = kept.dtype == like.dtype and kept.device == like.device
            if same and kept.shape[3] >= like.shape[3]:
                return self._kept[0]
        self._kept[:] = [self._lay_out(like)]
        return self._kept[0]

    def _lay_out(self, like: torch.Tensor) -> _Laid:
        room = max(like.shape[3] + _SPARE, like.shape[3] * 3 // 2)
        member = torch.zeros(len(self.inside), 1, 1, room, dtype=torch.bool)
        member[:, 0, 0, : self.inside.shape[1]] = self.inside
        at = self.inside.any(dim=0).nonzero()
        window = slice(int(at[0]), int(at[-1]) + 1)
        outside = ~member[..., window]
        goal = torch.where(self.exact, self.target.logit(), self.target.log())
        floor = torch.zeros(len(goal)).masked_fill(~self.raise_only, -torch.inf)
        zeros = torch.zeros(member.shape, dtype=like.dtype)
        within = zeros[..., window].masked_fill(outside, -torch.inf)
        return _Laid(
            window,
            None if not bool(outside.any()) else within.to(like.device),
            zeros.masked_fill(member, -torch.inf).to(like.device),
            member.to(like),
            goal[:, None, None].to(like),
            None if bool(self.exact.all()) else ~self.exact[:, None, None].to(like.device),
            floor[:, None, None].to(like) if bool(self.raise_only.any()) else None,
            None if bool(self.heads.all()) else self.heads[:, :, None].to(like),
        )
