"""Limits: what one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.errors import InvalidArgument

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """What the endpoint takes on.

    Args:
        queue: prompts that may wait while one is answered.
        tokens: new tokens of one answer.
        cache: bytes of memories that are kept in RAM between requests; 0 keeps none.
        body: bytes of one request.

    Raises:
        InvalidArgument: if one of them is too small.
    """

    queue: int = 64
    tokens: int = 1024
    cache: int = 2 << 30
    body: int = 4 << 20

    def __post_init__(self) -> None:
        """Checks them."""
        if min(self.queue, self.tokens, self.body) < 1 or self.cache < 0:
            raise InvalidArgument(f"expected limits of at least 1 (cache: 0), found {self}")
