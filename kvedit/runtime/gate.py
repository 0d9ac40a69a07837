"""The compatibility gate: a memory meets the model that made it, or is refused with reasons."""

from __future__ import annotations

import dataclasses

import torch

from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import KVMemory, LayerSpec, ModelSpec
from kvedit.memory.rules import read_rules
from kvedit.runtime.ruling import check_rules

__all__ = ["admit"]


def admit(memory: KVMemory, spec: ModelSpec, dtype: torch.dtype, strict: bool = True) -> None:
    """Raises unless ``memory`` may be attached to the model of ``spec``.

    Args:
        memory: the memory.
        spec: the live model's facts.
        dtype: the model's compute dtype.
        strict: whether fingerprints, RoPE settings and a lossy dtype count; shapes always do.

    Raises:
        IncompatibleModel: with both values of everything that differs.
        InvalidArgument: if layers are missing, or a rule names a head or layer that is not there.
        UnsupportedModel: if the memory has a rule that this version does not know, or is an
            operand of editors.
        MutatedMemory: if its tensors were changed in place.
    """
    memory.check_unmodified()
    rules = read_rules(memory.rules)
    if not memory.complete:
        raise InvalidArgument(
            f"the memory has layers {list(memory.layers)} of {len(memory.model.layers)}; only a "
            "memory with all layers can be attached: capture without layers="
        )
    reasons = _shape_reasons(memory.model, spec)
    if strict:
        reasons += _identity_reasons(memory.model, spec) + _dtype_reasons(memory.dtype, dtype)
    if reasons:
        hint = "" if _shape_reasons(memory.model, spec) else "; strict=False attaches it anyway"
        raise IncompatibleModel(
            f"this memory of {memory.model.name} does not fit {spec.name}: "
            + "; ".join(reasons)
            + hint
        )
    check_rules(rules, spec)


def _shape_reasons(made: ModelSpec, live: ModelSpec) -> list[str]:
    if len(made.layers) != len(live.layers):
        return [f"layers: memory {len(made.layers)}, model {len(live.layers)}"]
    fields = ("query_heads", "kv_heads", "key_dim", "value_dim")
    for index, (a, b) in enumerate(zip(made.layers, live.layers, strict=True)):
        for field in fields:
            if getattr(a, field) != getattr(b, field):
                return [
                    f"layer {index} {field}: memory {getattr(a, field)}, model {getattr(b, field)}"
                ]
    return []


def _identity_reasons(made: ModelSpec, live: ModelSpec) -> list[str]:
    differences = made.fingerprint.differences(live.fingerprint)
    reasons = [
        f"{name} fingerprint: memory {a[:18] or 'none'}, model {b[:18] or 'none'}"
        for name, (a, b) in differences.items()
    ]
    weights = differences.get("weights")
    kinds = [part.split(":")[0] for part in weights or ()]
    if len(set(kinds)) > 1 and "config" not in differences:
        reasons.append(
            "one was fingerprinted by its files and one by its live tensors: load the model with "
            "kv.load both times"
        )
    if made.layers and len(made.layers) == len(live.layers):
        reasons += _rope_reasons(made, live)
    return reasons


def _rope_reasons(made: ModelSpec, live: ModelSpec) -> list[str]:
    for index, (a, b) in enumerate(zip(made.layers, live.layers, strict=True)):
        if _fixed(a) != _fixed(b):
            names = ("rope", "window", "scale", "softcap", "sinks", "kind")
            name = next(name for name in names if getattr(a, name) != getattr(b, name))
            return [f"layer {index} {name}: memory {getattr(a, name)}, model {getattr(b, name)}"]
    return []


def _fixed(layer: LayerSpec) -> LayerSpec:
    # Frequencies of a type that changes with length are checked against positions instead.
    if layer.rope is None or layer.rope.switch is None:
        return layer
    return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, inv_freq=()))


def _dtype_reasons(memory: torch.dtype, model: torch.dtype) -> list[str]:
    if memory == model or torch.promote_types(memory, model) == model:
        return []
    return [f"dtype: memory {memory}, model computes {model}; memory.to(dtype={model}) rounds it"]
