"""Sets of others from a path: CounterFact, known facts, SQuAD. Nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvedit.errors import InvalidArgument
from kvedit.evals.conflicts import Conflict

__all__ = ["load_json", "read_counterfact", "read_known_facts"]


def load_json(path: str | Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        InvalidArgument: if it can't be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"data file {path}: {error}") from error


def read_counterfact(
    path: str | Path, n: int | None = None, seed: int = 0, distractors: int = 3
) -> list[Conflict]:
    """Returns conflicts from a file in CounterFact's shape.

    A list of records with ``requested_rewrite`` (``prompt`` with ``{}`` for the ``subject``,
    ``target_new.str``, ``target_true.str``), ``paraphrase_prompts`` and ``neighborhood_prompts``
    (Meng et al. 2022). The old fact is the true target. True facts of other records stand in
    front of it; the first two are the unrelated prompts.

    Args:
        path: the JSON file.
        n: number of records; None takes all, in the file's order.
        seed: seed of the draw of records and distractors.
        distractors: true facts of other records in the context.

    Raises:
        InvalidArgument: if the file has another shape, or fewer records.
    """
    records = _records(path, load_json(path))
    rewrites = [_rewrite(path, index, record) for index, record in enumerate(records)]
    true = [(prompt, old) for prompt, _, old in rewrites]
    drawn = random.Random(seed)
    return [
        _conflict(
            rewrites[index],
            _others(true, rewrites[index], drawn, distractors),
            records[index].get("paraphrase_prompts", ()),
            records[index].get("neighborhood_prompts", ())[:2],
        )
        for index in _draw(len(records), n, seed, path)
    ]


def _rewrite(path: str | Path, index: int, record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns prompt, new and old target of one record."""
    try:
        asked = record["requested_rewrite"]
        prompt = str(asked["prompt"]).replace("{}", str(asked["subject"]))
        return prompt, asked["target_new"]["str"].strip(), asked["target_true"]["str"].strip()
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"data file {path}, record {index}: expected requested_rewrite with prompt, subject, "
            f"target_new.str and target_true.str; {type(error).__name__}: {error}"
        ) from error


def _others(
    facts: Sequence[tuple[str, str]],
    asked: tuple[str, str, str],
    drawn: random.Random,
    count: int,
) -> list[tuple[str, str]]:
    """Returns facts ``(prompt, value)`` that say nothing about what is asked."""
    prompt, new, old = asked
    order = drawn.sample(range(len(facts)), min(len(facts), 4 * count + 20))
    found = [facts[index] for index in order if facts[index][1] not in (new, old)]
    return list({p: (p, v) for p, v in found if p != prompt}.values())[:count]


def _conflict(
    asked: tuple[str, str, str],
    others: Sequence[tuple[str, str]],
    paraphrases: Sequence[str],
    neighbourhood: Sequence[str],
) -> Conflict:
    prompt, new, old = asked
    span = f"{prompt} {new}."
    before = [f"{text} {value}." for text, value in others]
    pair = f"Previously, {prompt} {old}. Currently, {span}"
    return Conflict(
        context=" ".join([*before, pair]),
        span_text=span,
        prompt=f" {prompt}",
        new=f" {new}",
        old=f" {old}",
        paraphrases=tuple(f" {text.strip()}" for text in paraphrases),
        unrelated=tuple(f" {text}" for text, _ in others[:2]),
        neighbourhood=tuple(f" {text.strip()}" for text in neighbourhood),
    )


def read_known_facts(
    path: str | Path, n: int | None = None, seed: int = 0, distractors: int = 3
) -> list[Conflict]:
    """Returns conflicts from a file in the shape of ROME's known facts.

    A list of records with ``subject``, ``attribute``, ``prompt`` and ``relation_id``. The new
    value is the attribute of another subject of the same relation; facts of other relations stand
    in front of it, of which the first two are the unrelated prompts; two other subjects of the
    same relation are the neighbourhood. The set has no paraphrases. Some prompts go on past the
    fact (``… was written in the early 1980s, when the``), so a low efficacy may be theirs.

    Args:
        path: the JSON file.
        n: number of facts; None takes all that have such a partner.
        seed: seed of the draw of facts, partners and distractors.
        distractors: facts of other relations in the context.

    Raises:
        InvalidArgument: if the file has another shape, or fewer facts.
    """
    records = _records(path, load_json(path))
    for index, record in enumerate(records):
        missing = {"subject", "attribute", "prompt", "relation_id"} - set(record)
        if missing:
            raise InvalidArgument(f"data file {path}, record {index}: lacks {sorted(missing)}")
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["relation_id"]].append(record)
    # Only a prompt that names its subject can be asked without the context.
    usable = [
        record
        for record in records
        if record["subject"] in record["prompt"]
        and any(p["attribute"] != record["attribute"] for p in groups[record["relation_id"]])
    ]
    drawn = random.Random(seed)
    return [
        _known(usable[index], records, groups[usable[index]["relation_id"]], drawn, distractors)
        for index in _draw(len(usable), n, seed, path)
    ]


def _known(
    record: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    group: Sequence[Mapping[str, Any]],
    drawn: random.Random,
    distractors: int,
) -> Conflict:
    old = record["attribute"]
    peers = [peer for peer in group if peer["attribute"] != old]
    new = drawn.choice(peers)["attribute"]
    others = [
        (other["prompt"], other["attribute"])
        for other in records
        if other["relation_id"] != record["relation_id"] and other["subject"] in other["prompt"]
    ]
    near = [peer for peer in peers if peer["attribute"] != new]
    asked = (record["prompt"], new, old)
    return _conflict(
        asked,
        _others(others, asked, drawn, distractors),
        (),
        [peer["prompt"] for peer in drawn.sample(near, min(2, len(near)))],
    )


def _records(path: str | Path, data: Any) -> list[Mapping[str, Any]]:
    if not isinstance(data, list) or not data or not all(isinstance(x, Mapping) for x in data):
        raise InvalidArgument(
            f"data file {path}: expected a list of records, found {type(data).__name__}"
        )
    return data


def _draw(total: int, n: int | None, seed: int, path: str | Path) -> list[int]:
    if n is None:
        return list(range(total))
    if not 1 <= n <= total:
        raise InvalidArgument(f"data file {path}: {total} records can be used, asked for {n}")
    return sorted(random.Random(seed).sample(range(total), n))
