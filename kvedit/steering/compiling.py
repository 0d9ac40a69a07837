"""compile_residual: values (and keys) of stored slots that do what a residual vector would.

A vector r in the residual stream acts on every later token alike. A stored slot acts on a token as
far as the token attends to it: with ``a_h(q)`` the attention of query head h on the chosen slots,
a change ``d_g`` of their values in KV head g adds ``sum_h a_h(q) W_h d_g(h)`` to what attention
returns, W being the output projection. That is linear in d, so the best d is a least squares over
reference queries. Two things keep it from being r: heads that share a KV head can't be told apart
(its columns span less than the stream), and a_h(q) differs from token to token. The fidelity says
how much of either.

To first order a change s_g of keys before RoPE adds
``sum_h W_h sum_j A_h(q,j) scale (q R(p_j) s_g) (v_j - o_h(q))``, and is fitted along if asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kvedit.editors.base import Reader
from kvedit.editors.steering.edit import Steer
from kvedit.editors.steering.slots import At, as_at, slot_masks
from kvedit.editors.target import as_number
from kvedit.errors import InvalidArgument, UnsupportedModel
from kvedit.memory import Delta, KVMemory, Lineage, LineageNode
from kvedit.steering.fitting import (
    LayerFidelity,
    LayerFit,
    Seen,
    fidelity_of,
    solve,
    unfolded,
)
from kvedit.steering.projecting import output_maps

__all__ = ["Compiled", "LayerFidelity", "compile_residual"]

_READS = ("pattern", "queries", "output")


@dataclass(frozen=True, eq=False)
class Compiled:
    """A residual vector as keys and values.

    Args:
        delta: what :class:`kvedit.editors.Steer` adds at ``at``, with strengths of 1.
        at: the slots that it was fitted for.
        fidelity: by layer that was changed, on held-out queries.
        left: what is missing in the end: how far the last layer's hidden states are from those
            under the vector itself, over how far these are from unsteered ones; held-out prompts,
            all layers together. 0 is the vector, 1 no nearer than doing nothing.
    """

    delta: Delta
    at: At
    fidelity: tuple[LayerFidelity, ...]
    left: float

    @property
    def explained(self) -> float:
        """Mean of all layers' explained share."""
        return sum(each.explained for each in self.fidelity) / len(self.fidelity)


def compile_residual(
    reader: Reader,
    memory: KVMemory,
    delta: Delta,
    prompts: Sequence[str | torch.Tensor],
    *,
    strength: float = 1.0,
    at: At = "all",
    into: Literal["next", "same"] = "next",
    keys: bool = False,
    ridge: float = 1e-3,
) -> Compiled:
    """Returns the change of stored slots that is nearest to adding residual vectors later on.

    One change per layer and KV head, the same at all chosen slots (keys turned to their
    positions): a delta as any other, which :class:`kvedit.editors.Steer` adds with strengths of 1.
    Read ``fidelity`` and ``left`` before use: the fit is always the best there is, and often not
    good. Where a norm follows attention (Gemma 2 and 3, OLMo 2), it is fitted before that norm.

    Args:
        reader: the model.
        memory: the memory whose slots are changed.
        delta: residual or attention vectors, in the layers to compile.
        prompts: texts or ids that follow the memory, whose queries are the reference. Every fourth
            is held out, the last one at least.
        strength: c, with sign.
        at: slots to change, as :class:`~kvedit.editors.Steer` takes them.
        into: ``"next"``: a layer's residual vector is what the next layer's attention should
            return, which its MLP and all that follows then see. ``"same"``: the layer's own
            attention, which is exact where MLP and attention stand side by side (GPT-NeoX), and
            else lets the layer's MLP see the vector, too. The last layer, and attention vectors,
            have no next.
        keys: whether keys are fitted as well, to first order.
        ridge: share of the normal matrix's mean eigenvalue that is added to its diagonal.

    Raises:
        InvalidArgument: for a delta without such vectors, or fewer than two prompts.
        SpanNotFound: if no layer holds a chosen slot.
        IncompatibleModel: if another model made the delta.
        UnsupportedModel: if attention's output is not linear in its heads, or keys are to be
            fitted in a layer with a logit cap.
    """
    delta.require_same_model(memory.model)
    site = next((s for s in ("residual", "attention") if s in delta.sites), None)
    if site is None:
        raise InvalidArgument(
            "this delta has no residual or attention vectors to compile; its keys and values can "
            "be added as they are, by kv.editors.Steer"
        )
    if len(prompts) < 2:
        raise InvalidArgument(f"expected two prompts or more, one held out; found {len(prompts)}")
    if into not in ("next", "same"):
        raise InvalidArgument(f"into must be 'next' or 'same', found {into!r}")
    c, share, chosen = as_number("strength", strength), as_number("ridge", ridge, 0.0), as_at(at)
    targets = _targets(delta.vectors[site], c, into if site == "residual" else "same", memory)
    masks = slot_masks(memory, chosen, targets)
    maps = output_maps(reader, memory.model, list(masks))
    fits = {i: _fit(memory, i, mask, maps[i], targets[i], keys) for i, mask in masks.items()}
    tokens = [reader.encode(p) if isinstance(p, str) else torch.as_tensor(p) for p in prompts]
    held = [n for n in range(len(tokens)) if n % 4 == 3 or n == len(tokens) - 1]
    reads = [_read(reader, memory, ids, list(fits)) for ids in tokens]
    vectors: dict[str, dict[int, torch.Tensor]] = {}
    fidelity = []
    for layer, fit in fits.items():
        fitted = [read[layer] for n, read in enumerate(reads) if n not in held]
        solution = solve((fit.design(*one) for one in fitted), fit.target, share)
        for name, vector in unfolded(solution, fit.spec, keys).items():
            vectors.setdefault(name, {})[layer] = vector.float()
        fidelity.append(fidelity_of(layer, fit, solution, [reads[n][layer] for n in held]))
    facts = {"compiled": delta.digest, "strength": c, "at": str(chosen), "ridge": share}
    inputs = tuple(m.lineage.head.id if m.lineage.head else m.digest for m in (delta, memory))
    node = LineageNode.make(
        "delta", "compile_residual", {**facts, "into": into, "keys": keys}, inputs
    )
    lineage = Lineage.join([delta.lineage, memory.lineage], node)
    made = Delta(vectors, delta.model, {**delta.facts, **facts}, lineage)
    edited = Steer(keys=float(keys), values=1.0, at=chosen)(memory, made.operand())
    left = _left(reader, memory, edited, delta.vectors[site], c, site, [tokens[n] for n in held])
    return Compiled(made, chosen, tuple(fidelity), left)


