"""saying: tokens that are fed within the block count as said by the model, not as a prompt.

What ``generate`` chooses counts so by itself. A continuation that is scored, or a loop of one's
own, must say so: nothing in a forward pass tells it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["is_said", "saying"]

_said: ContextVar[bool] = ContextVar("kvedit_said", default=False)


@contextmanager
def saying() -> Iterator[None]:
    """Lets all tokens that models read within the block count as generated ones."""
    token = _said.set(True)
    try:
        yield
    finally:
        _said.reset(token)


def is_said() -> bool:
    """Whether a block of :func:`saying` is open here."""
    return _said.get()
