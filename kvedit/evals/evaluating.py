"""evaluate: what an edit does to conflicts, and what it does to everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvedit.editors.base import Editor, Reader
from kvedit.errors import InvalidArgument
from kvedit.evals.asking import Answer, Question, Reading, read_questions
from kvedit.evals.conflicts import Conflict
from kvedit.evals.divergence import token_divergence
from kvedit.evals.journal import Journal
from kvedit.evals.prefills import Prefills
from kvedit.evals.report import Report
from kvedit.evals.results import CaseResult, Moved, Preference
from kvedit.memory import KVMemory, Span, SpanQuery
from kvedit.models.inspection import inspect
from kvedit.runtime.attaching import attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Method", "by_editor", "evaluate", "unedited"]

Method = Callable[[Conflict, KVMemory], KVMemory]
"""Edits the memory of a conflict's context; editors are called inside it."""


def unedited(case: Conflict, memory: KVMemory) -> KVMemory:
    """Returns the memory as it is: the method that edits nothing."""
    return memory


def by_editor(
    make: Callable[[str], Editor], *operands: KVMemory, reader: Reader | None = None
) -> Callable[[Any, KVMemory], KVMemory]:
    """Returns the method that edits each case's span; for conflicts and for tasks.

    Args:
        make: returns the editor for a span's text.
        *operands: operands that follow the memory, for editors that take some.
        reader: the model, for editors that read with it.
    """

    def edited(case: Any, memory: KVMemory) -> KVMemory:
        return make(case.span_text)(memory, *operands, reader=reader)

    return edited


@dataclass(frozen=True)
class _Plan:
    """What is measured, the same for every case."""

    method: Method
    transform: Callable[[Conflict], Conflict] | None
    max_new_tokens: int
    mass: bool
    strict: bool


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    cases: Sequence[Conflict],
    method: Method = unedited,
    *,
    name: str | None = None,
    strength: float | None = None,
    transform: Callable[[Conflict], Conflict] | None = None,
    max_new_tokens: int = 0,
    mass: bool = False,
    path: str | Path | None = None,
    prefills: Prefills | None = None,
    seed: int = 0,
    progress: bool = False,
    strict: bool = True,
) -> Report:
    """Returns how well a method makes the new facts win, and how much else it moves.

    Every case's context is captured, edited and asked; the unedited memory is asked the same.
    All prompts of a case are rows of one forward pass.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        cases: conflicts.
        method: edits a conflict's memory. It gets the case whose context was captured.
        name: the method's name in the report; None takes the functions'.
        strength: its strength, for the report.
        transform: changes the text before it is captured, as prompt baselines do; what should
            stay is compared with the memory of the unchanged text.
        max_new_tokens: tokens of a greedy answer to each prompt that should stay and to the
            conflict's own; 0 generates none, has no fluency and length, and calls an answer
            flipped where the most likely next token differs.
        mass: whether attention on the span is measured, before and after.
        path: journal of results, JSON lines. A run that was cut goes on where it stopped; the
            file is the method's whose name and strength it was begun with, so give different
            parameters different names.
        prefills: captured contexts, to share between calls; None keeps them for this call.
        seed: seed of the bootstrap.
        progress: whether to show a bar.
        strict: whether the compatibility gate holds.

    Raises:
        InvalidArgument: if there is no case, a case comes twice, or the journal is another's.
        IncompatibleModel: if an edited memory does not fit the model.
    """
    keys = [case.key for case in cases]
    if not keys or len(set(keys)) < len(keys) or max_new_tokens < 0:
        raise InvalidArgument(
            f"expected different conflicts and max_new_tokens >= 0, found {len(keys)} of which "
            f"{len(set(keys))} differ, and {max_new_tokens}"
        )
    kept = prefills or Prefills(model, tokenizer)
    if kept.model is not model:
        raise InvalidArgument("these prefills belong to another model")
    text = None if transform is None else _called(transform)
    named = name or ", ".join(filter(None, (text, _called(method))))
    fingerprint = str(inspect(model, tokenizer).spec.identity()["fingerprint"])
    facts = {"name": named, "strength": strength, "model": fingerprint, "transform": text}
    options = {"mass": mass, "max_new_tokens": max_new_tokens}
    journal = Journal(path, {"kind": "conflicts", **facts, **options})
    plan = _Plan(method, transform, max_new_tokens, mass, strict)
    for case in _progress(cases, named, progress):
        if case.key not in journal.done:
            journal.add(_result(kept, case, plan).to_json())
    results = tuple(CaseResult.from_json(journal.done[key]) for key in keys)
    return Report(named, results, strength, seed, fingerprint)


