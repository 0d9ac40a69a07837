"""LiveTier: memories in RAM or on a device, the last used ones within a budget of bytes."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch

from kvedit.errors import CapacityExceeded, InvalidArgument, MutatedMemory
from kvedit.memory import KVMemory
from kvedit.memory.layer import LayerKV
from kvedit.memory.show import human_bytes
from kvedit.store.tiers.base import Tier, TierUsage

__all__ = ["LiveTier"]


class LiveTier(Tier):
    """Live memories, ready to attach. It owns its tensors: nothing in it is mapped from a file.

    A memory in it that somebody writes to in place is dropped, and read again from below.

    Args:
        budget: bytes that it may take.
        device: where the tensors are.
        evicted: called with how many memories made room.
    """

    def __init__(
        self,
        budget: int,
        device: torch.device | str = "cpu",
        evicted: Callable[[int], None] = lambda count: None,
    ) -> None:
        if budget <= 0:
            raise InvalidArgument(f"a tier needs a budget of some bytes, found {budget}")
        self.device = torch.device(device)
        self.name = "ram" if self.device.type == "cpu" else str(self.device)
        self._budget = budget
        self._evicted = evicted
        self._held: OrderedDict[str, KVMemory] = OrderedDict()
        self._bytes = 0
        self._pinned: set[str] = set()
        self._lock = Lock()

    def put(self, record: str, memory: KVMemory, paper: bytes = b"") -> None:
        """Holds a memory; those that were not used the longest make room.

        Raises:
            CapacityExceeded: if it is bigger than the budget, or what is pinned leaves no room.
            MutatedMemory: if a tensor of it was written in place.
        """
        size = _size(memory)
        with self._lock:
            if record in self._held:
                self._held.move_to_end(record)
                return
            self._make_room(size)
        owned = _owned(memory, self.device)
        memory.check_unmodified()  # while it was copied, or before
        with self._lock:
            if record not in self._held:
                self._make_room(size)
                self._held[record] = owned
                self._bytes += size

    def get(self, record: str) -> KVMemory | None:
        """Returns the memory of a record, or None."""
        with self._lock:
            memory = self._held.get(record)
            if memory is None:
                return None
            self._held.move_to_end(record)
        try:
            memory.check_unmodified()
        except MutatedMemory:
            self.discard(record)
            return None
        return memory

    def discard(self, record: str) -> None:
        """Forgets a record."""
        with self._lock:
            memory = self._held.pop(record, None)
            self._pinned.discard(record)
            if memory is not None:
                self._bytes -= _size(memory)

    def pin(self, record: str, pinned: bool = True) -> None:
        """Keeps a record out of eviction, or no longer."""
        with self._lock:
            (self._pinned.add if pinned else self._pinned.discard)(record)

    def records(self) -> list[str]:
        """Returns the digests of what it holds, in order."""
        with self._lock:
            return sorted(self._held)

    def usage(self) -> TierUsage:
        """Returns what it holds."""
        with self._lock:
            return TierUsage(len(self._held), self._bytes, self._budget)

    def close(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _make_room(self, size: int) -> None:
        loose = [record for record in self._held if record not in self._pinned]
        free = self._budget - self._bytes + sum(_size(self._held[record]) for record in loose)
        if size > free:
            raise CapacityExceeded(
                f"tier {self.name} has a budget of {human_bytes(self._budget)}; "
                f"{human_bytes(size)} do not fit beside what is pinned"
            )
        gone = 0
        while self._bytes + size > self._budget:
            self._bytes -= _size(self._held.pop(loose[gone]))
            gone += 1
        if gone:
            self._evicted(gone)


def _size(memory: KVMemory) -> int:
    extra = sum(t.nbytes for _, t in memory.source.tensors()) if memory.source else 0
    return memory.nbytes + extra


def _owned(memory: KVMemory, device: torch.device) -> KVMemory:
    layers = {
        index: LayerKV(**{k: t.detach().clone().to(device) for k, t in layer.tensors()})
        for index, layer in memory.layers.items()
    }
    source = memory.source
    if source is not None:
        tokens, offsets = source.tokens.clone(), source.offsets.clone()
        source = dataclasses.replace(source, tokens=tokens, offsets=offsets)
    return dataclasses.replace(memory, layers=layers, source=source)
