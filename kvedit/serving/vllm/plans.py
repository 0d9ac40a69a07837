"""What the scheduler tells the worker in one step: which slots to load where, whom to refuse."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Load", "Plans"]


@dataclass(frozen=True)
class Load:
    """Slots of one memory for the pages of one request.

    Args:
        memory: record digest.
        slots: slots that the memory has.
        start: first slot to load; those before it are in the engine's prefix cache.
        blocks: the request's pages in order.
    """

    memory: str
    slots: int
    start: int
    blocks: tuple[int, ...]

    def places(self, page: int) -> torch.Tensor:
        """Returns where the slots go, ``[slot]`` int64, for pages of ``page`` tokens."""
        slots = torch.arange(self.start, self.slots)
        return torch.tensor(self.blocks)[slots // page] * page + slots % page

    def touched(self, page: int) -> set[int]:
        """Returns the pages that get slots."""
        return set(self.blocks[self.start // page : -(-self.slots // page)])


@dataclass(frozen=True)
class Plans:
    """Everything of one step.

    Args:
        loads: what to load before the step runs.
        refused: requests that are to end with an error.
    """

    loads: tuple[Load, ...] = ()
    refused: tuple[str, ...] = ()
