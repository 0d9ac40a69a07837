"""Objects: bytes under keys at one place: a bucket, a folder or RAM."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from kvedit.errors import CorruptMemory, RaceLost, TierUnavailable
from kvedit.store.remote.failures import Failure, describe, failure_of
from kvedit.store.remote.folders import hold_folder, sync_file
from kvedit.store.remote.keys import LOCK, check_key
from kvedit.store.remote.payload import open_payload
from kvedit.store.remote.places import open_place
from kvedit.store.remote.reads import Reads
from kvedit.store.remote.retry import Again
from kvedit.store.remote.spans import PIECE
from kvedit.store.remote.swaps import read_ref, swap_in_folder, swap_ref

__all__ = ["Objects"]

_SINGLE = 32 * 1024 * 1024  # bytes; above, a put that fails is too dear to send as a whole again
_PARTS = 10_000  # parts that S3 allows in one object
_BATCH = 500  # keys per request of a delete


class Objects(Reads):
    """Bytes under keys at one place, over a store of ``obstore``.

    Keys are ``[a-z0-9._-]`` with ``/`` between parts; no part begins with ``.`` and none holds
    ``..``. Every call is safe in threads. None survives a fork: open again in the child.

    Args:
        store: a store of ``obstore``; two Objects over one store see the same bytes.
        prefix: what goes before every key.
        name: what the place is called in messages.
        retry_seconds: how long a call tries again what failed for the moment.

    Raises:
        InvalidArgument: if the prefix can't be one.
        MissingDependency: if ``obstore`` is not installed.
    """

    @classmethod
    def open(cls, url: str, *, retry_seconds: float = 30.0, **options: Any) -> Objects:
        """Returns the objects at ``url``.

        Args:
            url: ``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``,
                ``file:///folder`` (made if it is not there) or ``memory:///``, which is empty
                and shared with nobody.
            retry_seconds: see :class:`Objects`. A call ends after about this time plus that of
                one request; an upload in parts may take twice as long.
            options: for buckets only: ``endpoint``, ``region``, ``access_key_id``,
                ``secret_access_key``, ``account_name`` and whatever else ``obstore`` knows for
                them; ``allow_http``; ``timeout`` and ``connect_timeout``, seconds of one request
                (30 and 5). What is not given comes from the usual environment variables
                (``AWS_…``, ``GOOGLE_…``, ``AZURE_…``), then from the machine's role.

        Raises:
            InvalidArgument: if scheme, options or endpoint are not understood.
            MissingDependency: if ``obstore`` is not installed.
        """
        store, prefix = open_place(url, options, retry_seconds)
        return cls(store, prefix, url, retry_seconds=retry_seconds)

    # --- objects that never change ---------------------------------------------------------------

    def create(self, key: str, data: bytes | memoryview | Path) -> bool:
        """Returns whether this call made the object; False if it was there already.

        A key belongs to one content, so an object that is there is taken for ours if its size is.
        Up to 32 MiB, and of any size in folders and RAM, the put is conditional. Above, it is an
        upload in parts, which can't be: the place is asked first, and of two that upload at once
        both return True and leave the same bytes. A call that failed may always be repeated: what
        an earlier try may have stored counts as made. An upload that was cut off for good leaves
        invisible parts; a lifecycle rule of the bucket removes them.

        Args:
            key: made of the digest of the content.
            data: the bytes, or the file that holds them.

        Raises:
            CorruptMemory: if an object of another size is there.
            InvalidArgument: if the key can't be one, or data is not contiguous.
            TierUnavailable: if the place can't be reached.
        """
        path = self._path(key)
        with open_payload(data) as payload:
            size = len(payload)
            put = self._create_once if size <= _SINGLE or self._local else self._upload
            task = f"create {key} ({size} bytes)"
            made = self._run(task, partial(put, path, payload))
        if self._folder is not None:
            sync_file(self._folder, path)
        return made

    def _create_once(self, path: str, payload: memoryview, maybe: bool) -> bool:
        """Returns whether one conditional put made the object, or an earlier try may have."""
        import obstore

        try:
            obstore.put(self._store, path, payload, mode="create", use_multipart=False)
        except Exception as error:
            if failure_of(error) is not Failure.CONFLICT:
                raise
            if not self._is_there(path, len(payload)):
                raise Again("another put of the same key is under way") from error
            return maybe
        return True

    def _upload(self, path: str, payload: memoryview, maybe: bool) -> bool:
        """Returns whether an upload in parts made the object, or an earlier try may have."""
        import obstore

        if self._is_there(path, len(payload)):
            return maybe
        chunk = max(PIECE, -(-len(payload) // _PARTS))
        obstore.put(
            self._patient, path, payload, use_multipart=True, chunk_size=chunk, max_concurrency=4
        )
        return True

    def _is_there(self, path: str, size: int) -> bool:
        """Returns whether an object is there; its size must be ``size``."""
        found = self._head(path)
        if found is not None and found != size:
            raise CorruptMemory(
                f"{self.name}: {path} holds {found} bytes, expected {size}: it is another content "
                "or was cut off; delete it and put again"
            )
        return found is not None

    # --- refs: objects that move -----------------------------------------------------------------

    def get_ref(self, key: str) -> tuple[bytes, str] | None:
        """Returns content and version token of a ref, from one request; None if there is none.

        Raises:
            InvalidArgument: if the key can't be one.
            TierUnavailable: if the place can't be reached.
        """
        path = self._path(key)
        return self._run(f"read ref {key}", lambda _: read_ref(self._store, path))

    def set_ref(self, key: str, data: bytes, expect: str | None) -> str:
        """Returns the new version token of a ref that nobody moved meanwhile.

        Buckets compare and swap themselves (``If-Match``, ``If-None-Match``); :meth:`check` finds
        servers that don't. In a ``file://`` place a lock file and an atomic rename do: only
        processes of one host are safe from each other there, so a folder that several hosts mount
        can't keep refs. A put whose answer got lost is looked up: if the ref holds ``data``, it
        counts as moved.

        Each content of a ref must be new (hold a counter, say). The etags of S3 are made of the
        content: a ref that moved away and back has its old token again, and the swap of somebody
        who saw nothing of it succeeds.

        Args:
            key: the ref.
            data: its new content.
            expect: the token that it must have, from ``get_ref`` or ``set_ref``; None if it must
                not be there yet.

        Raises:
            InvalidArgument: if the key can't be one.
            RaceLost: if it has another token.
            TierUnavailable: if the place can't be reached.
        """
        path, task = self._path(key), f"move ref {key}"
        if self._folder is None:
            return self._run(task, lambda maybe: swap_ref(self._store, path, data, expect, maybe))
        with hold_folder(self._folder, self._retry.seconds):
            token = self._run(task, lambda _: swap_in_folder(self._store, path, data, expect))
            sync_file(self._folder, path)
        return token

    # --- the place -------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[tuple[str, int, datetime]]:
        """Returns key, bytes and time of the last change of all objects under ``prefix``.

        Args:
            prefix: how the keys begin; ``""`` for all. It need not end at a ``/``.

        Raises:
            InvalidArgument: if no key begins so.
            TierUnavailable: if the place can't be reached, then or while it is read.
        """
        if prefix:
            check_key(prefix.removesuffix("/"))
        return self._pages(prefix)

    def _pages(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """Yields what :meth:`list` returns, page by page."""
        import obstore

        # obstore lists whole folders: the rest of the prefix is compared here.
        folder = (self._prefix + prefix).rpartition("/")[0]
        try:
            for page in obstore.list(self._patient, folder or None, chunk_size=1000):
                for found in page:
                    key = str(found["path"]).removeprefix(self._prefix)
                    if key.startswith(prefix) and key != LOCK:
                        yield key, int(found["size"]), found["last_modified"]
        except Exception as error:
            raise TierUnavailable(f"can't list {self.name}: {describe(error)}") from error

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; those that are not there are fine.

        Raises:
            InvalidArgument: if a key can't be one; nothing is deleted then.
            TierUnavailable: if the place can't be reached; some may be deleted then.
        """
        paths = [self._path(key) for key in keys]
        for at in range(0, len(paths), _BATCH):
            batch = paths[at : at + _BATCH]
            self._run(f"delete {len(batch)} objects", partial(self._delete, batch))

    def _delete(self, paths: Sequence[str], maybe: bool) -> None:
        """Deletes one batch; folders, GCS and Azure stumble over what is not there."""
        import obstore

        try:
            obstore.delete(self._store, paths)
        except Exception as error:
            if failure_of(error) is not Failure.MISSING:
                raise
            if len(paths) > 1:
                for path in paths:
                    self._delete([path], maybe)

    def check(self) -> None:
        """Checks that the place can be used: it is there, may be written to, and swaps.

        Puts one small object beside the others, and deletes it.

        Raises:
            TierUnavailable: if something fails, or the server ignores the conditions of a put.
        """
        key = f"check-{secrets.token_hex(8)}"
        first = self.set_ref(key, b"1", None)
        try:
            second = self.set_ref(key, b"2", first)
            for expect in (None, first):
                self._must_lose(key, expect)
            if self.get_ref(key) != (b"2", second):
                raise TierUnavailable(f"{self.name} returns other bytes than were put")
        finally:
            self.delete([key])

    def _must_lose(self, key: str, expect: str | None) -> None:
        """Checks that a swap with a wrong condition is refused."""
        try:
            self.set_ref(key, b"3", expect)
        except RaceLost:
            return
        header = "If-Match" if expect else "If-None-Match"
        raise TierUnavailable(
            f"{self.name} ignores {header}: writers would overwrite each other's refs; use a "
            "server with conditional puts"
        )
