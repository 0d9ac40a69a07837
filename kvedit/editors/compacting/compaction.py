"""Compaction: the base of editors that keep some slots of every head as they are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kvedit.editors.base import Editor, Reader
from kvedit.editors.compacting.budget import as_budget, as_count, slots_kept
from kvedit.editors.compacting.candidates import (
    Candidates,
    alive_slots,
    fixed_slots,
    slot_order,
    top_slots,
)
from kvedit.editors.compacting.layout import Layout, lay_out
from kvedit.editors.compacting.rerotation import check_rotatable, rerotate
from kvedit.editors.target import as_indices
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Compaction", "HeadChoice"]

HeadChoice = Literal["each", "shared"]


@dataclass(frozen=True)
class Compaction(Editor):
    """Keeps, in every head, the slots that a method scores highest; keys and values stay exact.

    A subclass says what a slot is worth (:meth:`scores`). Slots that an earlier edit evicted for
    a head (bias -inf) are never chosen for it again.

    Args:
        budget: slots that each KV head keeps: a ratio in (0, 1] of those it has, or a number.
        sinks: first slots of each head, kept whatever their score.
        recent: last slots of each head, kept likewise.
        layers: layers to compact, negative from the end. None means all that have no window:
            sliding and chunked layers see no more than their window anyway. One that is named
            chooses among the slots that the next token can still see.
        heads: ``"each"``: every KV head chooses its own; ``"shared"``: all heads of a layer keep
            the same, by the mean of their scores.
        layout: how heads that keep different slots are held: ``"masked"`` or ``"packed"``, see
            :mod:`kvedit.editors.compacting.layout`.
        rerotate: whether what is kept moves to positions 0, 1, 2, … by each layer's own RoPE, and
            ``next_position`` behind it. Masked, a layer counts the union of its heads' slots.

    Raises:
        InvalidArgument: if a parameter is out of range, the budget is larger than the memory, or
            smaller than what is kept in any case, or a layer can't be packed.
        UnsupportedModel: if ``rerotate`` meets learned absolute positions.
        ContextTooLong: if ``rerotate`` meets a RoPE that changes its frequencies on the way.
    """

    head_choices: ClassVar[tuple[HeadChoice, ...]] = ("each", "shared")

    budget: int | float
    sinks: int = 0
    recent: int = 0
    layers: tuple[int, ...] | None = None
    heads: HeadChoice = "each"
    layout: Layout = "masked"
    rerotate: bool = False

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        as_budget(self.budget)
        as_count("sinks", self.sinks)
        as_count("recent", self.recent)
        object.__setattr__(self, "layers", as_indices("layers", self.layers))
        if self.heads not in self.head_choices:
            raise InvalidArgument(
                f"{type(self).__name__}: heads must be one of {list(self.head_choices)}, found "
                f"{self.heads!r}"
            )
        if self.layout not in ("masked", "packed"):
            raise InvalidArgument(f"layout must be 'masked' or 'packed', found {self.layout!r}")
        if not isinstance(self.rerotate, bool):
            raise InvalidArgument(f"rerotate must be true or false, found {self.rerotate!r}")

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """Whether keys move, or stand beside those of other tokens."""
        return self.rerotate or self.layout == "packed"

    @abstractmethod
    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns what slots are worth, layer to ``[kv_head, slot]``, or ``[1, slot]`` for all.

        Args:
            memory: the memory.
            layers: layers that lose slots.
            reader: the model, for methods that read with it.
        """

    def held(self, memory: KVMemory, index: int) -> torch.Tensor | None:
        """Returns slots that the method keeps whatever their score, bool ``[slot]``, or None."""
        return None

    def merged(self, scores: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
        """Returns one score per slot ``[1, slot]``: the mean over the KV heads that have it."""
        total = scores.masked_fill(~alive, 0).sum(dim=0, keepdim=True)
        return total / alive.sum(dim=0, keepdim=True).clamp_min(1)

    def choose(
        self, scores: Mapping[int, torch.Tensor], places: Mapping[int, Candidates]
    ) -> dict[int, torch.Tensor]:
        """Returns the slots that are kept, layer to bool ``[head, slot]``."""
        return {index: top_slots(found, places[index]) for index, found in scores.items()}

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory with the kept slots."""
        memory = memories[0]
        if self.rerotate:
            check_rotatable(memory)
        kept = self.select(memory, reader)
        laid = {index: lay_out(memory, index, mask, self.layout) for index, mask in kept.items()}
        if self.rerotate:
            return rerotate(memory, laid)
        return memory.with_layers({index: found.layer for index, found in laid.items()})

    def select(self, memory: KVMemory, reader: Reader | None = None) -> dict[int, torch.Tensor]:
        """Returns what is kept in the layers that lose slots, bool ``[kv_head, slot]`` each.

        Layers that lose nothing are left out; so are those that are not compacted.
        """
        alive = {index: alive_slots(memory, index) for index in self._chosen(memory)}
        self._check_budget(alive)
        places = {index: self._candidates(memory, index, held) for index, held in alive.items()}
        places = {index: place for index, place in places.items() if not place.full}
        if not places:
            return {}
        scores = dict(self.scores(memory, list(places), reader))
        if self.heads == "shared":
            for index, found in scores.items():
                if found.shape[0] > 1:
                    scores[index] = self.merged(found, alive[index])
        return {
            index: mask.expand(alive[index].shape[0], -1)
            for index, mask in self.choose(scores, places).items()
        }

    def _chosen(self, memory: KVMemory) -> list[int]:
        if self.layers is not None:
            return memory.layer_indices(self.layers)
        full = [i for i in memory.layers if memory.model.layers[i].window is None]
        if not full:
            raise InvalidArgument(
                "every layer of this memory attends within a window, and needs no more than that: "
                "name layers=, or capture with window='windowed'"
            )
        return full

    def _check_budget(self, alive: Mapping[int, torch.Tensor]) -> None:
        most = max((int(held.sum(dim=1).max()) for held in alive.values()), default=0)
        if isinstance(self.budget, int) and self.budget > most:
            raise InvalidArgument(
                f"a budget of {self.budget} slots per KV head, and the memory has {most} in its "
                f"fullest: give {most} or fewer, or a ratio in (0, 1]"
            )

    def _candidates(self, memory: KVMemory, index: int, alive: torch.Tensor) -> Candidates:
        if self.heads == "shared":
            alive = alive.any(dim=0, keepdim=True)
        counts = slots_kept(self.budget, alive.sum(dim=1))
        fixed = fixed_slots(alive, slot_order(memory.layers[index]), self.sinks, self.recent)
        held = self.held(memory, index)
        if held is not None:
            fixed = fixed | (alive & held.to(alive.device))
        found = Candidates(alive, fixed, counts)
        if not found.full and bool((fixed.sum(dim=1) > counts).any()):
            raise InvalidArgument(
                f"layer {index}: {int(fixed.sum(dim=1).max())} slots are kept in any case "
                f"({self._kept_anyway()}), above the budget of {int(counts.min())}: lower them or "
                "raise the budget"
            )
        return found

    def _kept_anyway(self) -> str:
        return f"sinks={self.sinks}, recent={self.recent}"
