"""Compile: turn a memory's static attention bias into key deltas that any engine serves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvedit.editors.base import Editor, Reader
from kvedit.editors.compiling.certificate import Certificate
from kvedit.editors.compiling.directions import Normal, gather
from kvedit.editors.compiling.measuring import attention_logits, measure
from kvedit.editors.compiling.queries import QuerySample, reach
from kvedit.editors.compiling.softmax import Sets, group_bias, log_odds, refine
from kvedit.errors import InvalidArgument, NotCertified
from kvedit.memory import KVMemory, LayerKV

__all__ = ["FITS", "Compile", "certify"]

FITS = ("ridge", "distance", "balanced", "strength", "slot")
"""Ways to fit deltas; each adds something to the one before. The first three are linear."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ROUNDS = 4


@dataclass(frozen=True)
class Compile(Editor):
    """Turns bias into key deltas: no hook, no mask, the same shapes, plain keys and values.

    Adding d to a key adds ``scale * q . d`` to its logit for every later query q. Queries share a
    large common part, so one d per KV head acts as nearly the same bias on all of them. The memory
    is followed by an operand of kind ``"queries"``, which :func:`kvedit.calibrate` makes once per
    model. Query heads of a group share their keys: a bias that differs between them is met as well
    as one delta can, and the certificate says how well.

    The bias acts on queries after the memory, at distances up to ``horizon``. Deltas are linear in
    the bias with the first three fits: a second compile adds up with the first, and compiling
    the negated bias restores the keys up to rounding.

    Args:
        fit: ``"ridge"``: queries at the positions of the calibration's texts. ``"distance"``:
            queries at the positions that follow the memory. ``"balanced"``: besides, the bias is
            right on average in each kind of text and at each distance. ``"strength"``: refined
            towards the true softmax over this memory's keys, at the strength used. ``"slot"``: a
            delta of its own for every biased slot, weighted by the attention on it.
        horizon: positions after the memory at which the bias must hold.
        on_fail: ``"keep"`` leaves heads that fail the certificate with their run-time bias;
            ``"refuse"`` compiles nothing.
        storage: dtype (``"bfloat16"``, ``"float16"``, ``"float32"``) or codec (``"int8"``, …) in
            which the memory will be stored; the certificate counts its rounding. None: as it is.
        mean_tolerance: how far a head's mean bias per unit may be from what was asked for.
        spread_tolerance: how much it may vary over queries, as a standard deviation.
        ridge: regularisation, as a share of the mean eigenvalue of the queries' second moment.
        balance: weight of the mean queries in ``"balanced"`` and what builds on it.

    Raises:
        InvalidArgument: if a parameter is out of range, or the bias holds -inf.
        NotCertified: if heads fail and ``on_fail`` is ``"refuse"``.
        IncompatibleModel: if the queries are of another model.
    """

    rewrites: ClassVar[bool] = True
    operands: ClassVar[tuple[str, ...]] = ("queries",)

    fit: Literal["ridge", "distance", "balanced", "strength", "slot"] = "balanced"
    horizon: int = 1024
    on_fail: Literal["keep", "refuse"] = "keep"
    storage: str | None = None
    mean_tolerance: float = 0.10
    spread_tolerance: float = 0.25
    ridge: float = 1e-3
    balance: float = 1.0

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        from kvedit.store.codecs import CODECS

        if self.fit not in FITS:
            raise InvalidArgument(f"fit must be one of {', '.join(FITS)}, found {self.fit!r}")
        if self.on_fail not in ("keep", "refuse"):
            raise InvalidArgument(f"on_fail must be 'keep' or 'refuse', found {self.on_fail!r}")
        if self.storage is not None and self.storage not in (*_DTYPES, *CODECS):
            known = ", ".join((*_DTYPES, *CODECS))
            raise InvalidArgument(f"storage must be one of {known}, found {self.storage!r}")
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int) or self.horizon < 1:
            raise InvalidArgument(f"horizon must be a whole number from 1, found {self.horizon!r}")
        for name in ("mean_tolerance", "spread_tolerance", "ridge", "balance"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise InvalidArgument(f"{name} must be a finite number from 0, found {value!r}")

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with its bias in its keys."""
        memory, operand = memories
        compiled = _compile(memory, operand, self)
        if not compiled:
            return memory
        certificate = _certificate(memory, compiled, operand, self)
        failed = certificate.failed
        if failed and self.on_fail == "refuse":
            raise NotCertified(
                f"{len(failed)} KV heads fail the certificate (mean within {self.mean_tolerance:g} "
                f"of what was asked for, spread up to {self.spread_tolerance:g}); keep their bias "
                f"with on_fail='keep', or bias other heads:\n{certificate.complaint()}"
            )
        changed = {}
        for index, keys in compiled.items():
            kept = [head for layer, head in failed if layer == index]
            changed[index] = _merged(memory, index, keys, kept)
        return memory.with_layers(changed)


def certify(memory: KVMemory, queries: KVMemory, editor: Compile | None = None) -> Certificate:
    """Returns what compiling a memory's bias achieves on held-out queries; changes nothing.

    Args:
        memory: a memory with bias, before it is compiled.
        queries: the operand that :func:`kvedit.calibrate` made of its model.
        editor: how it will be compiled; None takes the defaults.

    Raises:
        InvalidArgument: if the bias holds -inf, or the operand is none of queries.
        IncompatibleModel: if the queries are of another model.
    """
    chosen = editor or Compile()
    return _certificate(memory, _compile(memory, queries, chosen), queries, chosen)


def _compile(memory: KVMemory, operand: KVMemory, editor: Compile) -> dict[int, torch.Tensor]:
    """Returns layer to compiled keys, in the memory's dtype, of the layers that have bias."""
    queries = QuerySample(operand)
    queries.check(memory)
    biased = {i: layer for i, layer in memory.layers.items() if _has_bias(i, layer)}
    return {i: _keys(memory, i, queries, editor) for i in biased}


def _has_bias(index: int, layer: LayerKV) -> bool:
    if layer.bias is None:
        return False
    if bool(layer.bias.isinf().any()):
        raise InvalidArgument(
            f"layer {index} has slots that are evicted (bias -inf): no key delta does that for "
            "every query. Drop them in all heads, or keep the memory uncompiled"
        )
    return bool(layer.bias.ne(0).any())


def _keys(memory: KVMemory, index: int, queries: QuerySample, editor: Compile) -> torch.Tensor:
    layer, spec = memory.layers[index], memory.model.layers[index]
    sample, bias = queries.layer(index, spec), group_bias(layer, spec.group)
    normal = gather(
        sample,
        memory.next_position,
        reach(memory, index, editor.horizon),
        editor.ridge,
        0.0 if editor.fit in ("ridge", "distance") else editor.balance,
        own=editor.fit == "ridge",
    )
    if editor.fit in ("strength", "slot"):
        deltas = _refined(memory, index, normal, bias, editor.fit)
    else:
        deltas = torch.einsum("kgs,kgd->ksd", bias, normal.directions())
    return (layer.keys.double().cpu() + deltas).to(layer.keys)


def _refined(
    memory: KVMemory, index: int, normal: Normal, bias: torch.Tensor, fit: str
) -> torch.Tensor:
    """Returns deltas ``[kv_head, slot, dim]`` fitted to the softmax over the memory's own keys."""
    layer, spec = memory.layers[index], memory.model.layers[index]
    visible = torch.ones(layer.slots, dtype=torch.bool)
    deltas = torch.zeros(layer.keys.shape, dtype=torch.float64)
    for head in bias.ne(0).flatten(1).any(dim=1).nonzero().flatten().tolist():
        sets = Sets.of(bias[head]) if fit == "strength" else Sets.each(bias[head])
        keys = layer.keys[head].detach().cpu()
        masses = sets.log_mass(attention_logits(normal.queries[head], keys, spec, visible))
        odds = log_odds(masses, sets.bias)
        rounds = _ROUNDS if fit == "strength" else 1
        deltas[head] = refine(normal, head, odds, sets, rounds)[sets.members]
    return deltas


def _certificate(
    memory: KVMemory, compiled: Mapping[int, torch.Tensor], operand: KVMemory, editor: Compile
) -> Certificate:
    stored = _stored(memory, compiled, editor.storage)
    heads = tuple(measure(memory, stored, QuerySample(operand), editor.horizon))
    storage = editor.storage or str(memory.dtype).removeprefix("torch.")
    return Certificate(
        heads, editor.fit, storage, float(editor.mean_tolerance), float(editor.spread_tolerance)
    )


def _stored(
    memory: KVMemory, compiled: Mapping[int, torch.Tensor], storage: str | None
) -> Mapping[int, torch.Tensor]:
    """Returns the compiled keys as they come back from storage."""
    from kvedit.store.codecs import approximate

    if storage is None or not compiled:
        return compiled
    if storage in _DTYPES:
        return {index: keys.to(_DTYPES[storage]) for index, keys in compiled.items()}
    layers = {i: dataclasses.replace(memory.layers[i], keys=k) for i, k in compiled.items()}
    rounded, _ = approximate(dataclasses.replace(memory, layers=layers), storage)
    return {index: rounded.layers[index].keys for index in compiled}


def _merged(memory: KVMemory, index: int, keys: torch.Tensor, kept: list[int]) -> LayerKV:
    """Returns a layer with compiled keys; ``kept`` KV heads stay as they were, bias included."""
    layer, group = memory.layers[index], memory.model.layers[index].group
    if not kept or layer.bias is None:
        return dataclasses.replace(layer, keys=keys, bias=None)
    stays = torch.zeros(layer.heads, dtype=torch.bool)
    stays[kept] = True
    stays = stays.to(keys.device)
    rows = stays.repeat_interleave(group).to(layer.bias.device)
    return dataclasses.replace(
        layer,
        keys=torch.where(stays[:, None, None], layer.keys, keys),
        bias=layer.bias.masked_fill(~rows[:, None], 0.0),
    )
