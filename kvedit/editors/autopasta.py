"""AutoPasta: the model itself names the sentence that a question needs (arXiv 2409.10790)."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import ClassVar, Literal

from kvedit.editors.base import Editor, Reader
from kvedit.editors.pasta import Pasta, Reference
from kvedit.editors.phases import Phase
from kvedit.editors.target import as_number
from kvedit.errors import InvalidArgument, SpanNotFound
from kvedit.memory import KVMemory, Span
from kvedit.memory.heads import HeadSet
from kvedit.memory.span import sentence_ranges

__all__ = ["AutoPasta", "key_sentences"]

PROMPT = (
    "\n\nQuestion: {question}\nQuote the sentence of the text above that answers the question, "
    "word for word:"
)


@dataclass(frozen=True)
class AutoPasta(Editor):
    """Asks the model for the key sentence of a question and steers to it by :class:`Pasta`.

    Sentences that the model names are matched to the closest ones of the context by their
    letters (``difflib``, case and white space aside). The paper compares embeddings of a second
    model, which finds paraphrases too; here the model is asked to quote.

    Args:
        question: what will be asked; the edit serves this question.
        alpha: factor on what is not emphasised, in (0, 1]; the paper's is 0.01.
        heads: query or KV heads; None means all. The paper profiles them.
        reference: against what attention is moved; see :class:`Pasta`.
        sentences: how many sentences of the reply count, from its beginning.
        closeness: how alike a named sentence and its match must be, in (0, 1]; 1 is verbatim.
        max_new_tokens: tokens of the reply at most.
        prompt: how the model is asked; holds ``{question}``. A chat gets it as a user's turn.
        phase: when the bias acts; see :class:`~kvedit.editors.phases.Phased`.

    Raises:
        InvalidArgument: if a parameter is out of range.
        SpanNotFound: if no sentence that the model names is close to one of the context.
    """

    reproducibility: ClassVar[Literal["reader"]] = "reader"

    question: str
    alpha: float = 0.01
    heads: HeadSet | None = None
    reference: Reference = "rest_of_memory"
    sentences: int = 1
    closeness: float = 0.6
    max_new_tokens: int = 64
    prompt: str = PROMPT
    phase: Phase = field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks ranges and makes everything hashable."""
        if not isinstance(self.question, str) or not self.question.strip():
            raise InvalidArgument(f"question: expected a text, found {self.question!r}")
        if not isinstance(self.prompt, str) or "{question}" not in self.prompt:
            raise InvalidArgument(
                f"prompt: expected a text with {{question}}, found {self.prompt!r}"
            )
        for name in ("sentences", "max_new_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidArgument(f"{name}: expected a whole number from 1, found {value!r}")
        closeness = as_number("closeness", self.closeness)
        if not 0 < closeness <= 1:
            raise InvalidArgument(f"closeness must lie in (0, 1], found {self.closeness!r}")
        object.__setattr__(self, "closeness", closeness)
        checked = self._pasta(Span(((0, 1),)))
        object.__setattr__(self, "alpha", checked.alpha)
        object.__setattr__(self, "heads", checked.heads)

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """Whether the context is read anew."""
        return self.phase != "decode"

    def edit(self, *memories: KVMemory, reader: Reader | None = None) -> KVMemory:
        """Returns the memory, steered to the sentences that the model names."""
        memory = memories[0]
        if reader is None:
            raise InvalidArgument("AutoPasta asks the model: pass reader=")
        prompt = self.prompt.replace("{question}", self.question)
        reply = reader.ask(memory, prompt, self.max_new_tokens)
        span = key_sentences(memory, reply, self.sentences, self.closeness)
        return self._pasta(span).edit(memory, reader=reader)

    def _pasta(self, span: Span) -> Pasta:
        return Pasta((span,), self.alpha, self.heads, self.reference, phase=self.phase)


def key_sentences(memory: KVMemory, reply: str, sentences: int = 1, closeness: float = 0.6) -> Span:
    """Returns the sentences of a context that a reply quotes, as one span.

    Args:
        memory: a memory with tokens.
        reply: what the model said.
        sentences: how many sentences of the reply count; a blank line ends it early.
        closeness: least ratio of matching letters, ``2 * matching / total``.

    Raises:
        SpanNotFound: if none of them is close enough to one of the context, with the closest.
    """
    source = memory.source
    if source is None:
        raise SpanNotFound("a memory without tokens has no sentences")
    named = [reply[a:b] for a, b in sentence_ranges(reply)][:sentences]
    places = [pair for pair in sentence_ranges(source.text) if _letters(source.text[slice(*pair)])]
    best = [max((_likeness(text, source.text[a:b]), -a, b) for a, b in places) for text in named]
    found = [(-minus, stop) for ratio, minus, stop in best if ratio >= closeness]
    ranges = tuple(source.token_range(start, stop) for start, stop in found)
    if not found:
        closest = f"; the closest match is {max(best)[0]:.2f} alike" if best else ""
        raise SpanNotFound(
            f"the model named {reply.strip()[:80]!r}, which is no sentence of the memory: expected "
            f"one that is {closeness:g} alike{closest}. Ask otherwise (prompt=), or give the span "
            "to Pasta yourself"
        )
    return Span(ranges, "token", " … ".join(source.text[a:b] for a, b in found))


def _letters(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())


def _likeness(named: str, sentence: str) -> float:
    return SequenceMatcher(None, _letters(named), _letters(sentence), autojunk=False).ratio()
