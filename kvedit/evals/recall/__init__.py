"""Recall: what compacted and trained memories still know, teacher-forced and free-running."""

from kvedit.evals.recall.choices import choice_question, read_choices, read_longhealth
from kvedit.evals.recall.chrf import corpus_chrf, sentence_chrf
from kvedit.evals.recall.composing import Composition, composition
from kvedit.evals.recall.control import Losslessness, losslessness
from kvedit.evals.recall.drifting import Drift, drift
from kvedit.evals.recall.grading import chosen, contains, overlap
from kvedit.evals.recall.mtob import read_mtob
from kvedit.evals.recall.own import read_documents
from kvedit.evals.recall.qasper import read_qasper
from kvedit.evals.recall.question import Document, RecallQuestion, by_document, joined
from kvedit.evals.recall.recalling import recall
from kvedit.evals.recall.report import RecallReport
from kvedit.evals.recall.scoring import METRICS
from kvedit.evals.recall.size import Size

__all__ = [
    "METRICS",
    "Composition",
    "Document",
    "Drift",
    "Losslessness",
    "RecallQuestion",
    "RecallReport",
    "Size",
    "by_document",
    "choice_question",
    "chosen",
    "composition",
    "contains",
    "corpus_chrf",
    "drift",
    "joined",
    "losslessness",
    "overlap",
    "read_choices",
    "read_documents",
    "read_longhealth",
    "read_mtob",
    "read_qasper",
    "recall",
    "sentence_chrf",
]
