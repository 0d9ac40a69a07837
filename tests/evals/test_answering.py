"""evaluate_tasks: answers are the model's own greedy ones, graded, grouped and resumable."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

import kvedit as kv
from kvedit.editors import Emphasize
from kvedit.errors import InvalidArgument, UnknownName
from kvedit.evals import (
    Prefills,
    Task,
    evaluate_tasks,
    instruction_tasks,
    needle_tasks,
    task_difference,
)
from kvedit.evals.tasks import grade
from kvedit.memory import KVMemory
from kvedit.testing import tiny_model


@lru_cache
def tiny() -> tuple[Any, Any]:
    return tiny_model("llama")


def tasks() -> list[Task]:
    return [*needle_tasks(2, words=30, depths=(0.0, 1.0)), *instruction_tasks(3, words=10)]


def louder(task: Task, memory: KVMemory) -> KVMemory:
    return Emphasize(task.span_text, strength=3.0)(memory)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", [None, louder])
def test_answers_are_those_of_generate_one_by_one(method: Any, batch_size: int) -> None:
    model, tokenizer = tiny()
    report = evaluate_tasks(
        model, tokenizer, tasks(), method, max_new_tokens=5, batch_size=batch_size
    )
    for task, result in zip(tasks(), report.results, strict=True):
        memory = kv.capture(model, tokenizer, task.context)
        edited = memory if method is None else method(task, memory)
        expected = kv.generate(
            model, tokenizer, edited, task.prompt, max_new_tokens=5, do_sample=False
        )
        assert result.answer == expected
        scores = dict(result.scores)
        assert {name: scores[name] for name in grade(task, expected)} == grade(task, expected)
        assert 1 <= scores["length"] <= 5


def test_a_role_makes_the_context_a_message() -> None:
    model, tokenizer = tiny()
    task = tasks()[0]
    report = evaluate_tasks(model, tokenizer, [task], role="system", max_new_tokens=4)
    memory = kv.capture(model, tokenizer, [{"role": "system", "content": task.context}])
    expected = kv.generate(
        model, tokenizer, memory, task.prompt.strip(), max_new_tokens=4, do_sample=False
    )
    assert report.results[0].answer == expected


def test_groups_and_differences_are_by_task(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    found = tasks()
    kept = Prefills(model, tokenizer)
    path = tmp_path / "tasks.jsonl"
    a = evaluate_tasks(model, tokenizer, found, max_new_tokens=4, prefills=kept, path=path)
    again = evaluate_tasks(model, tokenizer, found, max_new_tokens=4, prefills=kept, path=path)
    assert a == again and kept.captures == len(found)
    by = a.by("depth", "length")
    lengths = a.values("length")
    assert by[0.0].n == by[1.0].n == 2 and by[None].n == 3
    assert by[0.0].value == (lengths[found[0].key] + lengths[found[2].key]) / 2
    b = evaluate_tasks(model, tokenizer, found, louder, max_new_tokens=4, prefills=kept)
    difference = task_difference(b, a, "length")
    assert difference.value == pytest.approx(b.mean("length").value - a.mean("length").value)
    assert difference.n == len(found)
    assert "passed" in repr(a)
    summary = json.loads(json.dumps(a.to_json()))
    assert summary["metrics"]["length"]["value"] == a.mean("length").value
    with pytest.raises(UnknownName, match="passed"):
        a.mean("f1")
    with pytest.raises(InvalidArgument, match="max_new_tokens"):
        evaluate_tasks(model, tokenizer, found, max_new_tokens=5, path=path)
    with pytest.raises(InvalidArgument, match="different tasks"):
        evaluate_tasks(model, tokenizer, [found[0], found[0]])
