"""Training: the ``train`` section of a config, given questions, and losses before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvedit.cartridges import Freeze, Objective, Prefix, Sample, TrainPlan, open_packed
from kvedit.cartridges.evaluation import HeldOut
from kvedit.cartridges.study import Pair, SampleSet, samples_from, save_samples
from kvedit.cartridges.study.writing import differences
from kvedit.cartridges.workers import Workers
from kvedit.errors import IncompatibleModel, InvalidArgument
from kvedit.memory import KVMemory
from kvedit.memory.digest import canonical_json, digest_bytes
from kvedit.runs.steps import Loaded
from kvedit.runs.targets import check_keys

__all__ = ["given_samples", "losses", "read_pairs", "read_plan"]


def read_plan(section: Any) -> TrainPlan:
    """Returns a checked ``train`` section.

    Raises:
        InvalidArgument: if a value is out of range or of another type.
        UnknownName: if a key does not exist.
    """
    check_keys("train", TrainPlan, section)
    # Their constructors would not name the section.
    for name, kind in (("freeze", Freeze), ("objective", Objective)):
        check_keys(f"train.{name}", kind, section.get(name, {}))
    return TrainPlan.of(section)


def read_pairs(path: Path) -> list[Pair]:
    """Returns the questions and answers of a JSONL file.

    Args:
        path: a file with ``{"question": …, "answer": …}`` in every line; without an answer, or
            with null, the model answers.

    Raises:
        InvalidArgument: if it can't be read, a line is something else, or there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"can't read {path}: {error}") from error
    found = [_pair(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InvalidArgument(
            f'{path} holds no question: expected lines of {{"question": "…", "answer": "…"}}'
        )
    return found


def _pair(place: str, line: str) -> Pair:
    wanted = 'expected {"question": "…", "answer": "… or null"}'
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{place} is no JSON ({error}): {wanted}") from error
    question = data.get("question") if isinstance(data, dict) else None
    answer = data.get("answer") if isinstance(data, dict) else None
    if not (isinstance(question, str) and question.strip()) or set(data) - {"question", "answer"}:
        raise InvalidArgument(f"{place}: {wanted}, found {line.strip()[:80]!r}")
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise InvalidArgument(f"{place}: {wanted}, found the answer {answer!r}")
    return question, answer


def given_samples(
    loaded: Loaded, pairs: Sequence[Pair], memory: KVMemory, folder: Path, progress: bool = False
) -> SampleSet:
    """Returns samples of given questions, whose teacher has read a memory; they are made once.

    Args:
        loaded: the model.
        pairs: questions, and answers where there are some.
        memory: what the teacher has read.
        folder: where the samples are, or shall be.
        progress: whether to show a bar.

    Raises:
        IncompatibleModel: if the folder has samples of other pairs, or of another memory.
    """
    facts = {
        "model": memory.model.identity()["fingerprint"],
        "memory": memory.digest,
        "pairs": digest_bytes(canonical_json([list(pair) for pair in pairs])),
    }
    if not folder.exists():
        made = samples_from(loaded.model, loaded.tokenizer, pairs, memory, progress=progress)
        return save_samples(folder, made, facts)
    found = SampleSet(folder)
    differing = differences(found.facts, {"made": "saved", **facts})
    if differing:
        raise IncompatibleModel(
            f"{folder} holds samples of other questions or of another memory: "
            f"{'; '.join(differing)}. Choose another folder, or remove this one"
        )
    return found


def losses(
    loaded: Loaded,
    memory: KVMemory,
    samples: Sequence[Sample],
    plan: TrainPlan,
    teacher: KVMemory | None = None,
) -> Mapping[str, float]:
    """Returns a memory's ``loss``, ``kl`` and ``nll`` per supervised token, in nats.

    Args:
        loaded: the model.
        memory: the memory.
        samples: what it is measured on.
        plan: for the objective and rows.
        teacher: the full memory, for an objective with attention outputs.
    """
    device = loaded.model.device
    with open_packed(loaded.model, loaded.tokenizer) as base:
        held = HeldOut(samples, plan, Workers(device))
        full = None if teacher is None else Prefix.of(teacher, device)
        return held.losses(base, Prefix.of(memory, device), full)
