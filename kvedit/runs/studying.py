"""Studying: the ``study`` section of a config, and the step that makes samples of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvedit.cartridges.study import (
    OPENINGS,
    PLAIN_TURN,
    Chunking,
    Decoding,
    Filters,
    SampleSet,
    SeedPrompt,
    StudySettings,
    Turns,
    synthesize,
)
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import Source
from kvedit.runs.material import Material
from kvedit.runs.steps import Loaded
from kvedit.runs.targets import fill
from kvedit.tracking import Tracker

__all__ = ["Study", "check_turns", "read_study", "study"]


@dataclass(frozen=True)
class Study:
    """What is made, and where.

    Args:
        settings: how.
        folder: where; None for ``samples`` in the run's folder.
        n: samples.
        seed: of all draws.
        batch_size: rows side by side.
    """

    settings: StudySettings
    folder: str | None
    n: int
    seed: int
    batch_size: int


def read_study(
    material: Material,
    folder: str | None = None,
    n: int = 256,
    seed: int = 0,
    batch_size: int = 8,
    chunking: Mapping[str, Any] | None = None,
    per_chunk: int = 4,
    kinds: Sequence[str] = (),
    openings: bool = False,
    prompts: Sequence[Mapping[str, str]] = (),
    question: Mapping[str, Any] | None = None,
    answer: Mapping[str, Any] | None = None,
    top_k: int = 20,
    min_mass: float | None = None,
    filters: Mapping[str, Any] | None = None,
    tries: int = 4,
) -> Study:
    """Returns a checked ``study`` section; :class:`StudySettings` explains most of its keys.

    Args:
        material: the corpus, which says how chunks are put before the model.
        folder: where samples are, or shall be; None for the run's folder.
        n: samples.
        seed: of all draws.
        batch_size: rows side by side.
        chunking: parameters of :class:`Chunking`.
        per_chunk: samples of a chunk.
        kinds: kinds of seed prompts.
        openings: whether the prompts that open questions for small models are used as well.
        prompts: prompts of one's own: ``kind``, ``text``, and ``opening`` if there is one.
        question: parameters of :class:`Decoding`, for questions.
        answer: the same for answers.
        top_k: the teacher's likeliest tokens that are kept.
        min_mass: mass at which they suffice.
        filters: parameters of :class:`Filters`.
        tries: attempts per sample until the study gives up.

    Raises:
        InvalidArgument: if a value is missing or out of range.
        UnknownName: if a key or a kind does not exist.
    """
    if n < 1 or batch_size < 1:
        raise InvalidArgument(f"study: expected n and batch_size from 1, found {n}, {batch_size}")
    own = [fill(f"study.prompts[{i}]", SeedPrompt, each) for i, each in enumerate(prompts)]
    settings = StudySettings(
        chunking=fill("study.chunking", Chunking, chunking or {}),
        per_chunk=per_chunk,
        kinds=tuple(kinds),
        prompts=(*(OPENINGS if openings else ()), *own),
        question=fill("study.question", Decoding, question or {}),
        answer=fill("study.answer", Decoding, answer or {}),
        top_k=top_k,
        min_mass=min_mass,
        filters=fill("study.filters", Filters, filters or {}),
        chat=material.chat,
        intro=material.intro,
        tries=tries,
    )
    return Study(settings, folder, n, seed, batch_size)


def study(
    loaded: Loaded,
    material: Material,
    wanted: Study,
    folder: Path,
    *,
    source: Source | None = None,
    tracker: Tracker | None = None,
    progress: bool = False,
) -> SampleSet:
    """Returns the samples; a folder that holds some already is gone on with.

    Args:
        loaded: the model.
        material: the corpus.
        wanted: what is made.
        folder: where samples are if ``wanted`` names no folder.
        source: source of the memory that the cartridge will stand for.
        tracker: is told counts and rates.
        progress: whether to show a bar.

    Raises:
        InvalidArgument: if no attempt became a sample.
    """
    found = synthesize(
        loaded.model, loaded.tokenizer, material.corpus, wanted.folder or folder, wanted.settings,
        wanted.n, wanted.seed, source=source, batch_size=wanted.batch_size, tracker=tracker,
        progress=progress,
    )  # fmt: skip
    if not len(found):
        raise InvalidArgument(
            f"none of {found.attempts} attempts became a sample, dropped: {dict(found.dropped)}; "
            "loosen study.filters, or let answers be longer"
        )
    return found


def check_turns(loaded: Loaded, samples: SampleSet, source: Source | None) -> None:
    """Raises unless the questions of samples are the tokens that a session would feed.

    A chat and a text are continued by other tokens: what was trained behind one would be asked
    behind the other. Sets that don't say how their questions were rendered pass.

    Args:
        loaded: the model.
        samples: the samples.
        source: source of the memory that the cartridge will stand for.

    Raises:
        IncompatibleModel: if the questions follow another form of context.
    """
    facts = samples.facts
    if "turn" not in facts:
        return
    plain = facts.get("settings", {}).get("plain", PLAIN_TURN)
    wanted = Turns(loaded.tokenizer, source, plain=plain).probe
    if facts["turn"] != wanted:
        texts = [loaded.tokenizer.decode(ids) for ids in (facts["turn"], wanted)]
        raise IncompatibleModel(
            f"the samples in {samples.folder} were made for another form of context: a question "
            f"stands there as {texts[0]!r}, and after this memory as {texts[1]!r}. Capture the "
            "text as it was studied (a chat, or plain text), or study it anew for this memory "
            "(kvedit study --for NAME)"
        )
