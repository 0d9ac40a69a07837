"""Scores of one answer: style, correctness, length, repetition."""

from __future__ import annotations

from collections.abc import Mapping

from kvedit.evals.fluency import ngram_entropy
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.steering.answers import answered, is_right
from kvedit.evals.steering.markers import Markers
from kvedit.evals.steering.repeating import distinct, longest_repeat
from kvedit.runtime.session import Reply

__all__ = ["METRICS", "SHARES", "score_answer"]

METRICS: Mapping[str, str] = {
    "marked": "answer holds enough style markers, 0 or 1",
    "markers": "different markers in the answer",
    "opening": "log P(the style's opening) where the answer begins, nats",
    "accuracy": "answer is right, 0 or 1",
    "answered": "answer holds a number or an option, as was asked for, 0 or 1",
    "length": "tokens of the answer",
    "capped": "answer was cut at the most tokens, 0 or 1",
    "distinct_2": "share of the answer's word pairs that are different",
    "repeat": "longest run of words that comes twice, as a share of the answer",
    "fluency": "entropy of the answer's word pairs and triples, bits",
    "kl": "KL(base‖steered) per token on unrelated prompts, nats",
    "flipped": "share of tokens on unrelated prompts that are no longer the likeliest",
}
"""Name and meaning of each metric. The last two are of other prompts than the rest."""

SHARES = ("marked", "accuracy", "answered", "capped")
"""Metrics that are 0 or 1 case by case."""


def score_answer(
    question: RecallQuestion, reply: Reply, opening: float | None, markers: Markers, most: int
) -> dict[str, float]:
    """Returns what an answer is worth; a metric that it does not have is left out.

    Args:
        question: the question.
        reply: the answer.
        opening: log-probability of the style's opening, or None.
        markers: what tells the style.
        most: tokens at which answers are cut.
    """
    found = {
        "marked": float(markers.marked(reply.text)),
        "markers": float(markers.count(reply.text)),
        "opening": opening,
        "accuracy": is_right(question, reply.text),
        "answered": float(answered(question, reply.text)),
        "length": float(len(reply.tokens)),
        "capped": float(len(reply.tokens) >= most),
        "distinct_2": distinct(reply.text),
        "repeat": longest_repeat(reply.text),
        "fluency": ngram_entropy(reply.text),
    }
    return {name: value for name, value in found.items() if value is not None}
