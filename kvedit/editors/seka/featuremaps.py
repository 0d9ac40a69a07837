"""Feature maps: SEKA in the image of an elementwise function of the keys.

With a map ``phi``, projectors are learned on ``phi(h)``, and an edit becomes
``k' = phi^-1(phi(k) + added(phi(k)))``. What is added may lead out of the image of ``phi``, so each
inverse first limits its argument. Maps and limits are those of the published code (waylonli/SEKA
at 06b0246, ``phi`` and ``phi_inv`` of its utils), but for the limit of ``elu``: there it has none,
and a value below -1 becomes not-a-number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["FEATURE_MAPS", "FeatureMap", "FeatureMapName", "check_learned_with", "named_map"]

FeatureMapName = Literal["none", "tanh", "elu", "squared_exponential"]

_EDGE = 1e-4  # of the published code: how near an inverse goes to the edge of the image

Tensors = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureMap:
    """An elementwise map and what takes its values back to keys.

    Args:
        forward: phi.
        backward: phi^-1, with its limits.
    """

    forward: Tensors
    backward: Tensors

    def added(self, keys: torch.Tensor, change: Tensors) -> torch.Tensor:
        """Returns ``k' - k``, where ``change`` says what is added to ``phi(k)``.

        Args:
            keys: before RoPE, ``[kv_head, slot, dim]``.
            change: from ``phi(k)`` to what is added to it.
        """
        mapped = self.forward(keys)
        return self.backward(mapped + change(mapped)) - keys


class _Plain(FeatureMap):
    """Keys as they are; what is added is not rounded by way of the sum."""

    def added(self, keys: torch.Tensor, change: Tensors) -> torch.Tensor:
        return change(keys)


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _tanh_back(values: torch.Tensor) -> torch.Tensor:
    return torch.atanh(values.clamp(_EDGE - 1, 1 - _EDGE))


def _elu_back(values: torch.Tensor) -> torch.Tensor:
    below = torch.log1p(values.clamp(_EDGE - 1, 0))
    return torch.where(values >= 0, values, below)


def _bell(values: torch.Tensor) -> torch.Tensor:
    return torch.exp(-values.square() / 2)


def _bell_back(values: torch.Tensor) -> torch.Tensor:
    return -2 * values.clamp_min(_EDGE).log()


FEATURE_MAPS: Mapping[str, FeatureMap] = {
    "none": _Plain(_same, _same),
    "tanh": FeatureMap(torch.tanh, _tanh_back),
    "elu": FeatureMap(torch.nn.functional.elu, _elu_back),
    "squared_exponential": FeatureMap(_bell, _bell_back),
}
"""Maps by name:

* ``none``: keys as they are.
* ``tanh``: changed keys lie within ``atanh(1 - 1e-4)``, which is 4.95, whatever they were before.
* ``elu``: ``k`` from zero on, ``e^k - 1`` below; changed keys lie above ``log(1e-4)``, -9.2.
* ``squared_exponential``: ``e^(-k^2 / 2)``. Its ``phi^-1(y)`` is ``-2 log y`` with y of 1e-4 at
  least, as the published code has it. That is no inverse: it leaves out the root and the sign, so
  a key to which nothing is added becomes its square, and one that grows in the image goes below
  zero.
"""


def named_map(name: str) -> FeatureMap:
    """Returns the map of a name.

    Raises:
        UnknownName: if there is none.
    """
    if name not in FEATURE_MAPS:
        raise UnknownName("feature map", str(name), FEATURE_MAPS)
    return FEATURE_MAPS[name]


def check_learned_with(name: str, facts: Mapping[str, Any]) -> None:
    """Checks that an operand was learned with the editor's map.

    Args:
        name: the editor's map.
        facts: the operand's facts; one that names no map was learned with ``"none"``.

    Raises:
        InvalidArgument: if it was learned with another.
    """
    learned = facts.get("feature_map", "none")
    if learned != name:
        raise InvalidArgument(
            f"feature_map: the {facts['kind']} were learned with {learned!r}, the editor has "
            f"{name!r}; give it feature_map={learned!r}, or learn with feature_map={name!r}"
        )
