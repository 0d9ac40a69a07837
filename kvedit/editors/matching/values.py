"""Values that give the block's local output again: ridge least squares, ridge chosen or given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Refit", "refit"]

_GRID = tuple(10.0**power for power in range(-9, 2))
"""Ridges that ``"auto"`` tries, as shares of the mean eigenvalue of ``X^T X``."""

_CUT = 1e-13


@dataclass(frozen=True, eq=False)
class Refit:
    """Fitted values of some KV heads.

    Args:
        values: ``[kv_head, slot, dim]`` float64.
        ridge: ``[kv_head]``, what was added to the diagonal of ``X^T X``, as a share of the mean
            eigenvalue.
        condition: ``[kv_head]``, condition number of ``X``, without ridge.
    """

    values: torch.Tensor
    ridge: torch.Tensor
    condition: torch.Tensor


def refit(
    attention: torch.Tensor,
    output: torch.Tensor,
    values: torch.Tensor,
    free: int,
    ridge: float | None,
    check: torch.Tensor,
) -> Refit:
    """Returns ``argmin ||X C - Y||^2 + rho ||C - C0||^2`` by normal equations in float64.

    The paper's least squares (arXiv 2602.16284) with a ridge towards the values that the slots
    had: what the queries don't determine stays as it was, and no ridge is the paper's fit.
    ``rho`` is ``ridge`` times the mean eigenvalue of ``X^T X``. Without one it is the share, of
    nine powers of ten and two more, with the least error on the queries of ``check`` when fitted
    on the others; the fit that is returned uses both.

    Args:
        attention: ``X`` ``[kv_head, query, slot]`` float64.
        output: ``Y`` ``[kv_head, query, dim]`` float64.
        values: ``C0`` ``[kv_head, slot, dim]`` float64.
        free: the last ``free`` slots are fitted; those before them keep their values.
        ridge: share of the mean eigenvalue, or None to choose it.
        check: bool ``[query]``, queries that the choice is made on.
    """
    fixed = values.shape[1] - free
    loose = attention[:, :, fixed:]
    missing = output - attention @ values
    gram, aim = loose.mT @ loose, loose.mT @ missing
    if ridge is None:
        rows, rest = loose[:, check], missing[:, check]
        held, held_aim = rows.mT @ rows, rows.mT @ rest
        shares = _chosen(gram - held, aim - held_aim, held, held_aim)
    else:
        shares = torch.full((len(values),), ridge, dtype=torch.float64, device=gram.device)
    power, turn = _eigen(gram)
    change = turn @ ((turn.mT @ aim) * _inverse(power, shares)[..., None])
    fitted = torch.cat((values[:, :fixed], values[:, fixed:] + change), dim=1)
    smallest = power.amin(dim=1).clamp_min(torch.finfo(power.dtype).tiny)
    return Refit(fitted, shares, (power.amax(dim=1) / smallest).sqrt())


def _chosen(
    gram: torch.Tensor, aim: torch.Tensor, held: torch.Tensor, held_aim: torch.Tensor
) -> torch.Tensor:
    """Returns the share ``[kv_head]`` with the least squared error on the queries held apart."""
    power, turn = _eigen(gram)
    inside, ours, theirs = turn.mT @ aim, turn.mT @ held @ turn, turn.mT @ held_aim
    errors = []
    for share in _GRID:
        shares = torch.full((len(gram),), share, dtype=torch.float64, device=gram.device)
        change = inside * _inverse(power, shares)[..., None]
        # ||R - X D||^2 less ||R||^2, which does not depend on the share.
        errors.append((change * (ours @ change - 2 * theirs)).sum(dim=(1, 2)))
    grid = torch.tensor(_GRID, dtype=torch.float64, device=gram.device)
    return grid[torch.stack(errors).argmin(dim=0)]


def _eigen(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    power, turn = torch.linalg.eigh(gram)
    return power.clamp_min(0), turn


def _inverse(power: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Returns ``1 / (eigenvalue + rho)``; 0 where there is nothing to divide by."""
    total = power + shares[:, None] * power.mean(dim=1, keepdim=True)
    floor = _CUT * power.amax(dim=1, keepdim=True)
    return torch.where(total > floor, 1 / total, 0.0)
