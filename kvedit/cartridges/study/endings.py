"""Ending: by what a reply is seen to have ended, and what closes one that is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvedit.errors import InvalidArgument
from kvedit.memory import Source
from kvedit.runtime.spelling import plain_ids
from kvedit.runtime.text import encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ANSWER_STOP", "QUESTION_STOP", "Ending", "answer_tokens", "ending_of"]

QUESTION_STOP = "\n"
"""Ends a question behind a plain text."""

ANSWER_STOP = "\n\n"
"""Ends an answer behind a plain text: a blank line, so that an answer may have several lines."""

_MARK = "kvedit-mark"


@dataclass(frozen=True)
class Ending:
    """What ends a reply.

    Args:
        ids: tokens that end it.
        stop: a text that ends it, or None; the token that completes it is the reply's last.
        closing: ids that are put behind a given answer, so that a student learns to stop.
    """

    ids: frozenset[int]
    stop: str | None
    closing: tuple[int, ...]


def ending_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool, stop: str = ANSWER_STOP
) -> Ending:
    """Returns how replies end: tokens that the model or the chat template ends them with.

    Args:
        model: its generation config names end tokens.
        tokenizer: its chat template shows what stands behind an assistant's message.
        chat: whether replies are turns of a chat; otherwise ``stop`` ends them as well.
        stop: the text.
    """
    end = model.generation_config.eos_token_id
    ids = set(end) if isinstance(end, list | tuple) else {end}
    ids.add(tokenizer.eos_token_id)
    known = frozenset(int(token) for token in ids if token is not None)
    if not chat:
        return Ending(known, stop, tuple(plain_ids(tokenizer, stop)))
    closing = _turn_end(tokenizer)
    if closing is None:
        closing = tokenizer.eos_token_id
    return Ending(
        known | ({closing} if closing is not None else set()),
        None,
        () if closing is None else (closing,),
    )


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that a chat template puts behind an assistant's message."""
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": _MARK}]
    shown = str(tokenizer.apply_chat_template(messages, tokenize=False))
    behind = plain_ids(tokenizer, shown.rpartition(_MARK)[2])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return behind[0] if behind and behind[0] in special else None


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, asked: Source, answer: str, ending: Ending
) -> list[int]:
    """Returns the ids of a given answer, cut as they would stand behind its question, and closed.

    Args:
        tokenizer: the tokenizer.
        asked: what stands before the answer, the question's turn included.
        answer: the answer; white space around it is replaced by what the form asks for.
        ending: how replies end.

    Raises:
        InvalidArgument: if the answer is empty.
    """
    text = answer.strip()
    if not text:
        raise InvalidArgument("the answer is empty")
    if ending.stop is not None:
        # A plain turn ends in a word and a colon; the stop is cut with the answer, as it may share
        # a token with its end.
        text = f" {text}{ending.stop}"
        return encode_turn(tokenizer, asked, text, chat=False).tokens[len(asked) :].tolist()
    ids: list[int] = encode_turn(tokenizer, asked, text, chat=False).tokens[len(asked) :].tolist()
    return [*ids, *ending.closing]
