"""Folders: what a place on a local disk needs and obstore doesn't do: a lock, and fsync."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from kvedit.errors import TierUnavailable
from kvedit.store.remote.keys import LOCK

__all__ = ["hold_folder", "sync_file"]


@contextlib.contextmanager
def hold_folder(folder: Path | None, seconds: float) -> Iterator[None]:
    """Holds the lock of ``folder`` against other threads and processes of this host.

    Args:
        folder: the folder of the place; None holds nothing.
        seconds: how long to wait for it.

    Raises:
        TierUnavailable: if somebody else holds it for longer, or it can't be made.
    """
    if folder is None:
        yield
        return
    lock = filelock.FileLock(folder / LOCK, timeout=max(seconds, 1.0), poll_interval=0.005)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError) as error:
        raise TierUnavailable(
            f"{folder / LOCK} can't be locked within {seconds} s: another process holds it, or "
            f"the folder can't be written to ({error})"
        ) from error
    try:
        yield
    finally:
        lock.release()


def sync_file(folder: Path, path: str) -> None:
    """Has the disk keep ``folder / path`` and its name; obstore leaves both to the system.

    Raises:
        TierUnavailable: if it can't.
    """
    file = folder / path
    below = [parent for parent in file.parents if parent.is_relative_to(folder)]
    try:
        for target in (file, *below):
            handle = os.open(target, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        raise TierUnavailable(f"{file} can't be made durable: {error}") from error
