"""Conflict sets from the package's own table of facts: each with other facts around it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict
from kvedit.evals.facts import Fact, facts, relations

__all__ = ["capitals", "conflict", "fact_conflicts"]


def capitals(n: int, seed: int = 0, distractors: int = 6) -> list[Conflict]:
    """Returns ``n`` conflicts about capitals; see :func:`fact_conflicts`."""
    return fact_conflicts(n, seed, ("capital",), distractors)


def fact_conflicts(
    n: int, seed: int = 0, kinds: Sequence[str] | None = None, distractors: int = 6
) -> list[Conflict]:
    """Returns ``n`` conflicts about different facts, of all kinds in turn.

    The context is ``Previously, {old fact}. Currently, {new fact}.`` with true facts about other
    subjects before and behind it; with six of them it has some 60 to 100 tokens. ``unrelated``
    asks for two of these facts; ``neighbourhood`` asks what the conflict asks, of subjects that
    the context does not mention. The old value is the true one, so the model's own knowledge
    speaks for it as well.

    Args:
        n: number of conflicts.
        seed: seed of the draw; the first ``m`` of ``n`` are not those of a draw of ``m``.
        kinds: names of :func:`~kvedit.evals.facts.relations`; None takes all.
        distractors: sentences around the conflict.

    Raises:
        InvalidArgument: if there are fewer facts than conflicts.
    """
    drawn = random.Random(seed)
    names = relations() if kinds is None else tuple(kinds)
    pools = [list(facts(name)) for name in names]
    for pool in pools:
        drawn.shuffle(pool)
    total = sum(map(len, pools))
    if not 1 <= n <= total or distractors < 1:
        raise InvalidArgument(
            f"these kinds have {total} facts: asked for {n} conflicts with {distractors} "
            "distractors (at least 1)"
        )
    taken: list[Fact] = []
    while len(taken) < n:
        taken += [pool.pop() for pool in pools if pool]
    return [conflict(fact, drawn, distractors) for fact in taken[:n]]


def conflict(fact: Fact, drawn: random.Random, distractors: int = 6) -> Conflict:
    """Returns one conflict: ``fact`` against the value of another subject of its kind.

    Args:
        fact: the old, true fact.
        drawn: source of randomness.
        distractors: true sentences about other subjects around it.
    """
    peers = [other for other in facts(fact.relation.name) if other.value != fact.value]
    new = drawn.choice(peers).value
    others = _others(fact, new, drawn, distractors)
    span = f"{fact.sentence(value=new)}."
    pair = f"Previously, {fact.sentence(past=True)}. Currently, {span}"
    around = [_capitalised(other.sentence()) + "." for other in others]
    middle = drawn.randrange(len(around) + 1)
    said = {fact.subject, *(other.subject for other in others)}
    near = [peer for peer in peers if peer.subject not in said and peer.value != new]
    ask = fact.relation.prompt.format
    return Conflict(
        context=" ".join([*around[:middle], pair, *around[middle:]]),
        span_text=span,
        prompt=f" {_capitalised(ask(fact.subject))}",
        new=f" {new}",
        old=f" {fact.value}",
        paraphrases=tuple(
            f" {_capitalised(way.format(fact.subject))}" for way in fact.relation.paraphrases
        ),
        unrelated=tuple(
            f" {_capitalised(other.relation.prompt.format(other.subject))}" for other in others[:2]
        ),
        neighbourhood=tuple(
            f" {_capitalised(ask(peer.subject))}" for peer in drawn.sample(near, min(2, len(near)))
        ),
    )


def _others(fact: Fact, new: str, drawn: random.Random, count: int) -> list[Fact]:
    """Returns true facts of other kinds, about other subjects and with other values."""
    pool = [other for name in relations() if name != fact.relation.name for other in facts(name)]
    drawn.shuffle(pool)
    chosen: list[Fact] = []
    for other in pool:
        taken = {fact.subject, *(one.subject for one in chosen)}
        if other.subject not in taken and other.value not in (fact.value, new):
            chosen.append(other)
        if len(chosen) == count:
            break
    return chosen


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
