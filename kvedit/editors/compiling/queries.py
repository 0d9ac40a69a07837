"""QuerySample: a model's queries as calibration left them, and where they will stand.

Tensors here are float64 on the CPU: a layer has some thousands of vectors, and the normal equations
of what follows are badly conditioned where RoPE turns fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

from kvedit.errors import IncompatibleModel
from kvedit.memory import KVMemory, LayerSpec
from kvedit.memory.operand import operand_facts
from kvedit.models.rope import rotate

__all__ = ["LayerQueries", "QuerySample", "reach", "spread"]

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, eq=False)
class LayerQueries:
    """One layer's sample, before RoPE.

    Args:
        spec: facts of the layer.
        fit: ``[kv_head, group, sample, dim]`` to fit on, sorted by text.
        held_out: ``[kv_head, group, sample, dim]`` to certify on.
        texts: texts that ``fit`` comes from, with equally many samples each.
        positions: ``[sample]`` where the samples of ``fit`` stood in their texts.
    """

    spec: LayerSpec
    fit: torch.Tensor
    held_out: torch.Tensor
    texts: int
    positions: torch.Tensor

    def placed(self, queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns ``queries`` ``[…, sample, dim]`` as attention has them at ``positions``.

        They are multiplied by the layer's scale, so their product with a key is a logit.
        """
        return rotate(queries, self.spec.rope, positions) * self.spec.scale


@dataclass(frozen=True, eq=False)
class QuerySample:
    """The operand that :func:`kvedit.calibrate` makes, by layer.

    Args:
        operand: of kind ``"queries"``.

    Raises:
        InvalidArgument: if it is no such operand.
    """

    operand: KVMemory

    def __post_init__(self) -> None:
        """Checks the kind."""
        self.facts()

    def facts(self) -> dict[str, Any]:
        """Returns what calibration wrote down; see :func:`kvedit.calibrate`."""
        return operand_facts(self.operand, "queries")

    def check(self, memory: KVMemory) -> None:
        """Raises IncompatibleModel unless the memory is of the model that gave the queries."""
        ours, theirs = self.operand.model.fingerprint, memory.model.fingerprint
        found = ours.differences(theirs)
        if found:
            raise IncompatibleModel(
                f"the queries are of another model than the memory: {found} (queries, memory); "
                "calibrate the model that made the memory"
            )

    def layer(self, index: int, spec: LayerSpec | None = None) -> LayerQueries:
        """Returns one layer's queries.

        Args:
            index: the layer.
            spec: the layer as a memory knows it, whose frequencies may be others (dynamic NTK,
                LongRoPE); None takes those of the calibration.
        """
        facts, spec = self.facts(), spec or self.operand.model.layers[index]
        every = rearrange(
            self.operand.layers[index].keys.detach().cpu().double(),
            "kv_head (group sample) dim -> kv_head group sample dim",
            group=spec.group,
        )
        count = int(facts["fit"])
        where = torch.tensor(facts["positions"][:count], dtype=torch.int64)
        return LayerQueries(
            spec, every[:, :, :count], every[:, :, count:], int(facts["texts"][0]), where
        )


def reach(memory: KVMemory, index: int, horizon: int) -> int:
    """Returns how many positions after the memory a layer can still see some of it.

    A sliding layer sees its last slot for ``window - 1`` more positions; a chunked layer until the
    chunk ends; no layer goes past the model's last position. At least 1.
    """
    spec, start = memory.model.layers[index], memory.next_position
    limits = [horizon]
    if spec.window is not None:
        chunked = spec.kind == "chunked"
        limits.append(spec.window - start % spec.window if chunked else spec.window - 1)
    if memory.model.max_position is not None:
        limits.append(memory.model.max_position - start)
    return max(1, min(limits))


def spread(count: int, length: int, ends: bool = False) -> torch.Tensor:
    """Returns ``count`` distances ``[sample]`` in 0 to ``length - 1``, denser near both ends.

    A fit on equally dense positions errs most at the two ends of their range; the density of
    Chebyshev's nodes levels the error out. The order is that of the golden ratio's multiples,
    so neighbours in the sample stand far apart.

    Args:
        count: how many.
        length: number of positions.
        ends: True gives the nodes themselves in ascending order, both ends among them.
    """
    if ends:
        share = torch.linspace(0, 1, count, dtype=torch.float64)
    else:
        share = (torch.arange(count, dtype=torch.float64) + 0.5) * _GOLDEN % 1
    return ((1 - torch.cos(math.pi * share)) / 2 * (length - 1)).round().to(torch.int64)
