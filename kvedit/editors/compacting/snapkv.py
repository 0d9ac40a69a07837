"""SnapKV: slots that the end of the context attends to (Li et al. 2024, arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch.nn.functional import avg_pool1d, max_pool1d

from kvedit.editors.base import Reader
from kvedit.editors.compacting.budget import as_count
from kvedit.editors.compacting.compaction import Compaction
from kvedit.editors.compacting.observing import (
    check_prompt,
    observe_last,
    observe_prompt,
    observing_slots,
)
from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["SnapKV"]

_POOLS: Mapping[str, Callable[..., torch.Tensor]] = {"average": avg_pool1d, "max": max_pool1d}


@dataclass(frozen=True)
class SnapKV(Compaction):
    """Keeps the observation window, and the slots before it that it attends to most.

    Weights of the window's queries on earlier slots are averaged over the window and pooled along
    the slots, so that what stands around a peak comes with it; a KV head's score is the mean over
    its query heads. The window is part of the budget. Other parameters are those of
    :class:`Compaction`.

    Args:
        window: last tokens that observe, from 1.
        kernel: slots that are pooled, an odd number; 1 pools nothing.
        pooling: ``"average"`` (zeros beyond the ends count) or ``"max"``.
        prompt: a text whose last ``window`` tokens observe instead (query-aware); no token of the
            memory is then kept for being an observer.

    Raises:
        InvalidArgument: if a parameter is out of range, or the memory's last tokens can't be read
            again.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    window: int = 32
    kernel: int = 5
    pooling: Literal["average", "max"] = "average"
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Checks ranges."""
        super().__post_init__()
        as_count("window", self.window, 1)
        if as_count("kernel", self.kernel, 1) % 2 == 0:
            raise InvalidArgument(f"kernel: expected an odd number, found {self.kernel}")
        if self.pooling not in _POOLS:
            raise InvalidArgument(f"pooling must be one of {list(_POOLS)}, found {self.pooling!r}")
        check_prompt(self.prompt)

    def held(self, memory: KVMemory, index: int) -> torch.Tensor | None:
        """Returns the window's own slots."""
        if self.prompt is not None:
            return None
        return observing_slots(memory, memory.layers[index], self.window)

    def scores(
        self, memory: KVMemory, layers: list[int], reader: Reader | None
    ) -> Mapping[int, torch.Tensor]:
        """Returns the window's pooled attention; its own slots get none."""
        if reader is None:
            raise InvalidArgument("SnapKV reads with the model: pass reader=")
        if self.prompt is None:
            seen = observe_last(memory, layers, reader, self.window)
        else:
            seen = observe_prompt(memory, layers, reader, self.prompt, self.window)
        found = {}
        for index, weights in seen.items():
            window = self.held(memory, index)
            early = torch.ones_like(memory.layers[index].source, dtype=torch.bool)
            early = early.to(weights.device) if window is None else ~window.to(weights.device)
            pooled = _POOLS[self.pooling](
                weights[:, :, early].mean(dim=1)[None],
                self.kernel, stride=1, padding=self.kernel // 2,
            )[0]  # fmt: skip
            by_head = rearrange(
                pooled, "(head group) slot -> head group slot", head=memory.layers[index].heads
            ).mean(dim=1)
            scores = by_head.new_zeros(by_head.shape[0], len(early))
            scores[:, early] = by_head
            found[index] = scores
        return found

    def _kept_anyway(self) -> str:
        return f"{super()._kept_anyway()}, window={self.window}"
