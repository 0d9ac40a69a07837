"""MatchingReport: how well what is left does what the whole did, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch

from kvedit.editors.matching.fitting import HeadFit
from kvedit.editors.matching.logits import Block, by_group
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerKV, LayerSpec

__all__ = ["HeadMatch", "MatchingReport", "match_report", "measure"]


@dataclass(frozen=True)
class HeadMatch:
    """One KV head, over all queries of its group.

    Args:
        layer: the layer.
        head: the KV head.
        slots: slots that it had.
        kept: slots that it has now.
        output_error: ``||o' - o|| / ||o||`` of local attention outputs, over all held-out queries.
        mass_error: mean of ``|log(y' / y)|``, in nats: how far the block's mass is from what it
            was.
        coverage: share of the fitted queries' attention that the kept slots had before; None
            where only two memories were compared, and likewise below.
        condition: condition number of the least-squares problem of the values.
        ridge: its ridge, as a share of the mean eigenvalue; of several chunks the largest.
        clamped: kept slots whose bias is at a bound.
    """

    layer: int
    head: int
    slots: int
    kept: int
    output_error: float
    mass_error: float
    coverage: float | None = None
    condition: float | None = None
    ridge: float | None = None
    clamped: int | None = None


@dataclass(frozen=True)
class MatchingReport:
    """How well a matched memory stands for the whole one, on queries that no fit has seen.

    Args:
        heads: one entry per layer and KV head that was matched.
        queries: held-out queries per query head.
    """

    heads: tuple[HeadMatch, ...]
    queries: int

    @property
    def output_error(self) -> float:
        """Mean of the heads' output errors."""
        return fmean(head.output_error for head in self.heads)

    @property
    def mass_error(self) -> float:
        """Mean of the heads' mass errors, in nats."""
        return fmean(head.mass_error for head in self.heads)

    def worst(self, count: int = 5) -> tuple[HeadMatch, ...]:
        """Returns the heads with the largest output errors."""
        return tuple(sorted(self.heads, key=lambda head: -head.output_error)[:count])

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data, with the means."""
        found = {"output_error": self.output_error, "mass_error": self.mass_error}
        return {**found, **asdict(self)}

    def __repr__(self) -> str:
        """The means, and the worst heads."""
        lines = [
            f"MatchingReport: {len(self.heads)} KV heads, {self.queries} held-out queries each",
            f"  output error {self.output_error:.3f} (median "
            f"{median(head.output_error for head in self.heads):.3f}), "
            f"mass error {self.mass_error:.3f} nats",
        ]
        for head in self.worst():
            lines.append(
                f"  layer {head.layer} head {head.head}: {head.kept} of {head.slots} slots, output "
                f"{head.output_error:.3f}, mass {head.mass_error:.3f}"
            )
        return "\n".join(lines)


def measure(
    index: int,
    before: LayerKV,
    after: LayerKV,
    spec: LayerSpec,
    queries: torch.Tensor,
    fits: Sequence[HeadFit] = (),
) -> list[HeadMatch]:
    """Returns each KV head's figures.

    Args:
        index: the layer.
        before: its slots.
        after: what stands for them.
        spec: facts of the layer.
        queries: ``[query_head, token, dim]``, post-RoPE, behind the memory.
        fits: what each KV head's fit said of itself, if there was one.
    """
    grouped = by_group(queries.to(before.keys.device), spec)
    (mass, output), (new_mass, new_output) = (
        _attended(Block.of(layer, spec), grouped) for layer in (before, after)
    )
    seen = mass.isfinite()
    gap = torch.where(seen, new_mass - mass, 0.0).abs()
    size = output.square().sum(dim=(1, 2)).sqrt().clamp_min(1e-30)
    errors = (new_output - output).square().sum(dim=(1, 2)).sqrt() / size
    masses = gap.sum(dim=1) / seen.sum(dim=1).clamp_min(1)
    kept = Block.of(after, spec).available().sum(dim=1).tolist()
    found = []
    for head in range(before.heads):
        figures = (before.slots, kept[head], float(errors[head]), float(masses[head]))
        fit = fits[head] if fits else None
        facts = () if fit is None else (fit.coverage, fit.condition, fit.ridge, fit.clamped)
        found.append(HeadMatch(index, head, *figures, *facts))
    return found


def _attended(block: Block, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log-mass ``[kv_head, query]`` and local output ``[kv_head, query, dim]``."""
    scores = block.logits(queries).double()
    output = scores.softmax(dim=-1).nan_to_num(0.0) @ block.values.double()
    return scores.logsumexp(dim=-1), output


def match_report(
    memory: KVMemory, edited: KVMemory, queries: Mapping[int, torch.Tensor]
) -> MatchingReport:
    """Returns how well an edited memory stands for a memory, whatever the edit.

    Args:
        memory: the memory.
        edited: what stands for it; layers that both share are left out.
        queries: layer to ``[query_head, token, dim]``, post-RoPE, at positions behind the memory,
            as :func:`~kvedit.editors.matching.reference_queries` collects them.

    Raises:
        InvalidArgument: if no layer with queries was changed, or one sees only a window.
    """
    found: list[HeadMatch] = []
    for index, states in queries.items():
        before, after = memory.layers[index], edited.layers[index]
        if after is before:
            continue
        spec = memory.model.layers[index]
        if spec.window is not None:
            raise InvalidArgument(
                f"layer {index} sees a window: what its queries see depends on where each stands"
            )
        found += measure(index, before, after, spec, states)
    if not found:
        raise InvalidArgument("no layer that queries were given for differs between the memories")
    return MatchingReport(tuple(found), min(states.shape[1] for states in queries.values()))
