"""The bias, in nats, that an edit of keys amounts to on queries that meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, repeat

from kvedit.editors.base import Reader
from kvedit.editors.seka.projectors import require_same_model
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory, LayerSpec

__all__ = ["BiasReport", "effective_bias"]


@dataclass(frozen=True, eq=False)
class BiasReport:
    """Change of attention logits on edited slots, in nats, over queries and slots.

    A static bias has spread 0. An edit of keys is a bias that depends on the query: the mean says
    how strong it is, the spread how far it is from a bias.

    Args:
        mean: layer to ``[query_head]`` float64.
        spread: layer to ``[query_head]``, the standard deviation.
        lowest: layer to ``[query_head]``.
        highest: layer to ``[query_head]``.
        samples: layer to the number of pairs of query and slot behind each figure.
    """

    mean: Mapping[int, torch.Tensor]
    spread: Mapping[int, torch.Tensor]
    lowest: Mapping[int, torch.Tensor]
    highest: Mapping[int, torch.Tensor]
    samples: Mapping[int, int]

    def summary(self) -> dict[str, float]:
        """Returns figures over all query heads of the edited layers, in nats."""
        means = torch.cat(list(self.mean.values()))
        spreads = torch.cat(list(self.spread.values()))
        return {
            "heads": float(len(means)),
            "mean": float(means.mean()),
            "mean_lowest_head": float(means.min()),
            "mean_highest_head": float(means.max()),
            "spread": float(spreads.mean()),
        }


def effective_bias(
    before: KVMemory, after: KVMemory, reader: Reader, prompts: Sequence[str]
) -> BiasReport:
    """Returns the logit change of the slots whose keys an edit changed, per query head.

    Queries are those of every token of the prompts, read over ``before``; a pair counts where the
    layer's window lets the query see the slot. Logits are taken with the layer's scale and cap.
    Works for any edit that changes keys and moves no slot: SEKA, or a bias compiled into keys.

    Args:
        before: the memory.
        after: what an edit made of it.
        reader: the model.
        prompts: texts that follow the memory.

    Raises:
        InvalidArgument: if slots differ, no key differs, no query sees a changed slot, or there is
            no prompt.
        IncompatibleModel: if the memories are of two models.
    """
    require_same_model(before, after)
    changed = _changed_slots(before, after)
    if not prompts or not changed:
        raise InvalidArgument(
            f"expected prompts and changed keys, found {len(prompts)} prompts and changed keys in "
            f"{len(changed)} layers"
        )
    found: dict[int, list[torch.Tensor]] = {index: [] for index in changed}
    for prompt in prompts:
        tokens = reader.encode(prompt)
        queries = reader.read(before, tokens, ("queries",))["queries"]
        at = before.next_position + torch.arange(len(tokens))
        for index, slots in changed.items():
            layers = before.layers[index], after.layers[index]
            keys = [layer.keys[:, slots].cpu().double() for layer in layers]
            positions = layers[0].positions[slots].cpu()
            spec = before.model.layers[index]
            old, new = (_logits(queries[index][0].cpu().double(), k, spec) for k in keys)
            seen = _seen(at, positions, spec)
            found[index].append((new - old)[:, seen])
    return _report({index: torch.cat(parts, dim=1) for index, parts in found.items()})


def _changed_slots(before: KVMemory, after: KVMemory) -> dict[int, torch.Tensor]:
    slots = {}
    for index, old in before.layers.items():
        new = after.layers.get(index)
        if new is None or not torch.equal(old.positions, new.positions):
            raise InvalidArgument(
                f"layer {index}: expected the same slots before and after the edit"
            )
        differs = (old.keys != new.keys).flatten(2).any(dim=2).any(dim=0)
        if bool(differs.any()):
            slots[index] = differs.nonzero().squeeze(1)
    return slots


def _logits(queries: torch.Tensor, keys: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    shared = repeat(keys, "kv_head slot dim -> (kv_head group) slot dim", group=spec.group)
    products = einsum(
        queries, shared, "query_head query dim, query_head slot dim -> query_head query slot"
    )
    logits = spec.scale * products
    if spec.softcap is None:
        return logits
    return spec.softcap * torch.tanh(logits / spec.softcap)


def _seen(queries: torch.Tensor, slots: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """Returns bool ``[query, slot]``: which slots the layer's window lets a query see."""
    later, earlier = queries[:, None], slots[None, :]
    if spec.window is None:
        return torch.ones(len(queries), len(slots), dtype=torch.bool)
    if spec.kind == "chunked":
        return later // spec.window == earlier // spec.window
    return later - earlier < spec.window


def _report(found: Mapping[int, torch.Tensor]) -> BiasReport:
    kept = {index: values for index, values in found.items() if values.shape[1]}
    if not kept:
        raise InvalidArgument("no query of the prompts sees a changed slot: they are out of reach")
    return BiasReport(
        mean={index: values.mean(dim=1) for index, values in kept.items()},
        spread={index: values.std(dim=1, correction=0) for index, values in kept.items()},
        lowest={index: values.amin(dim=1) for index, values in kept.items()},
        highest={index: values.amax(dim=1) for index, values in kept.items()},
        samples={index: values.shape[1] for index, values in kept.items()},
    )
