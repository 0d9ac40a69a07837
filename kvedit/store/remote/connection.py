"""Connection: one place, its retries, and the two requests that everything else is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvedit.errors import NotFound
from kvedit.store.remote.failures import Failure, failure_of
from kvedit.store.remote.keys import check_key, check_prefix
from kvedit.store.remote.places import need_obstore, single_try
from kvedit.store.remote.retry import Retry

__all__ = ["Connection"]

Answer = TypeVar("Answer")


class Connection:
    """A store of ``obstore``, with a prefix and retries.

    Args:
        store: the store.
        prefix: what goes before every key.
        name: what the place is called in messages.
        retry_seconds: how long a call tries again what failed for the moment.

    Raises:
        InvalidArgument: if the prefix can't be one.
        MissingDependency: if ``obstore`` is not installed.
    """

    def __init__(
        self, store: Any, prefix: str = "", name: str = "", *, retry_seconds: float = 30.0
    ) -> None:
        need_obstore()
        from obstore.store import LocalStore, MemoryStore

        self._retry = Retry(retry_seconds)
        self._prefix = f"{check_prefix(prefix)}/" if prefix else ""
        self.name = name or f"{type(store).__name__}/{prefix}"
        # One loop of retries, ours. Only listing and the parts of an upload use obstore's.
        self._patient, self._store = store, single_try(store)
        self._local = isinstance(store, LocalStore | MemoryStore)
        self._folder = Path(store.prefix) if isinstance(store, LocalStore) else None

    def __repr__(self) -> str:
        """The place; never its credentials."""
        return f"{type(self).__name__}({self.name!r})"

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _run(self, task: str, call: Callable[[bool], Answer]) -> Answer:
        return self._retry.run(f"{task} at {self.name}", call)

    def _head(self, path: str) -> int | None:
        import obstore

        try:
            return int(obstore.head(self._store, path)["size"])
        except Exception as error:
            if failure_of(error) is Failure.MISSING:
                return None
            raise

    def _get(self, key: str, path: str, wanted: Any) -> tuple[memoryview, int]:
        """Returns the bytes of a range, empty where it lies outside, and the object's size."""
        import obstore

        try:
            answer = obstore.get(self._store, path, options={"range": wanted} if wanted else None)
            return memoryview(answer.bytes()), int(answer.meta["size"])
        except Exception as error:
            failure = failure_of(error)
            if failure is Failure.RANGE:
                return memoryview(b""), self._exists(key, self._head(path))
            if failure is Failure.MISSING:
                self._exists(key, None)
            raise

    def _exists(self, key: str, size: int | None) -> int:
        """Returns ``size``."""
        if size is None:
            raise NotFound(f"{self.name} has no object {key}")
        return size
