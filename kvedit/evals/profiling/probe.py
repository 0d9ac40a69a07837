"""Probe: one case on which a head is tried, and the JSON files that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvedit.editors.base import SpanLike
from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict
from kvedit.memory import KVMemory, Span, SpanQuery
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Probe", "read_probes", "set_digest"]


@dataclass(frozen=True, eq=False)
class Probe:
    """A context in which a span should win over the rest, and a prompt that shows whether it does.

    Args:
        context: a text, chat messages, or a memory that was captured already.
        span: what is emphasised: a text, a mapping for
            :class:`~kvedit.memory.span.SpanQuery`, or a span.
        prompt: what the model reads behind the context.
        wanted: continuation that emphasis should make likelier; quote leading spaces.
        rival: continuation that it competes with.
        unrelated: a prompt on something else over the same context, on which steering should
            change nothing; None where collateral is not measured.

    Raises:
        InvalidArgument: if a part is empty, or the two continuations are the same.
    """

    context: str | Sequence[Mapping[str, Any]] | KVMemory
    span: SpanLike
    prompt: str
    wanted: str
    rival: str
    unrelated: str | None = None

    def __post_init__(self) -> None:
        """Checks the texts and reads the span."""
        for name in ("prompt", "wanted", "rival"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                raise InvalidArgument(f"probe: {name} must be a text, found {text!r}")
        if self.unrelated is not None and not (self.unrelated and isinstance(self.unrelated, str)):
            raise InvalidArgument(f"probe: unrelated must be a text, found {self.unrelated!r}")
        if self.wanted == self.rival:
            raise InvalidArgument(f"probe: wanted and rival are both {self.wanted!r}")
        object.__setattr__(self, "span", SpanQuery.of(self.span))

    @classmethod
    def of(cls, data: Any) -> Probe:
        """Returns the probe of a mapping that holds this class's fields.

        Raises:
            InvalidArgument: if a field is missing or unknown.
        """
        known = [field.name for field in fields(cls)]
        found = sorted(data) if isinstance(data, Mapping) else data
        if not isinstance(data, Mapping) or set(data) - set(known):
            raise InvalidArgument(f"a probe is a mapping of {known}, found {found!r}")
        missing = [name for name in known[:-1] if name not in data]
        if missing:
            raise InvalidArgument(f"a probe needs {missing}, found only {found}")
        return cls(**data)

    @classmethod
    def of_conflict(cls, conflict: Conflict) -> Probe:
        """Returns the probe of a conflict; its first unrelated prompt measures collateral."""
        return cls(
            conflict.context,
            conflict.span_text,
            conflict.prompt,
            conflict.new,
            conflict.old,
            conflict.unrelated[0] if conflict.unrelated else None,
        )

    @property
    def digest(self) -> str:
        """BLAKE3 (hex) of everything that the measured numbers depend on."""
        memory = self.context if isinstance(self.context, KVMemory) else None
        span: Any = self.span
        named = Span if isinstance(span, Span) else SpanQuery
        parts = {field.name: getattr(span, field.name) for field in fields(named)}
        if isinstance(span, Span):
            parts.pop("text")  # for people
        texts = {name: getattr(self, name) for name in ("prompt", "wanted", "rival", "unrelated")}
        context = memory.digest if memory else self.context
        plain = {**texts, "context": context, "captured": memory is not None, "span": parts}
        return digest_bytes(canonical_json(plain))


def read_probes(path: str | Path) -> tuple[Probe, ...]:
    """Returns the probes of a JSON file: a list of mappings with the fields of :class:`Probe`.

    Raises:
        InvalidArgument: if it is no such file, with the number of the probe at fault.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"probes {path}: {error}") from error
    if not isinstance(data, list) or not data:
        raise InvalidArgument(f"probes {path}: expected a list of probes, found {type(data)}")
    found = []
    for number, one in enumerate(data):
        try:
            found.append(Probe.of(one))
        except InvalidArgument as error:
            raise InvalidArgument(f"probes {path}, number {number}: {error}") from error
    return tuple(found)


def set_digest(probes: Sequence[Probe]) -> str:
    """Returns the digest of a set of probes, in whatever order they come."""
    return digest_bytes(canonical_json(sorted(probe.digest for probe in probes)))
