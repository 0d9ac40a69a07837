"""Objects as values of a pool: a head and parts, each call checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import blake3

from kvedit.errors import TierUnavailable
from kvedit.store.pool.heads import HEAD_BYTES, Head, head_key
from kvedit.store.pool.process import ClientProcess

__all__ = ["PoolUsage", "Values"]


@dataclass(frozen=True)
class PoolUsage:
    """What one client did since it was opened; the native client does not tell what others hold.

    Args:
        lent: bytes of memory that this client lends to the pool.
        puts: objects that the pool took, read back and checked.
        refused: objects that it did not take: no room, other bytes under the key, or lost at once.
        hits: objects that ``get`` returned.
        misses: objects that were not there.
        torn: objects that had a head and lacked a part.
        wrong: objects whose bytes were not the ones that the head, or the caller, asked for.
        bytes_written: bytes of values handed to the pool.
        bytes_read: bytes of values that came from it, read-back included; all of them were hashed.
    """

    lent: int
    puts: int = 0
    refused: int = 0
    hits: int = 0
    misses: int = 0
    torn: int = 0
    wrong: int = 0
    bytes_written: int = 0
    bytes_read: int = 0


class Values:
    """Heads and parts of the objects of one namespace. Not for several threads at once.

    Args:
        client: the process that holds the native client.
        prefix: what the keys of the namespace begin with.
        usage: the counters at the beginning.
    """

    def __init__(self, client: ClientProcess, prefix: str, usage: PoolUsage) -> None:
        self.client = client
        self.prefix = prefix
        self.usage = usage

    def head(self, key: str) -> Head | None:
        """Returns the head of ``key``, or None if there is none, or something else."""
        size = self._code("get", head_key(self.prefix, key))
        if not 0 < size <= HEAD_BYTES:
            return None
        return Head.from_bytes(bytes(self.client.scratch[:size]))

    def store(self, key: str, head: Head, view: memoryview) -> bool:
        """Writes what is missing, reads everything back, writes the head, reads it back.

        Args:
            key: of the object.
            head: what its values must add up to.
            view: its bytes.

        Returns:
            Whether all of it came back. If not, what was written is removed.
        """
        written: list[str] = []
        if self._write(key, head, view, written) and self.read(key, head, _nowhere):
            data = head.to_bytes()
            self.client.scratch[: len(data)] = data
            self._code("put", head_key(self.prefix, key), size=len(data))
            # Where another head came first, the pool says success and keeps that one.
            if self.head(key) == head:
                return True
        self._remove(written)
        return False

    def read(self, key: str, head: Head, sink: Callable[[memoryview], object]) -> bool:
        """Hands every part to ``sink``; removes an object that is whole and has wrong bytes.

        Args:
            key: of the object.
            head: what its values must add up to.
            sink: takes each part; the memory is reused by the next one.

        Returns:
            Whether the parts are the bytes that the head names.
        """
        hasher = blake3.blake3()
        names = head.part_keys(self.prefix, key)
        for name, (begin, end) in zip(names, head.ranges(), strict=True):
            if self._code("get", name) != end - begin:
                self.count(torn=1)
                return False
            part = self.client.scratch[: end - begin]
            hasher.update(part)
            sink(part)
            self.count(bytes_read=end - begin)
        if hasher.hexdigest() == head.digest:
            return True
        self.count(wrong=1)
        self.remove(key, head)  # it would stand in the way of the next put
        return False

    def complete(self, key: str, head: Head) -> bool:
        """Returns whether all parts are there; no byte is read."""
        return all(self._exist(head.part_keys(self.prefix, key)))

    def remove(self, key: str, head: Head | None) -> bool:
        """Returns whether a head was there; it and the parts that ``head`` names are gone."""
        gone = self._remove([head_key(self.prefix, key)])  # first: it makes the object visible
        if head is not None:
            self._remove(head.part_keys(self.prefix, key))
        return bool(gone)

    def count(self, **amounts: int) -> None:
        """Adds to the named counters."""
        before = self.usage
        self.usage = replace(
            before, **{name: getattr(before, name) + more for name, more in amounts.items()}
        )

    def _write(self, key: str, head: Head, view: memoryview, written: list[str]) -> bool:
        names = head.part_keys(self.prefix, key)
        if head.value_bytes > len(self.client.scratch):
            return False  # cut by a client with larger values
        for name, there, (begin, end) in zip(names, self._exist(names), head.ranges(), strict=True):
            if there:
                continue
            self.client.scratch[: end - begin] = view[begin:end]
            if self._code("put", name, size=end - begin) != 0:
                return False
            written.append(name)
            self.count(bytes_written=end - begin)
        return True

    def _exist(self, names: list[str]) -> list[bool]:
        codes: list[int] = self.client.call("exist", keys=names) if names else []
        return [_reached(code) == 1 for code in codes]

    def _remove(self, names: list[str]) -> int:
        """Returns how many were there."""
        codes: list[int] = self.client.call("remove", keys=names) if names else []
        return sum(_reached(code) == 0 for code in codes)

    def _code(self, op: str, key: str, **arguments: int) -> int:
        return _reached(int(self.client.call(op, key=key, **arguments)))


def _reached(code: int) -> int:
    """Returns ``code`` unless it says that the master (-9xx) or its election (-10xx) is away."""
    if -1100 < code <= -900:
        raise TierUnavailable(
            f"the Mooncake master does not answer (code {code}): start it; objects are gone then"
        )
    return code


def _nowhere(part: memoryview) -> None:
    """Drops what was read back; only its digest matters."""