def _called(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _progress(cases: Iterable[Conflict], name: str, shown: bool) -> Iterable[Conflict]:
    if not shown:
        return cases
    from tqdm.auto import tqdm

    bar: Iterable[Conflict] = tqdm(cases, desc=name, unit="case", disable=None)
    return bar


@dataclass(frozen=True, eq=False)
class _Side:
    """One memory's reading of all prompts of a case, and its greedy answers."""

    reading: Reading
    answers: tuple[tuple[str, tuple[int, ...]], ...]


def _result(prefills: Prefills, case: Conflict, plan: _Plan) -> CaseResult:
    held = case if plan.transform is None else plan.transform(case)
    before = _reference(prefills, case, plan)
    memory = prefills.memory(held.context)
    edited = plan.method(held, memory)
    same = edited is memory and held is case
    after = before if same else _side(prefills, held, edited, plan)
    asked = len(case.questions)
    preferences = [
        _preference(after.reading.logprobs[index], *after.reading.answers[index])
        for index in range(asked)
    ]
    moved = _moved(before, after, asked)
    stay = len(case.unrelated)
    answer, tokens = after.answers[0] if after.answers else (None, None)
    return CaseResult(
        key=case.key,
        own=preferences[0],
        paraphrases=tuple(preferences[1:]),
        unrelated=tuple(moved[:stay]),
        neighbourhood=tuple(moved[stay:]),
        answer=answer,
        length=None if tokens is None else len(tokens),
        mass_before=_mass(before),
        mass_after=_mass(after),
    )


def _reference(prefills: Prefills, case: Conflict, plan: _Plan) -> _Side:
    def make() -> tuple[_Side, int]:
        side = _side(prefills, case, prefills.memory(case.context), plan)
        return side, side.reading.logprobs.nbytes

    key = ("side", case.key, plan.max_new_tokens, plan.mass, plan.strict)
    side: _Side = prefills.once(key, make)
    return side


def _side(prefills: Prefills, case: Conflict, memory: KVMemory, plan: _Plan) -> _Side:
    asked = [Question(prompt, (case.new, case.old)) for prompt in case.questions]
    stay = [Question(prompt) for prompt in (*case.unrelated, *case.neighbourhood)]
    span = _span(case, memory) if plan.mass else None
    model, tokenizer = prefills.model, prefills.tokenizer
    reading = read_questions(
        model, tokenizer, memory, [*asked, *stay], span=span, strict=plan.strict
    )
    if not plan.max_new_tokens:
        return _Side(reading, ())
    prompts = [case.prompt, *(question.prompt for question in stay)]
    with attach(model, memory, tokenizer, rows=len(prompts), strict=plan.strict) as session:
        found: Any = session.generate(
            prompts, max_new_tokens=plan.max_new_tokens, do_sample=False, chat=False
        )
    replies = found if isinstance(found, list) else [found]
    return _Side(reading, tuple((reply.text, reply.tokens) for reply in replies))


def _span(case: Conflict, memory: KVMemory) -> Span:
    return memory.resolve(SpanQuery(text=case.span_text, occurrence="all"))


def _preference(logprobs: torch.Tensor, new: Answer, old: Answer) -> Preference:
    return Preference(
        new.first,
        old.first,
        new.whole,
        old.whole,
        top1=int(logprobs.argmax()) == new.token,
        told_apart=new.token != old.token,
    )


def _moved(before: _Side, after: _Side, asked: int) -> list[Moved]:
    kl, same = token_divergence(before.reading.logprobs[asked:], after.reading.logprobs[asked:])
    flipped = [not one for one in same.tolist()]
    if before.answers:
        # The first answer is that to the conflict's own prompt.
        pairs = zip(before.answers[1:], after.answers[1:], strict=True)
        flipped = [a[1] != b[1] for a, b in pairs]
    return [Moved(*pair) for pair in zip(kl.tolist(), flipped, strict=True)]


def _mass(side: _Side) -> tuple[tuple[float, ...], ...] | None:
    """Returns the span's share of the attention from the conflict's own prompt."""
    mass = side.reading.mass
    return None if mass is None else tuple(map(tuple, mass[0].tolist()))
