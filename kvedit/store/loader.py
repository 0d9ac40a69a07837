"""Loader: reads the tensors of a memory, by a plan that it keeps for the next time."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from kvedit.errors import CorruptMemory
from kvedit.store.finder import Finder
from kvedit.store.holding import HeldPack
from kvedit.store.manifest import Part
from kvedit.store.plan import Plan, plan_parts
from kvedit.store.reader import Verify, read_planned
from kvedit.store.recent import Recent
from kvedit.store.shelf import Shelf

__all__ = ["Loader"]


class Loader:
    """Reads tensors of memories.

    Args:
        shelf: the store's parts.
        finder: opens packs.
    """

    def __init__(self, shelf: Shelf, finder: Finder) -> None:
        self._shelf = shelf
        self._finder = finder
        self._plans: Recent[str, Plan] = Recent(32)

    def read(
        self, record: str, parts: Sequence[Part], whole: bool, verify: Verify
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Returns some tensors of a memory, by layer and kind.

        Args:
            record: its record digest.
            parts: what is wanted.
            whole: whether these are all of its parts.
            verify: what to check.

        Raises:
            CorruptMemory: if a byte is not what was put, or missing.
            InvalidArgument: if it is sealed and the key is missing or another one.
        """
        if verify == "full" and self._shelf.trusted:
            verify = "deep"  # a signature says nothing of bytes that only a checksum vouches for
        cipher = self._shelf.cipher
        plan = self._plans.get(record) if whole else None
        held = self._reopened(plan) if plan else None
        if plan is None or held is None:
            blocks = {block.digest for part in parts for block in part.blocks}
            packs = self._finder.hold(record, blocks, not whole)
            plan = plan_parts(parts, packs, cipher)
            held = {one.pack.digest: one for one in packs.values()}
            if whole:
                self._plans.put(record, plan)
        start = time.perf_counter_ns()
        tensors = read_planned(plan, held, verify, cipher)
        took = time.perf_counter_ns() - start
        checked = plan.size if verify != "off" else 0
        counters = self._shelf.counters
        counters.add(bytes_read=plan.size, bytes_verified=checked, read_ns=took)
        return tensors

    def _reopened(self, plan: Plan) -> dict[str, HeldPack] | None:
        """Returns the packs of a plan; None if one is gone or is not the same file any more."""
        held: dict[str, HeldPack] = {}
        for name, pack in plan.packs.items():
            try:
                held[name] = self._finder.mapped(name)
            except (FileNotFoundError, CorruptMemory):
                return None
            if held[name].pack is not pack:
                return None
        return held
