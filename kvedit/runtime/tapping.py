"""kv.tap: see (or replace) what passes through attention, layer by layer, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace as changed
from typing import TYPE_CHECKING

import torch
from einops import rearrange

from kvedit.errors import InvalidArgument, ShapeMismatch, UnknownName
from kvedit.memory import Span
from kvedit.models.attention_call import AttentionCall, Output
from kvedit.models.explicit import attention_scores, attention_weights, weighted_values
from kvedit.models.inspection import Inspection, inspect
from kvedit.models.rope import unrotate
from kvedit.models.route import MARK, observing, routed
from kvedit.runtime.places import Places, hidden_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SITES", "Tap", "tap"]

Replacement = Callable[[int, torch.Tensor], torch.Tensor]

SITES: Mapping[str, str] = {
    "queries": "[batch, query_head, query, dim] after RoPE",
    "keys": "[batch, head, slot, dim] after RoPE, memory and new tokens",
    "values": "[batch, head, slot, dim]",
    "queries_pre": "[batch, query_head, query, dim] before RoPE",
    "keys_pre": "[batch, head, slot, dim] before RoPE",
    "scores": "[batch, query_head, query, slot] float32 logits; -inf where unseen",
    "pattern": "[batch, query_head, query, slot] float32 weights",
    "received": "[batch, query_head, slot] float32, weights summed over queries (padding left out)",
    "mass": "[group, batch, query_head, query] float32, weight on each group of slots",
    "output": "[batch, query, query_head, dim] before the output projection",
    "hidden": "[batch, query, hidden] what the layer's block hands on",
}
"""Sites that can be tapped, with the axes of their tensors."""

REPLACEABLE = ("queries", "keys", "values", "scores", "pattern", "output", "hidden")
_WEIGHT_SITES = {"scores", "pattern", "received", "mass"}


class Tap:
    """Records of a :func:`tap`: ``tap["keys", 3]`` is layer 3's last tensor.

    Tensors are clones: they stay as they were when later passes go on.

    Args:
        inspection: the tapped model's facts.
        sites: what to record.
        layers: layers to record and replace in.
        replacements: site to function.
        groups: name to span or bool mask ``[slot]``, for ``mass``.
    """

    def __init__(
        self,
        inspection: Inspection,
        sites: Sequence[str],
        layers: Sequence[int],
        replacements: Mapping[str, Replacement],
        groups: Mapping[str, Span | torch.Tensor],
    ) -> None:
        """Prepares empty records."""
        self.inspection, self.sites, self.layers = inspection, tuple(sites), tuple(layers)
        self.groups = dict(groups)
        self.places = Places()
        self._replacements = dict(replacements)
        self._records: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._modules = {id(inspection.attention[layer]): layer for layer in layers}

    def __getitem__(self, key: tuple[str, int]) -> torch.Tensor:
        """Returns the last tensor of ``(site, layer)``; negative layers count from the end."""
        return self.all(*key)[-1]

    def all(self, site: str, layer: int) -> list[torch.Tensor]:
        """Returns the tensors of all forward passes, oldest first.

        Raises:
            UnknownName: if that site and layer was not tapped, or no pass has run.
        """
        index = layer + len(self.inspection.spec.layers) if layer < 0 else layer
        if (site, index) not in self._records:
            known = [f"{name}, {number}" for name, number in self._records]
            raise UnknownName("record", f"{site}, {index}", known)
        return self._records[site, index]

    def __repr__(self) -> str:
        """Sites, layers and how often each was seen."""
        passes = max(map(len, self._records.values()), default=0)
        return f"Tap(sites={self.sites}, layers={self.layers}, passes={passes})"

    def keep(self, site: str, layer: int, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces ``tensor`` if asked to, records what goes on, and returns it."""
        swap = self._replacements.get(site)
        if swap is not None:
            given = tensor
            tensor = swap(layer, given.clone())
            if not isinstance(tensor, torch.Tensor) or tensor.shape != given.shape:
                found = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor)
                raise ShapeMismatch(
                    f"replacement of {site} in layer {layer}: expected shape {list(given.shape)}, "
                    f"found {found}"
                )
        if site in self.sites:
            self._records.setdefault((site, layer), []).append(tensor.detach().clone())
        return tensor

    def around(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        """Looks at one attention call; see :class:`~kvedit.models.attention_call.Observer`."""
        layer = self._modules.get(id(call.module))
        if layer is None:
            return run(call)
        call = self._inputs(call, layer)
        self._before_rope(call, layer)
        output = self._weights(call, layer)
        if output is None:
            output, weights = run(call)
        else:
            weights = None
        return self.keep("output", layer, output), weights

    def _inputs(self, call: AttentionCall, layer: int) -> AttentionCall:
        return changed(
            call,
            query=self.keep("queries", layer, call.query),
            key=self._marked(call, self.keep("keys", layer, call.key)),
            value=self.keep("values", layer, call.value),
        )

    def _marked(self, call: AttentionCall, key: torch.Tensor) -> torch.Tensor:
        cache = getattr(call.key, MARK, None)
        if cache is not None and key is not call.key:
            setattr(key, MARK, cache)
        return key

    def _before_rope(self, call: AttentionCall, layer: int) -> None:
        if not {"queries_pre", "keys_pre"} & set(self.sites):
            return
        rope = self.inspection.spec_now().layers[layer].rope
        for site, states, positions in (
            ("queries_pre", call.query, self.places.queries(call)),
            ("keys_pre", call.key, self.places.slots(call)),
        ):
            if site in self.sites:
                rows = [unrotate(x, rope, at) for x, at in zip(states, positions, strict=True)]
                self.keep(site, layer, torch.stack(rows))

    def _weights(self, call: AttentionCall, layer: int) -> torch.Tensor | None:
        """Records what needs attention weights; returns an output if weights were replaced."""
        swaps = {"scores", "pattern"} & set(self._replacements)
        if not swaps and not _WEIGHT_SITES & set(self.sites):
            return None
        scores = self.keep("scores", layer, attention_scores(call))
        pattern = self.keep("pattern", layer, attention_weights(call, scores))
        if "received" in self.sites:
            real = self.places.valid(call)[:, None, :, None]
            received = pattern.masked_fill(~real, 0).sum(dim=2)
            self.keep("received", layer, received)
        if "mass" in self.sites:
            self.keep("mass", layer, self._mass(call, pattern))
        return weighted_values(call, pattern) if swaps else None

    def _mass(self, call: AttentionCall, pattern: torch.Tensor) -> torch.Tensor:
        source = self.places.source(call)
        masses = []
        for name, group in self.groups.items():
            inside = group.inside(source) if isinstance(group, Span) else group.to(source.device)
            if inside.shape[-1] > pattern.shape[-1]:
                raise ShapeMismatch(
                    f"group {name!r}: {inside.shape[-1]} slots, attention sees {pattern.shape[-1]}"
                )
            inside = torch.nn.functional.pad(inside, (0, pattern.shape[-1] - inside.shape[-1]))
            members = rearrange(inside.expand(pattern.shape[0], -1), "batch slot -> batch 1 1 slot")
            masses.append(pattern.masked_fill(~members, 0).sum(dim=-1))
        return torch.stack(masses)


@contextmanager
def tap(
    model: PreTrainedModel,
    sites: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    *,
    replace: Mapping[str, Replacement] | None = None,
    groups: Mapping[str, Span | torch.Tensor] | None = None,
) -> Iterator[Tap]:
    """Records, and replaces, what passes through a model's attention within the block.

    Works on plain calls of the model and in sessions. On any backend that can be routed; weights
    are computed beside the backend's own, so a read-only tap does not change its output.

    Args:
        model: the model.
        sites: names of :data:`SITES`.
        layers: layers; negative numbers count from the end. None means all.
        replace: site to ``fn(layer, tensor) -> tensor`` of the same shape. Keys and values are
            replaced as this call reads them; the cache keeps its own.
        groups: spans or bool masks ``[slot]``, for the site ``mass``.

    Yields:
        The tap; its records stay when the block ends.

    Raises:
        UnknownName: if a site or layer does not exist.
        InvalidArgument: if ``mass`` is asked for without groups, or nothing is asked for.
        UnsupportedModel: if the model's attention can't be reached.
    """
    swaps, wanted = dict(replace or {}), dict(groups or {})
    names = [sites] if isinstance(sites, str) else list(sites)
    for name in names:
        if name not in SITES:
            raise UnknownName("site", name, SITES)
    for name in swaps:
        if name not in REPLACEABLE:
            raise UnknownName("replaceable site", name, REPLACEABLE)
    if not names and not swaps:
        raise InvalidArgument(f"tap what? Sites are {', '.join(SITES)}")
    if "mass" in names and not wanted:
        raise InvalidArgument("the site 'mass' needs groups={name: span or bool mask}")
    found = inspect(model)
    tapped = Tap(found, names, _layers(found, layers), swaps, wanted)
    with ExitStack() as stack:
        stack.enter_context(routed(model))
        stack.enter_context(tapped.places.watching(model))
        stack.enter_context(observing(tapped))
        if "hidden" in names or "hidden" in swaps:
            stack.enter_context(hidden_hooks(model, tapped))
        yield tapped


def _layers(found: Inspection, layers: Sequence[int] | None) -> list[int]:
    total = len(found.spec.layers)
    wanted = range(total) if layers is None else layers
    indices = [index + total if index < 0 else index for index in wanted]
    for index in indices:
        if not 0 <= index < total:
            raise UnknownName("layer", str(index), map(str, range(total)))
    return indices
