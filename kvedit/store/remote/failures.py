"""Failures of an object store: which are worth another try, and what to tell about the others."""

from __future__ import annotations

import enum
import re

__all__ = ["Failure", "describe", "failure_of"]

_STATUS = re.compile(r"status code: (\d{3})")
_KIND = re.compile(r"\bkind: (Connect|Request|Timeout|Interrupted)\b")
_QUERY = re.compile(r"\?[^\s>]+")  # may hold a signature
_RANGE = re.compile(r"InvalidRange\b|StartTooLarge|status code: 416")
# A wrong name or certificate stays wrong; "Temporary failure in name resolution" is not listed.
_WRONG_PLACE = ("Name or service not known", "nodename nor servname", "certificate", "BadScheme")
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_HINTS = {
    "BadScheme": "the endpoint is plain http: pass allow_http=True if that is meant",
    "NoSuchBucket": "make the bucket first, or correct its name",
    "dns error": "correct the endpoint's host name",
    "status code: 403": "check the credentials and what they allow",
    "PermissionDenied": "check the credentials and what they allow",
    "Unauthenticated": "check the credentials",
    "NotPartial": "the server ignores ranges and can't be used",
}


class Failure(enum.Enum):
    """What an error of ``obstore`` means for the request.

    ``NOT_SENT`` and ``AMBIGUOUS`` are worth another try. After an ambiguous one the server may or
    may not have done what was asked.
    """

    PERMANENT = "permanent"
    NOT_SENT = "not sent"
    AMBIGUOUS = "ambiguous"
    MISSING = "missing"
    CONFLICT = "conflict"
    RANGE = "range"

    @property
    def transient(self) -> bool:
        """Returns whether another try may help."""
        return self in {Failure.NOT_SENT, Failure.AMBIGUOUS}


def failure_of(error: Exception) -> Failure:
    """Returns what ``error`` means.

    ``obstore`` raises one class for nearly everything that a server or the network does wrong,
    so its text decides: the HTTP status, or the kind of the transport's error.
    """
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    text = str(error)
    if isinstance(error, FileNotFoundError):
        return Failure.PERMANENT if "NoSuchBucket" in text else Failure.MISSING
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return Failure.CONFLICT
    if _RANGE.search(text):
        return Failure.RANGE
    if status := _STATUS.search(text):
        busy = int(status[1]) in _BUSY or "<Code>RequestTimeout</Code>" in text
        return Failure.AMBIGUOUS if busy else Failure.PERMANENT
    if (kind := _KIND.search(text)) and not any(sign in text for sign in _WRONG_PLACE):
        return Failure.NOT_SENT if kind[1] == "Connect" else Failure.AMBIGUOUS
    return Failure.PERMANENT


def describe(error: Exception) -> str:
    """Returns one line about ``error``: what happened and, where it is known, what to do."""
    text = str(error)
    happened = " ".join(text.split("Debug source", maxsplit=1)[0].split())
    happened = _QUERY.sub("?…", happened)[:300]
    if cause := re.search(r'message: "([^"]*)"|error: "([^"]*)"|source: (TimedOut)', text):
        happened += f" ({cause[1] or cause[2] or 'timed out'})"
    hints = [hint for sign, hint in _HINTS.items() if sign in text or sign in type(error).__name__]
    return f"{happened}; {hints[0]}" if hints else happened
