"""Translation from one book: a grammar's text, and sentence pairs in MTOB's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.recall.question import Document, RecallQuestion
from kvedit.evals.recall.rows import expect, named_rows, reading_row

__all__ = ["read_mtob"]

_SHAPE = "original with ground_truth or translation"


def read_mtob(
    book: str | Path, pairs: str | Path, *, source: str = "Kalamang", target: str = "English"
) -> Document:
    """Returns a grammar book with sentences to translate (Tanzer et al. 2024, MTOB).

    ``book`` is a text file. ``pairs`` is a JSON list of ``{"original", "ground_truth"}`` (test
    sets) or ``{"original", "translation"}`` (training pairs); a first entry without ``original``
    is the set's canary and is left out. Answers are graded by chrF, which needs sacrebleu.

    Args:
        book: path of the book's text.
        pairs: path of the sentence pairs.
        source: language of ``original``.
        target: language of the translations.

    Raises:
        InvalidArgument: if a file can't be read or a row has another shape, naming file and row.
    """
    try:
        text = Path(book).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"book {book}: {error}") from error
    rows = named_rows(pairs)
    if "original" not in rows[0][1]:
        rows = rows[1:]
    if not rows:
        raise InvalidArgument(f"data file {pairs}: no sentence pair, expected {_SHAPE}")
    questions = tuple(_question(where, row, source, target) for where, row in rows)
    return Document(Path(book).stem, text, questions)


def _question(where: str, row: Mapping[str, Any], source: str, target: str) -> RecallQuestion:
    with reading_row(where, _SHAPE):
        sentence = expect(row["original"], str, "original").strip()
        # Test sets carry a blank "translation" for models to fill in.
        truth = row["ground_truth"] if "ground_truth" in row else row["translation"]
        asked = f"\nTranslate this sentence from {source} to {target}.\n{source}: {sentence}"
        return RecallQuestion(
            f"{asked}\n{target}:",
            (expect(truth, str, "translation").strip(),),
            grading=("chrf",),
        )
