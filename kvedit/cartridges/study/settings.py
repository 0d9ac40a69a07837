"""StudySettings: all that decides what self-study makes of a corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvedit.cartridges.study.chunks import Chunking
from kvedit.cartridges.study.decoding import Decoding, Keep
from kvedit.cartridges.study.filters import Filters
from kvedit.cartridges.study.seeds import KINDS, SeedPrompt
from kvedit.cartridges.study.turns import INTRO, PLAIN_TURN
from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["StudySettings"]


@dataclass(frozen=True)
class StudySettings:
    """What is read, asked, answered and kept.

    Defaults are those of Cartridges (Eyuboglu et al. 2025) where it names them: chunks of 512 to
    1024 tokens, questions at temperature 0.6, greedy answers, the teacher's 20 likeliest tokens.
    Questions leave out the unlikeliest 5 %, as PEFT's recipe does.

    Args:
        chunking: how documents are cut.
        per_chunk: samples that are asked of a chunk when it is read.
        kinds: kinds of seed prompts, of :data:`~kvedit.cartridges.study.KINDS`.
        prompts: seed prompts of the user's own, beside those kinds.
        question: how questions are made.
        answer: how answers are made.
        top_k: likeliest tokens of the teacher that are kept per answer token.
        min_mass: keep only so many that their mass reaches this, in (0, 1]; None keeps ``top_k``.
        filters: what is dropped.
        chat: True or False overrides whether contexts are chats; None: where there is a template.
        intro: words around a chunk, with ``{title}`` and ``{text}``.
        plain: words around a question where contexts are no chats, with ``{question}``.
        tries: samples that may be made for each that is asked for, until the study gives up.

    Raises:
        InvalidArgument: if a number is out of range, or a text lacks its place.
        UnknownName: if a kind does not exist.
    """

    chunking: Chunking = field(default_factory=Chunking)
    per_chunk: int = 4
    kinds: tuple[str, ...] = tuple(KINDS)
    prompts: tuple[SeedPrompt, ...] = ()
    question: Decoding = field(default_factory=lambda: Decoding(128, 0.6, 0.95))
    answer: Decoding = field(default_factory=lambda: Decoding(256))
    top_k: int = 20
    min_mass: float | None = None
    filters: Filters = field(default_factory=Filters)
    chat: bool | None = None
    intro: str = INTRO
    plain: str = PLAIN_TURN
    tries: int = 4

    def __post_init__(self) -> None:
        """Checks numbers, names and texts."""
        object.__setattr__(self, "kinds", tuple(self.kinds))
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for name in ("per_chunk", "top_k", "tries"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.min_mass is not None and not 0 < self.min_mass <= 1:
            raise InvalidArgument(f"min_mass must be in (0, 1] or None, found {self.min_mass}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise UnknownName("kind of seed prompt", kind, KINDS)
        if not self.kinds and not self.prompts:
            raise InvalidArgument("expected at least one kind of seed prompt, or a prompt")
        for name, place in (("intro", "{text}"), ("plain", "{question}")):
            if place not in getattr(self, name):
                raise InvalidArgument(f"{name} needs {place}, found {getattr(self, name)!r}")

    @property
    def keep(self) -> Keep:
        """What is kept of the teacher."""
        return Keep(self.top_k, self.min_mass)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, without what decides only when a study gives up."""
        data = asdict(self)
        del data["tries"]
        data["kinds"] = list(self.kinds)
        data["prompts"] = [asdict(prompt) for prompt in self.prompts]
        return data
