"""Conditions: one field, operator and value of a search, as SQL and as Python."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from string import ascii_lowercase, ascii_uppercase
from typing import Any

__all__ = ["FIELDS", "Condition", "condition", "is_field", "join", "operators"]

_TEXTS = ("name", "message", "model", "dtype", "source", "licence", "record", "content")
_NUMBERS = ("bytes", "slots", "tokens", "layers", "version", "versions")

FIELDS = (*_TEXTS, *_NUMBERS, "tag", "created", "age", "pinned", "metric.<name>")
"""What a condition can ask for."""

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_NUMBER = re.compile(r"(?P<number>[+-]?[0-9]+(?P<part>(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?))(?P<unit>.*)")
_BYTES = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_GLOB = re.compile(
    r"(?P<star>\*+)|(?P<one>\?)|\[(?P<no>[!^]?)(?P<set>\][^\]]*|[^\]]+)\]|(?P<char>.)", re.DOTALL
)
# 26 characters, YYYY-MM-DDTHH:MM:SS.ffffff: their order is that of time.
_BARE = "replace(replace(v.created, 'Z', ''), '+00:00', '')"
_CREATED = (
    f"substr({_BARE} || CASE WHEN instr({_BARE}, '.') THEN '000000' ELSE '.000000' END, 1, 26)"
)

_METRIC = (  # a path of json_extract could not hold every name
    "(SELECT m.value FROM json_each(v.metrics) AS m WHERE m.key = ? AND m.type IN "
    "('integer', 'real'))"
)


@dataclass(frozen=True)
class Condition:
    """What a search or a piece of it means, twice.

    Args:
        sql: an expression over the alias ``v`` that is 0 or 1 and never NULL.
        values: its parameters.
        test: the same for an entry with the fields as attributes.
    """

    sql: str
    values: tuple[Any, ...]
    test: Callable[[Any], bool]


def is_field(name: str) -> bool:
    """Returns whether a condition can ask for ``name``."""
    return name in FIELDS[:-1] or (name.startswith("metric.") and name != "metric.")


def operators(name: str) -> tuple[str, ...]:
    """Returns the operators that a field takes."""
    special = {"tag": ("=", "!=", "~"), "pinned": ("=", "!="), "age": tuple(_SWAPPED)}
    return special.get(name, (*_COMPARE, "~") if name in _TEXTS else tuple(_COMPARE))


def condition(name: str, op: str, value: str, now: datetime) -> Condition:
    """Returns the condition of a field, one of its operators, and a value.

    Args:
        name: for which ``is_field`` holds.
        op: one of ``operators(name)``.
        value: as it was written.
        now: from when an age counts.

    Raises:
        ValueError: if the field takes no such value; its text is what was expected.
    """
    if name == "tag":
        return _tag(op, value)
    if name == "created":
        return _created(op, value)
    if name == "age":
        return _compare(_CREATED, _moment, _SWAPPED[op], _before(now, value))
    if name == "pinned":
        flag = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}.get(value.lower())
        if flag is None:
            raise ValueError("true or false")
        return _compare("v.pinned", _get("pinned"), op, flag)
    if name.startswith("metric."):
        metric = name.removeprefix("metric.")
        return _compare(_METRIC, _metric(metric), op, _number(value, {"": 1}), metric)
    if name in _NUMBERS:
        number = _number(value, _BYTES if name == "bytes" else {"": 1})
        return _compare(f"v.{name}", _get(name), op, number)
    return _text(name, op, value)


def _compare(left: str, get: Callable[[Any], Any], op: str, right: Any, *before: Any) -> Condition:
    test = _COMPARE[op]

    def matches(entry: Any) -> bool:
        found = get(entry)
        return found is not None and test(found, right)

    return Condition(f"coalesce({left} {op} ?, 0)", (*before, right), matches)


def _text(name: str, op: str, value: str) -> Condition:
    get = _get(name)
    if op != "~":
        return _compare(f"v.{name}", get, op, value)
    pattern, fits = _glob(value)

    def matches(entry: Any) -> bool:
        found = get(entry)
        return found is not None and fits(found)

    return Condition(f"coalesce(lower(v.{name}) GLOB ?, 0)", (pattern,), matches)


def _tag(op: str, value: str) -> Condition:
    pattern, fits = _glob(value) if op == "~" else (value, value.__eq__)
    each = "lower(t.value) GLOB ?" if op == "~" else "t.value = ?"
    exists = f"EXISTS (SELECT 1 FROM json_each(v.tags) AS t WHERE {each})"

    def matches(entry: Any) -> bool:
        return any(map(fits, getattr(entry, "tags", None) or ())) != (op == "!=")

    return Condition(f"(NOT {exists})" if op == "!=" else exists, (pattern,), matches)


def _created(op: str, value: str) -> Condition:
    with suppress(ValueError):
        day = date.fromisoformat(value).isoformat()
        return _compare(f"substr({_CREATED}, 1, 10)", lambda entry: _moment(entry, 10), op, day)
    try:
        return _compare(_CREATED, _moment, op, _stamp(datetime.fromisoformat(value)))
    except (ValueError, OverflowError):
        raise ValueError(
            "a date, 2026-01-31 or 2026-01-31T18:00 (for the last 7 days: age < 7d)"
        ) from None


def _before(now: datetime, value: str) -> str:
    try:
        return _stamp(now - timedelta(seconds=_number(value, _SECONDS)))
    except OverflowError:
        raise ValueError("an age that the calendar can hold") from None


def _stamp(moment: datetime) -> str:
    """Returns the 26 characters of a moment in UTC; one without a zone is in UTC."""
    moment = moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds")


def _number(value: str, units: dict[str, int]) -> int | float:
    match = _NUMBER.fullmatch(value.lower())
    sizes = {unit.lower(): size for unit, size in units.items()}
    if match is None or match["unit"] not in sizes:
        known = " ".join(unit for unit in units if unit)
        raise ValueError(f"a number{f' with one of {known}' if known else ''}")
    number = (float if match["part"] else int)(match["number"]) * sizes[match["unit"]]
    # SQLite's integers end there; its floats don't.
    if math.isinf(number) if isinstance(number, float) else abs(number) >= 2**63:
        raise ValueError("a number below 2^63, or with an exponent below 1e308")
    return number


def _get(name: str) -> Callable[[Any], Any]:
    return lambda entry: getattr(entry, name, None)


def _moment(entry: Any, length: int = 26) -> str | None:
    created = getattr(entry, "created", None)
    return None if created is None else _stamp(created)[:length]


def _metric(name: str) -> Callable[[Any], Any]:
    def get(entry: Any) -> int | float | None:
        found = (getattr(entry, "metrics", None) or {}).get(name)
        if not isinstance(found, int | float) or isinstance(found, bool):
            return None
        return found if math.isfinite(found) else None

    return get


def _glob(pattern: str) -> tuple[str, Callable[[str], bool]]:
    """Returns the pattern as SQLite's GLOB reads it, and the same as a Python test."""
    pieces, parts = [], [""]
    for match in _GLOB.finditer(pattern.translate(_LOWER)):
        char, body = match["char"], match["set"]
        if body == "^" and not match["no"]:  # SQLite would read it as "none of"
            char, body = "^", None
        if match["star"]:
            pieces.append("*")
            parts.append("")
        elif match["one"]:
            pieces.append("?")
            parts[-1] += "."
        elif body:
            pieces.append(f"[{'^' if match['no'] else ''}{body}]")
            parts[-1] += f"[{'^' if match['no'] else ''}{_class(body)}]"
        else:
            pieces.append("[[]" if char == "[" else char)
            parts[-1] += re.escape(char)
    # Atomic groups: a star never tries again, so that no pattern takes exponential time.
    middle = "".join(f"(?>.*?{part})" for part in parts[1:-1])
    end = f".*{parts[-1]}" if len(parts) > 1 else ""
    regex = re.compile(parts[0] + middle + end, re.DOTALL)
    return "".join(pieces), lambda text: regex.fullmatch(text.translate(_LOWER)) is not None


def _class(body: str) -> str:
    """Returns a GLOB set for a regex: ``]`` in front stands for itself, as does ``-`` at an end."""
    head = body[0] if body[0] == "]" else ""
    chars = [re.escape(head)]
    for low, high, one in re.findall(r"(.)-(.)|(.)", body[len(head) :], re.DOTALL):
        chars.append(re.escape(low or one))
        if low and low <= high:
            chars.append(f"{re.escape(low)}-{re.escape(high)}")
    return "".join(chars)


def join(parts: list[Condition], word: str, check: Callable[[Iterable[bool]], bool]) -> Condition:
    """Returns conditions joined by a word of SQL and by ``any`` or ``all`` likewise."""
    if len(parts) == 1:
        return parts[0]
    values = tuple(value for part in parts for value in part.values)
    sql = f"({word.join(part.sql for part in parts)})"
    return Condition(sql, values, lambda entry: check(part.test(entry) for part in parts))
