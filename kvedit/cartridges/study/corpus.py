"""Corpus: the documents that a cartridge shall stand for, from texts, files or folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["Corpus", "Document"]

_TEXTS = (".txt", ".md")
_SUFFIXES = (*_TEXTS, ".json")


@dataclass(frozen=True)
class Document:
    """One text with its title.

    Args:
        title: what the text is called in prompts; one title names one document of a corpus.
        text: the text.

    Raises:
        InvalidArgument: if the text is blank, or not writable as UTF-8.
    """

    title: str
    text: str

    def __post_init__(self) -> None:
        """Checks that there is something to read."""
        if not isinstance(self.text, str) or not isinstance(self.title, str):
            raise InvalidArgument(
                f"a document needs a title and a text, found {type(self.title).__name__} and "
                f"{type(self.text).__name__}"
            )
        if not self.text.strip() or not self.title.strip():
            raise InvalidArgument(f"document {self.title!r} has no text, or no title")
        try:
            (self.title + self.text).encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"document {self.title!r} is no valid Unicode: {error}") from None

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of title and text, in hex."""
        return digest_bytes(canonical_json([self.title, self.text]))


@dataclass(frozen=True)
class Corpus:
    """Documents in an order that counts.

    Args:
        documents: at least one; titles differ.

    Raises:
        InvalidArgument: if there is no document, or two have one title.

    Example:
        >>> Corpus.of("Lamps cost 40 euros.", "The shop opens at nine.").documents[1].title
        'document 2'
    """

    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        """Checks titles."""
        if not self.documents:
            raise InvalidArgument("the corpus is empty: expected at least one document")
        titles = Counter(document.title for document in self.documents)
        twice = [title for title, count in titles.items() if count > 1]
        if twice:
            raise InvalidArgument(f"titles must differ, found several documents called {twice}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        """Documents in order."""
        return iter(self.documents)

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the documents' digests, in hex."""
        return digest_bytes(canonical_json([document.digest for document in self.documents]))

    @classmethod
    def of(cls, *texts: str | Document) -> Corpus:
        """Returns a corpus of texts, called ``document 1`` and so on, and of ready documents."""
        return cls(
            tuple(
                text if isinstance(text, Document) else Document(f"document {number}", text)
                for number, text in enumerate(texts, start=1)
            )
        )

    @classmethod
    def read(cls, *paths: str | Path) -> Corpus:
        """Returns the documents of files and folders.

        ``.txt`` and ``.md`` files are one document, called by their path within the folder that
        was given. A ``.json`` file holds a list of documents, or an object with a list under
        ``"documents"``; each is a text or an object with ``"text"`` and, if it has one,
        ``"title"``. Folders are read with all that is below them, in the order of their names;
        other files and hidden ones are passed over there.

        Args:
            *paths: files and folders.

        Raises:
            InvalidArgument: if a path does not exist, can't be read, is of another kind, or holds
                no text.
        """
        documents: list[Document] = []
        for path in map(Path, paths):
            if path.is_dir():
                found = [file for file in _below(path) if file.suffix.lower() in _SUFFIXES]
                if not found:
                    raise InvalidArgument(f"{path} holds no {', '.join(_SUFFIXES)} file")
                for file in found:
                    documents += _read(file, file.relative_to(path).as_posix())
            else:
                documents += _read(path, path.name)
        return cls(tuple(documents))


def _below(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _read(path: Path, title: str) -> list[Document]:
    if path.suffix.lower() not in _SUFFIXES:
        raise InvalidArgument(f"{path}: expected a folder or a file in {', '.join(_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} can't be read as UTF-8 text: {error}") from error
    if path.suffix.lower() in _TEXTS:
        return [Document(title, text)]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path} is no JSON: {error}") from error
    return list(_of_json(path, title, data))


def _of_json(path: Path, title: str, data: Any) -> Iterator[Document]:
    items = data.get("documents") if isinstance(data, dict) else data
    if not isinstance(items, list) or not items:
        raise InvalidArgument(
            f"{path}: expected a list of documents, or an object with one under 'documents'"
        )
    for number, item in enumerate(items, start=1):
        given = {"text": item} if isinstance(item, str) else item
        if not isinstance(given, dict) or not isinstance(given.get("text"), str):
            raise InvalidArgument(
                f"{path}, document {number}: expected a text or an object with 'text'"
            )
        yield Document(str(given.get("title") or f"{title}, {number}"), given["text"])
