"""Names and references: what a memory may be called and how it is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kvedit.errors import InvalidArgument

__all__ = ["PREFIX_LENGTH", "Ref", "check_labels", "check_name", "is_digest", "parse_ref"]

PREFIX_LENGTH = 6
"""Hex characters that a prefix of a digest needs at least."""

_NAME_LENGTH = 200
_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(rf"[0-9a-f]{{{PREFIX_LENGTH},64}}")
_BACK = re.compile(r"(?P<name>.*)@\{(?P<back>[0-9]{1,9})\}", re.DOTALL)


@dataclass(frozen=True)
class Ref:
    """A reference, taken apart.

    Args:
        text: the reference as it was given.
        name: the name that it may stand for.
        back: how many versions back, or None where the reference does not say.
        prefix: the digest, or the beginning of one, that it may stand for; empty if it can't.
    """

    text: str
    name: str
    back: int | None
    prefix: str


def is_digest(text: object) -> bool:
    """Returns whether ``text`` is a whole digest; nothing else ever becomes a path."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def check_name(name: object) -> str:
    """Returns ``name`` if a memory may be called so.

    Raises:
        InvalidArgument: if not; the message says what is allowed.
    """
    valid = (
        isinstance(name, str)
        and len(name) <= _NAME_LENGTH
        and _NAME.fullmatch(name) is not None
        and not {".", ".."} & set(name.split("/"))
        and not is_digest(name)
    )
    if not valid:
        raise InvalidArgument(
            f"{name!r} can't be a name: use 1 to {_NAME_LENGTH} ASCII letters, digits, '.', '_', "
            "'-', and '/' between parts that are neither empty nor '.' nor '..'; "
            "64 hex characters are a digest"
        )
    return str(name)


def check_labels(message: str, tags: Iterable[str]) -> tuple[str, ...]:
    """Returns ``tags``, each once, if message and tags can be written down.

    Raises:
        InvalidArgument: if one is no text, or a tag is empty or has spaces around it.
    """
    if isinstance(tags, str):
        raise InvalidArgument(f"tags are a sequence of texts; found one text: use ({tags!r},)")
    found = tuple(dict.fromkeys(tags))
    for text in (message, *found):
        # A lone surrogate is a str and has no UTF-8.
        if not isinstance(text, str) or text.encode(errors="replace").decode() != text:
            raise InvalidArgument(f"message and tags must be valid Unicode text, found {text!r}")
    if any(not tag or tag != tag.strip() for tag in found):
        raise InvalidArgument(f"a tag can't be empty or begin or end with spaces: {found}")
    return found


def parse_ref(text: object) -> Ref:
    """Returns the parts of ``"name"``, ``"name@{k}"``, a digest or a prefix of one.

    Raises:
        InvalidArgument: if it is none of these.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"a reference is a text, found {type(text).__name__}")
    if match := _BACK.fullmatch(text):
        return Ref(text, check_name(match["name"]), int(match["back"]), "")
    prefix = text.lower() if _PREFIX.fullmatch(text.lower()) else ""
    if is_digest(prefix):
        return Ref(text, "", None, prefix)
    if "@" in text:
        raise InvalidArgument(f"{text!r}: write name@{{k}} for the version k before the newest")
    return Ref(text, check_name(text), None, prefix)
