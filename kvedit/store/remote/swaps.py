"""Swaps: small objects that move, by conditional put."""

from __future__ import annotations

import json
from typing import Any

from kvedit.errors import RaceLost, TierUnavailable
from kvedit.store.remote.failures import Failure, failure_of
from kvedit.store.remote.retry import Again

__all__ = ["read_ref", "swap_in_folder", "swap_ref"]


def read_ref(store: Any, path: str) -> tuple[bytes, str] | None:
    """Returns content and token of a ref from one request, or None if there is none."""
    import obstore

    try:
        answer = obstore.get(store, path)
        return bytes(answer.bytes()), _token(answer.meta)
    except Exception as error:
        if failure_of(error) is Failure.MISSING:
            return None
        raise


def swap_ref(store: Any, path: str, data: bytes, expect: str | None, maybe: bool) -> str:
    """Returns the new token after one conditional put.

    Args:
        store: one without retries of its own.
        path: the ref.
        data: its new content.
        expect: the token that it must have, or None if it must not be there.
        maybe: whether an earlier try may have been carried out.

    Raises:
        Again: if the condition failed though nobody moved the ref: another put is under way.
        RaceLost: if somebody else moved it.
    """
    import obstore

    mode = "create" if expect is None else _version(expect)
    try:
        return _token(obstore.put(store, path, data, mode=mode, use_multipart=False))
    except Exception as error:
        # A swap of a ref that is gone fails as "missing" with some servers.
        if failure_of(error) not in {Failure.CONFLICT, Failure.MISSING}:
            raise
        found = read_ref(store, path)
        if maybe and found and found[0] == data:
            return found[1]
        if (found[1] if found else None) == expect:
            raise Again("another put of the same ref is under way") from error
        raise RaceLost(_lost(path, expect, found)) from None


def swap_in_folder(store: Any, path: str, data: bytes, expect: str | None) -> str:
    """Returns the new token; the caller holds the folder's lock.

    Raises:
        RaceLost: if the ref has another token than ``expect``.
    """
    import obstore

    found = read_ref(store, path)
    if (found[1] if found else None) != expect:
        raise RaceLost(_lost(path, expect, found))
    obstore.put(store, path, data, use_multipart=False)
    return _token(obstore.head(store, path))


def _lost(path: str, expect: str | None, found: tuple[bytes, str] | None) -> str:
    """Returns the message of a lost race."""
    there = f"version {found[1]}" if found else "none"
    return (
        f"{path}: expected {'version ' + expect if expect else 'none'}, found {there}: somebody "
        "else moved it; read it again and repeat the change on top"
    )


def _token(answer: Any) -> str:
    """Returns etag and version of an answer as one text.

    S3, Azure and RAM compare etags, GCS generations; callers need not know which.

    Raises:
        TierUnavailable: if the server names neither.
    """
    etag, version = answer.get("e_tag"), answer.get("version")
    if not etag and not version:
        raise TierUnavailable("the server names no etag of what it holds: it can't keep refs")
    return json.dumps([etag, version], separators=(",", ":"))


def _version(token: str) -> dict[str, str]:
    """Returns the condition that a token stands for.

    Raises:
        RaceLost: if it is no token of this place.
    """
    try:
        etag, version = json.loads(token)
    except ValueError:
        raise RaceLost(f"{token!r} is no token that get_ref or set_ref returned") from None
    named: dict[str, str | None] = {"e_tag": etag, "version": version}
    return {name: value for name, value in named.items() if value is not None}
