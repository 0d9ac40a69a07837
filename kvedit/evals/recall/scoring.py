"""Scores of one question over one memory: teacher-forced, free-running, and the gap between."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvedit.evals.divergence import token_divergence
from kvedit.evals.recall.grading import grade, overlap
from kvedit.evals.recall.question import RecallQuestion
from kvedit.evals.recall.reading import Ids
from kvedit.evals.recall.spelling import Spelled
from kvedit.runtime.session import Reply

__all__ = ["METRICS", "forced_scores", "free_scores", "gaps"]

METRICS: Mapping[str, str] = {
    "kl": "KL(reference‖memory) per token of the reference answer, nats",
    "kl_worst": "the largest of one token, nats",
    "kl_gold": "KL(reference‖memory) per token of the gold answer, nats",
    "agreement": "share of the reference answer's tokens with the same most likely token",
    "nll_reference": "-log P of the reference answer per token, nats",
    "nll_gold": "-log P of the gold answer per token, nats",
    "gold_top1": "share of the gold answer's tokens that are the most likely ones",
    "choice": "the right option has the largest log-probability",
    "choice_norm": "the same, per character of the option",
    "margin": "log P(right option) - log P(best other option), nats",
    "em": "free answer: exact match (SQuAD's)",
    "f1": "free answer: F1 of words (SQuAD's)",
    "contains": "free answer holds an accepted one",
    "chrf": "free answer: chrF2 of the sentence, 0 to 100",
    "choice_free": "free answer names the right option",
    "same": "free answer is the reference answer, token by token",
    "overlap": "free answer: ROUGE-L F1 with the reference answer, of tokens",
    "length": "tokens of the free answer",
    "generation_gap": "agreement - overlap",
    "choice_gap": "choice - choice_free",
}
"""Name and meaning of each metric. Shares and grades are in [0, 1] but for chrF."""


def forced_scores(
    question: RecallQuestion,
    spelled: Spelled,
    reference: Ids,
    teacher: Mapping[Ids, torch.Tensor],
    found: Mapping[Ids, torch.Tensor],
) -> dict[str, float]:
    """Returns what the distributions along given answers say.

    Args:
        question: the question.
        spelled: its tokens.
        reference: ids of the reference answer.
        teacher: the reference's ``[token, vocabulary]`` log-probabilities along each answer.
        found: the memory's.
    """
    kl, same = token_divergence(teacher[reference].to(found[reference].device), found[reference])
    scores = {
        "kl": float(kl.mean()),
        "kl_worst": float(kl.max()),
        "agreement": float(same.double().mean()),
        "nll_reference": -float(_each(found, reference).mean()),
    }
    gold = spelled.gold
    if gold:
        to_gold, _ = token_divergence(teacher[gold].to(found[gold].device), found[gold])
        hits = found[gold].argmax(dim=-1).cpu() == torch.tensor(gold)
        scores["kl_gold"] = float(to_gold.mean())
        scores["nll_gold"] = -float(_each(found, gold).mean())
        scores["gold_top1"] = float(hits.double().mean())
    return {**scores, **_choice(question, spelled, found)}


def _each(found: Mapping[Ids, torch.Tensor], answer: Ids) -> torch.Tensor:
    """Returns the log-probability of every token of an answer, ``[token]`` float64."""
    logprobs = found[answer]
    return logprobs.gather(1, torch.tensor(answer, device=logprobs.device)[:, None])[:, 0].double()


def _choice(
    question: RecallQuestion, spelled: Spelled, found: Mapping[Ids, torch.Tensor]
) -> dict[str, float]:
    if question.correct is None:
        return {}
    right = question.correct
    sums = [float(_each(found, option).sum()) for option in spelled.choices]
    per = [s / len(text) for s, text in zip(sums, question.continuations, strict=True)]
    return {
        "choice": float(_best(sums) == right),
        "choice_norm": float(_best(per) == right),
        "margin": sums[right] - max(s for index, s in enumerate(sums) if index != right),
    }


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def free_scores(question: RecallQuestion, reply: Reply, reference: Ids) -> dict[str, float]:
    """Returns what a greedy answer is worth, and how far it is the reference answer."""
    return {
        **grade(question, reply.text),
        "same": float(reply.tokens == reference),
        "overlap": overlap(reply.tokens, reference),
        "length": float(len(reply.tokens)),
    }


def gaps(scores: Mapping[str, float]) -> dict[str, float]:
    """Returns by how much teacher-forced quality exceeds that of the memory's own answer.

    ``generation_gap`` is agreement with the reference answer while that answer is fed, less the
    overlap of the freely generated one with it: both are shares of the answer's tokens, and 1 for
    the reference itself. ``choice_gap`` is the same for options.
    """
    found = {"generation_gap": scores["agreement"] - scores["overlap"]}
    if "choice" in scores:
        found["choice_gap"] = scores["choice"] - scores["choice_free"]
    return found
