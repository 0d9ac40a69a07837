"""Keys: what an object may be called."""

from __future__ import annotations

import re

from kvedit.errors import InvalidArgument

__all__ = ["LOCK", "check_key", "check_prefix"]

LOCK = ".kvedit-lock"
"""File in a ``file://`` place that is held while a ref moves; no key can be called so."""

_KEY = re.compile(r"[a-z0-9_-][a-z0-9._-]*(/[a-z0-9_-][a-z0-9._-]*)*")
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*|")
_LENGTH = 700  # S3 allows 1024 bytes, prefix included


def check_key(key: object) -> str:
    """Returns ``key`` if an object may be called so.

    Raises:
        InvalidArgument: if not; the message says what is allowed.
    """
    if isinstance(key, str) and len(key) <= _LENGTH and _KEY.fullmatch(key) and ".." not in key:
        return key
    raise InvalidArgument(
        f"{key!r} can't be a key: use 1 to {_LENGTH} of a-z, 0-9, '.', '_', '-', with '/' between "
        "parts that don't begin with '.'; no '..'"
    )


def check_prefix(prefix: str) -> str:
    """Returns ``prefix`` if keys may be put under it.

    Raises:
        InvalidArgument: if not; the message says what is allowed.
    """
    if len(prefix) <= 300 and _PREFIX.fullmatch(prefix) and ".." not in prefix:
        return prefix
    raise InvalidArgument(
        f"{prefix!r} can't be a prefix: use up to 300 ASCII letters, digits, '.', '_', '-', with "
        "'/' between parts that don't begin with '.'; no '..'"
    )
