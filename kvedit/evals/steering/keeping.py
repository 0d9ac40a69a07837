"""Keep: results kept up to a bound of bytes, the first ones for good."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from kvedit.errors import InvalidArgument

__all__ = ["Keep"]

Key = TypeVar("Key", bound=Hashable)


class Keep:
    """What was made, as far as it fits; what does not fit is made anew each time.

    Passes over a set come in the same order again and again. Dropping the least recently used, as
    :class:`~kvedit.evals.prefills.Prefills` does, would then keep nothing of a set that is a
    little too large; keeping the first ones saves their share.

    Args:
        keep_bytes: bytes of tensors to keep.

    Raises:
        InvalidArgument: if that is below 0.
    """

    def __init__(self, keep_bytes: int) -> None:
        """Starts empty."""
        if keep_bytes < 0:
            raise InvalidArgument(f"keep_bytes must be 0 or above, found {keep_bytes}")
        self.keep_bytes = keep_bytes
        self._kept: dict[Hashable, Any] = {}
        self._bytes = 0

    def all(
        self,
        keys: Sequence[Key],
        make: Callable[[list[Key]], list[Any]],
        size: Callable[[Any], int],
    ) -> list[Any]:
        """Returns what belongs to each key; what is not kept is made, all in one call.

        Args:
            keys: what is wanted.
            make: gives what belongs to each of the keys that are missing.
            size: bytes of one of them.
        """
        missing = [key for key in keys if key not in self._kept]
        made = dict(zip(missing, make(missing), strict=True)) if missing else {}
        for key, value in made.items():
            if self._bytes + size(value) <= self.keep_bytes:
                self._kept[key] = value
                self._bytes += size(value)
        return [made[key] if key in made else self._kept[key] for key in keys]

    def __repr__(self) -> str:
        """How much is kept."""
        return f"Keep({len(self._kept)} kept, {self._bytes / 1e6:.1f} MB)"
