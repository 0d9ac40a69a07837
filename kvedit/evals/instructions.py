"""Instruction sets: a rule about the answer's form, amid text that distracts from it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvedit.errors import InvalidArgument
from kvedit.evals.checks import RULES, Rule
from kvedit.evals.facts import facts
from kvedit.evals.filler import filler
from kvedit.evals.tasks import Task

__all__ = ["instruction_tasks"]

_PHRASES = ("That is all.", "Is there anything else?", "Ask again at any time.")


def instruction_tasks(
    n: int, seed: int = 0, rules: Sequence[str] | None = None, words: int = 60
) -> list[Task]:
    """Returns ``n`` tasks; the rules come in turn.

    The context holds three facts about a country, among filler, with the instruction between its
    sentences; the prompt asks to describe the country.

    Args:
        n: number of tasks.
        seed: seed of countries, places and filler.
        rules: names of :data:`~kvedit.evals.checks.RULES`; None takes all.
        words: words of filler.

    Raises:
        InvalidArgument: if ``n`` is below 1.
        UnknownName: if a rule does not exist.
    """
    names = tuple(RULES) if rules is None else tuple(rules)
    if n < 1 or not names:
        raise InvalidArgument(f"expected n >= 1 and rules, found {n} and {names}")
    drawn = random.Random(seed)
    return [_task(_rule(names[index % len(names)], drawn), drawn, words) for index in range(n)]


def _rule(name: str, drawn: random.Random) -> Rule:
    return Rule(name, drawn.randint(2, 4), drawn.choice(_PHRASES))


def _task(rule: Rule, drawn: random.Random, words: int) -> Task:
    known = [facts(kind) for kind in ("capital", "currency", "language")]
    index = drawn.randrange(len(known[0]))
    subject = known[0][index].subject
    said = [f"{_capitalised(kind[index].sentence())}." for kind in known]
    text = said + filler(words, drawn.randrange(1 << 30))
    drawn.shuffle(text)
    text.insert(drawn.randrange(1, len(text)), rule.instruction)
    return Task(
        kind="instruction",
        context=" ".join(text),
        span_text=rule.instruction,
        prompt=f"\nQuestion: What does the text say about {subject}?\nAnswer:",
        rule=rule,
        facts=(("rule", rule.name),),
    )


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
