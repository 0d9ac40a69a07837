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

__all__ = ["Span", "SpanQuery"]

_SENTENCE = re.compile(r"[^.!?\n]*[^.!?\s][^.!?\n]*(?:[.!?]+|(?=\n)|$)")


@dataclass(frozen=True)
class Span:
    """Token or slot ranges of one memory. Layers that hold fewer slots resolve to fewer.

    Args:
        ranges: half-open ``(start, stop)`` ranges, in order.
        unit: whether the ranges count tokens of the source or slots of a layer.
        text: the text of the span, for people.
    """

    ranges: tuple[tuple[int, int], ...]
    unit: Literal["token", "slot"] = "token"
    text: str = ""

    def __len__(self) -> int:
        """Number of tokens (or slots)."""
        return sum(stop - start for start, stop in self.ranges)

    def __or__(self, other: Span) -> Span:
        """Returns the union; a token in both counts once."""
        if self.unit != other.unit:
            raise InvalidArgument(f"can't join a span of {self.unit}s with one of {other.unit}s")
        members = sorted({i for span in (self, other) for a, b in span.ranges for i in range(a, b)})
        ranges: list[tuple[int, int]] = []
        for index in members:
            if ranges and ranges[-1][1] == index:
                ranges[-1] = (ranges[-1][0], index + 1)
            else:
                ranges.append((index, index + 1))
        return Span(tuple(ranges), self.unit, " … ".join(filter(None, (self.text, other.text))))

    def mask(self, layer: LayerKV) -> torch.Tensor:
        """Returns the bool mask ``[slot]`` of the slots of ``layer`` that are in the span."""
        of = layer.source if self.unit == "token" else torch.arange(layer.slots)
        inside = torch.zeros(layer.slots, dtype=torch.bool, device=of.device)
        for start, stop in self.ranges:
            inside |= (of >= start) & (of < stop)
        return inside


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
        slots: half-open slot range of every layer; negative numbers count from the end.
        occurrence: which match, from 1, or ``"all"``; None demands that there be one only.
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
        for name in ("text", "regex", "sentence"):
            if getattr(self, name) == "":
                raise InvalidArgument(f"can't look for an empty {name}")
        for name in ("tokens", "slots"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.occurrence, int) and self.occurrence < 1:
            raise InvalidArgument(f"occurrences count from 1, found {self.occurrence}")

    @classmethod
    def of(cls, span: str | Mapping[str, Any] | Span | SpanQuery) -> Span | SpanQuery:
        """Returns ``span`` as a query: a string is its text, a mapping its parts."""
        if isinstance(span, Span | SpanQuery):
            return span
        if isinstance(span, str):
            return cls(text=span)
        known = {field.name for field in fields(cls)}
        if not isinstance(span, Mapping) or set(span) - known:
            raise InvalidArgument(
                f"a span is a text or a mapping of {sorted(known)}; found {span!r}"
            )
        return cls(**span)

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
        if stop <= start or pair[0] >= size or pair[1] > size:
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
                    lead = len(match.group()) - len(match.group().lstrip())
                    yield match.start() + (lead if self.sentence is not None else 0), match.end()

    def _regions(self, source: Source) -> list[tuple[int, int]]:
        if self.role is None:
            return [(0, len(source.text))]
        roles = sorted({message.role for message in source.messages})
        regions = [(m.start, m.stop) for m in source.messages if m.role == self.role]
        if not regions:
            raise SpanNotFound(f"no message of role {self.role!r}; this memory has {roles or 'none'}")
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
