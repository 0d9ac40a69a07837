"""RowGate: the gate of one row of a batch, and the layers that it may take back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvedit.errors import InvalidArgument
from kvedit.memory.rules import GateRule, Rule
from kvedit.runtime.ruling import Ruling
from kvedit.runtime.slots import LayerSlots

__all__ = ["RowGate", "row_gates"]


@dataclass(frozen=True)
class RowGate:
    """The gate of one row.

    Args:
        beta: share of the unsteered maximum that a steered choice needs.
        layers: layers that steer, the most important first; at least one.
    """

    beta: float
    layers: tuple[int, ...]

    @property
    def trials(self) -> int:
        """Steered passes until the row falls back: n layers, n // 2 and so on, down to 1."""
        return len(self.layers).bit_length()

    def steers(self, layer: int, trial: int) -> bool:
        """Whether a layer steers in trial number ``trial``; in none beyond the last."""
        return layer in self.layers[: len(self.layers) >> trial]


def row_gates(
    rules: Sequence[Sequence[Rule]],
    layers: Sequence[LayerSlots],
    rulings: Sequence[Ruling | None],
) -> list[RowGate | None]:
    """Returns each row's gate; None where a row has none, or nothing that it could take back.

    Raises:
        InvalidArgument: if a gate lists its layers and one that steers is missing.
    """
    return [_row_gate(row, found, layers, rulings) for row, found in enumerate(rules)]


def _row_gate(
    row: int,
    rules: Sequence[Rule],
    layers: Sequence[LayerSlots],
    rulings: Sequence[Ruling | None],
) -> RowGate | None:
    gates = [rule for rule in rules if isinstance(rule, GateRule)]
    if not gates:
        return None
    steering = [
        layer
        for layer, (slots, ruling) in enumerate(zip(layers, rulings, strict=True))
        if slots.biased(row) or (ruling is not None and ruling.acts_on(row))
    ]
    order = steering if gates[0].layers is None else gates[0].layers
    missing = sorted(set(steering) - set(order))
    if missing:
        raise InvalidArgument(
            f"the gate's layers {list(order)} leave out layers {missing}, which steer too: list "
            "all, or give layers=None"
        )
    kept = tuple(dict.fromkeys(layer for layer in order if layer in steering))
    return RowGate(gates[0].beta, kept) if kept else None
