"""Shared pieces of the study's tests: a corpus, tiny models, settings that keep everything."""

from __future__ import annotations

from functools import lru_cache

import pytest

from kvedit.cartridges.study import (
    Chunking,
    Corpus,
    Decoding,
    Document,
    Filters,
    StudySettings,
    synthesize,
)
from kvedit.models.tiny import tiny_model

NAMES = ["red", "blue", "green", "old", "new", "tall", "small", "glass", "brass", "iron", "oak"]
LAMPS = " ".join(
    f"The {name} lamp costs {7 * i + 3} euros and was made in {1900 + i}. It stands in room {i}."
    for i, name in enumerate(NAMES)
)
HOURS = " ".join(
    f"On day {i} the shop opens at {i + 6} and closes at {i + 12}. Ask for number {i * 31}."
    for i in range(8)
)


@lru_cache(maxsize=8)
def tiny(family="llama"):
    return tiny_model(family)


def corpus_of_lamps():
    return Corpus.of(Document("lamps", LAMPS), Document("hours", HOURS))


@pytest.fixture
def corpus():
    return corpus_of_lamps()


# A random model babbles: its loops and cut answers are kept.
EVERYTHING = Filters(
    min_question_chars=1,
    cut_questions=False,
    cut_answers=False,
    repetition=1.0,
    copied=1.0,
    duplicates=None,
)


def small(**changes):
    options = {
        "chunking": Chunking(min_tokens=20, max_tokens=40),
        "per_chunk": 2,
        "kinds": ("question", "generic"),
        "question": Decoding(10, 0.7),
        "answer": Decoding(8),
        "top_k": 5,
        "filters": EVERYTHING,
    }
    return StudySettings(**{**options, **changes})


@pytest.fixture
def study(corpus, tmp_path):
    """Makes a set of samples with a tiny model."""

    def make(folder="set", n=6, settings=None, family="llama", texts=corpus, **options):
        model, tokenizer = tiny(family)
        chosen = settings or small()
        return synthesize(model, tokenizer, texts, tmp_path / folder, chosen, n, 1, **options)

    return make
