"""Lifting: live memories in RAM and on a device, and a pool beside the folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from kvedit.errors import CapacityExceeded, CorruptMemory, MutatedMemory, TierUnavailable
from kvedit.memory import KVMemory
from kvedit.store.reader import Verify
from kvedit.store.records import Record
from kvedit.store.room import parse_bytes
from kvedit.store.tiers import LiveTier, Pool, PoolTier
from kvedit.store.upkeep import Upkeep

__all__ = ["FAILURES", "Lifting"]

Result = TypeVar("Result")

FAILURES = (TierUnavailable, OSError)
"""What a tier raises that can't be reached."""


class Lifting(Upkeep):
    """What a store does with tiers that may lose everything at any time."""

    _live: tuple[LiveTier, ...] = ()
    _pool: PoolTier | None = None

    def _add_tiers(
        self,
        ram: int | str | None,
        device: tuple[torch.device | str, int | str] | None,
        pool: Pool | None,
    ) -> None:
        """Opens tiers, the fastest first."""

        def count(evicted: int) -> None:
            self.counters.add(evicted=evicted)

        if device is not None:
            tier = LiveTier(parse_bytes(device[1]), device[0], count)
            tier.name = str(tier.device)  # also where a "device" stands in RAM
            self._live += (tier,)
        if ram is not None:
            self._live += (LiveTier(parse_bytes(ram), "cpu", count),)
        if pool is not None:
            self._pool = PoolTier(pool, self._shelf.cipher)

    def _get_whole(
        self,
        record: Record,
        verify: Verify,
    ) -> KVMemory:
        """Returns a memory from the first tier that has it."""
        memory = None if verify == "deep" else self._from_live(record.record)
        if memory is None:
            memory = self._from_pool(record) or self._read(record, verify=verify)
            if verify in ("full", "deep"):  # what comes from there is not checked again
                self._lift(record.record, memory)
        return memory

    def _from_live(self, record: str) -> KVMemory | None:
        for tier in self._live:
            memory = tier.get(record)
            if memory is not None:
                self._check_trusted(record)
                self.counters.add(live_hits=1)
                return memory
        return None

    def _check_trusted(self, record: str) -> None:
        if self._shelf.trusted:
            self._finder.paper(record)

    def _from_pool(self, record: Record) -> KVMemory | None:
        """Returns the memory from the pool, where the folder lacks its bytes."""
        pool = self._pool
        if pool is None or self._is_here(record):
            return None
        self._check_trusted(record.record)
        return self._degrading("pool", lambda: pool.get(record.record), None)

    def _is_here(self, record: Record) -> bool:
        pack = self._shelf.index.manifest_pack(record.record)
        return pack is None or self._shelf.layout.pack_size(pack) >= 0

    def _lift(self, record: str, memory: KVMemory) -> None:
        for tier in self._live:
            with suppress(CapacityExceeded, MutatedMemory):
                tier.put(record, memory)

    def _keep(self, record: Record, memory: KVMemory) -> None:
        # It was just digested: whatever was known of it before, these are its bytes.
        self._lift(record.record, dataclasses.replace(memory, verified=True))
        pool = self._pool
        if pool is not None:
            paper = self._finder.paper(record.record)
            self._degrading("pool", lambda: pool.put(record.record, memory, paper), None)

    def _degrading(self, tier: str, action: Callable[[], Result], otherwise: Result) -> Result:
        """Returns what the action returns; a tier that fails is warned of and done without."""
        try:
            return action()
        except (*FAILURES, CorruptMemory) as error:
            self._warn(tier, error)
            return otherwise

    def _warn(self, tier: str, error: Exception) -> None:
        self.counters.add(degraded=1)
        warnings.warn(
            f"tier {tier} failed, and the others go on without it: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
