"""Spelling: the tokens of a question and its answers, the same for every memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvedit.evals.recall.question import RecallQuestion
from kvedit.memory import KVMemory
from kvedit.runtime.text import encode, encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Spelled", "spell"]


@dataclass(frozen=True)
class Spelled:
    """A question in tokens.

    Args:
        prompt: ids that follow a memory.
        alone: ids of the question with nothing before it, a BOS or a chat's beginning included.
        gold: ids of the gold answer, without an end token; empty if none is known.
        choices: ids of each option.
    """

    prompt: tuple[int, ...]
    alone: tuple[int, ...]
    gold: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    def behind(self, memory: KVMemory | None) -> tuple[int, ...]:
        """Returns the question's ids behind a memory, or behind nothing."""
        return self.alone if memory is None else self.prompt


def spell(tokenizer: PreTrainedTokenizerBase, full: KVMemory, question: RecallQuestion) -> Spelled:
    """Returns a question in tokens, as they follow the full context.

    Every memory is asked with these same tokens, also one whose own text would be cut otherwise:
    what is compared is then the memories alone. A context captured as a chat is asked as a chat.

    Raises:
        TemplateNotCuttable: if the chat template renders the longer chat differently.
    """
    source = full.source
    chat = source is not None and source.chat is not None
    text = question.prompt.strip() if chat else question.prompt
    grown = encode_turn(tokenizer, source, text, chat)
    alone = (
        encode_turn(tokenizer, None, text, chat=True) if chat else encode(tokenizer, text.lstrip())
    )
    gap = "" if chat or text[-1].isspace() else " "

    def answer(words: str) -> tuple[int, ...]:
        longer = encode_turn(tokenizer, grown, gap + words.strip(), chat=False)
        return tuple(longer.tokens[len(grown) :].tolist())

    return Spelled(
        prompt=tuple(grown.tokens[full.tokens_count :].tolist()),
        alone=tuple(alone.tokens.tolist()),
        gold=() if question.gold is None else answer(question.gold),
        choices=tuple(answer(words) for words in question.continuations),
    )
