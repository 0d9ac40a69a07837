"""Seed prompts: what the model is asked to ask, so that questions cover a text in many ways.

Kinds follow Cartridges (Eyuboglu et al. 2025, section 4.1 and appendix): one generic prompt gives
questions that are much alike, and several kinds make better cartridges. The wording is our own, and
short, since small models lose the thread of long instructions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kvedit.errors import InvalidArgument, UnknownName

__all__ = ["FORMATS", "KINDS", "OPENINGS", "SeedPrompt", "draw_prompt"]

FORMATS: tuple[str, ...] = ("JSON", "YAML", "TOML", "INI", "XML", "plain text")
"""What ``structuring`` prompts ask for."""

KINDS: Mapping[str, tuple[str, ...]] = {
    "structuring": (
        "Write one instruction that asks for facts of the text as {format}. Name the subject and "
        "the facts that are wanted. Write only the instruction.",
        "Choose a passage of the text with several facts. Write one instruction to lay out those "
        "facts as {format}, naming the people or things it is about. Write only the instruction.",
    ),
    "summarisation": (
        "Write one instruction to sum up what the text says about one of its subjects. Name the "
        "subject. Write only the instruction.",
        "Write one instruction that asks for a short summary of a part of the text, and names the "
        "details it must not leave out. Write only the instruction.",
    ),
    "question": (
        "Write one question that the text answers with a name, a number, a date or a reason. Write "
        "only the question.",
        "Write one question that only a close reader of the text can answer. Name the people or "
        "things it is about. Write only the question.",
        "Write one question whose answer needs two facts of the text. Write only the question.",
    ),
    "use_case": (
        "Who needs the text for work or for a decision? Write one question that this person would "
        "ask. Write only the question.",
        "Think of a task from daily life for which the text is useful. Write the request that "
        "somebody with this task would make. Write only the request.",
    ),
    "creative": (
        "Write one instruction for a letter, a scene, a poem or a dialogue made from the text, and "
        "name the facts that must be in it. Write only the instruction.",
        "Write one question that asks to compare something in the text with something from "
        "elsewhere. Write only the question.",
    ),
    "generic": (
        "Write one question or request about the text that makes sense to somebody who does not "
        "see it. Write only that.",
    ),
}
"""Kind to the prompts among which a sample's is drawn."""


@dataclass(frozen=True)
class SeedPrompt:
    """A prompt that leads the model to a question.

    Args:
        kind: what the sample's ``kind`` will be; several prompts may share one.
        text: what the model is asked; ``{format}`` becomes one of :data:`FORMATS`.
        opening: words that are put into the model's mouth: the question begins with them.

    Raises:
        InvalidArgument: if one of them is blank.
    """

    kind: str
    text: str
    opening: str = ""

    def __post_init__(self) -> None:
        """Checks that there is a text."""
        if not self.kind.strip() or not self.text.strip():
            raise InvalidArgument(f"a seed prompt needs a kind and a text, found {self!r}")


_OPENED = "Write one question that the text answers. Write only the question."

OPENINGS: tuple[SeedPrompt, ...] = tuple(
    SeedPrompt("question", _OPENED, opening)
    for opening in (
        "What is",
        "What does",
        "What happened",
        "Which",
        "Who",
        "When",
        "Where",
        "Why",
        "How many",
        "How much",
        "How does",
    )
)
"""Prompts for small models, which write better questions when the first words are given.

Use them as ``StudySettings(kinds=(), prompts=OPENINGS)``.
"""


def draw_prompt(
    kinds: Sequence[str], extra: Sequence[SeedPrompt], drawn: random.Random
) -> SeedPrompt:
    """Returns a prompt: first one of the kinds, then one of its prompts, each as likely.

    Args:
        kinds: names of :data:`KINDS`.
        extra: a user's own prompts; those that name a kind of the library's join it.
        drawn: where the choice comes from.

    Raises:
        UnknownName: if a kind does not exist.
    """
    table: dict[str, list[SeedPrompt]] = {}
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownName("kind of seed prompt", kind, KINDS)
        table[kind] = [SeedPrompt(kind, text) for text in KINDS[kind]]
    for prompt in extra:
        table.setdefault(prompt.kind, []).append(prompt)
    chosen = drawn.choice(table[drawn.choice(sorted(table))])
    return replace(chosen, text=chosen.text.replace("{format}", drawn.choice(FORMATS)))
