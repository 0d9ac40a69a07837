"""PutQueue: work that is done in the background, with a bound on what may wait."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Any, TypeVar

__all__ = ["PutQueue"]

Result = TypeVar("Result")


class PutQueue:
    """One thread that works off what is added, in order.

    Args:
        limit: bytes that may wait; who adds more waits.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._pending: set[Future[Any]] = set()
        self._errors: list[BaseException] = []
        self._changed = Condition()

    def add(self, work: Callable[[], Result], size: int) -> Future[Result]:
        """Returns the future of some work; waits while too many bytes wait already.

        Args:
            work: what to do.
            size: bytes that it keeps alive until then.
        """
        with self._changed:
            # What is bigger than the limit may go alone.
            while self._waiting and self._waiting + size > self._limit:
                self._changed.wait()
            self._waiting += size
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvedit-store")
            future = self._pool.submit(work)
            self._pending.add(future)
        future.add_done_callback(lambda done: self._done(done, size))
        return future

    def wait(self) -> list[BaseException]:
        """Returns the errors since the last call, once nothing waits any more."""
        with self._changed:
            while self._pending:
                self._changed.wait()
            errors, self._errors = self._errors, []
            return errors

    def close(self) -> list[BaseException]:
        """Returns the errors since the last :meth:`wait`, once everything is done."""
        errors = self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return errors

    def _done(self, future: Future[Any], size: int) -> None:
        with self._changed:
            self._waiting -= size
            self._pending.discard(future)
            error = None if future.cancelled() else future.exception()
            if error is not None:
                self._errors.append(error)
            self._changed.notify_all()
