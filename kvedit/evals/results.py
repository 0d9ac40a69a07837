"""CaseResult: what one conflict gave under one method; and the metrics that are read off it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.fluency import ngram_entropy

__all__ = ["METRICS", "CaseResult", "Moved", "Preference"]


@dataclass(frozen=True)
class Preference:
    """The new answer against the old one behind one prompt; log-probabilities in nats.

    Args:
        new_first: of the new answer's first token.
        old_first: of the old answer's.
        new_whole: of all tokens of the new answer.
        old_whole: of all tokens of the old one.
        top1: whether the new answer's first token is the most likely next one.
        told_apart: whether the first tokens differ; if not, they say nothing.
    """

    new_first: float
    old_first: float
    new_whole: float
    old_whole: float
    top1: bool
    told_apart: bool


@dataclass(frozen=True)
class Moved:
    """How far an answer that should stay has moved from the unedited memory's.

    Args:
        kl: KL(unedited‖edited) of the next token, in nats.
        flipped: whether the answers differ: the most likely next tokens, or whole greedy answers
            where they were generated.
    """

    kl: float
    flipped: bool


@dataclass(frozen=True)
class CaseResult:
    """One conflict under one method.

    Args:
        key: the conflict's key.
        own: preference behind its prompt.
        paraphrases: preferences behind the paraphrases.
        unrelated: answers about other facts of the same memory.
        neighbourhood: answers about what the memory does not mention.
        answer: greedy answer to the prompt, None if none was asked for.
        length: its tokens.
        mass_before: ``[layer][query_head]`` attention on the span from the prompt's last token,
            unedited; None if it was not asked for.
        mass_after: the same, edited.
    """

    key: str
    own: Preference
    paraphrases: tuple[Preference, ...] = ()
    unrelated: tuple[Moved, ...] = ()
    neighbourhood: tuple[Moved, ...] = ()
    answer: str | None = None
    length: int | None = None
    mass_before: tuple[tuple[float, ...], ...] | None = None
    mass_after: tuple[tuple[float, ...], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaseResult:
        """Returns the result that :meth:`to_json` wrote.

        Raises:
            InvalidArgument: if it is something else.
        """
        try:
            return cls(
                key=data["key"],
                own=Preference(**data["own"]),
                paraphrases=tuple(Preference(**one) for one in data["paraphrases"]),
                unrelated=tuple(Moved(**one) for one in data["unrelated"]),
                neighbourhood=tuple(Moved(**one) for one in data["neighbourhood"]),
                answer=data["answer"],
                length=data["length"],
                mass_before=_table(data["mass_before"]),
                mass_after=_table(data["mass_after"]),
            )
        except (KeyError, TypeError) as error:
            raise InvalidArgument(
                f"no result of a conflict: {type(error).__name__}: {error}"
            ) from error


def _table(rows: list[list[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if rows is None else tuple(map(tuple, rows))


def _first(preference: Preference) -> float | None:
    if not preference.told_apart:
        return None
    return float(preference.new_first > preference.old_first)


def _whole(preference: Preference) -> float | None:
    return float(preference.new_whole > preference.old_whole)


def _delta(preference: Preference) -> float | None:
    return preference.new_first - preference.old_first if preference.told_apart else None


def _delta_whole(preference: Preference) -> float | None:
    return preference.new_whole - preference.old_whole


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _flat(table: tuple[tuple[float, ...], ...] | None) -> float | None:
    return None if table is None else fmean(share for row in table for share in row)


METRICS: Mapping[str, Callable[[CaseResult], float | None]] = {
    "efficacy": lambda r: _first(r.own),
    "efficacy_whole": lambda r: _whole(r.own),
    "paraphrase_efficacy": lambda r: _mean([_first(p) for p in r.paraphrases]),
    "paraphrase_efficacy_whole": lambda r: _mean([_whole(p) for p in r.paraphrases]),
    "delta_logp": lambda r: _delta(r.own),
    "delta_logp_whole": lambda r: _delta_whole(r.own),
    "top1": lambda r: float(r.own.top1),
    "kl": lambda r: _mean([m.kl for m in r.unrelated]),
    "flipped": lambda r: _mean([float(m.flipped) for m in r.unrelated]),
    "neighbourhood_kl": lambda r: _mean([m.kl for m in r.neighbourhood]),
    "neighbourhood_flipped": lambda r: _mean([float(m.flipped) for m in r.neighbourhood]),
    "fluency": lambda r: None if r.answer is None else ngram_entropy(r.answer),
    "length": lambda r: None if r.length is None else float(r.length),
    "mass_before": lambda r: _flat(r.mass_before),
    "mass_after": lambda r: _flat(r.mass_after),
}
"""Metric to its value for one case, None where the case does not have it.

``efficacy`` is P(new) > P(old) at the answers' first token (ES of Meng et al. 2022);
``…_whole`` compares whole answers by the sum of their tokens' log-probabilities, which favours
short ones. ``delta_logp`` is log P(new) - log P(old) in nats. ``kl`` and ``flipped`` are
collateral: unrelated questions over the same memory. ``mass_…`` are means over all layers and
heads."""
