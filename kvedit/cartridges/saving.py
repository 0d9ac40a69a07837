"""The tensors of a run by name: parameters, Adam's moments, parameters of the best evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["gather", "load_parameters", "restore"]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

Named = Mapping[str, torch.nn.Parameter]
"""Parameters by name."""


def gather(
    named: Named, optimizer: torch.optim.Adam, best: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns all tensors that a run needs to go on with the same bits."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        tensors[f"parameter.{name}"] = parameter
        kept = optimizer.state[parameter]
        tensors |= {f"{moment}.{name}": kept[moment] for moment in _MOMENTS}
    return tensors | {f"best.{name}": tensor for name, tensor in best.items()}


def restore(
    tensors: Mapping[str, torch.Tensor], named: Named, optimizer: torch.optim.Adam
) -> dict[str, torch.Tensor]:
    """Puts tensors back where :func:`gather` took them; returns those of the best evaluation."""
    load_parameters(named, {name: tensors[f"parameter.{name}"] for name in named})
    for name, parameter in named.items():
        moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
        moments["step"] = moments["step"].cpu()  # where Adam keeps its count
        optimizer.state[parameter] = moments
    found = {name: tensors.get(f"best.{name}") for name in named}
    return {name: best.to(named[name].device) for name, best in found.items() if best is not None}


@torch.no_grad()
def load_parameters(named: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors into the parameters of the same names."""
    for name, parameter in named.items():
        parameter.copy_(tensors[name])
