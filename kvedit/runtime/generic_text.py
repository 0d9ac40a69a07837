"""The generic text on which models are calibrated: written for this library, under its licence.

It mixes what contexts and prompts are made of: prose, dialogue, chat, questions and answers, code,
lists, tables, numbers, and a few other languages. One part is for fitting, another is held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Literal

__all__ = ["generic_texts"]

Part = Literal["fit", "held"]

_HEADING = re.compile(r"^=== (fit|held) (document|chat)\n", re.MULTILINE)
_TURN = re.compile(r"^(user|assistant): ", re.MULTILINE)


def generic_texts(part: Part, chat: bool) -> list[str | list[dict[str, str]]]:
    """Returns the texts of a part, each a document or a conversation.

    Args:
        part: ``"fit"``, about 12,000 tokens in 21 texts, or ``"held"``, about 1,500 in two.
        chat: whether conversations come as messages, for a tokenizer with a chat template;
            otherwise they come as text with the speakers' names.
    """
    found: list[str | list[dict[str, str]]] = []
    for name, kind, body in _parts():
        if name == part:
            found.append(_messages(body) if chat and kind == "chat" else body)
    return found


def _parts() -> Iterator[tuple[str, str, str]]:
    whole = files("kvedit.runtime").joinpath("generic_text.txt").read_text(encoding="utf-8")
    _, *pieces = _HEADING.split(whole)
    for start in range(0, len(pieces), 3):
        name, kind, body = pieces[start : start + 3]
        yield name, kind, body.strip()


def _messages(body: str) -> list[dict[str, str]]:
    _, *pieces = _TURN.split(body)
    return [
        {"role": role, "content": content.strip()}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
