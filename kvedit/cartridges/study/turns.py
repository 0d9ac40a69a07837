"""How a context, a question and an answer become tokens: one rendering for study and evaluation.

A sample is worth nothing if it is trained behind other tokens than a session will feed. So there
is one function, :func:`question_turn`, for the synthesizer, the teacher and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from kvedit.cartridges.study.corpus import Corpus
from kvedit.errors import InvalidArgument, KVEditError, TemplateNotCuttable
from kvedit.memory import Source
from kvedit.runtime.text import Context, encode, encode_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "INTRO",
    "PLAIN_TURN",
    "Turns",
    "context_of",
    "corpus_context",
    "grown_by_question",
    "question_turn",
    "takes_chat",
]

INTRO = (
    "What follows is taken from: {title}. Later messages are about it; rely on what it says.\n\n"
    "{text}"
)
"""How a text is put before the model."""

PLAIN_TURN = "\n\nQuestion: {question}\nAnswer:"
"""How a question follows a context that is no chat."""

_ACKNOWLEDGED = "I have read it. What do you want to know?"
_LONG = 2048
"""Tokens from which a source is replaced by a short one of the same form, to render turns fast."""


def takes_chat(tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> bool:
    """Returns whether contexts are chats: as asked, or wherever there is a chat template.

    Raises:
        InvalidArgument: if a chat is asked for and the tokenizer has no template.
    """
    has = bool(tokenizer.chat_template)
    if chat and not has:
        raise InvalidArgument("this tokenizer has no chat template: leave out chat=True")
    return has if chat is None else chat


def context_of(
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    text: str,
    *,
    chat: bool | None = None,
    intro: str = INTRO,
) -> Context:
    """Returns what :func:`kvedit.capture` takes, to read a text that is to be asked about.

    With a chat template it is a system message; where the template has none (it drops or refuses
    it, or moves it into the user's turn), it is a user message that the assistant acknowledges.
    Otherwise it is plain text.

    Args:
        tokenizer: the tokenizer.
        title: what the text is called.
        text: the text.
        chat: True or False overrides whether it is a chat.
        intro: words around it, with ``{title}`` and ``{text}``.

    Raises:
        TemplateNotCuttable: if neither form can be followed by a question.
    """
    # Not str.format: a text may hold braces.
    before, _, behind = intro.partition("{text}")
    shown = before.replace("{title}", title) + text + behind.replace("{title}", title)
    if not takes_chat(tokenizer, chat):
        return shown
    system = [{"role": "system", "content": shown}]
    exchange = [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": _ACKNOWLEDGED},
    ]
    for form in (system, exchange):
        if _carries(tokenizer, form):
            return form
    raise TemplateNotCuttable(
        "this chat template takes a context neither as a system message nor as a user message that "
        "was answered, so that a question can follow: pass chat=False"
    )


def _carries(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> bool:
    """Whether a template shows the messages, and shows them the same when a question follows."""
    import jinja2

    short = [{**message, "content": message["content"].strip()[:64]} for message in messages]
    try:
        source = encode(tokenizer, short)
        encode_turn(tokenizer, source, "Which?")
    except (KVEditError, jinja2.TemplateError):
        return False
    return all(message.start >= 0 for message in source.messages)


def corpus_context(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    chat: bool | None = None,
    intro: str = INTRO,
) -> Context:
    """Returns the whole corpus as one context: what a cartridge of it stands for.

    It may be longer than the model's context; then it can be rendered and not be captured.

    Args:
        tokenizer: the tokenizer.
        corpus: the documents.
        chat: True or False overrides whether it is a chat.
        intro: words around it, with ``{title}`` and ``{text}``.
    """
    titles = ", ".join(document.title for document in corpus)
    headed = [f"{document.title}\n\n{document.text}" for document in corpus]
    text = corpus.documents[0].text if len(corpus) == 1 else "\n\n".join(headed)
    return context_of(tokenizer, titles, text, chat=chat, intro=intro)


def question_turn(
    tokenizer: PreTrainedTokenizerBase,
    source: Source | None,
    question: str,
    *,
    chat: bool | None = None,
    plain: str = PLAIN_TURN,
) -> torch.Tensor:
    """Returns the token ids ``[n]`` that follow a memory when it is asked a question.

    These are the tokens that a session over the memory is fed: behind a chat the next user turn
    with the generation prompt, as ``session.generate(question)`` feeds it; behind a text the words
    of ``plain``, as ``session.generate(plain.replace("{question}", question))`` does.

    Args:
        tokenizer: the tokenizer.
        source: the source of the memory, or of the context that a cartridge stands for.
        question: the question.
        chat: True or False overrides how the context was captured.
        plain: words around a question behind a text.

    Raises:
        TemplateNotCuttable: if the template renders the longer chat differently.
        InvalidArgument: if the question is empty.
    """
    known = 0 if source is None else len(source)
    grown = grown_by_question(tokenizer, source, question, chat=chat, plain=plain)
    return grown.tokens[known:]


def grown_by_question(
    tokenizer: PreTrainedTokenizerBase,
    source: Source | None,
    question: str,
    *,
    chat: bool | None = None,
    plain: str = PLAIN_TURN,
) -> Source:
    """Returns the source with the question's turn behind it; see :func:`question_turn`.

    Raises:
        InvalidArgument: if the question is empty.
    """
    if not question.strip():
        raise InvalidArgument("the question is empty")
    if chat if chat is not None else (source is not None and source.chat is not None):
        return encode_turn(tokenizer, source, question, chat=True)
    return encode_turn(tokenizer, source, plain.replace("{question}", question), chat=False)


class Turns:
    """:func:`question_turn` behind one source, for many questions.

    What follows a long context does not depend on what the context says, so a short stand-in of
    the same form is rendered in its place, once it was seen to give the same tokens.

    Args:
        tokenizer: the tokenizer.
        source: the source of the memory, or None.
        chat: True or False overrides how the context was captured.
        plain: words around a question behind a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: Source | None,
        *,
        chat: bool | None = None,
        plain: str = PLAIN_TURN,
    ) -> None:
        """Compares the stand-in with the source."""
        self.tokenizer, self.chat, self.plain = tokenizer, chat, plain
        self.source = source
        self.probe: list[int] = self.tokens("Which one?").tolist()
        if source is not None and len(source) > _LONG:
            self.source = _short(tokenizer, source)
            if self.tokens("Which one?").tolist() != self.probe:
                self.source = source

    def tokens(self, question: str) -> torch.Tensor:
        """Returns the token ids ``[n]`` of a question's turn."""
        return question_turn(
            self.tokenizer, self.source, question, chat=self.chat, plain=self.plain
        )


def _short(tokenizer: PreTrainedTokenizerBase, source: Source) -> Source:
    if source.chat is not None:
        cut: Sequence[Mapping[str, str]] = [
            {"role": message.role, "content": message.content[-256:]} for message in source.messages
        ]
        return encode(tokenizer, cut)
    start = int(source.offsets[-64, 0])
    return Source(source.tokens[-64:], source.text[start:], source.offsets[-64:] - start)
