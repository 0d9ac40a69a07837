"""Templates: contrast sets made of questions, replies, personas or requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from kvedit.errors import InvalidArgument, UnknownName
from kvedit.steering.contrast import Contrast, Pair
from kvedit.steering.questions import Question, arithmetic_questions

__all__ = ["few_shot_reasoning", "persona", "refusal", "style_pairs"]

Layout = Literal["turns", "message", "text"]
Shots = Sequence[tuple[str, str]]


def few_shot_reasoning(
    questions: Iterable[Any] | None = None,
    *,
    pairs: int = 32,
    shots: int = 5,
    seed: int = 0,
    layout: Layout = "turns",
    system: str | None = None,
) -> Contrast:
    """Returns few-shot prompts whose answers are worked out, against the same with answers alone.

    Both sides of a pair have the same questions, and end with the same question, not yet answered
    (Belitsky et al. 2025, arXiv 2507.08799: positive prompts hold reasoning steps and the answer,
    negative ones the answer). The paper picks shots near the question by an encoder;
    here they are drawn by a seed.

    Args:
        questions: :class:`~kvedit.steering.questions.Question`, or what makes one. None takes
            word problems of our own (:func:`~kvedit.steering.questions.arithmetic_questions`).
        pairs: number of pairs.
        shots: answered questions before the last one.
        seed: of the draw, and of our own questions.
        layout: ``"turns"`` makes each shot a user's and an assistant's turn, ``"message"`` puts all
            into one user's message, ``"text"`` is plain text that ends behind the question.
        system: a system message before, for chats.

    Raises:
        InvalidArgument: if there are fewer than ``shots + 1`` questions, or a number is below 1.
        UnknownName: if there is no such layout.
    """
    if layout not in _LAYOUTS:
        raise UnknownName("layout", layout, _LAYOUTS)
    if pairs < 1 or shots < 1:
        raise InvalidArgument(f"expected pairs and shots of 1 or more, found {pairs} and {shots}")
    known = arithmetic_questions(max(2 * pairs, shots + 1), seed)
    if questions is not None:
        known = [Question.of(one) for one in questions]
    if len(known) < shots + 1:
        raise InvalidArgument(
            f"{shots} shots and a question need {shots + 1} questions, found {len(known)}"
        )
    draw = random.Random(seed)
    made = []
    for index in range(pairs):
        last = known[index % len(known)]
        others = draw.sample([one for one in known if one is not last], shots)
        worked = [(one.question, f"{one.reasoning}\nAnswer: {one.answer}") for one in others]
        bare = [(one.question, f"Answer: {one.answer}") for one in others]
        sides = (_LAYOUTS[layout](part, last.question, system) for part in (worked, bare))
        made.append(Pair(*sides))
    return Contrast(tuple(made), "few-shot reasoning")


def style_pairs(replies: Iterable[tuple[str, str, str]], name: str = "style") -> Contrast:
    """Returns chats in which the assistant replies in a style, against a plain reply.

    Args:
        replies: ``(request, styled reply, plain reply)``. Replies are left open at their last word.
        name: of the set.
    """
    pairs = []
    for request, styled, plain in replies:
        pairs.append(Pair(_chat(request, reply=styled), _chat(request, reply=plain)))
    return Contrast(tuple(pairs), name)


def persona(
    prompts: Iterable[str],
    positive: str,
    negative: str,
    *,
    system: str = "Act as if you are {persona}.",
    starts: Sequence[str] = (),
) -> Contrast:
    """Returns the same prompts under two personas, told in the system message.

    Args:
        prompts: what the user says.
        positive: the wanted persona, such as ``"a very cheerful person"``.
        negative: its opposite.
        system: the system message; ``{persona}`` is replaced.
        starts: beginnings of the reply. With them each prompt gives a pair per beginning, which
            both sides share; without, both end with the generation prompt.

    Raises:
        InvalidArgument: if ``system`` has no place for the persona.
    """
    if "{persona}" not in system:
        raise InvalidArgument(f"system: expected a text with {{persona}} in it, found {system!r}")
    told = [system.replace("{persona}", one) for one in (positive, negative)]
    pairs = [
        Pair(*(_chat(prompt, system=one, reply=start) for one in told))
        for prompt in prompts
        for start in (starts or (None,))
    ]
    return Contrast(tuple(pairs), f"persona: {positive}")


_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't do that.",
    "Sorry, that is nothing I will assist with.",
)
_ANSWERS = ("Sure, here is", "Of course. Let me", "Yes, I can help with that. You")


def refusal(
    requests: Iterable[str],
    harmless: Iterable[str] | None = None,
    *,
    refusals: Sequence[str] = _REFUSALS,
    answers: Sequence[str] = _ANSWERS,
) -> Contrast:
    """Returns pairs of refusing, against going along.

    With harmless requests, a harmful request stands against a harmless one, both read at the end
    of the prompt (Arditi et al. 2024, arXiv 2406.11717). Without, the same request is followed by
    the beginning of a refusal, against that of an answer (Lee et al. 2025, CAST, arXiv 2409.05907).

    Args:
        requests: requests; harmful ones if ``harmless`` is given.
        harmless: as many harmless requests, or None.
        refusals: beginnings of a refusal, paired one by one with ``answers``.
        answers: beginnings of an answer.

    Raises:
        InvalidArgument: if numbers of requests or beginnings differ.
    """
    asked = list(requests)
    if harmless is not None:
        others = list(harmless)
        if len(asked) != len(others):
            raise InvalidArgument(
                f"expected as many harmless requests as harmful ones, found {len(others)} and "
                f"{len(asked)}"
            )
        paired = zip(asked, others, strict=True)
        return Contrast(tuple(Pair(_chat(a), _chat(b)) for a, b in paired), "refusal")
    if len(refusals) != len(answers) or not refusals:
        raise InvalidArgument(
            f"expected as many answers as refusals, found {len(answers)} and {len(refusals)}"
        )
    pairs = [
        Pair(_chat(request, reply=no), _chat(request, reply=yes))
        for request in asked
        for no, yes in zip(refusals, answers, strict=True)
    ]
    return Contrast(tuple(pairs), "refusal")


def _chat(
    request: str, system: str | None = None, reply: str | None = None, shots: Shots = ()
) -> list[tuple[str, str]]:
    messages = [("system", system)] if system is not None else []
    for question, answer in shots:
        messages += [("user", question), ("assistant", answer)]
    messages.append(("user", request))
    return messages if reply is None else [*messages, ("assistant", reply)]


def _turns(shots: Shots, question: str, system: str | None) -> Any:
    return _chat(question, system, shots=shots)


def _message(shots: Shots, question: str, system: str | None) -> Any:
    parts = [f"Question: {asked}\n{answer}" for asked, answer in shots]
    return _chat("\n\n".join([*parts, f"Question: {question}"]), system)


def _text(shots: Shots, question: str, system: str | None) -> Any:
    if system is not None:
        raise InvalidArgument("a system message needs the layout 'turns' or 'message'")
    parts = [f"Question: {asked}\n{answer}" for asked, answer in shots]
    return "\n\n".join([*parts, f"Question: {question}\n"])


_LAYOUTS: dict[str, Callable[[Shots, str, str | None], Any]] = {
    "turns": _turns,
    "message": _message,
    "text": _text,
}
