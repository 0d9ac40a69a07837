"""A Mooncake pool as a place for hot copies: what it returns was checked, or it returns nothing."""

from __future__ import annotations

import importlib.util
import re
import socket
from threading import Lock
from types import TracebackType
from typing import Self

import blake3

from kvedit.errors import InvalidArgument, MissingDependency, TierUnavailable
from kvedit.store.pool.config import MooncakeConfig
from kvedit.store.pool.heads import MOST_PARTS, Head
from kvedit.store.pool.process import ClientProcess
from kvedit.store.pool.values import PoolUsage, Values

__all__ = ["MooncakePool"]

_KEY = re.compile(r"[A-Za-z0-9._/-]{1,400}")
_PROBE_SECONDS = 5.0
_CLOSE_SECONDS = 10.0


class MooncakePool:
    """Bytes in the memory of the machines that share a Mooncake master (Qin et al., FAST 2025).

    The pool is a cache. It keeps the bytes that it got first under a key, so derive keys from
    content; it evicts; what a client lent is gone when that client ends, with the objects in it;
    and a new master knows no object. So every put is read back, and every get compared with a
    BLAKE3 digest: an object is there whole, or it is not there.

    A digest shows that bytes are the ones that were put. It does not show who put them: whoever
    reaches the master can put under any key, so pass the digest that you expect to ``get``.

    The native client runs in a process of its own, one per pool object; pools may be opened, closed
    and opened again, several at a time. Calls from several threads wait for each other. After a
    fork, open a new pool. A pool finds a restarted master again by itself, empty.

    Args:
        config: how to join.
        namespace: pools of other namespaces never see these keys. It is a name, not a secret.
        log: file that receives what the native client prints; None drops it.

    Raises:
        InvalidArgument: if the namespace is empty.
        MissingDependency: if Mooncake is not installed.
        TierUnavailable: if nobody listens at the master's address or the client can't join.
    """

    def __init__(self, config: MooncakeConfig, namespace: str, *, log: str | None = None) -> None:
        if not namespace:
            raise InvalidArgument("a namespace is a text that is not empty, found ''")
        if importlib.util.find_spec("mooncake") is None:
            raise MissingDependency("mooncake", "mooncake", "a shared pool of memories")
        self.config = config
        self._lock = Lock()
        _probe(config)
        prefix = f"kvedit/{blake3.blake3(namespace.encode()).hexdigest()[:16]}/"
        client = ClientProcess(config.value_bytes, config.seconds, log)
        self._values = Values(client, prefix, PoolUsage(config.segment_bytes))
        try:
            self._join()
        except BaseException:
            self.close()
            raise

    def put(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        """Returns whether the pool holds exactly these bytes under ``key`` now; it reads them back.

        Parts that an earlier put left, or that were lost since, are completed.

        Args:
            key: 1 to 400 of ASCII letters, digits, ``.``, ``_``, ``/``, ``-``.
            data: contiguous bytes; not changed meanwhile.

        Raises:
            InvalidArgument: if the key or the data can't be put.
            TierUnavailable: if the master does not answer, or the client is gone.
        """
        view = _flat(data)
        if view.nbytes > MOST_PARTS * self.config.value_bytes:
            raise InvalidArgument(
                f"an object has at most {MOST_PARTS} values of {self.config.value_bytes} bytes, "
                f"found {view.nbytes} bytes: raise value_bytes"
            )
        head = Head(blake3.blake3(view).hexdigest(), view.nbytes, self.config.value_bytes)
        with self._lock:
            found = self._values.head(_checked(key))
            same = found is None or found.digest == head.digest
            kept = same and self._values.store(key, found or head, view)
            self._values.count(puts=int(kept), refused=int(not kept))
        return kept

    def get(self, key: str, digest: str | None = None) -> bytearray | None:
        """Returns the object, or None if it is not there, lacks a part or holds other bytes.

        Args:
            key: as it was put.
            digest: BLAKE3 that the bytes must have, 64 hex characters; None takes the one that the
                object itself names.

        Raises:
            InvalidArgument: if the key is none.
            TierUnavailable: if the master does not answer, or the client is gone.
        """
        with self._lock:
            head = self._values.head(_checked(key))
            if head is None:
                self._values.count(misses=1)
                return None
            if digest not in (None, head.digest):
                self._values.count(wrong=1)
                return None
            found = bytearray()
            if not self._values.read(key, head, found.extend):
                return None
            self._values.count(hits=1)
        return found

    def contains(self, key: str) -> bool:
        """Returns whether the object has a head and all its parts; no byte is checked.

        Raises:
            InvalidArgument: if the key is none.
            TierUnavailable: if the master does not answer, or the client is gone.
        """
        with self._lock:
            head = self._values.head(_checked(key))
            return head is not None and self._values.complete(key, head)

    def delete(self, key: str) -> bool:
        """Returns whether there was something to remove; readers in the middle get None.

        Raises:
            InvalidArgument: if the key is none.
            TierUnavailable: if the master does not answer, or the client is gone.
        """
        with self._lock:
            return self._values.remove(key, self._values.head(_checked(key)))

    def usage(self) -> PoolUsage:
        """Returns what this client did so far."""
        with self._lock:
            return self._values.usage

    def close(self) -> None:
        """Leaves the pool; objects in the memory that this client lent are gone. Closes once."""
        with self._lock:
            self._values.client.close(_CLOSE_SECONDS)

    def __enter__(self) -> Self:
        """Returns the pool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the pool."""
        self.close()

    def _join(self) -> None:
        config = self.config
        names = ("local_host", "metadata", "segment_bytes", "buffer_bytes", "protocol", "device")
        wanted = {name: getattr(config, name) for name in (*names, "master")}
        code = self._values.client.call("setup", **wanted)
        if code != 0:
            raise TierUnavailable(
                f"the Mooncake client could not join {config.master} (code {code}): check "
                "protocol, device and sizes; `log=` keeps what it printed"
            )


def _probe(config: MooncakeConfig) -> None:
    """Knocks at the master: the native client would try for 90 seconds."""
    try:
        socket.create_connection(
            config.address(), timeout=min(_PROBE_SECONDS, config.seconds)
        ).close()
    except OSError as error:
        raise TierUnavailable(
            f"no Mooncake master answers at {config.master} ({error}): start mooncake_master there"
        ) from error


def _checked(key: str) -> str:
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise InvalidArgument(
            f"a key is 1 to 400 of ASCII letters, digits, '.', '_', '/', '-'; found {key!r}"
        )
    return key


def _flat(data: bytes | bytearray | memoryview) -> memoryview:
    try:
        view = memoryview(data)
        return view.cast("B") if view.nbytes else memoryview(b"")
    except TypeError as error:
        raise InvalidArgument(
            f"the pool takes contiguous bytes, found {type(data).__name__}: {error}"
        ) from error