def _targets(
    vectors: Mapping[int, torch.Tensor], strength: float, into: str, memory: KVMemory
) -> dict[int, torch.Tensor]:
    """Returns layer to what its attention should return; vectors that meet in a layer add up."""
    last, targets = len(memory.model.layers) - 1, dict[int, torch.Tensor]()
    for layer, vector in vectors.items():
        place = min(layer + 1, last) if into == "next" else layer
        targets[place] = targets.get(place, 0.0) + strength * vector
    return targets


def _left(
    reader: Reader, memory: KVMemory, edited: KVMemory, vectors: Mapping[int, torch.Tensor],
    strength: float, site: str, held: Sequence[torch.Tensor],
) -> float:  # fmt: skip
    """Returns how far compiled hidden states are from steered ones, over the vector's effect."""
    if site == "attention":
        return math.nan
    last = len(memory.model.layers) - 1

    def hook(layer: int, states: torch.Tensor) -> torch.Tensor:
        vector = vectors.get(layer)
        return states if vector is None else states + (strength * vector).to(states)

    missing, effect = 0.0, 0.0
    for ids in held:
        plain = reader.read(memory, ids, ("hidden",))["hidden"][last].double()
        aim = reader.read(memory, ids, ("hidden",), {"hidden": hook})["hidden"][last].double()
        got = reader.read(edited, ids, ("hidden",))["hidden"][last].double()
        missing += float((got - aim).square().sum())
        effect += float((aim - plain).square().sum())
    return math.sqrt(missing / effect) if effect else math.nan


def _fit(
    memory: KVMemory, layer: int, mask: torch.Tensor, projection: torch.Tensor,
    target: torch.Tensor, keys: bool,
) -> LayerFit:  # fmt: skip
    held, slots = memory.layers[layer], mask.nonzero().squeeze(1)
    if target.shape[0] != projection.shape[0]:
        raise InvalidArgument(
            f"the delta's vectors have {target.shape[0]} dims, attention returns "
            f"{projection.shape[0]}"
        )
    if keys and memory.model.layers[layer].softcap is not None:
        raise UnsupportedModel(
            f"layer {layer} caps its logits, by which a key acts less the larger its logit is: fit "
            "values alone (keys=False)"
        )
    return LayerFit(
        memory.model.layers[layer],
        held.values[:, slots.to(held.values.device)].double().cpu(),
        held.positions.cpu()[slots],
        slots,
        projection,
        target.double(),
        keys,
    )


def _read(
    reader: Reader, memory: KVMemory, tokens: torch.Tensor, layers: Sequence[int]
) -> dict[int, Seen]:
    seen = reader.read(memory, tokens, _READS)
    found = {}
    for layer in layers:
        held = memory.layers[layer].slots
        pattern, queries, output = (seen[site][layer][0].cpu() for site in _READS)
        found[layer] = (pattern[..., :held], queries, output)
    return found
