"""Span: a selection of slots, found by text, regex, message role, sentence, tokens or slots."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvedit.errors import AmbiguousSpan, InvalidArgument, SpanNotFound
from kvedit.memory.source import Source

if TYPE_CHECKING:
    from kvedit.memory.layer import LayerKV
    from kvedit.memory.memory import KVMemory

__all__ = ["Span", "SpanQuery", "sentence_ranges"]

# A point within a number or name ("18.50", "example.org") ends no sentence; an abbreviation's does.
_SENTENCE = re.compile(r"\S(?:[^.!?\n]|[.!?]+(?!\s|$))*[.!?]*")


@dataclass(frozen=True)
class Span:
    """Token or slot ranges of one memory. Layers that hold fewer slots resolve to fewer.

    Args:
        ranges: half-open ``(start, stop)`` ranges; they are kept in order, and merged where they
            touch.
        unit: whether the ranges count tokens of the source or slots of a layer.
        text: the text of the span, for people.

    Raises:
        InvalidArgument: if a range is empty or negative, or there is none.
    """

    ranges: tuple[tuple[int, int], ...]
    unit: Literal["token", "slot"] = "token"
    text: str = ""

    def __post_init__(self) -> None:
        """Checks the ranges and brings them into one form."""
        pairs = [_pair("ranges", pair) for pair in self.ranges]
        if not pairs or not all(0 <= start < stop for start, stop in pairs):
            raise InvalidArgument(
                f"a span needs ranges with 0 <= start < stop, at least one; found {pairs}"
            )
        if self.unit not in ("token", "slot"):
            raise InvalidArgument(f"a span's unit is 'token' or 'slot', found {self.unit!r}")
        object.__setattr__(self, "ranges", _merged(pairs))

    def __len__(self) -> int:
        """Number of tokens (or slots)."""
        return sum(stop - start for start, stop in self.ranges)

    def __or__(self, other: Span) -> Span:
        """Returns the union; a token in both counts once."""
        if self.unit != other.unit:
            raise InvalidArgument(f"can't join a span of {self.unit}s with one of {other.unit}s")
        text = " … ".join(filter(None, (self.text, other.text)))
        return Span((*self.ranges, *other.ranges), self.unit, text)

    def mask(self, layer: LayerKV) -> torch.Tensor:
        """Returns the bool mask ``[slot]`` of the slots of ``layer`` that are in the span."""
        return self.inside(layer.source)

    def inside(self, source: torch.Tensor) -> torch.Tensor:
        """Returns which slots are in the span, given the token index of each, ``[..., slot]``."""
        slots = torch.arange(source.shape[-1], device=source.device).expand(source.shape)
        of = source if self.unit == "token" else slots
        found = torch.zeros(source.shape, dtype=torch.bool, device=source.device)
        for start, stop in self.ranges:
            found |= (of >= start) & (of < stop)
        return found


@dataclass(frozen=True)
class SpanQuery:
    """How to find a span; hashable, so that it can be a parameter of an editor.

    Exactly one of ``text``, ``regex``, ``sentence``, ``tokens``, ``slots`` is given, or ``role``
    alone for the content of a message; ``role`` beside another restricts it to that role's
    messages.

    Args:
        text: literal text; runs of white space match each other.
        regex: a regular expression (Python's ``re``).
        role: role of a chat message.
        sentence: text that the wanted sentence contains.
        tokens: half-open token range; negative numbers count from the end.
        slots: half-open slot range of every layer; negative numbers count from the end of the
            longest layer.
        occurrence: which match, from 1, or ``"all"``; None demands that there be one only.

    Raises:
        InvalidArgument: if the parts don't fit together.
    """

    text: str | None = None
    regex: str | None = None
    role: str | None = None
    sentence: str | None = None
    tokens: tuple[int, int] | None = None
    slots: tuple[int, int] | None = None
    occurrence: int | Literal["all"] | None = None

    def __post_init__(self) -> None:
        """Checks that the parts fit together."""
        ways = ("text", "regex", "sentence", "tokens", "slots")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1 or not (given or self.role):
            raise InvalidArgument(
                f"a span is found by one of {', '.join(ways)}, or by role; given: {given or None}"
            )
        for name in ("text", "regex", "role", "sentence"):
            _check_text(name, getattr(self, name))
        for name in ("tokens", "slots"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _pair(name, getattr(self, name)))
                if self.role is not None or self.occurrence is not None:
                    raise InvalidArgument(
                        f"{name} select exactly one range; role and occurrence don't go with it, "
                        f"found {self.describe()}"
                    )
        _check_occurrence(self.occurrence)

    @classmethod
    def of(cls, span: str | Mapping[str, Any] | Span | SpanQuery) -> Span | SpanQuery:
        """Returns ``span`` as a query, or as it is if it was found already.

        A string is the text to find; a mapping holds the parts of a query, or of a span (then it
        has ``ranges``).

        Raises:
            InvalidArgument: if it is something else.
        """
        if isinstance(span, Span | SpanQuery):
            return span
        if isinstance(span, str):
            return cls(text=span)
        kind = Span if isinstance(span, Mapping) and "ranges" in span else cls
        known = {field.name for field in fields(kind)}
        if not isinstance(span, Mapping) or set(span) - known:
            raise InvalidArgument(
                f"a span is a text or a mapping of {sorted(known)}; found {span!r}"
            )
        return kind(**span)

    def resolve(self, memory: KVMemory) -> Span:
        """Returns the span in ``memory``.

        Raises:
            SpanNotFound: if nothing matches.
            AmbiguousSpan: if several places match and ``occurrence`` is None.
        """
        if self.slots is not None:
            return self._bounded(self.slots, memory.slots, "slot")
        source = memory.source
        if source is None:
            raise SpanNotFound("this memory has no tokens; select its slots with slots=(a, b)")
        return self.find(source)

    def find(self, source: Source) -> Span:
        """Returns the span of tokens in a source, before there is a memory of it.

        Raises:
            SpanNotFound: if nothing matches.
            AmbiguousSpan: if several places match and ``occurrence`` is None.
            InvalidArgument: if the query selects slots.
        """
        if self.slots is not None:
            raise InvalidArgument(f"a source has tokens and no slots, found {self.describe()}")
        if self.tokens is not None:
            return self._bounded(self.tokens, len(source), "token")
        found = list(self._matches(source))
        chosen = self._choose(found, source)
        ranges = tuple(source.token_range(start, stop) for start, stop in chosen)
        ranges = tuple(pair for pair in ranges if pair[1] > pair[0])
        if not ranges:
            raise SpanNotFound(f"{self.describe()} matches no token")
        return Span(ranges, "token", " … ".join(source.text[a:b] for a, b in chosen))

    def describe(self) -> str:
        """Returns the query in a few words, for messages."""
        parts = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name}={value!r}" for name, value in parts if value is not None)

    def _bounded(self, pair: tuple[int, int], size: int, unit: Literal["token", "slot"]) -> Span:
        start, stop, _ = slice(*pair).indices(size)
        if stop <= start or pair[0] < -size or pair[1] > size:
            raise SpanNotFound(f"{unit}s {pair[0]} to {pair[1]} of a memory of {size} {unit}s")
        return Span(((start, stop),), unit)

    def _matches(self, source: Source) -> Iterator[tuple[int, int]]:
        for start, stop in self._regions(source):
            if self.text is not None:
                words = [re.escape(word) for word in self.text.split()]
                pattern = re.compile(r"\s+".join(words) if words else re.escape(self.text))
            elif self.regex is not None:
                pattern = re.compile(self.regex)
            elif self.sentence is not None:
                pattern = _SENTENCE
            else:
                yield start, stop
                continue
            for match in pattern.finditer(source.text, start, stop):
                if match.end() == match.start():
                    continue
                if self.sentence is None or self.sentence in match.group():
                    yield match.start(), match.end()

    def _regions(self, source: Source) -> list[tuple[int, int]]:
        if self.role is None:
            return [(0, len(source.text))]
        roles = sorted({message.role for message in source.messages})
        regions = [(m.start, m.stop) for m in source.messages if m.role == self.role]
        if not regions:
            raise SpanNotFound(
                f"no message of role {self.role!r}; this memory has {roles or 'none'}"
            )
        return [region for region in regions if region[0] >= 0]

    def _choose(self, found: list[tuple[int, int]], source: Source) -> list[tuple[int, int]]:
        if not found:
            start = source.text[:60].replace("\n", " ")
            raise SpanNotFound(
                f"nothing matches {self.describe()} in a memory of {len(source)} tokens that "
                f"begins {start!r}"
            )
        if self.occurrence == "all":
            return found
        if self.occurrence is None and len(found) > 1:
            raise AmbiguousSpan(
                f"{self.describe()} matches {len(found)} times; choose with occurrence=1 to "
                f"{len(found)}, or 'all'"
            )
        wanted = self.occurrence or 1
        if wanted > len(found):
            raise SpanNotFound(f"{self.describe()}: only {len(found)} matches")
        return [found[wanted - 1]]


def sentence_ranges(text: str) -> list[tuple[int, int]]:
    """Returns the character range of every sentence of a text, as ``sentence=`` queries cut it."""
    return [match.span() for match in _SENTENCE.finditer(text)]


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _pair(name: str, value: Any) -> tuple[int, int]:
    found = tuple(value) if isinstance(value, list | tuple) else ()
    if len(found) != 2 or not all(type(number) is int for number in found):
        raise InvalidArgument(f"{name}: expected a pair of whole numbers, found {value!r}")
    return found


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise InvalidArgument(f"{name}: expected a text that is not empty, found {value!r}")
    if name == "regex":
        try:
            re.compile(value)
        except re.error as error:
            raise InvalidArgument(f"regex {value!r} is not valid: {error}") from error


def _check_occurrence(value: Any) -> None:
    if value is None or value == "all" or (type(value) is int and value >= 1):
        return
    raise InvalidArgument(f"occurrence: expected a number from 1, or 'all'; found {value!r}")
