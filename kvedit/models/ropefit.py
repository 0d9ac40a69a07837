"""Find the rotation that a layer applies, among the frequencies that the model holds.

Candidates are the model's own ``*inv_freq`` buffers in both layouts; the observed keys decide. So
per-layer RoPE, partial rotary, interleaved layouts and NoPE layers need no table of families, and
what fits no candidate is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange

from kvedit.errors import UnsupportedModel
from kvedit.memory import RopeSpec
from kvedit.models.observe import PROBE_POSITIONS, LayerObservation
from kvedit.models.rope import turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RopeBuffer", "fit_rope", "moves_values", "rope_buffers"]

KNOWN_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True, eq=False)
class RopeBuffer:
    """Where a model keeps one set of inverse frequencies.

    Args:
        module: the module that owns the buffer.
        prefix: what stands before ``inv_freq`` in the buffer's name (a layer type, or nothing).
        kind: the RoPE type's name in transformers.
        switch: position from which the type changes frequencies, or None.
    """

    module: torch.nn.Module
    prefix: str
    kind: str
    switch: int | None

    def tensor(self) -> torch.Tensor:
        """Returns the buffer ``[pair]``."""
        found: torch.Tensor = getattr(self.module, f"{self.prefix}inv_freq")
        return found

    def spec(self, layout: Literal["half", "interleaved"] = "half") -> RopeSpec:
        """Returns the rotation by the frequencies that are in the buffer now."""
        values = self.tensor().detach().float().cpu()
        scaling = getattr(self.module, f"{self.prefix}attention_scaling", 1.0)
        return RopeSpec(self.kind, tuple(values.tolist()), float(scaling), layout, self.switch)


def rope_buffers(model: PreTrainedModel) -> list[RopeBuffer]:
    """Returns every set of inverse frequencies in the model.

    Raises:
        UnsupportedModel: if a RoPE type is unknown, or positions have several dimensions.
    """
    return [
        _describe(module, name.removesuffix("inv_freq"))
        for module in model.modules()
        for name, _ in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and "original" not in name
    ]


def _describe(module: torch.nn.Module, prefix: str) -> RopeBuffer:
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    layer_type = prefix.removesuffix("_")
    parameters = parameters.get(layer_type, parameters) if layer_type else parameters
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
    if kind not in KNOWN_KINDS:
        raise UnsupportedModel(f"RoPE type {kind!r}: expected one of {', '.join(KNOWN_KINDS)}")
    if parameters.get("mrope_section"):
        raise UnsupportedModel(
            "multimodal RoPE (mrope_section): positions with several dimensions are not supported"
        )
    return RopeBuffer(module, prefix, kind, _switch(kind, parameters, config))


def _switch(kind: str, parameters: dict[str, Any], config: Any) -> int | None:
    if kind not in ("dynamic", "longrope"):
        return None
    original = parameters.get("original_max_position_embeddings")
    if kind == "dynamic":
        # transformers starts to change frequencies past the configured maximum.
        return int(config.max_position_embeddings)
    return int(original or config.max_position_embeddings)


def moves_values(seen: LayerObservation) -> bool:
    """Whether the layer's values depend on the position: absolute embeddings in the input."""
    return _relative(seen.values, seen.values[:1]) > _tolerance(seen)


def fit_rope(index: int, seen: LayerObservation, buffers: list[RopeBuffer]) -> RopeFit | None:
    """Returns the rotation of a layer, or None if positions leave its keys alone (NoPE).

    Raises:
        UnsupportedModel: if keys move with the position in a way that no candidate explains.
    """
    tolerance = _tolerance(seen)
    if _relative(seen.keys, seen.keys[:1]) <= tolerance / 4:
        return None
    fits = sorted(_fits(seen, buffers), key=lambda fit: fit.error)
    if not fits or fits[0].error > tolerance:
        best = f"best candidate is off by {fits[0].error:.2g}" if fits else "no inv_freq buffer"
        raise UnsupportedModel(
            f"layer {index}: keys depend on the position, but by no rotation that this model's "
            f"frequencies explain ({best}, tolerance {tolerance:.2g})"
        )
    return fits[0]


@dataclass(frozen=True, eq=False)
class RopeFit:
    """A candidate and how far it is from what was seen.

    Args:
        spec: the rotation.
        buffer: where its frequencies live.
        error: relative error of the predicted keys.
    """

    spec: RopeSpec
    buffer: RopeBuffer
    error: float


def _fits(seen: LayerObservation, buffers: list[RopeBuffer]) -> Iterator[RopeFit]:
    positions = torch.tensor(PROBE_POSITIONS)
    first = seen.keys[0].to(torch.float64)
    start = rearrange(first.expand(len(positions), -1, -1), "slot head dim -> head slot dim")
    for buffer in buffers:
        for layout in ("half", "interleaved"):
            spec = buffer.spec(layout)
            if spec.rotated > first.shape[-1]:
                continue
            guess = rearrange(turn(start, spec, positions), "head slot dim -> slot head dim")
            yield RopeFit(spec, buffer, _relative(seen.keys.double(), guess))


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / found.norm().clamp_min(1e-30))


def _tolerance(seen: LayerObservation) -> float:
    # cos and sin are rounded to the compute dtype; two roundings of 2^-9 in bfloat16.
    epsilon = torch.finfo(seen.dtype).eps
    return 1e-4 if epsilon < 1e-5 else 4 * epsilon
