"""Steering: an edit, an edited memory, or a context to run a model in; and the way into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory import KVMemory

__all__ = ["Apply", "Change", "Entry", "Steering"]

Steering = KVMemory | Callable[[KVMemory], KVMemory] | AbstractContextManager[Any]
"""What steers: a memory that takes the context's place, an edit (any editor that takes one memory,
or a function around one that takes operands too), or a context manager, such as
:func:`kvedit.steering.steered`."""

Apply = Callable[[float], Steering]
"""From a strength to what steers with it. A context manager must be a new one at each call."""

Change = Callable[[KVMemory | None], KVMemory | None]
"""From the memory that a question would be asked over to the one that it is asked over."""


class Entry:
    """A way into steering that can be taken again and again, and left between.

    What belongs to the unedited model is read outside of it, batch by batch. Context managers are
    mostly made for one use, so each entry makes a new one.

    Args:
        make: makes what steers; None, or a maker of None, steers nothing.

    Raises:
        InvalidArgument: from the first entry, if what was made is nothing that steers.
    """

    def __init__(self, make: Callable[[], Steering | None] | None = None) -> None:
        """Makes nothing yet."""
        self._make = make
        self._change: Change | None = None

    @contextmanager
    def on(self) -> Iterator[Change]:
        """Steers within the block.

        Yields:
            What becomes of each memory.
        """
        if self._change is not None:
            yield self._change
            return
        steering = None if self._make is None else self._make()
        # Before the question of calls: managers made by contextlib can be called as well.
        if isinstance(steering, AbstractContextManager):
            with steering:
                yield lambda memory: memory
            return
        self._change = _as_change(steering)
        yield self._change


def _as_change(steering: Any) -> Change:
    if steering is None:
        return lambda memory: memory
    if isinstance(steering, KVMemory):
        return lambda memory: steering
    if not callable(steering):
        raise InvalidArgument(
            "expected an edited memory, an edit from memory to memory, or a context manager, "
            f"found {type(steering).__name__}"
        )
    done: tuple[KVMemory, KVMemory] | None = None

    def change(memory: KVMemory | None) -> KVMemory | None:
        nonlocal done
        if memory is None:
            raise InvalidArgument(
                "an edit needs a memory to edit, and these questions are asked over none: pass "
                'hold="prompt", which puts each prompt into memory, or a context='
            )
        # Questions over one context come with one object; only the last is worth keeping.
        if done is None or done[0] is not memory:
            done = (memory, steering(memory))
        return done[1]

    return change
