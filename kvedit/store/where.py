"""Where: a small search language over what a store lists, as SQL and as Python."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn

from kvedit.errors import InvalidArgument
from kvedit.store.conditions import FIELDS, Condition, condition, is_field, join, operators

__all__ = ["Where", "parse_where"]

_EXAMPLE = "tag = refunds and (bytes > 1MiB or metric.recall >= 0.9) and age < 7d"
_LENGTH = 4000  # characters: with the shortest conditions, half of SQLite's limit on depth
_DEPTH = 32
_TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<op>!=|<=|>=|[=<>~])|(?P<paren>[()])"""
    r"""|(?P<word>(?:[^\s'"()=<>~!]|!(?!=))+))"""
)


@dataclass(frozen=True)
class Where:
    """A parsed search; made by ``parse_where``.

    Args:
        text: as it was given.
        _part: what it means.
    """

    text: str
    _part: Condition = field(repr=False, compare=False)

    def sql(self) -> tuple[str, list[Any]]:
        """Returns a boolean expression over the alias ``v``, and its parameters.

        The columns of ``v`` are the fields by name; ``created`` as ISO text in UTC, ``tags`` as
        JSON array, ``metrics`` as JSON object, ``pinned`` as 0 or 1. No text of the search
        is in the expression.
        """
        return self._part.sql, list(self._part.values)

    def matches(self, entry: Any) -> bool:
        """Returns whether an entry is meant.

        Args:
            entry: anything with the fields as attributes: ``created`` a datetime, ``tags`` a
                sequence, ``metrics`` a mapping, ``pinned`` a bool. One that it lacks, or that
                is None, fulfils no condition.
        """
        return self._part.test(entry)


def parse_where(text: str, now: datetime | None = None) -> Where:
    """Returns the search that a text describes.

    Conditions ``field op value`` are joined by ``and``, ``or``, ``not`` and parentheses; ``and``
    binds closer than ``or``. Operators are ``= != < <= > >=`` and ``~`` (glob: ``*``, ``?``,
    ``[a-z]``, ``[!a-z]``; the case of A to Z does not count). Values with spaces or operators
    in them are quoted, a quote inside is doubled. ``tag = x`` asks whether any tag is x, ``tag
    != x`` whether none is. ``created`` takes a date (all of that day, in UTC) or a date with time;
    ``age`` a number with s, m, h, d or w. A metric, source or licence that is missing fulfils
    no condition, ``!=`` included. A single word without operator is a glob on names.

    Args:
        text: the search, at most 4000 characters.
        now: from when ``age`` counts; default: the time of this call.

    Raises:
        InvalidArgument: if it is no search; the message names the place and what was expected.
    """
    if not isinstance(text, str):
        raise InvalidArgument(f"where is a text, found {type(text).__name__}. Example: {_EXAMPLE}")
    if len(text) > _LENGTH:
        raise InvalidArgument(
            f"where has {len(text)} characters, at most {_LENGTH} are read: search in steps"
        )
    return Where(text, _Parser(text, now or datetime.now(UTC)).parse())


class _Parser:
    """Reads one text from left to right; ``_at`` is the place of the next token."""

    def __init__(self, text: str, now: datetime) -> None:
        self._text, self._now, self._at = text, now, 0

    def parse(self) -> Condition:
        text = self._text
        if "\0" in text or text.encode(errors="replace").decode() != text:
            at = next(i for i, c in enumerate(text) if c == "\0" or "\ud800" <= c <= "\udfff")
            self._fail("valid Unicode text without NUL", at)
        kind, word, _ = self._peek()
        if kind == "word" and word == text.strip():
            return condition("name", "~", word, self._now)
        part = self._any(0)
        if self._peek()[0]:
            self._fail("'and', 'or' or the end")
        return part

    def _peek(self) -> tuple[str, str, int]:
        """Returns kind, text and end of the next token; empty texts at the end."""
        match = _TOKEN.match(self._text, self._at)
        if match is None:
            if self._text[self._at :].strip():
                self._fail("a closing quote (a quote inside quotes is doubled)")
            return "", "", len(self._text)
        kind = match.lastgroup or ""
        return kind, match[kind], match.end()

    def _take(self, *kinds: str, expected: str) -> tuple[str, int]:
        """Returns the next token without its quotes, and its place."""
        kind, word, end = self._peek()
        if kind not in kinds:
            self._fail(expected)
        self._at = end
        at = end - len(word)
        return (word[1:-1].replace(word[0] * 2, word[0]) if kind == "quoted" else word), at

    def _accept(self, word: str) -> bool:
        kind, found, end = self._peek()
        if kind in ("word", "paren") and found.lower() == word:
            self._at = end
            return True
        return False

    def _any(self, depth: int) -> Condition:
        parts = [self._all(depth)]
        while self._accept("or"):
            parts.append(self._all(depth))
        return join(parts, " OR ", any)

    def _all(self, depth: int) -> Condition:
        parts = [self._one(depth)]
        while self._accept("and"):
            parts.append(self._one(depth))
        return join(parts, " AND ", all)

    def _one(self, depth: int) -> Condition:
        if depth > _DEPTH:
            self._fail(f"at most {_DEPTH} parentheses and 'not' inside each other")
        if self._accept("not"):
            part = self._one(depth + 1)
            return Condition(f"(NOT {part.sql})", part.values, lambda entry: not part.test(entry))
        if self._accept("("):
            part = self._any(depth + 1)
            if not self._accept(")"):
                self._fail("'and', 'or' or ')'")
            return part
        return self._condition()

    def _condition(self) -> Condition:
        name, at = self._take("word", "quoted", expected="a condition, field op value")
        if not is_field(name):
            near = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.5)
            hint = f" ({' or '.join(near)}?)" if near else ""
            self._fail(f"a field{hint} out of {', '.join(FIELDS)}", at, name)
        ops = operators(name)
        op, op_at = self._take("op", expected=f"an operator for {name}, {' '.join(ops)}")
        if op not in ops:
            self._fail(f"an operator for {name}, {' '.join(ops)}", op_at, op)
        value, at = self._take("word", "quoted", expected=f"a value for {name}")
        try:
            return condition(name, op, value, self._now)
        except ValueError as error:
            self._fail(str(error), at, value)

    def _fail(self, expected: str, at: int | None = None, found: str | None = None) -> NoReturn:
        if at is None:
            at = len(self._text) - len(self._text[self._at :].lstrip())
        found = self._text[at : at + 40] if found is None else found[:40]
        raise InvalidArgument(
            f"where: expected {expected}; found {found!r} at character {at + 1}"
            f"{' (the end)' if at >= len(self._text) else ''}. Example: {_EXAMPLE}"
        )
