"""Conflict: a context that contradicts what it said before, or what the model knows.

The shape of CounterFact (Meng et al. 2022, *Locating and editing factual associations in GPT*,
arXiv 2202.05262) put in context as PASTA does (Zhang et al. 2024, arXiv 2311.02262, section 4):
``Previously, {old fact}. Currently, {new fact}.``, and then the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Conflict"]

_LISTS = ("paraphrases", "unrelated", "neighbourhood")


@dataclass(frozen=True)
class Conflict:
    """A context with a new fact in it, and what to ask about it.

    Prompts and answers stand behind one another as written, so all of them begin with the space
    that separates them.

    Args:
        context: the text that becomes the memory.
        span_text: the new fact, as it stands in the context: what is to be emphasised.
        prompt: a text that the answer completes.
        new: the answer by the new fact.
        old: the answer by the old one.
        paraphrases: other prompts with the same answers.
        unrelated: prompts about other facts of the same context; their answers should stay.
        neighbourhood: prompts of the same kind about what the context does not mention; their
            answers should stay as well.

    Raises:
        InvalidArgument: if a text is empty, the span is not in the context, or both answers are
            the same.
    """

    context: str
    span_text: str
    prompt: str
    new: str
    old: str
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[str, ...] = ()
    neighbourhood: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks that it can be asked."""
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in fields(self):
            found = getattr(self, field.name)
            for text in found if field.name in _LISTS else (found,):
                if not isinstance(text, str) or not text.strip():
                    raise InvalidArgument(f"a conflict's {field.name} is empty: {text!r}")
        if self.span_text not in self.context:
            raise InvalidArgument(
                f"the span {self.span_text!r} is not in the context {self.context!r}"
            )
        if self.new.strip() == self.old.strip():
            raise InvalidArgument(f"new and old answer are both {self.new!r}: no conflict")

    @property
    def questions(self) -> tuple[str, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)

    @cached_property
    def key(self) -> str:
        """Digest of all texts: the case's name in reports."""
        return digest_bytes(canonical_json(self.to_json()))[:16]

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Conflict:
        """Returns the conflict that :meth:`to_json` wrote.

        Raises:
            InvalidArgument: if keys are missing or unknown.
        """
        known = {field.name for field in fields(cls)}
        if not {"context", "span_text", "prompt", "new", "old"} <= set(data) <= known:
            raise InvalidArgument(f"expected the keys {sorted(known)}, found {sorted(data)}")
        return cls(**data)
