"""Events: what the model's thread says of an answer while it comes."""

from __future__ import annotations

from dataclasses import dataclass

from kvedit.serving.openai.problems import Problem

__all__ = ["Chosen", "Event", "Failed", "Finished", "Likely", "Piece"]


@dataclass(frozen=True)
class Likely:
    """A token and how likely the model found it.

    Args:
        text: how it is spelled alone.
        logprob: natural logarithm of its probability.
        spelled: False where it is a part of a character, so that ``text`` does not say which.
    """

    text: str
    logprob: float
    spelled: bool


@dataclass(frozen=True)
class Chosen:
    """A token of the answer, and those that might have been.

    Args:
        token: the token.
        top: the likeliest ones, the likeliest first.
        offset: characters of the answer before it.
    """

    token: Likely
    top: tuple[Likely, ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """One more token.

    Args:
        text: what the answer grew by; may be empty while a character or a stop string is open.
        chosen: the token's probability, where asked for.
    """

    text: str
    chosen: Chosen | None


@dataclass(frozen=True)
class Finished:
    """The whole answer.

    Args:
        text: without special tokens and without the stop string that ended it.
        rest: what no :class:`Piece` has said yet.
        tokens: how many the model made, an end token included.
        prompt: tokens of the prompt.
        memory: slots of the memory.
        reason: ``"stop"`` or ``"length"``.
        chosen: every token's probability, where asked for.
    """

    text: str
    rest: str
    tokens: int
    prompt: int
    memory: int
    reason: str
    chosen: tuple[Chosen, ...] | None


@dataclass(frozen=True)
class Failed:
    """There will be no answer.

    Args:
        problem: why.
    """

    problem: Problem


Event = Piece | Finished | Failed
