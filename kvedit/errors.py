"""Every error that kvedit raises on purpose; a message says what was expected, found, to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AmbiguousSpan",
    "CapacityExceeded",
    "ContextTooLong",
    "CorruptMemory",
    "IncompatibleModel",
    "InvalidArgument",
    "KVEditError",
    "MissingDependency",
    "MutatedMemory",
    "NotCertified",
    "NotFound",
    "NotServed",
    "RaceLost",
    "ShapeMismatch",
    "SpanNotFound",
    "TemplateNotCuttable",
    "TierUnavailable",
    "UnknownName",
    "UnsupportedModel",
    "UntrustedMemory",
]


class KVEditError(Exception):
    """Base of all errors of the library."""


class InvalidArgument(KVEditError, ValueError):
    """An argument is outside of what the call accepts."""


class ShapeMismatch(KVEditError, ValueError):
    """A tensor has other axes than the ones that its place asks for."""


class SpanNotFound(KVEditError, LookupError):
    """A memory holds nothing that fits the selection."""


class AmbiguousSpan(KVEditError, LookupError):
    """A selection fits several places and none was chosen."""


class NotFound(KVEditError, LookupError):
    """A store holds no memory of that name, version or digest."""


class IncompatibleModel(KVEditError):
    """A memory meets a model, tokenizer, RoPE setting or adapter set that did not make it."""


class UnsupportedModel(KVEditError, NotImplementedError):
    """A model has a mechanism that kvedit does not understand; it is named, never guessed at."""


class ContextTooLong(KVEditError, ValueError):
    """A context, or a context and its continuation, runs past the model's positions."""


class TemplateNotCuttable(KVEditError):
    """A chat template renders the longer conversation differently from its beginning."""


class NotServed(KVEditError):
    """An engine answered without the memory that it was asked to answer from."""


class CorruptMemory(KVEditError):
    """Stored bytes are not the bytes that were put."""


class NotCertified(KVEditError):
    """A compiled edit does not do what it was asked to do, within the tolerances given."""


class MutatedMemory(KVEditError):
    """A memory's tensors were changed in place; memories are immutable."""


class UntrustedMemory(KVEditError):
    """A memory is not signed by a key that the store trusts."""


class CapacityExceeded(KVEditError):
    """A tier has no room, and nothing in it may go."""


class RaceLost(KVEditError):
    """Somebody else moved the name since it was read."""


class TierUnavailable(KVEditError):
    """A tier of the store can't be reached or answered wrongly."""


class UnknownName(KVEditError, LookupError):
    """A name is not registered.

    Args:
        kind: what the name was meant to be, for example "editor".
        name: the name that was given.
        known: the names that exist.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Builds the message, with near names first."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}")
        self.kind, self.name, self.known = kind, name, tuple(names)


class MissingDependency(KVEditError, ImportError):
    """An optional library is not installed.

    Args:
        library: the import name that failed.
        extra: the extra of kvedit that brings it.
        purpose: what needed it.
    """

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        """Builds the message with the command that installs the extra."""
        super().__init__(
            f"{purpose} needs {library}, which is not installed: pip install 'kvedit[{extra}]'"
        )
        self.library, self.extra = library, extra
