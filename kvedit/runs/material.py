"""Material: the ``document`` of a config as a corpus that can be cut, studied and captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvedit.cartridges.study import INTRO, Corpus, Document, corpus_context
from kvedit.errors import InvalidArgument
from kvedit.runtime.text import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Material", "read_material"]


@dataclass(frozen=True)
class Material:
    """A corpus and how it is put before the model, whole or in chunks.

    Args:
        corpus: the documents.
        intro: words around a text, with ``{text}``.
        chat: False for plain text; None for a chat where the tokenizer has a template.
    """

    corpus: Corpus
    intro: str
    chat: bool | None

    def context(self, tokenizer: PreTrainedTokenizerBase) -> Context:
        """Returns the whole corpus as one context: what a cartridge of it stands for."""
        found: Context = corpus_context(tokenizer, self.corpus, chat=self.chat, intro=self.intro)
        return found


def read_material(
    path: str | Sequence[str] | None = None,
    text: str | None = None,
    role: str | None = None,
    instruction: str | None = None,
    title: str = "the text",
) -> Material:
    """Returns a ``document`` section as material.

    Args:
        path: a ``.txt``, ``.md`` or ``.json`` file, a folder of them, or a list of both; see
            :meth:`~kvedit.cartridges.study.Corpus.read`.
        text: the text; ignored where a path is given.
        role: ``"system"`` for a chat's first message; None for plain text.
        instruction: put before the text, or around it where it holds ``{text}``; None says what
            :data:`~kvedit.cartridges.study.INTRO` says.
        title: what the text is called.

    Raises:
        InvalidArgument: if there is no document, it can't be read, or the role is another one.
    """
    if role not in ("system", None):
        raise InvalidArgument(
            f"document.role: a corpus is a system message (role: system) or plain text (role: "
            f"null), found {role!r}"
        )
    if path is None and (not isinstance(text, str) or not text.strip()):
        raise InvalidArgument(
            "no document: choose a recipe (recipes=train_cartridge), or set document.path or "
            "document.text"
        )
    chat = None if role == "system" else False
    if path is not None:
        paths = [path] if isinstance(path, str) else path
        return Material(Corpus.read(*paths), _intro(instruction), chat)
    return Material(Corpus.of(Document(title, str(text).strip())), _intro(instruction), chat)


def _intro(instruction: str | None) -> str:
    if not instruction:
        return INTRO
    if "{text}" in instruction:
        return instruction
    return instruction.strip() + "\n\n{text}"
