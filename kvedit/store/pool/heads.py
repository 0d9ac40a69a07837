"""The head of an object: what its values must add up to, and how they are called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

__all__ = ["HEAD_BYTES", "MOST_PARTS", "Head", "head_key"]

HEAD_BYTES = 512
"""No head is longer."""

MOST_PARTS = 1 << 16
"""No object has more values: whoever can write a head could keep its readers busy for ever."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Head:
    """What is written last, and makes an object visible.

    Args:
        digest: BLAKE3 of all bytes of the object, 64 hex characters.
        size: bytes of the object.
        value_bytes: bytes of each value but the last.
    """

    digest: str
    size: int
    value_bytes: int

    @property
    def parts(self) -> int:
        """Number of values; an empty object has none."""
        return -(-self.size // self.value_bytes)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yields begin and end of every value, in bytes."""
        for begin in range(0, self.size, self.value_bytes):
            yield begin, min(begin + self.value_bytes, self.size)

    def part_keys(self, prefix: str, key: str) -> list[str]:
        """Returns the keys of the values.

        They contain the digest: values of other bytes, left by a put that broke off, are never
        taken for these, although a pool keeps the bytes that it got first.
        """
        begin = f"{prefix}p/{self.digest}/{self.value_bytes}"
        return [f"{begin}/{index}/{key}" for index in range(self.parts)]

    def to_bytes(self) -> bytes:
        """Returns the head as canonical JSON."""
        fields = {**asdict(self), "parts": self.parts}
        return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Head | None:
        """Returns the head, or None if ``data`` is not exactly one."""
        try:
            fields = json.loads(data)
            head = Head(fields["digest"], fields["size"], fields["value_bytes"])
            sound = (
                _DIGEST.fullmatch(head.digest) is not None
                and type(head.size) is type(head.value_bytes) is int
                and head.size >= 0
                and head.value_bytes > 0
                and head.parts <= MOST_PARTS
                and head.to_bytes() == data
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return head if sound else None


def head_key(prefix: str, key: str) -> str:
    """Returns the key of the head of ``key``."""
    return f"{prefix}h/{key}"
