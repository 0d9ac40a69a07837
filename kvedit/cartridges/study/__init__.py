"""Self-study: questions and answers about a corpus, made by the model itself."""

from __future__ import annotations

from kvedit.cartridges.study.chunks import Chunk, Chunker, Chunking
from kvedit.cartridges.study.corpus import Corpus, Document
from kvedit.cartridges.study.decoding import Decoding
from kvedit.cartridges.study.filters import REASONS, Filters
from kvedit.cartridges.study.making import Pair, samples_from
from kvedit.cartridges.study.sample_set import SampleSet
from kvedit.cartridges.study.seeds import FORMATS, KINDS, OPENINGS, SeedPrompt
from kvedit.cartridges.study.settings import StudySettings
from kvedit.cartridges.study.synthesis import synthesize
from kvedit.cartridges.study.teacher import Columns, teacher_columns
from kvedit.cartridges.study.turns import (
    INTRO,
    PLAIN_TURN,
    Turns,
    context_of,
    corpus_context,
    question_turn,
)
from kvedit.cartridges.study.writing import merge, save_samples

__all__ = [
    "FORMATS",
    "INTRO",
    "KINDS",
    "OPENINGS",
    "PLAIN_TURN",
    "REASONS",
    "Chunk",
    "Chunker",
    "Chunking",
    "Columns",
    "Corpus",
    "Decoding",
    "Document",
    "Filters",
    "Pair",
    "SampleSet",
    "SeedPrompt",
    "StudySettings",
    "Turns",
    "context_of",
    "corpus_context",
    "merge",
    "question_turn",
    "samples_from",
    "save_samples",
    "synthesize",
    "teacher_columns",
]
