"""RecallQuestion and Document: what is asked of a memory, and the text that it is asked about."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from kvedit.errors import InvalidArgument
from kvedit.evals.tasks import Task
from kvedit.memory.digest import canonical_json, digest_bytes

__all__ = ["GRADINGS", "Document", "RecallQuestion", "by_document", "joined"]

GRADINGS = ("em", "f1", "contains", "chrf")
"""How a free answer can be graded against the accepted ones."""


@dataclass(frozen=True)
class RecallQuestion:
    r"""A question about a document, and what a right answer is.

    Args:
        prompt: what follows the context, such as ``"\nQuestion: Who?\nAnswer:"``. In a chat it is
            the next user turn, without white space around it.
        answers: accepted answers, without space in front; the first one is the gold answer, whose
            likelihood is measured. May be empty: then nothing is graded.
        choices: options, compared by their log-probability; empty for an open question.
        correct: index of the right option.
        letters: whether the prompt lists options under letters: then the letters are compared.
        grading: names of :data:`GRADINGS` for the free answer; ignored without answers.
        document: name of the document that it is about.
        facts: what reports group by.

    Raises:
        InvalidArgument: if the prompt is empty, or the right option is not among the choices.
    """

    prompt: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int | None = None
    letters: bool = False
    grading: tuple[str, ...] = ("em", "f1", "contains")
    document: str = ""
    facts: tuple[tuple[str, float | str], ...] = ()

    def __post_init__(self) -> None:
        """Checks that it can be asked and graded."""
        if not self.prompt.strip():
            raise InvalidArgument("a question needs a prompt, found an empty one")
        if not all(text.strip() for text in (*self.answers, *self.choices)):
            raise InvalidArgument(f"question {self.prompt!r}: an answer or an option is empty")
        unknown = set(self.grading) - set(GRADINGS)
        if unknown:
            raise InvalidArgument(f"grading: expected some of {GRADINGS}, found {sorted(unknown)}")
        self._check_choices()

    def _check_choices(self) -> None:
        if not self.choices:
            if self.correct is not None or self.letters:
                raise InvalidArgument(f"question {self.prompt!r} has no choices to be correct")
            return
        if not 2 <= len(self.choices) <= len(string.ascii_uppercase):
            raise InvalidArgument(f"expected 2 to 26 choices, found {len(self.choices)}")
        if self.correct is None or not 0 <= self.correct < len(self.choices):
            raise InvalidArgument(
                f"correct: expected an index of {len(self.choices)} choices, found {self.correct}"
            )

    @property
    def continuations(self) -> tuple[str, ...]:
        """Texts of the options as an answer would begin: letters, or the options themselves."""
        return tuple(string.ascii_uppercase[: len(self.choices)]) if self.letters else self.choices

    @property
    def gold(self) -> str | None:
        """The answer whose likelihood is measured; None if none is known."""
        if self.answers:
            return self.answers[0]
        return None if self.correct is None else self.continuations[self.correct]

    @cached_property
    def key(self) -> str:
        """Digest of the question: its name in reports and journals."""
        return digest_bytes(canonical_json(asdict(self)))[:16]


@dataclass(frozen=True)
class Document:
    """A text to make a memory of, and questions about it.

    Args:
        name: its name; questions take it.
        text: the text.
        questions: questions about it; what they name as their document is replaced.

    Raises:
        InvalidArgument: if the text is empty.
    """

    name: str
    text: str
    questions: tuple[RecallQuestion, ...]

    def __post_init__(self) -> None:
        """Checks the text and names the questions' document."""
        if not self.text.strip():
            raise InvalidArgument(f"document {self.name!r} has no text")
        named = tuple(replace(question, document=self.name) for question in self.questions)
        object.__setattr__(self, "questions", named)


def by_document(tasks: Sequence[Task]) -> list[Document]:
    """Returns tasks with free answers as documents: one per context, in their order.

    For :func:`~kvedit.evals.read_squad` (``context="article"`` makes a memory of an article's
    joined paragraphs) and :func:`~kvedit.evals.needle_tasks`. Documents take the article's title.

    Raises:
        InvalidArgument: if a task is graded by a rule, which is no recall.
    """
    found: dict[str, list[RecallQuestion]] = {}
    titles: dict[str, str] = {}
    for task in tasks:
        if task.rule is not None:
            raise InvalidArgument(f"task {task.prompt!r} is graded by a rule: use evaluate_tasks")
        grading = ("contains",) if task.kind == "needle" else ("em", "f1", "contains")
        answers = tuple(answer.strip() for answer in task.answers)
        asked = RecallQuestion(task.prompt, answers, grading=grading, facts=task.facts)
        found.setdefault(task.context, []).append(asked)
        titles.setdefault(task.context, str(dict(task.facts).get("title") or ""))
    names = _different([titles[text] or task_name(text) for text in found])
    return [
        Document(name, text, tuple(questions))
        for name, (text, questions) in zip(names, found.items(), strict=True)
    ]


def task_name(text: str) -> str:
    """Returns the name of a document that has none: the start of its digest."""
    return digest_bytes(text.encode())[:8]


def _different(names: Sequence[str]) -> list[str]:
    # Paragraphs of one article share its title.
    counts = {name: names.count(name) for name in names}
    seen = dict.fromkeys(counts, 0)
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if counts[name] == 1 else f"{name} ({seen[name]})")
    return found


def joined(documents: Sequence[Document], name: str, between: str = "\n\n") -> Document:
    """Returns one document of several, for longer contexts; it has all of their questions.

    Which document a question came from stays in its fact ``part``.

    Args:
        documents: what to join, in this order.
        name: the name of the whole.
        between: text between two.

    Raises:
        InvalidArgument: if there is none.
    """
    if not documents:
        raise InvalidArgument("expected documents to join, found none")
    questions = tuple(
        replace(question, facts=(*question.facts, ("part", document.name)))
        for document in documents
        for question in document.questions
    )
    return Document(name, between.join(document.text for document in documents), questions)
