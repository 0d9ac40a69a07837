"""Steered: the bias and rules of a cache's rows, and which of them act right now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvedit.memory import KVMemory, ModelSpec
from kvedit.memory.rules import read_rules
from kvedit.models.attention_call import AttentionCall
from kvedit.runtime.finish import finish
from kvedit.runtime.rowgate import RowGate, row_gates
from kvedit.runtime.ruling import Ruling, rule_layer
from kvedit.runtime.slots import LayerSlots

__all__ = ["Steered"]


class Steered:
    """What steers the rows of a batch; without rules, calls go to their backend as ever.

    Args:
        spec: the live model's facts.
        memories: one per row, or None.
        layers: the rows' slots.

    Attributes:
        gates: each row's gate, or None.
        active: whether a row steers in a layer, ``active[layer][row]``, while a gate tries; None
            means that all steer everywhere.
        trying: whether a gate runs the model again within a forward pass.
    """

    def __init__(
        self, spec: ModelSpec, memories: Sequence[KVMemory | None], layers: Sequence[LayerSlots]
    ) -> None:
        """Resolves rules to slots, layer by layer."""
        rules = [() if memory is None else read_rules(memory.rules) for memory in memories]
        self._rulings: list[Ruling | None] = [
            rule_layer(spec, index, slots, rules) for index, slots in enumerate(layers)
        ]
        self.gates: list[RowGate | None] = row_gates(rules, layers, self._rulings)
        self.active: Sequence[Sequence[bool]] | None = None
        self.trying = False

    @property
    def gated(self) -> bool:
        """Whether a row has a gate."""
        return any(gate is not None for gate in self.gates)

    def complete(
        self, call: AttentionCall, slots: LayerSlots, mask: torch.Tensor | None, causal: bool
    ) -> AttentionCall:
        """Returns the call with mask, bias and rules.

        Args:
            call: the call as the model made it.
            slots: its layer's slots.
            mask: bool ``[batch, 1, query, slot]``, or None where nothing is hidden.
            causal: whether None stands for a causal square.

        Raises:
            UnsupportedModel: if there are no rules and the backend can't carry the mask.
        """
        ruling, active = self._rulings[call.layer], None
        if self.active is not None:
            active = self.active[call.layer]
            ruling = None if ruling is None else ruling.only(active)
        if ruling is None:
            return finish(call, mask, causal, slots.bias_at(call.query, active))
        # Explicit attention takes any mask, and bias in its own, wider dtype.
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        bias = slots.bias_at(call.query.new_empty(0, dtype=dtype), active)
        bias = None if bias is None else bias[:, :, None, :]
        return replace(call, mask=mask, causal=causal, bias=bias, adjust=ruling)

    def trial(self, trials: Sequence[int | None]) -> None:
        """Lets each row steer as its gate does in that trial; None stands for unsteered."""
        steers = [
            [
                gate is None or (trial is not None and gate.steers(layer, trial))
                for gate, trial in zip(self.gates, trials, strict=True)
            ]
            for layer in range(len(self._rulings))
        ]
        self.active = steers

    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row ``rows[i]`` the i-th row."""
        self.gates = [self.gates[row] for row in rows.tolist()]
        self._rulings = [
            None if ruling is None else ruling.select_rows(rows) for ruling in self._rulings
        ]
